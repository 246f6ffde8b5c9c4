"""Sample inputs of the gate operators: shapes of real models, and awkward ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fused_ops.core.cases import Case, make_map

Shape = tuple[int, int, int, int]


def _case(name: str, shape: Shape, *tags: str, model: str = "", calls: int = 1, **options: Any) -> Case:
    """A case whose options are the operator's, apart from these: the names of vectors and maps in ``inputs``,
    and the map's ``layout``."""
    inputs: Iterable[str] = options.pop("inputs", ())
    layout = options.pop("layout", "channels_last")
    batch, channels, height, width = shape
    shapes = {
        "channel_gate": (batch, channels),
        "channel_add": (batch, channels),
        "position_gate": (batch, 1, height, width),
        "weight": (1, channels, 1, 1),
        "bias": (1,),
    }

    def make(
        generator: torch.Generator, dtype: torch.dtype, device: torch.device, layout: str
    ) -> dict[str, Any]:
        def random(size: tuple[int, ...]) -> Tensor:
            # Both ends of a hard sigmoid have to be reached.
            spread = 4 if options.get("gate") == "hard_sigmoid" else 1
            values = spread * torch.randn(size, generator=generator, dtype=torch.float64)
            # Parameters stay in float32 under half-precision maps; gates are activations.
            parameter = dtype != torch.float64 and size == shapes["weight"]
            return values.to(device=device, dtype=torch.float32 if parameter else dtype).requires_grad_()

        arguments: dict[str, Any] = {"x": make_map(shape, generator, dtype, device, layout)}
        for name in inputs:
            if name == "residual":
                arguments[name] = make_map(shape, generator, dtype, device, layout, mean=0.1)
            else:
                arguments[name] = random(shapes[name])
        return {**arguments, **options}

    return Case(name, make, frozenset(tags), model, calls, layout)


# The maps that a gate sees at 224, (channels, size, blocks): a ResNet-50's residual branches, and where
# MobileNetV3 and EfficientNet have squeeze-and-excitation.
RESNET_50 = ((256, 56, 3), (512, 28, 4), (1024, 14, 6), (2048, 7, 3))
MOBILENET_V3 = ((72, 28, 1), (120, 28, 2), (480, 14, 1), (672, 14, 1), (672, 7, 1), (960, 7, 2))
EFFICIENTNET_B0 = ((96, 56, 1), (144, 56, 1), (240, 28, 1), (480, 14, 3), (672, 14, 3), (1152, 7, 4))


def _model_cases(name: str, stages: Sequence[tuple[int, int, int]], kind: str, **options: Any) -> list[Case]:
    return [
        _case(
            f"{name}_{kind}_{channels}x{size}",
            (128, channels, size, size),
            "model",
            model=f"{name}_{kind}",
            calls=calls,
            **options,
        )
        for channels, size, calls in stages
    ]


# Parts of more than one program on few programs: one image, one block of channels.
_COUNTED: Shape = (1, 16, 48, 48)
# What the register report compiles for.
_LARGE: Shape = (8, 256, 56, 56)


def channel_cases() -> Sequence[Case]:
    """Cases of :func:`fused_ops.gate.pool_channels`; ``tiny`` ones suit Triton's interpreter."""
    everything = ("mean", "max", "entropy")
    return (
        _case("all", (2, 12, 5, 7), "tiny", poolings=everything),
        _case("parts", (1, 3, 33, 32), "tiny", poolings=("entropy", "max", "mean")),
        _case("one_pixel", (2, 5, 1, 1), "awkward", poolings=everything),
        _case("one_channel", (2, 1, 3, 3), "awkward", poolings=("max",)),
        _case("nchw", (2, 9, 4, 5), poolings=everything, layout="nchw"),
        _case("empty", (0, 8, 6, 6), "awkward", poolings=everything),
        _case("traffic_all", _COUNTED, "traffic", poolings=everything),
        *(
            _case(f"resources_{layout}_{len(names)}", _LARGE, "resources", poolings=names, layout=layout)
            for layout, names in (
                ("channels_last", ("mean", "max")),
                ("channels_last", everything),
                ("nchw", everything),
            )
        ),
        *_model_cases("mobilenet_v3", MOBILENET_V3, "se", poolings=("mean",)),
        *_model_cases("efficientnet_b0", EFFICIENTNET_B0, "se", poolings=("mean",)),
        *_model_cases("resnet_50", RESNET_50, "eca", poolings=("mean",)),
        *_model_cases("resnet_50", RESNET_50, "cbam", poolings=("mean", "max")),
    )


def position_cases() -> Sequence[Case]:
    """Cases of :func:`fused_ops.gate.pool_positions`, as above."""
    everything = ("mean", "max", "entropy")
    gated = {"inputs": ("channel_gate",)}
    return (
        _case("gated", (2, 12, 4, 6), "tiny", poolings=("max", "mean"), **gated),
        _case("all", (1, 35, 3, 5), "tiny", poolings=everything),
        _case("hard", (2, 5, 3, 3), "awkward", gate="hard_sigmoid", poolings=("entropy",), **gated),
        _case("one_channel", (2, 1, 3, 3), "awkward", poolings=everything),
        _case("nchw", (2, 9, 4, 5), layout="nchw", **gated),
        _case("empty", (0, 8, 6, 6), "awkward"),
        _case("traffic_gated", _COUNTED, "traffic", **gated),
        *(
            _case(f"resources_{layout}", _LARGE, "resources", layout=layout, **gated)
            for layout in ("channels_last", "nchw")
        ),
        _case("resources_all", _LARGE, "resources", poolings=everything),
        *_model_cases("resnet_50", RESNET_50, "cbam", **gated),
    )


def map_cases() -> Sequence[Case]:
    """Cases of :func:`fused_ops.gate.pool_map`, as above."""
    everything = {name: ("mean", "max", "entropy") for name in ("channels", "positions")}
    return (
        _case("all", (2, 12, 4, 5), "tiny", inputs=("channel_gate",), normalise=False, **everything),
        _case("parts", (1, 5, 18, 16), channels=("max", "entropy"), positions=("mean",)),
        _case("traffic", _COUNTED, "traffic", **everything),
        *(
            _case(f"resources_{layout}", _LARGE, "resources", layout=layout, **everything)
            for layout in ("channels_last", "nchw")
        ),
        *_model_cases("resnet_50", RESNET_50, "cat", **everything),
    )


def scale_cases() -> Sequence[Case]:
    """Cases of :func:`fused_ops.gate.gate_scale`, as above."""
    channel = {"inputs": ("channel_gate",)}
    block = {"inputs": ("channel_gate", "residual"), "activation": "relu"}
    cbam = {"inputs": ("channel_gate", "position_gate", "residual"), "activation": "relu"}
    cat = {**cbam, "combine": "sum"}
    context = {"inputs": ("channel_add", "residual"), "activation": "relu"}
    names = ("channel_gate", "position_gate", "channel_add", "residual")
    found = [
        _case("block", (2, 9, 4, 6), "tiny", **block),
        _case("cbam", (2, 12, 4, 6), "tiny", **cbam),
        _case("cat", (1, 35, 3, 5), "tiny", **cat),
        _case("context", (2, 12, 3, 5), "tiny", **context),
        _case("all", (1, 12, 5, 5), "tiny", inputs=names, gate="hard_sigmoid", activation="silu"),
        _case("parts", (1, 3, 33, 16), "awkward", inputs=("channel_gate", "channel_add"), gate="none"),
        _case("one_pixel", (2, 5, 1, 1), "awkward", **cbam),
        _case("one_channel", (2, 1, 3, 3), "awkward", **cbam),
        _case("nchw", (2, 9, 4, 5), layout="nchw", **cbam),
        _case("empty", (0, 8, 6, 6), "awkward", **cbam),
    ]
    kinds = {"channel": channel, "block": block, "cbam": cbam, "cat": cat, "context": context}
    counted = (1, 16, 32, 32)
    found += [_case(f"traffic_{name}", counted, "traffic", **kinds[name]) for name in ("block", "cbam")]
    found += [
        _case(f"resources_{layout}_{name}", _LARGE, "resources", layout=layout, **kinds[name])
        for layout, name in (
            ("channels_last", "block"),
            ("channels_last", "cbam"),
            ("channels_last", "cat"),
            ("nchw", "cbam"),
        )
    ]
    # Too few programs for the tiles of large maps.
    found.append(_case("resources_small_cbam", (2, 256, 14, 14), "resources", **cbam))
    return (
        *found,
        *_model_cases("mobilenet_v3", MOBILENET_V3, "se", gate="hard_sigmoid", **channel),
        *_model_cases("efficientnet_b0", EFFICIENTNET_B0, "se", **channel),
        *_model_cases("resnet_50", RESNET_50, "eca", **block),
        *_model_cases("resnet_50", RESNET_50, "cbam", **cbam),
        *_model_cases("resnet_50", RESNET_50, "cat", **cat),
        *_model_cases("resnet_50", RESNET_50[1:], "gc", **context),
    )


def context_cases() -> Sequence[Case]:
    """Cases of :func:`fused_ops.gate.context_pool`, as above."""
    inputs = {"inputs": ("weight", "bias")}
    return (
        _case("plain", (2, 12, 5, 7), "tiny", **inputs),
        _case("parts", (1, 5, 9, 15), "tiny", inputs=("weight",)),
        _case("one_pixel", (2, 5, 1, 1), "awkward", **inputs),
        _case("one_channel", (2, 1, 3, 3), "awkward", **inputs),
        _case("nchw", (2, 9, 4, 5), layout="nchw", **inputs),
        _case("empty", (0, 8, 6, 6), "awkward", **inputs),
        _case("traffic", _COUNTED, "traffic", **inputs),
        *(
            _case(f"resources_{layout}", _LARGE, "resources", layout=layout, **inputs)
            for layout in ("channels_last", "nchw")
        ),
        *_model_cases("resnet_50", RESNET_50[1:], "gc", **inputs),
    )


def _maps_case(
    name: str,
    shape: Shape,
    count: int,
    *tags: str,
    names: tuple[str, str, str] = ("maps", "position_gates", "channel_gates"),
    gates: int = 0,
    layout: str = "channels_last",
    model: str = "",
    calls: int = 1,
) -> Case:
    """A case of several maps.

    Args:
        names: of the arguments with the maps, with what is per position and with what is per channel; the
            last one empty where there is none.
        gates: how many of each of the latter, 0 for ``count``.
    """
    batch, channels, height, width = shape
    gates = gates or count

    def make(
        generator: torch.Generator, dtype: torch.dtype, device: torch.device, layout: str
    ) -> dict[str, Any]:
        def random(size: tuple[int, ...]) -> tuple[Tensor, ...]:
            values = (torch.randn(size, generator=generator, dtype=torch.float64) for _ in range(gates))
            return tuple(value.to(device=device, dtype=dtype).requires_grad_() for value in values)

        arguments = {
            names[0]: tuple(make_map(shape, generator, dtype, device, layout) for _ in range(count)),
            names[1]: random((batch, 1, height, width)),
        }
        if names[2]:
            arguments[names[2]] = random((batch, channels))
        return arguments

    return Case(name, make, frozenset(tags), model, calls, layout)


# Maps of AFA-DLA-34 at 1024x2048, (channels, height, fusions); twice as wide as high.
AFA_DLA_34 = ((256, 64, 1), (128, 128, 2), (64, 256, 3), (32, 512, 4))


def fusion_cases() -> Sequence[Case]:
    """Cases of :func:`fused_ops.gate.attentive_fusion`, as above."""

    def case(name: str, shape: Shape, *tags: str, **options: Any) -> Case:
        made = _maps_case(name, shape, 2, *tags, gates=1, **options)

        def make(*inputs: Any) -> dict[str, Any]:
            arguments = made.make(*inputs)
            x, y = arguments["maps"]
            (position_gate,), (channel_gate,) = arguments["position_gates"], arguments["channel_gates"]
            return {"x": x, "y": y, "position_gate": position_gate, "channel_gate": channel_gate}

        return replace(made, make=make)

    return (
        case("plain", (2, 12, 4, 6), "tiny"),
        case("parts", (1, 35, 3, 15), "tiny"),
        case("one_pixel", (2, 5, 1, 1), "awkward"),
        case("one_channel", (2, 1, 3, 3), "awkward"),
        case("nchw", (2, 9, 4, 5), layout="nchw"),
        case("empty", (0, 8, 6, 6), "awkward"),
        case("traffic", (1, 16, 16, 24), "traffic"),
        *(
            case(f"resources_{layout}", _LARGE, "resources", layout=layout)
            for layout in ("channels_last", "nchw")
        ),
        case("resources_small", (2, 256, 14, 14), "resources"),
        *(
            case(f"afa_dla_34_{c}x{h}", (1, c, h, 2 * h), "model", model="afa_dla_34", calls=calls)
            for c, h, calls in AFA_DLA_34
        ),
    )


def multi_level_cases() -> Sequence[Case]:
    """Cases of :func:`fused_ops.gate.multi_level_fusion`, as above."""
    return (
        _maps_case("three", (2, 12, 4, 6), 3, "tiny"),
        _maps_case("two", (1, 35, 3, 5), 2, "tiny"),
        _maps_case("four", (1, 3, 9, 8), 4, "awkward"),
        _maps_case("many_channels", (1, 140, 2, 3), 3, "awkward"),
        _maps_case("one", (2, 5, 2, 3), 1, "awkward"),
        _maps_case("one_pixel", (2, 5, 1, 1), 3, "awkward"),
        _maps_case("one_channel", (2, 1, 3, 3), 3, "awkward"),
        _maps_case("nchw", (2, 9, 4, 5), 3, layout="nchw"),
        _maps_case("empty", (0, 8, 6, 6), 3, "awkward"),
        _maps_case("traffic", (1, 16, 16, 24), 3, "traffic"),
        *(
            _maps_case(f"resources_{layout}_{count}", _LARGE, count, "resources", layout=layout)
            for layout, count in (("channels_last", 3), ("channels_last", 5), ("nchw", 3))
        ),
        _maps_case("afa_dla_34", (1, 32, 512, 1024), 3, "model", model="afa_dla_34"),
    )


def render_cases() -> Sequence[Case]:
    """Cases of :func:`fused_ops.gate.render_scales`, as above."""
    names = ("predictions", "densities", "")
    return (
        _maps_case("three", (2, 12, 4, 6), 3, "tiny", names=names),
        _maps_case("five", (1, 19, 3, 5), 5, "tiny", names=names),
        _maps_case("one_pixel", (2, 5, 1, 1), 2, "awkward", names=names),
        _maps_case("nchw", (2, 9, 4, 5), 2, layout="nchw", names=names),
        _maps_case("empty", (0, 8, 6, 6), 2, "awkward", names=names),
        _maps_case("traffic", (1, 19, 16, 16), 2, "traffic", names=names),
        *(
            _maps_case(f"resources_{layout}", (2, 19, 256, 512), 5, "resources", layout=layout, names=names)
            for layout in ("channels_last", "nchw")
        ),
        _maps_case("afa_dla_34", (1, 19, 1024, 2048), 2, "model", model="afa_dla_34", names=names),
    )


def weighted_cases() -> Sequence[Case]:
    """Cases of :func:`fused_ops.gate.weighted_sum`, as above."""
    names = ("maps", "weights", "")
    return (
        _maps_case("three", (2, 12, 4, 6), 3, "tiny", names=names),
        _maps_case("one_pixel", (2, 5, 1, 1), 2, "awkward", names=names),
        _maps_case("nchw", (2, 9, 4, 5), 4, layout="nchw", names=names),
        _maps_case("traffic", (1, 19, 16, 16), 2, "traffic", names=names),
        _maps_case("resources", (2, 19, 256, 512), 5, "resources", names=names),
    )
