"""Gates: contract C1 to C11 and G1 to G7 beyond the cases that every operator runs.

Shapes are tiny: every program costs milliseconds in Triton's interpreter.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

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
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import fused_ops
from fused_ops.bench.traffic import calls_of, count_triton, operator_traffic
from fused_ops.blocks import gates
from fused_ops.core import library
from fused_ops.gate import (
    context_pool,
    gate_scale,
    pool_channels,
    pool_map,
    pool_positions,
    squeeze_excite,
    triton,
)

NAMES = ("gate_scale", "pool_channels", "pool_positions", "pool_map", "context_pool")
OPERATORS = {name: library.operators()[name] for name in NAMES}
POOLINGS = ("mean", "max", "entropy")


def cases_of_all(*tags: str, without: tuple[str, ...] = ()) -> list[Any]:
    return [param for name in NAMES for param in operator_cases(*tags, without=without, only=name)]


# Of the reference, against the definitions once more, in float64 and from nothing of the package


def pooled(values: Tensor, name: str, normalise: bool = True) -> Tensor:
    """One pooling over the last dimension."""
    if name == "mean":
        return values.sum(-1) / values.shape[-1]
    if name == "max":
        return values.sort(-1).values[..., -1]
    shares = values.softmax(-1)
    entropy = -torch.xlogy(shares, shares).sum(-1)
    return entropy / math.log(values.shape[-1]) if normalise and values.shape[-1] > 1 else entropy


def gated(logits: Tensor, gate: str) -> Tensor:
    if gate == "none":
        return logits
    return 1 / (1 + (-logits).exp()) if gate == "sigmoid" else (logits / 6 + 0.5).clamp(0, 1)


def oracle(operator: str, arguments: dict[str, Any]) -> Tensor:
    x = arguments["x"]
    gate, channel = arguments.get("gate", "sigmoid"), arguments.get("channel_gate")
    if operator == "context_pool":
        logits = torch.einsum("bchw,c->bhw", x, arguments["weight"].flatten()).flatten(1)
        return torch.einsum("bcp,bp->bc", x.flatten(2), logits.softmax(1))
    if operator == "gate_scale":
        position = arguments.get("position_gate")
        if arguments.get("combine") == "sum":
            out = x * gated(channel[:, :, None, None] + position, gate)
        else:
            out = x if channel is None else x * gated(channel, gate)[:, :, None, None]
            out = out if position is None else out * gated(position, gate)
        if "channel_add" in arguments:
            out = out + arguments["channel_add"][:, :, None, None]
        out = out + arguments.get("residual", 0)
        activation = arguments.get("activation", "none")
        return {"none": out, "relu": out.clamp(min=0), "silu": out / (1 + (-out).exp())}[activation]
    if channel is not None:
        x = x * gated(channel, gate)[:, :, None, None]
    if operator == "pool_map":
        normalise = arguments.get("normalise", True)
        found = [pooled(x.flatten(2), name, normalise) for name in arguments["channels"]]
        per_position = [pooled(x.movedim(1, -1), name, normalise) for name in arguments["positions"]]
        return torch.stack(found, 1), torch.stack(per_position, 1)
    values = x.flatten(2) if operator == "pool_channels" else x.movedim(1, -1)
    default = ("mean",) if operator == "pool_channels" else ("max", "mean")
    return torch.stack([pooled(values, name) for name in arguments.get("poolings", default)], 1)


@pytest.mark.parametrize(("operator", "case"), cases_of_all(without=("model", "traffic", "resources")))
def test_reference_is_the_definition(operator, case):
    arguments = make(case, torch.float64)
    if arguments["x"].numel():
        got = operator.function(**arguments)
        torch.testing.assert_close(got, oracle(operator.name, arguments), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "case"),
    [
        ("gate_scale", "all"),
        ("gate_scale", "cat"),
        ("pool_channels", "all"),
        ("pool_positions", "gated"),
        ("context_pool", "plain"),
    ],
)
def test_reference_gradcheck(name, case):
    arguments = make(case_named(case, name), torch.float64)
    cuts = {4: (1, 3, 2, 3), 2: (1, 3)}
    for key, value in arguments.items():
        if isinstance(value, Tensor) and value.dim() in cuts:
            cut = value[tuple(slice(size) for size in cuts[value.dim()])]
            arguments[key] = cut.detach().clone().requires_grad_()
    leaves = [tensor for tensor in named_tensors(arguments).values() if tensor.requires_grad]
    assert torch.autograd.gradcheck(lambda *_: OPERATORS[name].function(**arguments), leaves)


# Of the kernels


@pytest.fixture(params=DEVICES)
def device(request):
    require("triton", request.param)
    return request.param


def check(operator: str, arguments: dict[str, Any], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Output and gradients from Triton, held against float64 and against eager in the same precision."""
    got = run(OPERATORS[operator], arguments, "triton")
    exact = run(OPERATORS[operator], convert(arguments, torch.float64), "reference")
    eager = run(OPERATORS[operator], convert(arguments), "reference")
    assert_three_way(got, eager, exact, dtype)
    return got


@pytest.mark.parametrize(
    ("operator", "case"), cases_of_all(without=("tiny", "model", "traffic", "resources"))
)
def test_awkward_cases(operator, case, device):
    """One pixel, one channel, NCHW, several programs to a channel; an empty batch is declined."""
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
    check(operator.name, arguments)


@pytest.mark.parametrize(("shape", "normalise"), [((1, 5, 18, 16), True), ((2, 12, 4, 5), False)])
def test_pool_map(shape, normalise, device):
    """Poolings of channels and positions from one launch are those of two, and so are their gradients."""
    x = torch.randn(shape, device=device).contiguous(memory_format=torch.channels_last).requires_grad_()
    gate = torch.randn(shape[:2], device=device)
    with fused_ops.backend("triton"):
        channels, positions = pool_map(x, POOLINGS, POOLINGS, normalise=normalise)
        alone = pool_channels(x, POOLINGS, normalise=normalise)
        gated_alone = pool_positions(x, POOLINGS, channel_gate=gate, normalise=normalise)
        both = pool_map(x, ("mean",), POOLINGS, channel_gate=gate, normalise=normalise)
    others = pool_positions(x, POOLINGS, normalise=normalise)
    for part, one in ((channels, alone), (positions, others), (both[1], gated_alone)):
        torch.testing.assert_close(part, one, rtol=1e-5, atol=1e-5)
        want = torch.autograd.grad(one, x, cotangent(one))[0]
        got = torch.autograd.grad(part, x, cotangent(one), retain_graph=True)[0]
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("function", [pool_channels, pool_positions])
def test_ties_and_numbers_that_are_none(function, device):
    """The first of equal maxima gets the gradient; not-a-number is the largest; minus infinity a number."""
    x = torch.zeros(1, 3, 34, 32, device=device) if function is pool_channels else torch.zeros(1, 70, 1, 3)
    x = x.to(device)
    flat = x.flatten(2)[0] if function is pool_channels else x.flatten(2)[0].T
    last = flat.shape[1] - 1
    flat[0, [5, 9, last]] = 2.0
    flat[0, 3] = -0.0
    flat[1, [7, last]] = float("nan")
    flat[1, 2] = float("inf")
    flat[2] = float("-inf")
    x.requires_grad_()
    with fused_ops.backend("triton"):
        out = function(x, ("max", "mean"))
    torch.testing.assert_close(
        out.detach()[0].flatten(1),
        torch.stack([flat.max(1).values, flat.mean(1)]).detach(),
        equal_nan=True,
    )
    weights = torch.zeros_like(out)
    weights[0, 0] = 1.0
    (grad,) = torch.autograd.grad(out, x, weights)
    places = grad.flatten(2)[0] if function is pool_channels else grad.flatten(2)[0].T
    assert places.nonzero().tolist() == [[0, 5], [1, 7], [2, 0]]


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_infinities_and_nan(value, device):
    """Non-finite inputs reach exactly the outputs and gradients that they reach in stock PyTorch."""
    for name, case in (("gate_scale", "all"), ("pool_channels", "all"), ("pool_positions", "gated")):
        arguments = make(case_named(case, name), torch.float32, device=device)
        with torch.no_grad():
            arguments["x"][0, 1, 2, 2] = value
        got = run(OPERATORS[name], arguments, "triton")
        want = run(OPERATORS[name], convert(arguments), "reference")
        for key, tensor in want.items():
            torch.testing.assert_close(got[key], tensor, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_an_infinite_gate_stays_in_its_channel(device):
    """Tiles are wider than the map: what is outside must not become not-a-number."""
    x = torch.rand(1, 5, 3, 3, device=device) + 1
    gate = torch.tensor([[1.0, float("inf"), 0.0, -2.0, float("-inf")]], device=device)
    with fused_ops.backend("triton"):
        got = pool_map(x, ("mean", "max"), ("max",), channel_gate=gate, gate="none")
    want = pool_map(x, ("mean", "max"), ("max",), channel_gate=gate, gate="none")
    torch.testing.assert_close(got, want)


VIEWS = {
    "inner_window": lambda x: x[:, :, 1:-1, 2:],
    "second_channels": lambda x: x[:, ::2],
    "one_image": lambda x: x[:1].expand(2, -1, -1, -1),
    "transposed": lambda x: x.transpose(2, 3),
    "one_column": lambda x: x[..., 2:3],
    "constant": lambda x: x[:, :1, :1, :1].expand(2, 6, 4, 5),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_views(view, device):
    """C4: strides are honoured, of maps, of vectors, and of gradients."""
    base = torch.randn(2, 8, 6, 5, device=device).contiguous(memory_format=torch.channels_last)
    x, residual, grad = (view(tensor) for tensor in (base, base.sin().contiguous(), base.cos()))
    batch, channels, height, width = x.shape
    vector = torch.randn(channels, 2 * batch, device=device).T[::2]
    position = torch.randn(batch, 2, width, height, device=device)[:, 1:].transpose(2, 3)
    leaves = (x, vector, position, vector.flip(1), residual)
    results = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        inputs = [tensor.detach().to(dtype).requires_grad_() for tensor in leaves]
        if backend == "triton":
            inputs = [tensor.detach().requires_grad_() for tensor in leaves]
        with fused_ops.backend(backend):
            out = gate_scale(*inputs[:3], channel_add=inputs[3], residual=inputs[4], activation="relu")
            per_channel, per_position = pool_map(inputs[0], ("mean", "max"), ("mean", "entropy"))
            context = context_pool(inputs[0], inputs[1][:1, :, None, None])
        parts = (out, per_channel, per_position, context)
        incoming = [grad, *(torch.ones((), device=device).expand(part.shape) for part in parts[1:])]
        found = torch.autograd.grad(parts, inputs, [tensor.to(dtype) for tensor in incoming])
        results.append((*parts, *found))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


def test_gradients_expanded_from_a_sum(device):
    """C4: the gradient of ``.sum()`` has stride 0 everywhere."""
    for name, case in (("gate_scale", "cbam"), ("pool_positions", "gated"), ("context_pool", "plain")):
        arguments = make(case_named(case, name), torch.float32, device=device)
        exact = convert(arguments, torch.float64)
        with fused_ops.backend("triton"):
            out = OPERATORS[name].function(**arguments)
        leaves, wanted = (
            [tensor for tensor in named_tensors(given).values() if tensor.requires_grad]
            for given in (arguments, exact)
        )
        want = torch.autograd.grad(OPERATORS[name].function(**exact).sum(), wanted)
        for one, other in zip(torch.autograd.grad(out.sum(), leaves), want, strict=True):
            torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=2e-5)


def test_large_offsets(device):
    """C5: an image more than 2**31 elements into its buffer is read at the right place."""
    image = 2**30
    # On the CPU the pages in between are never touched, so they cost no memory.
    buffer = torch.empty(2 * image + 400, dtype=torch.float16, device=device)
    x = buffer.as_strided((3, 8, 6, 5), (image, 1, 40, 8))
    x.copy_(torch.randn(3, 8, 6, 5))
    logits, weight = torch.randn(3, 8, device=device).half(), torch.randn(1, 8, 1, 1, device=device)
    results = []
    for backend, dtype in (("triton", torch.float16), ("reference", torch.float64)):
        # The map itself, and a dense copy in float64.
        given = (x.detach() if dtype == torch.float16 else x.double()).requires_grad_()
        vector = logits.to(dtype).requires_grad_()
        with fused_ops.backend(backend):
            found = (
                gate_scale(given, vector, activation="relu"),
                pool_channels(given, POOLINGS),
                pool_positions(given, channel_gate=vector),
                context_pool(given, weight.to(dtype if dtype == torch.float64 else weight.dtype)),
            )
        leaves = (given, vector)
        gradients = [torch.autograd.grad(part, leaves, cotangent(part), allow_unused=True) for part in found]
        results.append((*found, *(value for pair in gradients for value in pair if value is not None)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=5e-3, atol=5e-3)


def test_exponentials_of_large_values(device):
    """Softmaxes shift by the largest value of all parts, wherever it is."""
    x = torch.randn(1, 3, 33, 32, device=device)
    x[:, :, 20] *= 300
    x[:, 1, :5] *= -3000
    weight = torch.tensor([2.0, -1.0, 3.0], device=device).view(1, 3, 1, 1)
    with fused_ops.backend("triton"):
        found = (pool_channels(x, ("entropy",)), pool_positions(x, ("entropy",)), context_pool(x, weight))
    want = (
        pool_channels(x.double(), ("entropy",)),
        pool_positions(x.double(), ("entropy",)),
        context_pool(x.double(), weight.double()),
    )
    for one, other in zip(found, want, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "case"),
    [
        ("gate_scale", "parts"),
        ("pool_channels", "parts"),
        ("pool_positions", "gated"),
        ("context_pool", "parts"),
    ],
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
    for name, case in (("gate_scale", "all"), ("pool_positions", "gated"), ("context_pool", "plain")):
        run(OPERATORS[name], make(case_named(case, name), torch.float32, device=device), "triton")
    # Of the scaling its output and five gradients, of the others those of the map and of a vector.
    assert len(buffers) == 6 + 2 + 2
    for buffer in buffers:
        assert (buffer[:band] == 77).all()
        assert (buffer[-band:] == 77).all()
        assert not (buffer[band:-band] == 77).any()


@pytest.mark.parametrize(
    ("name", "case", "names"),
    [
        ("gate_scale", "all", ("x", "channel_gate", "position_gate", "channel_add", "residual")),
        ("gate_scale", "cat", ("x", "channel_gate", "position_gate")),
        ("pool_positions", "gated", ("x", "channel_gate")),
        ("context_pool", "plain", ("x", "weight")),
    ],
)
def test_subsets_of_requires_grad(name, case, names, device):
    """C10: every subset of gradients equals the full set's, and nothing else is computed."""
    operator, case = OPERATORS[name], case_named(case, name)
    full = run(operator, make(case, torch.float32, device=device), "triton")
    for count in range(1, min(3, len(names))):
        for subset in itertools.combinations(names, count):
            arguments = make(case, torch.float32, device=device)
            for key, tensor in named_tensors(arguments).items():
                tensor.requires_grad_(key in subset)
            with RecordCalls(operator.overloads[1:]) as recorded:
                got = run(operator, arguments, "triton")
            needs = [list(call[-2])[: len(names)] for _, call in recorded.calls]
            assert needs == [[key in subset for key in names]]
            assert set(got) == {"out", *(f"grad {key}" for key in subset)}
            for key in subset:
                # With other gradients the same sums may be taken in other parts.
                torch.testing.assert_close(got[f"grad {key}"], full[f"grad {key}"], rtol=1e-5, atol=1e-5)


def kept_by(function, *tensors, **options) -> set[int]:
    """Addresses of what a call keeps for backward, apart from what is as small as a vector."""
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(kept.append, lambda tensor: tensor)
    with hooks, fused_ops.backend("triton"):
        out = function(*tensors, **options)
    assert out.requires_grad
    return {tensor.data_ptr() for tensor in kept if tensor is not None and tensor.numel() > 64}


def test_little_is_kept_for_backward(device):
    """Of maps the input alone, and the residual where an activation follows."""
    x, residual = torch.randn(2, 2, 8, 6, 7, device=device).requires_grad_().unbind(0)
    logits = torch.randn(2, 8, device=device, requires_grad=True)
    assert kept_by(gate_scale, x, logits, residual=residual) == {x.data_ptr()}
    both = {x.data_ptr(), residual.data_ptr()}
    assert kept_by(gate_scale, x, logits, residual=residual, activation="relu") == both
    assert kept_by(pool_channels, x, poolings=POOLINGS) == {x.data_ptr()}


def test_gradients_that_cost_nothing(device):
    """A mean's gradient is not in memory, a residual's without activation is the gradient that came."""
    x, residual = (torch.randn(2, 6, 5, 4, device=device, requires_grad=True) for _ in range(2))
    with fused_ops.backend("triton"):
        mean, out = pool_channels(x), gate_scale(x.detach(), mean_gate(x), residual=residual)
    operators = (OPERATORS["pool_channels"].overloads[1], OPERATORS["gate_scale"].overloads[1])
    with RecordCalls(operators) as recorded:
        (grad,) = torch.autograd.grad(mean, x, torch.ones_like(mean))
        given = torch.randn_like(out)
        (of_residual,) = torch.autograd.grad(out, residual, given)
    assert recorded.calls == []
    assert grad.stride()[2:] == (0, 0)
    torch.testing.assert_close(grad, torch.full_like(grad, 1 / 20))
    assert of_residual.data_ptr() == given.data_ptr()


def mean_gate(x: Tensor) -> Tensor:
    return x.detach().mean((2, 3))


# Of derivatives and tracing


@pytest.mark.parametrize(
    ("name", "case"),
    [("gate_scale", "cbam"), ("pool_channels", "all"), ("context_pool", "plain")],
)
def test_second_derivative_is_refused(name, case, device):
    """C9: a clear error, and the way that has one."""
    for backend in ("triton", "reference"):
        arguments = make(case_named(case, name), torch.float32, device=device)
        with fused_ops.backend(backend):
            out = OPERATORS[name].function(**arguments)
        (grad,) = torch.autograd.grad(out, arguments["x"], cotangent(out), create_graph=True)
        if backend == "triton":
            with pytest.raises(RuntimeError, match="has no derivative of its own; for second"):
                grad.square().sum().backward()
        else:
            leaves = [tensor for tensor in named_tensors(arguments).values() if tensor.requires_grad]
            second = torch.autograd.grad(grad.square().sum(), leaves, allow_unused=True)
            assert any(value is not None and value.abs().max() > 0 for value in second)


@pytest.mark.parametrize("layout", ["channels_last", "slice"])
@pytest.mark.parametrize(
    ("name", "case"),
    [
        ("gate_scale", "cbam"),
        ("pool_channels", "all"),
        ("pool_positions", "gated"),
        ("context_pool", "plain"),
    ],
)
def test_opcheck(name, case, layout, device):
    """G3: schema, fake and autograd registration of the torch operators."""
    operator = OPERATORS[name]
    arguments = make(case_named(case, name), torch.float32, layout, device)
    with RecordCalls(operator.overloads) as recorded, fused_ops.backend("triton"):
        out = operator.function(**arguments)
        leaves = [tensor for tensor in named_tensors(arguments).values() if tensor.requires_grad]
        torch.autograd.grad(out.sum(), leaves, allow_unused=True)
    assert [function for function, _ in recorded.calls] == list(operator.overloads)
    for function, args in recorded.calls:
        detached = tuple(arg.detach() if isinstance(arg, Tensor) else arg for arg in args)
        torch.library.opcheck(function, detached, test_utils=("test_schema", "test_faketensor"))
    forward, args = recorded.calls[0]
    tracked = tuple(arg.detach().requires_grad_() if isinstance(arg, Tensor) else arg for arg in args)
    torch.library.opcheck(
        forward, tracked, test_utils=("test_autograd_registration", "test_aot_dispatch_static")
    )


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


GATES = {
    "cbam": gates.CBAM,
    "eca": gates.ECA,
    "context": gates.GlobalContext,
    "context_avg_mul": lambda channels: gates.GlobalContext(channels, pooling="avg", fusions=("mul", "add")),
    "cat": gates.CollaborativeAttention,
    "sem": gates.SwitchableExcitation,
}


def awake(gate: torch.nn.Module) -> torch.nn.Module:
    """The gate with every parameter away from its start, some of which switch it off."""
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter) + 0.2)
    return gate


def maps(device: str, batch: int = 2, size: tuple[int, int] = (5, 6)) -> list[Tensor]:
    """A map of 16 channels and a shortcut."""
    return [
        torch.randn(batch, 16, *size, device=device)
        .contiguous(memory_format=torch.channels_last)
        .requires_grad_()
        for _ in range(2)
    ]


@pytest.mark.parametrize("kind", GATES.values(), ids=GATES)
def test_modules(kind, device):
    """The gate modules on the kernels: output and all gradients as by the definition in float64."""
    gate = awake(kind(16)).to(device)
    inputs = maps(device)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    with fused_ops.backend("triton"):
        out = gate(*inputs)
    got = torch.autograd.grad(out, [*inputs, *gate.parameters()], cotangent(out))
    assert out.is_contiguous(memory_format=torch.channels_last)
    gate = gate.double()
    want_out = gate(*exact)
    want = torch.autograd.grad(want_out, [*exact, *gate.parameters()], cotangent(out).double())
    torch.testing.assert_close(out.double(), want_out, rtol=1e-4, atol=1e-4)
    scale = max(gradient.abs().max().item() for gradient in want)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5 * scale)


# Reads of the branch: pooling, pooling of the scaled map for CBAM, scaling. One more for the shortcut.
READS = {"cbam": 4, "eca": 3, "context": 3, "context_avg_mul": 3, "cat": 3, "sem": 3}


@pytest.mark.parametrize("name", GATES)
def test_passes_over_the_maps(name):
    """Two reads and one write of the map, one read of the shortcut. CBAM's second pooling needs the first."""
    require("triton", "cpu")
    gate = awake(GATES[name](16))
    x, shortcut = maps("cpu", 1, (32, 32))
    with fused_ops.backend("triton"), torch.no_grad(), count_triton() as launches:
        gate(x, shortcut)
    ratio = sum(launch.counted_bytes for launch in launches) / (4 * x.numel())
    # Poolings of positions are written and read: two of them, or three, and one gate to 16 channels.
    small = {"cbam": 3 / 16, "cat": 4 / 16}.get(name, 0)
    assert READS[name] + 1 <= ratio <= (READS[name] + 1 + small) * 1.05


def test_compiles_whole(device, fresh_compiler):
    """G1, G2, G4: one graph without a break for several sizes, forward and backward, with eager's results."""
    gate = awake(gates.CBAM(16)).to(device).eval()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(gate, backend=counter, fullgraph=True, dynamic=True)
    with fused_ops.backend("triton"):
        for batch, size in ((3, (4, 5)), (2, (6, 3))):
            inputs = maps(device, batch, size)
            results = []
            for function in (gate, compiled):
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
    gate = awake(gates.CBAM(16)).cuda().eval()
    x, shortcut = (tensor.detach() for tensor in maps("cuda"))
    stream = torch.cuda.Stream()
    with torch.no_grad(), fused_ops.backend("triton"):
        with torch.cuda.stream(stream):
            for _ in range(3):
                gate(x, shortcut)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            out = gate(x, shortcut)
        for _ in range(2):
            x.copy_(torch.randn_like(x))
            graph.replay()
            torch.testing.assert_close(out, gate(x, shortcut))


def test_flops():
    """G7: as of the stock composition: none but the context's two products."""
    require("triton", "cpu")
    for name, case in (("gate_scale", "cbam"), ("pool_channels", "all"), ("context_pool", "plain")):
        counts = {}
        for names in (("x",), ("x", "weight"), ("weight",)):
            for backend in ("reference", "triton"):
                arguments = make(case_named(case, name), torch.float32)
                arguments.pop("bias", None)
                for key, tensor in named_tensors(arguments).items():
                    tensor.requires_grad_(key in names)
                leaves = [tensor for tensor in named_tensors(arguments).values() if tensor.requires_grad]
                if not leaves:
                    continue
                with fused_ops.backend(backend), FlopCounterMode(display=False) as forward:
                    out = OPERATORS[name].function(**arguments)
                with FlopCounterMode(display=False) as backward:
                    torch.autograd.grad(out, leaves, torch.ones_like(out))
                counts[backend, names] = (forward.get_total_flops(), backward.get_total_flops())
        for (_, names), count in counts.items():
            assert count == counts["reference", names]
            assert (count[0] > 0) == (count[1] > 0) == (name == "context_pool")


def test_autocast(device):
    """D6: maps keep their dtype, as in PyTorch's own elementwise operators; gates come in autocast's."""
    gate = awake(gates.CollaborativeAttention(16)).to(device)
    for backend in ("reference", "triton"):
        x, shortcut = maps(device)
        with torch.autocast(device, torch.bfloat16), fused_ops.backend(backend):
            out = gate(x, shortcut)
            halves = gate(x.bfloat16(), shortcut)
        assert (out.dtype, halves.dtype) == (torch.float32, torch.bfloat16)
        leaves = [x, shortcut, *gate.parameters()]
        gradients = torch.autograd.grad(out.sum() + halves.float().sum(), leaves)
        assert {gradient.dtype for gradient in gradients} == {torch.float32}


# Of squeeze-and-excitation


def test_squeeze_excite_of_timm(device):
    blocks = pytest.importorskip("timm.models._efficientnet_blocks")
    stock = blocks.SqueezeExcite(16, rd_ratio=0.25, gate_layer="hard_sigmoid").to(device)
    x, shortcut = maps(device)
    parameters = [
        tensor for layer in (stock.conv_reduce, stock.conv_expand) for tensor in (layer.weight, layer.bias)
    ]
    with fused_ops.backend("triton"):
        out = squeeze_excite(x, *parameters, gate="hard_sigmoid")
        ended = squeeze_excite(x, *parameters, gate="hard_sigmoid", residual=shortcut, activation="relu")
    want = stock(x)
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ended, F.relu(want + shortcut), rtol=1e-5, atol=1e-5)
    got, wanted = (torch.autograd.grad(y, [x, *parameters], cotangent(y)) for y in (out, want))
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_squeeze_excite_of_torchvision(device):
    ops = pytest.importorskip("torchvision.ops")
    stock = ops.SqueezeExcitation(16, 8, activation=torch.nn.SiLU).to(device)
    x, _ = maps(device)
    with fused_ops.backend("triton"):
        out = squeeze_excite(
            x, stock.fc1.weight, stock.fc1.bias, stock.fc2.weight, stock.fc2.bias, hidden_activation="silu"
        )
    torch.testing.assert_close(out, stock(x), rtol=1e-5, atol=1e-5)


# Of arguments

X = torch.zeros(2, 4, 5, 6)
BAD_ARGUMENTS = [
    (gate_scale, (torch.zeros(4, 5, 5),), {}, ValueError, r"x has 3 dimensions; it must be \(B, C, H, W\)"),
    (gate_scale, (X.int(),), {}, TypeError, "x has dtype torch.int32"),
    (gate_scale, (X[:, :0],), {}, ValueError, r"x has shape \(2, 0, 5, 6\); channels, height and width"),
    (gate_scale, (X, torch.zeros(2, 3)), {}, ValueError, r"channel_gate has shape \(2, 3\); it must be"),
    (gate_scale, (X, torch.zeros(2, 4).half()), {}, TypeError, "channel_gate has dtype torch.float16"),
    (gate_scale, (X, None, torch.zeros(2, 5, 6)), {}, ValueError, r"it must be \(2, 1, 5, 6\), one logit"),
    (gate_scale, (X,), {"channel_add": torch.zeros(1, 4)}, ValueError, "channel_add has shape"),
    (gate_scale, (X,), {"residual": X[:1]}, ValueError, r"residual has shape \(1, 4, 5, 6\)"),
    (gate_scale, (X,), {"residual": X.half()}, TypeError, "residual is torch.float16"),
    (gate_scale, (X,), {"residual": X.to("meta")}, TypeError, "on meta; it must be as x"),
    (gate_scale, (X,), {"gate": "tanh"}, ValueError, "gate='tanh' is unknown; use one of sigmoid"),
    (gate_scale, (X,), {"combine": "mean"}, ValueError, "combine='mean' is unknown; use one of product, sum"),
    (gate_scale, (X,), {"combine": "sum"}, ValueError, "combine='sum' needs both channel_gate and"),
    (gate_scale, (X,), {"activation": "swish"}, ValueError, "activation='swish' is unknown"),
    (pool_channels, (X, "mean"), {}, ValueError, "poolings='mean' is not allowed; it must name"),
    (pool_channels, (X, ("max", "max")), {}, ValueError, "is not allowed; it must name some of .* once"),
    (pool_channels, (X, ()), {}, ValueError, r"poolings=\(\) is not allowed"),
    (pool_positions, (X, ("std",)), {}, ValueError, "one of poolings='std' is unknown; use one of mean"),
    (pool_positions, (X,), {"channel_gate": torch.zeros(4)}, ValueError, r"channel_gate has shape \(4,\)"),
    (pool_map, (X, ("mean",), ()), {}, ValueError, r"positions=\(\) is not allowed"),
    (context_pool, (X, torch.zeros(4)), {}, ValueError, r"weight has shape \(4,\); it must be \(1, 4"),
    (context_pool, (X, torch.zeros(1, 4, 1, 1), torch.zeros(4)), {}, ValueError, r"bias has shape \(4,\)"),
]  # fmt: skip


@pytest.mark.parametrize(("function", "arguments", "options", "error", "message"), BAD_ARGUMENTS)
def test_bad_arguments_are_named(function, arguments, options, error, message):
    """C11: an error that names the argument, the value and what is allowed, before anything runs."""
    with pytest.raises(error, match=message):
        function(*arguments, **options)


def test_declined_calls_say_why():
    require("triton", "cpu")
    with (
        fused_ops.backend("triton"),
        pytest.raises(fused_ops.BackendUnavailableError, match=r"gate_scale: .* x is torch\.float64"),
    ):
        gate_scale(X.double())


# Of traffic


@pytest.mark.parametrize(
    ("operator", "case", "layout"),
    [
        *(pytest.param(*param.values, "channels_last", id=param.id) for param in cases_of_all("traffic")),
        (OPERATORS["pool_channels"], case_named("traffic_all", "pool_channels"), "nchw"),
    ],
)
def test_counted_bytes(operator, case, layout):
    """What the kernels touch is at most a tenth above the least, in as many launches as are announced."""
    require("triton", "cpu")
    calls = []
    with calls_of(operator, calls):
        rows = operator_traffic(operator, "triton", case.name, lambda: make(case, torch.bfloat16, layout))
    for direction in ("forward", "backward"):
        *launches, total = (row for row in rows if row["direction"] == direction)
        assert len(launches) == operator.launch_count(calls[0], direction)
        ratio = total["counted_bytes"] / total["least_bytes"]
        assert 1.0 <= ratio <= 1.10, f"{direction}: {ratio:.3f} times the least"
        assert total["counted_bytes"] <= total["block_bytes"] <= total["requested_bytes"]


def partial_sums(operator: str, call: Any) -> tuple[str, int, int]:
    """The direction that has parts, how many of them, and the floats of each per channel of an image."""
    if operator == "context_pool":
        return "forward", triton._context_plan(call).parts, 1
    if operator == "gate_scale":
        needs = [True, *(tensor is not None for tensor in call.tensors()[1:])]
        return "backward", triton._scale_plan(call, needs).parts, needs[1] + needs[3]
    if operator == "pool_positions":
        return "backward", triton._pool_backward_plan(call).parts, 1
    floats = {"mean": {"total"}, "max": {"largest", "at"}, "entropy": {"largest", "weight", "moment"}}
    wanted = set().union(*(floats[name] for name in call.channel_poolings))
    return "forward", triton._pool_plan(call).parts, len(wanted)


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)
def test_partial_sums_of_model_cases_weigh_little(operator):
    """On shapes too large to count: what parts write and read beside the least traffic."""
    for case in operator.cases():
        if "model" not in case.tags:
            continue
        calls = []
        with FakeTensorMode(), calls_of(operator, calls), fused_ops.backend("reference"):
            operator.function(**make(case, torch.bfloat16, case.layout))
        direction, parts, floats = partial_sums(operator.name, calls[0])
        images, channels = calls[0].x.shape[:2]
        extra = 2 * 4 * floats * images * channels * parts if parts > 1 else 0
        # Poolings of channels beside those of positions have parts of 256 positions, 28x28 of them in four.
        bound = 0.102 if operator.name == "pool_map" else 0.10
        assert extra <= bound * operator.least_bytes(calls[0], direction), case.name
