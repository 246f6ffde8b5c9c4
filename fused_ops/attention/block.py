"""The attention block: norm, query projection, attention with few keys, output projection, residual.

With ``z = norm(x)`` the scores of a head are ``(z Wqᵀ + bq) Kᵀ = z (K Wq)ᵀ + K bq``, and its share of the
output is ``P V Woᵀ = P (V Woᵀ)``. So both projections are multiplied into the few keys and values, by
PyTorch, and the operator sees heads as wide as the map: it needs no weights, and their gradients are small
products too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fused_ops.attention import reference, triton_block
from fused_ops.attention.cases import block_cases
from fused_ops.core import library
from fused_ops.core.autocast import autocast_off, result_dtype
from fused_ops.core.backends import Backend, choose, reference_can_run
from fused_ops.core.checks import (
    any_requires_grad,
    check_alike,
    check_device,
    check_direction,
    check_float,
    check_parameter,
)
from fused_ops.core.layer_norm import LayerNormState

# Inputs of the torch operators that are tensors, in order; the first seven get gradients from the backward
# operator, and the residual gets the result's.
_TENSORS = (
    "x",
    "key",
    "value",
    "score_bias",
    "out_bias",
    "norm_weight",
    "norm_bias",
    "residual",
    "drop_path",
)
_GRADIENTS = 7
_RESIDUAL = _TENSORS.index("residual")


@dataclass
class AttentionBlockCall:
    """One checked call: what a backend's ``can_run`` and launchers see.

    ``x`` and ``residual`` are (B, N, C), ``key`` and ``value`` (B, heads, Nk, C) with the projections in them
    (of width d without, while a backend is chosen), ``score_bias`` (B, heads, Nk) in float32. ``identity``:
    the residual is ``x``.
    """

    x: Tensor
    key: Tensor
    value: Tensor
    score_bias: Tensor | None
    out_bias: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    residual: Tensor | None
    drop_path: Tensor | None
    scale: float
    norm: bool
    eps: float
    identity: bool
    needs_grad: bool = False

    @property
    def compute(self) -> torch.dtype:
        """Of the products."""
        return self.key.dtype

    @property
    def heads(self) -> int:
        return self.key.shape[1]

    @property
    def keys(self) -> int:
        return self.key.shape[2]

    @property
    def out_dtype(self) -> torch.dtype:
        return self.x.dtype if self.identity or self.residual is not None else self.compute

    def tensors(self) -> tuple[Tensor | None, ...]:
        return tuple(getattr(self, name) for name in _TENSORS)

    def options(self) -> tuple[Any, ...]:
        return (self.scale, self.norm, self.eps, self.identity)

    def kind(self) -> dict[str, Any]:
        """What measurements of one call say about another depends on, apart from sizes."""
        return {
            "training": self.needs_grad,
            "dtype": str(self.x.dtype),
            "compute": str(self.compute),
            "norm": self.norm,
            "residual": "input" if self.identity else "other" if self.residual is not None else "none",
        }

    def sizes(self) -> tuple[int, ...]:
        """Tokens, keys, channels, heads."""
        return (self.x.shape[1], self.keys, self.x.shape[2], self.heads)

    def __str__(self) -> str:
        extras = {
            "LayerNorm": self.norm,
            "residual": self.identity or self.residual is not None,
            "drop path": self.drop_path is not None,
        }
        dtype = str(self.x.dtype).removeprefix("torch.")
        words = "".join(f", {name}" for name, on in extras.items() if on)
        return f"on {tuple(self.x.shape)} {dtype}, {self.keys} keys, {self.heads} heads{words}"


def _checked_inputs(
    x: Tensor,
    key: Tensor,
    value: Tensor,
    query_weight: Tensor,
    out_weight: Tensor,
    query_bias: Tensor | None,
    out_bias: Tensor | None,
    norm: LayerNormState | None,
    key_mask: Tensor | None,
    scale: float | None,
    drop_path: Tensor | None,
    residual: Tensor | None,
) -> None:
    """Raise for whatever :func:`attention_block` does not take."""
    if x.dim() != 3:
        raise ValueError(f"x has {x.dim()} dimensions; it must be (B, N, C)")
    check_float("x", x)
    batch, _, channels = x.shape
    if channels < 1:
        raise ValueError(f"x has shape {tuple(x.shape)}; it must have at least 1 channel")
    if key.dim() != 4 or key.shape[0] != batch or key.shape[2] < 1 or key.shape[3] < 1:
        raise ValueError(f"key has shape {tuple(key.shape)}; it must be ({batch}, Nk, heads, d)")
    if value.shape != key.shape:
        raise ValueError(f"value has shape {tuple(value.shape)}; it must be that of key, {tuple(key.shape)}")
    check_float("key", key)
    check_device("key", key, x)
    check_alike("value", value, key, "key")
    width = key.shape[2] * key.shape[3]
    check_parameter("query_weight", query_weight, (width, channels), "from the channels of x to all heads", x)
    check_parameter("out_weight", out_weight, (channels, width), "from all heads to the channels of x", x)
    check_parameter("query_bias", query_bias, (width,), "one per channel of all heads", x)
    check_parameter("out_bias", out_bias, (channels,), "one per channel", x)
    if norm is not None:
        if not isinstance(norm, LayerNormState):
            raise TypeError(f"norm is a {type(norm).__name__}; it must be a LayerNormState or None")
        for name in ("weight", "bias"):
            check_parameter(f"norm.{name}", getattr(norm, name), (channels,), "one per channel", x)
    if key_mask is not None:
        if key_mask.dtype != torch.bool or key_mask.shape != key.shape[:2]:
            found = f"{key_mask.dtype} {tuple(key_mask.shape)}"
            raise ValueError(f"key_mask is {found}; it must be bool {tuple(key.shape[:2])}")
        check_device("key_mask", key_mask, x)
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale={scale} is not allowed; it must be finite")
    check_parameter("drop_path", drop_path, (batch,), "one factor per image", x)
    if drop_path is not None and drop_path.requires_grad:
        raise ValueError("drop_path requires grad; it is a random factor and gets no gradient")
    if residual is not None:
        if residual.shape != x.shape:
            raise ValueError(
                f"residual has shape {tuple(residual.shape)}; it must be that of x, {tuple(x.shape)}"
            )
        check_alike("residual", residual, x)


def _project_keys(key: Tensor, weight: Tensor) -> Tensor:
    """Keys (B, Nk, heads, d) times (heads, d, C), as (B, heads, Nk, C): a product per head over the batch."""
    # Unbound, gradients are put together again in the layout of what was given, here and for weights.
    rows = torch.stack(key.unbind(2)).flatten(1, 2)
    return torch.bmm(rows, weight).unflatten(1, key.shape[:2]).transpose(0, 1)


def _score_bias(
    key: Tensor, query_bias: Tensor | None, key_mask: Tensor | None, scale: float
) -> Tensor | None:
    """``scale K bq`` (B, heads, Nk) in float32, minus infinity where a key is masked; None for zeros."""
    dtype = torch.promote_types(key.dtype, torch.float32)
    bias = None
    if query_bias is not None:
        per_head = query_bias.to(dtype).view(key.shape[2:])
        bias = ((key.to(dtype) * per_head).sum(-1) * scale).transpose(1, 2)
    if key_mask is not None:
        if bias is None:
            bias = torch.zeros((1, 1, 1), dtype=dtype, device=key.device)
            bias = bias.expand(key.shape[0], key.shape[2], key.shape[1])
        bias = bias.masked_fill(~key_mask[:, None, :], float("-inf"))
    return bias


def attention_block(
    x: Tensor,
    key: Tensor,
    value: Tensor,
    query_weight: Tensor,
    out_weight: Tensor,
    norm: LayerNormState | None = None,
    *,
    query_bias: Tensor | None = None,
    out_bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    drop_path: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """A transformer's attention branch over few keys, from its norm to its residual, as one operator.

    ``[residual +] drop_path * out(attention(query(norm(x)), key, value))`` for every token. Neither the
    norm's output, queries, probabilities nor the heads' results are ever in memory. Passing ``x`` itself as
    the residual is recognised, and the kernels then read it once.

    The kernels reorder the operations: both projections are multiplied into keys and values first. That is
    the same function, rounded elsewhere.

    Under autocast the products are in its dtype and everything else in that of ``x``, which is not cast.

    Args:
        x: tokens (B, N, C), any strides; float32, float16, bfloat16 or float64.
        key, value: (B, Nk, heads, d), any strides; usually views of a packed projection of a reduced map.
        query_weight, out_weight: (heads d, C) and (C, heads d), as of ``torch.nn.Linear``; these and all
            other parameters in the dtype of ``x`` or float32.
        norm: state of a LayerNorm over channels, see :meth:`fused_ops.LayerNormState.from_module`; None for
            none.
        query_bias, out_bias: (heads d) and (C), or None.
        key_mask: bool (B, Nk), true where a key takes part, or None for all. Without any key a token gets the
            output's bias alone.
        scale: of the scores; None for ``d ** -0.5``.
        drop_path: factor per image (B), 0 or one over the probability to keep it; None for 1. Gets no
            gradient.
        residual: (B, N, C) in the dtype of ``x``, or None.

    Returns:
        (B, N, C) in the dtype of ``x``; without a residual in that of the products.

    Raises:
        ValueError, TypeError: an argument is not allowed; the message names it, its value and what is.
        fused_ops.BackendUnavailableError: a backend was requested by name and cannot run this call.
    """
    _checked_inputs(
        x,
        key,
        value,
        query_weight,
        out_weight,
        query_bias,
        out_bias,
        norm,
        key_mask,
        scale,
        drop_path,
        residual,
    )
    compute = result_dtype(x)
    head_dim = key.shape[3]
    scale = head_dim**-0.5 if scale is None else float(scale)
    with autocast_off(x):
        key, value = key.to(compute), value.to(compute)
        call = AttentionBlockCall(
            x,
            key.transpose(1, 2),
            value.transpose(1, 2),
            None,
            out_bias,
            None if norm is None else norm.weight,
            None if norm is None else norm.bias,
            None if residual is x else residual,
            None if drop_path is None else drop_path.contiguous(),
            scale,
            norm is not None,
            1e-5 if norm is None else norm.eps,
            residual is x,
        )
        call.needs_grad = any_requires_grad(*call.tensors(), query_weight, query_bias, out_weight)
        backend = choose("attention_block", BACKENDS, call)
        if backend.name == "reference":
            return reference.attention_block(
                x,
                key,
                value,
                query_weight,
                out_weight,
                norm,
                query_bias,
                out_bias,
                key_mask,
                scale,
                drop_path,
                residual,
            )
        return _run(call, query_weight, query_bias, out_weight, key_mask, backend.name)


def _run(
    call: AttentionBlockCall,
    query_weight: Tensor,
    query_bias: Tensor | None,
    out_weight: Tensor,
    key_mask: Tensor | None,
    backend: str,
) -> Tensor:
    """The operator on a call whose keys and values (B, heads, Nk, d) have no projections in them yet."""
    key, (heads, head_dim) = call.key.transpose(1, 2), (call.heads, call.key.shape[3])
    call.score_bias = _score_bias(key, query_bias, key_mask, call.scale)
    call.key = _project_keys(key, query_weight.to(call.compute).view(heads, head_dim, -1))
    per_head = out_weight.to(call.compute).view(-1, heads, head_dim).unbind(1)
    per_head = torch.stack([weight.t() for weight in per_head])
    call.value = _project_keys(call.value.transpose(1, 2), per_head)
    return _DIFFERENTIABLE.run(call.needs_grad, *call.tensors(), *call.options(), backend)


_INPUTS = (
    "Tensor x, Tensor key, Tensor value, Tensor? score_bias, Tensor? out_bias, Tensor? norm_weight, "
    "Tensor? norm_bias, Tensor? residual, Tensor? drop_path"
)
_OPTIONS = "float scale, bool norm, float eps, bool identity"
_FORWARD_SCHEMA = f"attention_block_forward({_INPUTS}, {_OPTIONS}, str backend) -> Tensor"
_BACKWARD_SCHEMA = (
    f"attention_block_backward(Tensor grad, {_INPUTS}, {_OPTIONS}, bool[] needs, str backend) "
    "-> (Tensor x_grad, Tensor key_grad, Tensor value_grad, Tensor score_bias_grad, Tensor out_bias_grad, "
    "Tensor norm_weight_grad, Tensor norm_bias_grad)"
)


def _empty(like: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(tuple(like.shape), dtype=dtype, device=like.device)


def _allocate_forward(call: AttentionBlockCall) -> Tensor:
    return _empty(call.x, call.out_dtype)


def _allocate_backward(call: AttentionBlockCall, needs: list[bool]) -> tuple[Tensor, ...]:
    """Dense gradients; those that kernels write together are all there where one is asked for."""
    rows, keys = triton_block.wanted(needs)
    there = (rows, keys, keys, *needs[3:])
    return tuple(
        _empty(source, source.dtype) if wanted and source is not None else library.absent(call.x)
        for source, wanted in zip(call.tensors()[:_GRADIENTS], there, strict=True)
    )


def _forward(*inputs):
    call = AttentionBlockCall(*inputs[:-1])
    return _BY_NAME[inputs[-1]].forward(call, _allocate_forward(call))


def _forward_fake(*inputs):
    return _allocate_forward(AttentionBlockCall(*inputs[:-1]))


def _backward(grad, *inputs):
    *arguments, needs, backend = inputs
    call = AttentionBlockCall(*arguments)
    return _BY_NAME[backend].backward(call, grad, list(needs), *_allocate_backward(call, needs))


def _backward_fake(grad, *inputs):
    *arguments, needs, _ = inputs
    return _allocate_backward(AttentionBlockCall(*arguments), needs)


def _setup_context(ctx, inputs, output) -> None:
    tensors, (*ctx.options, ctx.backend) = inputs[: len(_TENSORS)], inputs[len(_TENSORS) :]
    # Nothing of what is computed on the way; of the residual nothing is needed.
    ctx.save_for_backward(*tensors[:_RESIDUAL], None, *tensors[_RESIDUAL + 1 :])
    ctx.set_materialize_grads(False)


def _autograd(ctx, grad):
    others = (None,) * (len(_TENSORS) - _RESIDUAL - 1 + len(ctx.options) + 1)
    if grad is None:
        return (None,) * (_RESIDUAL + 1) + others
    needs = list(ctx.needs_input_grad[:_GRADIENTS])
    gradients = [None] * _GRADIENTS
    if any(needs):
        gradients = _DIFFERENTIABLE.run_backward(grad, *ctx.saved_tensors, *ctx.options, needs, ctx.backend)
    return (*gradients, grad if ctx.needs_input_grad[_RESIDUAL] else None, *others)


def _product_flops(x_shape: tuple[int, ...], key_shape: tuple[int, ...]) -> int:
    """Of one matrix product of all tokens with the keys or values of all heads, as wide as the map."""
    batch, tokens, channels = x_shape
    return 2 * batch * tokens * key_shape[1] * key_shape[2] * channels


def _forward_flops(x_shape, key_shape, *_, out_shape=None, **__) -> int:
    return 2 * _product_flops(x_shape, key_shape)


def _backward_flops(grad_shape, x_shape, key_shape, *arguments, out_shape=None, **__) -> int:
    rows, keys = triton_block.wanted(arguments[-2])
    # Scores and the gradients of the probabilities, for tokens and for keys.
    again = 2 * (rows + keys)
    return (again + rows + 2 * keys) * _product_flops(x_shape, key_shape)


def least_bytes(call: AttentionBlockCall, direction: str) -> int:
    """Bytes that the schedule in use has to move through memory; vectors are left out.

    Forward: tokens, keys, values and a residual of its own are read, the output is written. Backward, with
    all gradients: tokens and the gradient are read and the tokens' gradient is written; keys and values are
    read and their gradients written. With several heads, or large tiles of keys, the keys' gradients take a
    pass of their own, since no program can hold those of all: everything is read twice.
    """
    check_direction(direction)
    x = call.x.element_size() * call.x.numel()
    out = call.out_dtype.itemsize * call.x.numel()
    key = call.key.element_size() * call.key.numel()
    if direction == "forward":
        return x + out + 2 * key + (x if call.residual is not None else 0)
    once = x + out + 2 * key
    return once * triton_block.passes(call) + x + 2 * key


BACKENDS = (
    Backend(
        "triton", triton_block.can_run, triton_block.forward, triton_block.backward, tiles=triton_block.tiles
    ),
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
    once_differentiable="has no derivative of its own; for second derivatives run attention_block inside "
    'fused_ops.backend("reference") in float64',
)
OPERATOR = library.register(
    library.Operator(
        "attention_block",
        attention_block,
        BACKENDS,
        block_cases,
        least_bytes,
        _DIFFERENTIABLE.overloads,
        triton_block.launch_count,
        matrix_products=True,
    )
)
