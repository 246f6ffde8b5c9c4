"""Triton kernels for 3x3 stride 1 depthwise convolution on channels_last maps, and their launchers.

One geometry serves every kernel: a program owns `rows` rows x BLOCK_W columns x BLOCK_C channels of the map
and walks down its rows, holding (BLOCK_W, BLOCK_C) tiles. A convolution keeps the partial sums of three
rows, so that an input row is loaded once per program (three times shifted by a column, from L1). Sums over
the map are written per program and merged in a fixed order by :mod:`fused_ops.core.statistics`: no atomics.
"""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_ops.core import backends, distributed, environment, library
from fused_ops.core.activations import activate, activation_gradient
from fused_ops.core.statistics import merge_moments, sum_parts
from fused_ops.core.triton_support import ceil_div, jit, next_power_of_2, tl


@jit
def _program(height, width, channels, rows, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr):
    """Image, first row, columns (BLOCK_W), channels (BLOCK_C) and map part of this program.

    Channel blocks vary fastest: neighbours in memory run side by side.
    """
    channel_blocks = tl.cdiv(channels, BLOCK_C)
    column_blocks = tl.cdiv(width, BLOCK_W)
    strips = tl.cdiv(height, rows)
    pid = tl.program_id(0)
    part = pid // channel_blocks
    columns = (part % column_blocks) * BLOCK_W + tl.arange(0, BLOCK_W)
    c = (pid % channel_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    row = (part // column_blocks) % strips * rows
    image = part // (column_blocks * strips)
    return image, row, columns, c, part


@jit
def _inside(row, columns, c, height, width, channels):
    """Mask (BLOCK_W, BLOCK_C) of the elements of one row that lie inside the map."""
    rows = row + tl.zeros_like(columns)
    return ((rows >= 0) & (rows < height) & (columns >= 0) & (columns < width))[:, None] & (c < channels)[
        None, :
    ]


@jit
def _address(base, image, row, columns, c, stride_n, stride_h, stride_w):
    """Pointers (BLOCK_W, BLOCK_C) to one row of an image; 64-bit offsets for image and row."""
    start = base + image.to(tl.int64) * stride_n + row.to(tl.int64) * stride_h
    return start + columns[:, None] * stride_w + c[None, :]


@jit
def _load(base, image, row, columns, c, stride_n, stride_h, stride_w, height, width, channels):
    """One row (BLOCK_W, BLOCK_C) in float32, zero outside the map."""
    ok = _inside(row, columns, c, height, width, channels)
    return tl.load(
        _address(base, image, row, columns, c, stride_n, stride_h, stride_w), mask=ok, other=0.0
    ).to(tl.float32)


@jit
def _vector(base, c, channels, default):
    """Per-channel vector (BLOCK_C) in float32; ``default`` where there is none."""
    if base is not None:
        return tl.load(base + c, mask=c < channels, other=0.0).to(tl.float32)
    else:
        return tl.full(c.shape, default, tl.float32)


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
def _store_moments(
    part, rows_valid, ok, columns, width, first, s1, s2, c, channels, count_ptr, mean_ptr, m2_ptr
):
    """Count, mean and M2 of a program's elements, from per-element sums over rows shifted by ``first``."""
    column_count = tl.sum(tl.where(columns < width, 1.0, 0.0), axis=0)
    # Relative to one element per channel, so that a mean far above the spread costs no digits of M2.
    is_shift = (columns == tl.min(columns, axis=0))[:, None]
    shift = tl.sum(tl.where(is_shift, first, 0.0), axis=0)
    mean = (first - shift[None, :]) + s1 / rows_valid
    m2 = s2 - s1 * s1 / rows_valid
    tile_mean = tl.sum(tl.where(ok, mean, 0.0), axis=0) / column_count
    deviation = mean - tile_mean[None, :]
    part_m2 = tl.sum(tl.where(ok, m2 + rows_valid * deviation * deviation, 0.0), axis=0)
    part_mean = shift + tile_mean
    channel_ok = c < channels
    tl.store(mean_ptr + part.to(tl.int64) * channels + c, part_mean, mask=channel_ok)
    tl.store(m2_ptr + part.to(tl.int64) * channels + c, part_m2, mask=channel_ok)
    # Every channel block of this part writes the same number.
    tl.store(count_ptr + part, column_count * rows_valid)


@jit
def moments_kernel(
    x_ptr,
    count_ptr,
    mean_ptr,
    m2_ptr,
    height,
    width,
    channels,
    rows,
    x_n,
    x_h,
    x_w,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """x (B, H, W, C) -> count (P), mean (P, C), M2 (P, C) of each program's part."""
    image, row0, columns, c, part = _program(height, width, channels, rows, BLOCK_W, BLOCK_C)
    s1 = tl.zeros((BLOCK_W, BLOCK_C), tl.float32)
    s2 = tl.zeros((BLOCK_W, BLOCK_C), tl.float32)
    first = _load(x_ptr, image, row0, columns, c, x_n, x_h, x_w, height, width, channels)
    for i in range(1, rows):
        value = _load(x_ptr, image, row0 + i, columns, c, x_n, x_h, x_w, height, width, channels)
        ok = _inside(row0 + i, columns, c, height, width, channels)
        difference = tl.where(ok, value - first, 0.0)
        s1 += difference
        s2 += difference * difference
    rows_valid = tl.minimum(rows, height - row0).to(tl.float32)
    ok = _inside(row0, columns, c, height, width, channels)
    _store_moments(
        part, rows_valid, ok, columns, width, first, s1, s2, c, channels, count_ptr, mean_ptr, m2_ptr
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
    count_ptr,
    part_mean_ptr,
    part_m2_ptr,
    height,
    width,
    channels,
    rows,
    x_n,
    x_h,
    x_w,
    residual_n,
    residual_h,
    residual_w,
    out_n,
    out_h,
    eps,
    NORM: tl.constexpr,
    ACTIVATION: tl.constexpr,
    RESIDUAL: tl.constexpr,
    IDENTITY: tl.constexpr,
    RAW_ONLY: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """conv3x3(x), with everything else where the statistics are known.

    RAW_ONLY: writes the raw convolution and its moments, for a norm that follows. Otherwise writes the
    result, and the raw convolution too where ``raw_ptr`` is given.
    """
    image, row0, columns, c, part = _program(height, width, channels, rows, BLOCK_W, BLOCK_C)
    w00, w01, w02, w10, w11, w12, w20, w21, w22 = _filter(weight_ptr, c, channels)
    bias = _vector(bias_ptr, c, channels, 0.0)[None, :]
    if NORM != "none" and not RAW_ONLY:
        mean = _vector(mean_ptr, c, channels, 0.0)[None, :]
        scale = _vector(norm_weight_ptr, c, channels, 1.0)
        scale = (scale * tl.rsqrt(_vector(var_ptr, c, channels, 1.0) + eps))[None, :]
        shift = _vector(norm_bias_ptr, c, channels, 0.0)[None, :]

    # Partial sums of the output rows that still wait for one and for two input rows.
    waits_one = tl.zeros((BLOCK_W, BLOCK_C), tl.float32)
    waits_two = tl.zeros((BLOCK_W, BLOCK_C), tl.float32)
    first = tl.zeros((BLOCK_W, BLOCK_C), tl.float32)
    s1 = tl.zeros((BLOCK_W, BLOCK_C), tl.float32)
    s2 = tl.zeros((BLOCK_W, BLOCK_C), tl.float32)
    previous = tl.zeros((BLOCK_W, BLOCK_C), tl.float32)
    for i in range(rows + 2):
        row = row0 - 1 + i
        left = _load(x_ptr, image, row, columns - 1, c, x_n, x_h, x_w, height, width, channels)
        centre = _load(x_ptr, image, row, columns, c, x_n, x_h, x_w, height, width, channels)
        right = _load(x_ptr, image, row, columns + 1, c, x_n, x_h, x_w, height, width, channels)
        original = centre
        if NORM == "pre":
            # The padding is zero after the norm, so elements outside stay zero.
            left_ok = _inside(row, columns - 1, c, height, width, channels)
            centre_ok = _inside(row, columns, c, height, width, channels)
            right_ok = _inside(row, columns + 1, c, height, width, channels)
            left = tl.where(left_ok, (left - mean) * scale + shift, 0.0)
            centre = tl.where(centre_ok, (centre - mean) * scale + shift, 0.0)
            right = tl.where(right_ok, (right - mean) * scale + shift, 0.0)
        value = waits_one + left * w20 + centre * w21 + right * w22
        waits_one = waits_two + left * w10 + centre * w11 + right * w12
        waits_two = left * w00 + centre * w01 + right * w02
        # The first two rows are halo: they complete no row of this program, and nothing is stored for them.
        out_row = tl.where(i >= 2, row - 1, -1)
        ok = _inside(out_row, columns, c, height, width, channels)
        value += bias
        where = _address(0, image, out_row, columns, c, out_n, out_h, channels)
        if RAW_ONLY or raw_ptr is not None:
            rounded = value.to(raw_ptr.dtype.element_ty)
            tl.store(raw_ptr + where, rounded, mask=ok)
        if RAW_ONLY:
            # Statistics of what was stored: the normalised values then have mean 0 exactly.
            value = rounded.to(tl.float32)
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
                    added = _load(
                        residual_ptr,
                        image,
                        out_row,
                        columns,
                        c,
                        residual_n,
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
    if RAW_ONLY:
        rows_valid = tl.minimum(rows, height - row0).to(tl.float32)
        ok = _inside(row0, columns, c, height, width, channels)
        _store_moments(
            part,
            rows_valid,
            ok,
            columns,
            width,
            first,
            s1,
            s2,
            c,
            channels,
            count_ptr,
            part_mean_ptr,
            part_m2_ptr,
        )


@jit
def normalise_kernel(
    raw_ptr,
    residual_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    mean_ptr,
    var_ptr,
    out_ptr,
    height,
    width,
    channels,
    rows,
    residual_n,
    residual_h,
    residual_w,
    out_n,
    out_h,
    eps,
    ACTIVATION: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """raw (B, H, W, C) -> act(BN(raw)) with the residual, row by row."""
    image, row0, columns, c, _ = _program(height, width, channels, rows, BLOCK_W, BLOCK_C)
    mean = _vector(mean_ptr, c, channels, 0.0)[None, :]
    scale = _vector(norm_weight_ptr, c, channels, 1.0)
    scale = (scale * tl.rsqrt(_vector(var_ptr, c, channels, 1.0) + eps))[None, :]
    shift = _vector(norm_bias_ptr, c, channels, 0.0)[None, :]
    for i in range(rows):
        row = row0 + i
        value = _load(raw_ptr, image, row, columns, c, out_n, out_h, channels, height, width, channels)
        value = (value - mean) * scale + shift
        if RESIDUAL != "none":
            added = _load(
                residual_ptr,
                image,
                row,
                columns,
                c,
                residual_n,
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
        tl.store(
            _address(out_ptr, image, row, columns, c, out_n, out_h, channels),
            value.to(out_ptr.dtype.element_ty),
            mask=_inside(row, columns, c, height, width, channels),
        )


@jit
def _activation_grad_tile(
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
    grad_h,
    grad_w,
    residual_n,
    residual_h,
    residual_w,
    out_n,
    out_h,
    mean,
    rstd,
    gamma,
    beta,
    NORM: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ADD_RESIDUAL: tl.constexpr,
):
    """grad, gradient before the activation, and normalised raw value of one row (BLOCK_W, BLOCK_C)."""
    grad = _load(grad_ptr, image, row, columns, c, grad_n, grad_h, grad_w, height, width, channels)
    value_grad = grad
    normalised = tl.zeros_like(grad)
    if raw_ptr is not None:
        raw = _load(raw_ptr, image, row, columns, c, out_n, out_h, channels, height, width, channels)
        value = raw
        if NORM == "post":
            normalised = (raw - mean) * rstd
            value = normalised * gamma + beta
        if ADD_RESIDUAL:
            value += _load(
                residual_ptr,
                image,
                row,
                columns,
                c,
                residual_n,
                residual_h,
                residual_w,
                height,
                width,
                channels,
            )
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
    height,
    width,
    channels,
    rows,
    grad_n,
    grad_h,
    grad_w,
    residual_n,
    residual_h,
    residual_w,
    out_n,
    out_h,
    eps,
    ACTIVATION: tl.constexpr,
    ADD_RESIDUAL: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The two sums of BatchNorm's backward, per program: parts (P, 2, C) of sum g' and sum g' xhat."""
    image, row0, columns, c, part = _program(height, width, channels, rows, BLOCK_W, BLOCK_C)
    mean = _vector(mean_ptr, c, channels, 0.0)[None, :]
    rstd = tl.rsqrt(_vector(var_ptr, c, channels, 1.0) + eps)[None, :]
    gamma = _vector(norm_weight_ptr, c, channels, 1.0)[None, :]
    beta = _vector(norm_bias_ptr, c, channels, 0.0)[None, :]
    s1 = tl.zeros((BLOCK_W, BLOCK_C), tl.float32)
    s2 = tl.zeros((BLOCK_W, BLOCK_C), tl.float32)
    for i in range(rows):
        row = row0 + i
        _, value_grad, normalised = _activation_grad_tile(
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
            grad_h,
            grad_w,
            residual_n,
            residual_h,
            residual_w,
            out_n,
            out_h,
            mean,
            rstd,
            gamma,
            beta,
            "post",
            ACTIVATION,
            ADD_RESIDUAL,
        )
        ok = _inside(row, columns, c, height, width, channels)
        s1 += tl.where(ok, value_grad, 0.0)
        s2 += tl.where(ok, value_grad * normalised, 0.0)
    channel_ok = c < channels
    base = parts_ptr + part.to(tl.int64) * 2 * channels + c
    tl.store(base, tl.sum(s1, axis=0), mask=channel_ok)
    tl.store(base + channels, tl.sum(s2, axis=0), mask=channel_ok)


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
    weight_parts_ptr,
    bias_parts_ptr,
    sum_parts_ptr,
    residual_grad_ptr,
    height,
    width,
    channels,
    rows,
    grad_n,
    grad_h,
    grad_w,
    x_n,
    x_h,
    x_w,
    residual_n,
    residual_h,
    residual_w,
    out_n,
    out_h,
    eps,
    inverse_count,
    NORM: tl.constexpr,
    BATCH_STATS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ADD_RESIDUAL: tl.constexpr,
    IDENTITY: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Gradients of x, weight, bias and residual in one pass; the gradient before the conv is never written.

    Post-norm with batch statistics takes the two sums of :func:`post_norm_sums_kernel`; with running
    statistics it writes their parts (P, 2, C) itself, for the norm's own gradients. Pre-norm with batch
    statistics writes ``t = identity + gamma rstd e`` in place of x's gradient (e = conv transposed of the
    gradient) with parts (P, 2, C) of sum e and sum e xhat; :func:`pre_norm_finish_kernel` does the rest.
    IDENTITY is none, before or after: where the identity branch joins.
    """
    image, row0, columns, c, part = _program(height, width, channels, rows, BLOCK_W, BLOCK_C)
    channel_ok = c < channels
    mean = tl.zeros((1, BLOCK_C), tl.float32)
    rstd = tl.full((1, BLOCK_C), 1.0, tl.float32)
    gamma = tl.full((1, BLOCK_C), 1.0, tl.float32)
    beta = tl.zeros((1, BLOCK_C), tl.float32)
    if NORM != "none":
        mean = _vector(mean_ptr, c, channels, 0.0)[None, :]
        rstd = tl.rsqrt(_vector(var_ptr, c, channels, 1.0) + eps)[None, :]
        gamma = _vector(norm_weight_ptr, c, channels, 1.0)[None, :]
        beta = _vector(norm_bias_ptr, c, channels, 0.0)[None, :]
    if NORM == "post" and BATCH_STATS:
        mean_grad = _vector(sums_ptr, c, channels, 0.0)[None, :] * inverse_count
        mean_grad_normalised = _vector(sums_ptr + channels, c, channels, 0.0)[None, :] * inverse_count
    PRE_SUMS: tl.constexpr = NORM == "pre" and sum_parts_ptr is not None
    POST_SUMS: tl.constexpr = NORM == "post" and sum_parts_ptr is not None
    NEED_X: tl.constexpr = PRE_SUMS or x_grad_ptr is not None
    NEED_W: tl.constexpr = weight_parts_ptr is not None
    NEED_OWN: tl.constexpr = bias_parts_ptr is not None or residual_grad_ptr is not None
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
        _, d0, n0 = _activation_grad_tile(
            grad_ptr, raw_ptr, residual_ptr, image, row, shifted, c, height, width, channels,
            grad_n, grad_h, grad_w, residual_n, residual_h, residual_w, out_n, out_h,
            mean, rstd, gamma, beta, NORM, ACTIVATION, ADD_RESIDUAL,
        )  # fmt: skip
        grad, d1, n1 = _activation_grad_tile(
            grad_ptr, raw_ptr, residual_ptr, image, row, columns, c, height, width, channels,
            grad_n, grad_h, grad_w, residual_n, residual_h, residual_w, out_n, out_h,
            mean, rstd, gamma, beta, NORM, ACTIVATION, ADD_RESIDUAL,
        )  # fmt: skip
        _, d2, n2 = _activation_grad_tile(
            grad_ptr, raw_ptr, residual_ptr, image, row, columns - 1, c, height, width, channels,
            grad_n, grad_h, grad_w, residual_n, residual_h, residual_w, out_n, out_h,
            mean, rstd, gamma, beta, NORM, ACTIVATION, ADD_RESIDUAL,
        )  # fmt: skip
        value_grad = d1
        if NORM == "post":
            if BATCH_STATS:
                d0 = d0 - mean_grad - n0 * mean_grad_normalised
                d1 = d1 - mean_grad - n1 * mean_grad_normalised
                d2 = d2 - mean_grad - n2 * mean_grad_normalised
            d0 = tl.where(_inside(row, columns + 1, c, height, width, channels), d0 * gamma * rstd, 0.0)
            d1 = tl.where(_inside(row, columns, c, height, width, channels), d1 * gamma * rstd, 0.0)
            d2 = tl.where(_inside(row, columns - 1, c, height, width, channels), d2 * gamma * rstd, 0.0)
        if NEED_OWN or POST_SUMS:
            # The first and the last row are halo, counted and stored by other programs.
            own_row = tl.where((i >= 1) & (i <= rows), row, -1)
            own = _inside(own_row, columns, c, height, width, channels)
            if bias_parts_ptr is not None:
                bias_sum += tl.where(own, d1, 0.0)
            if POST_SUMS:
                s1 += tl.where(own, value_grad, 0.0)
                s2 += tl.where(own, value_grad * n1, 0.0)
            if residual_grad_ptr is not None:
                tl.store(
                    _address(residual_grad_ptr, image, own_row, columns, c, out_n, out_h, channels),
                    value_grad.to(residual_grad_ptr.dtype.element_ty),
                    mask=own,
                )
        if NEED_W or PRE_SUMS:
            below_row = tl.where(i < rows, row + 1, -1)
            x_below = _load(x_ptr, image, below_row, columns, c, x_n, x_h, x_w, height, width, channels)
            z_below = x_below
            if NORM == "pre":
                below_ok = _inside(below_row, columns, c, height, width, channels)
                x_below = (x_below - mean) * rstd
                z_below = tl.where(below_ok, x_below * gamma + beta, 0.0)
        if NEED_W:
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
            ok = _inside(out_row, columns, c, height, width, channels)
            if PRE_SUMS:
                s1 += tl.where(ok, value, 0.0)
                s2 += tl.where(ok, value * x_above, 0.0)
            if x_grad_ptr is not None:
                if NORM == "pre":
                    value = value * gamma * rstd
                if IDENTITY != "none":
                    value += identity_grad
                tl.store(
                    _address(x_grad_ptr, image, out_row, columns, c, out_n, out_h, channels),
                    value.to(x_grad_ptr.dtype.element_ty),
                    mask=ok,
                )
        if PRE_SUMS:
            x_above, x_beside = x_beside, x_below
        if IDENTITY == "after":
            identity_grad = grad
        if IDENTITY == "before":
            identity_grad = value_grad
    if NEED_W:
        base = weight_parts_ptr + (part.to(tl.int64) * channels + c) * 9
        tl.store(base, tl.sum(g00, axis=0), mask=channel_ok)
        tl.store(base + 1, tl.sum(g01, axis=0), mask=channel_ok)
        tl.store(base + 2, tl.sum(g02, axis=0), mask=channel_ok)
        tl.store(base + 3, tl.sum(g10, axis=0), mask=channel_ok)
        tl.store(base + 4, tl.sum(g11, axis=0), mask=channel_ok)
        tl.store(base + 5, tl.sum(g12, axis=0), mask=channel_ok)
        tl.store(base + 6, tl.sum(g20, axis=0), mask=channel_ok)
        tl.store(base + 7, tl.sum(g21, axis=0), mask=channel_ok)
        tl.store(base + 8, tl.sum(g22, axis=0), mask=channel_ok)
    if bias_parts_ptr is not None:
        tl.store(bias_parts_ptr + part.to(tl.int64) * channels + c, tl.sum(bias_sum, axis=0), mask=channel_ok)
    if sum_parts_ptr is not None:
        base = sum_parts_ptr + part.to(tl.int64) * 2 * channels + c
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
    height,
    width,
    channels,
    rows,
    x_n,
    x_h,
    x_w,
    out_n,
    out_h,
    eps,
    inverse_count,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """t (B, H, W, C) -> x's gradient t - gamma rstd (m1 + xhat m2) in place; m: means of the two sums."""
    image, row0, columns, c, _ = _program(height, width, channels, rows, BLOCK_W, BLOCK_C)
    mean = _vector(mean_ptr, c, channels, 0.0)[None, :]
    rstd = tl.rsqrt(_vector(var_ptr, c, channels, 1.0) + eps)[None, :]
    scale = _vector(norm_weight_ptr, c, channels, 1.0)[None, :] * rstd * inverse_count
    s1 = _vector(sums_ptr, c, channels, 0.0)[None, :]
    s2 = _vector(sums_ptr + channels, c, channels, 0.0)[None, :]
    for i in range(rows):
        row = row0 + i
        ok = _inside(row, columns, c, height, width, channels)
        where = _address(x_grad_ptr, image, row, columns, c, out_n, out_h, channels)
        partial = tl.load(where, mask=ok, other=0.0).to(tl.float32)
        x = _load(x_ptr, image, row, columns, c, x_n, x_h, x_w, height, width, channels)
        value = partial - scale * (s1 + (x - mean) * rstd * s2)
        tl.store(where, value.to(x_grad_ptr.dtype.element_ty), mask=ok)


class Tile(NamedTuple):
    """Work of one program: rows x columns x channels of the map."""

    rows: int
    BLOCK_W: int
    BLOCK_C: int


# Programs that keep every multiprocessor of a large GPU busy.
_ENOUGH_PROGRAMS = 512


def tile_for(shape: tuple[int, int, int, int]) -> Tile:
    """Tile for a map (B, C, H, W), by a rule of thumb that was not measured.

    Up to 64 channels (whole 128-byte lines in half precision) and 8 columns; strips as long as leaves enough
    programs, because each one re-reads a halo of two rows and writes its own partial sums.
    """
    batch, channels, height, width = shape
    block_c = min(64, next_power_of_2(channels))
    block_w = min(8 * (64 // block_c), next_power_of_2(width), 16)
    across = batch * ceil_div(width, block_w) * ceil_div(channels, block_c)
    strips = ceil_div(height, 28)
    while across * strips < _ENOUGH_PROGRAMS and ceil_div(height, strips) > 7:
        strips += 1
    return Tile(ceil_div(height, strips), block_w, block_c)


_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_LARGEST_ROW = 2**31


def can_run(call: Any) -> tuple[bool, str]:
    """Whether the Triton kernels can run ``call``; one sentence says why not."""
    x = call.x
    ok, reason = backends.triton_status(x.device.index)
    if not ok:
        return False, reason
    if not x.is_cuda and not environment.interpreting():
        return False, f"x is on {x.device}; the Triton kernels need a CUDA tensor"
    if x.dtype not in _DTYPES:
        return False, f"x is {x.dtype}; the Triton kernels are for float32, float16 and bfloat16"
    if call.kernel_size != (3, 3):
        kernel = "x".join(map(str, call.kernel_size))
        return False, f"the kernel is {kernel}; the Triton kernels are for 3x3"
    if call.stride != (1, 1):
        return False, f"stride is {call.stride}; the Triton kernels are for stride 1"
    if call.dilation != (1, 1):
        return False, f"dilation is {call.dilation}; the Triton kernels are for dilation 1"
    if call.padding != (1, 1):
        return False, f"padding is {call.padding}; the Triton kernels are for padding 1"
    if x.numel() == 0:
        return False, f"x is empty, {tuple(x.shape)}"
    ambiguous = x.shape[1] == 1 or x.shape[2] * x.shape[3] == 1
    if not ambiguous and not library.is_channels_last(x):
        return False, f"x has strides {x.stride()}; the Triton kernels read channels_last"
    if x.shape[3] * max(x.stride(3), x.shape[1]) >= _LARGEST_ROW:
        return False, f"one row of x spans {x.shape[3] * x.stride(3)} elements; fewer than 2**31 are allowed"
    return True, ""


def _rows(tensor: Tensor | None) -> tuple[Tensor | None, tuple[int, int, int]]:
    """``tensor`` with neighbouring channels side by side in memory (else copied), and its other strides."""
    if tensor is None:
        return None, (0, 0, 0)
    if tensor.shape[1] > 1 and tensor.stride(1) != 1:
        tensor = tensor.contiguous(memory_format=torch.channels_last)
    return tensor, (tensor.stride(0), tensor.stride(2), tensor.stride(3))


def _dense(tensor: Tensor) -> tuple[int, int]:
    """Image and row strides of a freshly allocated channels_last map."""
    _, channels, height, width = tensor.shape
    return height * width * channels, width * channels


class _Geometry(NamedTuple):
    """Sizes, grid, number of map parts and compile-time options of the launches of one call."""

    sizes: tuple[int, int, int, int]
    grid: tuple[int]
    parts: int
    meta: dict[str, Any]

    @classmethod
    def of(cls, call: Any) -> _Geometry:
        batch, channels, height, width = call.x.shape
        tile = tile_for((batch, channels, height, width))
        parts = batch * ceil_div(height, tile.rows) * ceil_div(width, tile.BLOCK_W)
        grid = (parts * ceil_div(channels, tile.BLOCK_C),)
        return cls(
            (height, width, channels, tile.rows),
            grid,
            parts,
            {
                "BLOCK_W": tile.BLOCK_W,
                "BLOCK_C": tile.BLOCK_C,
                "num_warps": 4,
                "num_stages": 1,
                # Contraction of multiply and add is wanted: it is what every convolution library does.
                "enable_fp_fusion": True,
            },
        )

    def partial(self, like: Tensor, *columns: int) -> Tensor:
        return torch.empty((self.parts, *columns), dtype=torch.float32, device=like.device)


def _moments_buffers(geometry: _Geometry, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    channels = x.shape[1]
    return geometry.partial(x), geometry.partial(x, channels), geometry.partial(x, channels)


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
    with _device_of(call.x):
        _forward(call, out, raw, mean, var, unbiased)
    return out, raw, mean, var, unbiased


def _forward(call: Any, out: Tensor, raw: Tensor, mean: Tensor, var: Tensor, unbiased: Tensor) -> None:
    geometry = _Geometry.of(call)
    x, x_strides = _rows(call.x)
    residual, residual_strides = _rows(call.residual)
    statistics = (mean, var) if call.batch_stats else (call.mean, call.var)
    batch_post = call.norm == "post" and call.batch_stats
    if call.norm == "pre" and call.batch_stats:
        moments = _moments_buffers(geometry, x)
        moments_kernel[geometry.grid](x, *moments, *geometry.sizes, *x_strides, **geometry.meta)
        _merge(call, moments, mean, var, unbiased)
    if batch_post:
        work = raw if call.keep_raw else torch.empty_like(out)
        moments = _moments_buffers(geometry, x)
    else:
        work = raw if call.keep_raw else None
        moments = (None, None, None)
    forward_kernel[geometry.grid](
        x,
        call.weight.contiguous(),
        call.bias,
        call.norm_weight,
        call.norm_bias,
        *statistics,
        residual,
        out,
        work,
        *moments,
        *geometry.sizes,
        *x_strides,
        *residual_strides,
        *_dense(out),
        call.eps,
        NORM=call.norm,
        ACTIVATION=call.activation,
        RESIDUAL=call.residual_mode,
        IDENTITY=call.identity,
        RAW_ONLY=batch_post,
        **geometry.meta,
    )
    if batch_post:
        _merge(call, moments, mean, var, unbiased)
        added, added_strides = (x, x_strides) if call.identity else (residual, residual_strides)
        normalise_kernel[geometry.grid](
            work,
            added,
            call.norm_weight,
            call.norm_bias,
            mean,
            var,
            out,
            *geometry.sizes,
            *added_strides,
            *_dense(out),
            call.eps,
            ACTIVATION=call.activation,
            RESIDUAL=call.residual_mode,
            **geometry.meta,
        )


def _merge(call: Any, moments: tuple[Tensor, ...], mean: Tensor, var: Tensor, unbiased: Tensor) -> None:
    merge_moments(*moments, mean, var, unbiased)
    if call.group:
        distributed.exchange_moments(mean, var, unbiased, call.values_per_channel, call.group)


def backward(
    call: Any, grad: Tensor, raw: Tensor | None, needs: list[bool], *gradients: Tensor
) -> tuple[Tensor, ...]:
    """Launch the backward kernels; fills the needed ones of the six gradients and returns all.

    Args:
        call: the forward's call, with ``mean`` and ``var`` the statistics that it normalised with.
        grad: (B, C, H, W) in any layout; copied where channels are not side by side.
        raw: the convolution's output, or None where nothing needs it.
        needs: which of x, weight, bias, norm_weight, norm_bias, residual get a gradient.
        gradients: outputs for them, absent ones empty.
    """
    with _device_of(call.x):
        _backward(call, grad, raw, needs, gradients)
    return gradients


def _backward(
    call: Any, grad: Tensor, raw: Tensor | None, needs: list[bool], gradients: tuple[Tensor, ...]
) -> None:
    x_grad, weight_grad, bias_grad, norm_weight_grad, norm_bias_grad, residual_grad = gradients
    need_x, need_weight, need_bias, need_norm_weight, need_norm_bias, need_residual = needs
    geometry = _Geometry.of(call)
    x, x_strides = _rows(call.x)
    grad, grad_strides = _rows(grad)
    add_residual = call.residual_mode == "before" and call.activation != "none"
    added, added_strides = (None, (0, 0, 0))
    if add_residual:
        added, added_strides = (x, x_strides) if call.identity else _rows(call.residual)
    channels = x.shape[1]
    inverse_count = 1.0 / call.values_per_channel
    sums = None
    if call.norm == "post" and call.batch_stats:
        sums = torch.empty((2, channels), dtype=torch.float32, device=x.device)
        parts = geometry.partial(x, 2, channels)
        post_norm_sums_kernel[geometry.grid](
            grad,
            raw,
            added,
            call.norm_weight,
            call.norm_bias,
            call.mean,
            call.var,
            parts,
            *geometry.sizes,
            *grad_strides,
            *added_strides,
            *_dense(x),
            call.eps,
            ACTIVATION=call.activation,
            ADD_RESIDUAL=add_residual,
            **geometry.meta,
        )
        sum_parts(parts, sums)
        if need_norm_weight:
            norm_weight_grad.copy_(sums[1])
        if need_norm_bias:
            norm_bias_grad.copy_(sums[0])
        if call.group:
            distributed.exchange_sums(sums, call.values_per_channel, call.group)
        need_norm_weight = need_norm_bias = False
    batch_pre = call.norm == "pre" and call.batch_stats
    sums_in_pass = (need_norm_weight or need_norm_bias) and sums is None
    if need_x or need_weight or need_bias or need_residual or sums_in_pass:
        weight_parts = geometry.partial(x, channels, 9) if need_weight else None
        bias_parts = geometry.partial(x, channels) if need_bias else None
        norm_parts = None
        if sums_in_pass or (batch_pre and need_x):
            norm_parts = geometry.partial(x, 2, channels)
        identity = call.residual_mode if call.identity else "none"
        backward_kernel[geometry.grid](
            grad,
            x,
            call.weight.contiguous(),
            call.norm_weight,
            call.norm_bias,
            call.mean,
            call.var,
            added,
            raw,
            sums,
            x_grad if need_x else None,
            weight_parts,
            bias_parts,
            norm_parts,
            residual_grad if need_residual else None,
            *geometry.sizes,
            *grad_strides,
            *x_strides,
            *added_strides,
            *_dense(x),
            call.eps,
            inverse_count,
            NORM=call.norm,
            BATCH_STATS=call.batch_stats,
            ACTIVATION=call.activation,
            ADD_RESIDUAL=add_residual,
            IDENTITY=identity,
            **geometry.meta,
        )
        if need_weight:
            sum_parts(weight_parts, weight_grad)
        if need_bias:
            sum_parts(bias_parts, bias_grad)
        if norm_parts is not None:
            sums = torch.empty((2, channels), dtype=torch.float32, device=x.device)
            sum_parts(norm_parts, sums)
            if need_norm_weight:
                norm_weight_grad.copy_(sums[1])
            if need_norm_bias:
                norm_bias_grad.copy_(sums[0])
            if call.group:
                distributed.exchange_sums(sums, call.values_per_channel, call.group)
        if batch_pre and need_x:
            pre_norm_finish_kernel[geometry.grid](
                x_grad,
                x,
                call.norm_weight,
                call.mean,
                call.var,
                sums,
                *geometry.sizes,
                *x_strides,
                *_dense(x),
                call.eps,
                inverse_count,
                **geometry.meta,
            )


def _device_of(x: Tensor) -> Any:
    # Triton launches on the current device, which need not be the one that holds x.
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
