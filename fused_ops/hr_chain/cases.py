"""Sample inputs of the HR chain: shapes of HIRI-ViT, and awkward ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fused_ops.core.cases import Case, make_map


def _case(
    name: str,
    shape: tuple[int, int, int, int],
    *tags: str,
    expansion: float = 4,
    biases: bool = True,
    training: bool = True,
    affine: bool = True,
    mean: float = 0.3,
    drop_path: tuple[float, ...] = (),
    model: str = "",
    calls: int = 1,
    layout: str = "channels_last",
    **options: Any,
) -> Case:
    """A case with random parameters and running statistics; ``drop_path`` are factors of the first images."""
    batch, channels = shape[:2]
    hidden = int(channels * expansion)

    def make(
        generator: torch.Generator, dtype: torch.dtype, device: torch.device, layout: str
    ) -> dict[str, Any]:
        from fused_ops.core.batch_norm import BatchNormState

        # Parameters stay in float32 under half-precision activations, as in mixed-precision training.
        parameter_dtype = torch.float64 if dtype == torch.float64 else torch.float32

        def random(size: tuple[int, ...], spread: float, centre: float = 0.0) -> torch.Tensor:
            values = centre + spread * torch.randn(size, generator=generator, dtype=torch.float64)
            return values.to(device=device, dtype=parameter_dtype)

        arguments: dict[str, Any] = {"x": make_map(shape, generator, dtype, device, layout, mean=mean)}
        for name, size, spread in (
            ("high_weight", (channels, 1, 3, 3), 1 / 3),
            ("low_weight", (channels, 1, 3, 3), 1 / 3),
            ("fc1_weight", (hidden, channels), channels**-0.5),
            ("fc2_weight", (channels, hidden), hidden**-0.5),
        ):
            arguments[name] = random(size, spread).requires_grad_()
        arguments["norm"] = BatchNormState(
            random((channels,), 0.2, 1.0).requires_grad_() if affine else None,
            random((channels,), 0.2).requires_grad_() if affine else None,
            random((channels,), 0.1, mean),
            random((channels,), 0.1, 1.0).abs_(),
            training,
            0.1,
            1e-5,
        )
        if biases:
            for name, size in (("high_bias", channels), ("fc1_bias", hidden), ("fc2_bias", channels)):
                arguments[name] = random((size,), 0.5).requires_grad_()
        if drop_path:
            factors = torch.ones(batch, dtype=parameter_dtype)
            factors[: len(drop_path)] = torch.tensor(drop_path, dtype=parameter_dtype)
            arguments["drop_path"] = factors.to(device)
        return {**arguments, **options}

    tags = (*tags, "training") if training else tags
    return Case(name, make, frozenset(tags), model, calls, layout)


def cases() -> Sequence[Case]:
    """All cases. ``tiny`` ones have few enough programs for Triton's interpreter."""
    evaluation = {"training": False}
    tiny = [
        _case(name, shape, "tiny", **options)
        for name, shape, options in (
            ("train", (2, 16, 6, 8), {}),
            ("eval", (2, 8, 5, 7), {**evaluation, "expansion": 2}),
            ("no_identity", (1, 16, 7, 6), {"identity": False, "biases": False, "activation": "silu"}),
            # Wider than one kernel's accumulators: the gradients of maps and of weights come apart.
            ("wide", (1, 33, 3, 4), {"activation": "relu", "drop_path": (1.25,)}),
            ("drop_path", (3, 8, 4, 5), {"expansion": 2, "drop_path": (0.0, 1.25, 1.25)}),
        )
    ]
    awkward = [
        _case(name, shape, "awkward", **options)
        for name, shape, options in (
            ("one_channel", (2, 1, 3, 3), {"expansion": 8, "activation": "hardswish"}),
            ("one_pixel", (6, 8, 1, 1), {"expansion": 2, "affine": False}),
            ("one_row", (2, 12, 1, 9), {"expansion": 2.5, "activation": "gelu_tanh", **evaluation}),
            ("large_mean", (2, 8, 6, 5), {"expansion": 2, "mean": 1e3}),
        )
    ]
    general = [
        *awkward,
        _case("many_channels", (1, 264, 4, 4), expansion=1),
        _case("nchw", (2, 8, 6, 6), layout="nchw"),
        _case("empty", (0, 8, 6, 6), "awkward", training=False),
    ]
    # Maps large enough for traffic to be the maps' own, few enough programs to count it in the interpreter.
    counted = [
        _case(f"traffic_{name}", (1, channels, 48, 48), "traffic", expansion=2, **options)
        for name, channels, options in (("train", 16, {}), ("eval", 16, evaluation))
    ]
    counted += [
        _case(f"resources_{name}", (2, channels, 32, 32), "resources", expansion=expansion, **options)
        for name, channels, expansion, options in (
            ("16", 16, 4, {}),
            ("32", 32, 4, {}),
            ("32_eval", 32, 4, evaluation),
            ("32_drop", 32, 2, {"drop_path": (0.0, 1.25)}),
            ("64", 64, 4, {"activation": "silu"}),
            ("96", 96, 4, {}),
            ("128", 128, 4, {"identity": False}),
            ("256", 256, 4, {}),
        )
    ]
    # The first two stages at 448, half the batch as such models are trained.
    model = [
        _case(
            f"{name}_{channels}x{size}",
            (64, channels, size, size),
            "model",
            model=f"hiri_vit_{name}",
            calls=2,
        )
        for name, stages in {
            "small": ((32, 112), (64, 56)),
            "base": ((64, 112), (96, 56)),
            "large": ((96, 112), (128, 56)),
        }.items()
        for channels, size in stages
    ]
    model += [_case("small_eval_32x112", (64, 32, 112, 112), "model", **evaluation)]
    return (*tiny, *general, *counted, *model)
