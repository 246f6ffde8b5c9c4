"""Forward Triton kernels of the HR chain: the strided branch's statistics, and everything in one pass."""

from __future__ import annotations

from fused_ops.core.activations import activate
from fused_ops.core.triton_matrices import dot, vector, weight_chunk
from fused_ops.core.triton_moments import add_to_moments, store_moments
from fused_ops.core.triton_support import jit, tl
from fused_ops.hr_chain.triton_tiles import (
    dense,
    inside,
    load_row,
    pointers,
    store_pair,
    strided_convolution,
    taps,
    tile_pixels,
)


@jit
def statistics_kernel(
    x_ptr,
    low_filter_ptr,
    low_ptr,
    moments_ptr,
    height,
    width,
    channels,
    low_height,
    low_width,
    filter_rows,
    tiles,
    tiles_each,
    x_n,
    x_c,
    x_h,
    x_w,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The strided convolution's moments, a part per program; stores its output where ``low_ptr`` is given.

    ``moments_ptr`` is laid out as :func:`fused_ops.core.statistics.merge_moments` reads it.
    """
    blocks = tl.cdiv(channels, BLOCK_C)
    part = tl.program_id(0) // blocks
    parts = tl.num_programs(0) // blocks
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    count = tl.zeros((TILE_H * TILE_W,), tl.float32)
    mean = tl.zeros((TILE_H * TILE_W, BLOCK_C), tl.float32)
    m2 = tl.zeros((TILE_H * TILE_W, BLOCK_C), tl.float32)
    first = part * tiles_each
    for tile in range(first, tl.minimum(first + tiles_each, tiles)):
        image, i, j = tile_pixels(tile, low_height, low_width, TILE_H, TILE_W)
        start = pointers(x_ptr, image, 2 * i, 2 * j, c, x_n, x_c, x_h, x_w)
        value = strided_convolution(
            start,
            low_filter_ptr,
            filter_rows,
            i,
            j,
            c,
            height,
            width,
            channels,
            x_h,
            x_w,
            TILE_H,
            TILE_W,
            BLOCK_C,
        )
        ok = inside(i, j, c, low_height, low_width, channels)
        if low_ptr is not None:
            where = low_ptr + dense(image, i, j, c, low_height, low_width, channels)
            tl.store(where, value.to(low_ptr.dtype.element_ty), mask=ok)
        row_ok = (i < low_height) & (j < low_width)
        count, mean, m2 = add_to_moments(count, mean, m2, value, row_ok, ok)
    store_moments(moments_ptr, count, mean, m2, part, parts, c, channels)


@jit
def forward_kernel(
    x_ptr,
    high_filter_ptr,
    high_bias_ptr,
    low_filter_ptr,
    fc1_weight_ptr,
    fc1_bias_ptr,
    fc2_weight_ptr,
    fc2_bias_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    mean_ptr,
    var_ptr,
    drop_path_ptr,
    out_ptr,
    low_ptr,
    height,
    width,
    channels,
    low_height,
    low_width,
    filter_rows,
    hidden,
    x_n,
    x_c,
    x_h,
    x_w,
    eps,
    ACTIVATION: tl.constexpr,
    IDENTITY: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    """One tile of the result, all channels; stores the strided convolution where ``low_ptr`` is given."""
    M: tl.constexpr = TILE_H * TILE_W
    image, i, j = tile_pixels(tl.program_id(0), low_height, low_width, TILE_H, TILE_W)
    c = tl.arange(0, BLOCK_C)
    start = pointers(x_ptr, image, 2 * i, 2 * j, c, x_n, x_c, x_h, x_w)
    low = strided_convolution(
        start,
        low_filter_ptr,
        filter_rows,
        i,
        j,
        c,
        height,
        width,
        channels,
        x_h,
        x_w,
        TILE_H,
        TILE_W,
        BLOCK_C,
    )
    if low_ptr is not None:
        where = low_ptr + dense(image, i, j, c, low_height, low_width, channels)
        ok = inside(i, j, c, low_height, low_width, channels)
        tl.store(where, low.to(low_ptr.dtype.element_ty), mask=ok)
    scale = vector(norm_weight_ptr, c, channels, 1.0) * tl.rsqrt(vector(var_ptr, c, channels, 1.0) + eps)
    z = (low - vector(mean_ptr, c, channels, 0.0)) * scale + vector(norm_bias_ptr, c, channels, 0.0)
    z = tl.where((c < channels)[None, :], z, 0.0).to(x_ptr.dtype.element_ty)

    grown = tl.zeros((M, BLOCK_C), tl.float32)
    for chunk in range(0, hidden, BLOCK_HIDDEN):
        h = chunk + tl.arange(0, BLOCK_HIDDEN)
        fc1 = weight_chunk(fc1_weight_ptr, h, c, hidden, channels)
        value = dot(z, tl.trans(fc1), tl.zeros((M, BLOCK_HIDDEN), tl.float32))
        value = activate(value + vector(fc1_bias_ptr, h, hidden, 0.0), ACTIVATION)
        fc2 = weight_chunk(fc2_weight_ptr, c, h, channels, hidden)
        grown = dot(value.to(x_ptr.dtype.element_ty), tl.trans(fc2), grown)
    grown += vector(fc2_bias_ptr, c, channels, 0.0) + vector(high_bias_ptr, c, channels, 0.0)

    out_start = out_ptr + dense(image, 2 * i, 2 * j, c, height, width, channels)
    if drop_path_ptr is not None:
        factor = tl.load(drop_path_ptr + image).to(tl.float32)
    # The two rows of the full map in turn: half the accumulators of all four pixels at once.
    for a in tl.static_range(2):
        left = grown
        right = grown
        for r in range(filter_rows):
            x0, x1, x2, x3 = load_row(start, i, j, a + r - 1, c, height, width, channels, x_h, x_w)
            w0, w1, w2 = taps(high_filter_ptr, r, c, channels)
            left += x0 * w0 + x1 * w1 + x2 * w2
            right += x1 * w0 + x2 * w1 + x3 * w2
        if drop_path_ptr is not None:
            left *= factor
            right *= factor
        if IDENTITY:
            _, x1, x2, _ = load_row(start, i, j, a, c, height, width, channels, x_h, x_w)
            left += x1
            right += x2
        store_pair(out_start, left, right, i, j, a, c, height, width, channels)
