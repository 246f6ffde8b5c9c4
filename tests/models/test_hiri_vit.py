"""HIRI-ViT: counts of the reference configurations and of every step of the ablation, and timm's contract."""

import pytest
import torch
from support import staged_backbones as backbones
from support.selection import only

from fused_ops.models import count_macs, count_params, create_model, official_state_dict
from fused_ops.models.hiri_vit import CFFN, FOUR_STAGES, HIRIViT, HRBlock, TransformerBlock

# Parameters; multiply-accumulates in units of 1e9 by image size.
COUNTED = {
    "hiri_vit_small": (34_413_032, {448: 4.975, 224: 1.279, 384: 3.609, 768: 15.95}),
    "hiri_vit_base": (54_443_880, {448: 9.332, 224: 2.377, 384: 6.784, 768: 29.52}),
    "hiri_vit_large": (94_505_704, {448: 19.87, 224: 4.995, 384: 14.467, 768: 62.21}),
    "hiri_vit_small_224": (34_322_504, {224: 4.703, 448: 21.61}),
    "hiri_vit_base_224": (54_135_912, {224: 8.235}),
    "hiri_vit_large_224": (93_771_624, {224: 16.88}),
}

M_VIT = {
    **FOUR_STAGES,
    "depths": (1, 5, 9, 4),
    "dims": (64, 128, 320, 640),
    "num_heads": (2, 4, 10, 20),
    "stem": "vit",
    "stem_norm": "layer",
    "blocks": ("transformer",) * 4,
    "reduction_ratios": (8, 4, 1, 1),
    "downs": ("conv",) * 3,
    "down_norms": ("layer",) * 3,
    "feed_forward": "ffn",
    "feed_forward_norms": ("layer",) * 4,
}
# What each row changes in the one before, its image size, and counted 1e6 parameters and 1e9 MACs.
ABLATION = [
    (1, {}, 224, 36.348, 4.540),
    (2, {"feed_forward": "cffn"}, 224, 36.594, 4.590),
    (3, {"blocks": ("feed_forward", "feed_forward", "transformer", "transformer")}, 224, 34.670, 4.282),
    (
        4,
        {
            "stem_norm": "batch",
            "down_norms": ("batch", "layer", "layer"),
            "feed_forward_norms": ("batch",) * 4,
        },
        224,
        34.670,
        4.282,
    ),
    (5, {"stem": "conv"}, 224, 34.699, 4.552),
    (6, {"downs": ("irds_a", "irds_b", "irds_b")}, 224, 34.323, 4.703),
    (7, {}, 448, 34.323, 21.61),
    (
        8,
        {
            "depths": (1, 1, 5, 9, 4),
            "dims": (32, 64, 128, 320, 640),
            "num_heads": (1, 2, 4, 10, 20),
            "blocks": ("feed_forward",) * 3 + ("transformer",) * 2,
            "expansions": (4,) * 5,
            "reduction_ratios": (1,) * 5,
            "downs": ("irds_a", "irds_a", "irds_b", "irds_b"),
            "down_norms": ("batch", "batch", "layer", "layer"),
            "feed_forward_norms": ("batch",) * 5,
        },
        448,
        34.370,
        5.752,
    ),
    (9, {"stem": "hr"}, 448, 34.372, 5.085),
    (
        10,
        {"depths": (2, 2, 5, 9, 4), "blocks": ("hr", "hr", "feed_forward", "transformer", "transformer")},
        448,
        34.413,
        4.975,
    ),
]
# Kinds of the stages of the small model at 448 pixels; two HR-blocks stand for one other block.
STAGE_KINDS = [
    (("hr", "hr", "hr", "hr", "transformer"), (2, 2, 10, 18, 4), 38.755, 3.037),
    (("hr", "hr", "hr", "transformer", "transformer"), (2, 2, 10, 9, 4), 35.072, 4.711),
    (("hr", "hr", "transformer", "transformer", "transformer"), (2, 2, 5, 9, 4), 34.745, 6.018),
    (("hr", "hr", "feed_forward", "transformer", "transformer"), (2, 2, 5, 9, 4), 34.413, 4.975),
]


def ablation_arguments(row):
    arguments = dict(M_VIT)
    for number, change, *_ in ABLATION:
        if number <= row:
            arguments |= change
    return arguments


def small(**kwargs):
    return create_model("hiri_vit_test", **kwargs)


def four_stages(**kwargs):
    arguments = FOUR_STAGES | {"depths": (1, 2, 1, 1), "dims": (8, 16, 32, 64), "num_heads": (1, 1, 1, 2)}
    return create_model("hiri_vit_small_224", **{**arguments, "stem_dim": 8, **kwargs})


# The larger ones have more and wider blocks of the same kinds.
@pytest.mark.parametrize("name", only(["hiri_vit_small", "hiri_vit_small_224"], COUNTED))
def test_counts(name):
    params, macs = COUNTED[name]
    size = backbones.table_row(name).input_size[-1]
    backbones.check_table(name, params, macs[size] * 1e9)
    model = create_model(name, device="meta")
    for other, expected in macs.items():
        # The size of the table was counted above, and is held to the same digits here.
        counted = backbones.table_row(name).macs if other == size else count_macs(model, (3, other, other))
        assert counted == pytest.approx(expected * 1e9, rel=0.001)


def test_nothing_inferred_is_printed_as_published():
    for name in COUNTED:
        info = backbones.table_row(name)
        assert info.published_params is None
        assert "inferred" in info.note


@pytest.mark.parametrize(("row", "change", "size", "params", "macs"), ABLATION, ids=lambda v: str(v)[:12])
def test_ablation(row, change, size, params, macs):
    model = HIRIViT(**ablation_arguments(row), device="meta")
    assert count_params(model) == pytest.approx(params * 1e6, abs=600)
    assert count_macs(model, (3, size, size)) == pytest.approx(macs * 1e9, rel=0.001)


def test_the_ablation_ends_at_the_published_models():
    for row, name in ((6, "hiri_vit_small_224"), (10, "hiri_vit_small")):
        expected = {key: value.shape for key, value in create_model(name, device="meta").state_dict().items()}
        model = HIRIViT(**ablation_arguments(row), device="meta")
        assert {key: value.shape for key, value in model.state_dict().items()} == expected


@pytest.mark.parametrize(("blocks", "depths", "params", "macs"), STAGE_KINDS, ids=lambda v: str(v)[:12])
def test_stage_kinds(blocks, depths, params, macs):
    model = create_model("hiri_vit_small", blocks=blocks, depths=depths, device="meta")
    assert count_params(model) == pytest.approx(params * 1e6, abs=600)
    assert count_macs(model, (3, 448, 448)) == pytest.approx(macs * 1e9, rel=0.001)


def test_counts_per_part():
    """Parameters and MACs of the stem, the down-samplings and one block of each kind, by hand."""
    model = create_model("hiri_vit_small", device="meta")
    expected = {
        "stages.0.0": 9_024,
        "stages.1.0": 34_432,
        "stages.2.0": 137_088,
        "stages.3.0": 1_245_760,
        "stages.4.0": 4_949_120,
    }
    for name, params in expected.items():
        assert count_params(model.get_submodule(name)) == params
    millions = {"stem": 0.030, "downs.0": 0.047, "downs.1": 0.189, "downs.2": 0.276, "downs.3": 1.448}
    for name, params in millions.items():
        assert count_params(model.get_submodule(name)) == pytest.approx(params * 1e6, abs=501), name


@pytest.mark.parametrize("check", backbones.CHECKS, ids=backbones.name_of)
@pytest.mark.parametrize("build", [small, four_stages])
def test_contract(build, check):
    check(build, (64, 128))


def test_any_size():
    backbones.check_sizes(small, [(64, 64), (65, 97), (96, 160), (127, 64)])
    backbones.check_sizes(four_stages, [(32, 32), (33, 65), (224, 224)])


@pytest.mark.parametrize("build", [small, four_stages])
def test_training_reduces_the_loss(build):
    backbones.check_training(build, (64, 64))


def test_every_step_of_the_ablation_runs():
    for row in range(1, 11):
        arguments = ablation_arguments(row)
        stages = len(arguments["depths"])
        arguments |= {
            "depths": (1,) * stages,
            "dims": (16, 32, 32, 64, 64)[:stages],
            "num_heads": (1, 1, 1, 2, 2)[:stages],
            "stem_dim": 8,
        }
        model = HIRIViT(**arguments, num_classes=7).eval()
        with torch.no_grad():
            assert model(backbones.image((64, 64))).shape == (2, 7), row


def hr_block(**kwargs):
    model = small(**kwargs, dtype=torch.float64).eval()
    block = model.stages[0][0]
    assert isinstance(block, HRBlock)
    block.lr_bn.running_mean.normal_()
    block.lr_bn.running_var.uniform_(0.5, 2)
    return block


@pytest.mark.parametrize("size", [(8, 10), (7, 9)])
def test_hr_block_by_stock_operators(size):
    block = hr_block()
    x = torch.randn(2, 8, *size, dtype=torch.float64)
    with torch.no_grad():
        low = block.lr_bn(block.lr_dw(x)).permute(0, 2, 3, 1)
        low = block.fc2(torch.nn.functional.gelu(block.fc1(low))).permute(0, 3, 1, 2)
        grown = low.repeat_interleave(2, 2).repeat_interleave(2, 3)[:, :, : size[0], : size[1]]
        expected = block.hr(x) + grown
        torch.testing.assert_close(block(x), x + expected)
        torch.testing.assert_close(hr_block(hr_shortcut=False).hr(x).shape, expected.shape)
        block.shortcut = False
        torch.testing.assert_close(block(x), expected)


def test_feed_forward_and_attention_by_stock_operators():
    model = small(dtype=torch.float64).eval()
    x = torch.randn(2, 24, 5, 6, dtype=torch.float64)
    block = model.stages[2][0]
    assert isinstance(block, CFFN)
    assert isinstance(block.norm, torch.nn.BatchNorm2d)
    with torch.no_grad():
        z = torch.nn.functional.gelu(block.fc1(block.norm(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        expected = x + block.fc2((block.dw(z) + z).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        torch.testing.assert_close(block(x), expected)

        block = model.stages[3][0]
        assert isinstance(block, TransformerBlock)
        assert isinstance(block.ffn.norm, torch.nn.BatchNorm2d)
        x = torch.randn(2, 32, 5, 6, dtype=torch.float64)
        stock = torch.nn.MultiheadAttention(32, 2, batch_first=True, dtype=torch.float64)
        stock.in_proj_weight.copy_(torch.cat([block.attn.q.weight, block.attn.kv.weight]))
        stock.in_proj_bias.copy_(torch.cat([block.attn.q.bias, block.attn.kv.bias]))
        stock.out_proj.load_state_dict(block.attn.proj.state_dict())
        tokens = block.norm1(x.flatten(2).transpose(1, 2))
        attended = stock(tokens, tokens, tokens)[0].transpose(1, 2).unflatten(2, (5, 6))
        torch.testing.assert_close(block(x), block.ffn(x + attended))


def test_the_mean_of_the_logits_is_the_logits_of_the_mean():
    """What distillation over positions needs: the norm is per position and the classifier linear."""
    model = small().eval()
    with torch.no_grad():
        features = model.forward_features(backbones.image((128, 128)))
        per_position = model.head(features.permute(0, 2, 3, 1)).mean((1, 2))
        torch.testing.assert_close(per_position, model.forward_head(features))


def test_converted_norms():
    """A frozen norm in place of the HR-block's own runs the stock way."""
    model = small().eval()
    x = backbones.image((64, 64))
    with torch.no_grad():
        expected = model(x)
        for stage in model.stages[:2]:
            for block in stage:
                norm = block.lr_bn
                block.lr_bn = torch.nn.Sequential(norm)
        torch.testing.assert_close(model(x), expected)


def test_argument_errors():
    with pytest.raises(ValueError, match=r"dims must have 5 entries, one per stage, got \(64, 128\)"):
        HIRIViT(dims=(64, 128), device="meta")
    with pytest.raises(
        ValueError, match=r"downs must have 4 entries, one per change of stage, got \('conv',\)"
    ):
        HIRIViT(downs=("conv",), device="meta")
    with pytest.raises(ValueError, match=r"stem='patch' is unknown; use one of hr, conv, vit"):
        HIRIViT(stem="patch", device="meta")
    with pytest.raises(ValueError, match=r"blocks='mixer' is unknown; use one of .*"):
        HIRIViT(blocks=("mixer",) * 5, device="meta")
    with pytest.raises(ValueError, match=r"activation='mish' is unknown; use one of .*"):
        HIRIViT(activation="mish", device="meta")
    with pytest.raises(ValueError, match="num_heads must divide the 640 channels, got 7"):
        HIRIViT(num_heads=(1, 1, 1, 10, 7), device="meta")
    with pytest.raises(ValueError, match=r"got 'hiri_vit_smal'; nearest: hiri_vit_small"):
        create_model("hiri_vit_smal")


def test_there_is_no_public_layout():
    with pytest.raises(ValueError, match=r"public code of HIRI-ViT \(none\)"):
        official_state_dict(small())
