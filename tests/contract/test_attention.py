"""Attention with few keys: contract C1 to C11 and G1 to G7 beyond the cases that every operator runs.

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
from fused_ops.attention import op, reference, triton
from fused_ops.bench.traffic import operator_traffic
from fused_ops.core import backends, library, tuning
from fused_ops.core.dropout import philox

OPERATOR = library.operators()["attention"]
attention = fused_ops.few_key_attention


def oracle(arguments: dict[str, Any]) -> Tensor:
    """The definition once more, in float64 and per head and image, from nothing of the package."""
    query, key, value = (arguments[name].double() for name in ("query", "key", "value"))
    bias, mask = arguments.get("bias"), arguments.get("key_mask")
    batch, queries, heads, head_dim = query.shape
    rows = []
    for image, head in itertools.product(range(batch), range(heads)):
        scores = query[image, :, head] @ key[image, :, head].T
        scores = scores * (arguments.get("scale") or head_dim**-0.5)
        if bias is not None:
            scores = scores + bias[head if bias.shape[0] > 1 else 0].double()
        taken = torch.ones(key.shape[1], dtype=torch.bool) if mask is None else mask[image]
        weights = torch.zeros_like(scores)
        if taken.any():
            weights[:, taken] = torch.softmax(scores[:, taken], -1)
        rows.append(weights @ value[image, :, head])
    return torch.stack(rows).view(batch, heads, queries, head_dim).transpose(1, 2)


def arguments_of(
    shape: tuple[int, int, int, int, int], device: str = "cpu", dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """Random dense arguments for (B, N, Nk, heads, d)."""
    generator = torch.Generator().manual_seed(5)
    batch, queries, keys, heads, head_dim = shape

    def tensor(count: int) -> Tensor:
        values = torch.randn(batch, count, heads, head_dim, generator=generator)
        return values.to(device, dtype).requires_grad_()

    return {"query": tensor(queries), "key": tensor(keys), "value": tensor(keys)}


# Of the reference


@pytest.mark.parametrize(("operator", "case"), operator_cases("tiny", only="attention"))
def test_reference_is_the_definition(operator, case):
    arguments = make(case, torch.float64)
    dropout = {"dropout": arguments.pop("dropout", 0.0), "seed": arguments.pop("seed", None)}
    want = oracle(arguments)
    torch.testing.assert_close(attention(**arguments), want, rtol=1e-12, atol=1e-12)
    if dropout["seed"] is not None:
        # A seed takes the path that is not PyTorch's own attention.
        seeded = attention(**arguments, dropout=1e-12, seed=dropout["seed"])
        torch.testing.assert_close(seeded, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", ["head_24", "masked_shared_bias", "dropout_masked_bias"])
def test_reference_gradcheck(name):
    arguments = make(case_named(name, "attention"), torch.float64)
    for key in ("query", "key", "value"):
        arguments[key] = arguments[key][:, :4, :, :3].detach().requires_grad_()
    if "bias" in arguments:
        arguments["bias"] = arguments["bias"][:, :4, :4].detach().requires_grad_()
    if "key_mask" in arguments:
        arguments["key_mask"] = arguments["key_mask"][:, :4]
    leaves = [tensor for tensor in named_tensors(arguments).values() if tensor.requires_grad]
    assert torch.autograd.gradcheck(lambda *_: attention(**arguments), leaves, nondet_tol=0.0)


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, -1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0x299F31D0 << 32) | 0xA4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, words):
    """Vectors of Random123, the generator's original library."""
    got = philox(torch.tensor(key), *(torch.tensor([word]) for word in counter))
    assert tuple(int(word) for word in got) == words


@pytest.mark.parametrize("masked", [False, True])
def test_the_definition_and_sdpa_agree(masked):
    """A query without keys gets zeros from both, and zero gradients."""
    arguments = make(case_named("masked_shared_bias", "attention"), torch.float64)
    bias = arguments["bias"].detach().clone()
    bias[:, 4] = float("-inf")
    inputs = [arguments["query"], arguments["key"], arguments["value"], bias.requires_grad_()]
    mask = arguments["key_mask"] if masked else None
    found = []
    for function in (reference.attention, reference.sdpa):
        out = function(*inputs, mask, scale=0.3)
        found.append((out, *torch.autograd.grad(out, inputs, cotangent(out))))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    for value in found[0][:2]:
        assert value[:, 4].abs().max() == 0
        assert not masked or value[-1].abs().max() == 0


# Of the kernels


@pytest.fixture(params=DEVICES)
def device(request):
    require("triton", request.param)
    return request.param


@pytest.mark.parametrize("name", ["plain", "head_40_bias"])
def test_maps_in_nchw(name, device):
    """Views of an NCHW map: a token's channels lie apart in memory."""
    arguments = make(case_named(name, "attention"), torch.float32, "nchw", device)
    assert arguments["query"].stride(3) > 1
    exact = run(OPERATOR, convert(arguments, torch.float64), "reference")
    eager = run(OPERATOR, convert(arguments), "reference")
    assert_three_way(run(OPERATOR, arguments, "triton"), eager, exact, torch.float32)


@pytest.mark.parametrize("head_dim", [1, 16, 24, 33, 128])
def test_widths_of_heads(head_dim, device):
    arguments = arguments_of((1, 17, 6, 2, head_dim), device)
    exact = run(OPERATOR, convert(arguments, torch.float64), "reference")
    eager = run(OPERATOR, convert(arguments), "reference")
    assert_three_way(run(OPERATOR, arguments, "triton"), eager, exact, torch.float32)


def test_the_largest_tile_of_keys(device):
    arguments = arguments_of((1, 20, 256, 1, 16), device)
    arguments["key_mask"] = torch.rand(1, 256, device=device) < 0.9
    exact = run(OPERATOR, convert(arguments, torch.float64), "reference")
    eager = run(OPERATOR, convert(arguments), "reference")
    assert_three_way(run(OPERATOR, arguments, "triton"), eager, exact, torch.float32)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_parts_share_the_queries_of_a_head(dropout, device):
    """More than one program per head: partial gradients of keys and values are added up."""
    arguments = arguments_of((1, 1100, 5, 2, 8), device)
    if dropout:
        arguments |= {"dropout": dropout, "seed": torch.tensor([3, 4], device=device)}
    extras = " with bias or dropout" if dropout else ""
    with (
        tuning.force(f"attention_forward 32-bit{extras}", (256, 4, 1)),
        tuning.force(f"attention_backward 32-bit{extras}", (256, 4, 1)),
    ):
        results = [run(OPERATOR, arguments, "triton") for _ in range(2)]
        query = arguments["query"]
        query.requires_grad_(False)
        only_value = dict(arguments, key=arguments["key"].detach())
        alone = run(OPERATOR, only_value, "triton")
        query.requires_grad_(True)
    assert triton.backward_plan(2, 1100, 5, 8, (256, 4, 1)).parts == 2
    exact = run(OPERATOR, convert(arguments, torch.float64), "reference")
    eager = run(OPERATOR, convert(arguments), "reference")
    assert_three_way(results[0], eager, exact, torch.float32)
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name
    assert torch.equal(alone["grad value"], results[0]["grad value"])


def test_queries_without_keys(device):
    """Zeros and zero gradients, whether a mask or a bias of minus infinity leaves a query no key."""
    arguments = arguments_of((2, 18, 7, 2, 8), device)
    mask = torch.ones(2, 7, dtype=torch.bool, device=device)
    mask[1] = False
    bias = torch.zeros(1, 18, 7, device=device)
    bias[:, 4] = float("-inf")
    bias[:, 5, 2:] = float("-inf")
    got = run(OPERATOR, dict(arguments, key_mask=mask, bias=bias), "triton")
    for name in ("out", "grad query"):
        assert got[name][1].abs().max() == 0
        assert got[name][:, 4].abs().max() == 0
    assert got["grad key"][1].abs().max() == got["grad value"][1].abs().max() == 0
    want = oracle({name: value.detach().cpu() for name, value in arguments.items()} | {"bias": bias.cpu()})
    rows = [row for row in range(18) if row != 4]
    torch.testing.assert_close(got["out"][0, rows].double().cpu(), want[0, rows], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_infinities_and_nan(value, device):
    """Non-finite inputs reach exactly the outputs that they reach in the definition.

    PyTorch's own attention for the CPU gives zeros to a query that is not a number.
    """
    for name in ("query", "key", "value"):
        arguments = arguments_of((2, 9, 5, 2, 8), device)
        with torch.no_grad():
            arguments[name][0, 2, 1, 3] = value
        with torch.no_grad():
            want = reference.attention(**arguments, scale=8**-0.5)
        got = run(OPERATOR, arguments, "triton", gradients=False)["out"]
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, 1:-1],
        lambda x: x[..., ::2],
        lambda x: x[:1].expand(2, -1, -1, -1),
        lambda x: x.transpose(1, 2),
        lambda x: x[:, :1].expand(-1, 9, -1, -1),
    ],
    ids=["inner_tokens", "second_channels", "one_image", "heads_outside", "one_token"],
)
def test_views(view, device):
    """C4: strides are honoured, of inputs and of the output's gradient."""
    base = torch.randn(2, 8, 8, 8, device=device)
    tensors = [view(base + i).detach().requires_grad_() for i in range(3)]
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    with fused_ops.backend("triton"):
        out = attention(*tensors)
    want = attention(*exact)
    grad = view(torch.randn(2, 8, 8, 8, device=device))
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)
    got = torch.autograd.grad(out, tensors, grad)
    for one, other in zip(got, torch.autograd.grad(want, exact, grad.double()), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)


def test_large_offsets(device):
    """C5: an image more than 2**31 elements into its buffer is read at the right place."""
    image = 2**30
    # On the CPU the pages in between are never touched, so they cost no memory.
    buffer = torch.empty(2 * image + 400, dtype=torch.float16, device=device)
    query = buffer.as_strided((3, 6, 2, 8), (image, 16, 8, 1))
    query.copy_(torch.randn(3, 6, 2, 8))
    key, value = torch.randn(2, 3, 5, 2, 8, device=device).half()
    with fused_ops.backend("triton"):
        out = attention(query, key, value)
    want = oracle({"query": query.cpu(), "key": key.cpu(), "value": value.cpu()})
    torch.testing.assert_close(out.cpu().double(), want, rtol=2e-3, atol=2e-3)


def test_poisoned_memory_and_determinism(device):
    """C7, C8: two runs are equal to the bit, with every fresh allocation filled with NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        arguments = make(case_named("dropout_masked_bias", "attention"), torch.float16, device=device)
        first, second = (run(OPERATOR, arguments, "triton") for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    for name, value in first.items():
        assert torch.isfinite(value).all(), name
        assert torch.equal(second[name], value), name


def test_canaries(device, monkeypatch):
    """Nothing is written beside an output: bands of known values around each stay as they were."""
    buffers = []
    band = 64

    def guarded(shape, like):
        plain = torch.empty(tuple(shape), dtype=like.dtype, device=like.device)
        buffer = torch.full((plain.numel() + 2 * band,), 77.0, dtype=plain.dtype, device=plain.device)
        buffers.append(buffer)
        return buffer.as_strided(plain.shape, plain.stride(), band)

    monkeypatch.setattr(op, "_empty", guarded)
    run(OPERATOR, make(case_named("head_40_bias", "attention"), torch.float32, device=device), "triton")
    assert len(buffers) == 5
    for buffer in buffers:
        assert (buffer[:band] == 77).all()
        assert (buffer[-band:] == 77).all()
        assert not (buffer[band:-band] == 77).any()


NAMES = ("query", "key", "value", "bias")


def test_subsets_of_requires_grad(device):
    """C10: every subset of gradients equals the full set's, and nothing else is computed."""
    case = case_named("head_40_bias", "attention")
    full = run(OPERATOR, make(case, torch.float32, device=device), "triton")
    for count in (1, 2, 3):
        for subset in itertools.combinations(NAMES, count):
            arguments = make(case, torch.float32, device=device)
            for name in NAMES:
                arguments[name].requires_grad_(name in subset)
            with RecordCalls(OPERATOR.overloads[1:]) as recorded:
                got = run(OPERATOR, arguments, "triton")
            assert [list(call[-2]) for _, call in recorded.calls] == [[name in subset for name in NAMES]]
            assert set(got) == {"out", *(f"grad {name}" for name in subset)}
            for name in subset:
                assert torch.equal(got[f"grad {name}"], full[f"grad {name}"]), (subset, name)


def test_only_the_inputs_are_kept(device):
    """Neither the output nor anything of its size is kept for backward."""
    arguments = arguments_of((1, 20, 5, 1, 8), device)
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(kept.append, lambda tensor: tensor)
    with hooks, fused_ops.backend("triton"):
        attention(**arguments)
    addresses = {tensor.data_ptr() for tensor in arguments.values()}
    assert {tensor.data_ptr() for tensor in kept if tensor is not None} == addresses


# Of dropout


def dropped_weights(device, seed=None, backend="triton"):
    """Attention weights before and after dropout: with the unit matrix as values they are the output."""
    generator = torch.Generator(device).manual_seed(2)
    query = torch.randn(2, 96, 1, 16, device=device, generator=generator)
    key = torch.randn(2, 16, 1, 16, device=device, generator=generator)
    value = torch.eye(16, device=device).expand(2, 16, 16)[:, :, None]
    with fused_ops.backend(backend), torch.no_grad():
        plain = attention(query, key, value)
        return plain, attention(query, key, value, dropout=0.3, seed=seed)


def test_dropout_drops_as_often_as_it_says(device):
    """Share of the dropped weights, mean of the result, and the scale of those kept."""
    torch.manual_seed(1)
    plain, out = dropped_weights(device)
    kept = out != 0
    count = kept.numel()
    # Four standard deviations of a share of 3,072 weights.
    assert abs(kept.double().mean() - 0.7) < 4 * (0.7 * 0.3 / count) ** 0.5
    torch.testing.assert_close(out[kept], plain[kept] / 0.7, rtol=1e-5, atol=1e-6)
    deviation = (out / plain - 1).double()
    assert abs(deviation.mean()) < 4 * (0.3 / 0.7 / count) ** 0.5
    assert abs(deviation.var() - 0.3 / 0.7) < 0.05
    # Rows and columns are dropped independently: no key and no query stands out.
    for dimension in (1, 3):
        share = kept.double().mean(tuple(d for d in range(4) if d != dimension))
        rows = count / share.numel()
        assert (share - 0.7).abs().max() < 5 * (0.21 / rows) ** 0.5


def test_dropout_seeds(device):
    """PyTorch's generator decides where no seed is given; a given one repeats, on every backend."""
    torch.manual_seed(3)
    first, second = dropped_weights(device)[1], dropped_weights(device)[1]
    torch.manual_seed(3)
    again = dropped_weights(device)[1]
    assert torch.equal(first, again)
    assert not torch.equal(first != 0, second != 0)
    masks = []
    for key, offset in ((11, 0), (11, 1), (12, 0), (11 + 2**40, 0)):
        seed = torch.tensor([key, offset], device=device)
        masks.append(dropped_weights(device, seed)[1] != 0)
        assert torch.equal(masks[-1], dropped_weights(device, seed, "reference")[1] != 0)
    for one, other in itertools.combinations(masks, 2):
        assert 0.4 < (one == other).double().mean() < 0.75


def test_dropout_is_the_same_backward(device):
    """Without a given seed: the weights that forward kept are those that backward used."""
    torch.manual_seed(5)
    query = torch.randn(1, 33, 1, 16, device=device, requires_grad=True)
    key = torch.randn(1, 16, 1, 16, device=device)
    value = torch.eye(16, device=device)[None, :, None].clone().requires_grad_()
    with fused_ops.backend("triton"):
        out = attention(query, key, value, dropout=0.4)
    grad = torch.randn_like(out)
    query_grad, value_grad = torch.autograd.grad(out, (query, value), grad)
    dropped = out.detach()[0, :, 0].double()
    want = dropped.T @ grad[0, :, 0].double()
    torch.testing.assert_close(value_grad[0, :, 0].double(), want, rtol=1e-4, atol=1e-5)
    factor = (dropped != 0).double() / 0.6
    weights = torch.softmax(query.detach()[0, :, 0].double() @ key[0, :, 0].double().T / 4, -1)
    weight_grad = grad[0, :, 0].double() * factor
    score_grad = weights * (weight_grad - (weights * weight_grad).sum(-1, keepdim=True))
    want = score_grad @ key[0, :, 0].double() / 4
    torch.testing.assert_close(query_grad[0, :, 0].double(), want, rtol=1e-4, atol=1e-5)


# Of derivatives, tracing and choice


@pytest.mark.parametrize("name", ["masked_shared_bias", "dropout"])
def test_second_derivative(name, device):
    """C9: a gradient penalty gets the definition's second derivatives, and the backward operator says no."""

    def penalty(arguments):
        leaves = [tensor for tensor in named_tensors(arguments).values() if tensor.requires_grad]
        out = attention(**arguments)
        (grad,) = torch.autograd.grad(out, arguments["query"], cotangent(out), create_graph=True)
        return torch.autograd.grad(grad.square().sum(), leaves)

    arguments = make(case_named(name, "attention"), torch.float32, device=device)
    exact = convert(arguments, torch.float64)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        want = penalty(exact)
    with fused_ops.backend("triton"):
        got = penalty(arguments)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))


def test_backward_operator_is_once_differentiable(device):
    tensors = [tensor.detach() for tensor in arguments_of((1, 4, 3, 1, 8), device).values()]
    grad = torch.randn(1, 4, 1, 8, device=device, requires_grad=True)
    needs = [True, True, True, False]
    found = op.OPERATOR.overloads[1](grad, *tensors, None, None, None, 1.0, 0.0, needs, "triton")
    with pytest.raises(RuntimeError, match="attention_backward is differentiable only through"):
        found[0].sum().backward()


@pytest.mark.parametrize("layout", ["channels_last", "slice"])
def test_opcheck(layout, device):
    """G3: schema, fake and autograd registration of the torch operators."""
    arguments = make(case_named("dropout_masked_bias", "attention"), torch.float32, layout, device)
    with RecordCalls(OPERATOR.overloads) as recorded, fused_ops.backend("triton"):
        out = attention(**arguments)
        torch.autograd.grad(out.sum(), [arguments[name] for name in NAMES])
    assert [function for function, _ in recorded.calls] == list(OPERATOR.overloads)
    for function, args in recorded.calls:
        detached = tuple(arg.detach() if isinstance(arg, Tensor) else arg for arg in args)
        torch.library.opcheck(function, detached, test_utils=("test_schema", "test_faketensor"))
    forward, args = recorded.calls[0]
    tracked = (*(arg.detach().requires_grad_() for arg in args[:4]), *args[4:])
    torch.library.opcheck(
        forward, tracked, test_utils=("test_autograd_registration", "test_aot_dispatch_static")
    )


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["plain", "dropout"])
def test_compiles_whole(name, device, fresh_compiler):
    """G1, G4: one graph without a break, forward and backward, with eager's results."""
    eager = run(OPERATOR, make(case_named(name, "attention"), torch.float32, device=device), "triton")
    arguments = make(case_named(name, "attention"), torch.float32, device=device)
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    with fused_ops.backend("triton"):
        out = compiled(**arguments)
    leaves = [arguments[name] for name in NAMES[:3]]
    found = dict(zip(NAMES, torch.autograd.grad(out, leaves, cotangent(out)), strict=False))
    torch.testing.assert_close(out, eager["out"], rtol=0, atol=0)
    for key, value in found.items():
        torch.testing.assert_close(value, eager[f"grad {key}"], rtol=0, atol=0)


def test_compiled_dropout_draws_anew(device, fresh_compiler):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attention, backend=counter, fullgraph=True)
    masks = []
    with fused_ops.backend("triton"):
        for batch in (4, 3, 2):
            arguments = arguments_of((batch, 6, 5, 1, 8), device)
            out = compiled(**arguments, dropout=0.5)
            out.sum().backward()
            again = compiled(**arguments, dropout=0.5)
            masks.append(torch.equal(out, again))
    assert masks == [False] * 3
    assert counter.frame_count <= 2


@pytest.mark.parametrize("backend", ["triton", "auto"])
def test_compiles_for_any_number_of_keys(backend, fresh_compiler):
    """G2: one graph for several resolutions, below 256 keys and (here for `auto`) above."""
    require("triton", "cpu")
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attention, backend=counter, fullgraph=True)
    with fused_ops.backend(backend):
        for queries, keys in ((20, 6), (17, 11), (30, 70)) if backend == "triton" else ((9, 300), (8, 310)):
            arguments = arguments_of((2, queries, keys, 2, 8))
            for tensor in arguments.values():
                torch._dynamo.mark_dynamic(tensor, 1)
            out = compiled(**arguments)
            torch.testing.assert_close(out.double(), oracle(arguments), rtol=1e-4, atol=1e-4)
            out.sum().backward()
    assert counter.frame_count == 1


@pytest.mark.gpu
def test_cuda_graph():
    """G5: captured on a side stream, replayed with other inputs; dropout draws anew at each replay."""
    require("triton", "cuda")
    query, key, value = (torch.zeros(2, count, 2, 32, device="cuda") for count in (64, 49, 49))
    stream = torch.cuda.Stream()
    with torch.no_grad(), fused_ops.backend("triton"):
        with torch.cuda.stream(stream):
            for _ in range(3):
                attention(query, key, value, dropout=0.2)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            out = attention(query, key, value)
            dropped = attention(query, key, value, dropout=0.2)
        found = []
        for _ in range(2):
            for tensor in (query, key, value):
                tensor.copy_(torch.randn_like(tensor))
            graph.replay()
            want = reference.attention(query.double(), key.double(), value.double(), scale=32**-0.5)
            torch.testing.assert_close(out.double(), want, rtol=1e-4, atol=1e-4)
            found.append(dropped.clone())
        graph.replay()
        assert not torch.equal(dropped, found[-1])


@pytest.mark.gpu
def test_second_device():
    """G5: tensors on cuda:1 while cuda:0 is current."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    require("triton", "cuda")
    arguments = arguments_of((1, 40, 9, 2, 16), "cuda:1")
    want = oracle({name: tensor.detach().cpu() for name, tensor in arguments.items()})
    with fused_ops.backend("triton"):
        out = attention(**arguments)
    torch.testing.assert_close(out.detach().cpu().double(), want, rtol=1e-4, atol=1e-4)


def test_flops():
    """G7: two products forward, and one per gradient more than the recomputed scores backward."""
    require("triton", "cpu")
    product = 2 * 2 * 2 * 19 * 9 * 16
    for names, products in (
        (("query", "key", "value"), 5),
        (("query",), 3),
        (("value",), 2),
    ):
        arguments = make(case_named("plain", "attention"), torch.float32)
        for name in NAMES[:3]:
            arguments[name].requires_grad_(name in names)
        with fused_ops.backend("triton"), FlopCounterMode(display=False) as forward:
            out = attention(**arguments)
        with FlopCounterMode(display=False) as backward:
            torch.autograd.grad(out, [arguments[name] for name in names], torch.ones_like(out))
        assert forward.get_total_flops() == 2 * product
        assert backward.get_total_flops() == products * product


def test_autocast():
    """D6: inputs take autocast's dtype, as those of PyTorch's own attention do; gradients keep theirs."""
    require("triton", "cpu")
    arguments = arguments_of((1, 9, 5, 1, 8))
    bias = torch.randn(1, 9, 5, requires_grad=True)
    for backend in ("reference", "triton"):
        with torch.autocast("cpu", torch.bfloat16), fused_ops.backend(backend):
            out = attention(**arguments, bias=bias)
        assert out.dtype == torch.bfloat16
        gradients = torch.autograd.grad(out.float().sum(), [*arguments.values(), bias])
        assert {gradient.dtype for gradient in gradients} == {torch.float32}


def test_many_keys_go_to_sdpa(monkeypatch):
    """Above 256 keys PyTorch's attention is the choice, not a fallback."""
    call = op.AttentionCall(
        *(torch.zeros(1, count, 1, 64).half() for count in (9, 300, 300)), None, None, None, 0.125, 0.0
    )
    monkeypatch.setattr(backends, "triton_status", lambda device: (True, ""))
    assert op._sdpa_can_run(call) == (True, "")
    call.key = call.value = torch.zeros(1, 49, 1, 64).half()
    assert not op._sdpa_can_run(call)[0]
    call.key = call.value = torch.zeros(1, 196, 1, 64).half()
    assert not op._sdpa_can_run(call)[0]
    call.needs_grad = True
    assert op._sdpa_can_run(call) == (True, "")
    call.given_seed = True
    assert op._sdpa_can_run(call) == (
        False,
        "a seed was given, and PyTorch's attention draws its own",
    )


def test_stock_path_is_sdpa_and_nothing_else(monkeypatch):
    """The reference backend is what users have today, so that it is a fair baseline."""
    calls = []
    original = torch.nn.functional.scaled_dot_product_attention

    def spy(*args, **options):
        calls.append(options)
        return original(*args, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    arguments = arguments_of((1, 9, 5, 1, 8))
    attention(**arguments, dropout=0.1, scale=0.7)
    assert [(call["dropout_p"], call["scale"]) for call in calls] == [(0.1, 0.7)]


def test_empty_batch():
    """C6: the right shape and zero gradients; the kernels decline with the reason."""
    arguments = arguments_of((0, 6, 5, 2, 8))
    out = attention(**arguments)
    assert out.shape == (0, 6, 2, 8)
    for gradient, tensor in zip(
        torch.autograd.grad(out.sum(), list(arguments.values())), arguments.values(), strict=True
    ):
        assert gradient.shape == tensor.shape
    require("triton", "cpu")
    with fused_ops.backend("triton"), pytest.raises(fused_ops.BackendUnavailableError, match="is empty"):
        attention(**arguments)


def shaped(queries=6, keys=5, heads=2, head_dim=8, **options):
    return {
        "query": torch.zeros(2, queries, heads, head_dim, **options),
        "key": torch.zeros(2, keys, heads, head_dim, **options),
        "value": torch.zeros(2, keys, heads, head_dim, **options),
    }


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": torch.zeros(2, 6, 16)}, ValueError, r"query has 3 dimensions; it must be \(B, N"),
        ({"query": torch.zeros(2, 6, 2, 8, dtype=torch.int32)}, TypeError, "query has dtype torch.int32"),
        ({"key": torch.zeros(1, 5, 2, 8)}, ValueError, r"key has shape \(1, 5, 2, 8\); it must be \(2, Nk"),
        ({"value": torch.zeros(2, 5, 2, 4)}, ValueError, r"value has shape \(2, 5, 2, 4\)"),
        ({"value": torch.zeros(2, 4, 2, 8)}, ValueError, "value has 4 rows; it must have one per key, 5"),
        ({"key": torch.zeros(2, 5, 2, 8).half()}, TypeError, "key is torch.float16"),
        ({"bias": torch.zeros(6, 5)}, ValueError, r"bias has shape \(6, 5\); it must be \(2 or 1, 6, 5\)"),
        ({"bias": torch.zeros(3, 6, 5)}, ValueError, r"bias has shape \(3, 6, 5\)"),
        ({"bias": torch.zeros(1, 6, 5).half()}, TypeError, "bias has dtype torch.float16"),
        ({"key_mask": torch.zeros(2, 5)}, ValueError, r"key_mask is torch.float32 \(2, 5\)"),
        ({"key_mask": torch.zeros(2, 6) > 0}, ValueError, r"it must be bool \(2, 5\)"),
        ({"seed": torch.tensor(3), "dropout": 0.1}, ValueError, r"it must be int64 \(2,\): key and offset"),
        ({"bias": torch.zeros(1, 6, 5, device="meta")}, ValueError, "bias is on meta"),
        ({"dropout": 1.0}, ValueError, "dropout=1.0 is not allowed; it must be at least 0 and below 1"),
        ({"scale": float("nan")}, ValueError, "scale=nan is not allowed"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    """C11: an error that names the argument, the value and what is allowed, before anything runs."""
    with pytest.raises(error, match=message):
        attention(**{**shaped(), **change})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (shaped(dtype=torch.float64), "query is torch.float64"),
        (shaped(keys=300), "there are more than 256 keys; the Triton kernels hold no more in one tile"),
        (shaped(head_dim=136), "heads are wider than 128; the Triton kernels take no wider ones"),
        (
            shaped(keys=200, head_dim=80, dtype=torch.float16),
            "with heads this wide the Triton kernels run on no more than 128 keys",
        ),
        (shaped(keys=200, head_dim=64), "the Triton kernels run in float32 on no more than 128 keys"),
        (
            shaped(keys=200, head_dim=64, requires_grad=True),
            "the Triton kernels train on no more than 128 keys",
        ),
        (
            shaped(keys=100, head_dim=64, requires_grad=True) | {"dropout": 0.1},
            "the Triton kernels train with a bias or dropout on no more than 64 keys",
        ),
        (shaped(queries=0), "is empty"),
    ],
)
def test_declined_calls_say_why(arguments, message):
    """C11: a forced backend that cannot run raises with one exact sentence."""
    require("triton", "cpu")
    with fused_ops.backend("triton"), pytest.raises(fused_ops.BackendUnavailableError, match=message):
        attention(**arguments)


# Of traffic


@pytest.mark.parametrize("name", ["49_keys", "masked", "dropout"])
def test_counted_bytes(name):
    """What the kernels touch is at most a tenth above the least."""
    require("triton", "cpu")
    case = case_named(f"traffic_{name}", "attention")
    rows = operator_traffic(OPERATOR, "triton", case.name, lambda: make(case, torch.bfloat16))
    totals = {row["direction"]: row for row in rows if row["kernel"] == "total"}
    assert set(totals) == {"forward", "backward"}
    for direction, row in totals.items():
        ratio = row["counted_bytes"] / row["least_bytes"]
        assert 1.0 <= ratio <= 1.10, f"{direction}: {ratio:.3f} times the least"
        assert row["counted_bytes"] <= row["block_bytes"] <= row["requested_bytes"]


@pytest.mark.parametrize(("operator", "case"), operator_cases("model", only="attention"))
def test_partial_gradients_of_model_cases_weigh_little(operator, case):
    """On shapes too large to count: partial gradients are written and read beside the least traffic."""
    with FakeTensorMode():
        arguments = make(case, torch.bfloat16)
    query, key = arguments["query"], arguments["key"]
    batch, queries, heads, head_dim = query.shape
    keys = key.shape[1]
    call = op.AttentionCall(query, key, arguments["value"], None, None, None, 1.0, 0.0, True)
    if not triton.fits(call)[0]:
        return
    plan = triton.backward_plan(batch * heads, queries, keys, head_dim, (32, 4, 2))
    partial = 2 * 2 * 4 * key.numel() * plan.parts if plan.parts > 1 else 0
    # A smaller share would leave more than half of a large GPU's multiprocessors without work.
    if plan.grid[0] - batch * heads >= triton.PROGRAMS // 4:
        assert partial <= 0.10 * operator.least_bytes(call, "backward")
    assert plan.grid[0] == batch * heads * plan.parts
    assert plan.parts * plan.part_queries >= queries > (plan.parts - 1) * plan.part_queries
