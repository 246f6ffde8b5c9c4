"""The feed-forward operator: argument checks, choice of backend, torch operators, autograd, formulas."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fused_ops.core import library
from fused_ops.core.activations import FUNCTIONS
from fused_ops.core.autocast import autocast_off, result_dtype
from fused_ops.core.backends import Backend, choose, reference_can_run
from fused_ops.core.batch_norm import BatchNormState
from fused_ops.core.checks import (
    any_requires_grad,
    check_activation,
    check_alike,
    check_choice,
    check_companion,
    check_direction,
    check_float,
    check_norm,
    check_parameter,
    check_values_per_channel,
)
from fused_ops.core.layer_norm import LayerNormState
from fused_ops.feed_forward import reference, triton, triton_conv, triton_products
from fused_ops.feed_forward.cases import cases, conv_cases

# Inputs of the torch operators that are tensors, in order; the first ten get gradients from the backward
# operator, and the residual gets the result's.
_TENSORS = (
    "x",
    "fc1_weight",
    "fc1_bias",
    "fc2_weight",
    "fc2_bias",
    "norm_weight",
    "norm_bias",
    "layer_scale",
    "conv_weight",
    "conv_bias",
    "mean",
    "var",
    "residual",
    "drop_path",
)
_GRADIENTS = 10
_RESIDUAL = _TENSORS.index("residual")
_COUNT = len(_TENSORS)


@dataclass
class FeedForwardCall:
    """One checked call: what a backend's ``can_run`` and launchers see.

    ``x`` and ``residual`` are (B, N, C). ``norm`` is none, batch or layer; ``mean`` and ``var`` are a
    BatchNorm's running statistics when ``batch_stats`` is false, else None. ``identity``: the residual is
    ``x``. ``compute`` is the dtype of both products. ``keep_value``: what fc1 gives is kept for backward,
    where it is in memory at all, and without a convolution what the norm gives too.

    With ``conv_weight`` there is a depthwise convolution behind ``activation``, on maps of ``size`` (H, W).
    """

    x: Tensor
    fc1_weight: Tensor
    fc1_bias: Tensor | None
    fc2_weight: Tensor
    fc2_bias: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    layer_scale: Tensor | None
    conv_weight: Tensor | None
    conv_bias: Tensor | None
    mean: Tensor | None
    var: Tensor | None
    residual: Tensor | None
    drop_path: Tensor | None
    norm: str
    batch_stats: bool
    eps: float
    activation: str
    identity: bool
    compute: torch.dtype
    group: str = ""
    keep_value: bool = False
    size: tuple[int, ...] = ()
    conv_activation: str = "none"
    conv_identity: bool = False
    needs_grad: bool = False

    @property
    def operator(self) -> str:
        return "feed_forward" if self.conv_weight is None else "feed_forward_conv"

    @property
    def has_normalised(self) -> bool:
        """Whether the norm's output is another tensor than ``x``."""
        return self.norm != "none" or self.x.dtype != self.compute

    @property
    def out_dtype(self) -> torch.dtype:
        if self.identity:
            return self.x.dtype
        return self.compute if self.residual is None else self.residual.dtype

    def tensors(self) -> tuple[Tensor | None, ...]:
        return tuple(getattr(self, name) for name in _TENSORS)

    def options(self) -> tuple[Any, ...]:
        return (
            self.norm,
            self.batch_stats,
            self.eps,
            self.activation,
            self.identity,
            self.compute,
            self.group,
            self.keep_value,
            self.size,
            self.conv_activation,
            self.conv_identity,
        )

    def kind(self) -> dict[str, Any]:
        """What measurements of one call say about another depends on, apart from sizes."""
        channels = self.x.shape[-1]
        return {
            "training": self.needs_grad,
            "dtype": str(self.x.dtype),
            "compute": str(self.compute),
            "expansion": round(self.fc1_weight.shape[0] / channels, 2) if channels else 0,
            "activation": self.activation,
            "norm": self.norm,
            "batch_stats": self.batch_stats,
            "residual": "input" if self.identity else "other" if self.residual is not None else "none",
            "convolution": self._convolution() or "none",
        }

    def sizes(self) -> tuple[int, ...]:
        """Channels and tokens of an image; with a convolution channels, height and width."""
        return (self.x.shape[2], *(self.size or self.x.shape[1:2]))

    def _convolution(self) -> str:
        if self.conv_weight is None:
            return ""
        identity = " + identity" if self.conv_identity else ""
        return f"3x3 depthwise{identity}, activation {self.conv_activation}"

    def __str__(self) -> str:
        dtype = str(self.x.dtype).removeprefix("torch.")
        norm = {
            "none": "no norm",
            "layer": "LayerNorm",
            "batch": f"BatchNorm with {'batch' if self.batch_stats else 'running'} statistics",
        }[self.norm]
        extras = {
            "residual": self.identity or self.residual is not None,
            "layer scale": self.layer_scale is not None,
            "drop path": self.drop_path is not None,
        }
        convolution = f", {self._convolution()}" if self.conv_weight is not None else ""
        return (
            f"on {tuple(self.x.shape)} {dtype}, hidden width {self.fc1_weight.shape[0]}, {norm}, activation "
            f"{self.activation}{convolution}{''.join(f', {name}' for name, on in extras.items() if on)}"
        )


def checked_call(
    x: Tensor,
    fc1_weight: Tensor,
    fc2_weight: Tensor,
    norm: BatchNormState | LayerNormState | None,
    fc1_bias: Tensor | None = None,
    fc2_bias: Tensor | None = None,
    activation: str = "gelu",
    layer_scale: Tensor | None = None,
    drop_path: Tensor | None = None,
    residual: Tensor | None = None,
    compute: torch.dtype | None = None,
    conv_weight: Tensor | None = None,
    conv_bias: Tensor | None = None,
    conv_activation: str = "none",
    conv_identity: bool = False,
    size: tuple[int, ...] = (),
) -> FeedForwardCall:
    """What a call of :func:`mlp_block` with these arguments is; ``compute``: the dtype of the products.

    With ``conv_weight``, of :func:`conv_mlp_block` on tokens or on maps (B, H, W, C), and ``size`` is (H, W).
    """
    if x.dim() < 2:
        raise ValueError(f"x has {x.dim()} dimension; it must be (B, ..., C)")
    check_float("x", x)
    batch, channels = x.shape[0], x.shape[-1]
    if channels < 1:
        raise ValueError(f"x has shape {tuple(x.shape)}; it must have at least 1 channel")
    if fc1_weight.dim() != 2 or fc1_weight.shape[0] < 1:
        raise ValueError(f"fc1_weight has shape {tuple(fc1_weight.shape)}; it must be (hidden, {channels})")
    hidden = fc1_weight.shape[0]
    per_channel = "one per channel"
    check_parameter(
        "fc1_weight", fc1_weight, (hidden, channels), "from the channels of x to the hidden units", x
    )
    check_parameter(
        "fc2_weight", fc2_weight, (channels, hidden), "from fc1's hidden units to the channels of x", x
    )
    check_parameter("fc1_bias", fc1_bias, (hidden,), "one per hidden unit", x)
    check_parameter("fc2_bias", fc2_bias, (channels,), per_channel, x)
    check_parameter("layer_scale", layer_scale, (channels,), per_channel, x)
    check_parameter("conv_weight", conv_weight, (hidden, 1, 3, 3), "one 3x3 filter per hidden unit", x)
    check_parameter("conv_bias", conv_bias, (hidden,), "one per hidden unit", x)
    check_parameter("drop_path", drop_path, (batch,), "one factor per image", x)
    if drop_path is not None and drop_path.requires_grad:
        raise ValueError("drop_path requires grad; it is a random factor and gets no gradient")
    check_activation(activation)
    check_choice("conv_activation", conv_activation, tuple(FUNCTIONS))
    kind, batch_stats = "none", False
    if isinstance(norm, BatchNormState):
        check_norm(norm, x, channels)
        kind, batch_stats = "batch", norm.batch_stats
    elif isinstance(norm, LayerNormState):
        for name in ("weight", "bias"):
            check_parameter(f"norm.{name}", getattr(norm, name), (channels,), per_channel, x)
        kind = "layer"
    elif norm is not None:
        raise TypeError(
            f"norm is a {type(norm).__name__}; it must be a BatchNormState, a LayerNormState or None"
        )
    running = kind == "batch" and not batch_stats
    identity = residual is x
    if residual is not None:
        _check_residual(residual, x)
    tokens = math.prod(x.shape[1:-1])
    call = FeedForwardCall(
        x.reshape(batch, tokens, channels),
        fc1_weight,
        fc1_bias,
        fc2_weight,
        fc2_bias,
        None if norm is None else norm.weight,
        None if norm is None else norm.bias,
        layer_scale,
        conv_weight,
        conv_bias,
        norm.running_mean if running else None,
        norm.running_var if running else None,
        None if identity or residual is None else residual.reshape(batch, tokens, channels),
        None if drop_path is None else drop_path.contiguous(),
        kind,
        batch_stats,
        1e-5 if norm is None else norm.eps,
        activation,
        identity,
        x.dtype if compute is None else compute,
        norm.group if batch_stats else "",
        size=size,
        conv_activation=conv_activation,
        conv_identity=conv_identity,
    )
    if batch_stats and not call.group:
        check_values_per_channel((batch * tokens, channels, 1, 1))
    call.needs_grad = any_requires_grad(*call.tensors()[:_GRADIENTS], residual)
    needs_value = any_requires_grad(*call.tensors()[:_GRADIENTS])
    call.keep_value = needs_value and not triton.stays_on_chip(call)
    return call


def _check_residual(residual: Tensor, x: Tensor) -> None:
    if residual.shape != x.shape:
        raise ValueError(
            f"residual has shape {tuple(residual.shape)}; it must be that of x, {tuple(x.shape)}"
        )
    check = check_alike if x.dtype == torch.float64 else check_companion
    check("residual", residual, x)


def mlp_block(
    x: Tensor,
    fc1_weight: Tensor,
    fc2_weight: Tensor,
    norm: BatchNormState | LayerNormState | None = None,
    *,
    fc1_bias: Tensor | None = None,
    fc2_bias: Tensor | None = None,
    activation: str = "gelu",
    layer_scale: Tensor | None = None,
    drop_path: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Norm, two fully connected layers with an activation between them, and the residual, as one operator.

    ``[residual +] drop_path * layer_scale * fc2(act(fc1(norm(x))))`` for every token. Neither the norm's
    output nor the hidden values are ever in memory. Passing ``x`` itself as the residual is recognised, and
    the kernels then read it once.

    Under autocast the products are in its dtype and everything else in that of ``x``, which is not cast.
    Float32 weights of fc1 and fc2 are rounded to the dtype of the products, all other parameters are used as
    they are. In bfloat16 products, exact GELU is within 2.3e-4 of its value (bfloat16 rounds by 2e-3).

    Args:
        x: tokens (B, ..., C), maps as (B, H, W, C); any strides; float32, float16, bfloat16 or float64.
        fc1_weight, fc2_weight: (hidden, C) and (C, hidden), as of ``torch.nn.Linear``; these and all other
            parameters in the dtype of ``x`` or float32.
        norm: state of a BatchNorm over all tokens (its running statistics are updated in place when it uses
            the batch's) or of a LayerNorm over channels, see :meth:`fused_ops.BatchNormState.from_module` and
            :meth:`fused_ops.LayerNormState.from_module`; None for none.
        fc1_bias, fc2_bias: (hidden) and (C), or None.
        activation: none, relu, relu6, silu, gelu (exact), gelu_tanh or hardswish.
        layer_scale: factor per channel (C), or None for 1.
        drop_path: factor per image (B), 0 or one over the probability to keep it; None for 1. Gets no
            gradient.
        residual: (B, ..., C) in the dtype of ``x`` or float32, or None.

    Returns:
        (B, ..., C) in the dtype of the residual; without one in that of the products.

    Raises:
        ValueError, TypeError: an argument is not allowed; the message names it, its value and what is.
        fused_ops.BackendUnavailableError: a backend was requested by name and cannot run this call.
    """
    call = checked_call(
        x,
        fc1_weight,
        fc2_weight,
        norm,
        fc1_bias,
        fc2_bias,
        activation,
        layer_scale,
        drop_path,
        residual,
        result_dtype(x),
    )
    return _run(call, norm, BACKENDS).view(x.shape)


def conv_mlp_block(
    x: Tensor,
    fc1_weight: Tensor,
    conv_weight: Tensor,
    fc2_weight: Tensor,
    norm: BatchNormState | LayerNormState | None = None,
    *,
    size: tuple[int, int] | None = None,
    fc1_bias: Tensor | None = None,
    conv_bias: Tensor | None = None,
    fc2_bias: Tensor | None = None,
    activation: str = "none",
    conv_activation: str = "gelu",
    conv_identity: bool = False,
    layer_scale: Tensor | None = None,
    drop_path: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """:func:`mlp_block` with a 3x3 depthwise convolution of the hidden map, as one operator.

    ``[residual +] drop_path * layer_scale * fc2(q)`` with ``h = activation(fc1(norm(x)))`` and
    ``q = conv_activation(conv(h) + conv_bias) [+ h]``, padded with zeros to keep the map's size. PVTv2's MLP
    (Wang et al., Computational Visual Media 2022) has the activation behind the convolution, which is the
    default, and in its linear form ``activation="relu"`` too; HIRI-ViT's CFFN (Yao et al., TPAMI 2024) is
    ``activation="gelu", conv_activation="none", conv_identity=True``.

    The convolution with both activations and the identity is one pass over the hidden map; ``x`` and fc1's
    result are all that is kept for backward. Autocast, dtypes and the residual are as in :func:`mlp_block`;
    the convolution runs in the dtype of the products with its weights as they are, and its activations use
    the error function for GELU in every dtype.

    Args:
        x: map (B, C, H, W), channels_last or NCHW, or tokens (B, H*W, C) with ``size``; slices too. float32,
            float16, bfloat16 or float64.
        fc1_weight, fc2_weight: (hidden, C) and (C, hidden), as of ``torch.nn.Linear``.
        conv_weight: (hidden, 1, 3, 3), as of ``torch.nn.Conv2d(groups=hidden)``. These and all other
            parameters in the dtype of ``x`` or float32.
        norm: see :func:`mlp_block`.
        size: (H, W) of tokens; None for maps.
        fc1_bias, conv_bias, fc2_bias: (hidden), (hidden) and (C), or None.
        activation, conv_activation: none, relu, relu6, silu, gelu (exact), gelu_tanh or hardswish.
        conv_identity: add what the convolution gets, behind ``conv_activation``.
        layer_scale: factor per channel (C), or None for 1.
        drop_path: factor per image (B), 0 or one over the probability to keep it; None for 1. Gets no
            gradient.
        residual: in the shape of ``x``, in its dtype or float32, or None.

    Returns:
        In the shape and the layout of ``x`` and the dtype of the residual; without one in that of the
        products.

    Raises:
        ValueError, TypeError: an argument is not allowed; the message names it, its value and what is.
        fused_ops.BackendUnavailableError: a backend was requested by name and cannot run this call.
    """
    if conv_weight is None:
        raise TypeError("conv_weight is None; without a convolution there is mlp_block")
    is_map = x.dim() == 4
    if is_map:
        if size is not None and tuple(size) != tuple(x.shape[2:]):
            raise ValueError(f"size={tuple(size)} is given, and x is a map of {tuple(x.shape[2:])}")
        size = x.shape[2:]
    elif x.dim() != 3:
        raise ValueError(f"x has {x.dim()} dimensions; it must be a map (B, C, H, W) or tokens (B, H*W, C)")
    elif size is None:
        raise ValueError("size is missing; tokens (B, H*W, C) need the map's (H, W)")
    elif len(size) != 2 or min(size) < 0 or size[0] * size[1] != x.shape[1]:
        raise ValueError(f"size={tuple(size)} does not fit x, which has {x.shape[1]} tokens per image")
    if residual is not None:
        _check_residual(residual, x)
    tokens = x.permute(0, 2, 3, 1) if is_map else x
    if residual is x:
        residual = tokens
    elif is_map and residual is not None:
        residual = residual.permute(0, 2, 3, 1)
    call = checked_call(
        tokens,
        fc1_weight,
        fc2_weight,
        norm,
        fc1_bias,
        fc2_bias,
        activation,
        layer_scale,
        drop_path,
        residual,
        result_dtype(x),
        conv_weight,
        conv_bias,
        conv_activation,
        conv_identity,
        tuple(size),
    )
    out = _run(call, norm, CONV_BACKENDS)
    return out.view(tokens.shape).permute(0, 3, 1, 2) if is_map else out


def _run(
    call: FeedForwardCall, norm: BatchNormState | LayerNormState | None, backends: tuple[Backend, ...]
) -> Tensor:
    """The result (B, N, C) of a checked call; updates the running statistics of ``norm``."""
    backend = choose(call.operator, backends, call)
    if backend.name == "reference":
        with autocast_off(call.x):
            return _reference(call, norm)
    out, _, _, mean, _, unbiased = _DIFFERENTIABLE.run(
        call.needs_grad, *call.tensors(), *call.options(), backend.name
    )
    if call.batch_stats:
        norm.update_running(mean, unbiased)
    return out


def _reference(call: FeedForwardCall, norm: BatchNormState | LayerNormState | None) -> Tensor:
    is_batch = call.norm == "batch"
    return reference.feed_forward(
        call.x,
        call.fc1_weight,
        call.fc2_weight,
        call.fc1_bias,
        call.fc2_bias,
        call.norm_weight,
        call.norm_bias,
        call.layer_scale,
        norm.running_mean if is_batch else None,
        norm.running_var if is_batch else None,
        call.x if call.identity else call.residual,
        call.drop_path,
        norm=call.norm,
        batch_stats=call.batch_stats,
        momentum=norm.momentum if is_batch else 0.0,
        eps=call.eps,
        activation=call.activation,
        group=call.group,
        compute=call.compute,
        conv_weight=call.conv_weight,
        conv_bias=call.conv_bias,
        conv_activation=call.conv_activation,
        conv_identity=call.conv_identity,
        size=call.size,
    )


_INPUTS = (
    "Tensor x, Tensor fc1_weight, Tensor? fc1_bias, Tensor fc2_weight, Tensor? fc2_bias, "
    "Tensor? norm_weight, Tensor? norm_bias, Tensor? layer_scale, Tensor? conv_weight, Tensor? conv_bias, "
    "Tensor? mean, Tensor? var, Tensor? residual, Tensor? drop_path"
)
_OPTIONS = (
    "str norm, bool batch_stats, float eps, str activation, bool identity, ScalarType compute, str group, "
    "bool keep_value, SymInt[] size, str conv_activation, bool conv_identity"
)
_FORWARD_SCHEMA = (
    f"feed_forward_forward({_INPUTS}, {_OPTIONS}, str backend) "
    "-> (Tensor out, Tensor normalised, Tensor value, "
    "Tensor batch_mean, Tensor batch_var, Tensor unbiased_var)"
)
_BACKWARD_SCHEMA = (
    f"feed_forward_backward(Tensor grad, Tensor normalised, Tensor value, {_INPUTS}, {_OPTIONS}, "
    "bool[] needs, str backend) "
    "-> (Tensor x_grad, Tensor fc1_weight_grad, Tensor fc1_bias_grad, Tensor fc2_weight_grad, "
    "Tensor fc2_bias_grad, Tensor norm_weight_grad, Tensor norm_bias_grad, Tensor layer_scale_grad, "
    "Tensor conv_weight_grad, Tensor conv_bias_grad)"
)


def allocate_forward(call: FeedForwardCall) -> tuple[Tensor, ...]:
    """Outputs of the forward operator: out; what the norm and fc1 gave, absent unless kept; batch mean, var,
    unbiased var."""
    out = torch.empty_like(call.x, dtype=call.out_dtype)
    value = library.absent(call.x, call.compute)
    if call.keep_value:
        rows, channels = call.x.shape[0] * call.x.shape[1], call.x.shape[2]
        value = call.x.new_empty((rows, call.fc1_weight.shape[0]), dtype=call.compute)
    normalised = library.absent(call.x, call.compute)
    if call.keep_value and call.has_normalised and call.conv_weight is None:
        normalised = call.x.new_empty((rows, channels), dtype=call.compute)
    count = call.x.shape[-1] if call.batch_stats else 0
    dtype = torch.float64 if call.x.dtype == torch.float64 else torch.float32
    return out, normalised, value, *(torch.empty(count, dtype=dtype, device=call.x.device) for _ in range(3))


def allocate_backward(call: FeedForwardCall, needs: list[bool]) -> tuple[Tensor, ...]:
    """Gradients of the first ten tensors; absent where not needed."""
    gradients = []
    for name, source, needed in zip(_TENSORS, call.tensors(), needs, strict=False):
        if not needed or source is None:
            gradients.append(library.absent(call.x if source is None else source))
        else:
            # Like x, the result of empty_like is dense in the order of its strides; parameters are packed.
            gradients.append(torch.empty_like(source) if name == "x" else library.empty(source.shape, source))
    return tuple(gradients)


def _forward(*inputs):
    *arguments, backend = inputs
    call = FeedForwardCall(*arguments)
    return _BY_NAME[backend].forward(call, *allocate_forward(call))


def _forward_fake(*inputs):
    *arguments, _ = inputs
    return allocate_forward(FeedForwardCall(*arguments))


def _backward(grad, normalised, value, *inputs):
    *arguments, needs, backend = inputs
    call = FeedForwardCall(*arguments)
    gradients = allocate_backward(call, needs)
    return _BY_NAME[backend].backward(call, grad, normalised, value, list(needs), *gradients)


def _backward_fake(grad, normalised, value, *inputs):
    *arguments, needs, _ = inputs
    return allocate_backward(FeedForwardCall(*arguments), needs)


def _setup_context(ctx, inputs, output) -> None:
    tensors, options = inputs[:_COUNT], inputs[_COUNT:]
    *ctx.options, ctx.backend = options
    _, normalised, value, batch_mean, batch_var, unbiased = output
    *parameters, mean, var, _, drop_path = tensors
    if options[1]:
        mean, var = batch_mean, batch_var
    # Backward needs the residual's place, not its values.
    ctx.save_for_backward(normalised, value, *parameters, mean, var, None, drop_path)
    ctx.mark_non_differentiable(normalised, value, batch_mean, batch_var, unbiased)
    ctx.set_materialize_grads(False)


def _autograd(ctx, grad, *_):
    inputs = _COUNT + len(ctx.options) + 1
    if grad is None:
        return (None,) * inputs
    needs = [bool(needed) for needed in ctx.needs_input_grad[:_GRADIENTS]]
    gradients = [None] * _GRADIENTS
    if any(needs):
        gradients = _DIFFERENTIABLE.run_backward(grad, *ctx.saved_tensors, *ctx.options, needs, ctx.backend)
    result = [*gradients, *(None,) * (inputs - _GRADIENTS)]
    if ctx.needs_input_grad[_RESIDUAL]:
        result[_RESIDUAL] = grad
    return tuple(result)


def _product_flops(x_shape: tuple[int, ...], hidden: int) -> int:
    batch, tokens, channels = x_shape
    return 2 * batch * tokens * channels * hidden


def _convolution_flops(x_shape: tuple[int, ...], conv_shape: tuple[int, ...] | None) -> int:
    return 0 if conv_shape is None else 2 * x_shape[0] * x_shape[1] * math.prod(conv_shape)


def _forward_flops(x_shape, *arguments, out_shape=None, **__) -> int:
    shapes = dict(zip(_TENSORS, (x_shape, *arguments), strict=False))
    products = 2 * _product_flops(x_shape, shapes["fc1_weight"][0])
    return products + _convolution_flops(x_shape, shapes["conv_weight"])


def _backward_flops(grad_shape, normalised_shape, value_shape, *arguments, out_shape=None, **__) -> int:
    needs = dict(zip(_TENSORS, arguments[-2], strict=False))
    shapes = dict(zip(_TENSORS, arguments, strict=False))
    to_input = needs["x"] or needs["norm_weight"] or needs["norm_bias"]
    to_hidden = to_input or needs["fc1_weight"] or needs["fc1_bias"]
    to_fc2 = to_hidden or needs["conv_weight"] or needs["conv_bias"]
    fc2 = needs["fc2_weight"] or needs["layer_scale"]
    products = sum(map(bool, (to_input, to_fc2, needs["fc1_weight"], fc2)))
    convolutions = bool(to_hidden) + bool(needs["conv_weight"])
    return products * _product_flops(grad_shape, shapes["fc1_weight"][0]) + convolutions * _convolution_flops(
        grad_shape, shapes["conv_weight"]
    )


def least_bytes(call: FeedForwardCall, direction: str) -> int:
    """Bytes that have to move through memory, whatever the kernels; parameters and their sums left out.

    Forward: x and a residual of its own are read and the result written; batch statistics read x once more.
    Backward, with all gradients: x and the gradient are read once for the gradients of the weights, and once
    more for that of x, which is written: one program cannot hold all weights' gradients and a tile of x.

    Wide tokens, and all with a convolution, have their hidden values in memory, as operands of matrix
    products; see :func:`_wide_bytes`.
    """
    check_direction(direction)
    x = call.x.element_size() * call.x.numel()
    out = call.out_dtype.itemsize * call.x.numel()
    if not triton.stays_on_chip(call):
        return _wide_bytes(call, direction, x, out)
    if direction == "forward":
        return (1 + call.batch_stats) * x + out + (0 if call.residual is None else out)
    return 3 * x + 2 * out


def _wide_bytes(call: FeedForwardCall, direction: str, x: int, out: int) -> int:
    """What products and passes over tokens read and write, the products' matrices too.

    ``x`` and ``out`` are bytes of each.

    Forward: the norm, fc1, the activation, fc2, the sum with the residual. Backward: each layer's two
    gradients, the activation and its derivative, the norm's sums and its gradient, both biases'.

    In half precision the norm by the batch's statistics, the activation, the sum, drop path, fc1's bias and
    the activation's derivative are part of the products.

    A convolution takes the activation's place. Backward it and the norm are computed once more, and its own
    pass gives the gradients of its input, its weights and fc1's bias.
    """
    packed = call.compute.itemsize * call.x.numel()
    hidden = packed * call.fc1_weight.shape[0] // max(call.x.shape[-1], 1)
    matrix = call.compute.itemsize * call.fc1_weight.numel()
    layer = packed + hidden + matrix
    kernels = triton_products.can_run(call)
    with_conv = call.conv_weight is not None
    norm = x + packed if call.has_normalised else 0
    residual = out if call.identity or call.residual is not None else 0
    if direction == "forward":
        operand = norm + packed
        if kernels and call.norm == "batch":
            operand = x + (packed if call.keep_value and not with_conv else 0)
        of_hidden = (2 + call.keep_value) * hidden if kernels and not with_conv else 4 * hidden
        result = residual + out + (0 if kernels else 2 * packed)
        return call.batch_stats * x + operand + of_hidden + 2 * matrix + result
    whole = kernels and not with_conv
    copied = out != packed or (call.drop_path is not None and not whole)
    sums = x + packed if call.norm != "none" else 0
    biases = (call.fc2_bias is not None) * packed
    last = packed + 2 * x + (out if call.identity else 0)
    if with_conv:
        middle = norm + (5 + 2 * (call.conv_activation != "none")) * hidden
    else:
        middle = (2 if whole else 4 + (call.fc1_bias is not None)) * hidden
    return copied * (out + packed) + 4 * layer + middle + sums + biases + last


BACKENDS = (
    Backend("triton", triton.can_run, triton.forward, triton.backward, tiles=triton.tiles),
    Backend("reference", reference_can_run),
)
CONV_BACKENDS = (
    Backend("triton", triton.can_run, triton.forward, triton.backward, tiles=triton_conv.tiles),
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
    once_differentiable="has no derivative of its own; for second derivatives run mlp_block or "
    'conv_mlp_block inside fused_ops.backend("reference")',
)
OPERATOR = library.register(
    library.Operator(
        "feed_forward",
        mlp_block,
        BACKENDS,
        cases,
        least_bytes,
        _DIFFERENTIABLE.overloads,
        triton.launch_count,
        matrix_products=True,
    )
)
CONV_OPERATOR = library.register(
    library.Operator(
        "feed_forward_conv",
        conv_mlp_block,
        CONV_BACKENDS,
        conv_cases,
        least_bytes,
        _DIFFERENTIABLE.overloads,
        triton.launch_count,
        matrix_products=True,
    )
)
