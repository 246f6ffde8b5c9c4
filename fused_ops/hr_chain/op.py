"""The HR chain operator: argument checks, choice of backend, torch operators, autograd, formulas."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fused_ops.core import library
from fused_ops.core.autocast import autocast_dtype, cast
from fused_ops.core.backends import Backend, choose, reference_can_run
from fused_ops.core.batch_norm import BatchNormState
from fused_ops.core.checks import (
    any_requires_grad,
    check_activation,
    check_direction,
    check_map,
    check_norm,
    check_parameter,
    check_values_per_channel,
)
from fused_ops.hr_chain import cuda, reference, triton
from fused_ops.hr_chain.cases import cases

# Inputs of the torch operators that are tensors, in order; the first ten get gradients.
_TENSORS = (
    "x",
    "high_weight",
    "high_bias",
    "low_weight",
    "fc1_weight",
    "fc1_bias",
    "fc2_weight",
    "fc2_bias",
    "norm_weight",
    "norm_bias",
    "mean",
    "var",
    "drop_path",
)
_GRADIENTS = 10
_X, _HIGH_WEIGHT, _, _LOW_WEIGHT, _FC1_WEIGHT, _FC1_BIAS, _FC2_WEIGHT, _, _NORM_WEIGHT, _NORM_BIAS = range(10)


@dataclass
class HRChainCall:
    """One checked call: what a backend's ``can_run`` and launchers see.

    ``mean`` and ``var`` are the running statistics when ``batch_stats`` is false, else None.
    """

    x: Tensor
    high_weight: Tensor
    high_bias: Tensor | None
    low_weight: Tensor
    fc1_weight: Tensor
    fc1_bias: Tensor | None
    fc2_weight: Tensor
    fc2_bias: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    mean: Tensor | None
    var: Tensor | None
    drop_path: Tensor | None
    batch_stats: bool
    eps: float
    activation: str
    identity: bool
    group: str = ""
    keep_low: bool = False
    needs_grad: bool = False

    @property
    def low_size(self) -> tuple[int, int]:
        """Height and width of the strided convolution's output."""
        return ((self.x.shape[2] + 1) // 2, (self.x.shape[3] + 1) // 2)

    @property
    def values_per_channel(self) -> int:
        """How many values of a channel the norm sees in this process."""
        return self.x.shape[0] * self.low_size[0] * self.low_size[1]

    def tensors(self) -> tuple[Tensor | None, ...]:
        return tuple(getattr(self, name) for name in _TENSORS)

    def kind(self) -> dict[str, Any]:
        """What measurements of one call say about another depends on, apart from sizes."""
        channels = self.x.shape[1]
        return {
            "training": self.needs_grad,
            "dtype": str(self.x.dtype),
            "channels_last": library.is_channels_last(self.x),
            "expansion": round(self.fc1_weight.shape[0] / channels, 2) if channels else 0,
            "activation": self.activation,
            "batch_stats": self.batch_stats,
            "identity": self.identity,
        }

    def sizes(self) -> tuple[int, ...]:
        """Channels, height and width of the input."""
        return tuple(self.x.shape[1:])

    def __str__(self) -> str:
        layout = "channels_last" if library.is_channels_last(self.x) else "NCHW"
        statistics = "batch" if self.batch_stats else "running"
        dtype = str(self.x.dtype).removeprefix("torch.")
        return (
            f"on {tuple(self.x.shape)} {dtype} {layout}, hidden width {self.fc1_weight.shape[0]}, norm with "
            f"{statistics} statistics, activation {self.activation}{', identity' if self.identity else ''}"
            f"{'' if self.drop_path is None else ', drop path'}"
        )


def checked_call(
    x: Tensor,
    high_weight: Tensor,
    low_weight: Tensor,
    fc1_weight: Tensor,
    fc2_weight: Tensor,
    norm: BatchNormState,
    high_bias: Tensor | None,
    fc1_bias: Tensor | None,
    fc2_bias: Tensor | None,
    activation: str,
    identity: bool,
    drop_path: Tensor | None,
) -> HRChainCall:
    check_map("x", x)
    batch, channels, height, width = x.shape
    if min(channels, height, width) < 1:
        raise ValueError(f"x has shape {tuple(x.shape)}; channels, height and width must be at least 1")
    if fc1_weight.dim() != 2 or fc1_weight.shape[0] < 1:
        raise ValueError(f"fc1_weight has shape {tuple(fc1_weight.shape)}; it must be (hidden, {channels})")
    hidden = fc1_weight.shape[0]
    per_channel = "one per channel"
    for name, tensor in (("high_weight", high_weight), ("low_weight", low_weight)):
        check_parameter(name, tensor, (channels, 1, 3, 3), "one filter per channel of x", x)
    check_parameter(
        "fc1_weight", fc1_weight, (hidden, channels), "from the channels of x to the hidden units", x
    )
    check_parameter(
        "fc2_weight", fc2_weight, (channels, hidden), "from fc1's hidden units to the channels of x", x
    )
    check_parameter("high_bias", high_bias, (channels,), per_channel, x)
    check_parameter("fc1_bias", fc1_bias, (hidden,), "one per hidden unit", x)
    check_parameter("fc2_bias", fc2_bias, (channels,), per_channel, x)
    check_parameter("drop_path", drop_path, (batch,), "one factor per image", x)
    if drop_path is not None and drop_path.requires_grad:
        raise ValueError("drop_path requires grad; it is a random factor and gets no gradient")
    check_activation(activation)
    check_norm(norm, x, x.shape[1])
    call = HRChainCall(
        x,
        high_weight,
        high_bias,
        low_weight,
        fc1_weight,
        fc1_bias,
        fc2_weight,
        fc2_bias,
        norm.weight,
        norm.bias,
        None if norm.batch_stats else norm.running_mean,
        None if norm.batch_stats else norm.running_var,
        None if drop_path is None else drop_path.contiguous(),
        norm.batch_stats,
        norm.eps,
        activation,
        identity,
        norm.group if norm.batch_stats else "",
    )
    if norm.batch_stats and not call.group:
        check_values_per_channel((batch, channels, *call.low_size))
    call.needs_grad = any_requires_grad(*call.tensors()[:_GRADIENTS])
    call.keep_low = call.needs_grad
    return call


def hr_block(
    x: Tensor,
    high_weight: Tensor,
    low_weight: Tensor,
    fc1_weight: Tensor,
    fc2_weight: Tensor,
    norm: BatchNormState,
    *,
    high_bias: Tensor | None = None,
    fc1_bias: Tensor | None = None,
    fc2_bias: Tensor | None = None,
    activation: str = "gelu",
    identity: bool = True,
    drop_path: Tensor | None = None,
) -> Tensor:
    """HIRI-ViT's HR-block: a branch at full resolution and a deeper one at half of it, as one operator.

    ``[x +] drop_path * (high(x) + repeat(fc2(act(fc1(BN(low(x)))))))``: ``high`` is a 3x3 depthwise
    convolution, ``low`` one with stride 2 and no bias, ``repeat`` gives every value to 2x2 positions, cut to
    the size of ``x`` where that is odd. The hidden activations are never in memory.

    Under autocast ``x`` is cast to its dtype. Float32 weights of fc1 and fc2 are rounded to the dtype of
    ``x``, all other parameters are used as they are.

    Args:
        x: (B, C, H, W), channels_last or NCHW, slices too; float32, float16, bfloat16 or float64.
        high_weight, low_weight: (C, 1, 3, 3); these and all other parameters in the dtype of ``x`` or
            float32.
        fc1_weight, fc2_weight: (hidden, C) and (C, hidden), as of ``torch.nn.Linear``.
        norm: state of the BatchNorm, see :meth:`fused_ops.BatchNormState.from_module`. Its running statistics
            are updated in place when it uses the batch's.
        high_bias, fc1_bias, fc2_bias: (C), (hidden), (C), or None.
        activation: none, relu, relu6, silu, gelu (exact), gelu_tanh or hardswish.
        identity: add ``x``.
        drop_path: factor of both branches per image (B), 0 or one over the probability to keep them; None
            for 1. Gets no gradient.

    Returns:
        (B, C, H, W) in the dtype of ``x`` (under autocast, in its dtype) and the memory format of ``x``.

    Raises:
        ValueError, TypeError: an argument is not allowed; the message names it, its value and what is.
        fused_ops.BackendUnavailableError: a backend was requested by name and cannot run this call.
    """
    dtype = autocast_dtype(x)
    if dtype is not None:
        x = cast(x, dtype)
        with torch.autocast(x.device.type, enabled=False):
            return hr_block(
                x,
                high_weight,
                low_weight,
                fc1_weight,
                fc2_weight,
                norm,
                high_bias=high_bias,
                fc1_bias=fc1_bias,
                fc2_bias=fc2_bias,
                activation=activation,
                identity=identity,
                drop_path=drop_path,
            )
    call = checked_call(
        x,
        high_weight,
        low_weight,
        fc1_weight,
        fc2_weight,
        norm,
        high_bias,
        fc1_bias,
        fc2_bias,
        activation,
        identity,
        drop_path,
    )
    backend = choose("hr_chain", BACKENDS, call)
    if backend.name == "reference":
        return _reference(call, norm)
    out, _, mean, _, unbiased = _DIFFERENTIABLE.run(
        call.needs_grad,
        *call.tensors(),
        call.batch_stats,
        call.eps,
        call.activation,
        call.identity,
        call.group,
        call.keep_low,
        backend.name,
    )
    norm.update_running(mean, unbiased)
    return out


def _reference(call: HRChainCall, norm: BatchNormState) -> Tensor:
    return reference.hr_chain(
        call.x,
        call.high_weight,
        call.low_weight,
        call.fc1_weight,
        call.fc2_weight,
        call.high_bias,
        call.fc1_bias,
        call.fc2_bias,
        call.norm_weight,
        call.norm_bias,
        norm.running_mean,
        norm.running_var,
        call.drop_path,
        batch_stats=call.batch_stats,
        momentum=norm.momentum,
        eps=call.eps,
        activation=call.activation,
        identity=call.identity,
        group=call.group,
    )


_INPUTS = (
    "Tensor x, Tensor high_weight, Tensor? high_bias, Tensor low_weight, Tensor fc1_weight, "
    "Tensor? fc1_bias, Tensor fc2_weight, Tensor? fc2_bias, Tensor? norm_weight, Tensor? norm_bias, "
    "Tensor? mean, Tensor? var, Tensor? drop_path"
)
_OPTIONS = "bool batch_stats, float eps, str activation, bool identity, str group"
_FORWARD_SCHEMA = (
    f"hr_chain_forward({_INPUTS}, {_OPTIONS}, bool keep_low, str backend) "
    "-> (Tensor out, Tensor low, Tensor batch_mean, Tensor batch_var, Tensor unbiased_var)"
)
_BACKWARD_SCHEMA = (
    f"hr_chain_backward(Tensor grad, Tensor low, {_INPUTS}, {_OPTIONS}, bool[] needs, str backend) "
    "-> (Tensor x_grad, Tensor high_weight_grad, Tensor high_bias_grad, Tensor low_weight_grad, "
    "Tensor fc1_weight_grad, Tensor fc1_bias_grad, Tensor fc2_weight_grad, Tensor fc2_bias_grad, "
    "Tensor norm_weight_grad, Tensor norm_bias_grad)"
)
_COUNT = len(_TENSORS)


def allocate_forward(call: HRChainCall) -> tuple[Tensor, ...]:
    """Outputs of the forward operator: out, low (absent unless kept), batch mean, var, unbiased var."""
    out = library.empty(call.x.shape, call.x)
    low = library.absent(call.x)
    if call.keep_low:
        low = call.x.new_empty((call.x.shape[0], *call.low_size, call.x.shape[1]))
    count = call.x.shape[1] if call.batch_stats else 0
    dtype = torch.float64 if call.x.dtype == torch.float64 else torch.float32
    return out, low, *(torch.empty(count, dtype=dtype, device=call.x.device) for _ in range(3))


def allocate_backward(call: HRChainCall, needs: list[bool]) -> tuple[Tensor, ...]:
    """Gradients of the first ten tensors; absent where not needed."""
    gradients = []
    for source, needed in zip(call.tensors()[:_GRADIENTS], needs, strict=True):
        if needed and source is not None:
            gradients.append(library.empty(source.shape, source))
        else:
            gradients.append(library.absent(call.x if source is None else source))
    return tuple(gradients)


def _forward(*inputs):
    *arguments, keep_low, backend = inputs
    call = HRChainCall(*arguments, keep_low=keep_low)
    return _BY_NAME[backend].forward(call, *allocate_forward(call))


def _forward_fake(*inputs):
    *arguments, keep_low, _ = inputs
    return allocate_forward(HRChainCall(*arguments, keep_low=keep_low))


def _backward(grad, low, *inputs):
    *arguments, needs, backend = inputs
    call = HRChainCall(*arguments)
    return _BY_NAME[backend].backward(call, grad, low, list(needs), *allocate_backward(call, needs))


def _backward_fake(grad, low, *inputs):
    *arguments, needs, _ = inputs
    return allocate_backward(HRChainCall(*arguments), needs)


def _setup_context(ctx, inputs, output) -> None:
    tensors, options = inputs[:_COUNT], inputs[_COUNT:]
    *ctx.options, _, ctx.backend = options
    _, low, batch_mean, batch_var, unbiased = output
    *parameters, mean, var, drop_path = tensors
    if options[0]:
        mean, var = batch_mean, batch_var
    ctx.save_for_backward(low, *parameters, mean, var, drop_path)
    ctx.mark_non_differentiable(low, batch_mean, batch_var, unbiased)
    ctx.set_materialize_grads(False)


def _autograd(ctx, grad, *_):
    inputs = _COUNT + len(ctx.options) + 2
    if grad is None:
        return (None,) * inputs
    low, *tensors = ctx.saved_tensors
    needs = [bool(needed) for needed in ctx.needs_input_grad[:_GRADIENTS]]
    gradients = _DIFFERENTIABLE.run_backward(grad, low, *tensors, *ctx.options, needs, ctx.backend)
    return (*gradients, *(None,) * (inputs - _GRADIENTS))


def _layer_flops(shape: tuple[int, ...], hidden: int) -> tuple[int, int, int]:
    """Operations of the full-resolution convolution, the strided one, and one fully connected layer."""
    batch, channels, height, width = shape
    low = batch * ((height + 1) // 2) * ((width + 1) // 2)
    taps = 2 * 9 * channels
    return taps * batch * height * width, taps * low, 2 * low * channels * hidden


def _forward_flops(x_shape, high_weight, high_bias, low_weight, fc1_shape, *_, out_shape=None, **__) -> int:
    high, low, layer = _layer_flops(x_shape, fc1_shape[0])
    return high + low + 2 * layer


def _backward_flops(grad_shape, low_shape, *arguments, out_shape=None, **__) -> int:
    needs = arguments[-2]
    high, low, layer = _layer_flops(grad_shape, arguments[_FC1_WEIGHT][0])
    to_low = needs[_X] or needs[_LOW_WEIGHT] or needs[_NORM_WEIGHT] or needs[_NORM_BIAS]
    to_hidden = to_low or needs[_FC1_WEIGHT] or needs[_FC1_BIAS]
    layers = bool(to_low) + bool(to_hidden) + bool(needs[_FC1_WEIGHT]) + bool(needs[_FC2_WEIGHT])
    return (
        (bool(needs[_X]) + bool(needs[_HIGH_WEIGHT])) * high
        + (bool(needs[_X]) + bool(needs[_LOW_WEIGHT])) * low
        + layers * layer
    )


def least_bytes(call: HRChainCall, direction: str) -> int:
    """Bytes that have to move through memory, whatever the kernels; parameters and their sums left out.

    Forward: x is read and the result written. Batch statistics read x once more. The strided convolution's
    output (a quarter of x) is written where backward needs it. Backward, with all gradients: the norm's two
    sums come before anything that uses them, so the gradient is read twice, with the strided convolution's
    output, and the gradient of the norm's output is written and read; x is read and its gradient written.
    Running statistics need the strided convolution's output once.
    """
    check_direction(direction)
    size = call.x.element_size()
    x = size * call.x.numel()
    low = size * call.values_per_channel * call.x.shape[1]
    if direction == "forward":
        return (2 + call.batch_stats) * x + call.keep_low * low
    return 4 * x + (3 + call.batch_stats) * low


# Not measured: CUDA's come first because they move less.
BACKENDS = (
    Backend("cuda", cuda.can_run, cuda.forward, cuda.backward),
    Backend("triton", triton.can_run, triton.forward, triton.backward),
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
    once_differentiable="has no derivative of its own; for second derivatives run hr_block inside "
    'fused_ops.backend("reference")',
)
OPERATOR = library.register(
    library.Operator(
        "hr_chain",
        hr_block,
        BACKENDS,
        cases,
        least_bytes,
        _DIFFERENTIABLE.overloads,
        triton.launch_count,
        matrix_products=True,
    )
)
