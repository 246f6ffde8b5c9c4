"""Sample inputs of resampling: shapes of real models, and awkward ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fused_ops.core.cases import Case, make_map

Size = tuple[int, int]


def _case(
    name: str,
    batch: int,
    channels: int,
    size: Size,
    out_size: Size,
    *tags: str,
    add: bool = False,
    drop_path: tuple[float, ...] = (),
    mode: str = "bilinear",
    model: str = "",
    calls: int = 1,
    layout: str = "channels_last",
) -> Case:
    """A case; ``drop_path`` are factors of the first images, those of the others are 1."""

    def make(
        generator: torch.Generator, dtype: torch.dtype, device: torch.device, layout: str
    ) -> dict[str, Any]:
        shape = (batch, channels, *size)
        arguments: dict[str, Any] = {
            "x": make_map(shape, generator, dtype, device, layout),
            "size": out_size,
            "mode": mode,
        }
        if add:
            shape = (batch, channels, *out_size)
            arguments["add"] = make_map(shape, generator, dtype, device, layout, mean=0.1)
        if drop_path:
            factors = torch.ones(batch, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
            factors[: len(drop_path)] = torch.tensor(drop_path, dtype=factors.dtype)
            arguments["drop_path"] = factors.to(device)
        return arguments

    return Case(name, make, frozenset(tags), model, calls, layout)


# Channels, size, size of the grid of global tokens and blocks of DS-Net-T's stages, at 224 and at 800x1344.
DSNET = (
    (64, (56, 56), (7, 7), 2),
    (128, (28, 28), (7, 7), 2),
    (320, (14, 14), (7, 7), 4),
    (512, (7, 7), (3, 3), 1),
)
DSNET_DETECTION = (
    (64, (200, 336), (25, 42), 2),
    (128, (100, 168), (25, 42), 2),
    (320, (50, 84), (25, 42), 4),
    (512, (25, 42), (12, 21), 1),
)
# The maps that the top-down path of a feature pyramid at 800x1344 resamples, 256 channels.
PYRAMID = ((25, 42), (50, 84), (100, 168))


def _dsnet(name: str, batch: int, stages: Sequence[tuple[int, Size, Size, int]]) -> list[Case]:
    """Down to the global tokens, and up again with the local half and the shortcut."""
    found = []
    for channels, size, grid, calls in stages:
        label = f"{channels}x{size[0]}"
        options: dict[str, Any] = {"model": name, "calls": calls}
        found += [
            _case(f"{name}_down_{label}", batch, channels, size, grid, "model", **options),
            _case(f"{name}_up_{label}", batch, channels, grid, size, "model", add=True, **options),
        ]
    return found


def _pyramid(mode: str) -> list[Case]:
    return [
        _case(
            f"fpn_{mode}_{height}x{width}",
            2,
            256,
            (height, width),
            (2 * height, 2 * width),
            "model",
            add=True,
            mode=mode,
            model=f"fpn_{mode}",
        )
        for height, width in PYRAMID
    ]


def cases() -> Sequence[Case]:
    """All cases. ``tiny`` ones have few enough programs for Triton's interpreter."""
    nearest = {"mode": "nearest"}
    tiny = [
        _case("up_add", 2, 12, (3, 4), (6, 8), "tiny", add=True),
        _case("down", 1, 12, (8, 12), (2, 3), "tiny"),
        _case("down_add", 1, 5, (7, 7), (3, 3), "tiny", add=True),
        _case("drop_path", 2, 12, (3, 2), (4, 3), "tiny", add=True, drop_path=(0.0, 1.25)),
        _case("nearest_add", 2, 12, (3, 4), (6, 8), "tiny", add=True, **nearest),
        _case("nearest_down", 2, 9, (7, 6), (3, 4), "tiny", drop_path=(1.25,), **nearest),
        # More columns of the gradient than a step of the sum takes.
        _case("up_far", 1, 3, (1, 2), (2, 14), "tiny"),
    ]
    awkward = [
        _case("to_one_pixel", 2, 5, (4, 7), (1, 1), "awkward", add=True),
        _case("from_one_pixel", 2, 5, (1, 1), (3, 4), "awkward"),
        _case("nearest_from_one_pixel", 2, 5, (1, 1), (2, 3), "awkward", **nearest),
        _case("same_size", 2, 5, (4, 3), (4, 3), "awkward", add=True),
        _case("up_and_down", 1, 70, (3, 5), (4, 3), "awkward"),
        _case("odd_factor", 1, 9, (9, 3), (3, 9), "awkward"),
        _case("one_channel", 2, 1, (3, 3), (5, 4), "awkward", add=True),
        _case("one_row", 2, 6, (1, 9), (1, 4), "awkward", **nearest),
        _case("nearest_odd", 1, 35, (5, 3), (7, 11), "awkward", add=True, **nearest),
        _case("nchw", 2, 9, (4, 5), (7, 3), "awkward", add=True, layout="nchw"),
        _case("nchw_nearest", 2, 9, (4, 5), (8, 10), "awkward", layout="nchw", **nearest),
        _case("empty", 0, 8, (4, 4), (6, 2), "awkward", add=True),
    ]
    # Several blocks of columns and of channels; ratios of DS-Net's stages and of pyramids.
    counted = [
        _case("traffic_up", 1, 16, (3, 4), (24, 32), "traffic", add=True, drop_path=(1.25,)),
        _case("traffic_down", 1, 96, (28, 28), (7, 7), "traffic"),
        _case("traffic_down_odd", 1, 64, (21, 14), (7, 9), "traffic"),
        _case("traffic_nearest", 1, 80, (5, 7), (10, 14), "traffic", add=True, **nearest),
        _case("traffic_nearest_down", 1, 32, (24, 21), (8, 8), "traffic", **nearest),
        _case("traffic_nchw", 1, 19, (5, 12), (20, 48), "traffic", layout="nchw"),
    ]
    compiled = [
        _case(f"resources_{name}", 2, channels, size, out_size, "resources", **options)
        for name, channels, size, out_size, options in (
            ("up_2", 256, (16, 32), (32, 64), {"add": True}),
            ("up_4", 128, (16, 16), (64, 64), {"add": True, "drop_path": (1.25,)}),
            ("up_8", 64, (8, 8), (64, 64), {"add": True}),
            ("up_far", 64, (1, 1), (64, 64), {}),
            ("to_one", 64, (32, 32), (1, 1), {}),
            ("down", 64, (56, 56), (7, 7), {}),
            ("down_7_3", 512, (7, 7), (3, 3), {"add": True}),
            ("nearest", 256, (16, 32), (32, 64), {"add": True, **nearest}),
            ("nearest_down", 256, (32, 64), (16, 32), {"add": True, **nearest}),
            ("nchw_up_4", 150, (32, 32), (128, 128), {"layout": "nchw"}),
            ("nchw_down", 64, (64, 64), (32, 32), {"layout": "nchw"}),
            ("nchw_nearest", 64, (32, 32), (64, 64), {"layout": "nchw", "add": True, **nearest}),
        )
    ]
    # Logits of semantic segmentation at a quarter of the resolution, to the whole one: Cityscapes and ADE20K.
    segmentation = [
        _case(
            f"segmentation_{classes}_{layout}",
            batch,
            classes,
            size,
            (4 * size[0], 4 * size[1]),
            "model",
            model=f"segmentation_{classes}",
            layout=layout,
        )
        for classes, batch, size, layout in (
            (19, 2, (128, 256), "nchw"),
            (150, 4, (128, 128), "nchw"),
            (150, 4, (128, 128), "channels_last"),
        )
    ]
    return (
        *tiny,
        *awkward,
        *counted,
        *compiled,
        *_dsnet("dsnet", 128, DSNET),
        *_dsnet("dsnet_detection", 2, DSNET_DETECTION),
        *_pyramid("nearest"),
        *_pyramid("bilinear"),
        *segmentation,
    )
