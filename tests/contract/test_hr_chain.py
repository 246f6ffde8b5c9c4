"""The HR chain: contract C1 to C11 and G1 to G7 beyond the cases that every operator runs.

Shapes are tiny: every program costs tens of milliseconds in Triton's interpreter.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.contract import (
    ACTIVATIONS,
    DEVICES,
    RecordCalls,
    assert_three_way,
    case_named,
    check_operators,
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
from fused_ops.bench.limits import kernels_chosen
from fused_ops.bench.traffic import operator_traffic
from fused_ops.core import library
from fused_ops.hr_chain import triton

OPERATOR = library.operators()["hr_chain"]
INPUTS = (
    "x",
    "high_weight",
    "high_bias",
    "low_weight",
    "fc1_weight",
    "fc1_bias",
    "fc2_weight",
    "fc2_bias",
    "norm.weight",
    "norm.bias",
)


def case(name):
    return case_named(name, "hr_chain")


def arguments_of(name="train", dtype=torch.float32, device="cpu", **change):
    return {**make(case(name), dtype, device=device), **change}


def oracle(arguments):
    """The definition once more, from nothing of the package: other operators, in another order."""
    x, norm = arguments["x"], arguments["norm"]
    channels, (height, width) = x.shape[1], x.shape[2:]
    padded = F.pad(x, (1, 2, 1, 2))

    def convolve(weight, step):
        rows, columns = -(-height // step), -(-width // step)
        total = torch.zeros(x.shape[0], channels, rows, columns, dtype=x.dtype)
        for a in range(3):
            for b in range(3):
                window = padded[:, :, a : a + step * rows : step, b : b + step * columns : step]
                total = total + window * weight[:, 0, a, b][:, None, None]
        return total

    def per_channel(vector, default):
        return default if vector is None else vector[:, None, None]

    low = convolve(arguments["low_weight"], 2)
    mean, var = norm.running_mean, norm.running_var
    if norm.batch_stats:
        mean, var = low.mean((0, 2, 3)), low.var((0, 2, 3), unbiased=False)
    low = (low - per_channel(mean, 0)) / (per_channel(var, 1) + norm.eps).sqrt()
    low = low * per_channel(norm.weight, 1) + per_channel(norm.bias, 0)
    hidden = torch.einsum("bchw,jc->bjhw", low, arguments["fc1_weight"])
    hidden = hidden + per_channel(arguments.get("fc1_bias"), 0)
    hidden = ACTIVATIONS[arguments.get("activation", "gelu")](hidden)
    low = torch.einsum("bjhw,cj->bchw", hidden, arguments["fc2_weight"])
    low = low + per_channel(arguments.get("fc2_bias"), 0)
    rows, columns = torch.arange(height) // 2, torch.arange(width) // 2
    branch = convolve(arguments["high_weight"], 1) + per_channel(arguments.get("high_bias"), 0)
    branch = branch + low[:, :, rows][:, :, :, columns]
    if arguments.get("drop_path") is not None:
        branch = branch * arguments["drop_path"][:, None, None, None]
    return x + branch if arguments.get("identity", True) else branch


# Of the reference


@pytest.mark.parametrize(
    ("operator", "case"), operator_cases(without=("model", "traffic", "resources"), only="hr_chain")
)
def test_reference_is_the_definition(operator, case):
    arguments = make(case, torch.float64)
    want = oracle(arguments)
    got = run(operator, arguments, "reference", gradients=False)["out"]
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    assert got.shape == arguments["x"].shape


@pytest.mark.parametrize("name", ["eval", "train"])
def test_reference_gradcheck(name):
    arguments = arguments_of(name, torch.float64)
    small = {"x": arguments["x"][:, :2, :3, :3], "norm": arguments["norm"]}
    for key, value in arguments.items():
        if key.endswith(("weight", "bias")):
            # Two channels and three hidden units.
            rows = 3 if key.startswith("fc1") else 2
            small[key] = value[:rows, : 5 - rows] if value.dim() == 2 else value[:rows]
    small["norm"] = small["norm"]._replace(
        **{field: getattr(small["norm"], field)[:2] for field in ("weight", "bias")},
        **{field: getattr(small["norm"], field)[:2].clone() for field in ("running_mean", "running_var")},
    )
    leaves = [t for key, t in named_tensors(small).items() if "running" not in key]
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    names = [key for key in named_tensors(small) if "running" not in key]

    def function(*tensors):
        found = dict(zip(names, tensors, strict=True))
        norm = small["norm"]._replace(
            weight=found["norm.weight"],
            bias=found["norm.bias"],
            running_mean=small["norm"].running_mean.clone(),
            running_var=small["norm"].running_var.clone(),
        )
        return fused_ops.hr_block(**{k: v for k, v in found.items() if "." not in k}, norm=norm)

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


# Of the kernels

# Those in CUDA are for half precision.
KERNELS = pytest.mark.parametrize(("backend", "dtype"), [("triton", torch.float32), ("cuda", torch.float16)])


def close(dtype, **tolerances):
    """Tolerances of results in ``dtype``, those given being of float32."""
    factor = 1 if dtype == torch.float32 else 100
    return {name: factor * value for name, value in tolerances.items()}


@KERNELS
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["one_channel", "one_pixel", "one_row", "large_mean"])
def test_awkward_cases(name, device, backend, dtype, request):
    """C1, C2: what is too odd to be worth every dtype and layout."""
    require(backend, device, request)
    arguments = arguments_of(name, dtype, device)
    exact, eager = convert(arguments, torch.float64), convert(arguments)
    got = run(OPERATOR, arguments, backend)
    assert_three_way(got, run(OPERATOR, eager, "reference"), run(OPERATOR, exact, "reference"), dtype)


@KERNELS
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["train", "wide"])
def test_subsets_of_gradients(name, device, backend, dtype, request):
    """C10: any subset equals the full set's to the bit, and nothing else is asked for."""
    require(backend, device, request)
    full = run(OPERATOR, arguments_of(name, dtype, device), backend)
    subsets = [
        ("x",),
        ("high_weight",),
        ("high_bias", "fc1_weight"),
        ("low_weight",),
        ("fc2_weight", "norm.bias"),
    ]
    if name == "wide":
        subsets = [("fc2_bias",), ("x", "low_weight"), ("fc1_bias", "fc2_weight"), ("norm.weight",)]
    for subset in subsets:
        arguments = arguments_of(name, dtype, device)
        for key, tensor in named_tensors(arguments).items():
            tensor.requires_grad_(key in subset)
        with RecordCalls(OPERATOR.overloads[1:]) as recorded:
            got = run(OPERATOR, arguments, backend)
        assert [list(call[-2]) for _, call in recorded.calls] == [[key in subset for key in INPUTS]]
        assert {key for key in got if key.startswith("grad ")} == {f"grad {key}" for key in subset}
        for key in subset:
            # Whether the sums of the norm come with the weight gradients or alone changes their order.
            alone = backend == "triton" and name == "train"
            exact = {"rtol": 1e-5, "atol": 2e-5} if alone else {"rtol": 0, "atol": 0}
            torch.testing.assert_close(got[f"grad {key}"], full[f"grad {key}"], **exact)


@KERNELS
@pytest.mark.parametrize("device", DEVICES)
def test_determinism_and_canaries(device, backend, dtype, monkeypatch, request):
    """C7, C8: equal to the bit with poisoned memory, and nothing written beside an output."""
    require(backend, device, request)
    buffers = []
    band = 64

    def guarded(shape, like, *, dtype=None):
        plain = torch.empty(
            tuple(shape),
            dtype=dtype or like.dtype,
            device=like.device,
            memory_format=library.memory_format(like),
        )
        buffer = torch.full((plain.numel() + 2 * band,), 77.0, dtype=plain.dtype, device=plain.device)
        buffers.append(buffer)
        return buffer.as_strided(plain.shape, plain.stride(), band)

    torch.use_deterministic_algorithms(True)
    try:
        first = run(OPERATOR, arguments_of("no_identity", dtype, device), backend)
        monkeypatch.setattr(library, "empty", guarded)
        second = run(OPERATOR, arguments_of("no_identity", dtype, device), backend)
    finally:
        torch.use_deterministic_algorithms(False)
    for name, value in first.items():
        assert torch.isfinite(value).all(), name
        torch.testing.assert_close(second[name], value, rtol=0, atol=0)
    # The result and seven gradients; without biases.
    assert len(buffers) == 8
    for buffer in buffers:
        assert (buffer[:band] == 77).all()
        assert (buffer[-band:] == 77).all()


@KERNELS
@pytest.mark.parametrize("device", DEVICES)
def test_layouts_of_input_and_gradient(device, backend, dtype, request):
    """C4: an expanded gradient, one in NCHW order, and x a window whose channels lie apart in memory."""
    require(backend, device, request)
    arguments = arguments_of("eval", dtype, device)
    wide = torch.randn(2, 16, 7, 8, device=device).to(dtype, memory_format=torch.channels_last)
    arguments["x"] = wide[:, ::2, 1:6, 1:].detach().requires_grad_()
    assert arguments["x"].stride(1) == 2
    want_arguments = convert(arguments, torch.float64)
    weights = torch.linspace(-1, 1, 2 * 8 * 5 * 7, device=device).view(2, 8, 5, 7).to(dtype)
    for grad in (weights.new_ones(()).expand(2, 8, 5, 7), weights):
        got = run(OPERATOR, arguments, backend, grad=grad)
        want = run(OPERATOR, want_arguments, "reference", grad=grad.double())
        for name, value in want.items():
            tolerances = close(dtype, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(got[name].double(), value, **tolerances, msg=name)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("device", DEVICES)
def test_large_offsets(device, backend, request):
    """C5: an image more than 2**31 elements into its buffer is read at the right place."""
    require(backend, device, request)
    image_stride = 2**30
    # On the CPU the pages in between are never touched, so they cost no memory.
    buffer = torch.empty(2 * image_stride + 400, dtype=torch.float16, device=device)
    x = buffer.as_strided((3, 8, 4, 5), (image_stride, 1, 40, 8))
    x.copy_(torch.randn(3, 8, 4, 5))
    arguments = arguments_of("eval", torch.float16, device, x=x)
    got = run(OPERATOR, arguments, backend, gradients=False)["out"]
    want = run(OPERATOR, convert({**arguments, "x": x.clone()}, torch.float64), "reference", gradients=False)[
        "out"
    ]
    torch.testing.assert_close(got.double(), want, rtol=5e-3, atol=5e-3)


@KERNELS
@pytest.mark.parametrize("device", DEVICES)
def test_not_a_number_reaches_what_it_reaches_in_stock(device, backend, dtype, request):
    require(backend, device, request)
    arguments = arguments_of("eval", dtype, device, activation="relu")
    with torch.no_grad():
        arguments["x"][0, 1, 2, 2] = float("nan")
        arguments["x"][1, 0, 4, 6] = float("inf")
    want = run(OPERATOR, convert(arguments), "reference", gradients=False)["out"]
    got = run(OPERATOR, arguments, backend, gradients=False)["out"]
    assert torch.equal(got.isnan(), want.isnan())
    torch.testing.assert_close(got, want, **close(dtype, rtol=1e-5, atol=1e-4), equal_nan=True)


def test_second_derivatives_say_that_there_are_none():
    """C9."""
    require("triton", "cpu")
    arguments = arguments_of("eval")
    with fused_ops.backend("triton"):
        out = OPERATOR.function(**arguments)
    (grad,) = torch.autograd.grad(out.sum(), arguments["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="hr_chain_backward has no derivative of its own"):
        grad.square().sum().backward()


def test_statistics_under_a_large_mean():
    """C2: mean 1000, deviation 1. A sum of squares in float32 would lose every digit of the variance."""
    require("triton", "cpu")
    arguments = arguments_of("large_mean")
    exact = convert(arguments, torch.float64)
    got = run(OPERATOR, arguments, "triton", gradients=False)
    want = run(OPERATOR, exact, "reference", gradients=False)
    for name in ("norm.running_mean", "norm.running_var"):
        torch.testing.assert_close(got[name].double(), want[name], rtol=1e-4, atol=0)


def test_one_value_per_channel_raises_as_torch_does():
    arguments = arguments_of("one_pixel")
    arguments["x"] = arguments["x"][:1].detach()
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        fused_ops.hr_block(**arguments)


def test_tiles_cover_the_map_with_little_padding():
    assert triton._tile(28, 28, 64) in ((4, 16), (16, 4), (8, 8))
    assert triton._tile(1, 40, 16) == (1, 16)
    assert triton._tile(56, 56, 64) == (8, 8)
    for shape in ((2, 32, 28, 28), (1, 256, 7, 7), (3, 64, 1, 9), (128, 96, 56, 28)):
        for tiling in (
            triton.statistics_tiling(shape),
            triton.forward_tiling(shape, 128, 2),
            triton.low_gradient_tiling(shape, 128, 2),
            triton.low_backward_tiling(shape, 128),
            triton.hidden_weights_tiling(shape, 128),
            triton.maps_tiling(shape),
        ):
            rows, columns = tiling.meta["TILE_H"], tiling.meta["TILE_W"]
            assert rows * columns >= 16
            assert tiling.count * rows * columns >= shape[0] * shape[2] * shape[3]
            assert (tiling.parts - 1) * tiling.each < tiling.count <= tiling.parts * tiling.each


# Of the call


def test_flops():
    """G7: as the stock modules forward, and backward by what is asked for."""
    require("triton", "cpu")
    counts = {}
    for backend in ("reference", "triton"):
        with fused_ops.backend(backend), FlopCounterMode(display=False) as counter:
            fused_ops.hr_block(**arguments_of("eval"))
        counts[backend] = counter.get_total_flops()
    low = 2 * 3 * 4
    high_taps, low_taps, layer = 18 * 8 * 2 * 5 * 7, 18 * 8 * low, 2 * low * 8 * 16
    assert counts["triton"] == counts["reference"] == high_taps + low_taps + 2 * layer
    expected = {
        INPUTS: 2 * counts["triton"],
        ("x",): counts["triton"],
        ("high_bias", "fc2_bias"): 0,
        ("high_weight",): high_taps,
        ("fc1_weight",): 2 * layer,
        ("fc2_weight",): layer,
        ("norm.bias",): 2 * layer,
        ("low_weight",): low_taps + 2 * layer,
    }
    for names, flops in expected.items():
        arguments = arguments_of("eval")
        for key, tensor in named_tensors(arguments).items():
            tensor.requires_grad_(key in names)
        leaves = [t for t in named_tensors(arguments).values() if t.requires_grad]
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True), fused_ops.backend("triton"):
            out = fused_ops.hr_block(**arguments)
            with FlopCounterMode(display=False) as counter:
                torch.autograd.grad(out, leaves, torch.ones_like(out))
        assert counter.get_total_flops() == flops, names


def test_opcheck():
    """G3: schema and fake of both torch operators."""
    require("triton", "cpu")
    check_operators(OPERATOR, arguments_of("train"))


@pytest.mark.parametrize(
    ("backend", "dtype"), [("reference", torch.float32), ("triton", torch.float32), ("cuda", torch.float16)]
)
def test_compiles_whole(backend, dtype, request):
    """G1, G4: one graph forward and one backward, with eager's results."""
    if backend != "reference":
        require(backend, "cpu", request)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fused_ops.hr_block, backend=counter, fullgraph=True)
    want = run(OPERATOR, arguments_of("train", dtype), backend)
    arguments = arguments_of("train", dtype)
    with fused_ops.backend(backend):
        out = compiled(**arguments)
    tensors = {key: t for key, t in named_tensors(arguments).items() if t.requires_grad}
    found = torch.autograd.grad(out, list(tensors.values()), cotangent(out))
    torch.testing.assert_close(out.detach(), want["out"], rtol=1e-5, atol=1e-5)
    for name, value in zip(tensors, found, strict=True):
        torch.testing.assert_close(value, want[f"grad {name}"], rtol=1e-4, atol=1e-4)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(arguments["norm"], name), want[f"norm.{name}"])
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_counted_bytes():
    """The bytes that the kernels touch are at most 1.1 times the least, forward and backward."""
    require("triton", "cpu")
    rows = operator_traffic(OPERATOR, "triton", "train", lambda: make(case("traffic_train"), torch.bfloat16))
    totals = {row["direction"]: row for row in rows if row["kernel"] == "total"}
    maps = 2 * 16 * 48 * 48
    # x twice, the result and a quarter; the gradient twice, x, its gradient and four quarters.
    least = {"forward": 3 * maps + maps // 4, "backward": 5 * maps}
    assert {direction: row["least_bytes"] for direction, row in totals.items()} == least
    arguments = make(case("traffic_train"), torch.bfloat16)
    with kernels_chosen(chosen := []), torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        fused_ops.hr_block(**arguments)
    for direction, row in totals.items():
        ratio = row["counted_bytes"] / row["least_bytes"]
        assert 1.0 <= ratio <= 1.10, f"{direction}: {ratio:.3f} times the least"
        # Two transposed filters and two matrices cast by PyTorch, whose kernels the interpreter does not see.
        launches = sum(entry["direction"] == direction for entry in rows) - 1
        assert OPERATOR.launch_count(chosen[0][1], direction) == launches + 4


@pytest.mark.parametrize(
    ("name", "grad", "forward", "backward"),
    [("train", True, 13, 20), ("train", False, 12, 20), ("eval", True, 9, 19), ("eval", False, 8, 19)],
)
def test_least_bytes(name, grad, forward, backward):
    """In quarters of the map."""
    with torch.set_grad_enabled(grad), kernels_chosen(chosen := []):
        fused_ops.hr_block(**arguments_of(f"traffic_{name}", torch.float64))
    quarter = 8 * 16 * 24 * 24
    assert OPERATOR.least_bytes(chosen[0][1], "forward") == forward * quarter
    assert OPERATOR.least_bytes(chosen[0][1], "backward") == backward * quarter


BAD_ARGUMENTS = [
    ({"x": torch.randn(16, 6, 8)}, ValueError, r"x has 3 dimensions; it must be \(B, C, H, W\)"),
    ({"x": torch.zeros(1, 16, 6, 8, dtype=torch.int32)}, TypeError, "x has dtype torch.int32"),
    ({"x": torch.zeros(1, 16, 0, 8)}, ValueError, "channels, height and width must be at least 1"),
    ({"high_weight": torch.randn(16, 1, 5, 5)}, ValueError, r"it must be \(16, 1, 3, 3\), one filter"),
    ({"low_weight": torch.randn(8, 1, 3, 3)}, ValueError, r"low_weight has shape \(8, 1, 3, 3\)"),
    ({"fc1_weight": torch.randn(64)}, ValueError, r"fc1_weight has shape \(64,\); it must be \(hidden, 16\)"),
    ({"fc1_weight": torch.randn(64, 8)}, ValueError, r"it must be \(64, 16\), from the channels"),
    ({"fc2_weight": torch.randn(16, 32)}, ValueError, r"it must be \(16, 64\), from fc1's hidden units"),
    ({"fc1_bias": torch.randn(16)}, ValueError, r"fc1_bias has shape \(16,\); it must be \(64,\)"),
    ({"fc2_bias": torch.randn(16).half()}, TypeError, "fc2_bias has dtype torch.float16"),
    ({"high_bias": torch.randn(16, device="meta")}, ValueError, "high_bias is on meta"),
    ({"drop_path": torch.ones(3)}, ValueError, r"it must be \(2,\), one factor per image"),
    ({"drop_path": torch.ones(2, requires_grad=True)}, ValueError, "drop_path requires grad"),
    ({"activation": "swish"}, ValueError, "activation='swish' is unknown; use one of none, relu"),
    (
        {"norm": fused_ops.BatchNormState(torch.ones(3), None, None, None, True, 0.1, 1e-5)},
        ValueError,
        r"norm.weight has shape \(3,\)",
    ),
    (
        {"norm": fused_ops.BatchNormState(None, None, None, None, False, 0.1, 1e-5)},
        ValueError,
        "norm has no running statistics",
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_ARGUMENTS)
def test_bad_arguments_are_named(change, error, message):
    """C11."""
    with pytest.raises(error, match=message):
        fused_ops.hr_block(**arguments_of("train", **change))


@pytest.mark.parametrize(
    ("name", "dtype", "message"),
    [
        ("eval", torch.float64, "x is torch.float64; the Triton kernels are for float32, float16 and"),
        ("many_channels", torch.float32, "x has 264 channels; the Triton kernels are for up to 256"),
        ("empty", torch.float32, r"x is empty, \(0, 8, 6, 6\)"),
        ("nchw", torch.float32, "x is in NCHW order; the Triton kernels read and write channels_last"),
    ],
)
def test_declined_calls_say_why(name, dtype, message):
    """C11: a forced backend that cannot run raises with one exact sentence."""
    require("triton", "cpu")
    arguments = make(case(name), dtype, case(name).layout)
    with fused_ops.backend("triton"), pytest.raises(fused_ops.BackendUnavailableError, match=message):
        fused_ops.hr_block(**arguments)
    assert fused_ops.hr_block(**arguments).shape == arguments["x"].shape


@pytest.mark.gpu
def test_cuda_graph():
    """G5: captured on a side stream, replayed with other inputs."""
    require("triton", "cuda")
    arguments = arguments_of("eval", device="cuda")
    static = arguments["x"].detach()
    arguments["x"] = static
    stream = torch.cuda.Stream()
    with torch.no_grad(), fused_ops.backend("triton"):
        with torch.cuda.stream(stream):
            for _ in range(3):
                fused_ops.hr_block(**arguments)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            out = fused_ops.hr_block(**arguments)
        for _ in range(2):
            static.copy_(torch.randn_like(static))
            graph.replay()
            want = run(OPERATOR, convert(arguments, torch.float64), "reference", gradients=False)["out"]
            torch.testing.assert_close(out.double(), want, rtol=1e-4, atol=1e-4)
