"""Calls of the depthwise kernels in the compiled CUDA library, or in its emulator for CPU tensors."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fused_ops.core import distributed, library, native, tuning

# Numbers of csrc/depthwise/params.h.
NORMS = {"none": 0, "pre": 1, "post": 2}
RESIDUAL_MODES = {"none": 0, "before": 1, "after": 2}

KERNEL_SIZES = (3, 5, 7)
STRIDES = (1, 2)

# Channels per thread at most (columns on NCHW maps), columns per thread, rows per strip of the convolution; 0
# leaves each to the launcher.
AUTOMATIC = (0, 0, 0)


def _on_planes(call: Any) -> tuple[bool | None, str]:
    """Whether columns lie side by side in every map (NCHW), or channels do; None and why if neither."""
    x = call.x
    channels_last = library.is_channels_last(x)
    # Where both layouts describe the strides, and in an empty batch, the order does not matter.
    either = all(min(b, c - 1, h * w - 1) <= 0 for b, c, h, w in (x.shape, call.output_shape))
    reason = ""
    for planes, dimension in ((False, 1), (True, 3)):
        if not either and planes == channels_last:
            continue
        maps = (("x", x), ("residual", call.residual))
        bad = [(name, map_) for name, map_ in maps if map_ is not None and _gap(map_, dimension)]
        if not bad:
            return planes, ""
        order = "neighbouring columns (NCHW)" if planes else "neighbouring channels (channels_last)"
        reason = f"{bad[0][0]} has strides {bad[0][1].stride()}; the CUDA kernels need {order}"
    return None, reason


def _gap(tensor: Tensor, dimension: int) -> bool:
    """Whether elements along a dimension are not neighbours in memory."""
    return tensor.shape[dimension] > 1 and tensor.stride(dimension) != 1


def can_run(call: Any) -> tuple[bool, str]:
    """Whether the CUDA kernels can run ``call``; one sentence says why not. Looks at metadata only."""
    x = call.x
    if not x.is_cuda and not (x.device.type == "cpu" and native.emulator() is not None):
        return False, f"x is on {x.device}; the CUDA backend needs a CUDA tensor"
    kernel = tuple(call.weight.shape[2:])
    if kernel[0] != kernel[1] or kernel[0] not in KERNEL_SIZES:
        return False, f"the kernel is {kernel[0]}x{kernel[1]}; the CUDA kernels are for 3x3, 5x5 and 7x7"
    if call.stride[0] != call.stride[1] or call.stride[0] not in STRIDES:
        return False, f"stride is {call.stride}; the CUDA kernels are for strides 1 and 2"
    if call.dilation != (1, 1):
        return False, f"dilation is {call.dilation}; the CUDA kernels are for dilation 1"
    if x.dtype not in native.SCALAR_TYPES:
        return False, f"x is {x.dtype}; the CUDA kernels are for float32, float16 and bfloat16"
    if call.activation not in native.ACTIVATIONS:
        return False, f"activation is {call.activation}; the CUDA kernels do not have it"
    for name in ("weight", "bias", "norm_weight", "norm_bias", "mean", "var"):
        tensor = getattr(call, name)
        if tensor is not None and tensor.dtype not in native.SCALAR_TYPES:
            return False, f"{name} is {tensor.dtype}; the CUDA kernels read float32, float16 and bfloat16"
    if min(x.shape[1:]) < 1 or min(call.output_shape[2:]) < 1:
        return False, f"the map is empty, {tuple(x.shape)}"
    planes, reason = _on_planes(call)
    if planes is None:
        return False, reason
    if x.shape[0] == 0 and call.batch_stats:
        return False, "the batch is empty and its statistics are needed; the CUDA kernels need elements"
    if x.is_cuda:
        ok, reason = native.status(x.device.index)
        if not ok:
            return False, reason
    return True, ""


def forward(
    call: Any,
    out: Tensor,
    raw: Tensor,
    mean: Tensor,
    var: Tensor,
    unbiased: Tensor,
    *,
    tile: Sequence[int] | None = None,
) -> tuple[Tensor, ...]:
    """Launch the forward kernels of a call that :func:`can_run`; fills and returns the given outputs.

    Args:
        call: the checked call.
        out: result (B, C, Ho, Wo).
        raw: the convolution's own output, written where ``call.keep_raw``.
        mean, var, unbiased: (C) float32, the batch's statistics (biased and unbiased variance) over the
            process group, written where ``call.batch_stats``.
        tile: see :data:`AUTOMATIC`; None for what was measured on this GPU.
    """
    if call.x.shape[0] == 0:
        return out, raw, mean, var, unbiased
    statistics = (mean, var, unbiased) if call.batch_stats else (call.mean, call.var, None)
    kept = raw if call.keep_raw else None
    if kept is None and call.batch_stats and call.norm == "post" and not call.convolves_twice:
        kept = torch.empty_like(out)
    tensors = (
        call.x,
        call.weight,
        call.bias,
        call.norm_weight,
        call.norm_bias,
        *statistics,
        call.residual,
        out,
        kept,
    )

    def exchange() -> None:
        distributed.exchange_moments(mean, var, unbiased, call.values_per_channel, call.group)

    _run("depthwise_forward", call, tensors, exchange, tile)
    return out, raw, mean, var, unbiased


def backward(
    call: Any,
    grad: Tensor,
    raw: Tensor | None,
    needs: list[bool],
    *gradients: Tensor,
    tile: Sequence[int] | None = None,
) -> tuple[Tensor, ...]:
    """Launch the backward kernels; fills the needed ones of the six gradients and returns all.

    Args:
        call: the forward's call, with ``mean`` and ``var`` the statistics that it normalised with.
        grad: (B, C, Ho, Wo) in any layout; copied where it does not have that of x.
        raw: the convolution's output, or None where nothing needs it.
        needs: which of x, weight, bias, norm_weight, norm_bias, residual get a gradient.
        gradients: outputs for them, absent ones empty.
        tile: as for :func:`forward`, columns and rows counted on the output.
    """
    if call.x.shape[0] == 0:
        for gradient, needed in zip(gradients, needs, strict=True):
            if needed:
                gradient.zero_()
        return gradients
    planes, _ = _on_planes(call)
    if _gap(grad, 3 if planes else 1):
        grad = grad.contiguous(memory_format=torch.contiguous_format if planes else torch.channels_last)
    batch_pre = call.norm == "pre" and call.batch_stats
    group = call.group
    if batch_pre and not any(needs[index] for index in (0, 3, 4)):
        # Nothing asked for depends on the other processes; they ask for the same and exchange nothing.
        group = ""
    sums = call.x.new_empty((2, call.x.shape[1]), dtype=torch.float32) if group else None
    wanted = [gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True)]
    tensors = (
        grad,
        call.x,
        call.weight,
        call.norm_weight,
        call.norm_bias,
        call.mean,
        call.var,
        call.residual,
        raw,
        *wanted,
        sums,
    )

    def exchange() -> None:
        distributed.exchange_sums(sums, call.values_per_channel, group)

    _run("depthwise_backward", call, tensors, exchange if group else None, tile)
    return gradients


@cache
def _tuned_name(direction: str, planes: bool, kernel: int, stride: int, dtype: torch.dtype) -> str:
    """Under which the tile of a convolution is tuned."""
    layout = "nchw" if planes else "channels_last"
    dtype = str(dtype).removeprefix("torch.")
    return f"{direction} cuda {layout} {kernel}x{kernel} stride {stride} {dtype}"


def tiles(kernel: str, sizes: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Tiles worth measuring: narrower vectors, and strips of other lengths."""
    rows = [rows for rows in (7, 14, 28, 56) if rows <= sizes[1]] or [0]
    vectors = (1, 2, 4) if " nchw " in kernel else (1, 2, 4, 8)
    return [(vector, 0, count) for vector in vectors for count in rows]


def _run(
    name: str, call: Any, tensors: Sequence[Tensor | None], exchange: Any, tile: Sequence[int] | None
) -> None:
    """Call a launch sequence, in two stages with ``exchange`` between them for a process group."""
    if tile is None:
        planes, _ = _on_planes(call)
        kernel = _tuned_name(name, bool(planes), call.kernel_size[0], call.stride[0], call.x.dtype)
        tile = tuning.tile_of(kernel, call.sizes(), lambda: AUTOMATIC, call.x)
    options = (
        call.stride[0],
        *call.padding,
        NORMS[call.norm],
        call.batch_stats,
        call.eps,
        native.ACTIVATIONS[call.activation],
        RESIDUAL_MODES[call.residual_mode],
        call.identity,
    )
    native.run_stages(name, tensors, options, tile, exchange=exchange if call.group else None)
