"""The attention operator: argument checks, choice of backend, torch operators, autograd, formulas."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fused_ops.attention import reference, triton
from fused_ops.attention.cases import cases
from fused_ops.core import library
from fused_ops.core.autocast import autocast_dtype, cast
from fused_ops.core.backends import Backend, choose, reference_can_run
from fused_ops.core.checks import any_requires_grad, check_alike, check_device, check_direction, check_float
from fused_ops.core.dropout import check_dropout, draw_seed


@dataclass
class AttentionCall:
    """One checked call: what a backend's ``can_run`` and launchers see.

    ``seed`` is None until one is drawn for a kernel with dropout; ``given_seed``: the caller gave it.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None
    key_mask: Tensor | None
    seed: Tensor | None
    scale: float
    dropout: float
    needs_grad: bool = False
    given_seed: bool = False

    @property
    def x(self) -> Tensor:
        """What the choice of a backend asks for its device."""
        return self.query

    def kind(self) -> dict[str, Any]:
        """What measurements of one call say about another depends on, apart from sizes."""
        return {
            "training": self.needs_grad,
            "dtype": str(self.query.dtype),
            "bias": self.bias is not None,
            "key_mask": self.key_mask is not None,
            "dropout": self.dropout > 0,
        }

    def sizes(self) -> tuple[int, ...]:
        """Queries, keys, heads and width of a head."""
        return (self.query.shape[1], self.key.shape[1], *self.query.shape[2:])

    def __str__(self) -> str:
        batch, queries, heads, head_dim = self.query.shape
        extras = "".join(
            f", {name}"
            for name, present in (
                ("bias", self.bias is not None),
                ("key mask", self.key_mask is not None),
                (f"dropout {self.dropout:g}", self.dropout > 0),
            )
            if present
        )
        dtype = str(self.query.dtype).removeprefix("torch.")
        return (
            f"{queries} queries on {self.key.shape[1]} keys, {heads} heads of {head_dim}, batch {batch} "
            f"{dtype}{extras}"
        )


def _check_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    if query.dim() != 4:
        raise ValueError(f"query has {query.dim()} dimensions; it must be (B, N, heads, d)")
    check_float("query", query)
    batch, _, heads, head_dim = query.shape
    for name, tensor in (("key", key), ("value", value)):
        # Names as they are in the arguments, since all three have other sizes in common.
        if tensor.dim() != 4 or (tensor.shape[0], *tensor.shape[2:]) != (batch, heads, head_dim):
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; it must be ({batch}, Nk, {heads}, {head_dim}), as "
                f"query {tuple(query.shape)} says"
            )
        check_alike(name, tensor, query, "query")
    if value.shape[1] != key.shape[1]:
        raise ValueError(f"value has {value.shape[1]} rows; it must have one per key, {key.shape[1]}")


def _check_companions(query: Tensor, keys: int, bias: Tensor | None, key_mask: Tensor | None) -> None:
    batch, queries, heads, _ = query.shape
    if bias is not None:
        if bias.dim() != 3 or bias.shape[0] not in (1, heads) or tuple(bias.shape[1:]) != (queries, keys):
            raise ValueError(
                f"bias has shape {tuple(bias.shape)}; it must be ({heads} or 1, {queries}, {keys}), heads, "
                "queries and keys"
            )
        if bias.dtype not in (query.dtype, torch.float32):
            raise TypeError(
                f"bias has dtype {bias.dtype}; it must be float32 or that of query, {query.dtype}"
            )
    if key_mask is not None and (tuple(key_mask.shape) != (batch, keys) or key_mask.dtype != torch.bool):
        raise ValueError(
            f"key_mask is {key_mask.dtype} {tuple(key_mask.shape)}; it must be bool ({batch}, {keys}), true "
            "where a key takes part"
        )
    for name, tensor in (("bias", bias), ("key_mask", key_mask)):
        check_device(name, tensor, query, "query")


def few_key_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """``dropout(softmax(scale Q Kᵀ + bias)) V`` per head, made for many queries and few keys.

    Tensors are read where they lie, with any strides: views of packed projections such as
    ``kv.unflatten(-1, (2, heads, d)).unbind(2)`` and of maps, of which channels_last ones are the fast case.

    A query without any key (all of them masked, or by a bias of minus infinity) gets zeros, and gives zero
    gradients.

    Under autocast ``query``, ``key`` and ``value`` are cast to its dtype.

    Args:
        query: (B, N, heads, d); float32, float16, bfloat16 or float64.
        key, value: (B, Nk, heads, d), as query.
        bias: (heads or 1, N, Nk), added to the scores; the dtype of query or float32; or None.
        key_mask: bool (B, Nk), true where a key takes part, or None for all.
        scale: of the scores; None for ``d ** -0.5``.
        dropout: probability with which each attention weight is dropped, below 1.
        seed: (2) int64 on the device of query: key and offset of the Philox generator that dropout uses. The
            same on every backend. None draws one from PyTorch's generator.

    Returns:
        (B, N, heads, d), contiguous, in the dtype of query (under autocast, in its dtype).

    Raises:
        ValueError, TypeError: an argument is not allowed; the message names it, its value and what is.
        fused_ops.BackendUnavailableError: a backend was requested by name and cannot run this call.
    """
    dtype = autocast_dtype(query)
    if dtype is not None:
        query, key, value = (cast(tensor, dtype) for tensor in (query, key, value))
        with torch.autocast(query.device.type, enabled=False):
            return few_key_attention(
                query,
                key,
                value,
                bias=bias,
                key_mask=key_mask,
                scale=scale,
                dropout=dropout,
                seed=seed,
            )
    _check_tensors(query, key, value)
    _check_companions(query, key.shape[1], bias, key_mask)
    check_dropout(dropout, seed, query, "query")
    if scale is None:
        scale = query.shape[3] ** -0.5
    elif not math.isfinite(scale):
        raise ValueError(f"scale={scale} is not allowed; it must be finite")
    needs_grad = any_requires_grad(query, key, value, bias)
    if dropout == 0.0:
        seed = None
    call = AttentionCall(
        query, key, value, bias, key_mask, seed, float(scale), float(dropout), needs_grad, seed is not None
    )
    backend = choose("attention", BACKENDS, call)
    if backend.forward is None:
        return _stock(call)
    if dropout and seed is None:
        seed = draw_seed(query)
    return _DIFFERENTIABLE.run(
        needs_grad, query, key, value, bias, key_mask, seed, call.scale, call.dropout, backend.name
    )


def _stock(call: AttentionCall) -> Tensor:
    """PyTorch's own attention, or its definition where that has no way to say what is asked."""
    arguments = (call.query, call.key, call.value, call.bias, call.key_mask)
    options = {"scale": call.scale, "dropout": call.dropout}
    if call.given_seed or call.query.numel() == 0 or call.key.shape[1] == 0:
        seed = call.seed
        if call.dropout and seed is None:
            seed = draw_seed(call.query)
        return reference.attention(*arguments, seed, **options)
    return reference.sdpa(*arguments, **options)


_TENSORS = "Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? key_mask, Tensor? seed"
_OPTIONS = "float scale, float dropout"
_FORWARD_SCHEMA = f"attention_forward({_TENSORS}, {_OPTIONS}, str backend) -> Tensor"
_BACKWARD_SCHEMA = (
    f"attention_backward(Tensor grad, {_TENSORS}, {_OPTIONS}, bool[] needs, str backend) "
    "-> (Tensor query_grad, Tensor key_grad, Tensor value_grad, Tensor bias_grad)"
)


def _empty(shape: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.empty(tuple(shape), dtype=like.dtype, device=like.device)


def allocate_forward(call: AttentionCall) -> Tensor:
    """The forward operator's output."""
    return _empty(call.query.shape, call.query)


def allocate_backward(call: AttentionCall, needs: list[bool]) -> tuple[Tensor, ...]:
    """Gradients of query, key, value, bias, all dense; absent where not needed."""
    return tuple(
        _empty(source.shape, source) if needed and source is not None else library.absent(call.query)
        for source, needed in zip((call.query, call.key, call.value, call.bias), needs, strict=True)
    )


def _forward(query, key, value, bias, key_mask, seed, scale, dropout, backend):
    call = AttentionCall(query, key, value, bias, key_mask, seed, scale, dropout)
    return _BY_NAME[backend].forward(call, allocate_forward(call))


def _forward_fake(query, key, value, bias, key_mask, seed, scale, dropout, backend):
    return allocate_forward(AttentionCall(query, key, value, bias, key_mask, seed, scale, dropout))


def _backward(grad, query, key, value, bias, key_mask, seed, scale, dropout, needs, backend):
    call = AttentionCall(query, key, value, bias, key_mask, seed, scale, dropout)
    return _BY_NAME[backend].backward(call, grad, list(needs), *allocate_backward(call, needs))


def _backward_fake(grad, query, key, value, bias, key_mask, seed, scale, dropout, needs, backend):
    call = AttentionCall(query, key, value, bias, key_mask, seed, scale, dropout)
    return allocate_backward(call, needs)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.scale, ctx.dropout, ctx.backend = inputs
    # Neither the output nor the softmax's sums: backward computes the probabilities again.
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _autograd(ctx, grad):
    needs = list(ctx.needs_input_grad[:4])
    if grad is None:
        return (None,) * 9
    if torch.is_grad_enabled():
        gradients = _differentiable_backward(ctx, grad, needs)
    else:
        gradients = _DIFFERENTIABLE.run_backward(
            grad, *ctx.saved_tensors, ctx.scale, ctx.dropout, needs, ctx.backend
        )
    return (*gradients, None, None, None, None, None)


def _differentiable_backward(ctx, grad: Tensor, needs: list[bool]) -> list[Tensor | None]:
    """Gradients with a graph of their own, for second derivatives: through the definition."""
    inputs = ctx.saved_tensors
    out = reference.attention(*inputs, scale=ctx.scale, dropout=ctx.dropout)
    wanted = [index for index, need in enumerate(needs) if need]
    gradients: list[Tensor | None] = [None] * 4
    results = torch.autograd.grad(out, [inputs[index] for index in wanted], grad, create_graph=True)
    for index, gradient in zip(wanted, results, strict=True):
        gradients[index] = gradient
    return gradients


def _product_flops(query_shape: tuple[int, ...], keys: int) -> int:
    """Of one matrix product of all queries with all keys or values."""
    batch, queries, heads, head_dim = query_shape
    return 2 * batch * heads * queries * keys * head_dim


def _forward_flops(query_shape, key_shape, *_, out_shape=None, **__) -> int:
    return 2 * _product_flops(query_shape, key_shape[1])


def _backward_flops(grad_shape, query_shape, key_shape, *arguments, out_shape=None, **__) -> int:
    query, key, value, bias = arguments[-2]
    # The scores once more, and the gradient of the probabilities where more than the values' is asked for.
    products = 1 + bool(query or key or bias) + bool(query) + bool(key) + bool(value)
    return products * _product_flops(query_shape, key_shape[1])


def least_bytes(call: AttentionCall, direction: str) -> int:
    """Bytes that the schedule in use has to move through memory; key masks are left out.

    Forward: queries, keys and values are read, the output is written. Backward, with all gradients: the same
    three and the output's gradient are read, three gradients are written. Nothing is kept from forward for
    backward but the inputs. A bias is read once each way, and its gradient is written.
    """
    check_direction(direction)
    size = call.query.element_size()
    query, key = size * call.query.numel(), size * call.key.numel()
    bias = 0 if call.bias is None else call.bias.element_size() * call.bias.numel()
    if direction == "forward":
        return 2 * query + 2 * key + bias
    bias_grad = bias if call.bias is not None and call.bias.requires_grad else 0
    return 3 * query + 4 * key + bias + bias_grad


def _sdpa_can_run(call: AttentionCall) -> tuple[bool, str]:
    if call.given_seed:
        return False, "a seed was given, and PyTorch's attention draws its own"
    if call.query.dtype == torch.float64:
        return False, "query is torch.float64"
    if triton.fits(call)[0]:
        return False, "the keys fit one tile, and PyTorch's attention is first choice where they do not"
    return True, ""


# PyTorch's attention stands twice: as what long rows of keys are given to, and as what everything falls back
# to, which is said to the user.
BACKENDS = (
    Backend("triton", triton.can_run, triton.forward, triton.backward, triton.tiles),
    Backend("sdpa", _sdpa_can_run),
    Backend("reference", reference_can_run),
)
_BY_NAME = {backend.name: backend for backend in BACKENDS}

_DIFFERENTIABLE = library.DifferentiableOperator(
    _FORWARD_SCHEMA,
    _BACKWARD_SCHEMA,
    forward=_forward,
    forward_fake=_forward_fake,
    forward_flops=_forward_flops,
    backward=_backward,
    backward_fake=_backward_fake,
    backward_flops=_backward_flops,
    setup_context=_setup_context,
    autograd=_autograd,
    once_differentiable="is differentiable only through few_key_attention with create_graph=True",
)
OPERATOR = library.register(
    library.Operator(
        "attention",
        few_key_attention,
        BACKENDS,
        cases,
        least_bytes,
        _DIFFERENTIABLE.overloads,
        triton.launch_count,
        matrix_products=True,
    )
)
