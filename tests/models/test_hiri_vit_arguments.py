"""HIRI-ViT's inferred quantities as arguments, the budget of its stages, and the sizes of its images."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fused_ops.models import count_macs, count_params, create_model
from fused_ops.models.hiri_vit import HIRIViT

# Of the small model at 448 pixels: module, its input (channels, size), its output, 1e6 parameters, 1e9
# multiply-accumulates, and 1e6 elements that convolutions, linear layers, norms and activations write; for a
# stage, the elements of one of its blocks.
BUDGET = [
    ("stem", (3, 448), (32, 112), 0.030, 0.418, 13.25),
    ("stages.0", (32, 112), (32, 112), 0.018, 0.060, 1.505),
    ("downs.0", (32, 112), (64, 56), 0.047, 0.148, 1.61),
    ("stages.1", (64, 56), (64, 56), 0.069, 0.056, 0.753),
    ("downs.1", (64, 56), (128, 28), 0.189, 0.148, 0.80),
    ("stages.2", (128, 28), (128, 28), 0.685, 0.532, 1.405),
    ("downs.2", (128, 28), (320, 14), 0.276, 0.092, 1.43),
    ("stages.3", (320, 14), (320, 14), 11.212, 2.409, 1.192),
    ("downs.3", (320, 14), (640, 7), 1.448, 0.131, 0.88),
    ("stages.4", (640, 7), (640, 7), 19.797, 0.980, 0.596),
]
PER_BLOCK = {
    "stages.0.0": (9_024, 0.0302),
    "stages.1.0": (34_432, 0.0280),
    "stages.2.0": (137_088, 0.1064),
    "stages.3.0": (1_245_760, 0.2677),
    "stages.4.0": (4_949_120, 0.2451),
}


def within_half_a_digit(value: float, printed: float, digits: int) -> bool:
    return abs(value - printed) <= 0.5 * 10**-digits + 1e-9


def elements(part: nn.Module, size: int, out: int) -> int:
    """Elements that the layers of a part write, from their widths and the size of the map each works on."""
    total = 0
    for name, layer in part.named_modules():
        last = name.split(".")[-1]
        if isinstance(layer, nn.Conv2d | nn.Linear | nn.BatchNorm2d | nn.LayerNorm):
            width = getattr(layer, "out_channels", None) or getattr(layer, "out_features", None)
            width = width or getattr(layer, "num_features", None) or layer.normalized_shape[0]
        else:
            continue
        side = out
        if type(part).__name__ == "HRBlock":
            side = size if last == "hr" else -(-size // 2)
        elif type(part).__name__ == "HRStem":
            side = size // 2 if name.split(".")[0] in ("conv", "hr_dw") else out
        elif type(part).__name__ == "IRDS" and hasattr(part, "dw") and name.startswith("exp"):
            side = size
        # An activation follows every fc1 and every norm that is paired with a convolution.
        activated = last in ("fc1", "bn")
        total += width * side * side * (2 if activated else 1)
    return total


@pytest.fixture(scope="module")
def model():
    return create_model("hiri_vit_small", device="meta")


@pytest.mark.parametrize(("name", "image", "out", "params", "macs", "written"), BUDGET, ids=lambda v: str(v))
def test_budget(model, name, image, out, params, macs, written):
    part = model.get_submodule(name)
    # The last digits are rounded up here and down there.
    assert count_params(part) / 1e6 == pytest.approx(params, abs=1e-3)
    assert count_macs(part, (image[0], image[1], image[1])) / 1e9 == pytest.approx(macs, abs=1e-3)
    one = part[0] if isinstance(part, nn.Sequential) else part
    digits = 3 if isinstance(part, nn.Sequential) else 2
    assert within_half_a_digit(elements(one, image[1], out[1]) / 1e6, written, digits)


def test_budget_is_complete(model):
    parts = sum(count_params(model.get_submodule(name)) for name, *_ in BUDGET)
    assert parts + count_params(model.norm) + count_params(model.head) == count_params(model)
    assert within_half_a_digit((count_params(model.norm) + count_params(model.head)) / 1e6, 0.642, 3)


@pytest.mark.parametrize("name", PER_BLOCK)
def test_blocks(model, name):
    channels, size = next(row[1] for row in BUDGET if row[0] == name[:-2])
    block = model.get_submodule(name)
    assert count_params(block) == PER_BLOCK[name][0]
    assert count_macs(block, (channels, size, size)) / 1e9 == pytest.approx(PER_BLOCK[name][1], abs=1e-4)


# Two other sets of widths, depths and expansions that the printed multiply-accumulates allow.
OTHERS = [
    (
        {
            "dims": (32, 64, 160, 384, 512),
            "expansions": (4, 4, 6, 4, 4),
            "depths": (2, 2, 1, 7, 6),
            "num_heads": (1, 2, 5, 12, 16),
        },
        34.77,
    ),
    (
        {
            "dims": (32, 64, 128, 320, 640),
            "expansions": (4, 6, 4, 4, 3),
            "depths": (2, 2, 6, 8, 5),
            "num_heads": (1, 2, 4, 10, 20),
            "down_ratio": (4, 4, 6, 6),
        },
        34.89,
    ),
]


@pytest.mark.parametrize(("arguments", "params"), OTHERS, ids=["first", "second"])
def test_other_sets_that_fit(arguments, params):
    assert within_half_a_digit(count_params(HIRIViT(**arguments, device="meta")) / 1e6, params, 2)


SMALL = {"depths": (1,) * 5, "dims": (8, 16, 24, 32, 64), "num_heads": (1, 1, 1, 2, 4), "stem_dim": 8}


@pytest.mark.parametrize(
    ("change", "parameters"),
    [
        (
            {"stem_low_dim": 12},
            (8 * 12 - 8 * 8) * 9 + (12 * 12 - 8 * 8) * 9 + (12 - 8) * 8 + 2 * 2 * (12 - 8),
        ),
        ({"proj_bias": False}, -(32 + 64)),
        ({"qkv_bias": False}, -3 * (32 + 64)),
        ({"down_ratio": (4, 4, 6, 4)}, 2 * 24 * (24 + 2 + 9 + 32)),
        ({"hr_bias": False}, -(8 + 16)),
        ({"final_norm": "batch"}, 0),
        ({"down_shortcut": "strided"}, 0),
        ({"hr_shortcut": False}, 0),
        ({"activation": "relu"}, 0),
        ({"stem_depth": 3}, 0),
    ],
    ids=lambda value: str(value)[:30],
)
def test_inferred_quantities_are_arguments(change, parameters):
    """Each changes what it says, counted by hand, and the network runs with it."""
    torch.manual_seed(0)
    changed = HIRIViT(**SMALL, num_classes=3, **change).eval()
    assert count_params(changed) - count_params(HIRIViT(**SMALL, num_classes=3, device="meta")) == parameters
    with torch.no_grad():
        assert changed(torch.randn(1, 3, 64, 64)).shape == (1, 3)


def test_convolutions_of_the_stem():
    two, three = (
        create_model("hiri_vit_small_224", stem_depth=depth, device="meta").stem for depth in (2, 3)
    )
    assert count_params(three) - count_params(two) == 32 * 32 * 9 + 2 * 32


def test_errors_of_arguments():
    with pytest.raises(
        ValueError, match=r"down_ratio must have 4 entries, one per change of stage, got \(4, 6\)"
    ):
        HIRIViT(down_ratio=(4, 6), device="meta")
    with pytest.raises(ValueError, match="final_norm='group' is unknown; use one of batch, layer"):
        HIRIViT(final_norm="group", device="meta")


@pytest.mark.parametrize(
    ("name", "size", "sides"),
    [
        ("hiri_vit_small", 384, (96, 48, 24, 12, 6)),
        ("hiri_vit_small", 448, (112, 56, 28, 14, 7)),
        ("hiri_vit_small", 768, (192, 96, 48, 24, 12)),
        ("hiri_vit_small", 450, (113, 57, 29, 15, 8)),
        ("hiri_vit_small_224", 224, (56, 28, 14, 7)),
        ("hiri_vit_base_224", 224, (56, 28, 14, 7)),
        ("hiri_vit_large_224", 224, (56, 28, 14, 7)),
    ],
)
def test_maps_at_the_sizes_of_the_paper(name, size, sides):
    depths = {"depths": (1,) * len(sides)}
    model = create_model(name, device="meta", **depths).eval()
    with torch.no_grad():
        maps = model.forward_intermediates(
            torch.empty(1, 3, size, size, device="meta"), intermediates_only=True
        )
    assert [tuple(x.shape[2:]) for x in maps] == [(side, side) for side in sides]


@pytest.mark.parametrize(("name", "least"), [("hiri_vit_small", 64), ("hiri_vit_small_224", 32)])
def test_images_that_are_too_small(name, least):
    model = create_model(name, device="meta")
    with pytest.raises(ValueError, match=f"at least {least} x {least} pixels.*got {least - 1} x 96"):
        model(torch.empty(1, 3, least - 1, 96, device="meta"))
