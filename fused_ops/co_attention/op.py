"""The co-attention operator: argument checks, choice of backend, torch operators, autograd, formulas."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fused_ops.co_attention import reference, triton
from fused_ops.co_attention.cases import cases
from fused_ops.core import library
from fused_ops.core.autocast import autocast_dtype, cast
from fused_ops.core.backends import Backend, choose, reference_can_run
from fused_ops.core.checks import any_requires_grad, check_alike, check_direction, check_float
from fused_ops.core.dropout import check_dropout, draw_seed

# In the order of the operators' arguments and of all lists of gradients.
INPUTS = ("local_query", "local_value", "global_key", "global_value", "local_key", "global_query")


@dataclass
class CoAttentionCall:
    """One checked call: what a backend's ``can_run`` and launchers see.

    ``local_key`` and ``global_query`` are None where both directions share one affinity. ``seed`` is None
    until one is drawn for a kernel with dropout; ``given_seed``: the caller gave it.
    """

    local_query: Tensor
    local_value: Tensor
    global_key: Tensor
    global_value: Tensor
    local_key: Tensor | None
    global_query: Tensor | None
    seed: Tensor | None
    scale: float
    dropout: float
    needs_grad: bool = False
    given_seed: bool = False

    @property
    def x(self) -> Tensor:
        """What the choice of a backend asks for its device."""
        return self.local_query

    @property
    def shared(self) -> bool:
        return self.global_query is None

    def tensors(self) -> tuple[Tensor | None, ...]:
        """All of :data:`INPUTS`."""
        return tuple(getattr(self, name) for name in INPUTS)

    def kind(self) -> dict[str, Any]:
        """What measurements of one call say about another depends on, apart from sizes."""
        return {
            "training": self.needs_grad,
            "dtype": str(self.local_query.dtype),
            "shared": self.shared,
            "dropout": self.dropout > 0,
        }

    def sizes(self) -> tuple[int, ...]:
        """Local tokens, global tokens, heads and width of a head."""
        return (self.local_query.shape[1], self.global_key.shape[1], *self.local_query.shape[2:])

    def __str__(self) -> str:
        batch, tokens, heads, head_dim = self.local_query.shape
        dtype = str(self.local_query.dtype).removeprefix("torch.")
        shared = ", one affinity" if self.shared else ""
        dropout = f", dropout {self.dropout:g}" if self.dropout else ""
        return (
            f"{tokens} local and {self.global_key.shape[1]} global tokens, {heads} heads of {head_dim}, "
            f"batch {batch} {dtype}{shared}{dropout}"
        )


def _check(tensors: dict[str, Tensor | None], seed: Tensor | None, dropout: float, scale: float) -> None:
    query, key = tensors["local_query"], tensors["global_key"]
    for name in ("local_query", "global_key"):
        if tensors[name].dim() != 4:
            letter = "N" if name == "local_query" else "M"
            raise ValueError(
                f"{name} has {tensors[name].dim()} dimensions; it must be (B, {letter}, heads, d)"
            )
    check_float("local_query", query)
    batch, _, heads, head_dim = query.shape
    if (key.shape[0], *key.shape[2:]) != (batch, heads, head_dim):
        raise ValueError(
            f"global_key has shape {tuple(key.shape)}; it must be ({batch}, M, {heads}, {head_dim}), as "
            f"local_query {tuple(query.shape)} says"
        )
    if (tensors["local_key"] is None) != (tensors["global_query"] is None):
        given, missing = ("global_query", "local_key")
        if tensors[given] is None:
            given, missing = missing, given
        raise ValueError(
            f"{missing}=None is not allowed with {given}; give both, or neither for one affinity of both "
            "directions"
        )
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        like = "local_query" if name.startswith("local") else "global_key"
        if tensor.shape != tensors[like].shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; it must be {tuple(tensors[like].shape)}, as {like}"
            )
        check_alike(name, tensor, query, "local_query")
    check_dropout(dropout, seed, query, "local_query")
    if not math.isfinite(scale):
        raise ValueError(f"scale={scale} is not allowed; it must be finite")


def co_attention(
    local_query: Tensor,
    local_value: Tensor,
    global_key: Tensor,
    global_value: Tensor,
    *,
    local_key: Tensor | None = None,
    global_query: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Local tokens attend to global tokens and back, both from the same inputs; per head

        local_out  = dropout(softmax(scale local_query global_keyᵀ)) global_value
        global_out = dropout(softmax(scale global_query local_keyᵀ)) local_value

    or, without ``local_key`` and ``global_query``, with one affinity for both directions, whose softmax is
    taken over rows and over columns:

        global_out = dropout(softmax((scale local_query global_keyᵀ)ᵀ)) local_value

    Nothing of size N x M is written by the kernels, forward or backward. Tensors are read where they lie,
    with any strides: views of packed projections such as ``qkv.unflatten(-1, (3, heads, d)).unbind(2)`` and
    of maps, of which channels_last ones are the fast case. Under autocast they are cast to its dtype.

    Args:
        local_query, local_value, local_key: (B, N, heads, d); float32, float16, bfloat16 or float64.
        global_key, global_value, global_query: (B, M, heads, d), as local_query.
        scale: of the scores; None for ``d ** -0.5``.
        dropout: probability with which each attention weight of either direction is dropped, below 1.
        seed: (2) int64 on the device of local_query: key and offset of the Philox generator that dropout
            uses. The same on every backend. None draws one from PyTorch's generator.

    Returns:
        ``local_out`` (B, N, heads, d) in the map layout of ``local_query``: contiguous, or a view of an NCHW
        map where that is one. ``global_out`` (B, M, heads, d), contiguous. Both in the dtype of local_query
        (under autocast, in its dtype).

    Raises:
        ValueError, TypeError: an argument is not allowed; the message names it, its value and what is.
        fused_ops.BackendUnavailableError: a backend was requested by name and cannot run this call.

    Source: Mao et al., "Dual-stream Network for Visual Recognition", NeurIPS 2021 (arXiv 2105.14734),
    inter-scale alignment: one affinity in the paper's wording, one for each direction in the public code.
    """
    tensors = dict(
        zip(
            INPUTS,
            (local_query, local_value, global_key, global_value, local_key, global_query),
            strict=True,
        )
    )
    dtype = autocast_dtype(local_query)
    if dtype is not None:
        tensors = {name: cast(tensor, dtype) for name, tensor in tensors.items()}
        with torch.autocast(local_query.device.type, enabled=False):
            return co_attention(**tensors, scale=scale, dropout=dropout, seed=seed)
    if scale is None:
        scale = local_query.shape[-1] ** -0.5
    _check(tensors, seed, dropout, scale)
    if dropout == 0.0:
        seed = None
    needs_grad = any_requires_grad(*tensors.values())
    call = CoAttentionCall(
        **tensors,
        seed=seed,
        scale=float(scale),
        dropout=float(dropout),
        needs_grad=needs_grad,
        given_seed=seed is not None,
    )
    backend = choose("co_attention", BACKENDS, call)
    if backend.forward is None:
        return _stock(call)
    if dropout and seed is None:
        seed = draw_seed(local_query)
    local_out, global_out, _, _ = _DIFFERENTIABLE.run(
        needs_grad, *call.tensors(), seed, call.scale, call.dropout, needs_grad, backend.name
    )
    return local_out, global_out


def _stock(call: CoAttentionCall) -> tuple[Tensor, Tensor]:
    """PyTorch's own attention, or the definition where that has no way to say what is asked."""
    options = {"scale": call.scale, "dropout": call.dropout}
    if call.given_seed or call.local_query.numel() == 0 or call.global_key.numel() == 0:
        seed = call.seed
        if call.dropout and seed is None:
            seed = draw_seed(call.local_query)
        return reference.co_attention(*call.tensors(), seed, **options)
    return reference.sdpa(*call.tensors(), **options)


_TENSORS = (
    "Tensor local_query, Tensor local_value, Tensor global_key, Tensor global_value, Tensor? local_key, "
    "Tensor? global_query, Tensor? seed"
)
_OPTIONS = "float scale, float dropout"
_FORWARD_SCHEMA = (
    f"co_attention_forward({_TENSORS}, {_OPTIONS}, bool keep, str backend) "
    "-> (Tensor local_out, Tensor global_out, Tensor local_lse, Tensor global_lse)"
)
_BACKWARD_SCHEMA = (
    f"co_attention_backward(Tensor? local_grad, Tensor? global_grad, {_TENSORS}, Tensor? local_out, "
    f"Tensor? local_lse, Tensor global_out, Tensor global_lse, {_OPTIONS}, bool[] needs, str backend) "
    f"-> ({', '.join(f'Tensor {name}_grad' for name in INPUTS)})"
)


def _empty(shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(tuple(shape), dtype=dtype or like.dtype, device=like.device)


def _empty_tokens(like: Tensor) -> Tensor:
    """Dense tokens in the map layout of ``like`` (B, N, heads, d)."""
    batch, tokens, heads, head_dim = like.shape
    if reference.is_nchw(like):
        return _empty((batch, heads, head_dim, tokens), like).permute(0, 3, 1, 2)
    return _empty(like.shape, like)


def allocate_forward(call: CoAttentionCall, keep: bool) -> tuple[Tensor, ...]:
    """local_out, global_out, and the logarithms of both softmaxes' sums.

    Those of the local tokens are absent where backward can do without: where nothing is kept for it
    (``keep``), and where one block holds all global tokens.
    """
    query, key = call.local_query, call.global_key
    local_lse = library.absent(query, torch.float32)
    if keep and not triton.whole(call):
        local_lse = _empty(query.shape[:3], query, torch.float32)
    return _empty_tokens(query), _empty(key.shape, key), local_lse, _empty(key.shape[:3], key, torch.float32)


def allocate_backward(call: CoAttentionCall, needs: Sequence[bool]) -> tuple[Tensor, ...]:
    """Gradients of all of :data:`INPUTS`; absent where not needed.

    Local ones are in the map layout of ``local_query``, global ones dense.
    """
    gradients = []
    for name, source, needed in zip(INPUTS, call.tensors(), needs, strict=True):
        if not needed or source is None:
            gradients.append(library.absent(call.local_query))
        elif name.startswith("local"):
            gradients.append(_empty_tokens(call.local_query))
        else:
            gradients.append(_empty(source.shape, source))
    return tuple(gradients)


def _forward(*arguments):
    *inputs, keep, backend = arguments
    call = CoAttentionCall(*inputs)
    return _BY_NAME[backend].forward(call, *allocate_forward(call, keep))


def _forward_fake(*arguments):
    *inputs, keep, _ = arguments
    return allocate_forward(CoAttentionCall(*inputs), keep)


def _backward(local_grad, global_grad, *arguments):
    *inputs, local_out, local_lse, global_out, global_lse, scale, dropout, needs, backend = arguments
    call = CoAttentionCall(*inputs, scale, dropout)
    outputs = (local_out, local_lse, global_out, global_lse)
    gradients = allocate_backward(call, needs)
    return _BY_NAME[backend].backward(call, local_grad, global_grad, outputs, needs, *gradients)


def _backward_fake(local_grad, global_grad, *arguments):
    *inputs, _, _, _, _, scale, dropout, needs, _ = arguments
    return allocate_backward(CoAttentionCall(*inputs, scale, dropout), needs)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.scale, ctx.dropout, _, ctx.backend = inputs
    local_out, global_out, local_lse, global_lse = output
    if local_lse.dim() == 1:
        # Backward recomputes the direction to local tokens from the inputs.
        local_out, local_lse = None, None
    ctx.save_for_backward(*tensors, local_out, local_lse, global_out, global_lse)
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)


def _autograd(ctx, local_grad, global_grad, *_):
    needs = dict(zip(INPUTS, ctx.needs_input_grad[: len(INPUTS)], strict=True))
    inputs = ctx.saved_tensors[: len(INPUTS) + 1]
    shared = inputs[-2] is None
    # What an output without a gradient alone depends on gets none.
    if local_grad is None:
        needs["global_value"] = False
    if global_grad is None:
        needs["local_value"] = False
    if not shared and local_grad is None:
        needs["local_query"] = needs["global_key"] = False
    if not shared and global_grad is None:
        needs["local_key"] = needs["global_query"] = False
    needs = list(needs.values())
    if (local_grad is None and global_grad is None) or not any(needs):
        return (None,) * 11
    if torch.is_grad_enabled():
        gradients = _differentiable_backward(ctx, inputs, (local_grad, global_grad), needs)
    else:
        gradients = _DIFFERENTIABLE.run_backward(
            local_grad, global_grad, *ctx.saved_tensors, ctx.scale, ctx.dropout, needs, ctx.backend
        )
    return (*gradients, *(None,) * 5)


def _differentiable_backward(
    ctx, inputs: Sequence[Tensor | None], grads: Sequence[Tensor | None], needs: list[bool]
) -> list[Tensor | None]:
    """Gradients with a graph of their own, for second derivatives: through the definition."""
    outputs = reference.co_attention(*inputs, scale=ctx.scale, dropout=ctx.dropout)
    given = [(out, grad) for out, grad in zip(outputs, grads, strict=True) if grad is not None]
    wanted = [index for index, need in enumerate(needs) if need]
    results = torch.autograd.grad(
        [out for out, _ in given],
        [inputs[index] for index in wanted],
        [grad for _, grad in given],
        create_graph=True,
    )
    gradients: list[Tensor | None] = [None] * len(needs)
    for index, gradient in zip(wanted, results, strict=True):
        gradients[index] = gradient
    return gradients


def _product_flops(query_shape: Sequence[int], keys: int) -> int:
    """Of one matrix product of all local with all global tokens."""
    batch, tokens, heads, head_dim = query_shape
    return 2 * batch * heads * tokens * keys * head_dim


def _forward_flops(*arguments, out_shape=None, **_) -> int:
    query_shape, key_shape, back_shape = arguments[0], arguments[2], arguments[5]
    return (3 if back_shape is None else 4) * _product_flops(query_shape, key_shape[1])


def _backward_flops(local_grad, global_grad, *arguments, out_shape=None, **_) -> int:
    query_shape, key_shape, back_shape = arguments[0], arguments[2], arguments[5]
    local_query, local_value, global_key, global_value, local_key, global_query = arguments[-2]
    to_local, to_global = local_grad is not None, global_grad is not None
    products = local_query + local_value + global_key + global_value + local_key + global_query
    # The scores once more, and the gradient of the weights where more than the values' is asked for.
    if back_shape is None:
        affinity = local_query or global_key
        products += 1 + (affinity and to_local) + (affinity and to_global)
    else:
        affinity = local_query or global_key
        products += affinity + (affinity or global_value)
        affinity = local_key or global_query
        products += affinity + (affinity or local_value)
    return products * _product_flops(query_shape, key_shape[1])


def least_bytes(call: CoAttentionCall, direction: str) -> int:
    """Bytes that the operator has to move through memory, with every gradient.

    Every input is read and both outputs are written; backward reads the inputs and the outputs' gradients and
    writes the gradients. Of tensors of all local tokens that is 4 and 7, and 3 and 5 with a shared affinity;
    of global tokens as many. What is kept from forward for backward and partial sums count above the least.
    """
    check_direction(direction)
    passes = {"forward": 3, "backward": 5} if call.shared else {"forward": 4, "backward": 7}
    size = call.local_query.element_size()
    return passes[direction] * size * (call.local_query.numel() + call.global_key.numel())


BACKENDS = (
    Backend("triton", triton.can_run, triton.forward, triton.backward, triton.tiles),
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
    once_differentiable="is differentiable only through co_attention with create_graph=True",
)


OPERATOR = library.register(
    library.Operator(
        "co_attention",
        co_attention,
        BACKENDS,
        cases,
        least_bytes,
        _DIFFERENTIABLE.overloads,
        triton.launch_count,
        matrix_products=True,
    )
)
