"""The depthwise operator: argument checks, choice of backend, torch operators, autograd, formulas."""

from __future__ import annotations

import math
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
    check_alike,
    check_choice,
    check_companion,
    check_direction,
    check_map,
    check_norm,
    check_parameter,
    check_values_per_channel,
)
from fused_ops.depthwise import cuda, reference, triton
from fused_ops.depthwise.cases import cases


@dataclass
class DepthwiseCall:
    """One checked call: what a backend's ``can_run`` and launchers see.

    ``residual`` is None when ``identity`` says that the residual is ``x`` itself. ``mean`` and ``var`` are
    the running statistics when ``batch_stats`` is false, else None.

    ``input_activation`` is for other operators that launch the Triton kernels, on channels_last maps at 3x3
    and stride 1 without a norm: the convolution and the identity then take the activation of ``x``.
    :func:`depthwise_conv` does not have it.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    mean: Tensor | None
    var: Tensor | None
    residual: Tensor | None
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    norm: str
    batch_stats: bool
    eps: float
    activation: str
    residual_mode: str
    identity: bool
    group: str = ""
    keep_raw: bool = False
    needs_raw: bool = False
    needs_grad: bool = False
    input_activation: str = "none"

    @property
    def kernel_size(self) -> tuple[int, int]:
        return (self.weight.shape[2], self.weight.shape[3])

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        batch, channels, height, width = self.x.shape
        (pad_h, pad_w), (dilation_h, dilation_w) = self.padding, self.dilation
        (stride_h, stride_w), (_, _, kernel_h, kernel_w) = self.stride, self.weight.shape
        height = (height + 2 * pad_h - dilation_h * (kernel_h - 1) - 1) // stride_h + 1
        width = (width + 2 * pad_w - dilation_w * (kernel_w - 1) - 1) // stride_w + 1
        return (batch, channels, height, width)

    @property
    def values_per_channel(self) -> int:
        """How many values of a channel the norm sees in this process."""
        batch, _, height, width = self.output_shape if self.norm == "post" else self.x.shape
        return batch * height * width

    @property
    def convolves_twice(self) -> bool:
        """Whether post-norm by batch statistics convolves again rather than store what it normalises.

        That saves a write and a read of the convolution's output for one more read of x: less traffic as long
        as x is smaller than two outputs. Large filters are bound by their arithmetic, not by traffic.
        """
        if self.keep_raw or self.norm != "post" or not self.batch_stats:
            return False
        taps = self.weight.shape[2] * self.weight.shape[3]
        return taps <= 9 and self.x.numel() < 2 * math.prod(self.output_shape)

    def kind(self) -> dict[str, Any]:
        """What measurements of one call say about another depends on, apart from sizes."""
        kernel, stride, dilation = (
            "x".join(map(str, pair)) for pair in (self.kernel_size, self.stride, self.dilation)
        )
        residual = self.residual_mode if not self.identity else f"identity {self.residual_mode}"
        return {
            "training": self.needs_grad,
            "dtype": str(self.x.dtype),
            "channels_last": library.is_channels_last(self.x),
            "kernel": kernel,
            "stride": stride,
            "dilation": dilation,
            "norm": self.norm,
            "batch_stats": self.batch_stats,
            "residual": residual,
        }

    def sizes(self) -> tuple[int, ...]:
        """Channels, height and width of the input."""
        return tuple(self.x.shape[1:])

    def __str__(self) -> str:
        kernel = "x".join(map(str, self.kernel_size))
        layout = "channels_last" if library.is_channels_last(self.x) else "NCHW"
        norm = "no norm"
        if self.norm != "none":
            statistics = "batch" if self.batch_stats else "running"
            norm = f"{self.norm}-norm with {statistics} statistics"
        residual = "identity" if self.identity else "residual"
        residual = "" if self.residual_mode == "none" else f", {residual} {self.residual_mode} activation"
        dtype = str(self.x.dtype).removeprefix("torch.")
        return (
            f"{kernel} stride {self.stride[0]} on {tuple(self.x.shape)} {dtype} {layout}, {norm}, "
            f"activation {self.activation}{residual}"
        )


def _pair(name: str, value: int | tuple[int, int], least: int) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or any(not isinstance(entry, int) or entry < least for entry in pair):
        raise ValueError(f"{name}={value!r} is not allowed; give one or two integers of at least {least}")
    return pair


def checked_call(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | tuple[int, int],
    padding: int | tuple[int, int] | str,
    dilation: int | tuple[int, int],
    norm: BatchNormState | None,
    norm_placement: str,
    activation: str,
    residual: Tensor | None,
    residual_placement: str,
    recompute: bool,
) -> DepthwiseCall:
    check_map("x", x)
    channels = x.shape[1]
    if weight.dim() != 4 or weight.shape[0] != channels or weight.shape[1] != 1:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}; it must be ({channels}, 1, kh, kw), one filter per "
            f"channel of x"
        )
    if weight.shape[2] % 2 == 0 or weight.shape[3] % 2 == 0:
        raise ValueError(f"weight has a {weight.shape[2]}x{weight.shape[3]} kernel; sizes must be odd")
    check_companion("weight", weight, x)
    check_parameter("bias", bias, (channels,), "one per channel", x)
    stride, dilation = _pair("stride", stride, 1), _pair("dilation", dilation, 1)
    if padding == "same":
        if stride != (1, 1):
            raise ValueError(f"padding='same' needs stride 1, and stride={stride}")
        padding = tuple(d * (k // 2) for d, k in zip(dilation, weight.shape[2:], strict=True))
    elif isinstance(padding, str):
        raise ValueError(f"padding={padding!r} is not allowed; use 'same' or integers")
    padding = _pair("padding", padding, 0)
    check_activation(activation)
    check_choice("norm_placement", norm_placement, ("pre", "post"))
    check_choice("residual_placement", residual_placement, ("before", "after"))
    if norm is not None:
        check_norm(norm, x, x.shape[1])
    batch_stats = norm is not None and norm.batch_stats
    running = norm is not None and not batch_stats
    identity = residual is x
    call = DepthwiseCall(
        x,
        weight,
        bias,
        None if norm is None else norm.weight,
        None if norm is None else norm.bias,
        norm.running_mean if running else None,
        norm.running_var if running else None,
        None if identity else residual,
        stride,
        padding,
        dilation,
        "none" if norm is None else norm_placement,
        batch_stats,
        1e-5 if norm is None else norm.eps,
        activation,
        "none" if residual is None else residual_placement,
        identity,
        norm.group if batch_stats else "",
    )
    height, width = call.output_shape[2:]
    if height < 1 or width < 1:
        raise ValueError(
            f"x is {x.shape[2]}x{x.shape[3]}, too small for a {weight.shape[2]}x{weight.shape[3]} kernel "
            f"with padding {padding} and dilation {dilation}"
        )
    if residual is not None:
        if tuple(residual.shape) != call.output_shape:
            raise ValueError(
                f"residual has shape {tuple(residual.shape)}; it must be the output's, {call.output_shape}"
            )
        check_alike("residual", residual, x)
    if batch_stats and not call.group:
        check_values_per_channel(call.output_shape if norm_placement == "post" else tuple(x.shape))
    needs_grad = any_requires_grad(x, weight, bias, call.norm_weight, call.norm_bias, residual)
    call.needs_grad = needs_grad
    norm_grad = any(
        tensor is not None and tensor.requires_grad for tensor in (call.norm_weight, call.norm_bias)
    )
    call.needs_raw = needs_grad and _backward_reads_raw(call.norm, batch_stats, activation, norm_grad)
    call.keep_raw = call.needs_raw and not recompute
    return call


def _backward_reads_raw(norm: str, batch_stats: bool, activation: str, norm_grad: bool) -> bool:
    """Whether the backward pass needs the convolution's own output."""
    return activation != "none" or (norm == "post" and (batch_stats or norm_grad))


def depthwise_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    norm: BatchNormState | None = None,
    norm_placement: str = "post",
    activation: str = "none",
    residual: Tensor | None = None,
    residual_placement: str = "after",
    recompute: bool = False,
) -> Tensor:
    """Depthwise convolution fused with BatchNorm, activation and residual.

    ``norm_placement="post"``: ``act(BN(conv(x)))``. ``"pre"``: ``act(conv(BN(x)))``, where the padding stays
    zero after the norm. The residual is added after or before the activation; passing ``x`` itself is
    recognised, and the kernels then read it once.

    Under autocast ``x`` and ``residual`` are cast to its dtype; parameters are used as they are (float32
    weights are not rounded by the kernels).

    Args:
        x: (B, C, H, W), channels_last or NCHW, slices too; float32, float16, bfloat16 or float64.
        weight: (C, 1, kh, kw) with odd sizes; the dtype of ``x`` or float32.
        bias: (C), or None.
        stride, padding, dilation: as in ``torch.nn.functional.conv2d``; ``padding="same"`` at stride 1.
        norm: state of the BatchNorm, see :meth:`BatchNormState.from_module`. Its running statistics are
            updated in place when it uses the batch's.
        activation: none, relu, relu6, silu, gelu (exact), gelu_tanh or hardswish.
        residual: (B, C, Ho, Wo) in the dtype of ``x``, or None.
        recompute: keep nothing of the size of the output for backward, which then convolves once more.

    Returns:
        (B, C, Ho, Wo) in the dtype of ``x`` (under autocast, in its dtype) and the memory format of ``x``.

    Raises:
        ValueError, TypeError: an argument is not allowed; the message names it, its value and what is.
        fused_ops.BackendUnavailableError: a backend was requested by name and cannot run this call.
    """
    dtype = autocast_dtype(x)
    if dtype is not None:
        identity = residual is x
        x = cast(x, dtype)
        if identity:
            residual = x
        elif residual is not None and residual.dtype != torch.float64:
            residual = residual.to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            return depthwise_conv(
                x,
                weight,
                bias,
                stride=stride,
                padding=padding,
                dilation=dilation,
                norm=norm,
                norm_placement=norm_placement,
                activation=activation,
                residual=residual,
                residual_placement=residual_placement,
                recompute=recompute,
            )
    call = checked_call(
        x,
        weight,
        bias,
        stride,
        padding,
        dilation,
        norm,
        norm_placement,
        activation,
        residual,
        residual_placement,
        recompute,
    )
    backend = choose("depthwise", BACKENDS, call)
    if backend.name == "reference":
        return _reference(call, norm)
    out, _, mean, _, unbiased = _DIFFERENTIABLE.run(
        call.needs_grad,
        call.x,
        call.weight,
        call.bias,
        call.norm_weight,
        call.norm_bias,
        call.mean,
        call.var,
        call.residual,
        call.stride,
        call.padding,
        call.dilation,
        call.norm,
        call.batch_stats,
        call.eps,
        call.activation,
        call.residual_mode,
        call.identity,
        call.group,
        call.keep_raw,
        backend.name,
    )
    if norm is not None:
        norm.update_running(mean, unbiased)
    return out


def _reference(call: DepthwiseCall, norm: BatchNormState | None) -> Tensor:
    return reference.depthwise(
        call.x,
        call.weight,
        call.bias,
        call.norm_weight,
        call.norm_bias,
        None if norm is None else norm.running_mean,
        None if norm is None else norm.running_var,
        call.x if call.identity else call.residual,
        stride=call.stride,
        padding=call.padding,
        dilation=call.dilation,
        norm=call.norm,
        batch_stats=call.batch_stats,
        momentum=0.0 if norm is None else norm.momentum,
        eps=call.eps,
        activation=call.activation,
        residual_mode=call.residual_mode,
        group=call.group,
    )


_OPTIONS = (
    "int[2] stride, int[2] padding, int[2] dilation, str norm, bool batch_stats, float eps, "
    "str activation, str residual_mode, bool identity, str group"
)
_FORWARD_SCHEMA = (
    "depthwise_forward(Tensor x, Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, "
    f"Tensor? mean, Tensor? var, Tensor? residual, {_OPTIONS}, bool keep_raw, str backend) "
    "-> (Tensor out, Tensor raw, Tensor batch_mean, Tensor batch_var, Tensor unbiased_var)"
)
_BACKWARD_SCHEMA = (
    "depthwise_backward(Tensor grad, Tensor x, Tensor weight, Tensor? bias, Tensor? norm_weight, "
    f"Tensor? norm_bias, Tensor? mean, Tensor? var, Tensor? residual, Tensor? raw, {_OPTIONS}, "
    "bool[] needs, str backend) "
    "-> (Tensor x_grad, Tensor weight_grad, Tensor bias_grad, Tensor norm_weight_grad, "
    "Tensor norm_bias_grad, Tensor residual_grad)"
)


def _call_of(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    residual: Tensor | None,
    options: tuple[Any, ...],
) -> DepthwiseCall:
    stride, padding, dilation, *rest = options
    return DepthwiseCall(
        x,
        weight,
        bias,
        norm_weight,
        norm_bias,
        mean,
        var,
        residual,
        tuple(stride),
        tuple(padding),
        tuple(dilation),
        *rest,
    )


def allocate_forward(call: DepthwiseCall) -> tuple[Tensor, ...]:
    """Outputs of the forward operator: out, raw (absent unless kept), batch mean, var, unbiased var."""
    out = library.empty(call.output_shape, call.x)
    raw = torch.empty_like(out) if call.keep_raw else library.absent(call.x)
    count = call.x.shape[1] if call.batch_stats else 0
    dtype = torch.float64 if call.x.dtype == torch.float64 else torch.float32
    return out, raw, *(torch.empty(count, dtype=dtype, device=call.x.device) for _ in range(3))


def allocate_backward(call: DepthwiseCall, needs: list[bool]) -> tuple[Tensor, ...]:
    """Gradients of x, weight, bias, norm_weight, norm_bias, residual; absent where not needed."""
    sources = (call.x, call.weight, call.bias, call.norm_weight, call.norm_bias, call.residual)
    gradients = []
    for index, (source, needed) in enumerate(zip(sources, needs, strict=True)):
        if not needed or source is None:
            gradients.append(library.absent(call.x if source is None else source))
        elif index == 5:
            gradients.append(library.empty(call.output_shape, call.x))
        else:
            gradients.append(library.empty(source.shape, source))
    return tuple(gradients)


def _forward(x, weight, bias, norm_weight, norm_bias, mean, var, residual, *options):
    *options, keep_raw, backend = options
    call = _call_of(x, weight, bias, norm_weight, norm_bias, mean, var, residual, options)
    call.keep_raw = keep_raw
    return _BY_NAME[backend].forward(call, *allocate_forward(call))


def _forward_fake(x, weight, bias, norm_weight, norm_bias, mean, var, residual, *options):
    *options, keep_raw, _ = options
    call = _call_of(x, weight, bias, norm_weight, norm_bias, mean, var, residual, options)
    call.keep_raw = keep_raw
    return allocate_forward(call)


def _backward(grad, x, weight, bias, norm_weight, norm_bias, mean, var, residual, raw, *options):
    *options, needs, backend = options
    call = _call_of(x, weight, bias, norm_weight, norm_bias, mean, var, residual, options)
    return _BY_NAME[backend].backward(call, grad, raw, list(needs), *allocate_backward(call, needs))


def _backward_fake(grad, x, weight, bias, norm_weight, norm_bias, mean, var, residual, raw, *options):
    *options, needs, _ = options
    call = _call_of(x, weight, bias, norm_weight, norm_bias, mean, var, residual, options)
    return allocate_backward(call, needs)


def _setup_context(ctx, inputs, output) -> None:
    x, weight, bias, norm_weight, norm_bias, mean, var, residual, *options, keep_raw, backend = inputs
    _, raw, batch_mean, batch_var, unbiased = output
    ctx.options = tuple(options)
    ctx.backend = backend
    batch_stats = options[4]
    identity = options[8]
    statistics = (batch_mean, batch_var) if batch_stats else (mean, var)
    needs_residual = options[7] == "before" and options[6] != "none" and not identity
    ctx.has_residual = residual is not None
    ctx.save_for_backward(
        x,
        weight,
        bias,
        norm_weight,
        norm_bias,
        *statistics,
        residual if needs_residual else None,
        raw if keep_raw else None,
    )
    ctx.mark_non_differentiable(raw, batch_mean, batch_var, unbiased)
    ctx.set_materialize_grads(False)


def _autograd(ctx, grad, *_):
    x, weight, bias, norm_weight, norm_bias, mean, var, residual, raw = ctx.saved_tensors
    needed = ctx.needs_input_grad
    needs = [needed[index] for index in (0, 1, 2, 3, 4, 7)]
    if grad is None:
        return (None,) * 20
    if torch.is_grad_enabled():
        gradients = _differentiable_backward(ctx, grad, needs)
    else:
        # The residual's own gradient is the incoming one when it is added last: nothing to compute.
        passes_through = ctx.has_residual and (ctx.options[7] == "after" or ctx.options[6] == "none")
        compute = [*needs[:5], needs[5] and not passes_through]
        if raw is None and _backward_reads_raw(
            ctx.options[3], ctx.options[4], ctx.options[6], needs[3] or needs[4]
        ):
            raw = _convolve_again(ctx)
        gradients = _DIFFERENTIABLE.run_backward(
            grad,
            x,
            weight,
            bias,
            norm_weight,
            norm_bias,
            mean,
            var,
            residual,
            raw,
            *ctx.options,
            compute,
            ctx.backend,
        )
        if needs[5] and passes_through:
            gradients[5] = grad
    return (*gradients[:5], None, None, gradients[5], *(None,) * 12)


def _convolve_again(ctx) -> Tensor:
    """The convolution's own output, with the statistics that the forward pass normalised with."""
    x, weight, bias, norm_weight, norm_bias, mean, var, _, _ = ctx.saved_tensors
    stride, padding, dilation, norm, _, eps, *_ = ctx.options
    norm = "none" if norm == "post" else norm
    options = (stride, padding, dilation, norm, False, eps, "none", "none", False, "")
    affine = (norm_weight, norm_bias, mean, var) if norm == "pre" else (None,) * 4
    return _DIFFERENTIABLE.forward(x, weight, bias, *affine, None, *options, False, ctx.backend)[0]


def _differentiable_backward(ctx, grad: Tensor, needs: list[bool]) -> list[Tensor | None]:
    """Gradients with a graph of their own, for second derivatives: through the reference."""
    x, weight, bias, norm_weight, norm_bias, mean, var, residual, _ = ctx.saved_tensors
    stride, padding, dilation, norm, batch_stats, eps, activation, residual_mode, identity, group = (
        ctx.options
    )
    if ctx.has_residual and residual is None:
        # Added last, so its value plays no part in any other gradient.
        residual_mode = "none"
    out = reference.depthwise(
        x,
        weight,
        bias,
        norm_weight,
        norm_bias,
        None if batch_stats else mean,
        None if batch_stats else var,
        x if identity else residual,
        stride=tuple(stride),
        padding=tuple(padding),
        dilation=tuple(dilation),
        norm=norm,
        batch_stats=batch_stats,
        eps=eps,
        activation=activation,
        residual_mode=residual_mode,
        group=group,
    )
    inputs = (x, weight, bias, norm_weight, norm_bias, residual)
    wanted = [index for index, need in enumerate(needs) if need and inputs[index] is not None]
    gradients: list[Tensor | None] = [None] * 6
    results = torch.autograd.grad(
        out, [inputs[index] for index in wanted], grad, create_graph=True, allow_unused=True
    )
    for index, gradient in zip(wanted, results, strict=True):
        gradients[index] = gradient
    if needs[5] and residual is None:
        gradients[5] = grad
    return gradients


def _convolution_flops(out_shape: tuple[int, ...], weight_shape: tuple[int, ...]) -> int:
    batch, channels, height, width = out_shape
    return 2 * batch * channels * height * width * weight_shape[2] * weight_shape[3]


def _forward_flops(x_shape, weight_shape, *_, out_shape=None, **__) -> int:
    return _convolution_flops(out_shape[0], weight_shape)


def _backward_flops(grad_shape, x_shape, weight_shape, *arguments, out_shape=None, **__) -> int:
    needs = arguments[-2]
    return (bool(needs[0]) + bool(needs[1])) * _convolution_flops(grad_shape, weight_shape)


def least_bytes(call: DepthwiseCall, direction: str) -> int:
    """Bytes that the schedule in use has to move through memory; per-channel vectors are left out.

    Forward: one read of x and one write of the output. Batch statistics cost one more read of x (pre-norm,
    and post-norm that convolves twice), or one write and read of the convolution's output (post-norm).
    Backward, with all gradients: the gradient and x are read and x's gradient is written; post-norm reads the
    gradient and the convolution's output twice (the two BatchNorm sums come before anything that uses them);
    pre-norm with batch statistics writes and reads its partial input gradient once more and x again.
    """
    check_direction(direction)
    size = call.x.element_size()
    batch, channels, height, width = call.output_shape
    out = size * batch * channels * height * width
    x = size * call.x.numel()
    separate = call.residual_mode != "none" and not call.identity
    batch_post = call.norm == "post" and call.batch_stats
    batch_pre = call.norm == "pre" and call.batch_stats
    if direction == "forward":
        total = x + out + separate * out
        if batch_post:
            total += x if call.convolves_twice else 2 * out
        elif call.keep_raw:
            total += out
        return total + batch_pre * x
    # Whether the activation's derivative needs the sum with a residual that lies in memory of its own.
    before = call.residual_mode == "before" and call.activation != "none"
    total = out + 2 * x
    if call.needs_raw:
        total += out if call.keep_raw else x + 2 * out
    if before and separate:
        total += 2 * out
    if batch_post:
        total += (2 + (before and separate)) * out + (before and call.identity) * x
    return total + batch_pre * 3 * x


BACKENDS = (
    Backend("cuda", cuda.can_run, cuda.forward, cuda.backward, tiles=cuda.tiles),
    Backend("triton", triton.can_run, triton.forward, triton.backward, tiles=triton.tiles),
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
    once_differentiable="is differentiable only through depthwise_conv with create_graph=True",
)
OPERATOR = library.register(
    library.Operator(
        "depthwise",
        depthwise_conv,
        BACKENDS,
        cases,
        least_bytes,
        _DIFFERENTIABLE.overloads,
        triton.launch_count,
    )
)
