"""timm's backbones behind HIRI-ViT's front end: counts, what is replaced, timm's contract."""

from __future__ import annotations

import pytest
import test_timm_systems
import timm
import torch
from support import staged_backbones as backbones

from fused_ops import HRBlock
from fused_ops.core.drop_path import DropPath
from fused_ops.models import count_macs, count_params, create_model, list_models, systems
from fused_ops.models.hiri_vit import IRDS, HRStem
from fused_ops.models.hiri_vit_lifted import LiftedBackbone

# Channels of the front end (stem, blocks, result), its 1e6 parameters and 1e9 multiply-accumulates at 448;
# 1e6 parameters of the original and its 1e9 at 224 and at 448; both at 448 for lift a and for lift b.
TABLE = {
    "pvt_v2_b0": ((16, 16, 32), (0.025, 0.173), (3.67, 0.57, 2.72), (3.69, 0.72), (3.54, 0.60)),
    "pvt_v2_b1": ((32, 32, 64), (0.096, 0.626), (14.01, 2.11, 9.35), (14.09, 2.70), (13.53, 2.26)),
    "pvt_v2_b2": ((32, 32, 64), (0.096, 0.626), (25.36, 4.03, 17.82), (25.45, 4.62), (24.60, 3.95)),
    "pvt_v2_b2_li": ((32, 32, 64), (0.096, 0.626), (22.55, 3.89, 14.90), (22.64, 4.48), (22.57, 3.85)),
    "pvt_v2_b3": ((32, 32, 64), (0.096, 0.626), (45.24, 6.90, 30.18), (45.32, 7.49), (44.48, 6.83)),
    "pvt_v2_b5": ((32, 32, 64), (0.096, 0.626), (81.96, 11.72, 51.32), (82.04, 12.31), (81.30, 11.98)),
    "davit_tiny": ((32, 48, 96), (0.198, 1.155), (28.36, 4.52, 18.08), (28.54, 5.63), (28.62, 5.12)),
    "davit_small": ((32, 48, 96), (0.198, 1.155), (49.75, 8.77, 35.09), (49.93, 9.88), (50.01, 9.38)),
    "davit_base": ((32, 64, 128), (0.337, 1.848), (87.95, 15.47, 61.89), (88.27, 17.26), (88.41, 16.38)),
    "hrnet_w18": ((32, 32, 64), (0.096, 0.626), (21.30, 4.28, 17.13), (21.36, 4.77), None),
    "hrnet_w32": ((32, 32, 64), (0.096, 0.626), (41.23, 8.92, 35.68), (41.29, 9.41), None),
    "hrnet_w48": ((32, 32, 64), (0.096, 0.626), (77.47, 17.28, 69.11), (77.53, 17.77), None),
}
LIFTED = {
    f"{base}_lift_{lift}": row[3 + number]
    for base, row in TABLE.items()
    for number, lift in enumerate("ab")
    if row[3 + number]
}
# Sizes of one design; the others have more or wider blocks.
LARGE = (
    "pvt_v2_b1",
    "pvt_v2_b2",
    "pvt_v2_b3",
    "pvt_v2_b5",
    "davit_small",
    "davit_base",
    "hrnet_w32",
    "hrnet_w48",
)
ONE_EACH = ("pvt_v2_b0_lift_a", "pvt_v2_b0_lift_b", "davit_tiny_lift_b")
# Arguments that leave little of a base.
SMALL = {
    "pvt_v2_b0": {"depths": (1, 1, 1, 1), "embed_dims": (8, 16, 32, 64), "num_heads": (1, 1, 1, 2)},
    "davit_tiny": {"depths": (1, 1, 1, 1), "embed_dims": (8, 16, 32, 64), "num_heads": (1, 1, 1, 2)},
    "hrnet_w18_small": {},
}


def to_the_digit(counted: float, unit: float, printed: float, digits: int = 2) -> bool:
    return abs(counted / unit - printed) <= 0.5 * 10**-digits + 1e-9


def with_large(names):
    marks = (pytest.mark.extended,)
    return [pytest.param(n, marks=marks if n.split("_lift")[0] in LARGE else ()) for n in names]


def small(name):
    """A function that builds a small model under the name of a registered one."""
    base = SMALL[name.split("_lift")[0]]
    return lambda **kwargs: create_model(name, **{"stem_dim": 8, "front_dim": 8, **base, **kwargs})


def small_hrnet(**kwargs):
    return LiftedBackbone("hrnet_w18_small", 8, 8, **kwargs)


def test_all_are_registered():
    (system,) = (system for system in systems() if "pvt_v2_b0_lift_a" in system.models)
    assert set(system.models) == set(LIFTED) == set(list_models("*_lift_?"))
    for info in system.models.values():
        assert (info.published_params, info.published_macs, info.published_top1) == (None, None, None)
        assert "inferred" in info.note


@pytest.mark.parametrize("name", with_large(LIFTED))
def test_parameters(name):
    base, front = name.split("_lift")[0], TABLE[name.split("_lift")[0]][:2]
    model = create_model(name, device="meta")
    assert count_params(model) == backbones.table_row(name).params
    assert to_the_digit(count_params(model), 1e6, LIFTED[name][0])
    assert to_the_digit(count_params(timm.create_model(base, device="meta")), 1e6, TABLE[base][2][0])
    assert to_the_digit(count_params(model.front), 1e6, front[1][0], 3)
    stem, blocks, down = model.front.stem, model.front.blocks, model.front.down
    assert isinstance(stem, HRStem)
    assert isinstance(down, IRDS)
    assert [type(block) for block in blocks] == [HRBlock, HRBlock]
    channels = (stem.conv.conv.out_channels, stem.hr_down.out_channels, down.pw.out_channels)
    assert channels == front[0]
    assert [block.hr.in_channels for block in blocks] == [front[0][1]] * 2


@pytest.mark.parametrize("name", with_large(LIFTED))
def test_multiply_accumulates(name):
    model = create_model(name, device="meta")
    macs = count_macs(model, (3, 448, 448))
    assert macs == backbones.table_row(name).macs
    assert to_the_digit(macs, 1e9, LIFTED[name][1])
    assert to_the_digit(count_macs(model.front, (3, 448, 448)), 1e9, TABLE[name.split("_lift")[0]][1][1], 3)


@pytest.mark.parametrize("base", with_large(TABLE))
def test_originals(base):
    model = timm.create_model(base, device="meta")
    for size, macs in zip((224, 448), TABLE[base][2][1:], strict=True):
        assert to_the_digit(test_timm_systems.macs_on_meta(model, (3, size, size)), 1e9, macs)


@pytest.mark.parametrize("base", SMALL)
@pytest.mark.parametrize("lift", ["a", "b"])
def test_original_stages_see_the_map_of_half_the_image(base, lift):
    """Of the front end's map on, the network is timm's: equal weights give equal outputs."""
    if lift == "b" and base.startswith("hrnet"):
        return
    torch.manual_seed(0)
    lifted = LiftedBackbone(base, 8, 8, lift=lift, num_classes=5, **SMALL[base]).eval()
    original = timm.create_model(base, num_classes=5, **SMALL[base]).eval()
    shapes = {"lifted": [], "original": []}
    for kind, model in (("lifted", lifted.body), ("original", original)):
        for stage in model.incre_modules if base.startswith("hrnet") else model.stages:
            stage.register_forward_hook(
                lambda module, inputs, output, kind=kind: shapes[kind].append(tuple(output.shape))
            )
    if lift == "a":
        own = lifted.body.state_dict().keys()
        state = {key: value for key, value in original.state_dict().items() if key in own}
        lifted.body.load_state_dict(state)
    with torch.no_grad():
        x = torch.randn(1, 3, 256, 128)
        logits = lifted(x)
        original(torch.randn(1, 3, 128, 64))
        assert shapes["lifted"] == shapes["original"]
        assert len(shapes["lifted"]) == 4
        if lift == "a":
            expected = base_from(original, lifted.front(x))
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def base_from(base, front):
    """timm's untouched model with the front end's map for the result of its stem."""
    if hasattr(base, "patch_embed"):
        base.patch_embed.forward = lambda image: front.permute(0, 2, 3, 1)
    elif hasattr(base, "stem"):
        base.stem.forward = lambda image: front
    else:
        for layer in ("conv1", "bn1", "act1", "conv2", "bn2"):
            getattr(base, layer).forward = lambda x: x
        base.act2.forward = lambda x: front
    return base(torch.empty(0))


def test_lift_b_keeps_the_stochastic_depth():
    for name, per_pair in (("pvt_v2_b0_lift_b", 1), ("davit_tiny_lift_b", 2)):
        model = create_model(name, drop_path_rate=0.4, device="meta")
        base = timm.create_model(name.split("_lift")[0], drop_path_rate=0.4, device="meta")
        blocks = list(base.stages[0].blocks)
        if per_pair == 2:
            blocks = [part for pair in blocks for part in pair]
        expected = [getattr(block.drop_path1, "drop_prob", 0.0) for block in blocks for _ in range(2)]
        assert [block.drop_path.drop_prob for block in model.body.stages[0].blocks] == expected
        assert not any(m.drop_prob for m in model.front.modules() if isinstance(m, DropPath))


@pytest.mark.parametrize("name", ONE_EACH)
@pytest.mark.parametrize(
    "check",
    [
        backbones.check_forward_and_head,
        backbones.check_features_only,
        backbones.check_image_errors,
        backbones.check_in_chans,
        backbones.check_dtype_argument,
        backbones.check_group_matcher,
    ],
    ids=backbones.name_of,
)
def test_contract(name, check):
    check(with_attributes(small(name)), (64, 128))


def with_attributes(build):
    """What the checks ask of the zoo's own backbones besides timm's contract."""

    def built(**kwargs):
        model = build(**kwargs)
        if isinstance(model, LiftedBackbone):
            model.total_stride, model.classifier_name = 64, model.default_cfg["classifier"]
        return model

    return built


def test_hrnet():
    model = small_hrnet(num_classes=7).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, 128, 64)).shape == (1, 7)
        maps = model.forward_intermediates(torch.randn(1, 3, 128, 64), intermediates_only=True)
    assert [tuple(x.shape[2:]) for x in maps] == [(16, 8), (8, 4), (4, 2), (2, 1)]
    assert [x.shape[1] for x in maps] == [info["num_chs"] for info in model.feature_info]
    with pytest.raises(ValueError, match=r"height and width of x must be multiples of 64.*got 100 x 64"):
        model(torch.randn(1, 3, 100, 64))


@pytest.mark.parametrize("name", ONE_EACH[1:])
def test_grad_checkpointing(name):
    """The same gradients, and every batch counted once in the running statistics."""
    results = []
    for enable in (False, True):
        torch.manual_seed(0)
        model = small(name)(num_classes=3, dtype=torch.float64).train()
        model.set_grad_checkpointing(enable)
        model(backbones.image((64, 64)).double()).square().sum().backward()
        results.append(([p.grad for p in model.parameters()], [b.double() for b in model.buffers()]))
    for got, want in zip(*results, strict=True):
        for x, y in zip(got, want, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-11)


def test_training_reduces_the_loss():
    backbones.check_training(small("pvt_v2_b0_lift_b"), (64, 64))


def test_other_classes():
    model = create_model("davit_tiny_lift_a", device="meta")
    model.reset_classifier(3)
    assert model.num_classes == model.get_classifier().out_features == 3


def test_argument_errors():
    with pytest.raises(ValueError, match="lift='b' is not defined for HRNet"):
        small_hrnet(lift="b", device="meta")
    with pytest.raises(ValueError, match="lift='c' is unknown; use one of a, b"):
        create_model("pvt_v2_b0_lift_a", lift="c", device="meta")
    with pytest.raises(ValueError, match="base='resnet50' is unknown; use one of pvt, davit, hrnet"):
        LiftedBackbone("resnet50", 8, 8)
