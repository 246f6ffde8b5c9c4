"""The Triton backend of the HR chain: what it can run, and its launches.

Launches, forward: one; with batch statistics three (moments of the strided convolution, their merge, the pass
that writes the result). Backward, all gradients: the low-resolution branch, its merge, the pass over the full
maps and the merges of the two filters' gradients. The branch is one kernel where the weight gradients of both
fully connected layers fit into one program's registers (narrow maps); others take one kernel for the
gradients of the maps and one for those of the weights, each with a merge. Before either, filters are
transposed, and matrices of another dtype than ``x`` are cast.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_ops.core import backends, distributed, library
from fused_ops.core.statistics import finish_gradients, merge_moments
from fused_ops.core.triton_support import ceil_div, next_power_of_2
from fused_ops.hr_chain.triton_backward import (
    finish_low_kernel,
    hidden_weights_kernel,
    low_backward_kernel,
    low_gradient_kernel,
    maps_backward_kernel,
)
from fused_ops.hr_chain.triton_forward import forward_kernel, statistics_kernel

LARGEST_CHANNELS = 256
# An argument of the kernels, so that they do not unroll their loops over it.
_FILTER_ROWS = 3


def can_run(call: Any) -> tuple[bool, str]:
    """Whether the Triton kernels can run ``call``; one sentence says why not."""
    x = call.x
    ok, reason = backends.triton_takes("x", x)
    if not ok:
        return False, reason
    if x.shape[1] > LARGEST_CHANNELS:
        return False, f"x has {x.shape[1]} channels; the Triton kernels are for up to {LARGEST_CHANNELS}"
    if x.numel() == 0:
        return False, f"x is empty, {tuple(x.shape)}"
    # With one channel or pixel, both layouts describe the same strides.
    if x.shape[1] > 1 and x.shape[2] * x.shape[3] > 1 and not library.is_channels_last(x):
        return False, "x is in NCHW order; the Triton kernels read and write channels_last"
    return True, ""


def _in_layout(tensor: Tensor) -> Tensor:
    """``tensor`` with channels side by side in memory; copied where they are not. Expanded tensors stay."""
    if tensor.shape[1] > 1 and tensor.stride(1) > 1:
        return tensor.contiguous(memory_format=torch.channels_last)
    return tensor


class Tiling(NamedTuple):
    """Tiles of the low-resolution maps of one shape.

    Attributes:
        count: tiles of all images.
        each: tiles per program.
        parts: programs over the maps, for every block of channels or hidden units.
        meta: compile-time options of the launch.
    """

    count: int
    each: int
    parts: int
    meta: dict[str, Any]


def _tile(low_height: int, low_width: int, pixels: int) -> tuple[int, int]:
    """Height and width (powers of 2) of tiles with ``pixels`` pixels: least padding, then least halo."""
    shapes = [(pixels >> bits, 1 << bits) for bits in range(pixels.bit_length())]

    def cost(tile: tuple[int, int]) -> tuple[int, int]:
        rows, columns = tile
        padded = ceil_div(low_height, rows) * rows * ceil_div(low_width, columns) * columns
        return padded, rows + columns

    return min(shapes, key=cost)


def _tiling(
    shape: tuple[int, int, int, int], pixels: int, block_c: int, warps: int, each: Any, **meta: Any
) -> Tiling:
    batch, _, low_height, low_width = shape
    # The matrix unit takes at least 16 rows.
    pixels = max(16, min(pixels, next_power_of_2(low_height * low_width)))
    rows, columns = _tile(low_height, low_width, pixels)
    count = batch * ceil_div(low_height, rows) * ceil_div(low_width, columns)
    each = max(1, min(each(count), count))
    options = {
        "TILE_H": rows,
        "TILE_W": columns,
        "BLOCK_C": block_c,
        **meta,
        "num_warps": warps,
        "num_stages": 1,
        "enable_fp_fusion": True,
    }
    return Tiling(count, each, ceil_div(count, each), options)


def _block_c(channels: int) -> int:
    return max(16, next_power_of_2(channels))


@lru_cache(maxsize=4096)
def statistics_tiling(shape: tuple[int, int, int, int]) -> Tiling:
    """Tiling of the statistics pass over maps whose low-resolution shape is (B, C, h, w): a rule of thumb."""
    block_c = min(64, next_power_of_2(shape[1]))
    blocks = ceil_div(shape[1], block_c)
    pixels = min(64, 1024 // block_c)
    return _tiling(shape, pixels, block_c, 4, lambda count: max(4, ceil_div(count * blocks, 1024)))


@lru_cache(maxsize=4096)
def forward_tiling(shape: tuple[int, int, int, int], hidden: int, size: int) -> Tiling:
    """Tiling of the pass that writes the result; ``size`` is that of an element in bytes."""
    block_c = _block_c(shape[1])
    # Every tile streams both matrices once, so tiles are as large as registers allow.
    pixels = max(16, (64 if block_c <= 32 else min(32, 4096 // block_c)) // (size // 2))
    block_hidden = max(16, min(next_power_of_2(hidden), 64 if block_c <= 64 else 32))
    # Eight values of a tile per thread: with sixteen, the convolutions take every register there is.
    warps = max(4, pixels * block_c // 256)
    return _tiling(shape, pixels, block_c, warps, lambda count: 1, BLOCK_HIDDEN=block_hidden)


@lru_cache(maxsize=4096)
def low_gradient_tiling(shape: tuple[int, int, int, int], hidden: int, size: int) -> Tiling:
    """Tiling of the low-resolution branch's backward where weight gradients have a kernel of their own."""
    block_c = _block_c(shape[1])
    pixels = max(16, (64 if block_c <= 32 else min(32, 4096 // block_c)) // (size // 2))
    # Chunks of the matrices lie in shared memory, of which every GPU gives a block 48 KiB without asking.
    block_hidden = max(16, min(next_power_of_2(hidden), 64, 4096 // block_c))
    warps = 8 if pixels * block_c >= 2048 else 4
    return _tiling(
        shape, pixels, block_c, warps, lambda count: ceil_div(count, 1024), BLOCK_HIDDEN=block_hidden
    )


# Weight gradients of one layer that a program of 8 warps holds beside those of the other.
_LARGEST_ACCUMULATOR = 4096


def is_one_kernel(channels: int, hidden: int) -> bool:
    """Whether one program holds the weight gradients of both fully connected layers, and does everything."""
    return max(16, next_power_of_2(hidden)) * _block_c(channels) <= _LARGEST_ACCUMULATOR


def _weight_tiles(count: int, hidden: int, chunks: int) -> int:
    """Tiles per program of the kernels for weight gradients.

    Each program writes partial gradients as large as its chunk of the weights. With 5 hidden / 8 tiles of 16
    half-precision pixels they come to a twentieth of what backward moves for those pixels. Where that leaves
    less than a program per multiprocessor, more programs are worth more than fewer bytes, down to 32 tiles.
    """
    return max(ceil_div(count * chunks, 528), min(5 * hidden // 8, max(32, ceil_div(count * chunks, 132))), 1)


@lru_cache(maxsize=4096)
def low_backward_tiling(shape: tuple[int, int, int, int], hidden: int) -> Tiling:
    """Tiling of the low-resolution branch's backward in one kernel."""
    return _tiling(
        shape,
        16,
        _block_c(shape[1]),
        8,
        lambda count: _weight_tiles(count, hidden, 1),
        BLOCK_HIDDEN=max(16, next_power_of_2(hidden)),
        # Compilers for some architectures would take a few more, and spill nothing with this.
        maxnreg=240,
    )


@lru_cache(maxsize=4096)
def hidden_weights_tiling(shape: tuple[int, int, int, int], hidden: int) -> Tiling:
    """Tiling of the fully connected layers' weight gradients alone, as above."""
    block_c = _block_c(shape[1])
    block_hidden = min(max(16, next_power_of_2(hidden)), _LARGEST_ACCUMULATOR // block_c)
    chunks = ceil_div(hidden, block_hidden)
    return _tiling(
        shape,
        16,
        block_c,
        8,
        lambda count: _weight_tiles(count, hidden, chunks),
        BLOCK_HIDDEN=block_hidden,
    )


@lru_cache(maxsize=4096)
def maps_tiling(shape: tuple[int, int, int, int]) -> Tiling:
    """Tiling of the backward pass over the full maps."""
    block_c = min(32, next_power_of_2(shape[1]))
    blocks = ceil_div(shape[1], block_c)
    return _tiling(shape, 16, block_c, 8, lambda count: max(12, ceil_div(count * blocks, 1024)))


class _Launches:
    """Sizes and tensors that every launch of one call takes."""

    def __init__(self, call: Any) -> None:
        self.call = call
        self.x = _in_layout(call.x)
        self.channels, self.height, self.width = call.x.shape[1:]
        self.low_shape = (call.x.shape[0], self.channels, *call.low_size)
        self.sizes = (self.height, self.width, self.channels, *call.low_size)
        self.hidden = call.fc1_weight.shape[0]
        self.element_size = call.x.element_size()

    def floats(self, count: int) -> Tensor:
        return torch.empty(count, dtype=torch.float32, device=self.x.device)

    def filters(self) -> tuple[Tensor, Tensor]:
        """Both filters as (3, 3, C), so that a row of taps lies as its channels do."""
        high, low = self.call.high_weight, self.call.low_weight
        return tuple(weight.reshape(self.channels, 9).t().contiguous() for weight in (high, low))

    def matrices(self) -> tuple[Tensor, Tensor]:
        """Weights of the fully connected layers, as the matrix unit multiplies them: in the dtype of x."""
        dtype = self.x.dtype
        return self.call.fc1_weight.to(dtype).contiguous(), self.call.fc2_weight.to(dtype).contiguous()


def forward(
    call: Any, out: Tensor, low: Tensor, mean: Tensor, var: Tensor, unbiased: Tensor
) -> tuple[Tensor, ...]:
    """Launch the forward kernels of a call that :func:`can_run`; fills and returns the given outputs.

    Args:
        call: the checked call.
        out: result (B, C, H, W).
        low: the strided convolution's output (B, h, w, C), written where ``call.keep_low``.
        mean, var, unbiased: (C) float32, the batch's statistics over the process group, written where
            ``call.batch_stats``.
    """
    with backends.device_of(call.x):
        _forward(call, out, low, mean, var, unbiased)
    return out, low, mean, var, unbiased


def _forward(call: Any, out: Tensor, low: Tensor, mean: Tensor, var: Tensor, unbiased: Tensor) -> None:
    launches = _Launches(call)
    high_filter, low_filter = launches.filters()
    kept = low if call.keep_low else None
    statistics = (call.mean, call.var)
    if call.batch_stats:
        tiling = statistics_tiling(launches.low_shape)
        moments = launches.floats(tiling.parts * (2 * launches.channels + 1))
        blocks = ceil_div(launches.channels, tiling.meta["BLOCK_C"])
        statistics_kernel[(tiling.parts * blocks,)](
            launches.x,
            low_filter,
            kept,
            moments,
            *launches.sizes,
            _FILTER_ROWS,
            tiling.count,
            tiling.each,
            *launches.x.stride(),
            **tiling.meta,
        )
        merge_moments(moments, tiling.parts, mean, var, unbiased)
        if call.group:
            distributed.exchange_moments(mean, var, unbiased, call.values_per_channel, call.group)
        # Written by now; the next kernel convolves again from pixels that it reads anyway.
        kept = None
        statistics = (mean, var)
    tiling = forward_tiling(launches.low_shape, launches.hidden, launches.element_size)
    fc1_weight, fc2_weight = launches.matrices()
    forward_kernel[(tiling.count,)](
        launches.x,
        high_filter,
        call.high_bias,
        low_filter,
        fc1_weight,
        call.fc1_bias,
        fc2_weight,
        call.fc2_bias,
        call.norm_weight,
        call.norm_bias,
        *statistics,
        call.drop_path,
        out,
        kept,
        *launches.sizes,
        _FILTER_ROWS,
        launches.hidden,
        *launches.x.stride(),
        call.eps,
        ACTIVATION=call.activation,
        IDENTITY=call.identity,
        **tiling.meta,
    )


def backward(
    call: Any, grad: Tensor, low: Tensor, needs: list[bool], *gradients: Tensor
) -> tuple[Tensor, ...]:
    """Launch the backward kernels; fills the needed ones of the ten gradients and returns all.

    Args:
        call: the forward's call, with ``mean`` and ``var`` the statistics that it normalised with.
        grad: (B, C, H, W) in any layout; copied where channels lie apart in memory.
        low: the strided convolution's output (B, h, w, C).
        needs: which of x, high_weight, high_bias, low_weight, fc1_weight, fc1_bias, fc2_weight, fc2_bias,
            norm_weight, norm_bias get a gradient.
        gradients: outputs for them, absent ones empty.
    """
    with backends.device_of(call.x):
        _backward(call, grad, low, needs, gradients)
    return gradients


def _backward(call: Any, grad: Tensor, low: Tensor, needs: list[bool], gradients: tuple[Tensor, ...]) -> None:
    (
        x_grad,
        high_weight_grad,
        high_bias_grad,
        low_weight_grad,
        fc1_weight_grad,
        fc1_bias_grad,
        fc2_weight_grad,
        fc2_bias_grad,
        norm_weight_grad,
        norm_bias_grad,
    ) = (gradient if need else None for gradient, need in zip(gradients, needs, strict=True))
    launches = _Launches(call)
    channels, hidden = launches.channels, launches.hidden
    grad = _in_layout(grad)
    to_low = x_grad is not None or low_weight_grad is not None
    through_norm = to_low or norm_weight_grad is not None or norm_bias_grad is not None
    hidden_weights = any(g is not None for g in (fc1_weight_grad, fc1_bias_grad, fc2_weight_grad))
    sums = launches.floats(2 * channels).view(2, channels) if through_norm else None
    low_grad = torch.empty_like(low) if through_norm else None
    if through_norm or hidden_weights or fc2_bias_grad is not None:
        matrices = launches.matrices()
        weights = (matrices[0], call.fc1_bias, matrices[1])
        vectors = (call.norm_weight, call.norm_bias, call.mean, call.var)
        tail = (*grad.stride(), call.eps)
        of_maps = (norm_bias_grad, norm_weight_grad, fc2_bias_grad, sums)
        of_weights = (fc1_weight_grad, fc2_weight_grad, fc1_bias_grad)
        flags = {"FC1": fc1_weight_grad is not None, "FC2": fc2_weight_grad is not None}
        columns = sum(flags.values()) * hidden * channels + hidden
        if hidden_weights and is_one_kernel(channels, hidden):
            tiling = low_backward_tiling(launches.low_shape, hidden)
            columns += 3 * channels
            partial = launches.floats(tiling.parts * columns)
            low_backward_kernel[(tiling.parts,)](
                grad,
                low,
                *weights,
                *vectors,
                call.drop_path,
                low_grad,
                partial,
                *launches.sizes,
                hidden,
                tiling.count,
                tiling.each,
                columns,
                *tail,
                ACTIVATION=call.activation,
                **flags,
                **tiling.meta,
            )
            _finish(partial, tiling.parts, channels, hidden, of_weights=of_weights, of_maps=of_maps)
        else:
            tiling = low_gradient_tiling(launches.low_shape, hidden, launches.element_size)
            partial = launches.floats(tiling.parts * 3 * channels)
            repeated = torch.empty_like(low) if hidden_weights else None
            low_gradient_kernel[(tiling.parts,)](
                grad,
                low,
                *weights,
                *vectors,
                call.drop_path,
                low_grad,
                repeated,
                partial,
                *launches.sizes,
                hidden,
                tiling.count,
                tiling.each,
                *tail,
                ACTIVATION=call.activation,
                **tiling.meta,
            )
            _finish(partial, tiling.parts, channels, hidden, of_maps=of_maps)
            if hidden_weights:
                tiling = hidden_weights_tiling(launches.low_shape, hidden)
                partial = launches.floats(tiling.parts * columns)
                chunks = ceil_div(hidden, tiling.meta["BLOCK_HIDDEN"])
                hidden_weights_kernel[(tiling.parts * chunks,)](
                    repeated,
                    low,
                    *weights,
                    *vectors,
                    partial,
                    *launches.sizes[2:],
                    hidden,
                    tiling.count,
                    tiling.each,
                    columns,
                    call.eps,
                    ACTIVATION=call.activation,
                    **flags,
                    **tiling.meta,
                )
                _finish(partial, tiling.parts, channels, hidden, of_weights=of_weights)
    if through_norm and call.batch_stats and call.group:
        distributed.exchange_sums(sums, call.values_per_channel, call.group)
    if not to_low and high_weight_grad is None and high_bias_grad is None:
        return
    tiling = maps_tiling(launches.low_shape)
    flags = tuple(g is not None for g in (high_weight_grad, high_bias_grad, low_weight_grad))
    columns = 9 * flags[0] + flags[1] + 9 * flags[2]
    partial = launches.floats(tiling.parts * columns * channels) if columns else None
    blocks = ceil_div(channels, tiling.meta["BLOCK_C"])
    maps_backward_kernel[(tiling.parts * blocks,)](
        grad,
        launches.x,
        *launches.filters(),
        low if call.batch_stats else None,
        low_grad,
        call.norm_weight,
        call.mean,
        call.var,
        sums,
        call.drop_path,
        x_grad,
        partial,
        *launches.sizes,
        _FILTER_ROWS,
        tiling.count,
        tiling.each,
        *grad.stride(),
        *launches.x.stride(),
        call.eps,
        1.0 / call.values_per_channel,
        BATCH_STATS=call.batch_stats,
        IDENTITY=call.identity,
        HIGH=flags[0],
        BIAS=flags[1],
        LOW=flags[2],
        **tiling.meta,
    )
    shared = {"parts": tiling.parts, "part_stride": columns * channels}
    if flags[0] or flags[1]:
        finish_gradients(
            partial,
            channels,
            taps=9 * flags[0],
            bias=flags[1],
            weight_grad=high_weight_grad,
            bias_grad=high_bias_grad,
            **shared,
        )
    if flags[2]:
        start = (9 * flags[0] + flags[1]) * channels
        finish_gradients(partial[start:], channels, taps=9, weight_grad=low_weight_grad, **shared)


def launch_count(call: Any, direction: str) -> int:
    """Launches for ``call``, PyTorch's copies included; ``backward`` with every gradient."""
    dtype = call.x.dtype
    # Both filters are transposed each way.
    copies = 2 + (call.fc1_weight.dtype != dtype) + (call.fc2_weight.dtype != dtype)
    if direction == "forward":
        return copies + 1 + 2 * call.batch_stats
    together = is_one_kernel(call.x.shape[1], call.fc1_weight.shape[0])
    # The low-resolution branch with its merges; the full maps with the merges of two filters.
    return copies + (2 if together else 4) + 3


def _finish(
    partial: Tensor,
    parts: int,
    channels: int,
    hidden: int,
    *,
    of_weights: tuple[Tensor | None, ...] | None = None,
    of_maps: tuple[Tensor | None, ...] | None = None,
) -> None:
    """Merge the parts of the low-resolution branch's kernels into gradients.

    Args:
        partial: float32, ``parts`` times the columns that ``of_weights`` and ``of_maps`` ask for.
        of_weights: gradients of fc1's weight, fc2's weight and fc1's bias, where the parts hold them.
        of_maps: gradients of the norm's bias and weight and of fc2's bias, and the norm's two sums (2, C).
    """
    fc1_weight_grad, fc2_weight_grad, fc1_bias_grad = of_weights or (None, None, None)
    norm_bias_grad, norm_weight_grad, fc2_bias_grad, sums = of_maps or (None,) * 4
    columns = partial.numel() // parts
    # Whole cache lines of columns, and enough programs of them.
    block_k = min(128, next_power_of_2(columns))
    finish_low_kernel[(ceil_div(columns, block_k),)](
        partial,
        fc1_weight_grad,
        fc2_weight_grad,
        fc1_bias_grad,
        norm_bias_grad,
        norm_weight_grad,
        fc2_bias_grad,
        sums,
        parts,
        columns,
        channels,
        hidden,
        FC1=fc1_weight_grad is not None,
        FC2=fc2_weight_grad is not None,
        FC1_BIAS=of_weights is not None,
        SUMS=of_maps is not None,
        BLOCK_P=min(4096 // block_k, next_power_of_2(parts)),
        BLOCK_K=block_k,
        num_warps=4,
        enable_fp_fusion=True,
    )
