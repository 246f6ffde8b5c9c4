"""Backward Triton kernels of the HR chain.

The low-resolution branch comes first, since BatchNorm's two sums go over the whole map; then one pass over
the full maps. Sums over the map are written per program and merged in a fixed order: no atomics.
"""

from __future__ import annotations

from fused_ops.core.activations import activate, activation_gradient
from fused_ops.core.triton_matrices import dot, vector, weight_chunk
from fused_ops.core.triton_support import jit, tl
from fused_ops.hr_chain.triton_tiles import (
    dense,
    inside,
    load_row,
    pointers,
    repeated_gradient,
    store_pair,
    taps,
    tile_pixels,
)


@jit
def low_gradient_kernel(
    grad_ptr,
    low_ptr,
    fc1_weight_ptr,
    fc1_bias_ptr,
    fc2_weight_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    mean_ptr,
    var_ptr,
    drop_path_ptr,
    low_grad_ptr,
    repeated_ptr,
    parts_ptr,
    height,
    width,
    channels,
    low_height,
    low_width,
    hidden,
    tiles,
    tiles_each,
    grad_n,
    grad_c,
    grad_h,
    grad_w,
    eps,
    ACTIVATION: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    """Gradient of the norm's output, hidden values recomputed chunk by chunk, with its sums over the map.

    Writes that gradient where ``low_grad_ptr`` is given, and the gradient of fc2's output (the sum over the
    repeated pixels) where ``repeated_ptr`` is. Each program's sums go to ``parts_ptr`` (P, 3, C): of the
    norm's output gradient, of it times the normalised value, of fc2's output gradient.
    """
    M: tl.constexpr = TILE_H * TILE_W
    c = tl.arange(0, BLOCK_C)
    mean = vector(mean_ptr, c, channels, 0.0)
    rstd = tl.rsqrt(vector(var_ptr, c, channels, 1.0) + eps)
    gamma = vector(norm_weight_ptr, c, channels, 1.0)
    beta = vector(norm_bias_ptr, c, channels, 0.0)
    sum_low = tl.zeros((BLOCK_C,), tl.float32)
    sum_normalised = tl.zeros((BLOCK_C,), tl.float32)
    sum_repeated = tl.zeros((BLOCK_C,), tl.float32)
    first = tl.program_id(0) * tiles_each
    for tile in range(first, tl.minimum(first + tiles_each, tiles)):
        image, i, j = tile_pixels(tile, low_height, low_width, TILE_H, TILE_W)
        ok = inside(i, j, c, low_height, low_width, channels)
        where = dense(image, i, j, c, low_height, low_width, channels)
        repeated = repeated_gradient(
            grad_ptr, image, i, j, c, height, width, channels, grad_n, grad_c, grad_h, grad_w
        )
        if drop_path_ptr is not None:
            repeated *= tl.load(drop_path_ptr + image).to(tl.float32)
        sum_repeated += tl.sum(repeated, axis=0)
        rounded = repeated.to(low_ptr.dtype.element_ty)
        if repeated_ptr is not None:
            tl.store(repeated_ptr + where, rounded, mask=ok)
        if low_grad_ptr is not None:
            normalised = (tl.load(low_ptr + where, mask=ok, other=0.0).to(tl.float32) - mean) * rstd
            normalised = tl.where(ok, normalised, 0.0)
            z = tl.where(ok, normalised * gamma + beta, 0.0).to(low_ptr.dtype.element_ty)
            low_grad = tl.zeros((M, BLOCK_C), tl.float32)
            for start in range(0, hidden, BLOCK_HIDDEN):
                h = start + tl.arange(0, BLOCK_HIDDEN)
                fc1 = weight_chunk(fc1_weight_ptr, h, c, hidden, channels)
                value = dot(z, tl.trans(fc1), tl.zeros((M, BLOCK_HIDDEN), tl.float32))
                value += vector(fc1_bias_ptr, h, hidden, 0.0)
                fc2 = weight_chunk(fc2_weight_ptr, c, h, channels, hidden)
                value_grad = dot(rounded, fc2, tl.zeros((M, BLOCK_HIDDEN), tl.float32))
                value_grad *= activation_gradient(value, ACTIVATION)
                low_grad = dot(value_grad.to(low_ptr.dtype.element_ty), fc1, low_grad)
            tl.store(low_grad_ptr + where, low_grad.to(low_grad_ptr.dtype.element_ty), mask=ok)
            sum_low += tl.sum(low_grad, axis=0)
            sum_normalised += tl.sum(low_grad * normalised, axis=0)
    base = parts_ptr + tl.program_id(0).to(tl.int64) * 3 * channels + c
    tl.store(base, sum_low, mask=c < channels)
    tl.store(base + channels, sum_normalised, mask=c < channels)
    tl.store(base + 2 * channels, sum_repeated, mask=c < channels)


@jit
def _hidden_chunk(
    z, operand, rounded, fc1_weight_ptr, fc1_bias_ptr, fc2_weight_ptr, h, c, hidden, channels,
    fc1_grad, fc2_grad, bias_grad, low_grad,
    ACTIVATION: tl.constexpr, FC1: tl.constexpr, FC2: tl.constexpr, LOW: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Add one tile's share to the gradients of one chunk of hidden units (BLOCK_HIDDEN, BLOCK_C).

    Hidden units are the rows of every product, so that what was just computed is the left operand of the next
    one, in registers.
    """
    fc1 = weight_chunk(fc1_weight_ptr, h, c, hidden, channels)
    fc2 = weight_chunk(fc2_weight_ptr, c, h, channels, hidden)
    value = dot(fc1, tl.trans(z), tl.zeros((BLOCK_HIDDEN, M), tl.float32))
    value += tl.trans(vector(fc1_bias_ptr, h, hidden, 0.0))
    value_grad = dot(tl.trans(fc2), tl.trans(rounded), tl.zeros((BLOCK_HIDDEN, M), tl.float32))
    value_grad *= activation_gradient(value, ACTIVATION)
    bias_grad += tl.sum(value_grad, axis=1)
    value_grad = value_grad.to(z.dtype)
    if FC1:
        fc1_grad = dot(value_grad, operand, fc1_grad)
    if FC2:
        # Pixels outside have no gradient, so what is activated there does not count.
        fc2_grad = dot(activate(value, ACTIVATION).to(z.dtype), rounded, fc2_grad)
    if LOW:
        # Transposed, it needs fewer registers for its operands.
        low_grad = dot(tl.trans(fc1), value_grad, low_grad)
    return fc1_grad, fc2_grad, bias_grad, low_grad


@jit
def _store_chunk(
    base, fc1_grad, fc2_grad, bias_grad, h, c, hidden, channels, FC1: tl.constexpr, FC2: tl.constexpr
):
    """Store one chunk's gradients in a part: fc1's weight, fc2's transposed, fc1's bias."""
    own = (h < hidden)[:, None] & (c < channels)[None, :]
    offsets = h[:, None] * channels + c[None, :]
    if FC1:
        tl.store(base + offsets, fc1_grad, mask=own)
        base += hidden * channels
    if FC2:
        tl.store(base + offsets, fc2_grad, mask=own)
        base += hidden * channels
    tl.store(base + h, bias_grad, mask=h < hidden)


@jit
def _norm_sums(fc1_weight_ptr, fc1_grad, bias_grad, h, c, hidden, channels):
    """BatchNorm's two sums over the map (BLOCK_C), of one chunk of hidden units.

    The sum over pixels of ``fc1^T value_grad`` is ``fc1^T`` times that of ``value_grad``, which is there.
    """
    fc1 = weight_chunk(fc1_weight_ptr, h, c, hidden, channels).to(tl.float32)
    return tl.sum(fc1 * bias_grad[:, None], axis=0), tl.sum(fc1 * fc1_grad, axis=0)


@jit
def hidden_weights_kernel(
    repeated_ptr,
    low_ptr,
    fc1_weight_ptr,
    fc1_bias_ptr,
    fc2_weight_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    mean_ptr,
    var_ptr,
    parts_ptr,
    channels,
    low_height,
    low_width,
    hidden,
    tiles,
    tiles_each,
    columns,
    eps,
    ACTIVATION: tl.constexpr,
    FC1: tl.constexpr,
    FC2: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    """Gradients of both fully connected layers' weights for one chunk of hidden units; chunks vary fastest.

    Each program writes its share of one of the parts (P, columns), columns being fc1's weight (hidden, C) if
    FC1, fc2's weight transposed (hidden, C) if FC2, and fc1's bias (hidden).
    """
    M: tl.constexpr = TILE_H * TILE_W
    chunks = tl.cdiv(hidden, BLOCK_HIDDEN)
    part = tl.program_id(0) // chunks
    h = tl.program_id(0) % chunks * BLOCK_HIDDEN + tl.arange(0, BLOCK_HIDDEN)
    c = tl.arange(0, BLOCK_C)
    mean = vector(mean_ptr, c, channels, 0.0)
    scale = vector(norm_weight_ptr, c, channels, 1.0) * tl.rsqrt(vector(var_ptr, c, channels, 1.0) + eps)
    beta = vector(norm_bias_ptr, c, channels, 0.0)
    fc1_grad = tl.zeros((BLOCK_HIDDEN, BLOCK_C), tl.float32)
    fc2_grad = tl.zeros((BLOCK_HIDDEN, BLOCK_C), tl.float32)
    bias_grad = tl.zeros((BLOCK_HIDDEN,), tl.float32)
    low_grad = 0.0
    first = part * tiles_each
    for tile in range(first, tl.minimum(first + tiles_each, tiles)):
        image, i, j = tile_pixels(tile, low_height, low_width, TILE_H, TILE_W)
        ok = inside(i, j, c, low_height, low_width, channels)
        where = dense(image, i, j, c, low_height, low_width, channels)
        rounded = tl.load(repeated_ptr + where, mask=ok, other=0.0)
        z = (tl.load(low_ptr + where, mask=ok, other=0.0).to(tl.float32) - mean) * scale + beta
        z = tl.where(ok, z, 0.0).to(low_ptr.dtype.element_ty)
        fc1_grad, fc2_grad, bias_grad, _ = _hidden_chunk(
            z, z, rounded, fc1_weight_ptr, fc1_bias_ptr, fc2_weight_ptr, h, c, hidden, channels,
            fc1_grad, fc2_grad, bias_grad, low_grad, ACTIVATION, FC1, FC2, False, BLOCK_HIDDEN, M,
        )  # fmt: skip
    base = parts_ptr + part.to(tl.int64) * columns
    _store_chunk(base, fc1_grad, fc2_grad, bias_grad, h, c, hidden, channels, FC1, FC2)


@jit
def low_backward_kernel(
    grad_ptr,
    low_ptr,
    fc1_weight_ptr,
    fc1_bias_ptr,
    fc2_weight_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    mean_ptr,
    var_ptr,
    drop_path_ptr,
    low_grad_ptr,
    parts_ptr,
    height,
    width,
    channels,
    low_height,
    low_width,
    hidden,
    tiles,
    tiles_each,
    columns,
    grad_n,
    grad_c,
    grad_h,
    grad_w,
    eps,
    ACTIVATION: tl.constexpr,
    FC1: tl.constexpr,
    FC2: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    """:func:`low_gradient_kernel` and :func:`hidden_weights_kernel` in one, up to BLOCK_HIDDEN hidden units.

    Each program writes one of the parts (P, columns), columns being those of the latter and then those of the
    former. fc1's gradient is summed with the normalised values in place of the norm's outputs, which are
    those times a weight plus a bias, because BatchNorm's own sums follow from it.
    """
    M: tl.constexpr = TILE_H * TILE_W
    NEED_LOW: tl.constexpr = low_grad_ptr is not None
    h = tl.arange(0, BLOCK_HIDDEN)
    c = tl.arange(0, BLOCK_C)
    mean = vector(mean_ptr, c, channels, 0.0)
    rstd = tl.rsqrt(vector(var_ptr, c, channels, 1.0) + eps)
    gamma = vector(norm_weight_ptr, c, channels, 1.0)
    beta = vector(norm_bias_ptr, c, channels, 0.0)
    fc1_grad = tl.zeros((BLOCK_HIDDEN, BLOCK_C), tl.float32)
    fc2_grad = tl.zeros((BLOCK_HIDDEN, BLOCK_C), tl.float32)
    bias_grad = tl.zeros((BLOCK_HIDDEN,), tl.float32)
    sum_repeated = tl.zeros((BLOCK_C,), tl.float32)
    first = tl.program_id(0) * tiles_each
    for tile in range(first, tl.minimum(first + tiles_each, tiles)):
        image, i, j = tile_pixels(tile, low_height, low_width, TILE_H, TILE_W)
        ok = inside(i, j, c, low_height, low_width, channels)
        where = dense(image, i, j, c, low_height, low_width, channels)
        repeated = repeated_gradient(
            grad_ptr, image, i, j, c, height, width, channels, grad_n, grad_c, grad_h, grad_w
        )
        if drop_path_ptr is not None:
            repeated *= tl.load(drop_path_ptr + image).to(tl.float32)
        sum_repeated += tl.sum(repeated, axis=0)
        rounded = repeated.to(low_ptr.dtype.element_ty)
        normalised = (tl.load(low_ptr + where, mask=ok, other=0.0).to(tl.float32) - mean) * rstd
        z = tl.where(ok, normalised * gamma + beta, 0.0).to(low_ptr.dtype.element_ty)
        normalised = tl.where(ok, normalised, 0.0).to(low_ptr.dtype.element_ty)
        low_grad = tl.zeros((BLOCK_C, M), tl.float32)
        fc1_grad, fc2_grad, bias_grad, low_grad = _hidden_chunk(
            z, normalised, rounded, fc1_weight_ptr, fc1_bias_ptr, fc2_weight_ptr, h, c, hidden, channels,
            fc1_grad, fc2_grad, bias_grad, low_grad, ACTIVATION, True, FC2, NEED_LOW, BLOCK_HIDDEN, M,
        )  # fmt: skip
        if NEED_LOW:
            tl.store(low_grad_ptr + where, tl.trans(low_grad).to(low_grad_ptr.dtype.element_ty), mask=ok)
    base = parts_ptr + tl.program_id(0).to(tl.int64) * columns
    sum_low, sum_normalised = _norm_sums(fc1_weight_ptr, fc1_grad, bias_grad, h, c, hidden, channels)
    sums = base + (columns - 3 * channels) + c
    tl.store(sums, sum_low, mask=c < channels)
    tl.store(sums + channels, sum_normalised, mask=c < channels)
    tl.store(sums + 2 * channels, sum_repeated, mask=c < channels)
    if FC1:
        fc1_grad = fc1_grad * gamma + bias_grad[:, None] * beta
    _store_chunk(base, fc1_grad, fc2_grad, bias_grad, h, c, hidden, channels, FC1, FC2)


@jit
def _scatter(target_ptr, total, k, rows, columns):
    """Store the columns k of a part that belong to a matrix (rows, columns), transposed."""
    ok = (k >= 0) & (k < rows * columns)
    value = total.to(target_ptr.dtype.element_ty)
    tl.store(target_ptr + k % columns * rows + k // columns, value, mask=ok)


@jit
def finish_low_kernel(
    parts_ptr,
    fc1_weight_grad_ptr,
    fc2_weight_grad_ptr,
    fc1_bias_grad_ptr,
    norm_bias_grad_ptr,
    norm_weight_grad_ptr,
    fc2_bias_grad_ptr,
    sums_ptr,
    parts,
    columns,
    channels,
    hidden,
    FC1: tl.constexpr,
    FC2: tl.constexpr,
    FC1_BIAS: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Sum the parts (P, columns) of one of the kernels above in a fixed order, and store each where it goes.

    FC1, FC2, FC1_BIAS and SUMS say what columns there are; ``sums_ptr`` (2, C) gets the norm's two sums.
    """
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_K,), tl.float32)
    for start in range(0, parts, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        ok = (p < parts)[:, None] & (k < columns)[None, :]
        values = tl.load(parts_ptr + p.to(tl.int64)[:, None] * columns + k[None, :], mask=ok, other=0.0)
        total += tl.sum(values, axis=0)
    if FC1:
        if fc1_weight_grad_ptr is not None:
            _scatter(fc1_weight_grad_ptr, total, k, 1, hidden * channels)
        k -= hidden * channels
    if FC2:
        if fc2_weight_grad_ptr is not None:
            _scatter(fc2_weight_grad_ptr, total, k, hidden, channels)
        k -= hidden * channels
    if FC1_BIAS:
        if fc1_bias_grad_ptr is not None:
            _scatter(fc1_bias_grad_ptr, total, k, 1, hidden)
        k -= hidden
    if SUMS:
        if sums_ptr is not None:
            _scatter(sums_ptr, total, k, 1, 2 * channels)
        if norm_bias_grad_ptr is not None:
            _scatter(norm_bias_grad_ptr, total, k, 1, channels)
        if norm_weight_grad_ptr is not None:
            _scatter(norm_weight_grad_ptr, total, k - channels, 1, channels)
        if fc2_bias_grad_ptr is not None:
            _scatter(fc2_bias_grad_ptr, total, k - 2 * channels, 1, channels)


@jit
def _convolution_gradient(
    low_grad_ptr, low_ptr, where, ok, mean, rstd, scale, mean_grad, mean_grad_normalised,
    BATCH_STATS: tl.constexpr,
):  # fmt: skip
    """Gradient (M, BLOCK_C) of the strided convolution's output, through the norm; zero outside."""
    value = tl.load(low_grad_ptr + where, mask=ok, other=0.0).to(tl.float32)
    if BATCH_STATS:
        low = tl.load(low_ptr + where, mask=ok, other=0.0).to(tl.float32)
        value -= mean_grad + (low - mean) * rstd * mean_grad_normalised
    return tl.where(ok, value * scale, 0.0)


@jit
def _tap_products(x0, x1, x2, x3, left, right):
    """Products for a row of three taps: two pixels' gradients with the four inputs around them."""
    return x0 * left + x1 * right, x1 * left + x2 * right, x2 * left + x3 * right


@jit
def maps_backward_kernel(
    grad_ptr,
    x_ptr,
    high_filter_ptr,
    low_filter_ptr,
    low_ptr,
    low_grad_ptr,
    norm_weight_ptr,
    mean_ptr,
    var_ptr,
    sums_ptr,
    drop_path_ptr,
    x_grad_ptr,
    parts_ptr,
    height,
    width,
    channels,
    low_height,
    low_width,
    filter_rows,
    tiles,
    tiles_each,
    grad_n,
    grad_c,
    grad_h,
    grad_w,
    x_n,
    x_c,
    x_h,
    x_w,
    eps,
    inverse_count,
    BATCH_STATS: tl.constexpr,
    IDENTITY: tl.constexpr,
    HIGH: tl.constexpr,
    BIAS: tl.constexpr,
    LOW: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Gradients of x and of both filters in one pass over the full maps.

    Each program writes one of the parts (P, columns, C), columns being the nine taps of the full-resolution
    filter if HIGH, its bias if BIAS, and the nine taps of the strided filter if LOW.
    """
    blocks = tl.cdiv(channels, BLOCK_C)
    part = tl.program_id(0) // blocks
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    NEED_X: tl.constexpr = x_grad_ptr is not None
    NEED_LOW: tl.constexpr = NEED_X or LOW
    zero = tl.zeros((TILE_H * TILE_W, BLOCK_C), tl.float32)
    h0, h1, h2, h3, h4, h5, h6, h7, h8 = zero, zero, zero, zero, zero, zero, zero, zero, zero
    l0, l1, l2, l3, l4, l5, l6, l7, l8 = zero, zero, zero, zero, zero, zero, zero, zero, zero
    bias_sum = zero
    first = part * tiles_each
    for tile in range(first, tl.minimum(first + tiles_each, tiles)):
        image, i, j = tile_pixels(tile, low_height, low_width, TILE_H, TILE_W)
        grad_start = pointers(grad_ptr, image, 2 * i, 2 * j, c, grad_n, grad_c, grad_h, grad_w)
        if drop_path_ptr is not None:
            factor = tl.load(drop_path_ptr + image).to(tl.float32)
        if NEED_X:
            x00, x01, x10, x11 = zero, zero, zero, zero
            for r in range(filter_rows + 1):
                g0, g1, g2, g3 = load_row(grad_start, i, j, r - 1, c, height, width, channels, grad_h, grad_w)
                w0, w1, w2 = taps(high_filter_ptr, 2 - r, c, channels)
                x00 += g0 * w2 + g1 * w1 + g2 * w0
                x01 += g1 * w2 + g2 * w1 + g3 * w0
                w0, w1, w2 = taps(high_filter_ptr, 3 - r, c, channels)
                x10 += g0 * w2 + g1 * w1 + g2 * w0
                x11 += g1 * w2 + g2 * w1 + g3 * w0
            if drop_path_ptr is not None:
                x00 *= factor
                x01 *= factor
                x10 *= factor
                x11 *= factor
        # From L1 where the loop has read them: held through it, they would cost registers.
        _, own00, own01, _ = load_row(grad_start, i, j, 0, c, height, width, channels, grad_h, grad_w)
        _, own10, own11, _ = load_row(grad_start, i, j, 1, c, height, width, channels, grad_h, grad_w)
        if NEED_X and IDENTITY:
            x00 += own00
            x01 += own01
            x10 += own10
            x11 += own11
        if NEED_LOW:
            # Loaded anew for every tile: held, these vectors would cost registers all the time.
            mean = vector(mean_ptr, c, channels, 0.0)
            rstd = tl.rsqrt(vector(var_ptr, c, channels, 1.0) + eps)
            scale = vector(norm_weight_ptr, c, channels, 1.0) * rstd
            mean_grad = mean
            mean_grad_normalised = mean
            if BATCH_STATS:
                mean_grad = vector(sums_ptr, c, channels, 0.0) * inverse_count
                mean_grad_normalised = vector(sums_ptr + channels, c, channels, 0.0) * inverse_count
            low_where = dense(image, i, j, c, low_height, low_width, channels)
            ok = inside(i, j, c, low_height, low_width, channels)
            d00 = _convolution_gradient(
                low_grad_ptr, low_ptr, low_where, ok, mean, rstd, scale, mean_grad, mean_grad_normalised,
                BATCH_STATS,
            )  # fmt: skip
        if NEED_X:
            # The strided convolution transposed: an even row or column is read by one tap, an odd one by two.
            low_row = low_width * channels
            ok = inside(i, j + 1, c, low_height, low_width, channels)
            d01 = _convolution_gradient(
                low_grad_ptr, low_ptr, low_where + channels, ok, mean, rstd, scale, mean_grad,
                mean_grad_normalised, BATCH_STATS,
            )  # fmt: skip
            ok = inside(i + 1, j, c, low_height, low_width, channels)
            d10 = _convolution_gradient(
                low_grad_ptr, low_ptr, low_where + low_row, ok, mean, rstd, scale, mean_grad,
                mean_grad_normalised, BATCH_STATS,
            )  # fmt: skip
            ok = inside(i + 1, j + 1, c, low_height, low_width, channels)
            d11 = _convolution_gradient(
                low_grad_ptr, low_ptr, low_where + (low_row + channels), ok, mean, rstd, scale, mean_grad,
                mean_grad_normalised, BATCH_STATS,
            )  # fmt: skip
            w0, w1, w2 = taps(low_filter_ptr, 1, c, channels)
            x00 += d00 * w1
            x01 += d00 * w2 + d01 * w0
            w0, w1, w2 = taps(low_filter_ptr, 2, c, channels)
            x10 += d00 * w1
            x11 += d00 * w2 + d01 * w0
            w0, w1, w2 = taps(low_filter_ptr, 0, c, channels)
            x10 += d10 * w1
            x11 += d10 * w2 + d11 * w0
            start = x_grad_ptr + dense(image, 2 * i, 2 * j, c, height, width, channels)
            store_pair(start, x00, x01, i, j, 0, c, height, width, channels)
            store_pair(start, x10, x11, i, j, 1, c, height, width, channels)
        if drop_path_ptr is not None:
            own00 *= factor
            own01 *= factor
            own10 *= factor
            own11 *= factor
        if BIAS:
            bias_sum += (own00 + own01) + (own10 + own11)
        if HIGH or LOW:
            x_start = pointers(x_ptr, image, 2 * i, 2 * j, c, x_n, x_c, x_h, x_w)
            v0, v1, v2, v3 = load_row(x_start, i, j, -1, c, height, width, channels, x_h, x_w)
            if HIGH:
                p0, p1, p2 = _tap_products(v0, v1, v2, v3, own00, own01)
                h0 += p0
                h1 += p1
                h2 += p2
            if LOW:
                l0 += d00 * v0
                l1 += d00 * v1
                l2 += d00 * v2
            v0, v1, v2, v3 = load_row(x_start, i, j, 0, c, height, width, channels, x_h, x_w)
            if HIGH:
                p0, p1, p2 = _tap_products(v0, v1, v2, v3, own00, own01)
                h3 += p0
                h4 += p1
                h5 += p2
                p0, p1, p2 = _tap_products(v0, v1, v2, v3, own10, own11)
                h0 += p0
                h1 += p1
                h2 += p2
            if LOW:
                l3 += d00 * v0
                l4 += d00 * v1
                l5 += d00 * v2
            v0, v1, v2, v3 = load_row(x_start, i, j, 1, c, height, width, channels, x_h, x_w)
            if HIGH:
                p0, p1, p2 = _tap_products(v0, v1, v2, v3, own00, own01)
                h6 += p0
                h7 += p1
                h8 += p2
                p0, p1, p2 = _tap_products(v0, v1, v2, v3, own10, own11)
                h3 += p0
                h4 += p1
                h5 += p2
            if LOW:
                l6 += d00 * v0
                l7 += d00 * v1
                l8 += d00 * v2
            if HIGH:
                v0, v1, v2, v3 = load_row(x_start, i, j, 2, c, height, width, channels, x_h, x_w)
                p0, p1, p2 = _tap_products(v0, v1, v2, v3, own10, own11)
                h6 += p0
                h7 += p1
                h8 += p2
    if parts_ptr is not None:
        ok = c < channels
        base = parts_ptr + part.to(tl.int64) * (9 * HIGH + BIAS + 9 * LOW) * channels + c
    if HIGH:
        tl.store(base + 0 * channels, tl.sum(h0, axis=0), mask=ok)
        tl.store(base + 1 * channels, tl.sum(h1, axis=0), mask=ok)
        tl.store(base + 2 * channels, tl.sum(h2, axis=0), mask=ok)
        tl.store(base + 3 * channels, tl.sum(h3, axis=0), mask=ok)
        tl.store(base + 4 * channels, tl.sum(h4, axis=0), mask=ok)
        tl.store(base + 5 * channels, tl.sum(h5, axis=0), mask=ok)
        tl.store(base + 6 * channels, tl.sum(h6, axis=0), mask=ok)
        tl.store(base + 7 * channels, tl.sum(h7, axis=0), mask=ok)
        tl.store(base + 8 * channels, tl.sum(h8, axis=0), mask=ok)
        base += 9 * channels
    if BIAS:
        tl.store(base, tl.sum(bias_sum, axis=0), mask=ok)
        base += channels
    if LOW:
        tl.store(base + 0 * channels, tl.sum(l0, axis=0), mask=ok)
        tl.store(base + 1 * channels, tl.sum(l1, axis=0), mask=ok)
        tl.store(base + 2 * channels, tl.sum(l2, axis=0), mask=ok)
        tl.store(base + 3 * channels, tl.sum(l3, axis=0), mask=ok)
        tl.store(base + 4 * channels, tl.sum(l4, axis=0), mask=ok)
        tl.store(base + 5 * channels, tl.sum(l5, axis=0), mask=ok)
        tl.store(base + 6 * channels, tl.sum(l6, axis=0), mask=ok)
        tl.store(base + 7 * channels, tl.sum(l7, axis=0), mask=ok)
        tl.store(base + 8 * channels, tl.sum(l8, axis=0), mask=ok)
