"""The attention block: the contract beyond the cases that every operator runs, and against stock modules.

Shapes are tiny: every program costs milliseconds in Triton's interpreter.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.contract import (
    DEVICES,
    RecordCalls,
    assert_three_way,
    case_named,
    check_operators,
    convert,
    make,
    operator_cases,
    require,
    run,
)
from torch import Tensor, nn

import fused_ops
from fused_ops.attention import block, triton_block
from fused_ops.attention.module import residual_attention
from fused_ops.bench.correctness import named_tensors
from fused_ops.core import backends, library, tuning
from fused_ops.core.drop_path import DropPath

OPERATOR = library.operators()["attention_block"]
attention_block = fused_ops.attention_block


def oracle(arguments: dict[str, Any]) -> Tensor:
    """The branch of a transformer in stock PyTorch, in the dtype of ``x``, parameters cast to it."""
    x, key, value = (arguments[name] for name in ("x", "key", "value"))

    def parameter(name: str) -> Tensor | None:
        found = arguments.get(name)
        return None if found is None else found.to(x.dtype)

    z, norm = x, arguments.get("norm")
    if norm is not None:
        z = F.layer_norm(z, z.shape[-1:], norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)
    query = F.linear(z, parameter("query_weight"), parameter("query_bias")).unflatten(-1, key.shape[2:])
    mask, taken = arguments.get("key_mask"), None
    if mask is not None:
        # Stock attention leaves open what a query without any key gets.
        taken = mask.any(1)
        mask = mask[:, None, None, :] | ~taken[:, None, None, None]
    heads = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (query, key, value)), attn_mask=mask)
    if taken is not None:
        heads = heads.masked_fill(~taken[:, None, None, None], 0.0)
    out = F.linear(heads.transpose(1, 2).flatten(2), parameter("out_weight"), parameter("out_bias"))
    if arguments.get("drop_path") is not None:
        out = out * parameter("drop_path")[:, None, None]
    return out if arguments.get("residual") is None else out + arguments["residual"]


def results(function, arguments: dict[str, Any]) -> dict[str, Tensor]:
    """Output and gradients of ``function`` for a fixed gradient of the output."""
    leaves = {name: tensor for name, tensor in named_tensors(arguments).items() if tensor.requires_grad}
    out = function(arguments)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    gradients = torch.autograd.grad(out, list(leaves.values()), grad.to(out.dtype).to(out.device))
    return {"out": out.detach(), **{f"grad {name}": g for name, g in zip(leaves, gradients, strict=True)}}


@pytest.mark.parametrize(("operator", "case"), operator_cases("tiny", only="attention_block"))
def test_reference_is_the_stock_branch(operator, case):
    arguments = make(case, torch.float64)
    got, want = results(lambda given: attention_block(**given), arguments), results(oracle, arguments)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-11, atol=1e-11)


@pytest.fixture(params=DEVICES)
def device(request):
    require("triton", request.param)
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["one_head", "two_heads", "three_heads"])
def test_kernels_against_the_stock_branch(name, dtype, device):
    """C1, with the products in their usual order as what is to be matched."""
    arguments = make(case_named(name, "attention_block"), dtype, device=device)

    def fused(given):
        with fused_ops.backend("triton"):
            return attention_block(**given)

    exact = results(oracle, convert(arguments, torch.float64))
    assert_three_way(results(fused, arguments), results(oracle, convert(arguments)), exact, dtype)


def test_parts_share_the_tokens_of_an_image(device):
    """Partial gradients of keys, values and score biases, added up in a fixed order."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device).requires_grad_()

    arguments = {
        "x": normal(1, 1100, 8),
        "key": normal(1, 5, 2, 4),
        "value": normal(1, 5, 2, 4),
        "query_weight": normal(8, 8),
        "query_bias": normal(8),
        "out_weight": normal(8, 8),
        "out_bias": normal(8),
        "norm": fused_ops.LayerNormState(normal(8), normal(8), 1e-5),
    }
    arguments["residual"] = arguments["x"]
    names = ("forward", "keys", "rows")
    with (
        tuning.force("attention_block_forward 32-bit", (256, 4, 1)),
        tuning.force("attention_block_keys 32-bit", (256, 4, 1)),
        tuning.force("attention_block_rows 32-bit", (256, 4, 1)),
    ):
        first, second = (run(OPERATOR, arguments, "triton") for _ in range(2))
        call = block.AttentionBlockCall(
            arguments["x"], *(torch.empty(1, 2, 5, 8) for _ in range(2)), *[None] * 6, 0.5, True, 1e-5, True
        )
        assert [triton_block._plan(name, call).parts > 1 for name in names] == [True] * 3
    exact = run(OPERATOR, convert(arguments, torch.float64), "reference")
    assert_three_way(first, run(OPERATOR, convert(arguments), "reference"), exact, torch.float32)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_subsets_of_requires_grad(device):
    """C10: every subset of gradients equals the full set's, and what nobody asked for is not computed."""
    case = case_named("two_heads", "attention_block")
    full = run(OPERATOR, make(case, torch.float32, device=device), "triton")
    names = [name.removeprefix("grad ") for name in full if name.startswith("grad ")]
    for subset in [*itertools.combinations(names, 1), ("x", "value"), ("key", "norm.bias", "residual")]:
        arguments = make(case, torch.float32, device=device)
        for name, tensor in named_tensors(arguments).items():
            if name in names:
                tensor.requires_grad_(name in subset)
        with RecordCalls(OPERATOR.overloads[1:]) as recorded:
            got = run(OPERATOR, arguments, "triton")
        assert set(got) == {"out", *(f"grad {name}" for name in subset)}
        for name in subset:
            assert torch.equal(got[f"grad {name}"], full[f"grad {name}"]), (subset, name)
        # A residual's gradient is the result's.
        assert len(recorded.calls) == (subset != ("residual",))
        for _, call in recorded.calls:
            rows, keys = triton_block.wanted(call[-2])
            assert rows == bool({"x", "out_bias", "norm.weight", "norm.bias"} & set(subset))
            assert keys == bool({"key", "value", "query_weight", "query_bias", "out_weight"} & set(subset))


def test_nothing_is_kept_but_inputs(device):
    arguments = make(case_named("one_head", "attention_block"), torch.float32, device=device)
    kept = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
        fused_ops.backend("triton"),
    ):
        out = attention_block(**arguments)
    pointers = {tensor.untyped_storage().data_ptr() for tensor in named_tensors(arguments).values()}
    others = [t for t in kept if t.untyped_storage().data_ptr() not in pointers]
    # Keys and values as wide as the map, and smaller things; nothing with a value for every token.
    assert all(tensor.numel() < out.numel() for tensor in others)


def test_poisoned_memory_and_canaries(device, monkeypatch):
    """C7, C8: two runs are equal to the bit, and nothing is written beside an output."""
    buffers = []

    def guarded(like, dtype):
        buffer = torch.full((like.numel() + 128,), 77.0, dtype=dtype, device=like.device)
        buffers.append(buffer)
        return buffer[64 : 64 + like.numel()].view(like.shape)

    arguments = make(case_named("three_heads", "attention_block"), torch.float16, device=device)
    torch.use_deterministic_algorithms(True)
    try:
        plain = run(OPERATOR, arguments, "triton")
    finally:
        torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(block, "_empty", guarded)
    again = run(OPERATOR, arguments, "triton")
    for name, value in plain.items():
        assert torch.isfinite(value).all(), name
        assert torch.equal(again[name], value), name
    # The result, and gradients of x, keys, values, score biases and three vectors.
    assert len(buffers) == 8
    for buffer in buffers:
        assert (buffer[:64] == 77).all()
        assert (buffer[-64:] == 77).all()
        assert not (buffer[64:-64] == 77).any()


def test_views_and_large_offsets(device):
    """C4, C5: strides are honoured, an image 2**31 elements into its buffer included."""
    image = 2**30
    buffer = torch.empty(2 * image + 400, dtype=torch.float16, device=device)
    x = buffer.as_strided((3, 6, 8), (image, 24, 3))
    x.copy_(torch.randn(3, 6, 8))
    packed = torch.randn(3, 2, 4, 5, 2, device=device).half()
    key, value = packed.permute(0, 4, 1, 3, 2).flatten(3).unflatten(3, (5, 4))[..., :4].unbind(1)
    key, value = key.transpose(1, 2), value.transpose(1, 2)
    weights = [torch.randn(8, 8, device=device).half() for _ in range(2)]
    with fused_ops.backend("triton"):
        out = attention_block(x, key, value, *weights, residual=x)
    names = ("x", "key", "value", "query_weight", "out_weight")
    given = dict(zip(names, (x, key, value, *weights), strict=True))
    want = oracle({name: tensor.cpu().double() for name, tensor in given.items()}) + x.cpu().double()
    torch.testing.assert_close(out.cpu().double(), want, rtol=5e-3, atol=2e-2)


def test_operators_and_compile(device):
    case = case_named("two_heads", "attention_block")
    check_operators(OPERATOR, make(case, torch.float32, device=device))
    arguments = make(case, torch.float32, device=device)
    with fused_ops.backend("triton"):
        compiled = torch.compile(lambda given: attention_block(**given), backend="aot_eager", fullgraph=True)
        got, want = results(compiled, arguments), results(lambda given: attention_block(**given), arguments)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_autocast(backend, device):
    """Products in its dtype, the stream in its own; a branch alone in that of the products."""
    arguments = make(case_named("one_head", "attention_block"), torch.float32, device=device)
    exact = attention_block(**convert(arguments, torch.float64))
    with torch.autocast(device, dtype=torch.bfloat16), fused_ops.backend(backend):
        out = attention_block(**arguments)
        alone = attention_block(**{**arguments, "residual": None})
    assert (out.dtype, alone.dtype) == (torch.float32, torch.bfloat16)
    assert (out.double() - exact).norm() < 0.02 * exact.norm()
    gradients = torch.autograd.grad(out.sum(), [arguments["x"], arguments["query_weight"]])
    assert [gradient.dtype for gradient in gradients] == [torch.float32] * 2


def test_second_derivatives():
    arguments = make(case_named("one_head", "attention_block"), torch.float32)
    with fused_ops.backend("triton"):
        out = attention_block(**arguments)
        (first,) = torch.autograd.grad(out.square().sum(), arguments["x"], create_graph=True)
        with pytest.raises(RuntimeError, match="for second derivatives run attention_block inside"):
            torch.autograd.grad(first.sum(), arguments["x"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 4)}, r"x has 2 dimensions; it must be \(B, N, C\)"),
        ({"x": torch.zeros(2, 6, 8, dtype=torch.int32)}, "x has dtype torch.int32"),
        ({"x": torch.zeros(2, 6, 0)}, "at least 1 channel"),
        ({"key": torch.zeros(2, 5, 8)}, r"key has shape \(2, 5, 8\); it must be \(2, Nk, heads, d\)"),
        ({"value": torch.zeros(2, 4, 2, 3)}, r"value has shape .* that of key, \(2, 5, 2, 3\)"),
        ({"query_weight": torch.zeros(8, 6)}, r"query_weight has shape \(8, 6\); it must be \(6, 8\)"),
        ({"out_weight": torch.zeros(6, 8)}, r"out_weight has shape \(6, 8\); it must be \(8, 6\)"),
        ({"query_bias": torch.zeros(8)}, r"query_bias has shape \(8,\); it must be \(6,\)"),
        ({"out_bias": torch.zeros(8).half()}, "out_bias has dtype torch.float16"),
        ({"norm": nn.LayerNorm(8)}, "norm is a LayerNorm; it must be a LayerNormState or None"),
        ({"key_mask": torch.ones(2, 4, dtype=torch.bool)}, r"key_mask is torch.bool \(2, 4\); .* \(2, 5\)"),
        ({"scale": float("nan")}, "scale=nan is not allowed"),
        ({"drop_path": torch.ones(2, requires_grad=True)}, "drop_path requires grad"),
        ({"residual": torch.zeros(2, 6, 4)}, r"residual has shape .* that of x, \(2, 6, 8\)"),
        ({"residual": torch.zeros(2, 6, 8).half()}, "residual is torch.float16"),
    ],
)
def test_bad_arguments(change, message):
    given = {
        "x": torch.zeros(2, 6, 8),
        "key": torch.zeros(2, 5, 2, 3),
        "value": torch.zeros(2, 5, 2, 3),
        "query_weight": torch.zeros(6, 8),
        "out_weight": torch.zeros(8, 6),
    }
    assert attention_block(**given).shape == (2, 6, 8)
    with pytest.raises((ValueError, TypeError), match=message):
        attention_block(**{**given, **change})


def test_what_does_not_fit_is_declined():
    for name, words in (("wide", "more than 128 channels"), ("many_keys", "no more than 256 keys")):
        arguments = make(case_named(name, "attention_block"), torch.float32)
        for tensor in named_tensors(arguments).values():
            tensor.requires_grad_(False)
        with pytest.raises(fused_ops.BackendUnavailableError, match=words), fused_ops.backend("triton"):
            attention_block(**arguments)


def attention_of(dim: int, heads: int, **options: Any) -> fused_ops.SpatialReductionAttention:
    torch.manual_seed(0)
    return fused_ops.SpatialReductionAttention(dim, heads, **options)


@pytest.mark.parametrize(
    ("options", "fused"),
    [
        ({"reduction_ratio": 2}, True),
        ({}, True),
        ({"reduction": "token_pool", "reduction_ratio": 2}, True),
        ({"reduction": "pool", "qkv_bias": False}, True),
        ({"attn_drop": 0.5}, False),
        ({"proj_drop": 0.5}, False),
    ],
)
def test_residual_attention(options, fused):
    """The branch of a block equals its modules called one by one, drop path drawn alike."""
    norm, attention, drop = nn.LayerNorm(12).double(), attention_of(12, 2, **options).double(), DropPath(0.5)
    x = torch.randn(3, 24, 12, dtype=torch.float64, requires_grad=True)
    leaves = [x, *norm.parameters(), *attention.parameters()]
    found = []
    for branch in (
        lambda: residual_attention(x, norm, attention, (4, 6), drop),
        lambda: x + drop(attention(norm(x), (4, 6))),
    ):
        torch.manual_seed(5)
        with backends.record() as choices:
            out = branch()
        found.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
        if len(found) == 1:
            assert ([choice.operator for choice in choices] == ["attention_block"]) == fused
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_residual_attention_of_wide_maps():
    """Beyond what fits, the core is an operator of its own."""
    norm, attention = nn.LayerNorm(160), attention_of(160, 2)
    x = torch.randn(1, 6, 160)
    with torch.no_grad(), backends.record() as choices:
        out = residual_attention(x, norm, attention, (2, 3), DropPath(0.0))
        torch.testing.assert_close(out, x + attention(norm(x), (2, 3)))
    assert choices[0].operator == "attention"
