"""Sample inputs of the attention operator: shapes of real models, and awkward ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fused_ops.core.cases import Case, make_map


def _tokens(
    shape: tuple[int, int, int, int],
    parts: int,
    generator: torch.Generator,
    dtype: torch.dtype,
    device: torch.device,
    layout: str,
) -> list[Tensor]:
    """``parts`` tensors (B, N, heads, d) out of one packed projection, as views of it.

    ``channels_last`` is what a Linear or a 1x1 convolution of such a map gives, ``nchw`` what that
    convolution gives in PyTorch's default layout, ``slice`` the former as part of a wider tensor.
    """
    batch, count, heads, head_dim = shape
    packed = make_map((batch, parts * heads * head_dim, count, 1), generator, dtype, device, layout, mean=0.1)
    tokens = packed.detach().flatten(2).transpose(1, 2)
    return list(tokens.unflatten(-1, (parts, heads, head_dim)).unbind(2))


def _case(
    name: str,
    shape: tuple[int, int, int, int, int],
    *tags: str,
    bias_heads: int = 0,
    masked: bool = False,
    dropout: float = 0.0,
    scale: float | None = None,
    model: str = "",
    calls: int = 1,
    layout: str = "channels_last",
) -> Case:
    """A case of (B, N, Nk, heads, d).

    Args:
        bias_heads: heads of a random bias, 0 for none.
        masked: mask some keys of each image, and of the last image all.
        dropout: with a seed that is given, so that every backend drops the same.
    """
    batch, queries, keys, heads, head_dim = shape

    def make(
        generator: torch.Generator, dtype: torch.dtype, device: torch.device, layout: str
    ) -> dict[str, Any]:
        (query,) = _tokens((batch, queries, heads, head_dim), 1, generator, dtype, device, layout)
        key, value = _tokens((batch, keys, heads, head_dim), 2, generator, dtype, device, layout)
        arguments: dict[str, Any] = {"query": query, "key": key, "value": value}
        arguments = {name: tensor.requires_grad_() for name, tensor in arguments.items()}
        if bias_heads:
            # Tables of positions stay in float32 under half-precision activations.
            bias_dtype = torch.float64 if dtype == torch.float64 else torch.float32
            bias = torch.randn(bias_heads, queries, keys, generator=generator, dtype=torch.float64)
            arguments["bias"] = bias.to(device=device, dtype=bias_dtype).requires_grad_()
        if masked:
            mask = torch.rand(batch, keys, generator=generator) < 0.6
            mask[-1] = False
            arguments["key_mask"] = mask.to(device)
        if scale is not None:
            arguments["scale"] = scale
        if dropout:
            arguments["dropout"] = dropout
            arguments["seed"] = torch.tensor([2**40 + 12345, 7], device=device)
        return arguments

    return Case(name, make, frozenset(tags), model, calls, layout)


def cases() -> Sequence[Case]:
    """All cases. ``tiny`` ones have few enough programs for Triton's interpreter."""
    tiny = [
        _case(name, shape, "tiny", "awkward", **options)
        for name, shape, options in (
            ("plain", (2, 19, 9, 2, 16), {}),
            ("head_24", (1, 20, 13, 2, 24), {"scale": 0.3}),
            ("head_40_bias", (2, 17, 5, 2, 40), {"bias_heads": 2}),
            ("head_80", (1, 33, 20, 1, 80), {}),
            ("masked_shared_bias", (2, 18, 11, 2, 8), {"bias_heads": 1, "masked": True}),
            ("dropout", (2, 21, 10, 2, 16), {"dropout": 0.3}),
            ("dropout_masked_bias", (2, 17, 7, 1, 40), {"bias_heads": 1, "masked": True, "dropout": 0.1}),
            ("one_query", (2, 1, 9, 1, 16), {}),
            ("one_key", (2, 18, 1, 1, 16), {}),
            ("head_1", (1, 5, 3, 3, 1), {}),
        )
    ]
    general = [
        _case("no_image", (0, 6, 5, 2, 8), "awkward"),
        _case("many_keys", (1, 12, 300, 1, 16), masked=True),
        _case("wide_head", (1, 12, 7, 1, 136), bias_heads=1),
    ]
    # Enough queries for traffic to be the tensors' own, few enough programs to count it in the interpreter.
    counted = [
        _case("traffic_49_keys", (2, 784, 49, 2, 32), "traffic"),
        _case("traffic_masked", (2, 600, 40, 1, 64), "traffic", masked=True),
        _case("traffic_dropout", (1, 700, 49, 1, 48), "traffic", dropout=0.1),
    ]
    # Every width of heads and number of keys of the models below, and others up to the largest.
    counted += [
        _case(f"resources_{keys}_keys_head_{head_dim}", (2, 1100, keys, 2, head_dim), "resources", **options)
        for keys, head_dim, options in (
            (9, 32, {}),
            (49, 16, {}),
            (49, 32, {}),
            (49, 64, {}),
            (49, 80, {}),
            (49, 128, {}),
            (49, 64, {"dropout": 0.1}),
            (49, 32, {"bias_heads": 2}),
            (49, 64, {"dropout": 0.1, "bias_heads": 1}),
            (100, 64, {}),
            (196, 16, {}),
            (196, 32, {}),
        )
    ]
    # (queries, keys, heads, width of a head, calls), as the models call them at 224.
    published = {
        "pvt_small": [(3136, 49, 1, 64, 3), (784, 49, 2, 64, 4), (196, 49, 5, 64, 6), (50, 50, 8, 64, 3)],
        "pvt_v2_b0": [(3136, 49, 1, 32, 2), (784, 49, 2, 32, 2), (196, 49, 5, 32, 2), (49, 49, 8, 32, 2)],
        "nextvit_small": [(784, 49, 6, 32, 1), (196, 49, 12, 32, 2), (49, 49, 24, 32, 1)],
    }
    model = [
        _case(
            f"{name}_{queries}x{keys}_h{heads}",
            (128, queries, keys, heads, head_dim),
            "model",
            model=name,
            calls=calls,
        )
        for name, shapes in published.items()
        for queries, keys, heads, head_dim, calls in shapes
    ]
    # The same networks at 448 and on the maps of detection (800 x 1344) and segmentation (512 x 512).
    model += [
        _case("size_448_12544x196_h1", (64, 12544, 196, 1, 64), "model"),
        _case("size_448_3136x196_h2", (64, 3136, 196, 2, 64), "model"),
        _case("linear_448_12544x49_h1", (64, 12544, 49, 1, 64), "model"),
        _case("segmentation_16384x256_h1", (16, 16384, 256, 1, 32), "model"),
        _case("detection_67200x1050_h1", (2, 67200, 1050, 1, 64), "model"),
        _case("detection_linear_67200x49_h1", (2, 67200, 49, 1, 64), "model"),
    ]
    return (*tiny, *general, *counted, *model)
