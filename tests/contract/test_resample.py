"""Resampling: contract C1 to C11 and G1 to G7 beyond the cases that every operator runs.

Shapes are tiny: every program costs milliseconds in Triton's interpreter.
"""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from support.contract import (
    DEVICES,
    RecordCalls,
    assert_three_way,
    case_named,
    convert,
    cotangent,
    make,
    named_tensors,
    operator_cases,
    require,
    run,
)
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

import fused_ops
from fused_ops import resample_map
from fused_ops.bench.traffic import calls_of, operator_traffic
from fused_ops.core import library
from fused_ops.core.cases import make_map
from fused_ops.core.triton_support import jit, tl
from fused_ops.resample import op, triton
from fused_ops.resample.triton_kernels import _divide

OPERATOR = library.operators()["resample"]
MODES = ("bilinear", "nearest")


def case(name):
    return case_named(name, "resample")


def nearest_indices(size, out_size):
    """PyTorch's rule: output times the quotient of sizes, both rounded to float32."""
    quotient = torch.tensor(float(size)) / torch.tensor(float(out_size))
    return (torch.arange(out_size).float() * quotient).floor().long().clamp(max=size - 1)


def matrix(size, out_size, mode):
    """Weights of the inputs in the outputs of one axis, (out_size, size), exact but for one rounding."""
    weights = torch.zeros(out_size, size, dtype=torch.float64)
    if mode == "nearest":
        weights[torch.arange(out_size), nearest_indices(size, out_size)] = 1
        return weights
    for d in range(out_size):
        at = max(Fraction(2 * d + 1, 2) * Fraction(size, out_size) - Fraction(1, 2), Fraction(0))
        first = int(at)
        weights[d, first] += float(1 - (at - first))
        weights[d, min(first + 1, size - 1)] += float(at - first)
    return weights


def oracle(arguments):
    x, mode = arguments["x"], arguments["mode"]
    rows, columns = (
        matrix(size, out, mode) for size, out in zip(x.shape[2:], arguments["size"], strict=True)
    )
    out = torch.einsum("ih,bchw,jw->bcij", rows, x, columns)
    if "drop_path" in arguments:
        out = out * arguments["drop_path"].view(-1, 1, 1, 1)
    return out + arguments.get("add", 0)


# Of the reference


@pytest.mark.parametrize(
    ("operator", "case"), operator_cases(without=("model", "traffic", "resources"), only="resample")
)
def test_reference_is_the_definition(operator, case):
    arguments = make(case, torch.float64)
    torch.testing.assert_close(operator.function(**arguments), oracle(arguments), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_reference_gradcheck(mode):
    x = torch.randn(2, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    add = torch.randn(2, 2, 5, 2, dtype=torch.float64, requires_grad=True)
    factor = torch.tensor([0.5, 2.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x, add: resample_map(x, (5, 2), mode=mode, add=add, drop_path=factor), (x, add)
    )


# Of positions


@pytest.fixture(params=DEVICES)
def device(request):
    require("triton", request.param)
    return request.param


# Of rows, which a program walks one by one, and of columns: odd ones, those of real maps, and those where
# float32 rounds an index over a whole number.
ROWS = ((1, 1), (1, 4), (5, 1), (3, 7), (7, 3), (4, 8), (9, 3), (6, 4), (12, 25), (41, 5))
COLUMNS = (
    *itertools.product((1, 2, 3, 5), repeat=2),
    *((7, 3), (3, 7), (25, 200), (200, 25), (42, 336), (336, 42), (1333, 41), (41, 333), (12, 25), (25, 12)),
    *((84, 200), (168, 800), (1344, 200), (27, 333), (54, 333), (41, 1681), (1, 41), (3, 123), (800, 1344)),
    *((55, 605), (47, 1081), (94, 100)),
)
AXES = [pytest.param(2, ROWS, id="rows"), pytest.param(3, COLUMNS, id="columns")]


@pytest.mark.parametrize(("axis", "pairs"), AXES)
def test_nearest_reads_what_pytorch_does(axis, pairs, device):
    """Indices equal to those of float32 in PyTorch, and sums over exactly the outputs that read a pixel."""
    for size, out_size in pairs:
        shape, out_shape = [1, 1, 1, 1], [1, 1]
        shape[axis], out_shape[axis - 2] = size, out_size
        x = torch.arange(size, device=device, dtype=torch.float32).view(shape).requires_grad_()
        with fused_ops.backend("triton"):
            out = resample_map(x, out_shape, mode="nearest")
        assert torch.equal(out, F.interpolate(x, out_shape, mode="nearest")), (size, out_size)
        # Whole numbers, so that sums are exact.
        grad = torch.randint(1, 100, (out_size,), device=device).float()
        (got,) = torch.autograd.grad(out, x, grad.view_as(out))
        want = torch.zeros(size, device=device).index_add(0, nearest_indices(size, out_size).to(device), grad)
        assert torch.equal(got.flatten(), want), (size, out_size)


@pytest.mark.parametrize(("axis", "pairs"), AXES)
def test_bilinear_weights(axis, pairs, device):
    """Weights to two roundings of float32 at any size, both ways; PyTorch's agree within their own error."""
    for size, out_size in pairs:
        weights = matrix(size, out_size, "bilinear").to(device)
        # Two pixels that differ by one wherever they are next to each other: the weights are what is seen.
        values = torch.arange(size, device=device) % 2
        shape, out_shape = [1, 1, 1, 1], [1, 1]
        shape[axis], out_shape[axis - 2] = size, out_size
        x = values.float().view(shape).requires_grad_()
        with fused_ops.backend("triton"):
            out = resample_map(x, out_shape)
        torch.testing.assert_close(
            out.flatten().double(), weights @ values.double(), rtol=0, atol=2.5e-7, msg=f"{size}, {out_size}"
        )
        stock = F.interpolate(x, out_shape, mode="bilinear")
        torch.testing.assert_close(out, stock, rtol=0, atol=4e-7 * max(size, 4))
        grad = (torch.arange(out_size, device=device) % 3 - 1).float()
        (got,) = torch.autograd.grad(out, x, grad.view_as(out))
        want = weights.T @ grad.double()
        atol = 2.5e-7 * max(1, out_size / size)
        torch.testing.assert_close(
            got.flatten().double(), want, rtol=1e-6, atol=atol, msg=f"{size}, {out_size} backward"
        )
        # What has no weight anywhere gets exactly nothing.
        unread = weights.sum(0) == 0
        assert not got.flatten()[unread].any()


@pytest.mark.parametrize("mode", MODES)
def test_least_bytes_counts_the_pixels_that_are_read(mode):
    for size, out_size in itertools.product(range(1, 26), repeat=2):
        read = int((matrix(size, out_size, mode).sum(0) > 0).sum())
        assert op.read_of(size, out_size, mode) == read, (size, out_size)


@pytest.mark.parametrize("mode", MODES)
def test_most_readers(mode):
    for size, out_size in itertools.product(range(1, 26), repeat=2):
        most = int((matrix(size, out_size, mode) > 0).sum(0).max())
        bound = triton.most_readers(size, out_size, mode)
        assert most <= bound, (size, out_size)
        # In the middle of three pixels there is one without an edge.
        assert bound <= most + 1 or size < 3, (size, out_size)


@jit
def divide_kernel(numbers_ptr, quotients_ptr, rests_ptr, divisor, inverse, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    quotient, rest = _divide(tl.load(numbers_ptr + i), divisor, inverse)
    tl.store(quotients_ptr + i, quotient)
    tl.store(rests_ptr + i, rest)


@pytest.mark.parametrize("divisor", [2, 3, 6, 82, 4001, 6002, 65534, 2097154])
def test_division_is_exact(divisor, device):
    """Around multiples, where float32 rounds to either side, as far as sizes are taken."""
    most = min(2**31 // divisor - 1, 2**20)
    multiples = torch.randint(1, most + 1, (1365,)) * divisor
    numbers = torch.cat([*(multiples + shift for shift in (-1, 0, 1)), torch.zeros(1)]).int().to(device)
    quotients, rests = torch.empty_like(numbers), torch.empty_like(numbers)
    divide_kernel[(1,)](numbers, quotients, rests, divisor, 1 / divisor, BLOCK=4096)
    assert torch.equal(quotients, numbers // divisor)
    assert torch.equal(rests, numbers % divisor)


# Of the kernels


def check(arguments, dtype=torch.float32):
    """Output and gradients from Triton, held against float64 and against eager in the same precision."""
    got = run(OPERATOR, arguments, "triton")
    exact = run(OPERATOR, convert(arguments, torch.float64), "reference")
    eager = run(OPERATOR, convert(arguments), "reference")
    assert_three_way(got, eager, exact, dtype)
    return got


@pytest.mark.parametrize(
    ("operator", "case"), operator_cases(without=("tiny", "model", "traffic", "resources"), only="resample")
)
def test_awkward_cases(operator, case, device):
    """One pixel, one channel, one row, NCHW, several blocks; an empty batch is declined."""
    arguments = make(case, torch.float32, case.layout, device)
    if case.name == "empty":
        with (
            fused_ops.backend("triton"),
            pytest.raises(fused_ops.BackendUnavailableError, match="x is empty"),
        ):
            operator.function(**arguments)
        results = run(operator, arguments, "auto")
        assert {name: tuple(value.shape) for name, value in results.items()} == {
            "out": (0, 8, 6, 2),
            "grad x": (0, 8, 4, 4),
            "grad add": (0, 8, 6, 2),
        }
        return
    check(arguments)


@pytest.fixture
def few_programs(monkeypatch):
    """Every program takes as many rows as it may, as on large maps."""
    monkeypatch.setattr(triton, "PROGRAMS", 1)
    triton.plan.cache_clear()
    yield
    triton.plan.cache_clear()


@pytest.mark.parametrize(
    "name", ["up_add", "down", "nearest_odd", "nchw", "up_and_down", "drop_path", "nearest_down"]
)
def test_several_rows_per_program(name, device, few_programs):
    arguments = make(case(name), torch.float32, case(name).layout, device)
    assert triton.plan((1, 1, 20, 3), True).group == 8
    check(arguments)


def test_groups_of_rows_that_do_not_divide(device, few_programs):
    x = torch.randn(1, 3, 11, 3, device=device).requires_grad_()
    for size, mode in itertools.product(((19, 3), (9, 2)), MODES):
        check({"x": x, "size": size, "mode": mode})


@pytest.mark.parametrize("mode", MODES)
def test_several_blocks_of_columns(mode, device):
    """More columns than a tile has, both ways, in both layouts."""
    wide = torch.randn(1, 65, 1, 70, device=device)
    for x in (wide, wide.contiguous(memory_format=torch.channels_last)):
        check({"x": x.detach().requires_grad_(), "size": (2, 71), "mode": mode})


VIEWS = {
    "inner_window": lambda x: x[:, :, 1:-1, 2:],
    "second_channels": lambda x: x[:, ::2],
    "second_pixels": lambda x: x[:, :, ::2, ::2],
    "flipped_batch": lambda x: x.flip(0)[1:],
    "one_image": lambda x: x[:1].expand(2, -1, -1, -1),
    "transposed": lambda x: x.transpose(2, 3),
    "one_column": lambda x: x[..., 2:3],
    "constant": lambda x: x[:, :1, :1, :1].expand(2, 6, 4, 5),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_views(view, device):
    """C4: strides are honoured, of maps, of factors, and of gradients."""
    base = torch.randn(2, 8, 4, 4, device=device).contiguous(memory_format=torch.channels_last)
    add, grad = view(base.sin().contiguous()), view(base.cos())
    x = view(base.exp())
    size = tuple(add.shape[2:])
    x = F.pad(x, (1, 0, 2, 1)) if x.shape[2] > 1 else x
    factor = torch.rand(2 * x.shape[0], device=device)[::2]
    for mode in MODES:
        results = []
        for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
            inputs = [tensor.detach().to(dtype).requires_grad_() for tensor in (x, add)]
            if backend == "triton":
                inputs = [tensor.detach().requires_grad_() for tensor in (x, add)]
            with fused_ops.backend(backend):
                out = resample_map(inputs[0], size, mode=mode, add=inputs[1], drop_path=factor.to(dtype))
                plain = resample_map(view(base.to(dtype)), (3, 7), mode=mode)
            results.append((out, plain, *torch.autograd.grad(out, inputs, grad.to(dtype))))
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_expanded_from_a_sum(mode, device):
    """C4: the gradient of ``.sum()`` has stride 0 everywhere."""
    x = torch.randn(2, 5, 3, 4, device=device, requires_grad=True)
    with fused_ops.backend("triton"):
        out = resample_map(x, (7, 2), mode=mode)
    exact = x.detach().double().requires_grad_()
    (want,) = torch.autograd.grad(resample_map(exact, (7, 2), mode=mode).sum(), exact)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), x)[0].double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 5, 1, 1), (2, 1, 3, 2), (2, 5, 1, 3), (2, 5, 3, 3)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_layout_of_the_result(shape, memory_format, device):
    """As of stock PyTorch, also for maps of one pixel, which are in both layouts."""
    x = torch.randn(shape, device=device)
    if memory_format == torch.channels_last:
        batch, channels, height, width = shape
        x = torch.empty(batch, height, width, channels, device=device).normal_().permute(0, 3, 1, 2)
    stock = F.interpolate(x, (4, 3), mode="bilinear")
    leaf = x.detach().requires_grad_()
    with fused_ops.backend("triton"):
        out = resample_map(leaf, (4, 3))
    # Where there is one channel the strides of channels mean nothing.
    if shape[1] > 1:
        assert out.stride() == stock.stride()
    (grad,) = torch.autograd.grad(out, leaf, torch.ones_like(out))
    assert grad.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("mode", MODES)
def test_large_offsets(mode, device):
    """C5: an image more than 2**31 elements into its buffer is read at the right place."""
    image = 2**30
    # On the CPU the pages in between are never touched, so they cost no memory.
    buffer = torch.empty(2 * image + 400, dtype=torch.float16, device=device)
    x = buffer.as_strided((3, 8, 3, 5), (image, 1, 40, 8))
    x.copy_(torch.randn(3, 8, 3, 5))
    leaf = x.detach().requires_grad_()
    exact = x.double().requires_grad_()
    with fused_ops.backend("triton"):
        out = resample_map(leaf, (4, 4), mode=mode, add=buffer.as_strided((3, 8, 4, 4), (image, 1, 32, 8)))
    want = resample_map(
        exact, (4, 4), mode=mode, add=buffer.as_strided((3, 8, 4, 4), (image, 1, 32, 8)).double()
    )
    torch.testing.assert_close(out.double(), want, rtol=5e-3, atol=5e-3)
    # Of the gradient too.
    grad = buffer.as_strided((3, 8, 4, 4), (image, 1, 32, 8))
    got, wanted = torch.autograd.grad(out, leaf, grad), torch.autograd.grad(want, exact, grad.double())
    torch.testing.assert_close(got[0].double(), wanted[0], rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_infinities_and_nan(value, device):
    """They reach every output and gradient in which they have a weight, and no other.

    PyTorch multiplies with weights of zero too, so that some more are not numbers there.
    """
    for size, mode in itertools.product(((6, 8), (3, 2), (5, 4), (1, 4)), MODES):
        x = torch.rand(1, 2, 3, 4, device=device) + 1
        x[0, 0, 1, 2] = value
        x.requires_grad_()
        with fused_ops.backend("triton"):
            out = resample_map(x, size, mode=mode)
        rows, columns = (matrix(*axis, mode).to(device) for axis in zip((3, 4), size, strict=True))
        reached = (rows[:, 1, None] * columns[:, 2]) > 0
        assert torch.equal(~out[0, 0].isfinite(), reached)
        assert out[0, 1].isfinite().all()
        if value == value:
            assert (out[0, 0][reached] == value).all()
        stock = F.interpolate(x.detach(), size, mode=mode)
        assert not stock[0, 0].isfinite()[reached].any()
        grad = torch.ones_like(out)
        grad[0, 1, 0, 1] = value
        (got,) = torch.autograd.grad(out, x, grad)
        assert torch.equal(~got[0, 1].isfinite(), (rows[0, :, None] * columns[1]) > 0)
        assert got[0, 0].isfinite().all()


@pytest.mark.parametrize("name", ["up_add", "down_add", "nearest_odd", "drop_path", "nchw"])
def test_poisoned_memory_and_determinism(name, device):
    """C7, C8: two runs are equal to the bit, with every fresh allocation filled with NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        arguments = make(case(name), torch.float16, case(name).layout, device)
        first, second = (run(OPERATOR, arguments, "triton") for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    for key, value in first.items():
        assert torch.isfinite(value).all(), key
        assert torch.equal(second[key], value), key


@pytest.mark.parametrize("name", ["up_add", "down", "nearest_odd", "up_and_down", "nchw"])
def test_canaries(name, device, monkeypatch):
    """Nothing is written beside an output: bands of known values around each stay as they were."""
    buffers = []
    band = 64
    original = op._empty

    def guarded(shape, like, channels_last):
        plain = original(shape, like, channels_last)
        buffer = torch.full((plain.numel() + 2 * band,), 77.0, dtype=plain.dtype, device=device)
        buffers.append(buffer)
        return buffer.as_strided(plain.shape, plain.stride(), band)

    monkeypatch.setattr(op, "_empty", guarded)
    run(OPERATOR, make(case(name), torch.float32, case(name).layout, device), "triton")
    assert len(buffers) == 2
    for buffer in buffers:
        assert (buffer[:band] == 77).all()
        assert (buffer[-band:] == 77).all()
        assert not (buffer[band:-band] == 77).any()


def test_subsets_of_requires_grad(device):
    """C10: every subset of gradients equals the full set's, and the kernel runs for the map's alone."""
    full = run(OPERATOR, make(case("up_add"), torch.float32, device=device), "triton")
    for subset in (("x",), ("add",), ("x", "add")):
        arguments = make(case("up_add"), torch.float32, device=device)
        for name, tensor in named_tensors(arguments).items():
            tensor.requires_grad_(name in subset)
        with RecordCalls(OPERATOR.overloads) as recorded:
            got = run(OPERATOR, arguments, "triton")
        assert len(recorded.calls) == 1 + ("x" in subset)
        assert set(got) == {"out", *(f"grad {name}" for name in subset)}
        for name in subset:
            assert torch.equal(got[f"grad {name}"], full[f"grad {name}"])
    with torch.no_grad(), fused_ops.backend("triton"):
        assert torch.equal(resample_map(**arguments), full["out"])


def test_nothing_is_kept_for_backward_but_factors(device):
    """And the gradient of what is added is the one that comes."""
    x, add = (torch.randn(2, 3, size, size, device=device, requires_grad=True) for size in (3, 6))
    factor = torch.rand(2, device=device)
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    for options in ({}, {"drop_path": factor}):
        with hooks, fused_ops.backend("triton"):
            out = resample_map(x, 6, add=add, **options)
        grad = torch.randn_like(out)
        (of_add,) = torch.autograd.grad(out, add, grad)
        assert of_add.data_ptr() == grad.data_ptr()
    assert [tensor.data_ptr() for tensor in kept if tensor is not None] == [factor.data_ptr()]


# Of derivatives and tracing


def test_second_derivative_is_refused(device):
    """C9: a clear error, and the way that has one."""
    for backend in ("triton", "reference"):
        x = torch.randn(1, 2, 3, 3, device=device, requires_grad=True)
        with fused_ops.backend(backend):
            out = resample_map(x.square(), 5)
        (grad,) = torch.autograd.grad(out, x, cotangent(out), create_graph=True)
        if backend == "triton":
            with pytest.raises(RuntimeError, match="has no derivative of its own; for second"):
                torch.autograd.grad(torch.autograd.grad(out.square().sum(), x, create_graph=True)[0].sum(), x)
        else:
            assert torch.autograd.grad(grad.sum(), x)[0].abs().max() > 0


@pytest.mark.parametrize(
    "layout", ["channels_last", "nchw", pytest.param("slice", marks=pytest.mark.extended)]
)
@pytest.mark.parametrize(
    "options", [{"mode": "nearest"}, {"add": True, "drop_path": True}, {"mode": "bilinear"}]
)
def test_opcheck(options, layout, device):
    """G3: schema, fake and autograd registration of the torch operators."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return make_map(shape, generator, torch.float32, torch.device(device), layout)

    arguments = {"x": random(2, 3, 2, 1 if "add" in options else 2), "size": (1, 3), **options}
    if "add" in options:
        arguments |= {"add": random(2, 3, 1, 3), "drop_path": torch.rand(2, device=device)}
    with RecordCalls(OPERATOR.overloads) as recorded, fused_ops.backend("triton"):
        out = OPERATOR.function(**arguments)
        leaves = [tensor for tensor in named_tensors(arguments).values() if tensor.requires_grad]
        torch.autograd.grad(out.sum(), leaves)
    assert [function for function, _ in recorded.calls] == list(OPERATOR.overloads)
    for function, args in recorded.calls:
        detached = tuple(arg.detach() if isinstance(arg, torch.Tensor) else arg for arg in args)
        torch.library.opcheck(function, detached, test_utils=("test_schema", "test_faketensor"))
    forward, args = recorded.calls[0]
    tracked = tuple(
        arg.detach().requires_grad_() if isinstance(arg, torch.Tensor) and arg.dim() == 4 else arg
        for arg in args
    )
    torch.library.opcheck(
        forward, tracked, test_utils=("test_autograd_registration", "test_aot_dispatch_static")
    )


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("mode", MODES)
def test_compiles_whole(mode, device, fresh_compiler):
    """G1, G2, G4: one graph without a break for several sizes, forward and backward, with eager's results."""

    def network(x, add):
        # The size comes from another map, as in pyramids.
        return resample_map(x.relu(), add.shape[2:], mode=mode, add=add) * 2

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(network, backend=counter, fullgraph=True, dynamic=True)
    with fused_ops.backend("triton"):
        for batch, size, out_size in ((3, (2, 3), (4, 6)), (2, (3, 3), (2, 7))):
            inputs = [
                torch.randn(batch, 6, *shape, device=device)
                .contiguous(memory_format=torch.channels_last)
                .requires_grad_()
                for shape in (size, out_size)
            ]
            results = []
            for function in (network, compiled):
                out = function(*inputs)
                results.append((out, *torch.autograd.grad(out, inputs, cotangent(out))))
            for one, other in zip(*results, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
                assert one.stride() == other.stride()
    assert counter.frame_count <= 2


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
def test_cuda_graph(mode):
    """G5: captured on a side stream, replayed with other inputs."""
    require("triton", "cuda")
    x, add = torch.randn(2, 32, 7, 7, device="cuda"), torch.randn(2, 32, 28, 28, device="cuda")
    stream = torch.cuda.Stream()
    with torch.no_grad(), fused_ops.backend("triton"):
        with torch.cuda.stream(stream):
            for _ in range(3):
                resample_map(x, (28, 28), mode=mode, add=add)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            out = resample_map(x, (28, 28), mode=mode, add=add)
        for _ in range(2):
            x.copy_(torch.randn_like(x))
            graph.replay()
            torch.testing.assert_close(out, resample_map(x, (28, 28), mode=mode, add=add))


def test_flops():
    """G7: as of stock PyTorch: products of matrices and convolutions alone are counted."""
    require("triton", "cpu")
    for backend in ("reference", "triton"):
        x = torch.randn(1, 2, 3, 3, requires_grad=True)
        with FlopCounterMode(display=False) as counter, fused_ops.backend(backend):
            torch.autograd.grad(resample_map(x, 5).sum(), x)
        assert counter.get_total_flops() == 0


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_autocast(backend, device):
    """D6: the map keeps its dtype, what is added takes it."""
    x, add = (torch.randn(2, 3, size, size, device=device, requires_grad=True) for size in (3, 6))
    with torch.autocast(device, torch.bfloat16), fused_ops.backend(backend):
        wide = resample_map(x, 6, add=add.bfloat16(), drop_path=torch.rand(2, device=device).bfloat16())
        half = resample_map(x.bfloat16(), 6, add=add)
    assert (wide.dtype, half.dtype) == (torch.float32, torch.bfloat16)
    gradients = torch.autograd.grad(wide.sum() + half.float().sum(), (x, add))
    assert {gradient.dtype for gradient in gradients} == {torch.float32}


# Of arguments

X = torch.zeros(2, 4, 5, 6)
BAD_ARGUMENTS = [
    ({"x": torch.zeros(4, 5, 5)}, ValueError, r"x has 3 dimensions; it must be \(B, C, H, W\)"),
    ({"x": X.int()}, TypeError, "x has dtype torch.int32"),
    ({"x": X[:, :0]}, ValueError, r"x has shape \(2, 0, 5, 6\); channels, height and width"),
    ({"x": X[..., :0]}, ValueError, r"x has shape \(2, 4, 5, 0\); channels, height and width"),
    ({"size": 0}, ValueError, "size=0 is not allowed; it must be an integer of at least 1, or two of them"),
    ({"size": (3, -1)}, ValueError, r"size=\(3, -1\) is not allowed"),
    ({"size": (3, 2.0)}, ValueError, r"size=\(3, 2.0\) is not allowed"),
    ({"size": (3, 3, 3)}, ValueError, r"size=\(3, 3, 3\) is not allowed"),
    ({"size": None}, ValueError, "size=None is not allowed"),
    ({"mode": "bicubic"}, ValueError, "mode='bicubic' is unknown; use one of bilinear, nearest"),
    ({"add": X}, ValueError, r"add has shape \(2, 4, 5, 6\); it must be that of the result, \(2, 4, 3, 3\)"),
    ({"add": torch.zeros(2, 4, 3, 3).half()}, TypeError, "add is torch.float16 on cpu; it must be as x"),
    ({"add": torch.zeros(2, 4, 3, 3, device="meta")}, TypeError, "add is torch.float32 on meta"),
    ({"drop_path": torch.ones(3)}, ValueError, r"drop_path has shape \(3,\); it must be \(2,\), one factor"),
    ({"drop_path": torch.ones(2).half()}, TypeError, "drop_path has dtype torch.float16"),
    ({"drop_path": torch.ones(2, requires_grad=True)}, ValueError, "drop_path requires grad"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), BAD_ARGUMENTS)
def test_bad_arguments_are_named(change, error, message):
    """C11: an error that names the argument, the value and what is allowed, before anything runs."""
    with pytest.raises(error, match=message):
        resample_map(**{"x": X, "size": (3, 3), **change})


@pytest.mark.parametrize(
    ("x", "size", "message"),
    [
        (X.double(), 3, r"resample: .* x is torch\.float64"),
        (X[:0], 3, r"x is empty, \(0, 4, 5, 6\)"),
        (X[:1, :1, :1, :1].expand(1, 1, 1, 40000), (1, 30000), "the width goes from 40000 to 30000; the"),
        (
            X[:1, :1, :1, :1],
            (1, 2**20 + 1),
            "the width goes from 1 to 1048577; the Triton kernels take sizes",
        ),
        (
            X[:1, :1, :1, :1].expand(65536, 1, 1, 1),
            1,
            "x has 65536 images; the Triton kernels take up to 65535",
        ),
        (X[:1, :1, :1, :1], (65536, 1), "x has 65536 rows in the result; the Triton kernels take"),
    ],
)
def test_declined_calls_say_why(x, size, message):
    require("triton", "cpu")
    with fused_ops.backend("triton"), pytest.raises(fused_ops.BackendUnavailableError, match=message):
        resample_map(x, size)


# Of traffic


@pytest.mark.parametrize(("operator", "case"), operator_cases("traffic", only="resample"))
def test_counted_bytes(operator, case):
    """What the kernels touch is the least, in one launch each way; factors per image come on top."""
    require("triton", "cpu")
    calls = []
    with calls_of(operator, calls):
        rows = operator_traffic(
            operator, "triton", case.name, lambda: make(case, torch.bfloat16, case.layout)
        )
    for direction in ("forward", "backward"):
        *launches, total = (row for row in rows if row["direction"] == direction)
        assert len(launches) == operator.launch_count(calls[0], direction) == 1
        assert 1.0 <= total["counted_bytes"] / total["least_bytes"] <= 1.001
        assert total["counted_bytes"] <= total["block_bytes"] <= total["requested_bytes"]


@pytest.mark.parametrize("shape", [(128, 64, 56, 56), (128, 512, 3, 3), (2, 256, 200, 336), (1, 1, 1, 1)])
@pytest.mark.parametrize("inner", [True, False])
def test_grids_cover_the_map_once(shape, inner):
    """On shapes too large to run here."""
    for taps in (0, 1, 4, 64):
        made = triton.plan(shape, inner, taps)
        images, channels, rows, width = shape
        assert made.grid[2] == images
        assert (made.grid[1] - 1) * made.group < rows <= made.grid[1] * made.group
        columns = made.grid[0] // made.blocks_c * made.meta["BLOCK_P"]
        assert width <= columns < width + made.meta["BLOCK_P"]
        assert channels <= made.blocks_c * made.meta["BLOCK_C"] < channels + made.meta["BLOCK_C"]
        assert made.meta["BLOCK_P"] * made.meta["BLOCK_C"] <= triton.AREA
