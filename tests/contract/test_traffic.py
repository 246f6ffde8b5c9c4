"""Memory traffic of the kernels, counted without a GPU, against the least that the operator has to move."""

from __future__ import annotations

import contextlib
import dataclasses
from unittest import mock

import pytest
import torch
from support.contract import case_named, require
from torch._subclasses.fake_tensor import FakeTensorMode

from fused_ops.bench.traffic import calls_of, count_triton, operator_traffic
from fused_ops.core import backends, library, native
from fused_ops.core.triton_support import jit, tl
from fused_ops.depthwise import cuda as depthwise_cuda
from fused_ops.depthwise import triton as depthwise_triton
from fused_ops.depthwise.op import allocate_backward, allocate_forward

# Counted over least: halos and re-reads do not show here, so what is above 1 is partial sums and per-channel
# vectors, which weigh more on these small maps (28x28, 16 channels) than on a model's.
BOUND = {"forward": 1.06, "backward": 1.25}


@jit
def copy_kernel(source, target, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * 32 + tl.arange(0, BLOCK)
    mask = offsets < 96
    value = tl.load(source + offsets, mask=mask) + tl.load(source + offsets, mask=mask)
    tl.store(target + offsets, value, mask=mask)


@pytest.mark.parametrize(
    ("backend", "name", "directions"),
    [
        ("triton", "identity", {"forward", "backward"}),
        ("triton", "pre_train", {"forward", "backward"}),
        ("triton", "post_train_silu", {"forward", "backward"}),
        pytest.param("triton", "post_eval_relu6", {"forward", "backward"}, marks=pytest.mark.extended),
        ("triton", "conv", {"forward", "backward"}),
        ("cuda", "identity", {"forward", "backward"}),
        ("cuda", "pre_train", {"forward", "backward"}),
        ("cuda", "post_train_silu", {"forward", "backward"}),
        ("cuda", "post_eval_relu6", {"forward", "backward"}),
        ("cuda", "conv", {"forward", "backward"}),
        ("cuda nchw", "identity", {"forward", "backward"}),
        ("cuda nchw", "pre_train", {"forward", "backward"}),
        ("cuda nchw", "post_train_silu", {"forward", "backward"}),
        ("cuda nchw", "post_eval_relu6", {"forward", "backward"}),
        ("cuda nchw", "kernel5_train", {"forward", "backward"}),
        ("cuda nchw", "stride2_train", {"forward", "backward"}),
    ],
)
def test_counted_bytes(backend, name, directions, request):
    backend, _, layout = backend.partition(" ")
    require(backend, "cpu", request)
    operator = library.operators()["depthwise"]
    case = case_named(f"traffic_{name}")
    rows = operator_traffic(
        operator,
        backend,
        case.name,
        lambda: case.make(
            torch.Generator().manual_seed(0), torch.bfloat16, torch.device("cpu"), layout or "channels_last"
        ),
    )
    totals = {row["direction"]: row for row in rows if row["kernel"] == "total"}
    assert set(totals) == directions
    for direction, row in totals.items():
        ratio = row["counted_bytes"] / row["least_bytes"]
        assert 1.0 <= ratio <= BOUND[direction], f"{direction}: {ratio:.3f} times the least"
        assert row["counted_bytes"] <= row["block_bytes"] <= row["requested_bytes"]


def scratch_of_triton(call, gradients):
    """Floats for partial sums that the Triton launchers ask for, by direction; nothing is launched."""
    sizes = {"forward": 0, "backward": 0}
    launch = mock.MagicMock()
    original = depthwise_triton._Launches.floats
    direction = "forward"

    def floats(launches, count):
        sizes[direction] += count
        return original(launches, count)

    with contextlib.ExitStack() as stack:
        for module, name in ((depthwise_triton, name) for name in vars(depthwise_triton)):
            if name.endswith("_kernel"):
                stack.enter_context(mock.patch.object(module, name, launch))
        for name in ("merge_moments", "finish_gradients"):
            stack.enter_context(mock.patch.object(depthwise_triton, name))
        stack.enter_context(mock.patch.object(depthwise_triton._Launches, "floats", floats))
        depthwise_triton.forward(call, *allocate_forward(call))
        direction = "backward"
        depthwise_triton.backward(*gradients)
    return sizes


def scratch_of_cuda(call, gradients, emulator):
    """Floats of the CUDA launch sequences' workspaces on a GPU with 132 multiprocessors; nothing runs."""

    def view(tensor):
        # An address with the alignment of PyTorch's allocator in place of memory.
        if tensor is None:
            return None
        return 1 << 20, native.SCALAR_TYPES[tensor.dtype], tuple(tensor.shape), tensor.stride()

    sizes = {}
    emulator.set_plan_only(True)
    emulator.set_multiprocessors(132)
    try:
        with mock.patch.object(native, "_view", view):
            depthwise_cuda.forward(call, *allocate_forward(call))
            sizes["forward"] = emulator.workspace_floats()
            depthwise_cuda.backward(*gradients)
            sizes["backward"] = emulator.workspace_floats()
    finally:
        emulator.set_plan_only(False)
    return sizes


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_partial_sums_of_real_models_weigh_less_than_a_tenth(backend, emulator):
    """The maps themselves move once per pass, as the counts above show; these are written and read once."""
    operator = library.operators()["depthwise"]
    for case in operator.cases():
        if "model" not in case.tags:
            continue
        calls = []
        with FakeTensorMode():
            arguments = case.make(torch.Generator(), torch.bfloat16, torch.device("cpu"), case.layout)
            with calls_of(operator, calls), backends.backend("reference"):
                operator.function(**arguments)
            (call,) = calls
            backward = dataclasses.replace(call)
            if call.batch_stats:
                backward.mean, backward.var = torch.empty(2, call.x.shape[1])
            sources = (call.x, call.weight, call.bias, call.norm_weight, call.norm_bias, call.residual)
            needs = [tensor is not None for tensor in sources]
            grad = library.empty(call.output_shape, call.x)
            raw = grad if call.needs_raw else None
            gradients = (backward, grad, raw, needs, *allocate_backward(backward, needs))
            if backend == "triton":
                sizes = scratch_of_triton(call, gradients)
            else:
                sizes = scratch_of_cuda(call, gradients, emulator)
        for direction, floats in sizes.items():
            ratio = 1 + 2 * 4 * floats / operator.least_bytes(call, direction)
            assert ratio <= 1.10, f"{case.name} {direction}: {ratio:.3f} times the least"


def test_counts_are_what_a_copy_moves():
    """The counter itself, on a kernel whose traffic is known: 96 of 100 values read twice, written once."""
    require("triton", "cpu")
    with count_triton() as launches:
        copy_kernel[(3,)](torch.zeros(100), torch.zeros(100), BLOCK=64)
    (launch,) = launches
    # Blocks of 64 at every 32: 64 + 64 + 32 values asked for.
    assert launch.kernel == "copy_kernel"
    assert launch.counted_bytes == 2 * 96 * 4
    assert launch.block_bytes == 2 * 160 * 4
    assert launch.requested_bytes == 3 * 160 * 4
