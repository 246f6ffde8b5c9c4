"""Triton kernels for depthwise convolution of any odd kernel, stride, padding, dilation and layout.

A program walks down the rows of its map with (BLOCK_W, BLOCK_C) tiles and keeps a ring of partial sums, one
for each row that still waits for others: an input row is loaded once per program and filter column (shifted
copies come from L1) and goes into every row that it touches. So a 7x7 filter loads 7 values per output and
not 49. Rings are tuples of tiles, unrolled by the compiler.

Where stride and dilation of the rows are both above 1, rows share nothing that a ring could keep, and every
row loads all its taps. With a dilation (and stride 1) a program walks every DH-th row: a *class* of rows.
"""

# Triton's compiler knows tuples that are added, not unpacked.
# ruff: noqa: RUF005

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

from fused_ops.core.activations import activate
from fused_ops.core.triton_support import ceil_div, jit, next_power_of_2, tl
from fused_ops.depthwise.triton_maps import (
    activation_grad_tile,
    address,
    inside,
    launch_options,
    load,
    packed,
    store_moments,
    vector,
)


@jit
def _cell(index, batch, width, strips, classes, PACK: tl.constexpr, BLOCK_W: tl.constexpr):
    """Image, class of rows, strip of rows and columns (BLOCK_W) of one cell of a map.

    With PACK above 1 a cell has that many images, see :func:`fused_ops.depthwise.triton_maps.packed`.
    """
    if PACK == 1:
        column_blocks = tl.cdiv(width, BLOCK_W)
        columns = (index % column_blocks) * BLOCK_W + tl.arange(0, BLOCK_W)
        # On NCHW maps some loads are aligned and shifted ones are not. With one access width for all of them
        # no tile has to change its distribution over the threads, which would go through shared memory.
        columns = tl.multiple_of(columns, 1)
        index = index // column_blocks
    strip = index % strips
    index = index // strips
    image = index // classes
    if PACK > 1:
        image, columns = packed(image, batch, BLOCK_W, PACK)
    return image, index % classes, strip, columns


@jit
def _load_filter(weight_ptr, c, channels, weight_c, weight_t, TAPS: tl.constexpr, HOIST: tl.constexpr):
    """The taps (1, BLOCK_C) of each channel, to be kept in registers; without HOIST, nothing of use."""
    taps = (weight_ptr,)
    if HOIST:
        taps = ()
        for t in tl.static_range(TAPS):
            value = tl.load(weight_ptr + c * weight_c + t * weight_t, mask=c < channels, other=0.0)
            taps = taps + (value.to(tl.float32)[None, :],)
    return taps


@jit
def _loaded_tap(weight_ptr, c, channels, weight_c, weight_t, row, column, KW: tl.constexpr):
    """One tap (1, BLOCK_C) of each channel; zero beyond the filter's last column."""
    column_ok = column + tl.zeros_like(c) < KW
    where = weight_ptr + c * weight_c + (row * KW + column) * weight_t
    return tl.load(where, mask=(c < channels) & column_ok, other=0.0).to(tl.float32)[None, :]


@jit
def _zeros(COUNT: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr):
    """COUNT tiles (BLOCK_W, BLOCK_C) of zeros."""
    tiles = ()
    for _ in tl.static_range(COUNT):
        tiles = tiles + (tl.zeros((BLOCK_W, BLOCK_C), tl.float32),)
    return tiles


@jit
def _convolved_row(
    x_ptr,
    image,
    row,
    columns,
    c,
    x_n,
    x_c,
    x_h,
    x_w,
    height,
    width,
    channels,
    mean,
    scale,
    shift,
    NORM: tl.constexpr,
):
    """What the convolution sees of one row (BLOCK_W, BLOCK_C): x, or pre-norm's BN(x)."""
    value = load(x_ptr, image, row, columns, c, x_n, x_c, x_h, x_w, height, width, channels)
    if NORM == "pre":
        # The padding is zero after the norm, so elements outside stay zero.
        ok = inside(row, columns, c, height, width, channels)
        value = tl.where(ok, (value - mean) * scale + shift, 0.0)
    return value


@jit
def general_forward_kernel(
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
    height,
    width,
    channels,
    out_height,
    out_width,
    rows,
    strips,
    classes,
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
    weight_c,
    weight_t,
    pad_h,
    pad_w,
    filter_columns,
    eps,
    NORM: tl.constexpr,
    ACTIVATION: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ROUND: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    STEP: tl.constexpr,
    SHIFT: tl.constexpr,
    NEW: tl.constexpr,
    RING: tl.constexpr,
    HOIST: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """conv(x), with everything else where the statistics are known; see the 3x3 kernel for the options.

    A program completes `rows` output rows, STEP apart; each step goes SHIFT filter rows further down, loads
    the NEW of them that are new, and adds them to RING output rows.
    """
    MOMENTS: tl.constexpr = moments_ptr is not None
    channel_blocks = tl.cdiv(channels, BLOCK_C)
    part = tl.program_id(0) // channel_blocks
    c = (tl.program_id(0) % channel_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    image, row_class, strip, columns = _cell(part, 0, out_width, strips, classes, 1, BLOCK_W)
    first_row = row_class + strip * rows * STEP
    taps = _load_filter(weight_ptr, c, channels, weight_c, weight_t, KH * KW, HOIST)
    bias = vector(bias_ptr, c, channels, 0.0)[None, :]
    mean = vector(mean_ptr, c, channels, 0.0)[None, :]
    scale = vector(norm_weight_ptr, c, channels, 1.0)[None, :]
    if var_ptr is not None:
        scale = scale * tl.rsqrt(vector(var_ptr, c, channels, 1.0) + eps)[None, :]
    shift = vector(norm_bias_ptr, c, channels, 0.0)[None, :]
    ring = _zeros(RING, BLOCK_W, BLOCK_C)
    first = tl.zeros((BLOCK_W, BLOCK_C), tl.float32)
    s1 = tl.zeros((BLOCK_W, BLOCK_C), tl.float32)
    s2 = tl.zeros((BLOCK_W, BLOCK_C), tl.float32)
    for i in range(rows + RING - 1):
        # The first RING - 1 steps complete no row of this program: they add what lies above its rows.
        row = first_row + (i - (RING - 1)) * STEP
        for u in tl.static_range(NEW):
            in_row = row * SH - pad_h + (KH - NEW + u) * DH
            if HOIST:
                for j in tl.static_range(KW):
                    value = _convolved_row(
                        x_ptr, image, in_row, columns * SW - pad_w + j * DW, c, x_n, x_c, x_h, x_w,
                        height, width, channels, mean, scale, shift, NORM,
                    )  # fmt: skip
                    added = ()
                    for q in tl.static_range(RING):
                        tile = ring[q]
                        if KH - NEW + u >= q * SHIFT:
                            tile = tile + value * taps[(KH - NEW + u - q * SHIFT) * KW + j]
                        added = added + (tile,)
                    ring = added
            else:
                # Not unrolled, so that only the taps of one filter column are in registers at a time.
                for j in range(filter_columns):
                    value = _convolved_row(
                        x_ptr, image, in_row, columns * SW - pad_w + j * DW, c, x_n, x_c, x_h, x_w,
                        height, width, channels, mean, scale, shift, NORM,
                    )  # fmt: skip
                    added = ()
                    for q in tl.static_range(RING):
                        tile = ring[q]
                        if KH - NEW + u >= q * SHIFT:
                            tile = tile + value * _loaded_tap(
                                weight_ptr, c, channels, weight_c, weight_t, KH - NEW + u - q * SHIFT, j, KW
                            )  # fmt: skip
                        added = added + (tile,)
                    ring = added
        value = ring[0] + bias
        ring = ring[1:] + _zeros(1, BLOCK_W, BLOCK_C)
        out_row = tl.where(i >= RING - 1, row, -1)
        ok = inside(out_row, columns, c, out_height, out_width, channels)
        where = address(0, image, out_row, columns, c, out_n, out_c, out_h, out_w)
        if raw_ptr is not None:
            tl.store(raw_ptr + where, value.to(raw_ptr.dtype.element_ty), mask=ok)
        if ROUND:
            value = value.to(x_ptr.dtype.element_ty).to(tl.float32)
        if MOMENTS:
            first = tl.where(i <= RING - 1, value, first)
            difference = tl.where(ok, value - first, 0.0)
            s1 += difference
            s2 += difference * difference
        else:
            if NORM == "post":
                value = (value - mean) * scale + shift
            if RESIDUAL != "none":
                residual = load(
                    residual_ptr, image, out_row, columns, c, residual_n, residual_c, residual_h, residual_w,
                    out_height, out_width, channels,
                )  # fmt: skip
            if RESIDUAL == "before":
                value += residual
            value = activate(value, ACTIVATION)
            if RESIDUAL == "after":
                value += residual
            tl.store(out_ptr + where, value.to(out_ptr.dtype.element_ty), mask=ok)
    if MOMENTS:
        rows_valid = tl.minimum(rows, tl.cdiv(out_height - first_row, STEP)).to(tl.float32)
        ok = inside(first_row, columns, c, out_height, out_width, channels)
        parts = tl.num_programs(0) // channel_blocks
        store_moments(
            moments_ptr, part, parts, rows_valid, ok, columns, out_width, first, s1, s2, c, channels
        )  # fmt: skip


@jit
def _conv_gradient(
    grad_ptr,
    raw_ptr,
    residual_ptr,
    image,
    row,
    columns,
    c,
    out_height,
    out_width,
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
    mean_grad,
    mean_grad_normalised,
    NORM: tl.constexpr,
    BATCH_STATS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ADD_RESIDUAL: tl.constexpr,
):
    """Gradient of the convolution's output in one row (BLOCK_W, BLOCK_C), zero outside the map.

    With it the gradient before the activation and the normalised raw value.
    """
    _, value_grad, normalised = activation_grad_tile(
        grad_ptr, raw_ptr, residual_ptr, image, row, columns, c, out_height, out_width, channels,
        grad_n, grad_c, grad_h, grad_w, residual_n, residual_c, residual_h, residual_w,
        out_n, out_c, out_h, out_w, mean, rstd, gamma, beta, NORM, ACTIVATION, ADD_RESIDUAL,
    )  # fmt: skip
    gradient = value_grad
    if NORM == "post":
        if BATCH_STATS:
            gradient = gradient - mean_grad - normalised * mean_grad_normalised
        ok = inside(row, columns, c, out_height, out_width, channels)
        gradient = tl.where(ok, gradient * gamma * rstd, 0.0)
    return gradient, value_grad, normalised


@jit
def _source_gradient(
    q,
    lanes,
    pad_w,
    grad_ptr,
    raw_ptr,
    residual_ptr,
    image,
    row,
    c,
    out_height,
    out_width,
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
    mean_grad,
    mean_grad_normalised,
    NORM: tl.constexpr,
    BATCH_STATS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ADD_RESIDUAL: tl.constexpr,
    SW: tl.constexpr,
    DW: tl.constexpr,
    X_COLUMNS: tl.constexpr,
):
    """Gradient of the convolution's output in the q-th output column that each column of x meets."""
    if X_COLUMNS > 1:
        columns = lanes + pad_w // SW - q
    elif SW > 1:
        touched = lanes + pad_w - q * DW
        columns = tl.where((touched >= 0) & (touched % SW == 0), touched // SW, -1)
    else:
        columns = lanes + pad_w - q * DW
    gradient, _, _ = _conv_gradient(
        grad_ptr, raw_ptr, residual_ptr, image, row, columns, c, out_height, out_width, channels,
        grad_n, grad_c, grad_h, grad_w, residual_n, residual_c, residual_h, residual_w,
        out_n, out_c, out_h, out_w, mean, rstd, gamma, beta, mean_grad, mean_grad_normalised,
        NORM, BATCH_STATS, ACTIVATION, ADD_RESIDUAL,
    )  # fmt: skip
    return gradient


@jit
def _norm_vectors(
    norm_weight_ptr,
    norm_bias_ptr,
    mean_ptr,
    var_ptr,
    sums_ptr,
    c,
    channels,
    eps,
    inverse_count,
    NORM: tl.constexpr,
):
    """Mean, rstd, gamma, beta and the means of BatchNorm's two backward sums, each (1, BLOCK_C)."""
    mean = vector(mean_ptr, c, channels, 0.0)[None, :]
    rstd = tl.full(c.shape, 1.0, tl.float32)[None, :]
    if NORM != "none":
        rstd = tl.rsqrt(vector(var_ptr, c, channels, 1.0) + eps)[None, :]
    gamma = vector(norm_weight_ptr, c, channels, 1.0)[None, :]
    beta = vector(norm_bias_ptr, c, channels, 0.0)[None, :]
    mean_grad = tl.zeros(c.shape, tl.float32)[None, :]
    mean_grad_normalised = mean_grad
    if sums_ptr is not None:
        mean_grad = vector(sums_ptr, c, channels, 0.0)[None, :] * inverse_count
        mean_grad_normalised = vector(sums_ptr + channels, c, channels, 0.0)[None, :] * inverse_count
    return mean, rstd, gamma, beta, mean_grad, mean_grad_normalised


@jit
def _add_products(
    weight_sums,
    value,
    ring,
    LAST: tl.constexpr,
    J: tl.constexpr,
    ROWS: tl.constexpr,
    KW: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """Weight gradients after one input tile: filter row LAST meets ring[0], LAST - SHIFT ring[1], ..."""
    added = ()
    for row in tl.static_range(ROWS):
        for column in tl.static_range(KW):
            tile = weight_sums[row * KW + column]
            if column == J and row <= LAST and (LAST - row) % SHIFT == 0:
                tile = tile + value * ring[(LAST - row) // SHIFT]
            added = added + (tile,)
    return added


@jit
def general_backward_kernel(
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
    out_height,
    out_width,
    sum_rows,
    sum_strips,
    sum_classes,
    sum_cells,
    sum_cells_each,
    sum_programs,
    x_rows,
    x_strips,
    x_classes,
    x_programs,
    x_programs_each,
    x_sums_start,
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
    x_grad_n,
    x_grad_c,
    x_grad_h,
    x_grad_w,
    weight_c,
    weight_t,
    pad_h,
    pad_w,
    x_source_columns,
    eps,
    inverse_count,
    NORM: tl.constexpr,
    BATCH_STATS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ADD_RESIDUAL: tl.constexpr,
    IDENTITY: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    SUMS: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    STEP: tl.constexpr,
    SHIFT: tl.constexpr,
    GROUP: tl.constexpr,
    SUM_NEW: tl.constexpr,
    SUM_RING: tl.constexpr,
    SUM_PACK: tl.constexpr,
    SUM_BLOCK_W: tl.constexpr,
    SUM_BLOCK_C: tl.constexpr,
    SOURCES: tl.constexpr,
    X_SHIFT: tl.constexpr,
    X_RING: tl.constexpr,
    X_WARM_UP: tl.constexpr,
    X_COLUMNS: tl.constexpr,
    X_SOURCE_COLUMNS: tl.constexpr,
    HOIST: tl.constexpr,
    X_BLOCK_W: tl.constexpr,
    X_BLOCK_C: tl.constexpr,
):
    """Gradients of x, weight, bias and residual in one launch; that before the conv is never written.

    Two kinds of programs. *Sum programs* walk output rows and sum over them: the weight gradient (tiles
    (SUM_BLOCK_W, SUM_BLOCK_C), one per tap of GROUP filter rows), the bias, post-norm's two sums for running
    statistics; and they write the residual's gradient. *x programs* walk output rows too and add each to the
    rows of x's gradient that it touches. Every sum program is followed by the `x_programs_each` x programs of
    about the same part of the map, so that they meet in the L2 cache.

    What is written, and where the sums go, is as in the 3x3 kernel; but pre-norm's sums, which come from the
    x programs, are (x parts, 2, C) from ``x_sums_start`` on.
    """
    PRE_SUMS: tl.constexpr = NORM == "pre" and SUMS
    POST_SUMS: tl.constexpr = NORM == "post" and SUMS
    SUM_PROGRAMS: tl.constexpr = WEIGHT or BIAS or POST_SUMS or residual_grad_ptr is not None
    X_PROGRAMS: tl.constexpr = PRE_SUMS or x_grad_ptr is not None
    pid = tl.program_id(0)
    sum_index = pid
    x_index = pid
    if SUM_PROGRAMS and X_PROGRAMS:
        place = pid % (x_programs_each + 1)
        sum_index = tl.where(place == 0, pid // (x_programs_each + 1), sum_programs)
        x_index = tl.where(place == 0, x_programs, pid // (x_programs_each + 1) * x_programs_each + place - 1)

    # The first condition is decided by the compiler, which drops what it guards.
    if SUM_PROGRAMS:  # noqa: SIM102
        if sum_index < sum_programs:
            GROUPS: tl.constexpr = (KH + GROUP - 1) // GROUP
            channel_blocks = tl.cdiv(channels, SUM_BLOCK_C)
            c = (sum_index % channel_blocks) * SUM_BLOCK_C + tl.arange(0, SUM_BLOCK_C)
            channel_ok = c < channels
            group = sum_index // channel_blocks % GROUPS
            part = sum_index // (channel_blocks * GROUPS)
            mean, rstd, gamma, beta, mean_grad, mean_grad_normalised = _norm_vectors(
                norm_weight_ptr, norm_bias_ptr, mean_ptr, var_ptr, sums_ptr, c, channels, eps, inverse_count,
                NORM,
            )  # fmt: skip
            weight_sums = _zeros(GROUP * KW, SUM_BLOCK_W, SUM_BLOCK_C)
            bias_sum = tl.zeros((SUM_BLOCK_W, SUM_BLOCK_C), tl.float32)
            s1 = tl.zeros((SUM_BLOCK_W, SUM_BLOCK_C), tl.float32)
            s2 = tl.zeros((SUM_BLOCK_W, SUM_BLOCK_C), tl.float32)
            last_cell = tl.minimum((part + 1) * sum_cells_each, sum_cells)
            for cell in range(part * sum_cells_each, last_cell):
                image, row_class, strip, columns = _cell(
                    cell, batch, out_width, sum_strips, sum_classes, SUM_PACK, SUM_BLOCK_W
                )
                first_row = row_class + strip * sum_rows * STEP
                # Gradients of the output rows that the next input row touches.
                ring = _zeros(SUM_RING, SUM_BLOCK_W, SUM_BLOCK_C)
                for i in range(sum_rows + SUM_RING - 1):
                    own_row = tl.where(i < sum_rows, first_row + i * STEP, -1)
                    gradient, value_grad, normalised = _conv_gradient(
                        grad_ptr, raw_ptr, residual_ptr, image, own_row, columns, c,
                        out_height, out_width, channels, grad_n, grad_c, grad_h, grad_w,
                        residual_n, residual_c, residual_h, residual_w, out_n, out_c, out_h, out_w,
                        mean, rstd, gamma, beta, mean_grad, mean_grad_normalised,
                        NORM, BATCH_STATS, ACTIVATION, ADD_RESIDUAL,
                    )  # fmt: skip
                    if BIAS:
                        bias_sum += gradient
                    if POST_SUMS:
                        s1 += value_grad
                        s2 += value_grad * normalised
                    if residual_grad_ptr is not None:
                        stored_row = tl.where(group == 0, own_row, -1)
                        where = address(
                            residual_grad_ptr, image, stored_row, columns, c, out_n, out_c, out_h, out_w
                        )  # fmt: skip
                        tl.store(
                            where,
                            value_grad.to(residual_grad_ptr.dtype.element_ty),
                            mask=inside(stored_row, columns, c, out_height, out_width, channels),
                        )  # fmt: skip
                    if WEIGHT:
                        ring = ring[1:] + (gradient,)
                        row = first_row + (i - (SUM_RING - 1)) * STEP
                        for u in tl.static_range(SUM_NEW):
                            in_row = row * SH - pad_h + (group * GROUP + GROUP - SUM_NEW + u) * DH
                            for j in tl.static_range(KW):
                                in_columns = columns * SW - pad_w + j * DW
                                value = _convolved_row(
                                    x_ptr, image, in_row, in_columns, c, x_n, x_c, x_h, x_w,
                                    height, width, channels, mean, rstd * gamma, beta, NORM,
                                )  # fmt: skip
                                weight_sums = _add_products(
                                    weight_sums, value, ring, GROUP - SUM_NEW + u, j, GROUP, KW, SHIFT
                                )  # fmt: skip
            COLUMNS: tl.constexpr = KH * KW * WEIGHT + BIAS + 2 * POST_SUMS
            if COLUMNS:
                base = parts_ptr + part.to(tl.int64) * COLUMNS * channels + c
                # Another group's programs see the same gradients, so that only the first one's count.
                first_group = channel_ok & (group + tl.zeros_like(c) == 0)
            if WEIGHT:
                for t in tl.static_range(GROUP * KW):
                    tap = group * GROUP * KW + t
                    tap_ok = channel_ok & (tap + tl.zeros_like(c) < KH * KW)
                    tl.store(base + tap * channels, tl.sum(weight_sums[t], axis=0), mask=tap_ok)
            if BIAS:
                tl.store(base + KH * KW * WEIGHT * channels, tl.sum(bias_sum, axis=0), mask=first_group)
            if POST_SUMS:
                base += (KH * KW * WEIGHT + BIAS) * channels
                tl.store(base, tl.sum(s1, axis=0), mask=first_group)
                tl.store(base + channels, tl.sum(s2, axis=0), mask=first_group)

    if X_PROGRAMS:  # noqa: SIM102
        if x_index < x_programs:
            channel_blocks = tl.cdiv(channels, X_BLOCK_C)
            c = (x_index % channel_blocks) * X_BLOCK_C + tl.arange(0, X_BLOCK_C)
            part = x_index // channel_blocks
            # Columns of x's gradient come in X_COLUMNS interleaved tiles where a stride leaves each tile taps
            # of its own, so that no load is wasted on taps that the stride skips.
            skipped = pad_w % X_COLUMNS
            blocks = (width + skipped + X_COLUMNS - 1) // X_COLUMNS
            image, row_class, strip, lanes = _cell(part, 0, blocks, x_strips, x_classes, 1, X_BLOCK_W)
            mean, rstd, gamma, beta, mean_grad, mean_grad_normalised = _norm_vectors(
                norm_weight_ptr, norm_bias_ptr, mean_ptr, var_ptr, sums_ptr, c, channels, eps, inverse_count,
                NORM,
            )  # fmt: skip
            taps = _load_filter(weight_ptr, c, channels, weight_c, weight_t, KH * KW, HOIST)
            ring = _zeros(X_RING * X_COLUMNS, X_BLOCK_W, X_BLOCK_C)
            s1 = tl.zeros((X_BLOCK_W, X_BLOCK_C), tl.float32)
            s2 = tl.zeros((X_BLOCK_W, X_BLOCK_C), tl.float32)
            for i in range(x_rows + X_WARM_UP):
                step = strip * x_rows + i - X_WARM_UP
                for u in tl.static_range(SOURCES):
                    if SOURCES == 1:
                        # One output row, which touches KH rows of x from `x_row` on, DH apart.
                        x_row = row_class - pad_h % SH + step * (X_SHIFT * DH)
                        row = pad_h // SH + step * STEP
                        if SH == 1:
                            row += row_class
                    else:
                        # The output rows that touch `x_row`, as far as the stride does not skip it.
                        x_row = step
                        touched = x_row + pad_h - u * DH
                        row = tl.where((touched >= 0) & (touched % SH == 0), touched // SH, -1)
                    if HOIST:
                        for q in tl.static_range(X_SOURCE_COLUMNS):
                            gradient = _source_gradient(
                                q, lanes, pad_w, grad_ptr, raw_ptr, residual_ptr, image, row, c,
                                out_height, out_width, channels, grad_n, grad_c, grad_h, grad_w,
                                residual_n, residual_c, residual_h, residual_w, out_n, out_c, out_h, out_w,
                                mean, rstd, gamma, beta, mean_grad, mean_grad_normalised,
                                NORM, BATCH_STATS, ACTIVATION, ADD_RESIDUAL, SW, DW, X_COLUMNS,
                            )  # fmt: skip
                            added = ()
                            for v in tl.static_range(X_RING):
                                for w in tl.static_range(X_COLUMNS):
                                    tile = ring[v * X_COLUMNS + w]
                                    if v < KH and w + q * X_COLUMNS < KW:
                                        tile = tile + gradient * taps[(v + u) * KW + w + q * X_COLUMNS]
                                    added = added + (tile,)
                            ring = added
                    else:
                        for q in range(x_source_columns):
                            gradient = _source_gradient(
                                q, lanes, pad_w, grad_ptr, raw_ptr, residual_ptr, image, row, c,
                                out_height, out_width, channels, grad_n, grad_c, grad_h, grad_w,
                                residual_n, residual_c, residual_h, residual_w, out_n, out_c, out_h, out_w,
                                mean, rstd, gamma, beta, mean_grad, mean_grad_normalised,
                                NORM, BATCH_STATS, ACTIVATION, ADD_RESIDUAL, SW, DW, X_COLUMNS,
                            )  # fmt: skip
                            added = ()
                            for v in tl.static_range(X_RING):
                                for w in tl.static_range(X_COLUMNS):
                                    tile = ring[v * X_COLUMNS + w]
                                    if v < KH:
                                        tile = tile + gradient * _loaded_tap(
                                            weight_ptr, c, channels, weight_c, weight_t,
                                            v + u, w + q * X_COLUMNS, KW,
                                        )  # fmt: skip
                                    added = added + (tile,)
                            ring = added
                for v in tl.static_range(X_SHIFT):
                    for w in tl.static_range(X_COLUMNS):
                        value = ring[v * X_COLUMNS + w]
                        own_row = tl.where(i >= X_WARM_UP, x_row + v * DH, -1)
                        columns = lanes * X_COLUMNS - skipped + w
                        ok = inside(own_row, columns, c, height, width, channels)
                        if PRE_SUMS:
                            x = load(
                                x_ptr, image, own_row, columns, c, x_n, x_c, x_h, x_w, height, width, channels
                            )  # fmt: skip
                            s1 += tl.where(ok, value, 0.0)
                            s2 += tl.where(ok, value * (x - mean) * rstd, 0.0)
                        if x_grad_ptr is not None:
                            if NORM == "pre":
                                value = value * gamma * rstd
                            if IDENTITY != "none":
                                grad, value_grad, _ = activation_grad_tile(
                                    grad_ptr, raw_ptr, residual_ptr, image, own_row, columns, c,
                                    out_height, out_width, channels, grad_n, grad_c, grad_h, grad_w,
                                    residual_n, residual_c, residual_h, residual_w,
                                    out_n, out_c, out_h, out_w, mean, rstd, gamma, beta,
                                    NORM, ACTIVATION, ADD_RESIDUAL,
                                )  # fmt: skip
                                if IDENTITY == "after":
                                    value += grad
                                else:
                                    value += value_grad
                            where = address(
                                x_grad_ptr, image, own_row, columns, c, x_grad_n, x_grad_c, x_grad_h, x_grad_w
                            )  # fmt: skip
                            tl.store(where, value.to(x_grad_ptr.dtype.element_ty), mask=ok)
                ring = ring[X_SHIFT * X_COLUMNS :] + _zeros(X_SHIFT * X_COLUMNS, X_BLOCK_W, X_BLOCK_C)
            if PRE_SUMS:
                base = parts_ptr + x_sums_start + part.to(tl.int64) * 2 * channels + c
                tl.store(base, tl.sum(s1, axis=0), mask=c < channels)
                tl.store(base + channels, tl.sum(s2, axis=0), mask=c < channels)


class ForwardPlan(NamedTuple):
    """Tile, grid, parts, run-time sizes and compile-time options of a forward launch."""

    tile: tuple[int, int]
    grid: tuple[int]
    parts: int
    sizes: tuple[int, ...]
    meta: dict[str, Any]


class BackwardPlan(NamedTuple):
    """The same of a backward launch, whose two kinds of programs have parts of their own."""

    tile: tuple[int, int, int, int]
    sum_programs: int
    sum_parts: int
    x_programs: int
    x_parts: int
    x_programs_each: int
    sum_sizes: tuple[int, ...]
    x_sizes: tuple[int, ...]
    meta: dict[str, Any]

    def grid(self, sums: bool, x: bool) -> tuple[int]:
        """Programs of a launch that has one or both kinds."""
        if not (sums and x):
            return (self.sum_programs if sums else self.x_programs,)
        each = self.x_programs_each
        return (max(self.sum_programs, ceil_div(self.x_programs, each)) * (each + 1),)


class Walk(NamedTuple):
    """How filter rows meet map rows: see :func:`_walk`."""

    step: int
    shift: int
    classes: int


Pair = tuple[int, int]
Shape = tuple[int, int, int, int]
Tile = tuple[int, ...]

# Filters with more taps would unroll into kernels that take minutes to compile.
LARGEST_FILTER = 225
# Programs that keep every multiprocessor of a large GPU busy.
_ENOUGH_PROGRAMS = 512
_THREADS = 128


def _walk(kernel: int, stride: int, dilation: int) -> Walk:
    """Steps of `step` output rows that go `shift` filter rows down; `classes` of rows are walked apart."""
    if stride == 1:
        return Walk(dilation, 1, dilation)
    if dilation == 1:
        return Walk(1, stride, 1)
    return Walk(1, kernel, 1)


def _power_below(value: int, most: int) -> int:
    """Largest power of two that is at most ``value`` and ``most``, at least 1."""
    power = 1
    while 2 * power <= min(value, most):
        power *= 2
    return power


def _tile(width: int, channels: int, values: int, planes: bool) -> tuple[int, int]:
    """Columns and channels of a tile with up to ``values`` values per thread, by a rule of thumb.

    Channels_last: up to 64 channels (whole 128-byte lines in half precision), then columns. Planes (NCHW): a
    row of up to 64 columns, then channels.
    """
    elements = values * _THREADS
    if planes:
        block_w = min(64, next_power_of_2(width))
    else:
        block_c = min(64, next_power_of_2(channels))
        block_w = min(max(1, elements // block_c), next_power_of_2(width))
    # Half as wide where that leaves clearly fewer columns outside the map.
    while (
        block_w > 8
        and ceil_div(width, block_w // 2) * (block_w // 2) < 0.9 * ceil_div(width, block_w) * block_w
    ):
        block_w //= 2
    if planes:
        block_c = min(next_power_of_2(channels), max(1, elements // block_w))
    return block_w, block_c


def _fitting(tile: Tile, width: int, channels: int) -> Pair:
    """Columns and channels of a tile that was measured on a map of about this size."""
    return min(tile[0], next_power_of_2(width)), min(tile[1], next_power_of_2(channels))


def general_tiles(direction: str, planes: bool, sizes: tuple[int, ...]) -> list[Tile]:
    """Tiles worth measuring for maps of these sizes (C, H, W)."""
    channels, _, width = sizes
    most_w = next_power_of_2(width)
    tiles = [
        (block_w, block_c)
        for block_c in ((1, 2, 4, 8) if planes else (16, 32, 64))
        for block_w in (4, 8, 16, 32, 64, 128)
        if block_c < 2 * channels and 128 <= block_w * block_c <= 1024 and (block_w <= most_w or not planes)
    ]
    if direction == "forward":
        return [tile for tile in tiles if tile[0] <= most_w]
    # The two programs' tiles in pairs of the same size or half of it: all pairs would take hours.
    return [
        (*own, *other)
        for own in tiles
        for other in tiles
        if other[0] <= most_w and other[1] == own[1] and own[0] in (other[0], other[0] // 2)
    ]


def _strips(steps: int, across: int, ring: int) -> tuple[int, int]:
    """Rows per program and strips, for ``across`` programs side by side and a walk of ``steps`` rows.

    Long, because every strip walks ``ring`` - 1 rows of halo first, but short enough for many programs.
    """
    strips = ceil_div(steps, 28 if ring <= 3 else 56)
    while across * strips < _ENOUGH_PROGRAMS and ceil_div(steps, strips) > max(7, 2 * (ring - 1)):
        strips += 1
    rows = ceil_div(steps, strips)
    return rows, ceil_div(steps, rows)


def _taps_stay(kernel: Pair, values: int, planes: bool) -> bool:
    """Whether the filter fits into registers; on planes a thread has a channel for each of its values."""
    return kernel[0] * kernel[1] * values <= 64 if planes else kernel[0] * kernel[1] <= 9


def transposes_filter(kernel: Pair, planes: bool) -> bool:
    """Whether the kernels want the filter as (taps, C): where they load it at every step, across channels."""
    return not planes and kernel[0] * kernel[1] > 9


def _values(kernel: Pair, tiles: int, planes: bool, most: int = 4) -> int:
    """Values per thread of a tile, when a thread holds ``tiles`` of them."""
    values = _power_below(8 * most // tiles, most)
    # On planes few channels per thread, each with a filter of its own.
    return min(values, _power_below(64 // (kernel[0] * kernel[1]), 4)) if planes else values


@lru_cache(maxsize=4096)
def map_plan(
    shape: Shape, planes: bool
) -> tuple[tuple[int, int, int, int, int], tuple[int], int, dict[str, Any]]:
    """Sizes, grid, parts and options of the kernels that do not convolve, on a map (B, C, H, W)."""
    batch, channels, height, width = shape
    block_w, block_c = _tile(width, channels, 4, planes)
    channel_blocks = ceil_div(channels, block_c)
    across = batch * ceil_div(width, block_w)
    rows, strips = _strips(height, across * channel_blocks, 1)
    parts = across * strips
    return (
        (batch, height, width, channels, rows),
        (parts * channel_blocks,),
        parts,
        {"PACK": 1, **launch_options(block_w, block_c)},
    )


def _convolution(kernel: Pair, stride: Pair, dilation: Pair, walk: Walk) -> dict[str, int]:
    return {
        "KH": kernel[0],
        "KW": kernel[1],
        "SH": stride[0],
        "SW": stride[1],
        "DH": dilation[0],
        "DW": dilation[1],
        "STEP": walk.step,
        "SHIFT": walk.shift,
    }


@lru_cache(maxsize=4096)
def forward_plan(
    out_shape: Shape, kernel: Pair, stride: Pair, dilation: Pair, planes: bool, tile: Tile = ()
) -> ForwardPlan:
    """Plan of the forward launch for an output (B, C, Ho, Wo); ``tile``: columns, channels, or the rule's."""
    batch, channels, height, width = out_shape
    walk = _walk(kernel[0], stride[0], dilation[0])
    ring = ceil_div(kernel[0], walk.shift)
    # More where taps are loaded again and again, each for all values of a thread.
    values = _values(kernel, ring, planes, 8 if kernel[0] * kernel[1] > 9 else 4)
    block_w, block_c = _fitting(tile, width, channels) if tile else _tile(width, channels, values, planes)
    values = max(1, block_w * block_c // _THREADS)
    channel_blocks = ceil_div(channels, block_c)
    classes = min(walk.classes, height)
    steps = ceil_div(height, walk.step)
    across = batch * classes * ceil_div(width, block_w)
    # Classes differ in length by a row, so that a strip of one could be empty in another.
    rows, strips = (steps, 1) if classes > 1 else _strips(steps, across * channel_blocks, ring)
    parts = across * strips
    return ForwardPlan(
        (block_w, block_c),
        (parts * channel_blocks,),
        parts,
        (rows, strips, classes),
        {
            **_convolution(kernel, stride, dilation, walk),
            "NEW": min(walk.shift, kernel[0]),
            "RING": ring,
            "HOIST": _taps_stay(kernel, values, planes),
            **launch_options(block_w, block_c),
        },
    )


@lru_cache(maxsize=4096)
def backward_plan(
    x_shape: Shape,
    out_shape: Shape,
    kernel: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    planes: bool,
    tile: Tile = (),
) -> BackwardPlan:
    """Plan of the backward launch; ``tile``: columns and channels of both programs, or the rule's."""
    batch, channels, height, width = x_shape
    out_height, out_width = out_shape[2:]
    walk = _walk(kernel[0], stride[0], dilation[0])

    group = kernel[0] if kernel[0] * kernel[1] <= 64 else max(1, 64 // kernel[1])
    groups = ceil_div(kernel[0], group)
    group = ceil_div(kernel[0], groups)
    sum_ring = ceil_div(group, walk.shift)
    most = 2 if planes and kernel[0] * kernel[1] > 9 else 4
    values = _power_below(128 // (group * kernel[1] + sum_ring), most)
    sum_w, sum_c = _tile(out_width, channels, values, planes)
    sum_pack = 1
    enough = _ENOUGH_PROGRAMS // 2
    # Partial sums are a float32 per tap that is written and read: about 3 % of a part's bytes when the part
    # has 34 values for each. Where so few parts leave the GPU idle, each takes fewer channels, down to whole
    # 32-byte sectors, and as many columns more, of several images where one is too narrow.
    affordable = batch * out_height * out_width // (34 * kernel[0] * kernel[1])
    columns = next_power_of_2(out_width)
    while not planes and sum_c > 16 and ceil_div(channels, sum_c) * groups * affordable < enough:
        sum_c //= 2
        sum_w *= 2
    if tile:
        sum_w, sum_c = _fitting(tile[:2], out_width if planes else out_width * batch, channels)
    if not planes and sum_w > columns:
        sum_pack = min(sum_w // columns, next_power_of_2(batch))
        sum_w = sum_pack * columns
    channel_blocks = ceil_div(channels, sum_c)
    sum_classes = min(walk.classes, out_height)
    sum_steps = ceil_div(out_height, walk.step)
    sum_strips = ceil_div(sum_steps, 56)
    sum_rows = ceil_div(sum_steps, sum_strips)
    sum_strips = ceil_div(sum_steps, sum_rows)
    column_blocks = ceil_div(out_width, sum_w) if sum_pack == 1 else 1
    cells = ceil_div(batch, sum_pack) * sum_classes * sum_strips * column_blocks
    # More parts than are affordable only where the GPU would not be busy.
    busy = ceil_div(enough, channel_blocks * groups)
    parts = min(cells, max(busy, min(affordable, 4 * busy)))
    cells_each = ceil_div(cells, parts)
    sum_parts = ceil_div(cells, cells_each)
    sum_programs = sum_parts * channel_blocks * groups

    gather = stride[0] > 1 and dilation[0] > 1
    x_shift = stride[0] if dilation[0] == 1 else 1
    x_ring = 1 if gather else max(kernel[0], x_shift)
    warm_up = 0 if gather else ceil_div(kernel[0], x_shift) - 1
    x_columns = stride[1] if dilation[1] == 1 else 1
    values = _values(kernel, x_ring * x_columns, planes)
    blocks = ceil_div(width + padding[1] % x_columns, x_columns)
    x_w, x_c = _fitting(tile[2:], blocks, channels) if tile else _tile(blocks, channels, values, planes)
    values = max(1, x_w * x_c // _THREADS)
    channel_blocks = ceil_div(channels, x_c)
    x_classes = 1 if gather or stride[0] > 1 else min(dilation[0], height)
    x_steps = height if gather else ceil_div(height + padding[0] % stride[0], x_shift * dilation[0])
    across = batch * x_classes * ceil_div(blocks, x_w)
    x_rows, x_strips = _strips(x_steps, across * channel_blocks, warm_up + 1)
    x_parts = across * x_strips
    x_programs = x_parts * channel_blocks

    return BackwardPlan(
        (sum_w, sum_c, x_w, x_c),
        sum_programs,
        sum_parts,
        x_programs,
        x_parts,
        max(1, round(x_programs / sum_programs)),
        (sum_rows, sum_strips, sum_classes, cells, cells_each),
        (x_rows, x_strips, x_classes),
        {
            **_convolution(kernel, stride, dilation, walk),
            "GROUP": group,
            "SUM_NEW": min(walk.shift, group),
            "SUM_RING": sum_ring,
            "SUM_PACK": sum_pack,
            "SUM_BLOCK_W": sum_w,
            "SUM_BLOCK_C": sum_c,
            "SOURCES": kernel[0] if gather else 1,
            "X_SHIFT": x_shift,
            "X_RING": x_ring,
            "X_WARM_UP": warm_up,
            "X_COLUMNS": x_columns,
            "X_SOURCE_COLUMNS": ceil_div(kernel[1], x_columns),
            "HOIST": _taps_stay(kernel, values, planes),
            "X_BLOCK_W": x_w,
            "X_BLOCK_C": x_c,
        },
    )
