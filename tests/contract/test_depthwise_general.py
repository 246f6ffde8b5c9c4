"""The Triton kernels for any odd kernel, stride, padding, dilation and layout, and what both sets share.

Shapes are tiny: every program costs tens of milliseconds in Triton's interpreter.
"""

from __future__ import annotations

import contextlib
import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.contract import DEVICES, assert_three_way, convert, cotangent, named_tensors, require, run
from torch import Tensor

import fused_ops
from fused_ops.core import library, tuning
from fused_ops.core.cases import make_map
from fused_ops.depthwise import triton
from fused_ops.depthwise.triton_general import backward_plan, forward_plan, map_plan

OPERATOR = library.operators()["depthwise"]


def arguments_of(
    shape: tuple[int, int, int, int],
    kernel: int | tuple[int, int] = 3,
    *,
    layout: str = "nchw",
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    bias: bool = False,
    norm: str = "none",
    training: bool = False,
    mean: float = 0.3,
    residual: str = "none",
    identity: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Arguments of one call, the same at every call; ``residual`` says where it is added."""
    generator = torch.Generator().manual_seed(11)
    kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
    channels = shape[1]

    def vector(centre: float, spread: float) -> Tensor:
        return (centre + spread * torch.randn(channels, generator=generator)).to(device)

    x = make_map(shape, generator, dtype, torch.device(device), layout, mean=mean)
    weight = torch.randn(channels, 1, *kernel, generator=generator) * (kernel[0] * kernel[1]) ** -0.5
    arguments: dict[str, Any] = {"x": x, "weight": weight.to(device).requires_grad_(), **options}
    arguments.setdefault("padding", "same")
    if bias:
        arguments["bias"] = vector(0.0, 0.5).requires_grad_()
    if norm != "none":
        arguments["norm"] = fused_ops.BatchNormState(
            vector(1.0, 0.2).requires_grad_(),
            vector(0.0, 0.2).requires_grad_(),
            vector(mean, 0.1),
            vector(1.0, 0.1).abs(),
            training,
            0.1,
            1e-5,
        )
        arguments["norm_placement"] = norm
    if residual != "none":
        arguments["residual_placement"] = residual
        arguments["residual"] = x
        if not identity:
            with torch.no_grad(), fused_ops.backend("reference"):
                out = fused_ops.depthwise_conv(
                    **{key: value for key, value in arguments.items() if not key.startswith("residual")}
                )
            values = torch.randn(out.shape, generator=generator)
            arguments["residual"] = torch.empty_like(out).copy_(values).requires_grad_()
    return arguments


def assert_right(arguments: dict[str, Any], dtype: torch.dtype, grad: Tensor | None = None) -> None:
    """Output, every gradient and running statistics against float64 and eager; layouts as stock gives."""
    exact_arguments, eager_arguments = convert(arguments, torch.float64), convert(arguments)
    exact = run(OPERATOR, exact_arguments, "reference", grad=None if grad is None else grad.double())
    eager = run(OPERATOR, eager_arguments, "reference", grad=grad)
    got = run(OPERATOR, arguments, "triton", grad=grad)
    assert_three_way(got, eager, exact, dtype)
    for name in ("out", "grad x"):
        strides = [
            [stride for size, stride in zip(value.shape, value.stride(), strict=True) if size > 1]
            for value in (got[name], eager[name])
        ]
        assert strides[0] == strides[1], f"{name}: layout differs from stock"


POST, PRE = {"norm": "post"}, {"norm": "pre"}
POST_TRAIN, PRE_TRAIN = {**POST, "training": True}, {**PRE, "training": True}
IDENTITY_AFTER = {"residual": "after", "identity": True}
IDENTITY_BEFORE = {"residual": "before", "identity": True}
# Every kernel size, stride, dilation, padding, layout, channel count, placement and kind of statistics, each
# in a few combinations.
CALLS: dict[str, dict[str, Any]] = {
    "k1": {"shape": (2, 3, 3, 4), "kernel": 1, "bias": True},
    "k3_planes": {"shape": (2, 3, 5, 4), "bias": True, "activation": "relu", **IDENTITY_BEFORE},
    "k3_planes_post": {"shape": (2, 3, 4, 3), "activation": "silu", "residual": "before", **POST_TRAIN},
    "k3_planes_pre": {"shape": (2, 3, 4, 3), "bias": True, **PRE_TRAIN, **IDENTITY_AFTER},
    "k3_planes_post_eval": {"shape": (1, 3, 4, 5), "activation": "relu6", "residual": "after", **POST},
    "k3_no_padding": {"shape": (1, 12, 4, 5), "layout": "channels_last", "padding": 0, **PRE},
    "k3_wide_padding": {"shape": (1, 3, 3, 2), "padding": (3, 2), "bias": True},
    "k3_stride2": {
        "shape": (2, 12, 5, 4),
        "layout": "channels_last",
        "stride": 2,
        "padding": 1,
        "activation": "relu",
        **POST_TRAIN,
    },
    "k3_stride2_planes": {"shape": (1, 3, 5, 6), "stride": 2, "padding": 1, "bias": True, **PRE_TRAIN},
    "k3_stride2_no_padding": {
        "shape": (1, 12, 5, 4),
        "layout": "slice",
        "stride": 2,
        "padding": 0,
        "activation": "gelu",
        "residual": "before",
    },
    "k3_stride21": {"shape": (1, 3, 5, 3), "stride": (2, 1), "padding": 1, "residual": "after"},
    "k3_stride2_identity": {
        "shape": (1, 3, 3, 3),
        "stride": 2,
        "padding": 2,
        "activation": "hardswish",
        **IDENTITY_BEFORE,
    },
    "k3_dilation2": {"shape": (1, 12, 5, 4), "layout": "channels_last", "dilation": 2, **POST_TRAIN},
    "k3_dilation2_planes": {"shape": (1, 3, 4, 5), "dilation": 2, "activation": "gelu_tanh", **PRE},
    "k3_dilation_above_map": {"shape": (1, 3, 2, 3), "dilation": (3, 2), "bias": True},
    "k3_stride2_dilation2": {"shape": (1, 3, 5, 6), "stride": 2, "dilation": 2, "padding": 2, **PRE_TRAIN},
    "k3_stride3_dilation2": {"shape": (1, 3, 4, 7), "stride": 3, "dilation": 2, "padding": 1, "bias": True},
    "k35": {"shape": (1, 3, 3, 4), "kernel": (3, 5), "layout": "channels_last", "activation": "relu", **POST},
    "k53_dilation": {"shape": (1, 3, 4, 3), "kernel": (5, 3), "dilation": (1, 2), "bias": True},
    "k5": {
        "shape": (1, 12, 3, 4),
        "kernel": 5,
        "layout": "channels_last",
        "activation": "silu",
        **POST_TRAIN,
    },
    "k5_stride2": {"shape": (1, 3, 5, 4), "kernel": 5, "stride": 2, "padding": 2, "bias": True, **POST},
    "k7": {"shape": (1, 3, 4, 3), "kernel": 7, "layout": "channels_last", "bias": True, **IDENTITY_AFTER},
    "k7_planes": {"shape": (1, 1, 3, 4), "kernel": 7},
    "k9_groups": {"shape": (1, 1, 3, 2), "kernel": (9, 9), "bias": True, **PRE},
    "packed_images": {"shape": (5, 40, 2, 3), "layout": "channels_last", "bias": True, **PRE_TRAIN},
    "packed_images_post": {
        "shape": (3, 40, 2, 2),
        "layout": "channels_last",
        "activation": "silu",
        "residual": "before",
        **POST_TRAIN,
    },
    "packed_images_k5": {"shape": (3, 40, 2, 2), "kernel": 5, "layout": "channels_last", **POST_TRAIN},
    "one_channel": {"shape": (2, 1, 4, 3), "kernel": (3, 5), **POST_TRAIN},
    "one_pixel": {"shape": (3, 3, 1, 1), "kernel": 5, **POST_TRAIN},
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "name",
    # 81 taps, one after another, cost a quarter of a minute.
    [pytest.param(name, marks=[pytest.mark.extended] if name == "k9_groups" else []) for name in CALLS],
)
def test_three_way(name, device):
    """C1, C4: the grid of geometries, layouts and placements in float32."""
    require("triton", device)
    assert_right(arguments_of(device=device, **CALLS[name]), torch.float32)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["k3_planes_post", "k3_planes_pre", "k3_stride2", "k35"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(name, dtype, device):
    """C1: the same rule for half-precision maps with float32 parameters."""
    require("triton", device)
    assert_right(arguments_of(dtype=dtype, device=device, **CALLS[name]), dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["k3_planes_pre", "k3_planes_post_eval", "k3_stride2"])
def test_subsets_of_gradients(name, device):
    """C10: single gradients, and all but one, are the bits of the full set."""
    require("triton", device)
    options = {**CALLS[name], "shape": (2, 3, 3, 3)}
    full = run(OPERATOR, arguments_of(device=device, **options), "triton")
    leaves = [key.removeprefix("grad ") for key in full if key.startswith("grad ")]
    subsets = [{leaf} for leaf in leaves] + [set(leaves) - {"x"}]
    for subset in subsets:
        arguments = arguments_of(device=device, **options)
        for key, tensor in named_tensors(arguments).items():
            tensor.requires_grad_(key in subset)
        got = run(OPERATOR, arguments, "triton")
        for leaf in subset:
            torch.testing.assert_close(got[f"grad {leaf}"], full[f"grad {leaf}"], rtol=0, atol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_layout_of_the_gradient(device):
    """C4: a gradient in the other layout, and one with stride 0 everywhere."""
    require("triton", device)
    options = {**CALLS["k3_planes_post"], "device": device}
    shape = options["shape"]
    values = torch.randn(shape, generator=torch.Generator().manual_seed(5)).to(device)
    other = values.contiguous(memory_format=torch.channels_last)
    for grad in (other, torch.ones((), device=device).expand(shape)):
        assert_right(arguments_of(**options), torch.float32, grad)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("placement", ["post", "pre"])
def test_large_mean(placement, recompute, device):
    """C2: mean 1000, deviation 1, with the statistics of a stored and of an unstored convolution."""
    require("triton", device)
    options = {"norm": placement, "training": True, "mean": 1e3, "device": device, "recompute": recompute}
    arguments = arguments_of((2, 3, 5, 4), padding=0, **options)
    exact = run(OPERATOR, convert(arguments, torch.float64), "reference", gradients=False)
    got = run(OPERATOR, arguments, "triton", gradients=False)
    torch.testing.assert_close(got["norm.running_var"].double(), exact["norm.running_var"], rtol=1e-4, atol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_repeats_to_the_bit(device):
    """C7, C8: with fresh allocations filled with NaN."""
    require("triton", device)
    results = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            results.append(run(OPERATOR, arguments_of(device=device, **CALLS["k3_planes_pre"]), "triton"))
    finally:
        torch.use_deterministic_algorithms(False)
    for name, value in results[0].items():
        assert torch.isfinite(value).all(), name
        torch.testing.assert_close(results[1][name], value, rtol=0, atol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ["channels_last", "nchw"])
def test_convolving_twice_changes_no_bit(layout, device):
    """Post-norm gives the same output and statistics whether the raw convolution was stored or not."""
    require("triton", device)
    options = {"layout": layout, "dtype": torch.bfloat16, "device": device, **POST_TRAIN}
    stored, twice = (
        run(
            OPERATOR,
            arguments_of((2, 3, 4, 3), recompute=recompute, **options),
            "triton",
            gradients=gradients,
        )
        for recompute, gradients in ((False, True), (True, False))
    )
    for name, value in twice.items():
        torch.testing.assert_close(stored[name], value, rtol=0, atol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_large_offsets(device):
    """C5: planes more than 2**31 elements into their buffer are read at the right place."""
    require("triton", device)
    plane = 2**30
    # On the CPU the pages in between are never touched, so they cost no memory.
    buffer = torch.empty(2 * plane + 400, dtype=torch.float16, device=device)
    x = buffer.as_strided((1, 3, 4, 5), (3 * plane, plane, 5, 1))
    x.copy_(torch.randn(1, 3, 4, 5))
    weight = torch.randn(3, 1, 3, 3, device=device)
    with fused_ops.backend("triton"), torch.no_grad():
        out = fused_ops.depthwise_conv(x, weight, stride=2, padding=1)
    want = torch.nn.functional.conv2d(x.double(), weight.double(), stride=2, padding=1, groups=3)
    torch.testing.assert_close(out.double(), want, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("options", "tiles"),
    [
        (
            {"shape": (3, 20, 3, 4), "layout": "channels_last", **POST_TRAIN},
            {"forward": (16, 16, 2), "backward": (4, 32, 7)},
        ),
        (
            {"shape": (2, 20, 3, 3), "kernel": 5, "layout": "channels_last", **PRE_TRAIN},
            {"forward": (4, 16), "backward": (8, 16, 4, 32)},
        ),
        ({"shape": (2, 3, 3, 5), **POST_TRAIN}, {"forward": (8, 1), "backward": (64, 4, 8, 4)}),
    ],
)
def test_other_tiles_are_right(options, tiles):
    """Tiles that a file of measurements could hold, made for other sizes."""
    require("triton", "cpu")
    arguments = arguments_of(**options)
    with tuning.record() as used:
        run(OPERATOR, arguments_of(**options), "triton")
    assert len(used) == 2
    with contextlib.ExitStack() as stack:
        for kernel, (sizes, _) in used.items():
            assert all(len(tile) == len(used[kernel][1]) for tile in triton.tiles(kernel, sizes))
            (direction,) = (name for name in tiles if f"_{name} " in kernel)
            stack.enter_context(tuning.force(kernel, tiles[direction]))
        assert_right(arguments, torch.float32)


# Launches of a forward and of a backward with all gradients.
LAUNCHES = {
    "conv": ({"bias": True}, 1, 2),
    "post_eval": ({"activation": "relu", **POST}, 1, 2),
    "post_train": ({"activation": "relu", **POST_TRAIN}, 3, 4),
    "post_train_recompute": ({"activation": "relu", "recompute": True, **POST_TRAIN}, 3, 5),
    "pre_train": ({"bias": True, **PRE_TRAIN}, 3, 3),
}


@pytest.mark.parametrize("layout", ["channels_last", "nchw"])
@pytest.mark.parametrize("name", LAUNCHES)
def test_launches(name, layout):
    """What a call costs the host: the 3x3 kernels and the general ones launch equally often."""
    from fused_ops.bench.traffic import count_triton

    require("triton", "cpu")
    options, forward, backward = LAUNCHES[name]
    arguments = arguments_of((1, 2, 2, 2), layout=layout, **options)
    leaves = [tensor for tensor in named_tensors(arguments).values() if tensor.requires_grad]
    with fused_ops.backend("triton"):
        with count_triton() as launches:
            out = OPERATOR.function(**arguments)
        assert len(launches) == forward, [launch.kernel for launch in launches]
        with count_triton() as launches:
            torch.autograd.grad(out, leaves, cotangent(out))
        assert len(launches) == backward, [launch.kernel for launch in launches]


def test_rows_too_long_are_declined():
    """C11: columns are addressed with 32 bits; said before anything runs."""
    require("triton", "cpu")
    x = torch.empty_strided((1, 4, 2, 2**20), (4, 1, 4, 2**11), device="meta")
    call = SimpleNamespace(x=x, kernel_size=(3, 3), padding=(1, 1))
    ok, reason = triton.can_run(call)
    assert not ok
    assert reason == f"one row of x spans {(2**20 + 2) * 2**11} elements; fewer than 2**31 are allowed"


SHAPES = [
    (128, 64, 56, 56),
    (128, 512, 7, 7),
    (1, 3, 224, 224),
    (2, 64, 200, 333),
    (1, 1, 1, 1),
    (4, 20, 3, 500),
]


@pytest.mark.parametrize("planes", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_plans_cover_the_map(shape, planes):
    """Tiles are powers of two, every row and column belongs to a cell, and no strip is empty."""
    batch, channels, height, width = shape
    sizes, grid, parts, meta = map_plan(shape, planes)
    assert grid[0] == parts * -(-channels // meta["BLOCK_C"])
    assert parts == batch * -(-width // meta["BLOCK_W"]) * -(-height // sizes[4])
    for kernel, stride, dilation in itertools.product((1, 3, 7, 15), (1, 2, 3), (1, 2)):
        padding = dilation * (kernel // 2)
        out = tuple((size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1 for size in shape[2:])
        pairs = [(value, value) for value in (kernel, stride, dilation)]
        plan = forward_plan((batch, channels, *out), *pairs, planes)
        rows, strips, classes = plan.sizes
        meta = plan.meta
        assert meta["BLOCK_W"] & (meta["BLOCK_W"] - 1) == meta["BLOCK_C"] & (meta["BLOCK_C"] - 1) == 0
        per_class = -(-out[0] // meta["STEP"])
        assert (strips - 1) * rows < per_class <= strips * rows
        assert classes == min(meta["STEP"], out[0])
        assert plan.parts == batch * classes * strips * -(-out[1] // meta["BLOCK_W"])
        back = backward_plan(
            shape, (batch, channels, *out), pairs[0], pairs[1], (padding, padding), pairs[2], planes
        )
        *_, cells, each = back.sum_sizes
        assert (back.sum_parts - 1) * each < cells <= back.sum_parts * each
        programs = back.grid(True, True)[0]
        groups = programs // (back.x_programs_each + 1)
        assert groups >= back.sum_programs
        assert groups * back.x_programs_each >= back.x_programs
