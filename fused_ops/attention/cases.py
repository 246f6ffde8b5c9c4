"""Sample inputs of the attention operator: shapes of real models, and awkward ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fused_ops.core.cases import Case, make_map
from fused_ops.core.layer_norm import LayerNormState


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


def _block_case(
    name: str,
    shape: tuple[int, int, int, int, int, int],
    *tags: str,
    norm: bool = True,
    biases: bool = True,
    residual: str = "input",
    masked: bool = False,
    drop_path: bool = False,
    model: str = "",
    calls: int = 1,
) -> Case:
    """A case of the attention block, (B, N, C, Nk, heads, d); ``residual``: input, other or none."""
    batch, tokens, channels, keys, heads, head_dim = shape

    def make(
        generator: torch.Generator, dtype: torch.dtype, device: torch.device, layout: str
    ) -> dict[str, Any]:
        parameters = torch.float64 if dtype == torch.float64 else torch.float32

        def parameter(*sizes: int, mean: float = 0.0, scale: float = 1.0) -> Tensor:
            values = torch.randn(sizes, generator=generator, dtype=torch.float64) * scale + mean
            return values.to(device=device, dtype=parameters).requires_grad_()

        (x,) = _tokens((batch, tokens, 1, channels), 1, generator, dtype, device, layout)
        key, value = _tokens((batch, keys, heads, head_dim), 2, generator, dtype, device, layout)
        width = heads * head_dim
        arguments: dict[str, Any] = {
            "x": x.squeeze(2).requires_grad_(),
            "key": key.requires_grad_(),
            "value": value.requires_grad_(),
            "query_weight": parameter(width, channels, scale=channels**-0.5),
            "out_weight": parameter(channels, width, scale=width**-0.5),
        }
        if norm:
            arguments["norm"] = LayerNormState(parameter(channels, mean=1.0), parameter(channels), 1e-6)
        if biases:
            arguments["query_bias"] = parameter(width)
            arguments["out_bias"] = parameter(channels)
        if masked:
            mask = torch.rand(batch, keys, generator=generator) < 0.6
            mask[-1] = False
            arguments["key_mask"] = mask.to(device)
        if drop_path:
            factors = torch.arange(batch, dtype=torch.float64) % 2 * 1.25
            arguments["drop_path"] = factors.to(device=device, dtype=parameters)
        if residual == "input":
            arguments["residual"] = arguments["x"]
        elif residual == "other":
            (other,) = _tokens((batch, tokens, 1, channels), 1, generator, dtype, device, layout)
            arguments["residual"] = other.squeeze(2).requires_grad_()
        return arguments

    return Case(name, make, frozenset(tags), model, calls)


def block_cases() -> Sequence[Case]:
    """Cases of the attention block."""
    tiny = [
        _block_case(name, shape, "tiny", "awkward", **options)
        for name, shape, options in (
            ("one_head", (2, 19, 16, 9, 1, 16), {}),
            ("two_heads", (2, 21, 24, 7, 2, 12), {"drop_path": True, "residual": "other"}),
            ("no_norm", (1, 17, 20, 5, 1, 8), {"norm": False, "biases": False, "residual": "none"}),
            ("masked", (2, 18, 16, 11, 2, 8), {"masked": True, "biases": False}),
            ("three_heads", (2, 33, 40, 20, 3, 5), {"masked": True}),
            ("one_token", (2, 1, 16, 9, 1, 16), {}),
            ("one_key", (1, 18, 8, 1, 2, 4), {"norm": False}),
            ("one_channel", (2, 18, 1, 3, 1, 4), {"norm": False}),
        )
    ]
    general = [
        _block_case("no_image", (0, 6, 16, 5, 2, 8), "awkward"),
        _block_case("wide", (1, 12, 160, 7, 2, 80)),
        _block_case("many_keys", (1, 12, 16, 300, 1, 16)),
    ]
    counted = [
        _block_case("traffic_one_head", (1, 784, 64, 49, 1, 64), "traffic"),
        _block_case("traffic_two_heads", (1, 784, 64, 20, 2, 32), "traffic", residual="other"),
    ]
    counted += [
        _block_case(
            f"resources_{channels}_channels_{keys}_keys_{heads}_heads",
            (2, 1100, channels, keys, heads, channels // heads),
            "resources",
            drop_path=True,
        )
        for channels, keys, heads in (
            (32, 49, 1),
            (64, 49, 1),
            (64, 49, 2),
            (64, 100, 1),
            (96, 49, 3),
            (128, 49, 2),
            (32, 196, 1),
        )
    ]
    # (tokens, channels, keys, heads, calls), as the models call them at 224.
    published = {
        "pvt_small": [(3136, 64, 49, 1, 3), (784, 128, 49, 2, 4)],
        "pvt_v2_b0": [(3136, 32, 49, 1, 2), (784, 64, 49, 2, 2)],
        "twins_pcpvt_small": [(3136, 64, 49, 1, 3), (784, 128, 49, 2, 4)],
    }
    model = [
        _block_case(
            f"{name}_{tokens}x{keys}_c{channels}",
            (128, tokens, channels, keys, heads, channels // heads),
            "model",
            model=name,
            calls=calls,
        )
        for name, shapes in published.items()
        for tokens, channels, keys, heads, calls in shapes
    ]
    model += [_block_case("size_448_12544x49_c32", (64, 12544, 32, 49, 1, 32), "model")]
    return (*tiny, *general, *counted, *model)
