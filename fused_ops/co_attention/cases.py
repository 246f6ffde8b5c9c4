"""Sample inputs of the co-attention operator: shapes of real models, and awkward ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fused_ops.core.cases import Case, make_map


def packed_tokens(
    shape: tuple[int, int, int, int, int],
    names: Sequence[str],
    generator: torch.Generator,
    dtype: torch.dtype,
    device: torch.device,
    layout: str,
) -> dict[str, Tensor]:
    """Tensors (B, H W, heads, d) by name, views of one packed projection of a map (B, H, W, heads, d).

    ``channels_last`` is what a Linear or a 1x1 convolution of such a map gives, ``nchw`` what that
    convolution gives in PyTorch's default layout, ``slice`` the former as part of a wider tensor.
    """
    batch, height, width, heads, head_dim = shape
    channels = len(names) * heads * head_dim
    packed = make_map((batch, channels, height, width), generator, dtype, device, layout, mean=0.1)
    tokens = packed.detach().flatten(2).transpose(1, 2).unflatten(-1, (len(names), heads, head_dim))
    return {name: tensor.requires_grad_() for name, tensor in zip(names, tokens.unbind(2), strict=True)}


def _case(
    name: str,
    shape: tuple[int, int, int, int, int, int],
    *tags: str,
    shared: bool = False,
    dropout: float = 0.0,
    scale: float | None = None,
    model: str = "",
    calls: int = 1,
) -> Case:
    """A case of (B, H, W, M, heads, d).

    Args:
        shared: one affinity for both directions.
        dropout: with a seed that is given, so that every backend drops the same.
    """
    batch, height, width, keys, heads, head_dim = shape

    def make(
        generator: torch.Generator, dtype: torch.dtype, device: torch.device, layout: str
    ) -> dict[str, Any]:
        kind = (generator, dtype, device, layout)
        back = () if shared else ("local_key",)
        arguments: dict[str, Any] = packed_tokens(
            (batch, height, width, heads, head_dim), ("local_query", *back, "local_value"), *kind
        )
        back = () if shared else ("global_query",)
        arguments |= packed_tokens(
            (batch, keys, 1, heads, head_dim), (*back, "global_key", "global_value"), *kind
        )
        if scale is not None:
            arguments["scale"] = scale
        if dropout:
            arguments["dropout"] = dropout
            arguments["seed"] = torch.tensor([2**40 + 12345, 7], device=device)
        return arguments

    return Case(name, make, frozenset(tags), model, calls)


# (H, W, M, heads, d) of DS-Net's four stages at 224 x 224, and of a detector's at 800 x 1344.
STAGES = ((56, 56, 49, 1, 32), (28, 28, 49, 2, 32), (14, 14, 49, 5, 32), (7, 7, 9, 8, 32))
DETECTION = ((200, 336, 1050, 1, 32), (100, 168, 1050, 2, 32), (50, 84, 1050, 5, 32), (25, 42, 252, 8, 32))
_DEPTHS = {"dsnet_small_star": (3, 4, 8, 3), "dsnet_base_star": (3, 4, 28, 3)}


def cases() -> Sequence[Case]:
    """All cases. ``tiny`` ones have few enough programs for Triton's interpreter."""
    tiny = [
        _case(name, shape, "tiny", "awkward", **options)
        for name, shape, options in (
            ("plain", (2, 5, 4, 9, 2, 16), {}),
            ("shared", (2, 3, 6, 5, 2, 16), {"shared": True}),
            ("head_24", (1, 3, 7, 13, 2, 24), {"scale": 0.3}),
            ("head_40_shared", (1, 9, 2, 4, 1, 40), {"shared": True, "dropout": 0.2}),
            ("head_80", (1, 4, 5, 6, 1, 80), {}),
            ("dropout", (2, 4, 5, 7, 1, 16), {"dropout": 0.3}),
            ("one_local", (2, 1, 1, 9, 1, 16), {}),
            ("one_global", (2, 3, 6, 1, 1, 16), {}),
            ("many_globals", (1, 3, 7, 70, 1, 16), {}),
            ("many_globals_shared", (1, 3, 7, 70, 1, 8), {"shared": True, "dropout": 0.1}),
        )
    ]
    general = [
        _case("no_image", (0, 3, 2, 5, 2, 8), "awkward"),
        _case("wide_head", (1, 3, 4, 7, 1, 136), "awkward"),
        _case("wide_head_shared", (1, 3, 4, 7, 1, 136), "awkward", shared=True),
    ]
    # Enough tokens for traffic to be the tensors' own, few enough programs to count it in the interpreter.
    counted = [
        _case("traffic_49_globals", (1, 28, 14, 49, 1, 32), "traffic"),
        _case("traffic_9_globals", (1, 7, 7, 9, 4, 32), "traffic"),
        _case("traffic_shared", (1, 28, 14, 49, 1, 32), "traffic", shared=True),
        _case("traffic_many_globals", (1, 20, 20, 70, 1, 32), "traffic"),
    ]
    # Every width of heads and number of global tokens of the models below, and others up to the widest.
    counted += [
        _case(name, (2, 28, 28, keys, 2, head_dim), "resources", **options)
        for name, keys, head_dim, options in (
            ("resources_9_globals", 9, 32, {}),
            ("resources_head_16", 49, 16, {}),
            ("resources_head_32", 49, 32, {}),
            ("resources_head_64", 49, 64, {}),
            ("resources_head_80", 32, 80, {}),
            ("resources_dropout_9_globals", 9, 32, {"dropout": 0.1}),
            ("resources_dropout", 49, 32, {"dropout": 0.1}),
            ("resources_dropout_head_64", 49, 64, {"dropout": 0.1}),
            ("resources_dropout_head_128", 32, 128, {"dropout": 0.1}),
            ("resources_shared", 49, 32, {"shared": True}),
            ("resources_shared_dropout", 49, 32, {"shared": True, "dropout": 0.1}),
            ("resources_shared_head_64", 49, 64, {"shared": True, "dropout": 0.1}),
            ("resources_shared_head_128", 32, 128, {"shared": True, "dropout": 0.1}),
            ("resources_many_globals", 252, 32, {}),
            ("resources_many_globals_dropout", 252, 64, {"dropout": 0.1}),
            ("resources_many_globals_head_128", 252, 128, {"dropout": 0.1}),
            ("resources_many_globals_shared", 252, 32, {"shared": True, "dropout": 0.1}),
            ("resources_many_globals_shared_head_128", 252, 128, {"shared": True, "dropout": 0.1}),
        )
    ]
    model = [
        _case(f"{name}_stage{stage}", (128, *sizes), "model", model=name, calls=calls, dropout=0.1)
        for name, depths in _DEPTHS.items()
        for stage, (sizes, calls) in enumerate(zip(STAGES, depths, strict=True), 1)
    ]
    model += [
        _case(f"shared_stage{stage}", (128, *sizes), "model", shared=True)
        for stage, sizes in enumerate(STAGES, 1)
    ]
    model += [
        _case(f"detection_stage{stage}", (2, *sizes), "model") for stage, sizes in enumerate(DETECTION, 1)
    ]
    return (*tiny, *general, *counted, *model)
