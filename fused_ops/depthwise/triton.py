"""The Triton backend of the depthwise operator: what it can run, and its launches.

Two sets of convolution kernels, both with one pass over the maps per launch: :mod:`triton_rows` for 3x3
stride 1 on channels_last maps, and :mod:`triton_general` for every other odd kernel, stride, padding,
dilation and layout. Kernels that do not convolve are shared. Sums over the map are written per program and
merged in a fixed order by :mod:`fused_ops.core.statistics`: no atomics, so results repeat bitwise.

Launches, forward: one; with batch statistics three (moments, their merge, the pass that uses them). Backward:
one, and one that finishes all parameter gradients; post-norm with batch statistics two more before them (the
norm's sums), pre-norm with batch statistics one more after them. A filter above 3x3 on channels_last maps is
transposed first.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from fused_ops.core import backends, distributed, library, tuning
from fused_ops.core.statistics import finish_gradients, merge_moments
from fused_ops.depthwise.triton_general import (
    LARGEST_FILTER,
    backward_plan,
    forward_plan,
    general_backward_kernel,
    general_forward_kernel,
    general_tiles,
    map_plan,
    transposes_filter,
)
from fused_ops.depthwise.triton_maps import (
    moments_kernel,
    normalise_kernel,
    post_norm_sums_kernel,
    pre_norm_finish_kernel,
)
from fused_ops.depthwise.triton_rows import (
    backward_kernel,
    forward_kernel,
    rows_plan,
    rows_tile,
    rows_tiles,
)

_LARGEST_ROW = 2**31
_NO_STRIDES = (0, 0, 0, 0)


def can_run(call: Any) -> tuple[bool, str]:
    """Whether the Triton kernels can run ``call``; one sentence says why not."""
    x = call.x
    ok, reason = backends.triton_takes("x", x)
    if not ok:
        return False, reason
    kernel = call.kernel_size
    if kernel[0] * kernel[1] > LARGEST_FILTER:
        name = "x".join(map(str, kernel))
        return False, f"the kernel is {name}; the Triton kernels are for up to {LARGEST_FILTER} taps"
    if x.numel() == 0:
        return False, f"x is empty, {tuple(x.shape)}"
    span = (x.shape[3] + 2 * call.padding[1]) * max(x.stride(3), x.shape[1])
    if span >= _LARGEST_ROW:
        return False, f"one row of x spans {span} elements; fewer than 2**31 are allowed"
    return True, ""


def _walks_rows(call: Any) -> bool:
    """Whether the 3x3 kernels run ``call``."""
    x = call.x
    return (
        call.kernel_size == (3, 3)
        and call.stride == (1, 1)
        and call.padding == (1, 1)
        and call.dilation == (1, 1)
        # With one channel or pixel, rows of channels are what NCHW strides describe too.
        and (x.shape[1] == 1 or x.shape[2] * x.shape[3] == 1 or library.is_channels_last(x))
    )


def _in_layout(tensor: Tensor | None, planes: bool) -> tuple[Tensor | None, tuple[int, ...]]:
    """``tensor`` with what kernels read together side by side in memory (else copied), and its strides.

    Channels side by side for channels_last kernels, columns for those on planes. Expanded tensors stay.
    """
    if tensor is None:
        return None, _NO_STRIDES
    strides = tensor.stride()
    dimension = 3 if planes else 1
    if tensor.shape[dimension] > 1 and strides[dimension] > 1:
        memory_format = torch.contiguous_format if planes else torch.channels_last
        tensor = tensor.contiguous(memory_format=memory_format)
        strides = tensor.stride()
    return tensor, strides


@cache
def _tuned_name(
    direction: str,
    walks_rows: bool,
    planes: bool,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
    dtype: torch.dtype,
) -> str:
    """Under which the tile of a convolution is tuned; :func:`tiles` reads it."""
    dtype = str(dtype).removeprefix("torch.")
    if walks_rows:
        return f"depthwise_{direction} triton rows {dtype}"
    pairs = (f"{name}{pair[0]}x{pair[1]}" for name, pair in (("k", kernel), ("s", stride), ("d", dilation)))
    return f"depthwise_{direction} triton {'nchw' if planes else 'channels_last'} {' '.join(pairs)} {dtype}"


def tiles(kernel: str, sizes: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Tiles worth measuring for a kernel, by the name under which it is tuned."""
    direction, _, layout, *_ = kernel.removeprefix("depthwise_").split()
    if layout == "rows":
        return rows_tiles(sizes)
    return general_tiles(direction, layout == "nchw", sizes)


class _Launches:
    """The kernels that fit one call, on its shapes and layout."""

    def __init__(self, call: Any) -> None:
        self.call = call
        self.x_shape = tuple(call.x.shape)
        self.out_shape = call.output_shape
        self.walks_rows = _walks_rows(call)
        # Planes: columns lie side by side in memory, and not channels.
        self.planes = not self.walks_rows and not library.is_channels_last(call.x)
        self.x, self.x_strides = _in_layout(call.x, self.planes)
        self.residual, self.residual_strides = None, _NO_STRIDES
        if call.identity:
            self.residual, self.residual_strides = self.x, self.x_strides
        elif call.residual is not None:
            self.residual, self.residual_strides = _in_layout(call.residual, self.planes)

    def map(self, shape: tuple[int, ...]) -> tuple[Any, ...]:
        """Sizes, grid, parts and options for kernels that do not convolve, on a map of ``shape``."""
        return rows_plan(shape, rows_tile(shape)) if self.walks_rows else map_plan(shape, self.planes)

    def tile(self, direction: str) -> tuple[int, ...]:
        """The measured tile of a convolution, or that of the rule."""
        call = self.call
        name = _tuned_name(
            direction,
            self.walks_rows,
            self.planes,
            call.kernel_size,
            call.stride,
            call.dilation,
            call.x.dtype,
        )

        def rule() -> tuple[int, ...]:
            if self.walks_rows:
                return rows_tile(self.x_shape, direction == "backward")
            return self.plan(direction, ()).tile

        return tuning.tile_of(name, call.sizes(), rule, call.x)

    def plan(self, direction: str, tile: tuple[int, ...]) -> Any:
        """Plan of a convolution with this tile, or that of the rule if it is empty."""
        call = self.call
        geometry = (call.kernel_size, call.stride)
        if self.walks_rows:
            return rows_plan(self.x_shape, tile)
        if direction == "forward":
            return forward_plan(self.out_shape, *geometry, call.dilation, self.planes, tile)
        return backward_plan(
            self.x_shape, self.out_shape, *geometry, call.padding, call.dilation, self.planes, tile
        )

    def floats(self, count: int) -> Tensor:
        return torch.empty(count, dtype=torch.float32, device=self.x.device)

    def filter(self) -> tuple[Tensor, tuple[int, int]]:
        """The filter and its strides between channels and taps."""
        weight = self.call.weight.contiguous()
        taps = weight.shape[2] * weight.shape[3]
        if not transposes_filter(self.call.kernel_size, self.planes):
            return weight, (taps, 1)
        channels = weight.shape[0]
        return weight.view(channels, taps).t().contiguous(), (1, channels)

    def convolve(
        self,
        out: Tensor,
        norm: str,
        statistics: tuple[Tensor | None, Tensor | None],
        *,
        raw: Tensor | None = None,
        moments: bool = False,
        rounds: bool = False,
    ) -> tuple[Tensor, int] | None:
        """Launch the forward convolution; with ``moments``, returns them and the number of their parts."""
        call = self.call
        channels = self.x_shape[1]
        general = not self.walks_rows
        plan = self.plan("forward", self.tile("forward"))
        if general:
            weight, weight_strides = self.filter()
        else:
            weight = call.weight.contiguous()
        buffer = self.floats(plan.parts * (2 * channels + 1)) if moments else None
        vectors = (call.norm_weight, call.norm_bias, *statistics)
        pointers = (self.x, weight, call.bias, *vectors, self.residual, out, raw, buffer)
        strides = (*self.x_strides, *self.residual_strides, *out.stride())
        options = {
            "NORM": norm,
            "ACTIVATION": call.activation,
            "RESIDUAL": call.residual_mode,
            "ROUND": rounds,
            **plan.meta,
        }
        if general:
            general_forward_kernel[plan.grid](
                *pointers,
                *self.x_shape[2:],
                channels,
                *self.out_shape[2:],
                *plan.sizes,
                *strides,
                *weight_strides,
                *call.padding,
                call.kernel_size[1],
                call.eps,
                **options,
            )
        else:
            forward_kernel[plan.grid](
                *pointers,
                *plan.sizes,
                *strides,
                call.eps,
                IDENTITY=call.identity,
                INPUT_ACTIVATION=call.input_activation,
                **options,
            )
        return (buffer, plan.parts) if moments else None


def forward(
    call: Any, out: Tensor, raw: Tensor, mean: Tensor, var: Tensor, unbiased: Tensor
) -> tuple[Tensor, ...]:
    """Launch the forward kernels of a call that :func:`can_run`; fills and returns the given outputs.

    Args:
        call: the checked call.
        out: result (B, C, Ho, Wo).
        raw: the convolution's own output, written where ``call.keep_raw``.
        mean, var, unbiased: (C) float32, the batch's statistics (biased and unbiased variance) over the
            process group, written where ``call.batch_stats``.
    """
    with backends.device_of(call.x):
        _forward(call, out, raw, mean, var, unbiased)
    return out, raw, mean, var, unbiased


def _forward(call: Any, out: Tensor, raw: Tensor, mean: Tensor, var: Tensor, unbiased: Tensor) -> None:
    launches = _Launches(call)
    kept = raw if call.keep_raw else None
    if not call.batch_stats:
        launches.convolve(out, call.norm, (call.mean, call.var), raw=kept)
        return
    if call.norm == "pre":
        sizes, grid, parts, meta = launches.map(launches.x_shape)
        moments = launches.floats(parts * (2 * launches.x_shape[1] + 1))
        moments_kernel[grid](launches.x, moments, *sizes, *launches.x_strides, **meta)
        _merge(call, (moments, parts), mean, var, unbiased)
        launches.convolve(out, "pre", (mean, var), raw=kept)
        return
    # Statistics of what is stored, or would be: the normalised values then have mean 0 exactly.
    if call.convolves_twice:
        moments = launches.convolve(out, "post", (None, None), moments=True, rounds=True)
        _merge(call, moments, mean, var, unbiased)
        launches.convolve(out, "post", (mean, var), rounds=True)
        return
    work = raw if call.keep_raw else torch.empty_like(out)
    moments = launches.convolve(out, "post", (None, None), raw=work, moments=True, rounds=True)
    _merge(call, moments, mean, var, unbiased)
    sizes, grid, _, meta = launches.map(launches.out_shape)
    normalise_kernel[grid](
        work,
        launches.residual,
        call.norm_weight,
        call.norm_bias,
        mean,
        var,
        out,
        *sizes,
        *launches.residual_strides,
        *out.stride(),
        call.eps,
        ACTIVATION=call.activation,
        RESIDUAL=call.residual_mode,
        **meta,
    )


def _merge(call: Any, moments: tuple[Tensor, int], mean: Tensor, var: Tensor, unbiased: Tensor) -> None:
    merge_moments(*moments, mean, var, unbiased)
    if call.group:
        distributed.exchange_moments(mean, var, unbiased, call.values_per_channel, call.group)


def backward(
    call: Any, grad: Tensor, raw: Tensor | None, needs: list[bool], *gradients: Tensor
) -> tuple[Tensor, ...]:
    """Launch the backward kernels; fills the needed ones of the six gradients and returns all.

    Args:
        call: the forward's call, with ``mean`` and ``var`` the statistics that it normalised with.
        grad: (B, C, Ho, Wo) in any layout; copied where it is neither in that of x nor expanded.
        raw: the convolution's output, or None where nothing needs it.
        needs: which of x, weight, bias, norm_weight, norm_bias, residual get a gradient. Of a 3x3 convolution
            at stride 1 without a norm, ``norm_bias`` stands for a bias that was added to give ``x``.
        gradients: outputs for them, absent ones empty.
    """
    with backends.device_of(call.x):
        _backward(call, grad, raw, needs, gradients)
    return gradients


def _backward(
    call: Any, grad: Tensor, raw: Tensor | None, needs: list[bool], gradients: tuple[Tensor, ...]
) -> None:
    x_grad, weight_grad, bias_grad, norm_weight_grad, norm_bias_grad, residual_grad = (
        gradient if need else None for gradient, need in zip(gradients, needs, strict=True)
    )
    launches = _Launches(call)
    channels = launches.x_shape[1]
    grad, grad_strides = _in_layout(grad, launches.planes)
    # The sum with the residual is what the activation's derivative is taken at.
    add_residual = call.residual_mode == "before" and call.activation != "none"
    if not add_residual:
        launches.residual, launches.residual_strides = None, _NO_STRIDES
    inverse_count = 1.0 / call.values_per_channel
    # Freshly allocated in one layout, and for the 3x3 kernels of one shape, so that strides are the same.
    dense = (raw, residual_grad, x_grad if launches.walks_rows else None)
    out_strides = next((tensor.stride() for tensor in dense if tensor is not None), _NO_STRIDES)
    sums = None
    if call.norm == "post" and call.batch_stats:
        sums = launches.floats(2 * channels).view(2, channels)
        sizes, grid, parts, meta = launches.map(launches.out_shape)
        partial = launches.floats(parts * 2 * channels)
        post_norm_sums_kernel[grid](
            grad,
            raw,
            launches.residual,
            call.norm_weight,
            call.norm_bias,
            call.mean,
            call.var,
            partial,
            *sizes,
            *grad_strides,
            *launches.residual_strides,
            *out_strides,
            call.eps,
            ACTIVATION=call.activation,
            ADD_RESIDUAL=add_residual,
            **meta,
        )
        finish_gradients(
            partial,
            channels,
            parts=0,
            part_stride=0,
            sums=(0, parts, 2 * channels),
            norm_weight_grad=norm_weight_grad,
            norm_bias_grad=norm_bias_grad,
            sums_out=sums,
        )
        if call.group:
            distributed.exchange_sums(sums, call.values_per_channel, call.group)
        norm_weight_grad = norm_bias_grad = None
    finish_x = call.norm == "pre" and call.batch_stats and x_grad is not None
    norm_sums = norm_weight_grad is not None or norm_bias_grad is not None or finish_x
    wanted = (x_grad, weight_grad, bias_grad, residual_grad)
    if not norm_sums and all(gradient is None for gradient in wanted):
        return
    taps = 0 if weight_grad is None else call.kernel_size[0] * call.kernel_size[1]
    columns = taps + (bias_grad is not None)
    # The norm's sums come from the programs that compute x's gradient (pre) or from those of all other sums.
    sums_apart = norm_sums and call.norm == "pre" and not launches.walks_rows
    if norm_sums and not sums_apart:
        columns += 2
    plan = launches.plan("backward", launches.tile("backward"))
    parts, x_parts = (plan.parts, 0) if launches.walks_rows else (plan.sum_parts, plan.x_parts)
    x_sums_start = parts * columns * channels
    size = x_sums_start + (x_parts * 2 * channels if sums_apart else 0)
    partial = launches.floats(size) if size else None
    vectors = (call.norm_weight, call.norm_bias, call.mean, call.var)
    outputs = (x_grad, partial, residual_grad)
    strides = (*grad_strides, *launches.x_strides, *launches.residual_strides, *out_strides)
    options = {
        "NORM": call.norm,
        "BATCH_STATS": call.batch_stats,
        "ACTIVATION": call.activation,
        "ADD_RESIDUAL": add_residual,
        "IDENTITY": call.residual_mode if call.identity else "none",
        "WEIGHT": weight_grad is not None,
        "BIAS": bias_grad is not None,
        "SUMS": norm_sums,
        **plan.meta,
    }
    if launches.walks_rows:
        backward_kernel[plan.grid](
            grad,
            launches.x,
            call.weight.contiguous(),
            *vectors,
            launches.residual,
            raw,
            sums,
            *outputs,
            *plan.sizes,
            *strides,
            call.eps,
            inverse_count,
            INPUT_ACTIVATION=call.input_activation,
            **options,
        )
    else:
        sum_programs = bool(columns) or residual_grad is not None
        x_programs = x_grad is not None or sums_apart
        weight, weight_strides = launches.filter() if x_programs else (call.weight, (0, 0))
        general_backward_kernel[plan.grid(sum_programs, x_programs)](
            grad,
            launches.x,
            weight,
            *vectors,
            launches.residual,
            raw,
            sums,
            *outputs,
            launches.x_shape[0],
            *launches.x_shape[2:],
            channels,
            *launches.out_shape[2:],
            *plan.sum_sizes,
            plan.sum_programs,
            *plan.x_sizes,
            plan.x_programs,
            plan.x_programs_each,
            x_sums_start,
            *strides,
            *(_NO_STRIDES if x_grad is None else x_grad.stride()),
            *weight_strides,
            *call.padding,
            plan.meta["X_SOURCE_COLUMNS"],
            call.eps,
            inverse_count,
            **options,
        )
    if partial is None:
        return
    if norm_sums:
        sums = launches.floats(2 * channels).view(2, channels)
        apart = (x_sums_start, x_parts, 2 * channels)
        together = ((columns - 2) * channels, parts, columns * channels)
    finish_gradients(
        partial,
        channels,
        parts=parts,
        part_stride=columns * channels,
        taps=taps,
        bias=bias_grad is not None,
        sums=None if not norm_sums else apart if sums_apart else together,
        weight_grad=weight_grad,
        bias_grad=bias_grad,
        norm_weight_grad=norm_weight_grad,
        norm_bias_grad=norm_bias_grad,
        sums_out=sums if norm_sums else None,
    )
    if norm_sums and call.group:
        distributed.exchange_sums(sums, call.values_per_channel, call.group)
    if finish_x:
        sizes, grid, _, meta = launches.map(launches.x_shape)
        pre_norm_finish_kernel[grid](
            x_grad,
            launches.x,
            call.norm_weight,
            call.mean,
            call.var,
            sums,
            *sizes,
            *launches.x_strides,
            *x_grad.stride(),
            call.eps,
            inverse_count,
            **meta,
        )


def launch_count(call: Any, direction: str) -> int:
    """Launches of one call with every gradient. Tests hold it against launches that were recorded."""
    batch_post = call.norm == "post" and call.batch_stats
    batch_pre = call.norm == "pre" and call.batch_stats
    planes = not _walks_rows(call) and not library.is_channels_last(call.x)
    transposed = not _walks_rows(call) and transposes_filter(call.kernel_size, planes)
    if direction == "forward":
        return 1 + transposed + 2 * (batch_post or batch_pre) + (transposed and call.convolves_twice)
    again = call.needs_raw and not call.keep_raw
    return 2 + transposed + 2 * batch_post + batch_pre + again * (1 + transposed)
