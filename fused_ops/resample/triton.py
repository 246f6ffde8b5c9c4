"""The Triton backend of resampling: what it can run, and its launches, one each way."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

from torch import Tensor

from fused_ops.core.backends import device_of, triton_takes
from fused_ops.core.triton_support import ceil_div, next_power_of_2
from fused_ops.resample.triton_kernels import backward_kernel, forward_kernel

# Values of a tile, and how many a thread has: eight of half precision are one access of 16 bytes.
AREA = 2048
PER_THREAD = 8
# Programs from which on each takes more than one row, at most so many: four waves on the largest GPUs.
PROGRAMS = 4224
MOST_ROWS = 8
# Columns of the gradient in flight at once for each of the map.
MOST_TAPS = 4
# What a grid takes in its second and third dimension.
MOST_PROGRAMS = 65535


def can_run(call: Any) -> tuple[bool, str]:
    """Whether the Triton kernels can run ``call``; one sentence says why not."""
    x = call.x
    ok, reason = triton_takes("x", x)
    if not ok:
        return False, reason
    if x.numel() == 0:
        return False, f"x is empty, {tuple(x.shape)}"
    for name, count in (("images", x.shape[0]), ("rows", x.shape[2]), ("rows in the result", call.size[0])):
        if count > MOST_PROGRAMS:
            return False, f"x has {count} {name}; the Triton kernels take up to {MOST_PROGRAMS}"
    for name, size, out_size in zip(("height", "width"), x.shape[2:], call.size, strict=True):
        # Positions are counted in 32 bits, quotients found in float32.
        if (size + 64) * (out_size + 64) >= 2**30 or max(size, out_size) > 2**20:
            limits = "sizes up to 2**20 and products up to about 2**30"
            return False, f"the {name} goes from {size} to {out_size}; the Triton kernels take {limits}"
    return True, ""


class Plan(NamedTuple):
    """Tiles of one launch.

    Attributes:
        grid: blocks of columns and channels, groups of rows, images.
        group: rows of one program.
        blocks_c: blocks of channels.
        meta: compile-time values and launch options.
    """

    grid: tuple[int, int, int]
    group: int
    blocks_c: int
    meta: dict[str, Any]


@lru_cache(maxsize=4096)
def plan(shape: tuple[int, int, int, int], channels_inner: bool, taps: int = 0) -> Plan:
    """Plan for writing a map of ``shape``, a rule of thumb.

    Args:
        channels_inner: channels lie side by side in memory, else columns.
        taps: of backward: columns of the gradient that a column of the map takes; 0 for forward.
    """
    images, channels, rows, width = shape
    # Wide enough for full memory transactions along what lies side by side.
    most_c = 64 if channels_inner or width <= 16 else 16
    block_c = min(most_c, next_power_of_2(channels))
    block_p = min(next_power_of_2(width), AREA // block_c)
    blocks_c = ceil_div(channels, block_c)
    blocks = ceil_div(width, block_p) * blocks_c
    group = max(1, min(MOST_ROWS, images * rows * blocks // PROGRAMS))
    meta = {
        "BLOCK_P": block_p,
        "BLOCK_C": block_c,
        "num_warps": max(1, min(8, block_p * block_c // (32 * PER_THREAD))),
        "num_stages": 1,
        "enable_fp_fusion": True,
    }
    if taps:
        meta["TAPS"] = min(MOST_TAPS, next_power_of_2(taps))
        # More registers than the compiler for some architectures would take, rather than a spill; where
        # columns lie side by side, a thread has eight of them to look up.
        meta["maxnreg"] = 64 if channels_inner else 168
    return Plan((blocks, ceil_div(rows, group), images), group, blocks_c, meta)


def most_readers(size: int, out_size: int, mode: str) -> int:
    """Outputs of one axis that read the same input pixel, at most; with nearest, rounding may add one."""
    if mode == "nearest":
        return ceil_div(out_size, size)
    # Those less than a pixel away on either side, of which an odd factor has none exactly there.
    odd = out_size % size == 0 and out_size // size % 2 == 1
    return min(out_size, ceil_div(2 * out_size, size) - odd)


def _scales(size: tuple[int, ...], out_size: tuple[int, ...], mode: str) -> list[float]:
    """What the kernels multiply positions with, of height and width."""
    if mode == "nearest":
        # Rounded to float32 at the launch: the float32 quotient, as PyTorch has it.
        return [one / other for one, other in zip(size, out_size, strict=True)]
    return [1 / (2 * other) for other in out_size]


def _inner(x: Tensor) -> bool:
    return x.shape[1] > 1 and (x.shape[3] == 1 or x.stride(1) < x.stride(3))


def _strides(tensor: Tensor | None, dims: int) -> tuple[int, ...]:
    return (0,) * dims if tensor is None else tensor.stride()


def forward(call: Any, out: Tensor, base: Tensor | None = None) -> Tensor:
    """Launch the forward kernel of a call that :func:`can_run`; fills and returns ``out``.

    With ``base``, strided as ``out``, it is ``base + drop_path * (resampled + add)``: what is added is then
    part of the branch. For blocks that launch the kernel themselves.
    """
    x = call.x
    size, out_size = tuple(x.shape[2:]), tuple(out.shape[2:])
    made = plan(tuple(out.shape), _inner(out))
    with device_of(x):
        forward_kernel[made.grid](
            x,
            call.add,
            call.drop_path,
            base,
            out,
            out.shape[1],
            *size,
            *out_size,
            made.group,
            made.blocks_c,
            *_scales(size, out_size, call.mode),
            *x.stride(),
            *_strides(call.add, 4),
            *_strides(call.drop_path, 1),
            *out.stride(),
            MODE=call.mode,
            **made.meta,
        )
    return out


def backward(grad: Tensor, drop_path: Tensor | None, mode: str, x_grad: Tensor) -> Tensor:
    """Launch the backward kernel; fills and returns the map's gradient.

    Args:
        grad: (B, C, *size) with any strides.
        drop_path: factor per image, or None.
        mode: of the call.
        x_grad: (B, C, H, W), dense.
    """
    size, out_size = tuple(x_grad.shape[2:]), tuple(grad.shape[2:])
    made = plan(tuple(x_grad.shape), _inner(x_grad), most_readers(size[1], out_size[1], mode))
    with device_of(grad):
        backward_kernel[made.grid](
            grad,
            drop_path,
            x_grad,
            x_grad.shape[1],
            *size,
            *out_size,
            made.group,
            made.blocks_c,
            *_scales(size, out_size, mode),
            *(1 / (one if mode == "nearest" else 2 * one) for one in size),
            *grad.stride(),
            *_strides(drop_path, 1),
            *x_grad.stride(),
            MODE=mode,
            **made.meta,
        )
    return x_grad


def launch_count(call: Any, direction: str) -> int:
    """Launches with every gradient."""
    return 1
