"""Calls of the depthwise kernels in the compiled CUDA library, or in its emulator for CPU tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_ops.core import library, native

# Numbers of csrc/depthwise/params.h.
NORMS = {"none": 0, "pre": 1, "post": 2}
RESIDUAL_MODES = {"none": 0, "before": 1, "after": 2}


def can_run(call: Any) -> tuple[bool, str]:
    """Whether the CUDA kernel can run ``call``; one sentence says why not. Looks at metadata only."""
    x = call.x
    if not x.is_cuda and not (x.device.type == "cpu" and native.emulator() is not None):
        return False, f"x is on {x.device}; the CUDA backend needs a CUDA tensor"
    if call.needs_grad:
        return False, "gradients are needed; the CUDA kernel has no backward"
    if call.batch_stats:
        return False, "batch statistics are needed; the CUDA kernel is for evaluation"
    if call.keep_raw:
        return False, "the convolution's own output is to be kept; the CUDA kernel does not write it"
    if tuple(call.weight.shape[2:]) != (3, 3):
        kernel = "x".join(map(str, call.weight.shape[2:]))
        return False, f"the kernel is {kernel}; the CUDA kernel is for 3x3"
    if call.stride != (1, 1):
        return False, f"stride is {call.stride}; the CUDA kernel is for stride 1"
    if call.dilation != (1, 1):
        return False, f"dilation is {call.dilation}; the CUDA kernel is for dilation 1"
    if x.dtype not in native.SCALAR_TYPES:
        return False, f"x is {x.dtype}; the CUDA kernel is for float32, float16 and bfloat16"
    if call.activation not in native.ACTIVATIONS:
        return False, f"activation is {call.activation}; the CUDA kernel does not have it"
    for name in ("weight", "bias", "norm_weight", "norm_bias", "mean", "var"):
        tensor = getattr(call, name)
        if tensor is not None and tensor.dtype not in native.SCALAR_TYPES:
            return False, f"{name} is {tensor.dtype}; the CUDA kernel reads float32, float16 and bfloat16"
    channels = x.shape[1]
    for name, tensor in (("x", x), ("residual", call.residual)):
        if tensor is not None and channels > 1 and tensor.stride(1) != 1:
            return False, f"{name} has strides {tensor.stride()}; the CUDA kernel reads channels_last"
    height, width = call.output_shape[2:]
    # Where both layouts describe the strides, and in an empty batch, the order does not matter.
    if min(x.shape[0], channels - 1, height * width - 1) > 0 and not library.is_channels_last(x):
        return False, "the output would be in NCHW order; the CUDA kernel writes channels_last"
    if call.identity and call.padding != (1, 1):
        return False, f"the residual is x itself and padding is {call.padding}; the CUDA kernel needs 1"
    if min(x.shape[1:]) < 1 or min(height, width) < 1:
        return False, f"the map is empty, {tuple(x.shape)}"
    if x.is_cuda:
        ok, reason = native.status(x.device.index)
        if not ok:
            return False, reason
    return True, ""


def forward(call: Any, out: Tensor, *unasked: Tensor) -> tuple[Tensor, ...]:
    """Run ``call`` into ``out``; the others are outputs that nobody asked for."""
    if call.x.shape[0] == 0:
        return out, *unasked
    if call.x.is_cuda:
        native.library().depthwise_forward(
            call.x,
            call.weight,
            call.bias,
            call.norm_weight,
            call.norm_bias,
            call.mean,
            call.var,
            call.residual,
            *call.padding,
            NORMS[call.norm],
            call.eps,
            native.ACTIVATIONS[call.activation],
            RESIDUAL_MODES[call.residual_mode],
            call.identity,
            out,
        )
    else:
        emulate_forward(call, out)
    return out, *unasked


def _map_strides(tensor: Tensor | None) -> tuple[int, int, int]:
    return (0, 0, 0) if tensor is None else (tensor.stride(0), tensor.stride(2), tensor.stride(3))


def _channel_values(tensor: Tensor | None) -> tuple[int, int, int] | None:
    if tensor is None:
        return None
    return (tensor.data_ptr(), native.SCALAR_TYPES[tensor.dtype], tensor.stride(0))


@torch.no_grad()
def emulate_forward(
    call: Any, out: Tensor, *, vector_width: int = 0, tile_columns: int = 0, strip_rows: int = 0
) -> Tensor:
    """Run ``call`` on CPU tensors in the emulator; the keywords fix the launcher's choices, 0 leaves them."""
    x, weight, residual = call.x, call.weight, call.residual
    native.emulator().depthwise_forward(
        size=tuple(x.shape),
        out_size=tuple(out.shape[2:]),
        padding=tuple(call.padding),
        type=native.SCALAR_TYPES[x.dtype],
        x=x.data_ptr(),
        x_strides=_map_strides(x),
        residual=0 if residual is None else residual.data_ptr(),
        residual_strides=_map_strides(residual),
        out=out.data_ptr(),
        out_strides=_map_strides(out),
        weight=weight.data_ptr(),
        weight_type=native.SCALAR_TYPES[weight.dtype],
        weight_strides=(weight.stride(0), weight.stride(2), weight.stride(3)),
        bias=_channel_values(call.bias),
        norm_weight=_channel_values(call.norm_weight),
        norm_bias=_channel_values(call.norm_bias),
        mean=_channel_values(call.mean),
        var=_channel_values(call.var),
        norm=NORMS[call.norm],
        eps=call.eps,
        activation=native.ACTIVATIONS[call.activation],
        residual_mode=RESIDUAL_MODES[call.residual_mode],
        identity=call.identity,
        vector_width=vector_width,
        tile_columns=tile_columns,
        strip_rows=strip_rows,
    )
    return out
