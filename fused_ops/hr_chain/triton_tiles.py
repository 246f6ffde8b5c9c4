"""What the HR chain's Triton kernels share: tiles of a map, filters, the strided convolution.

A tile is TILE_H x TILE_W neighbouring pixels of the low-resolution map, as rows (M, BLOCK_C) of an (M =
TILE_H TILE_W) x channels matrix. Low-resolution pixel (i, j) stands for the full-resolution pixels (2i + a,
2j + b) with a, b in {0, 1}: tiles of the full map begin at even rows and columns, and the 4x4 pixels around
(2i, 2j) hold all that both 3x3 convolutions of those four pixels read.

Loops over rows of these run to ``filter_rows``, which is always 3, but not for the compiler: it would unroll
them, load all rows at once, and run out of registers.
"""

from __future__ import annotations

from fused_ops.core.triton_support import jit, tl


@jit
def tile_pixels(tile, low_height, low_width, TILE_H: tl.constexpr, TILE_W: tl.constexpr):
    """Image, rows (M) and columns (M) of one tile of the low-resolution maps."""
    across = tl.cdiv(low_width, TILE_W)
    down = tl.cdiv(low_height, TILE_H)
    m = tl.arange(0, TILE_H * TILE_W)
    image = tile // (across * down)
    i = tile // across % down * TILE_H + m // TILE_W
    j = tile % across * TILE_W + m % TILE_W
    return image, i, j


@jit
def inside(rows, columns, c, height, width, channels):
    """Mask (M, BLOCK_C) of what lies inside the map."""
    pixels = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    return pixels[:, None] & (c < channels)[None, :]


@jit
def pointers(ptr, image, rows, columns, c, stride_n, stride_c, stride_h, stride_w):
    """Pointers (M, BLOCK_C) to pixels of a map with any strides, by 64-bit offsets.

    Neighbouring pixels are then a scalar away, which costs a thread no registers.
    """
    pixels = image.to(tl.int64) * stride_n + rows.to(tl.int64) * stride_h + columns.to(tl.int64) * stride_w
    return ptr + pixels[:, None] + (c * stride_c)[None, :]


@jit
def load_row(start, i, j, row, c, height, width, channels, stride_h, stride_w):
    """Columns 2 j - 1 to 2 j + 2 of row 2 i + ``row``, four (M, BLOCK_C) in float32, zero outside the map.

    ``start`` points to (2 i, 2 j).
    """
    here = start + tl.cast(stride_h, tl.int64) * row
    ok = inside(2 * i + row, 2 * j - 1, c, height, width, channels)
    x0 = tl.load(here - stride_w, mask=ok, other=0.0).to(tl.float32)
    ok = inside(2 * i + row, 2 * j, c, height, width, channels)
    x1 = tl.load(here, mask=ok, other=0.0).to(tl.float32)
    ok = inside(2 * i + row, 2 * j + 1, c, height, width, channels)
    x2 = tl.load(here + stride_w, mask=ok, other=0.0).to(tl.float32)
    ok = inside(2 * i + row, 2 * j + 2, c, height, width, channels)
    x3 = tl.load(here + 2 * stride_w, mask=ok, other=0.0).to(tl.float32)
    return x0, x1, x2, x3


@jit
def dense(image, rows, columns, c, height, width, channels):
    """Offsets (M, BLOCK_C) of pixels of a map that is dense in channels_last order, in 64 bits."""
    pixels = (image.to(tl.int64) * height + rows.to(tl.int64)) * width + columns.to(tl.int64)
    return (pixels * channels)[:, None] + c[None, :]


@jit
def store_pair(ptr, left, right, i, j, row, c, height, width, channels):
    """Store two neighbouring pixels of a dense map at row 2 i + ``row``; ``ptr`` points to (2 i, 2 j)."""
    here = ptr + tl.cast(width, tl.int64) * channels * row
    ok = inside(2 * i + row, 2 * j, c, height, width, channels)
    tl.store(here, left.to(ptr.dtype.element_ty), mask=ok)
    ok = inside(2 * i + row, 2 * j + 1, c, height, width, channels)
    tl.store(here + channels, right.to(ptr.dtype.element_ty), mask=ok)


@jit
def taps(filter_ptr, row, c, channels):
    """One row of taps, three vectors (1, BLOCK_C), of a filter (3, 3, C); zero where there is no such row."""
    # A mask takes no scalars, so a row outside has no channels.
    ok = c < tl.where((row >= 0) & (row < 3), channels, 0)
    start = filter_ptr + row * 3 * channels + c
    w0 = tl.load(start, mask=ok, other=0.0).to(tl.float32)[None, :]
    w1 = tl.load(start + channels, mask=ok, other=0.0).to(tl.float32)[None, :]
    w2 = tl.load(start + 2 * channels, mask=ok, other=0.0).to(tl.float32)[None, :]
    return w0, w1, w2


@jit
def strided_convolution(
    start, filter_ptr, filter_rows, i, j, c, height, width, channels, x_h, x_w,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The 3x3 stride 2 convolution at one tile (M, BLOCK_C), rounded as if it had been stored."""
    total = tl.zeros((TILE_H * TILE_W, BLOCK_C), tl.float32)
    for r in range(filter_rows):
        x0, x1, x2, _ = load_row(start, i, j, r - 1, c, height, width, channels, x_h, x_w)
        w0, w1, w2 = taps(filter_ptr, r, c, channels)
        total += x0 * w0 + x1 * w1 + x2 * w2
    return total.to(start.dtype.element_ty).to(tl.float32)


@jit
def repeated_gradient(grad_ptr, image, i, j, c, height, width, channels, grad_n, grad_c, grad_h, grad_w):
    """Sum (M, BLOCK_C) of the gradient over the 2x2 pixels that a low-resolution value was repeated to.

    One load of all four and a reduction: the compiler turns each of four loads into the layout of the product
    that follows, which holds it once per warp.
    """
    q = tl.arange(0, 4)
    rows = (2 * i)[:, None] + (q // 2)[None, :]
    columns = (2 * j)[:, None] + (q % 2)[None, :]
    pixels = image.to(tl.int64) * grad_n + rows.to(tl.int64) * grad_h + columns.to(tl.int64) * grad_w
    ok = ((rows < height) & (columns < width))[:, :, None] & (c < channels)[None, None, :]
    where = grad_ptr + pixels[:, :, None] + (c * grad_c)[None, None, :]
    return tl.sum(tl.load(where, mask=ok, other=0.0).to(tl.float32), axis=1)
