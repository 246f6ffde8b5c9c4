"""timm's models as systems of the zoo: counts, the authors' layouts and numbers, fused operators in them."""

from __future__ import annotations

import functools
import re

import pytest
import timm
import torch
import torch.nn.functional as F
from support import golden
from support.selection import only
from timm.layers import LayerNorm2d
from timm.models import convnext, davit, focalnet, nextvit, pvt_v2
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import fused_ops
from fused_ops.models import (
    count_macs,
    count_params,
    create_model,
    load_checkpoint,
    official_state_dict,
    systems,
)
from fused_ops.models.registry import find_system, system_of
from fused_ops.models.timm_systems import FOCALNET

SYSTEMS = [system for system in systems() if system.model_class is None]
NAMES = [name for system in SYSTEMS for name in system.models]
# Parameters and multiply-accumulates at the model's input size, counted from the authors' code (in 1e9).
COUNTED = {
    "res2net50_48w_2s": (25_287_304, 4.160),
    "res2net50_26w_4s": (25_699_120, 4.255),
    "res2net50_14w_8s": (25_059_816, 4.179),
    "res2net50_26w_6s": (37_051_448, 6.296),
    "res2net50_26w_8s": (48_403_776, 8.336),
    "res2net101_26w_4s": (45_206_688, 8.067),
    "res2next50": (24_671_464, 4.173),
    # Without the projections that have no effect, 297,472 parameters.
    "dla60_res2net": (21_145_544 - 297_472, 4.123),
    "dla60_res2next": (17_330_456 - 297_472, 3.459),
    "res2net50d": (25_718_352, 4.495),
    "res2net101d": (45_225_920, 8.307),
    "focalnet_tiny_srf": (28_427_116, 4.403),
    "focalnet_tiny_lrf": (28_647_928, 4.475),
    "focalnet_small_srf": (49_891_216, 8.599),
    "focalnet_small_lrf": (50_342_440, 8.715),
    "focalnet_base_srf": (88_148_144, 15.241),
    "focalnet_base_lrf": (88_749_768, 15.397),
    "focalnet_large_fl3": (207_100_744, 104.87),
    "focalnet_large_fl4": (207_281_248, 105.01),
    "focalnet_xlarge_fl3": (366_082_120, 185.36),
    "focalnet_xlarge_fl4": (366_322_784, 185.54),
    "focalnet_huge_fl3": (686_564_424, 118.06),
    "focalnet_huge_fl4": (689_277_664, 118.76),
    "focalnet_tiny_iso": (5_880_280, 1.109),
    "focalnet_small_iso": (22_376_344, 4.305),
    "focalnet_base_iso": (87_237_400, 16.934),
    "nextvit_small": (31_763_368, 5.794),
    "nextvit_base": (44_818_856, 8.274),
    "nextvit_large": (57_874_344, 10.753),
    "pvt_v2_b0": (3_666_760, 0.566),
    "pvt_v2_b1": (14_009_000, 2.108),
    "pvt_v2_b2": (25_362_856, 4.027),
    "pvt_v2_b2_li": (22_553_512, 3.889),
    "pvt_v2_b3": (45_238_696, 6.897),
    "pvt_v2_b4": (62_556_072, 10.101),
    "pvt_v2_b5": (81_956_008, 11.717),
    "davit_tiny": (28_360_168, 4.522),
    "davit_small": (49_745_896, 8.773),
    "davit_base": (87_954_408, 15.474),
    "hrnet_w18_small": (13_187_464, 1.602),
    "hrnet_w18_small_v2": (15_597_464, 2.596),
    "hrnet_w18": (21_299_004, 4.284),
    "hrnet_w32": (41_232_680, 8.921),
    "hrnet_w48": (77_469_864, 17.278),
}
# One of each system, for what takes longer than building a model.
ONE_EACH = [next(iter(system.models)) for system in SYSTEMS]
# What is counted at every commit: one of each system and of each design that it has.
COUNTED_NOW = {
    *ONE_EACH,
    *(
        "res2next50",
        "dla60_res2net",
        "dla60_res2next",
        "res2net50d",
        "focalnet_tiny_lrf",
        "focalnet_tiny_iso",
    ),
    *("focalnet_large_fl3", "pvt_v2_b2_li", "hrnet_w18_small", "hrnet_w18"),
}
# timm's own converters, which know the authors' names too.
CONVERTERS = {
    "focalnet_tiny_lrf": focalnet.checkpoint_filter_fn,
    "focalnet_huge_fl3": focalnet.checkpoint_filter_fn,
    "focalnet_base_iso": focalnet.checkpoint_filter_fn,
    "nextvit_small": nextvit.checkpoint_filter_fn,
    "pvt_v2_b2_li": pvt_v2.checkpoint_filter_fn,
    "davit_tiny": davit.checkpoint_filter_fn,
    "convnext_tiny": convnext.checkpoint_filter_fn,
}


def test_every_name_is_counted_or_published():
    for name in NAMES:
        info = find_system(name).models[name]
        assert name in COUNTED or info.published_params is not None or "timm's own" in info.note, name


@pytest.fixture
def no_values(monkeypatch):
    """Initialisation of parameters without data takes most of the time of building a model, for nothing."""
    for name in ("uniform_", "normal_", "erfinv_", "fill_", "zero_", "mul_", "add_", "clamp_"):
        monkeypatch.setattr(torch.Tensor, name, lambda self, *args, **kwargs: self)


def macs_on_meta(model, input_size):
    """What count_macs() counts, in half the time, where no operator of this project is in the model."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.eval()(torch.empty(1, *input_size, device="meta"))
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("name", only(COUNTED_NOW, NAMES))
def test_counts(name, no_values):
    system = find_system(name)
    info = system.models[name]
    model = timm.create_model(name, device="meta", **system.defaults.get(name, {}))
    assert (count_params(model), macs_on_meta(model, info.input_size)) == (info.params, info.macs)
    if name in COUNTED:
        assert (info.params, info.macs / 1e9) == (
            COUNTED[name][0],
            pytest.approx(COUNTED[name][1], rel=0.005),
        )


@pytest.mark.parametrize("name", ONE_EACH)
def test_accelerated_models_count_the_same(name, no_values):
    info = find_system(name).models[name]
    model = create_model(name, device="meta")
    assert (count_params(model), count_macs(model, info.input_size)) == (info.params, info.macs)


@pytest.mark.parametrize("name", CONVERTERS)
def test_layouts_agree_with_timms_converter(name, no_values):
    """timm turns what we write in the authors' names into its own, to the last shape."""
    model = create_model(name, device="meta")
    own = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    converted = CONVERTERS[name](dict(official_state_dict(model)), model)
    assert {key: tuple(value.shape) for key, value in converted.items()} == own


@pytest.mark.parametrize("name", ["focalnet_tiny_srf", "pvt_v2_b0", "mobilenetv3_small_075", "ecaresnet26t"])
def test_it_is_timms_model_on_fused_operators(name):
    torch.manual_seed(0)
    stock = timm.create_model(name, num_classes=7)
    fused = create_model(name, num_classes=7)
    load_checkpoint(fused, official_state_dict(stock))
    stock, fused = stock.double().train(), fused.double().train()
    golden.disable_randomness(stock)
    golden.disable_randomness(fused)
    image = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    for x, y in zip(stock.parameters(), fused.parameters(), strict=True):
        assert torch.equal(x, y)
    expected, found = stock(image), fused(image)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    expected.square().sum().backward()
    found.square().sum().backward()
    for (key, x), y in zip(stock.named_parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(y.grad, x.grad, rtol=1e-7, atol=1e-9, msg=key)
    called = {row["op"] for row in fused_ops.explain(fused, image).rows()}
    assert called
    assert called <= set(find_system(name).fused)


@pytest.mark.parametrize("name", ["focalnet_tiny_srf", "pvt_v2_b0", "efficientnet_b0"])
def test_features_with_a_checkpoint(name):
    whole = create_model(name, num_classes=7)
    state = official_state_dict(whole)
    features = create_model(name, num_classes=7, features_only=True, checkpoint=state)
    weights = {key.replace(".", "_"): value for key, value in whole.state_dict().items()}
    for key, value in features.state_dict().items():
        assert torch.equal(value, weights[key.removeprefix("model.").replace(".", "_")])
    info = features.feature_info
    with torch.no_grad():
        maps = features.eval()(torch.randn(1, 3, 64, 64))
    assert [tuple(value.shape) for value in maps] == [
        (1, channels, 64 // reduction, 64 // reduction)
        for channels, reduction in zip(info.channels(), info.reduction(), strict=True)
    ]


def test_sides_that_hrnet_cannot_take():
    arguments = {"num_classes": 3, "device": "meta"}
    for extra in ({}, {"features_only": True}):
        model = create_model("hrnet_w18_small", **arguments, **extra)
        message = "height and width of x must be multiples of 32, the total stride, got 64 x 250"
        with pytest.raises(ValueError, match=message):
            model(torch.empty(1, 3, 64, 250, device="meta"))
    with pytest.raises(ValueError, match=r"x must be \(B, 4, H, W\), got \(1, 3, 64, 64\)"):
        create_model("hrnet_w18_small", in_chans=4, **arguments)(torch.empty(1, 3, 64, 64, device="meta"))


def test_unused_projections_of_dla_are_left_out():
    model = create_model("dla60_res2net")
    state = official_state_dict(model)
    extra = {f"{name}.project.0.weight": torch.zeros(1) for name in ("level3", "level4", "level4.tree1")}
    load_checkpoint(model, {**state, **extra})
    with pytest.raises(ValueError, match=r"level5\.project\.7"):
        load_checkpoint(model, {**state, "level5.project.7": torch.zeros(1)})


def test_large_focalnet_has_the_public_flags(no_values):
    blocks = {
        name: create_model(name, device="meta").layers[0].blocks[0]
        for name in ("focalnet_large_fl4", "focalnet_xlarge_fl4")
    }
    assert blocks["focalnet_large_fl4"].modulation.normalize_modulator
    assert not blocks["focalnet_xlarge_fl4"].modulation.normalize_modulator
    assert create_model("focalnet_huge_fl4", num_classes=3, device="meta").num_classes == 3


def toy_focalnet(levels, **flags):
    model = focalnet.FocalNet(
        depths=(2, 2, 2, 2),
        embed_dim=24,
        focal_levels=(levels,) * 4,
        use_overlap_down=True,
        use_post_norm=True,
        layerscale_value=1e-4,
        **flags,
    )
    model.pretrained_cfg = {"architecture": "focalnet_large_fl4"}
    fused_ops.accelerate(model)
    return model


GOLDEN = {
    "focalnet_toy_fl4": lambda: toy_focalnet(4, normalize_modulator=True),
    "focalnet_toy_huge": lambda: toy_focalnet(3, use_post_norm_in_modulation=True),
    "next_vit_small": lambda: create_model("nextvit_small"),
    "pvt_v2_b0": lambda: create_model("pvt_v2_b0"),
}
# The same code at other depths and widths.
EXTENDED = {
    "focalnet_tiny_srf": "focalnet_tiny_srf",
    "focalnet_tiny_lrf": "focalnet_tiny_lrf",
    "focalnet_small_lrf": "focalnet_small_lrf",
    "focalnet_base_lrf": "focalnet_base_lrf",
    "focalnet_tiny_iso": "focalnet_tiny_iso",
    "next_vit_base": "nextvit_base",
    "next_vit_large": "nextvit_large",
    "pvt_v2_b1": "pvt_v2_b1",
    "pvt_v2_b2": "pvt_v2_b2",
    "pvt_v2_b2_li": "pvt_v2_b2_li",
    "pvt_v2_b3": "pvt_v2_b3",
    "pvt_v2_b5": "pvt_v2_b5",
}


@pytest.mark.parametrize("record_name", EXTENDED)
def test_golden_layout(record_name, no_values):
    record = golden.load(record_name)
    model = create_model(EXTENDED[record_name], device="meta")
    shapes = {key: torch.empty(value.shape) for key, value in official_state_dict(model).items()}
    assert golden.layout_sha256(shapes) == record["state_dict"]["layout_sha256"]


class Stages:
    """Maps of the four stages as the authors' code has them, in the order of its records."""

    def __init__(self, model: torch.nn.Module, system: str) -> None:
        self.maps: list[torch.Tensor] = []
        if system == "FocalNet":
            # There a stage ends with the down-sampling of the next.
            ends = [layer.downsample for layer in model.layers[1:]] + [model.layers[-1]]
        else:
            ends = list(model.stages)
        self.tokens = system != "Next-ViT"
        for end in ends:
            end.register_forward_hook(self.keep)

    def keep(self, module, inputs, output):
        self.maps.append(output.flatten(2).transpose(1, 2) if self.tokens else output)


@pytest.mark.parametrize(
    "record_name", [*GOLDEN, *(pytest.param(name, marks=pytest.mark.extended) for name in EXTENDED)]
)
def test_golden(record_name):
    record = golden.load(record_name)
    model = (GOLDEN[record_name]() if record_name in GOLDEN else create_model(EXTENDED[record_name])).double()
    golden.check_layout(official_state_dict(model), record)
    load_checkpoint(model, golden.fill(official_state_dict(model), record["state_dict"]["gain"]))
    system = system_of(model)
    official = system.layouts[0].ours_to_official
    names = dict(zip(model.state_dict(), official(model.state_dict(), model), strict=True))
    stages = Stages(model, system.name)

    def run(x):
        stages.maps.clear()
        return [model(x)], stages.maps

    golden.check_eval(model, record, run).check(golden.EVAL_TOLERANCE)
    golden.check_train(model, record, lambda x: [model(x)], names).check(golden.TRAIN_TOLERANCE)


class DenseFocalNet(torch.nn.Module):
    """The authors' form for detection: zeros right and below up to whole patches, a norm on every map."""

    def __init__(self, **arguments):
        super().__init__()
        self.backbone = focalnet.FocalNet(
            num_classes=0, focal_levels=(3,) * 4, focal_windows=(9,) * 4, **arguments
        )
        self.backbone.norm = torch.nn.Identity()
        if arguments.get("use_overlap_down"):
            # One pixel more than in their classifiers.
            self.backbone.stem.proj.padding = (3, 3)
        fused_ops.accelerate(self.backbone)
        for patches in [self.backbone.stem, *(layer.downsample for layer in self.backbone.layers[1:])]:
            patches.register_forward_pre_hook(self.pad)
        for i, channels in enumerate(self.backbone.embed_dim):
            self.add_module(f"norm{i}", LayerNorm2d(channels, eps=1e-5))

    @staticmethod
    def pad(patches, inputs):
        height, width = inputs[0].shape[2:]
        return F.pad(inputs[0], (0, -width % patches.stride, 0, -height % patches.stride))

    def forward(self, x):
        maps = self.backbone.forward_intermediates(x, intermediates_only=True)
        return [self.get_submodule(f"norm{i}")(value) for i, value in enumerate(maps)]

    def official_names(self):
        layout, state = FOCALNET.layouts[0], self.backbone.state_dict()
        inner = zip(state, layout.ours_to_official(state, self.backbone), strict=True)
        names = {f"backbone.{name}": official for name, official in inner}
        return {name: names.get(name, name) for name in self.state_dict()}


DENSE = {
    "focalnet_toy_conv_embed_dense": {
        "depths": (2, 2, 2, 2),
        "embed_dim": 24,
        "use_overlap_down": True,
        "layerscale_value": 1e-4,
    },
    "focalnet_tiny_lrf_dense": {},
}


def filled_dense(name):
    """A record of the authors' backbone for detection, and timm's model with the fill, on fused operators."""
    record = golden.load(name)
    model = DenseFocalNet(**DENSE[name]).double()
    names = model.official_names()
    layout = FOCALNET.layouts[0]
    official = layout.ours_to_official(model.backbone.state_dict(), model.backbone)
    norms = {key: value for key, value in model.state_dict().items() if key == names[key]}
    golden.check_layout(official | norms, record)
    values = golden.fill(official | norms, record["state_dict"]["gain"])
    inner = layout.official_to_ours({key: values[key] for key in official}, model.backbone)
    model.backbone.load_state_dict(inner)
    model.load_state_dict({key: values[key] for key in norms}, strict=False)
    return record, model


@pytest.mark.parametrize(
    "name",
    ["focalnet_toy_conv_embed_dense", pytest.param("focalnet_tiny_lrf_dense", marks=pytest.mark.extended)],
)
def test_dense_focalnet(name):
    record, model = filled_dense(name)
    golden.check_eval(model, record, lambda x: (model(x), ())).check(golden.EVAL_TOLERANCE)
    golden.check_train(model, record, model, model.official_names()).check(golden.TRAIN_TOLERANCE)


# Levels and flags of the recorded calls.
MODULATIONS = {
    "focal_modulation_96_l3": (3, {}),
    "focal_modulation_96_l2_norm_ln": (2, {"use_post_norm": True, "normalize_modulator": True}),
}


def filled_modulation(name):
    """A record of the authors' focal modulation, and timm's module with the fill, on fused operators."""
    record = golden.load(name)
    levels, flags = MODULATIONS[name]
    # timm's models pass on an epsilon that is not this module's default.
    norm = functools.partial(LayerNorm2d, eps=1e-5)
    module = focalnet.FocalModulation(
        96, focal_window=3, focal_level=levels, norm_layer=norm, **flags
    ).double()
    own = module.state_dict()
    official = {
        key.replace("norm.", "ln."): value.flatten(1) if re.match(r"(f|proj)\.weight", key) else value
        for key, value in own.items()
    }
    golden.check_layout(official, record)
    values = golden.fill(official, record["state_dict"]["gain"]).values()
    module.load_state_dict({key: value.view_as(own[key]) for key, value in zip(own, values, strict=True)})
    fused_ops.accelerate(module)
    return record, module


def channels_last_run(module, x):
    """The record has channels in the last dimension, timm's module in the second."""
    return module(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


@pytest.mark.parametrize("name", MODULATIONS)
def test_focal_modulation(name):
    record, module = filled_modulation(name)
    names = {"norm.weight": "ln.weight", "norm.bias": "ln.bias"}

    def run(x):
        return [channels_last_run(module, x)]

    golden.check_eval(module, record, lambda x: (run(x), ())).check(golden.EVAL_TOLERANCE)
    golden.check_train(module, record, run, names).check(golden.TRAIN_TOLERANCE)


def test_rules_do_not_collide():
    """No two of our names become one official name."""
    for name in ONE_EACH:
        model = timm.create_model(name, device="meta")
        assert len(official_state_dict(model)) == len(model.state_dict()), name
        assert not any(re.search(r"\.\.", key) for key in official_state_dict(model))
