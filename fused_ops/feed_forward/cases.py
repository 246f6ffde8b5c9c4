"""Sample inputs of the feed-forward chain: shapes of real models, and awkward ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fused_ops.core.batch_norm import BatchNormState
from fused_ops.core.cases import Case, make_map
from fused_ops.core.layer_norm import LayerNormState


def _case(
    name: str,
    shape: tuple[int, int, int],
    *tags: str,
    expansion: float = 4,
    norm: str = "batch",
    training: bool = True,
    affine: bool = True,
    biases: bool = True,
    size: tuple[int, int] | None = None,
    as_map: bool = False,
    scaled: bool = False,
    residual: str = "input",
    drop_path: tuple[float, ...] = (),
    mean: float = 0.3,
    model: str = "",
    calls: int = 1,
    layout: str = "channels_last",
    **options: Any,
) -> Case:
    """A case of tokens (B, N, C) with random parameters.

    Args:
        norm: none, batch or layer; ``training``: the former with the batch's own statistics.
        size: (H, W) of a map whose hidden values are convolved; ``as_map``: given as (B, C, H, W).
        scaled: with a layer scale.
        residual: input, other or none.
        drop_path: factors of the first images; the others' are 1.
    """
    batch, tokens, channels = shape
    hidden = int(channels * expansion)

    def make(
        generator: torch.Generator, dtype: torch.dtype, device: torch.device, layout: str
    ) -> dict[str, Any]:
        # Parameters stay in float32 under half-precision activations, as in mixed-precision training.
        parameter_dtype = torch.float64 if dtype == torch.float64 else torch.float32

        def random(size: tuple[int, ...], spread: float, centre: float = 0.0) -> torch.Tensor:
            values = centre + spread * torch.randn(size, generator=generator, dtype=torch.float64)
            return values.to(device=device, dtype=parameter_dtype)

        def parameter(size: tuple[int, ...], spread: float, centre: float = 0.0) -> torch.Tensor:
            return random(size, spread, centre).requires_grad_()

        def rows(mean: float) -> torch.Tensor:
            sides = size or (tokens, 1)
            values = make_map((batch, channels, *sides), generator, dtype, device, layout, mean=mean)
            if as_map:
                return values
            return values.detach().flatten(2).transpose(1, 2).requires_grad_()

        arguments: dict[str, Any] = {
            "x": rows(mean),
            "fc1_weight": parameter((hidden, channels), channels**-0.5),
            "fc2_weight": parameter((channels, hidden), hidden**-0.5),
        }
        weight = parameter((channels,), 0.2, 1.0) if affine else None
        bias = parameter((channels,), 0.2) if affine else None
        if norm == "batch":
            running = random((channels,), 0.1, mean), random((channels,), 0.1, 1.0).abs_()
            arguments["norm"] = BatchNormState(weight, bias, *running, training, 0.1, 1e-5)
        elif norm == "layer":
            arguments["norm"] = LayerNormState(weight, bias, 1e-6)
        if size is not None:
            arguments["conv_weight"] = parameter((hidden, 1, 3, 3), 1 / 3)
            if not as_map:
                arguments["size"] = size
            if biases:
                arguments["conv_bias"] = parameter((hidden,), 0.5)
        if biases:
            arguments["fc1_bias"] = parameter((hidden,), 0.5)
            arguments["fc2_bias"] = parameter((channels,), 0.5)
        if scaled:
            arguments["layer_scale"] = parameter((channels,), 0.3, 0.5)
        if drop_path:
            factors = torch.ones(batch, dtype=parameter_dtype)
            factors[: len(drop_path)] = torch.tensor(drop_path, dtype=parameter_dtype)
            arguments["drop_path"] = factors.to(device)
        if residual == "input":
            arguments["residual"] = arguments["x"]
        elif residual == "other":
            arguments["residual"] = rows(0.0)
        return {**arguments, **options}

    tags = (*tags, "training") if norm == "batch" and training else tags
    return Case(name, make, frozenset(tags), model, calls, layout)


def cases() -> Sequence[Case]:
    """All cases. ``tiny`` ones have few enough programs for Triton's interpreter."""
    evaluation = {"training": False}
    layer = {"norm": "layer"}
    convnext = {**layer, "scaled": True, "residual": "other"}
    bare = {"norm": "none", "residual": "none"}
    tiny = [
        _case(name, shape, "tiny", **options)
        for name, shape, options in (
            ("batch", (2, 19, 16), {"expansion": 2}),
            ("batch_eval", (2, 21, 24), {**evaluation, "expansion": 2, "activation": "silu"}),
            ("layer", (2, 33, 16), {**layer, "expansion": 2}),
            ("convnext", (3, 11, 12), {**convnext, "expansion": 3, "drop_path": (0.0, 1.25)}),
            ("plain", (1, 40, 8), {**bare, "biases": False, "activation": "relu"}),
            # More hidden units than one program's accumulators hold.
            ("wide", (1, 18, 40), {**layer, "expansion": 4, "activation": "gelu_tanh"}),
            ("scaled", (2, 17, 16), {"scaled": True, "expansion": 2, "drop_path": (1.25, 0.0)}),
            # Beyond what stays on chip: PyTorch's products.
            ("products_batch", (2, 9, 136), {"expansion": 0.25}),
            ("products_layer", (3, 5, 144), {**layer, "expansion": 0.25, "drop_path": (0.0, 1.25)}),
            ("products_convnext", (2, 7, 130), {**convnext, "expansion": 0.2, "activation": "silu"}),
        )
    ]
    awkward = [
        _case(name, shape, "awkward", **options)
        for name, shape, options in (
            ("one_channel", (2, 9, 1), {"expansion": 8, "activation": "hardswish"}),
            ("one_channel_layer", (2, 5, 1), {**layer, "expansion": 3}),
            ("one_token", (5, 1, 8), {"expansion": 2, "affine": False}),
            ("one_row", (1, 1, 12), {**layer, "expansion": 2.5, "affine": False, "scaled": True}),
            ("large_mean", (2, 30, 8), {"expansion": 2, "mean": 1e3}),
            ("large_mean_layer", (2, 30, 8), {**layer, "expansion": 2, "mean": 1e3}),
        )
    ]
    general = [
        *awkward,
        _case("many_channels", (1, 6, 2056), expansion=0.01),
        _case("empty", (0, 6, 8), "awkward", **layer),
    ]
    # Enough tokens for traffic to be their own, few enough programs to count it in the interpreter.
    counted = [
        _case(f"traffic_{name}", (1, tokens, channels), "traffic", expansion=2, **options)
        for name, tokens, channels, options in (
            ("batch", 4096, 16, {}),
            ("convnext", 4096, 16, convnext),
        )
    ]
    counted += [
        _case(f"resources_{name}", (2, 4096, channels), "resources", expansion=expansion, **options)
        for name, channels, expansion, options in (
            ("16", 16, 4, {}),
            ("32", 32, 4, layer),
            ("64", 64, 4, {}),
            ("64_eval", 64, 4, evaluation),
            ("64_layer_8", 64, 8, {**layer, "drop_path": (0.0, 1.25)}),
            ("96_convnext", 96, 4, convnext),
            ("96_swin", 96, 4, layer),
            ("128", 128, 4, {}),
            ("128_convnext", 128, 4, convnext),
            ("320", 320, 4, {}),
            ("384_convnext", 384, 4, convnext),
            ("768", 768, 4, {**layer, "drop_path": (0.0, 1.25)}),
            ("128_silu", 128, 2, {**bare, "activation": "silu"}),
        )
    ]
    # (channels, side of the map, expansion, calls), as the models call them at 224.
    published = {
        "dsnet_small": ({}, [(64, 56, 4, 3), (128, 28, 4, 4), (320, 14, 4, 8), (512, 7, 4, 3)]),
        "convnext_tiny": (convnext, [(96, 56, 4, 3), (192, 28, 4, 3), (384, 14, 4, 9)]),
        "convnext_base": (convnext, [(128, 56, 4, 3)]),
        "swin_tiny_patch4_window7_224": (layer, [(96, 56, 4, 2), (192, 28, 4, 2), (384, 14, 4, 6)]),
        "pvt_small": (layer, [(64, 56, 8, 3), (128, 28, 8, 3)]),
    }
    model = [
        _case(
            f"{name}_{channels}x{side}",
            (128, side * side, channels),
            "model",
            expansion=expansion,
            model=name,
            calls=calls,
            **options,
        )
        for name, (options, shapes) in published.items()
        for channels, side, expansion, calls in shapes
    ]
    model += [_case("dsnet_small_eval_64x56", (128, 3136, 64), "model", **evaluation)]
    return (*tiny, *general, *counted, *model)


def _conv_case(name: str, shape: tuple[int, int, int, int], *tags: str, **options: Any) -> Case:
    """A case with a convolution, on a map of ``shape`` (B, C, H, W) or its tokens."""
    batch, channels, *size = shape
    return _case(name, (batch, size[0] * size[1], channels), *tags, size=tuple(size), **options)


def conv_cases() -> Sequence[Case]:
    """All cases with a depthwise convolution. ``tiny`` ones have few enough programs for the interpreter."""
    layer, evaluation = {"norm": "layer"}, {"training": False}
    # PVTv2's MLP, its linear form, and HIRI-ViT's CFFN.
    pvt = layer
    linear = {**layer, "activation": "relu"}
    cffn = {"activation": "gelu", "conv_activation": "none", "conv_identity": True, "as_map": True}
    bare = {"norm": "none", "residual": "none", "biases": False}
    tiny = [
        _conv_case(name, shape, "tiny", **options)
        for name, shape, options in (
            ("pvt", (2, 8, 2, 4), {**pvt, "expansion": 2, "drop_path": (0.0, 1.25)}),
            ("linear", (1, 12, 2, 3), {**linear, "expansion": 1.5, "scaled": True}),
            ("cffn", (2, 8, 2, 3), {**cffn, "expansion": 2}),
        )
    ]
    both = {"activation": "hardswish", "conv_activation": "gelu_tanh", "conv_identity": True}
    awkward = [
        _conv_case(name, shape, "awkward", **options)
        for name, shape, options in (
            ("eval", (2, 8, 3, 3), {**cffn, **evaluation, "expansion": 2, "residual": "other"}),
            (
                "plain",
                (1, 8, 2, 3),
                {**bare, "expansion": 2, "activation": "silu", "conv_activation": "none"},
            ),
            ("both", (2, 8, 2, 2), {**bare, **both, "biases": True, "expansion": 2}),
            ("one_channel", (2, 1, 3, 3), {**cffn, "expansion": 1}),
            ("one_pixel", (3, 8, 1, 1), {**cffn, "expansion": 2, "affine": False}),
            ("one_column", (2, 8, 7, 1), {**pvt, "expansion": 2, "as_map": True}),
            ("prime", (1, 7, 5, 11), {**linear, "expansion": 1.9}),
            ("wide", (1, 136, 3, 2), {**pvt, "expansion": 0.25}),
            ("large_mean", (2, 8, 3, 4), {**cffn, "expansion": 2, "mean": 1e3}),
        )
    ]
    general = [
        *awkward,
        _conv_case("many_channels", (1, 2056, 2, 3), **pvt, expansion=0.01),
        _conv_case("empty", (0, 8, 3, 2), "awkward", **pvt),
    ]
    counted = [
        _conv_case(f"traffic_{name}", (1, 8, 7, 56), "traffic", expansion=2, **options)
        for name, options in (("pvt", pvt), ("cffn", cffn))
    ]
    counted += [
        _conv_case(f"resources_{name}", (2, channels, 16, 16), "resources", **options)
        for name, channels, options in (
            ("pvt", 64, {**pvt, "expansion": 8, "drop_path": (0.0, 1.25)}),
            ("linear", 32, {**linear, "expansion": 8}),
            ("cffn", 128, cffn),
        )
    ]
    # (channels, side of the map, expansion, calls), as the models call them at 224, HIRI-ViT at 448.
    published = {
        "pvt_v2_b0": (pvt, [(32, 56, 8, 2), (64, 28, 8, 2), (160, 14, 4, 2), (256, 7, 4, 2)]),
        "pvt_v2_b2": (pvt, [(64, 56, 8, 3), (128, 28, 8, 4), (320, 14, 4, 6), (512, 7, 4, 3)]),
        "hiri_vit_small": (cffn, [(128, 28, 4, 5), (320, 14, 4, 9), (640, 7, 4, 4)]),
    }
    model = [
        _conv_case(
            f"{name}_{channels}x{side}",
            (64 if name.startswith("hiri") else 128, channels, side, side),
            "model",
            expansion=expansion,
            model=name,
            calls=calls,
            **options,
        )
        for name, (options, shapes) in published.items()
        for channels, side, expansion, calls in shapes
    ]
    return (*tiny, *general, *counted, *model)
