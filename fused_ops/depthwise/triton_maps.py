"""What the depthwise Triton kernels share: tiles of a map, and the kernels that do not convolve.

Maps are (B, C, H, W) with any strides, given as four numbers in that order. A tile is
(BLOCK_W, BLOCK_C): neighbouring columns of one row and neighbouring channels; Triton compiles a stride of 1
in, so that the same kernel is contiguous over channels on channels_last maps and over columns on NCHW maps.
Each kernel here walks down `rows` rows of its map. On narrow maps a tile holds the same row of several images
side by side (PACK), so that it is wide and yet few tiles write partial sums.
"""

from __future__ import annotations

from typing import Any

from fused_ops.core.activations import activate, activation_gradient
from fused_ops.core.triton_support import jit, tl


@jit
def packed(index, batch, BLOCK_W: tl.constexpr, PACK: tl.constexpr):
    """Images (BLOCK_W, 1) and columns (BLOCK_W) of a tile that lays PACK narrow images side by side.

    ``index`` counts the groups of PACK images. Columns of images beyond the batch lie far outside the map.
    """
    lanes = tl.arange(0, BLOCK_W)
    images = index * PACK + lanes // (BLOCK_W // PACK)
    columns = tl.where(images < batch, lanes % (BLOCK_W // PACK), -(2**20))
    return images[:, None], columns


@jit
def program(batch, height, width, channels, rows, PACK: tl.constexpr, BLOCK_W: tl.constexpr,
            BLOCK_C: tl.constexpr):  # fmt: skip
    """Image, first row, columns (BLOCK_W), channels (BLOCK_C) and map part of this program.

    Channel blocks vary fastest: neighbours in memory run side by side. With PACK above 1 the tile holds that
    many images, see :func:`packed`.
    """
    channel_blocks = tl.cdiv(channels, BLOCK_C)
    strips = tl.cdiv(height, rows)
    pid = tl.program_id(0)
    part = pid // channel_blocks
    c = (pid % channel_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    if PACK == 1:
        column_blocks = tl.cdiv(width, BLOCK_W)
        columns = (part % column_blocks) * BLOCK_W + tl.arange(0, BLOCK_W)
        row = (part // column_blocks) % strips * rows
        image = part // (column_blocks * strips)
    else:
        row = part % strips * rows
        image, columns = packed(part // strips, batch, BLOCK_W, PACK)
    return image, row, columns, c, part


@jit
def inside(row, columns, c, height, width, channels):
    """Mask (BLOCK_W, BLOCK_C) of the elements of one row that lie inside the map."""
    rows = row + tl.zeros_like(columns)
    return ((rows >= 0) & (rows < height) & (columns >= 0) & (columns < width))[:, None] & (c < channels)[
        None, :
    ]


@jit
def address(base, image, row, columns, c, stride_n, stride_c, stride_h, stride_w):
    """Pointers (BLOCK_W, BLOCK_C) to one row of an image; 64-bit offsets for image, channel and row."""
    start = base + image.to(tl.int64) * stride_n + row.to(tl.int64) * stride_h
    return start + columns[:, None] * stride_w + c.to(tl.int64)[None, :] * stride_c


@jit
def load(base, image, row, columns, c, stride_n, stride_c, stride_h, stride_w, height, width, channels):
    """One row (BLOCK_W, BLOCK_C) in float32, zero outside the map."""
    ok = inside(row, columns, c, height, width, channels)
    where = address(base, image, row, columns, c, stride_n, stride_c, stride_h, stride_w)
    return tl.load(where, mask=ok, other=0.0).to(tl.float32)


@jit
def vector(base, c, channels, default):
    """Per-channel vector (BLOCK_C) in float32; ``default`` where there is none."""
    if base is not None:
        return tl.load(base + c, mask=c < channels, other=0.0).to(tl.float32)
    else:
        return tl.full(c.shape, default, tl.float32)


@jit
def store_moments(moments_ptr, part, parts, rows_valid, ok, columns, width, first, s1, s2, c, channels):
    """Mean, M2 and count of a program's elements, from per-element sums over rows shifted by ``first``.

    They go where :func:`fused_ops.core.statistics.merge_moments` reads them: mean and M2 of each part as
    (P, 2, C), followed by P counts.
    """
    column_count = tl.sum(tl.where((columns >= 0) & (columns < width), 1.0, 0.0), axis=0)
    # Relative to one element per channel, so that a mean far above the spread costs no digits of M2. A tile's
    # first column always lies inside the map.
    is_shift = (tl.arange(0, columns.shape[0]) == 0)[:, None]
    shift = tl.sum(tl.where(is_shift, first, 0.0), axis=0)
    mean = (first - shift[None, :]) + s1 / rows_valid
    m2 = s2 - s1 * s1 / rows_valid
    tile_mean = tl.sum(tl.where(ok, mean, 0.0), axis=0) / column_count
    deviation = mean - tile_mean[None, :]
    part_m2 = tl.sum(tl.where(ok, m2 + rows_valid * deviation * deviation, 0.0), axis=0)
    part_mean = shift + tile_mean
    channel_ok = c < channels
    base = moments_ptr + part.to(tl.int64) * 2 * channels + c
    tl.store(base, part_mean, mask=channel_ok)
    tl.store(base + channels, part_m2, mask=channel_ok)
    # Every channel block of this part writes the same number.
    tl.store(moments_ptr + parts.to(tl.int64) * 2 * channels + part, column_count * rows_valid)


@jit
def moments_kernel(
    x_ptr,
    moments_ptr,
    batch,
    height,
    width,
    channels,
    rows,
    x_n,
    x_c,
    x_h,
    x_w,
    PACK: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """x (B, C, H, W) -> mean, M2 and count of each program's part, see :func:`store_moments`."""
    image, row0, columns, c, part = program(batch, height, width, channels, rows, PACK, BLOCK_W, BLOCK_C)
    s1 = tl.zeros((BLOCK_W, BLOCK_C), tl.float32)
    s2 = tl.zeros((BLOCK_W, BLOCK_C), tl.float32)
    first = load(x_ptr, image, row0, columns, c, x_n, x_c, x_h, x_w, height, width, channels)
    for i in range(1, rows):
        value = load(x_ptr, image, row0 + i, columns, c, x_n, x_c, x_h, x_w, height, width, channels)
        ok = inside(row0 + i, columns, c, height, width, channels)
        difference = tl.where(ok, value - first, 0.0)
        s1 += difference
        s2 += difference * difference
    rows_valid = tl.minimum(rows, height - row0).to(tl.float32)
    ok = inside(row0, columns, c, height, width, channels)
    parts = tl.num_programs(0) // tl.cdiv(channels, BLOCK_C)
    store_moments(moments_ptr, part, parts, rows_valid, ok, columns, width, first, s1, s2, c, channels)


@jit
def normalise_kernel(
    raw_ptr,
    residual_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    mean_ptr,
    var_ptr,
    out_ptr,
    batch,
    height,
    width,
    channels,
    rows,
    residual_n,
    residual_c,
    residual_h,
    residual_w,
    out_n,
    out_c,
    out_h,
    out_w,
    eps,
    ACTIVATION: tl.constexpr,
    RESIDUAL: tl.constexpr,
    PACK: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """raw (B, C, H, W) -> act(BN(raw)) with the residual, row by row; raw has the strides of out."""
    image, row0, columns, c, _ = program(batch, height, width, channels, rows, PACK, BLOCK_W, BLOCK_C)
    mean = vector(mean_ptr, c, channels, 0.0)[None, :]
    scale = vector(norm_weight_ptr, c, channels, 1.0)
    scale = (scale * tl.rsqrt(vector(var_ptr, c, channels, 1.0) + eps))[None, :]
    shift = vector(norm_bias_ptr, c, channels, 0.0)[None, :]
    for i in range(rows):
        row = row0 + i
        value = load(
            raw_ptr, image, row, columns, c, out_n, out_c, out_h, out_w, height, width, channels
        )  # fmt: skip
        value = (value - mean) * scale + shift
        if RESIDUAL != "none":
            added = load(
                residual_ptr, image, row, columns, c, residual_n, residual_c, residual_h, residual_w,
                height, width, channels,
            )  # fmt: skip
        if RESIDUAL == "before":
            value += added
        value = activate(value, ACTIVATION)
        if RESIDUAL == "after":
            value += added
        tl.store(
            address(out_ptr, image, row, columns, c, out_n, out_c, out_h, out_w),
            value.to(out_ptr.dtype.element_ty),
            mask=inside(row, columns, c, height, width, channels),
        )


@jit
def activation_grad_tile(
    grad_ptr,
    raw_ptr,
    residual_ptr,
    image,
    row,
    columns,
    c,
    height,
    width,
    channels,
    grad_n,
    grad_c,
    grad_h,
    grad_w,
    residual_n,
    residual_c,
    residual_h,
    residual_w,
    out_n,
    out_c,
    out_h,
    out_w,
    mean,
    rstd,
    gamma,
    beta,
    NORM: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ADD_RESIDUAL: tl.constexpr,
):
    """grad, gradient before the activation, and normalised raw value of one row (BLOCK_W, BLOCK_C)."""
    grad = load(
        grad_ptr, image, row, columns, c, grad_n, grad_c, grad_h, grad_w, height, width, channels
    )  # fmt: skip
    value_grad = grad
    normalised = tl.zeros_like(grad)
    if raw_ptr is not None:
        raw = load(
            raw_ptr, image, row, columns, c, out_n, out_c, out_h, out_w, height, width, channels
        )  # fmt: skip
        value = raw
        if NORM == "post":
            normalised = (raw - mean) * rstd
            value = normalised * gamma + beta
        if ADD_RESIDUAL:
            value += load(
                residual_ptr, image, row, columns, c, residual_n, residual_c, residual_h, residual_w,
                height, width, channels,
            )  # fmt: skip
        value_grad = grad * activation_gradient(value, ACTIVATION)
    return grad, value_grad, normalised


@jit
def post_norm_sums_kernel(
    grad_ptr,
    raw_ptr,
    residual_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    mean_ptr,
    var_ptr,
    parts_ptr,
    batch,
    height,
    width,
    channels,
    rows,
    grad_n,
    grad_c,
    grad_h,
    grad_w,
    residual_n,
    residual_c,
    residual_h,
    residual_w,
    out_n,
    out_c,
    out_h,
    out_w,
    eps,
    ACTIVATION: tl.constexpr,
    ADD_RESIDUAL: tl.constexpr,
    PACK: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The two sums of BatchNorm's backward, per program: parts (P, 2, C) of sum g' and sum g' xhat."""
    image, row0, columns, c, part = program(batch, height, width, channels, rows, PACK, BLOCK_W, BLOCK_C)
    mean = vector(mean_ptr, c, channels, 0.0)[None, :]
    rstd = tl.rsqrt(vector(var_ptr, c, channels, 1.0) + eps)[None, :]
    gamma = vector(norm_weight_ptr, c, channels, 1.0)[None, :]
    beta = vector(norm_bias_ptr, c, channels, 0.0)[None, :]
    s1 = tl.zeros((BLOCK_W, BLOCK_C), tl.float32)
    s2 = tl.zeros((BLOCK_W, BLOCK_C), tl.float32)
    for i in range(rows):
        row = row0 + i
        _, value_grad, normalised = activation_grad_tile(
            grad_ptr, raw_ptr, residual_ptr, image, row, columns, c, height, width, channels,
            grad_n, grad_c, grad_h, grad_w, residual_n, residual_c, residual_h, residual_w,
            out_n, out_c, out_h, out_w, mean, rstd, gamma, beta, "post", ACTIVATION, ADD_RESIDUAL,
        )  # fmt: skip
        ok = inside(row, columns, c, height, width, channels)
        s1 += tl.where(ok, value_grad, 0.0)
        s2 += tl.where(ok, value_grad * normalised, 0.0)
    channel_ok = c < channels
    base = parts_ptr + part.to(tl.int64) * 2 * channels + c
    tl.store(base, tl.sum(s1, axis=0), mask=channel_ok)
    tl.store(base + channels, tl.sum(s2, axis=0), mask=channel_ok)


@jit
def pre_norm_finish_kernel(
    x_grad_ptr,
    x_ptr,
    norm_weight_ptr,
    mean_ptr,
    var_ptr,
    sums_ptr,
    batch,
    height,
    width,
    channels,
    rows,
    x_n,
    x_c,
    x_h,
    x_w,
    out_n,
    out_c,
    out_h,
    out_w,
    eps,
    inverse_count,
    PACK: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """t (B, C, H, W) -> x's gradient t - gamma rstd (m1 + xhat m2) in place; m: means of the two sums."""
    image, row0, columns, c, _ = program(batch, height, width, channels, rows, PACK, BLOCK_W, BLOCK_C)
    mean = vector(mean_ptr, c, channels, 0.0)[None, :]
    rstd = tl.rsqrt(vector(var_ptr, c, channels, 1.0) + eps)[None, :]
    scale = vector(norm_weight_ptr, c, channels, 1.0)[None, :] * rstd * inverse_count
    s1 = vector(sums_ptr, c, channels, 0.0)[None, :]
    s2 = vector(sums_ptr + channels, c, channels, 0.0)[None, :]
    for i in range(rows):
        row = row0 + i
        ok = inside(row, columns, c, height, width, channels)
        where = address(x_grad_ptr, image, row, columns, c, out_n, out_c, out_h, out_w)
        partial = tl.load(where, mask=ok, other=0.0).to(tl.float32)
        x = load(x_ptr, image, row, columns, c, x_n, x_c, x_h, x_w, height, width, channels)
        value = partial - scale * (s1 + (x - mean) * rstd * s2)
        tl.store(where, value.to(x_grad_ptr.dtype.element_ty), mask=ok)


def launch_options(block_w: int, block_c: int) -> dict[str, Any]:
    """Tile and compiler options of a launch."""
    return {
        "BLOCK_W": block_w,
        "BLOCK_C": block_c,
        "num_warps": 4,
        "num_stages": 1,
        # Contraction of multiply and add is wanted: it is what every convolution library does.
        "enable_fp_fusion": True,
    }
