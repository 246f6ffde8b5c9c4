"""Sums of gated maps: contract C1 to C11 and G1 to G7 beyond the cases that every operator runs.

Shapes are tiny: every program costs milliseconds in Triton's interpreter.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from support.contract import (
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
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import fused_ops
from fused_ops.bench.traffic import calls_of, operator_traffic
from fused_ops.core import library
from fused_ops.gate import attentive_fusion, multi_level_fusion, render_scales, triton, weighted_sum

NAMES = ("attentive_fusion", "multi_level_fusion", "render_scales", "weighted_sum")
OPERATORS = {name: library.operators()[name] for name in NAMES}


def cases_of_all(*tags: str, without: tuple[str, ...] = ()) -> list[Any]:
    return [param for name in NAMES for param in operator_cases(*tags, without=without, only=name)]


# Of the reference, against the paper's formulas once more, in float64 and from nothing of the package


def sigmoid(logits: Tensor) -> Tensor:
    return 1 / (1 + (-logits).exp())


def per_channel(vector: Tensor) -> Tensor:
    return vector[:, :, None, None]


def oracle(operator: str, arguments: dict[str, Any]) -> Tensor:
    if operator == "attentive_fusion":
        s, c = sigmoid(arguments["position_gate"]), per_channel(sigmoid(arguments["channel_gate"]))
        return s * (1 - c) * arguments["x"] + (1 - s) * c * arguments["y"]
    if operator == "weighted_sum":
        return sum(w * x for w, x in zip(arguments["weights"], arguments["maps"], strict=True))
    if operator == "render_scales":
        predictions, out, passed = arguments["predictions"], 0, 1
        for prediction, density in zip(predictions, arguments["densities"], strict=True):
            out = out + (1 - (-density.abs()).exp()) * passed * prediction
            passed = passed * (-density.abs()).exp()
        return out
    maps = arguments["maps"]
    s = [sigmoid(logits) for logits in arguments["position_gates"]]
    c = [per_channel(sigmoid(logits)) for logits in arguments["channel_gates"]]
    out = 0
    for k, x in enumerate(maps):
        weight = s[k] * c[k]
        for j in range(k + 1, len(maps)):
            weight = weight * (1 - s[j]) * (1 - c[j])
        out = out + weight * x
    return out


def leaves_of(arguments: dict[str, Any]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in named_tensors(arguments).items() if tensor.requires_grad}


@pytest.mark.parametrize(("operator", "case"), cases_of_all(without=("model", "traffic", "resources")))
def test_reference_is_the_definition(operator, case):
    arguments = make(case, torch.float64)
    leaves = list(leaves_of(arguments).values())
    got, want = operator.function(**arguments), oracle(operator.name, arguments)
    gradients = (torch.autograd.grad(out, leaves, cotangent(got)) for out in (got, want))
    for one, other in zip((got, *next(gradients)), (want, *next(gradients)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)
def test_reference_gradcheck(operator):
    case = next(case for case in operator.cases() if case.name == "one_pixel")
    arguments = make(case, torch.float64)
    leaves = list(leaves_of(arguments).values())
    assert torch.autograd.gradcheck(lambda *_: operator.function(**arguments), leaves)


# Of the kernels


@pytest.fixture(params=DEVICES)
def device(request):
    require("triton", request.param)
    return request.param


def check(operator: library.Operator, arguments: dict[str, Any], dtype: torch.dtype = torch.float32) -> None:
    """Output and gradients from Triton, held against float64 and against eager in the same precision."""
    got = run(operator, arguments, "triton")
    exact = run(operator, convert(arguments, torch.float64), "reference")
    assert_three_way(got, run(operator, convert(arguments), "reference"), exact, dtype)


@pytest.mark.parametrize(
    ("operator", "case"), cases_of_all(without=("tiny", "model", "traffic", "resources"))
)
def test_awkward_cases(operator, case, device):
    """One pixel, channel or map, four maps, NCHW, several programs to an image; no images are declined."""
    arguments = make(case, torch.float32, case.layout, device)
    if case.name == "empty":
        with (
            fused_ops.backend("triton"),
            pytest.raises(fused_ops.BackendUnavailableError, match="x is empty"),
        ):
            operator.function(**arguments)
        for name, value in run(operator, arguments, "auto").items():
            assert value.numel() == 0 or value.abs().max() == 0, name
        return
    check(operator, arguments)


def levels(
    shape: tuple[int, ...], count: int, device: str, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """Arguments of the multi-level fusion, every map in another layout, and gates that are not dense."""
    batch, channels, height, width = shape

    def random(*size: int) -> Tensor:
        return torch.randn(size, device=device).to(dtype)

    views = (
        lambda: random(*shape).contiguous(memory_format=torch.channels_last),
        lambda: random(*shape),
        lambda: random(batch, 2 * channels, height, width)[:, ::2],
        lambda: random(batch, channels, width, height).transpose(2, 3),
        lambda: random(1, channels, 1, 1).expand(shape),
    )
    gates = (random(batch, 2, width, height)[:, 1:].transpose(2, 3) for _ in range(count))
    vectors = (random(channels, 2 * batch).T[::2] for _ in range(count))
    return {
        "maps": tuple(view().requires_grad_() for view in views[:count]),
        "position_gates": tuple(gate.requires_grad_() for gate in gates),
        "channel_gates": tuple(vector.requires_grad_() for vector in vectors),
    }


def test_layouts(device):
    """C4: every map, gate and gradient in strides of its own; gradients in the layout of their map."""
    arguments = levels((2, 7, 4, 6), 5, device)
    operator = OPERATORS["multi_level_fusion"]
    grad = torch.randn(2, 7, 6, 4, device=device).transpose(2, 3)
    got = run(operator, arguments, "triton", grad=grad)
    want = run(operator, convert(arguments, torch.float64), "reference", grad=grad.double())
    for name, value in want.items():
        torch.testing.assert_close(got[name].double(), value, rtol=1e-4, atol=1e-6)
    assert got["grad maps.0"].is_contiguous(memory_format=torch.channels_last)
    assert got["grad maps.1"].is_contiguous()


def test_gradient_expanded_from_a_sum(device):
    """C4: the gradient of ``.sum()`` has stride 0 everywhere."""
    arguments = make(case_named("plain", "attentive_fusion"), torch.float32, device=device)
    ones = torch.ones((), device=device).expand(arguments["x"].shape)
    got = run(OPERATORS["attentive_fusion"], arguments, "triton", grad=ones)
    exact = convert(arguments, torch.float64)
    want = run(OPERATORS["attentive_fusion"], exact, "reference", grad=ones.double())
    for name, value in want.items():
        torch.testing.assert_close(got[name].double(), value, rtol=1e-4, atol=1e-5)


def test_large_offsets(device):
    """C5: an image more than 2**31 elements into its buffer is read at the right place."""
    image = 2**30
    # On the CPU the pages in between are never touched, so they cost no memory.
    buffer = torch.empty(2 * image + 400, dtype=torch.float16, device=device)
    x = buffer.as_strided((3, 8, 6, 5), (image, 1, 40, 8))
    x.copy_(torch.randn(3, 8, 6, 5))
    y = torch.randn(3, 8, 6, 5, device=device).half()
    gate, vector = torch.randn(3, 1, 6, 5, device=device).half(), torch.randn(3, 8, device=device).half()
    results = []
    for backend, dtype in (("triton", torch.float16), ("reference", torch.float64)):
        # The map itself, and a dense copy in float64.
        inputs = [x.detach() if dtype == torch.float16 else x.double()]
        inputs += [tensor.to(dtype) for tensor in (y, gate, vector)]
        inputs = [tensor.requires_grad_() for tensor in inputs]
        with fused_ops.backend(backend):
            out = attentive_fusion(*inputs)
        results.append((out, *torch.autograd.grad(out, inputs, cotangent(out))))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize(
    ("name", "case", "target", "value"),
    [
        ("attentive_fusion", "plain", "y", "nan"),
        ("multi_level_fusion", "three", "maps.1", "inf"),
        ("multi_level_fusion", "three", "position_gates.1", "-inf"),
        ("multi_level_fusion", "three", "channel_gates.2", "nan"),
        ("render_scales", "three", "densities.0", "inf"),
    ],
)
def test_infinities_and_nan(name, case, target, value, device):
    """Non-finite inputs reach exactly the outputs and gradients that they reach in stock PyTorch."""
    arguments = make(case_named(case, name), torch.float32, device=device)
    with torch.no_grad():
        tensor = named_tensors(arguments)[target]
        tensor[(0,) * (tensor.dim() - 1)][2] = float(value)
    got = run(OPERATORS[name], arguments, "triton")
    for key, want in run(OPERATORS[name], convert(arguments), "reference").items():
        torch.testing.assert_close(got[key], want, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_weights_far_from_one_half(device):
    """Layers that are almost clear or almost opaque keep the relative accuracy of weights and gradients."""
    size = torch.tensor([1e-30, 1e-7, 1e-3, 0.1, 0.2499, 0.2501, 1.0, 15.0], device=device)
    ones = torch.ones(1, 1, 1, 16, device=device)
    both = torch.cat([size, -size])[None, None, None]
    vector = torch.tensor([[40.0]], device=device)
    calls = (
        (render_scales, lambda v: ((ones,), (v,))),
        (render_scales, lambda v: ((0 * ones, ones), (v, v.flip(3)))),
        (multi_level_fusion, lambda v: ((ones,), (v,), (vector,))),
        (multi_level_fusion, lambda v: ((ones, 0 * ones), (0 * v, v), (vector, -vector))),
    )
    for function, arguments in calls:
        results = []
        for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
            given = both.to(dtype).requires_grad_()
            with fused_ops.backend(backend):
                out = function(*([one.to(dtype) for one in part] for part in arguments(given)))
            results.append((out, *torch.autograd.grad(out, given, torch.ones_like(out))))
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one.double(), other, rtol=2e-6, atol=1e-37)


def test_a_weight_of_zero_has_no_density(device):
    """The sign of a density does not matter, and at zero the gradient is that of ``abs``."""
    density = torch.tensor([-2.0, 0.0, 2.0], device=device)[None, None, None].requires_grad_()
    x = torch.randn(1, 4, 1, 3, device=device)
    with fused_ops.backend("triton"):
        out = render_scales([x], [density])
    grad = torch.autograd.grad(out.sum(), density)[0].flatten()
    shares = 1 - torch.tensor([-2.0, float("-inf"), -2.0], device=device).exp()
    torch.testing.assert_close(out[0, :, 0], x[0, :, 0] * shares * torch.tensor([1, 0, 1], device=device))
    want = x.sum((0, 1, 2)) * torch.tensor([-1, 0, 1], device=device) * torch.tensor(-2.0).exp()
    torch.testing.assert_close(grad, want)


@pytest.mark.parametrize(
    ("name", "case"),
    [("attentive_fusion", "parts"), ("multi_level_fusion", "four"), ("render_scales", "five")],
)
def test_poisoned_memory_and_determinism(name, case, device):
    """C7, C8: two runs are equal to the bit, with every fresh allocation filled with NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        arguments = make(case_named(case, name), torch.float16, device=device)
        first, second = (run(OPERATORS[name], arguments, "triton") for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    for key, value in first.items():
        assert torch.isfinite(value).all(), key
        assert torch.equal(second[key], value), key


def test_canaries(device, monkeypatch):
    """Nothing is written beside an output: bands of known values around each stay as they were."""
    buffers = []
    band = 64

    def guarded(shape, like, *, dtype=None):
        plain = torch.empty(
            tuple(shape), dtype=dtype or like.dtype, memory_format=library.memory_format(like)
        )
        buffer = torch.full((plain.numel() + 2 * band,), 77.0, dtype=plain.dtype, device=device)
        buffers.append(buffer)
        return buffer.as_strided(plain.shape, plain.stride(), band)

    monkeypatch.setattr(library, "empty", guarded)
    arguments = make(case_named("parts", "attentive_fusion"), torch.float32, device=device)
    run(OPERATORS["attentive_fusion"], arguments, "triton")
    run(OPERATORS["multi_level_fusion"], levels((1, 7, 4, 6), 3, device), "triton")
    # Output, maps, gates of positions and the gates of channels.
    assert len(buffers) == (1 + 2 + 1 + 1) + (1 + 3 + 3 + 1)
    for buffer in buffers:
        assert (buffer[:band] == 77).all()
        assert (buffer[-band:] == 77).all()
        assert not (buffer[band:-band] == 77).any()


@pytest.mark.parametrize(
    ("name", "case", "sizes"),
    [("attentive_fusion", "plain", (1, 3)), ("multi_level_fusion", "one_pixel", (1,))],
)
def test_subsets_of_requires_grad(name, case, sizes, device):
    """C10: every subset of gradients equals the full set's, and nothing else is computed."""
    operator, case = OPERATORS[name], case_named(case, name)
    full = run(operator, make(case, torch.float32, device=device), "triton")
    names = [key.removeprefix("grad ") for key in full if key != "out"]
    maps = 2 if name == "attentive_fusion" else 3
    for subset in itertools.chain.from_iterable(itertools.combinations(names, size) for size in sizes):
        arguments = make(case, torch.float32, device=device)
        for key, tensor in named_tensors(arguments).items():
            tensor.requires_grad_(key in subset)
        with RecordCalls(operator.overloads[1:]) as recorded:
            got = run(operator, arguments, "triton")
        ((_, call),) = recorded.calls
        # Layers are counted from the finest map; channels' gates are one tensor.
        of_maps, of_gates, of_channels = call[-2][:5], call[-2][5:10], call[-2][10]
        order = 1 if maps == 2 else -1
        assert list(of_maps)[:maps][::order] == [key in subset for key in names[:maps]]
        gates = len(names[maps:]) // 2
        assert list(of_gates)[:gates][::order] == [key in subset for key in names[maps : maps + gates]]
        assert of_channels == any(key in subset for key in names[maps + gates :])
        assert set(got) == {"out", *(f"grad {key}" for key in subset)}
        for key in subset:
            # With other gradients the same sums may be taken in other parts.
            torch.testing.assert_close(got[f"grad {key}"], full[f"grad {key}"], rtol=1e-5, atol=1e-6)


def test_frozen_position_gates(device):
    """Sums per channel alone have longer parts, several here, of several tiles."""
    shape = (1, 3, 33, 16)
    maps = [torch.randn(shape, device=device).requires_grad_() for _ in range(3)]
    gates = [torch.randn(1, 1, 33, 16, device=device) for _ in range(3)]
    vectors = [torch.randn(1, 3, device=device).requires_grad_() for _ in range(3)]
    results = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        inputs = [[one.to(dtype) for one in part] for part in (maps, gates, vectors)]
        with fused_ops.backend(backend):
            out = multi_level_fusion(*inputs)
        results.append(torch.autograd.grad(out, [*inputs[0], *inputs[2]], cotangent(out)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5)


def test_little_is_kept_for_backward(device):
    """The maps and gates that came, and nothing of a map's size beside them."""
    arguments = make(case_named("three", "multi_level_fusion"), torch.float32, device=device)
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(kept.append, lambda tensor: tensor)
    with hooks, fused_ops.backend("triton"):
        multi_level_fusion(**arguments)
    given = {tensor.data_ptr() for tensor in (*arguments["maps"], *arguments["position_gates"])}
    assert {tensor.data_ptr() for tensor in kept if tensor is not None and tensor.dim() == 4} == given
    assert [tuple(tensor.shape) for tensor in kept if tensor is not None and tensor.dim() != 4] == [
        (2, 12, 3)
    ]


# Of derivatives and tracing


@pytest.mark.parametrize("name", ["attentive_fusion", "render_scales"])
def test_second_derivative_is_refused(name, device):
    """C9: a clear error, and the way that has one."""
    case = "plain" if name == "attentive_fusion" else "three"
    for backend in ("triton", "reference"):
        arguments = make(case_named(case, name), torch.float32, device=device)
        leaves = list(leaves_of(arguments).values())
        with fused_ops.backend(backend):
            out = OPERATORS[name].function(**arguments)
        (grad,) = torch.autograd.grad(out, leaves[0], cotangent(out), create_graph=True)
        if backend == "triton":
            with pytest.raises(RuntimeError, match="has no derivative of its own; for second"):
                grad.square().sum().backward()
        else:
            second = torch.autograd.grad(grad.square().sum(), leaves, allow_unused=True)
            assert any(value is not None and value.abs().max() > 0 for value in second)


@pytest.mark.parametrize(
    ("name", "case", "layout"),
    [
        ("attentive_fusion", "plain", "slice"),
        pytest.param("multi_level_fusion", "three", "channels_last", marks=pytest.mark.extended),
    ],
)
def test_opcheck(name, case, layout, device):
    """G3: schema, fake and autograd registration of the torch operators."""
    operator = OPERATORS[name]
    check_operators(operator, make(case_named(case, name), torch.float32, layout, device))
    with RecordCalls(operator.overloads[:1]) as recorded, fused_ops.backend("triton"):
        operator.function(**make(case_named(case, name), torch.float32, layout, device))
    ((forward, args),) = recorded.calls
    tracked = tuple(arg.detach().requires_grad_() if isinstance(arg, Tensor) else arg for arg in args)
    torch.library.opcheck(
        forward, tracked, test_utils=("test_autograd_registration", "test_aot_dispatch_static")
    )


def test_fake_and_meta_shapes():
    """Shapes, strides and dtypes without data, of the output and of the gradients."""
    case = case_named("three", "multi_level_fusion")
    arguments = make(case, torch.bfloat16, device="meta")
    out = multi_level_fusion(**arguments)
    assert (out.shape, out.dtype, out.is_meta) == ((2, 12, 4, 6), torch.bfloat16, True)
    assert out.is_contiguous(memory_format=torch.channels_last)
    require("triton", "cpu")
    with FakeTensorMode(), fused_ops.backend("triton"):
        arguments = make(case, torch.bfloat16)
        leaves = leaves_of(arguments)
        out = multi_level_fusion(**arguments)
        gradients = torch.autograd.grad(out.sum(), list(leaves.values()))
    assert out.is_contiguous(memory_format=torch.channels_last)
    for name, value in zip(leaves, gradients, strict=True):
        assert (value.shape, value.dtype) == (leaves[name].shape, torch.bfloat16), name
        if name.startswith("maps"):
            assert value.stride() == leaves[name].stride(), name


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Stack(torch.nn.Module):
    """A fusion whose arguments are sequences."""

    def forward(self, x: Tensor, y: Tensor, gate: Tensor, vector: Tensor) -> Tensor:
        return multi_level_fusion((x, y.sin()), (gate, -gate), (vector, vector.sin()))


def test_compiles_whole(device, fresh_compiler):
    """G1, G2, G4: one graph without a break for several sizes, forward and backward, with eager's results."""
    module = Stack()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, backend=counter, fullgraph=True, dynamic=True)
    with fused_ops.backend("triton"):
        for batch, height, width in ((3, 4, 5), (2, 6, 3)):
            shapes = ((batch, 6, height, width),) * 2 + ((batch, 1, height, width), (batch, 6))
            inputs = [torch.randn(shape, device=device).requires_grad_() for shape in shapes]
            results = []
            for function in (module, compiled):
                out = function(*inputs)
                results.append((out, *torch.autograd.grad(out, inputs, cotangent(out))))
            for one, other in zip(*results, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
                assert one.stride() == other.stride()
    assert counter.frame_count <= 2


@pytest.mark.gpu
def test_cuda_graph():
    """G5: captured on a side stream, replayed with other inputs."""
    require("triton", "cuda")
    arguments = make(case_named("plain", "attentive_fusion"), torch.float32, device="cuda")
    inputs = [tensor.detach() for tensor in arguments.values()]
    stream = torch.cuda.Stream()
    with torch.no_grad(), fused_ops.backend("triton"):
        with torch.cuda.stream(stream):
            for _ in range(3):
                attentive_fusion(*inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            out = attentive_fusion(*inputs)
        for _ in range(2):
            inputs[0].copy_(torch.randn_like(inputs[0]))
            graph.replay()
            torch.testing.assert_close(out, attentive_fusion(*inputs))


def test_flops():
    """G7: none, as of the stock composition."""
    require("triton", "cpu")
    for backend in ("reference", "triton"):
        arguments = make(case_named("plain", "attentive_fusion"), torch.float32)
        with fused_ops.backend(backend), FlopCounterMode(display=False) as counter:
            attentive_fusion(**arguments).sum().backward()
        assert counter.get_total_flops() == 0


def test_autocast(device):
    """D6: the result has the dtype of the first map; gates and other maps come in autocast's."""
    x = torch.randn(2, 6, 4, 5, device=device).requires_grad_()
    others = [
        torch.randn(size, device=device).requires_grad_() for size in ((2, 6, 4, 5), (2, 1, 4, 5), (2, 6))
    ]
    for backend in ("reference", "triton"):
        with torch.autocast(device, torch.bfloat16), fused_ops.backend(backend):
            out = attentive_fusion(x, *(tensor.bfloat16() for tensor in others))
            halves = multi_level_fusion([x, x.bfloat16()], [others[1], others[1].half()], [others[2]] * 2)
        assert (out.dtype, halves.dtype) == (torch.float32, torch.bfloat16)
        gradients = torch.autograd.grad(out.sum() + halves.float().sum(), [x, *others])
        assert {gradient.dtype for gradient in gradients} == {torch.float32}


def test_parameters_in_float32(device):
    """Gates in float32 beside maps in half precision: their gradients are float32."""
    arguments = make(case_named("plain", "attentive_fusion"), torch.bfloat16, device=device)
    for name in ("position_gate", "channel_gate"):
        arguments[name] = arguments[name].detach().float().requires_grad_()
    got = run(OPERATORS["attentive_fusion"], arguments, "triton")
    assert got["grad position_gate"].dtype == got["grad channel_gate"].dtype == torch.float32
    check(OPERATORS["attentive_fusion"], arguments, torch.bfloat16)


# Of arguments

X, GATE, VECTOR = torch.zeros(2, 4, 5, 6), torch.zeros(2, 1, 5, 6), torch.zeros(2, 4)
TWO = ([X, X], [GATE, GATE], [VECTOR, VECTOR])
BAD_FUSIONS = [
    ({"x": X[0]}, ValueError, r"x has 3 dimensions; it must be \(B, C, H, W\)"),
    ({"x": X[:, :0]}, ValueError, "channels, height and width must be at least 1"),
    ({"y": X[:1]}, ValueError, r"y has shape \(1, 4, 5, 6\); it must be that of x, \(2, 4, 5, 6\)"),
    ({"y": X.half()}, TypeError, "y is torch.float16 on cpu; it must be as x"),
    ({"y": X.to("meta")}, TypeError, "y is torch.float32 on meta; it must be as x"),
    ({"position_gate": GATE[:, 0]}, ValueError, r"position_gate has shape .* be \(2, 1, 5, 6\), one value"),
    ({"position_gate": GATE.half()}, TypeError, "position_gate has dtype torch.float16"),
    ({"channel_gate": VECTOR.T}, ValueError, r"channel_gate has shape \(4, 2\); it must be \(2, 4\), one"),
    ({"channel_gate": VECTOR.to("meta")}, ValueError, "channel_gate is on meta; it must be where x is"),
]
BAD_SEQUENCES = [
    (multi_level_fusion, (X, *TWO[1:]), TypeError, "maps is a Tensor; it must be a list or tuple of tensors"),
    (multi_level_fusion, ([], [], []), ValueError, "maps has 0 tensors; it must have 1 to 5"),
    (multi_level_fusion, ([X] * 6, *TWO[1:]), ValueError, "maps has 6 tensors; it must have 1 to 5"),
    (
        multi_level_fusion,
        (TWO[0], [GATE], TWO[2]),
        ValueError,
        "position_gates has 1 tensors; it must have 2",
    ),
    (
        multi_level_fusion,
        (*TWO[:2], [VECTOR]),
        ValueError,
        "channel_gates has 1 tensors; it must have 2, one",
    ),
    (multi_level_fusion, ([X[:1], X], *TWO[1:]), ValueError, r"maps\[0\] has shape .* that of maps\[1\]"),
    (multi_level_fusion, (TWO[0], [GATE, X], TWO[2]), ValueError, r"position_gates\[1\] has shape"),
    (render_scales, ([X, X.int()], TWO[1]), TypeError, r"predictions\[1\] is torch.int32 on cpu"),
    (render_scales, ([X.int()], [GATE]), TypeError, r"predictions\[0\] has dtype torch.int32"),
    (render_scales, ([X], [X]), ValueError, r"densities\[0\] has shape .* it must be \(2, 1, 5, 6\)"),
    (weighted_sum, ([X, X], GATE), TypeError, "weights is a Tensor; it must be a list or tuple of tensors"),
]


@pytest.mark.parametrize(("changes", "error", "message"), BAD_FUSIONS)
def test_bad_arguments_of_a_fusion_are_named(changes, error, message):
    """C11: an error that names the argument, the value and what is allowed, before anything runs."""
    with pytest.raises(error, match=message):
        attentive_fusion(**{"x": X, "y": X, "position_gate": GATE, "channel_gate": VECTOR, **changes})


@pytest.mark.parametrize(("function", "arguments", "error", "message"), BAD_SEQUENCES)
def test_bad_sequences_are_named(function, arguments, error, message):
    """C11, of the functions that take sequences."""
    with pytest.raises(error, match=message):
        function(*arguments)


def test_declined_calls_say_why():
    require("triton", "cpu")
    with (
        fused_ops.backend("triton"),
        pytest.raises(fused_ops.BackendUnavailableError, match=r"weighted_sum: .* x is torch\.float64"),
    ):
        weighted_sum([X.double()], [GATE.double()])


# Of traffic


@pytest.mark.parametrize(("operator", "case"), cases_of_all("traffic"))
def test_counted_bytes(operator, case):
    """What the kernels touch is at most a tenth above the least, in as many launches as are announced."""
    require("triton", "cpu")
    calls = []
    with calls_of(operator, calls):
        rows = operator_traffic(operator, "triton", case.name, lambda: make(case, torch.bfloat16))
    for direction in ("forward", "backward"):
        *launches, total = (row for row in rows if row["direction"] == direction)
        assert len(launches) == operator.launch_count(calls[0], direction)
        ratio = total["counted_bytes"] / total["least_bytes"]
        assert 1.0 <= ratio <= 1.10, f"{direction}: {ratio:.3f} times the least"
        assert total["counted_bytes"] <= total["block_bytes"] <= total["requested_bytes"]


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)
def test_partial_sums_weigh_little(operator):
    """On shapes too large to count: what parts write and read beside the least traffic."""
    for case in operator.cases():
        if not case.tags & {"model", "resources"}:
            continue
        calls = []
        with FakeTensorMode(), calls_of(operator, calls), fused_ops.backend("reference"):
            operator.function(**make(case, torch.bfloat16, case.layout))
        (call,) = calls
        needs = [tensor is not None for tensor in call.slots]
        parts = triton._aggregate_plan(call, needs).parts
        images, channels = call.x.shape[:2]
        extra = 2 * 4 * call.layers * images * channels * parts if needs[-1] and parts > 1 else 0
        assert extra <= 0.10 * operator.least_bytes(call, "backward"), case.name
