"""Triton kernels for 3x3 stride 1 depthwise convolution on channels_last maps.

A program owns `rows` rows x BLOCK_W columns x BLOCK_C channels of the map and walks down its rows, holding
(BLOCK_W, BLOCK_C) tiles. A convolution keeps the partial sums of three rows, so that an input row is loaded
once per program (three times shifted by a column, from L1). Sums over the map are written per program and
merged in a fixed order by :mod:`fused_ops.core.statistics`: no atomics.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

from fused_ops.core.activations import activate, activation_gradient
from fused_ops.core.triton_support import ceil_div, jit, next_power_of_2, tl
from fused_ops.depthwise.triton_maps import (
    activation_grad_tile,
    address,
    inside,
    launch_options,
    load,
    program,
    store_moments,
    vector,
)


@jit
def _tap(weight_ptr, c, channels, TAP: tl.constexpr):
    return tl.load(weight_ptr + c * 9 + TAP, mask=c < channels, other=0.0).to(tl.float32)[None, :]


@jit
def _filter(weight_ptr, c, channels):
    """The nine taps (1, BLOCK_C) of each channel, row by row."""
    return (
        _tap(weight_ptr, c, channels, 0),
        _tap(weight_ptr, c, channels, 1),
        _tap(weight_ptr, c, channels, 2),
        _tap(weight_ptr, c, channels, 3),
        _tap(weight_ptr, c, channels, 4),
        _tap(weight_ptr, c, channels, 5),
        _tap(weight_ptr, c, channels, 6),
        _tap(weight_ptr, c, channels, 7),
        _tap(weight_ptr, c, channels, 8),
    )


@jit
def forward_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    mean_ptr,
    var_ptr,
    residual_ptr,
    out_ptr,
    raw_ptr,
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
    residual_n,
    residual_c,
    residual_h,
    residual_w,
    out_n,
    out_c,
    out_h,
    out_w,
    eps,
    NORM: tl.constexpr,
    ACTIVATION: tl.constexpr,
    RESIDUAL: tl.constexpr,
    IDENTITY: tl.constexpr,
    INPUT_ACTIVATION: tl.constexpr,
    ROUND: tl.constexpr,
    PACK: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """conv3x3(x), with everything else where the statistics are known.

    With ``moments_ptr`` writes the moments of the raw convolution, for a norm that follows; otherwise the
    result. Writes the raw convolution too where ``raw_ptr`` is given. ROUND: what the norm sees is rounded as
    if it had been stored, so that a norm by batch statistics gives the same bits whether it was or not.
    INPUT_ACTIVATION, without a norm: what is convolved and added as the identity is the activation of x.
    """
    image, row0, columns, c, part = program(batch, height, width, channels, rows, PACK, BLOCK_W, BLOCK_C)
    MOMENTS: tl.constexpr = moments_ptr is not None
    w00, w01, w02, w10, w11, w12, w20, w21, w22 = _filter(weight_ptr, c, channels)
    bias = vector(bias_ptr, c, channels, 0.0)[None, :]
    if NORM != "none" and not MOMENTS:
        mean = vector(mean_ptr, c, channels, 0.0)[None, :]
        scale = vector(norm_weight_ptr, c, channels, 1.0)
        scale = (scale * tl.rsqrt(vector(var_ptr, c, channels, 1.0) + eps))[None, :]
        shift = vector(norm_bias_ptr, c, channels, 0.0)[None, :]

    # Partial sums of the output rows that still wait for one and for two input rows.
    waits_one = tl.zeros((BLOCK_W, BLOCK_C), tl.float32)
    waits_two = tl.zeros((BLOCK_W, BLOCK_C), tl.float32)
    first = tl.zeros((BLOCK_W, BLOCK_C), tl.float32)
    s1 = tl.zeros((BLOCK_W, BLOCK_C), tl.float32)
    s2 = tl.zeros((BLOCK_W, BLOCK_C), tl.float32)
    previous = tl.zeros((BLOCK_W, BLOCK_C), tl.float32)
    for i in range(rows + 2):
        row = row0 - 1 + i
        left = load(x_ptr, image, row, columns - 1, c, x_n, x_c, x_h, x_w, height, width, channels)
        centre = load(x_ptr, image, row, columns, c, x_n, x_c, x_h, x_w, height, width, channels)
        right = load(x_ptr, image, row, columns + 1, c, x_n, x_c, x_h, x_w, height, width, channels)
        # Of 0 every activation is 0, so elements outside stay zero.
        if INPUT_ACTIVATION != "none":
            left = activate(left, INPUT_ACTIVATION)
            centre = activate(centre, INPUT_ACTIVATION)
            right = activate(right, INPUT_ACTIVATION)
        original = centre
        if NORM == "pre":
            # The padding is zero after the norm, so elements outside stay zero.
            left_ok = inside(row, columns - 1, c, height, width, channels)
            centre_ok = inside(row, columns, c, height, width, channels)
            right_ok = inside(row, columns + 1, c, height, width, channels)
            left = tl.where(left_ok, (left - mean) * scale + shift, 0.0)
            centre = tl.where(centre_ok, (centre - mean) * scale + shift, 0.0)
            right = tl.where(right_ok, (right - mean) * scale + shift, 0.0)
        value = waits_one + left * w20 + centre * w21 + right * w22
        waits_one = waits_two + left * w10 + centre * w11 + right * w12
        waits_two = left * w00 + centre * w01 + right * w02
        # The first two rows are halo: they complete no row of this program, and nothing is stored for them.
        out_row = tl.where(i >= 2, row - 1, -1)
        ok = inside(out_row, columns, c, height, width, channels)
        value += bias
        where = address(0, image, out_row, columns, c, out_n, out_c, out_h, out_w)
        if raw_ptr is not None:
            tl.store(raw_ptr + where, value.to(raw_ptr.dtype.element_ty), mask=ok)
        if ROUND:
            value = value.to(x_ptr.dtype.element_ty).to(tl.float32)
        if MOMENTS:
            first = tl.where(i <= 2, value, first)
            difference = tl.where(ok, value - first, 0.0)
            s1 += difference
            s2 += difference * difference
        else:
            if NORM == "post":
                value = (value - mean) * scale + shift
            if RESIDUAL != "none":
                if IDENTITY:
                    added = previous
                else:
                    added = load(
                        residual_ptr,
                        image,
                        out_row,
                        columns,
                        c,
                        residual_n,
                        residual_c,
                        residual_h,
                        residual_w,
                        height,
                        width,
                        channels,
                    )
            if RESIDUAL == "before":
                value += added
            value = activate(value, ACTIVATION)
            if RESIDUAL == "after":
                value += added
            tl.store(out_ptr + where, value.to(out_ptr.dtype.element_ty), mask=ok)
        previous = original
    if MOMENTS:
        rows_valid = tl.minimum(rows, height - row0).to(tl.float32)
        ok = inside(row0, columns, c, height, width, channels)
        parts = tl.num_programs(0) // tl.cdiv(channels, BLOCK_C)
        store_moments(moments_ptr, part, parts, rows_valid, ok, columns, width, first, s1, s2, c, channels)


@jit
def backward_kernel(
    grad_ptr,
    x_ptr,
    weight_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    mean_ptr,
    var_ptr,
    residual_ptr,
    raw_ptr,
    sums_ptr,
    x_grad_ptr,
    parts_ptr,
    residual_grad_ptr,
    batch,
    height,
    width,
    channels,
    rows,
    grad_n,
    grad_c,
    grad_h,
    grad_w,
    x_n,
    x_c,
    x_h,
    x_w,
    residual_n,
    residual_c,
    residual_h,
    residual_w,
    out_n,
    out_c,
    out_h,
    out_w,
    eps,
    inverse_count,
    NORM: tl.constexpr,
    BATCH_STATS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ADD_RESIDUAL: tl.constexpr,
    IDENTITY: tl.constexpr,
    INPUT_ACTIVATION: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    SUMS: tl.constexpr,
    PACK: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Gradients of x, weight, bias and residual in one pass; the gradient before the conv is never written.

    Sums over the map go to ``parts`` (P, columns, C) for
    :func:`fused_ops.core.statistics.finish_gradients`: nine taps if WEIGHT, the bias if BIAS, the norm's two
    sums if SUMS. Post-norm with batch statistics takes those two from :func:`post_norm_sums_kernel`. Pre-norm
    with batch statistics writes ``t = identity + gamma rstd e`` in place of x's gradient (e = conv transposed
    of the gradient), its sums are those of e and of e xhat, and :func:`pre_norm_finish_kernel` does the rest.
    IDENTITY is none, before or after: where the identity branch joins. Without a norm, INPUT_ACTIVATION is
    what x went through first, and the first of the two sums is that of x's gradient.
    """
    image, row0, columns, c, part = program(batch, height, width, channels, rows, PACK, BLOCK_W, BLOCK_C)
    channel_ok = c < channels
    mean = tl.zeros((1, BLOCK_C), tl.float32)
    rstd = tl.full((1, BLOCK_C), 1.0, tl.float32)
    gamma = tl.full((1, BLOCK_C), 1.0, tl.float32)
    beta = tl.zeros((1, BLOCK_C), tl.float32)
    if NORM != "none":
        mean = vector(mean_ptr, c, channels, 0.0)[None, :]
        rstd = tl.rsqrt(vector(var_ptr, c, channels, 1.0) + eps)[None, :]
        gamma = vector(norm_weight_ptr, c, channels, 1.0)[None, :]
        beta = vector(norm_bias_ptr, c, channels, 0.0)[None, :]
    if NORM == "post" and BATCH_STATS:
        mean_grad = vector(sums_ptr, c, channels, 0.0)[None, :] * inverse_count
        mean_grad_normalised = vector(sums_ptr + channels, c, channels, 0.0)[None, :] * inverse_count
    PRE_SUMS: tl.constexpr = NORM == "pre" and SUMS
    POST_SUMS: tl.constexpr = NORM == "post" and SUMS
    INPUT_SUM: tl.constexpr = NORM == "none" and SUMS
    NEED_X: tl.constexpr = PRE_SUMS or INPUT_SUM or x_grad_ptr is not None
    NEED_SLOPE: tl.constexpr = NEED_X and INPUT_ACTIVATION != "none"
    NEED_OWN: tl.constexpr = BIAS or residual_grad_ptr is not None
    if NEED_X:
        w00, w01, w02, w10, w11, w12, w20, w21, w22 = _filter(weight_ptr, c, channels)
    zero = tl.zeros((BLOCK_W, BLOCK_C), tl.float32)
    waits_one, waits_two = zero, zero
    g00, g01, g02, g10, g11, g12, g20, g21, g22 = zero, zero, zero, zero, zero, zero, zero, zero, zero
    bias_sum, s1, s2 = zero, zero, zero
    # Rows of the conv's input (z) and of the normalised x above and beside the current gradient row. Only
    # this program's own rows are ever loaded, so that each is counted once in the sums.
    z_above, z_beside = zero, zero
    x_above, x_beside = zero, zero
    identity_grad = zero
    for i in range(rows + 2):
        row = row0 - 1 + i
        # Conv gradient row `row`, shifted by each tap's column.
        shifted = columns + 1
        _, d0, n0 = activation_grad_tile(
            grad_ptr, raw_ptr, residual_ptr, image, row, shifted, c, height, width, channels,
            grad_n, grad_c, grad_h, grad_w, residual_n, residual_c, residual_h, residual_w,
            out_n, out_c, out_h, out_w, mean, rstd, gamma, beta, NORM, ACTIVATION, ADD_RESIDUAL,
        )  # fmt: skip
        grad, d1, n1 = activation_grad_tile(
            grad_ptr, raw_ptr, residual_ptr, image, row, columns, c, height, width, channels,
            grad_n, grad_c, grad_h, grad_w, residual_n, residual_c, residual_h, residual_w,
            out_n, out_c, out_h, out_w, mean, rstd, gamma, beta, NORM, ACTIVATION, ADD_RESIDUAL,
        )  # fmt: skip
        _, d2, n2 = activation_grad_tile(
            grad_ptr, raw_ptr, residual_ptr, image, row, columns - 1, c, height, width, channels,
            grad_n, grad_c, grad_h, grad_w, residual_n, residual_c, residual_h, residual_w,
            out_n, out_c, out_h, out_w, mean, rstd, gamma, beta, NORM, ACTIVATION, ADD_RESIDUAL,
        )  # fmt: skip
        value_grad = d1
        if NORM == "post":
            if BATCH_STATS:
                d0 = d0 - mean_grad - n0 * mean_grad_normalised
                d1 = d1 - mean_grad - n1 * mean_grad_normalised
                d2 = d2 - mean_grad - n2 * mean_grad_normalised
            d0 = tl.where(inside(row, columns + 1, c, height, width, channels), d0 * gamma * rstd, 0.0)
            d1 = tl.where(inside(row, columns, c, height, width, channels), d1 * gamma * rstd, 0.0)
            d2 = tl.where(inside(row, columns - 1, c, height, width, channels), d2 * gamma * rstd, 0.0)
        if NEED_OWN or POST_SUMS:
            # The first and the last row are halo, counted and stored by other programs.
            own_row = tl.where((i >= 1) & (i <= rows), row, -1)
            own = inside(own_row, columns, c, height, width, channels)
            if BIAS:
                bias_sum += tl.where(own, d1, 0.0)
            if POST_SUMS:
                s1 += tl.where(own, value_grad, 0.0)
                s2 += tl.where(own, value_grad * n1, 0.0)
            if residual_grad_ptr is not None:
                tl.store(
                    address(residual_grad_ptr, image, own_row, columns, c, out_n, out_c, out_h, out_w),
                    value_grad.to(residual_grad_ptr.dtype.element_ty),
                    mask=own,
                )
        if WEIGHT or PRE_SUMS or NEED_SLOPE:
            below_row = tl.where(i < rows, row + 1, -1)
            x_below = load(x_ptr, image, below_row, columns, c, x_n, x_c, x_h, x_w, height, width, channels)
            z_below = x_below
            if NORM == "pre":
                below_ok = inside(below_row, columns, c, height, width, channels)
                x_below = (x_below - mean) * rstd
                z_below = tl.where(below_ok, x_below * gamma + beta, 0.0)
            if WEIGHT and INPUT_ACTIVATION != "none":
                z_below = activate(x_below, INPUT_ACTIVATION)
        if WEIGHT:
            g00 += z_above * d0
            g01 += z_above * d1
            g02 += z_above * d2
            g10 += z_beside * d0
            g11 += z_beside * d1
            g12 += z_beside * d2
            g20 += z_below * d0
            g21 += z_below * d1
            g22 += z_below * d2
            z_above, z_beside = z_beside, z_below
        if NEED_X:
            value = waits_one + d0 * w00 + d1 * w01 + d2 * w02
            waits_one = waits_two + d0 * w10 + d1 * w11 + d2 * w12
            waits_two = d0 * w20 + d1 * w21 + d2 * w22
            out_row = tl.where(i >= 2, row - 1, -1)
            ok = inside(out_row, columns, c, height, width, channels)
            if PRE_SUMS:
                s1 += tl.where(ok, value, 0.0)
                s2 += tl.where(ok, value * x_above, 0.0)
            if INPUT_SUM or x_grad_ptr is not None:
                if NORM == "pre":
                    value = value * gamma * rstd
                if IDENTITY != "none":
                    value += identity_grad
                if NEED_SLOPE:
                    value *= activation_gradient(x_above, INPUT_ACTIVATION)
            if INPUT_SUM:
                s1 += tl.where(ok, value, 0.0)
            if x_grad_ptr is not None:
                tl.store(
                    address(x_grad_ptr, image, out_row, columns, c, out_n, out_c, out_h, out_w),
                    value.to(x_grad_ptr.dtype.element_ty),
                    mask=ok,
                )
        if PRE_SUMS or NEED_SLOPE:
            x_above, x_beside = x_beside, x_below
        if IDENTITY == "after":
            identity_grad = grad
        if IDENTITY == "before":
            identity_grad = value_grad
    if parts_ptr is not None:
        base = parts_ptr + part.to(tl.int64) * (9 * WEIGHT + BIAS + 2 * SUMS) * channels + c
    if WEIGHT:
        tl.store(base + 0 * channels, tl.sum(g00, axis=0), mask=channel_ok)
        tl.store(base + 1 * channels, tl.sum(g01, axis=0), mask=channel_ok)
        tl.store(base + 2 * channels, tl.sum(g02, axis=0), mask=channel_ok)
        tl.store(base + 3 * channels, tl.sum(g10, axis=0), mask=channel_ok)
        tl.store(base + 4 * channels, tl.sum(g11, axis=0), mask=channel_ok)
        tl.store(base + 5 * channels, tl.sum(g12, axis=0), mask=channel_ok)
        tl.store(base + 6 * channels, tl.sum(g20, axis=0), mask=channel_ok)
        tl.store(base + 7 * channels, tl.sum(g21, axis=0), mask=channel_ok)
        tl.store(base + 8 * channels, tl.sum(g22, axis=0), mask=channel_ok)
    if BIAS:
        tl.store(base + 9 * WEIGHT * channels, tl.sum(bias_sum, axis=0), mask=channel_ok)
    if SUMS:
        base += (9 * WEIGHT + BIAS) * channels
        tl.store(base, tl.sum(s1, axis=0), mask=channel_ok)
        tl.store(base + channels, tl.sum(s2, axis=0), mask=channel_ok)


class RowsPlan(NamedTuple):
    """Sizes, grid, number of map parts and compile-time options of the launches on maps of one shape.

    A part is what one program sees of the map; a grid has ``parts`` programs for every block of channels.
    """

    sizes: tuple[int, int, int, int, int]
    grid: tuple[int]
    parts: int
    meta: dict[str, Any]


Shape = tuple[int, int, int, int]
Tile = tuple[int, int, int]

# Programs that keep every multiprocessor of a large GPU busy.
_ENOUGH_PROGRAMS = 512
# A tile has four values for each of 128 threads.
_TILE = 512


@lru_cache(maxsize=4096)
def rows_tile(shape: Shape, sums: bool = False) -> Tile:
    """Columns, channels and rows of a program's tile for maps (B, C, H, W): a rule that was not measured.

    Up to 64 channels (whole 128-byte lines in half precision) and 8 columns; strips as long as leaves enough
    programs, because each one re-reads a halo of two rows and writes its own partial sums. Where ``sums``,
    those of every filter tap, would then weigh more than 9 % of three half-precision maps, fewer channels and
    more columns, of several images where one is too narrow: as many programs, but fewer parts.
    """
    batch, channels, height, width = shape
    columns = next_power_of_2(width)
    block_c = min(64, next_power_of_2(channels))
    while True:
        block_w = _TILE // block_c
        if block_c == 64 or block_w <= columns:
            block_w = min(block_w, columns, 16)
        across = _parts_across(shape, block_w)
        channel_blocks = ceil_div(channels, block_c)
        strips = ceil_div(height, 28)
        while across * channel_blocks * strips < _ENOUGH_PROGRAMS and ceil_div(height, strips) > 7:
            strips += 1
        rows = ceil_div(height, strips)
        parts = across * ceil_div(height, rows)
        # Twelve float32 sums, written and read, against three maps of two bytes.
        if not sums or block_c <= 16 or 12 * 8 * parts <= 0.09 * 6 * batch * height * width:
            return block_w, block_c, rows
        block_c //= 2


def _images(shape: Shape, block_w: int) -> int:
    """How many images a tile with BLOCK_W lanes holds side by side."""
    return max(1, min(block_w // next_power_of_2(shape[3]), next_power_of_2(shape[0])))


def _parts_across(shape: Shape, block_w: int) -> int:
    """Parts of a batch side by side in one strip."""
    pack = _images(shape, block_w)
    return ceil_div(shape[0], pack) * (ceil_div(shape[3], block_w) if pack == 1 else 1)


@lru_cache(maxsize=4096)
def rows_plan(shape: Shape, tile: Tile) -> RowsPlan:
    """Plan for channels_last maps (B, C, H, W) with a tile of so many columns, channels and rows."""
    batch, channels, height, width = shape
    block_w, block_c, rows = tile
    pack = _images(shape, block_w)
    # A tile chosen for more images or wider maps.
    block_w = min(block_w, pack * next_power_of_2(width))
    rows = min(rows, height)
    parts = _parts_across(shape, block_w) * ceil_div(height, rows)
    return RowsPlan(
        (batch, height, width, channels, rows),
        (parts * ceil_div(channels, block_c),),
        parts,
        {"PACK": pack, **launch_options(block_w, block_c)},
    )


def rows_tiles(sizes: tuple[int, ...]) -> list[Tile]:
    """Tiles worth measuring for maps of these sizes (C, H, W)."""
    channels, height, _ = sizes
    return [
        (block_w, block_c, rows)
        for block_c in (16, 32, 64, 128)
        for block_w in (2, 4, 8, 16, 32, 64)
        for rows in (7, 14, 28, 56)
        if block_c < 2 * channels and 256 <= block_w * block_c <= 1024 and rows < 2 * height
    ]
