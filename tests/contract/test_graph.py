"""Contract G1 to G7: torch.compile, fakes, opcheck, CUDA graphs, FLOP counts."""

from __future__ import annotations

import pytest
import torch
from support.contract import (
    DEVICES,
    RecordCalls,
    case_named,
    kernel_backends,
    make,
    named_tensors,
    operator_cases,
    require,
    run,
)
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

import fused_ops
from fused_ops.core import library

OPERATOR = library.operators()["depthwise"]
COMPILED_CASES = ("identity", "post_train_silu", "pre_train", "post_eval_relu6")


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("name", COMPILED_CASES)
def test_compiles_whole(name, backend, device):
    """G1, G4: one graph without a break, forward and backward, with eager's results."""
    if backend != "reference":
        require(backend, device)
    arguments = make(case_named(name), torch.float32, device=device)
    eager = run(OPERATOR, make(case_named(name), torch.float32, device=device), backend)
    function = OPERATOR.function
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    object.__setattr__(OPERATOR, "function", compiled)
    try:
        got = run(OPERATOR, arguments, backend)
    finally:
        object.__setattr__(OPERATOR, "function", function)
    for key, value in eager.items():
        torch.testing.assert_close(
            got[key], value, rtol=1e-5, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}"
        )
        assert got[key].stride() == value.stride(), key


@pytest.mark.slow
def test_compiles_with_inductor():
    """G4: the default compiler, which may change strides in front of an operator."""
    require("triton", "cpu")
    module = fused_ops.DepthwiseConvBNAct(8, activation="silu").eval()
    x = torch.randn(2, 8, 6, 5).contiguous(memory_format=torch.channels_last)

    def network(x):
        return module(x * 2).permute(0, 2, 3, 1).reshape(-1, 8).sum(0)

    with fused_ops.backend("triton"), torch.no_grad():
        got = torch.compile(network, fullgraph=True)(x)
    with torch.no_grad():
        torch.testing.assert_close(got, network(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize(
    ("dynamic", "sizes"),
    [
        (None, ((8, 5, 6), (7, 5, 6), (3, 5, 6))),
        (True, ((8, 5, 6), (7, 5, 6), (2, 7, 9))),
    ],
    ids=["batch", "resolution"],
)
def test_bounded_recompilation(backend, dynamic, sizes):
    """G2: at most two compilations over batch sizes (the short last batch included) and resolutions."""
    if backend == "triton":
        require("triton", "cpu")
    counter = CompileCounterWithBackend("aot_eager")
    module = fused_ops.DepthwiseConvBNAct(4, activation="relu")
    compiled = torch.compile(module, backend=counter, fullgraph=True, dynamic=dynamic)
    with fused_ops.backend(backend):
        for batch, height, width in sizes:
            x = torch.randn(batch, 4, height, width).contiguous(memory_format=torch.channels_last)
            compiled(x).sum().backward()
    assert counter.frame_count <= 2


@pytest.mark.parametrize(
    ("name", "layout"),
    [("identity", "slice"), ("pre_train", "channels_last"), ("post_train_silu", "channels_last")],
)
def test_opcheck(name, layout):
    """G3: schema, fake and autograd registration of the torch operators, on the calls that a case makes."""
    require("triton", "cpu")
    arguments = make(case_named(name), torch.float32, layout)
    with RecordCalls(OPERATOR.overloads) as recorded, fused_ops.backend("triton"):
        out = OPERATOR.function(**arguments)
        leaves = [tensor for tensor in named_tensors(arguments).values() if tensor.requires_grad]
        torch.autograd.grad(out.sum(), leaves, allow_unused=True)
    assert [function for function, _ in recorded.calls] == list(OPERATOR.overloads)
    for function, args in recorded.calls:
        detached = tuple(arg.detach() if isinstance(arg, torch.Tensor) else arg for arg in args)
        torch.library.opcheck(function, detached, test_utils=("test_schema", "test_faketensor"))
    forward, args = recorded.calls[0]
    tracked = tuple(
        arg.detach().requires_grad_() if isinstance(arg, torch.Tensor) and index in (0, 1, 2) else arg
        for index, arg in enumerate(args)
    )
    torch.library.opcheck(
        forward, tracked, test_utils=("test_autograd_registration", "test_aot_dispatch_static")
    )


@pytest.mark.gpu
@pytest.mark.parametrize(("operator", "backend"), [(OPERATOR, name) for name in kernel_backends(OPERATOR)])
def test_cuda_graph(operator, backend):
    """G5: captured on a side stream, replayed with other inputs."""
    require(backend, "cuda")
    weight = torch.randn(32, 1, 3, 3, device="cuda")
    static = torch.zeros(2, 32, 14, 14, device="cuda").contiguous(memory_format=torch.channels_last)
    stream = torch.cuda.Stream()
    with torch.no_grad(), fused_ops.backend(backend):
        with torch.cuda.stream(stream):
            for _ in range(3):
                operator.function(static, weight, padding=1)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            out = operator.function(static, weight, padding=1)
        for _ in range(2):
            static.copy_(torch.randn_like(static))
            graph.replay()
            want = torch.nn.functional.conv2d(static.double(), weight.double(), padding=1, groups=32)
            torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", kernel_backends(OPERATOR))
def test_second_device(backend):
    """G5: a tensor on cuda:1 while cuda:0 is current."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    require(backend, "cuda")
    x = torch.randn(1, 8, 6, 6, device="cuda:1").contiguous(memory_format=torch.channels_last)
    weight = torch.randn(8, 1, 3, 3, device="cuda:1")
    with fused_ops.backend(backend), torch.no_grad():
        out = OPERATOR.function(x, weight, padding=1)
    torch.testing.assert_close(out, torch.nn.functional.conv2d(x, weight, padding=1, groups=8))


@pytest.mark.parametrize(
    ("operator", "case"), operator_cases("tiny", without=("awkward", "training"), only="depthwise")
)
def test_flops(operator, case):
    """G7: forward counted as stock modules are, backward as twice that where both maps get gradients.

    PyTorch's own formula for the backward of a grouped convolution counts all pairs of channels.
    """
    require("triton", "cpu")
    arguments = make(case, torch.float32)
    counts = {}
    for backend in ("reference", "triton"):
        with fused_ops.backend(backend), FlopCounterMode(display=False) as counter:
            out = operator.function(**arguments)
        counts[backend] = counter.get_total_flops()
    assert counts["reference"] == counts["triton"] > 0
    for names in (("x", "weight"), ("x",), ("weight",)):
        arguments = make(case, torch.float32)
        for name, tensor in named_tensors(arguments).items():
            tensor.requires_grad_(name in names)
        with fused_ops.backend("triton"):
            out = operator.function(**arguments)
        with FlopCounterMode(display=False) as counter:
            torch.autograd.grad(out, [arguments[name] for name in names], torch.ones_like(out))
        assert counter.get_total_flops() == len(names) * counts["triton"]
