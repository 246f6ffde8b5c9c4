"""Sample DS-Blocks: those of the published models, and awkward ones.

``make`` of a case returns ``{"block": DSBlock, "x": map}``: the block in training mode with parameters drawn
from the generator, dropout and drop path off so that runs can be compared, and its input.
"""

from __future__ import annotations

from typing import Any

import torch

from fused_ops.blocks.ds_block.module import DSBlock
from fused_ops.core.cases import Case, make_map

_NO_STAR = {"align": False, "global_down": "dwconv"}


def _case(
    name: str,
    shape: tuple[int, int, int, int],
    num_heads: int,
    downsample: int,
    tags: tuple[str, ...],
    model: str = "",
    calls: int = 1,
    **options: Any,
) -> Case:
    def make(
        generator: torch.Generator, dtype: torch.dtype, device: torch.device, layout: str
    ) -> dict[str, Any]:
        block = DSBlock(shape[1], num_heads, downsample, attn_drop=0.0, device=device, dtype=dtype, **options)
        with torch.no_grad():
            for parameter in block.parameters():
                # One-dimensional weights of norms around 1 and biases around 0 would hide mixed-up operands
                # if they were exactly that.
                draw = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                fan = parameter[0].numel() if parameter.ndim > 1 else 100
                centre = parameter.mean().round() if parameter.ndim == 1 else 0.0
                parameter.copy_(draw.to(device) * fan**-0.5 + centre)
        return {"block": block, "x": make_map(shape, generator, dtype, device, layout)}

    return Case(name, make, frozenset(tags), model, calls)


CASES = [
    _case("stage1_224", (2, 64, 56, 56), 1, 8, ("model", "training", "resources"), "dsnet_small_star", 3),
    _case("stage2_224", (2, 128, 28, 28), 2, 4, ("model", "training", "resources"), "dsnet_small_star", 4),
    _case("stage3_224", (2, 320, 14, 14), 5, 2, ("model", "training", "resources"), "dsnet_small_star", 8),
    _case("stage4_224", (2, 512, 7, 7), 8, 2, ("model", "training"), "dsnet_small_star", 3),
    _case(
        "stage3_224_no_star",
        (2, 320, 14, 14),
        5,
        2,
        ("model", "training", "resources"),
        "dsnet_small",
        8,
        **_NO_STAR,
    ),
    _case("tiny", (2, 16, 6, 5), 1, 2, ("tiny", "training")),
    _case("tiny_no_star", (2, 16, 6, 5), 1, 2, ("tiny", "training"), **_NO_STAR),
    _case("odd", (1, 24, 7, 11), 3, 2, ("awkward", "tiny", "training")),
    _case("grid_of_one", (3, 16, 3, 5), 2, 8, ("awkward", "tiny", "training")),
    _case("one_row", (2, 16, 1, 9), 1, 4, ("awkward", "tiny", "training")),
    _case("no_downsampling", (2, 16, 4, 4), 2, 1, ("awkward", "tiny", "training")),
    _case("convolution_only", (2, 16, 6, 5), 2, 2, ("awkward", "tiny", "training"), alpha=0.0, align=False),
    _case("attention_only", (2, 16, 6, 5), 2, 2, ("awkward", "tiny", "training"), alpha=1.0, align=False),
    _case("mostly_attention", (2, 16, 6, 5), 3, 2, ("awkward", "tiny", "training"), alpha=0.75, align=False),
]
