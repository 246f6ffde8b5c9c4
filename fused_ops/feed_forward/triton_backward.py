"""Backward Triton kernels of the feed-forward chain; hidden values are recomputed, never in memory.

The weights' gradients come first: a norm's own sums over the tokens follow from them, and with these the
second kernel writes the input's gradient at once. Partial sums are merged in a fixed order: no atomics.
"""

from __future__ import annotations

from fused_ops.core.triton_matrices import dot, vector, weight_chunk
from fused_ops.core.triton_support import jit, tl
from fused_ops.feed_forward.triton_rows import (
    activated,
    activated_gradient,
    drop_path_factors,
    load_rows,
    norm_backward,
    normalise,
    row_pointers,
)


@jit
def weights_kernel(
    grad_ptr,
    x_ptr,
    fc1_weight_ptr,
    fc1_bias_ptr,
    fc2_weight_ptr,
    plain_fc2_weight_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    mean_ptr,
    var_ptr,
    drop_path_ptr,
    parts_ptr,
    sums_ptr,
    rows,
    tokens,
    channels,
    hidden,
    tiles_each,
    columns,
    grad_b,
    grad_n,
    grad_c,
    x_b,
    x_n,
    x_c,
    eps,
    NORM: tl.constexpr,
    ACTIVATION: tl.constexpr,
    VALUE: tl.constexpr,
    FC1: tl.constexpr,
    FC2: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    """Gradients of the weights for one chunk of hidden units and ``tiles_each`` tiles; chunks vary fastest.

    Hidden units are the rows of every product (BLOCK_HIDDEN, BLOCK_M or BLOCK_C), so that what was just
    computed is the left operand of the next one, in registers. Each program writes its share of a part
    (P, columns): fc1's weight (hidden, C) if FC1, that of fc2 before the layer scale, transposed (hidden, C),
    if FC2, fc1's bias (hidden) if VALUE. And a part of the sums (P * chunks, 4, C): gradients of the norm's
    bias and weight, of fc2's output, of the layer scale.
    """
    DTYPE: tl.constexpr = fc1_weight_ptr.dtype.element_ty
    chunks = tl.cdiv(hidden, BLOCK_HIDDEN)
    part = tl.program_id(0) // chunks
    chunk = tl.program_id(0) % chunks
    h = chunk * BLOCK_HIDDEN + tl.arange(0, BLOCK_HIDDEN)
    c = tl.arange(0, BLOCK_C)
    gamma = vector(norm_weight_ptr, c, channels, 1.0)
    beta = vector(norm_bias_ptr, c, channels, 0.0)
    fc1_bias = tl.trans(vector(fc1_bias_ptr, h, hidden, 0.0))
    fc1_grad = tl.zeros((BLOCK_HIDDEN, BLOCK_C), tl.float32)
    fc2_grad = tl.zeros((BLOCK_HIDDEN, BLOCK_C), tl.float32)
    bias_grad = tl.zeros((BLOCK_HIDDEN,), tl.float32)
    grad_sum = tl.zeros((BLOCK_C,), tl.float32)
    start = part * tiles_each * BLOCK_M
    for tile in range(tiles_each):
        m = start + tile * BLOCK_M + tl.arange(0, BLOCK_M)
        grad = load_rows(grad_ptr, m, tokens, c, rows, channels, grad_b, grad_n, grad_c)
        if drop_path_ptr is not None:
            grad *= drop_path_factors(drop_path_ptr, m, tokens, rows)
        grad_sum += tl.sum(grad, axis=0)
        grad = grad.to(DTYPE)
        x = load_rows(x_ptr, m, tokens, c, rows, channels, x_b, x_n, x_c)
        normalised, _ = normalise(x, m, c, rows, channels, mean_ptr, var_ptr, eps, NORM)
        z = (normalised * gamma + beta).to(DTYPE)
        fc1 = weight_chunk(fc1_weight_ptr, h, c, hidden, channels)
        value = dot(fc1, tl.trans(z), tl.zeros((BLOCK_HIDDEN, BLOCK_M), tl.float32)) + fc1_bias
        if VALUE:
            fc2 = weight_chunk(fc2_weight_ptr, c, h, channels, hidden)
            value_grad = dot(
                tl.trans(fc2), tl.trans(grad), tl.zeros((BLOCK_HIDDEN, BLOCK_M), tl.float32)
            ) * activated_gradient(value, ACTIVATION, DTYPE)
            bias_grad += tl.sum(value_grad, axis=1)
            if FC1:
                fc1_grad = dot(value_grad.to(DTYPE), normalised.to(DTYPE), fc1_grad)
        if FC2:
            # Rows outside have no gradient, so what is activated there does not count.
            fc2_grad = dot(activated(value, ACTIVATION, DTYPE).to(DTYPE), grad, fc2_grad)

    own = (h < hidden)[:, None] & (c < channels)[None, :]
    base = parts_ptr + part.to(tl.int64) * columns
    sums = sums_ptr + tl.program_id(0).to(tl.int64) * 4 * channels + c
    if FC1:
        # The norm's sums over the tokens: fc1^T times what is summed here.
        fc1 = weight_chunk(fc1_weight_ptr, h, c, hidden, channels).to(tl.float32)
        tl.store(sums, tl.sum(fc1 * bias_grad[:, None], axis=0), mask=c < channels)
        tl.store(sums + channels, tl.sum(fc1 * fc1_grad, axis=0), mask=c < channels)
        # With z = normalised * gamma + beta in place of what was multiplied.
        tl.store(
            base + h[:, None] * channels + c[None, :], fc1_grad * gamma + bias_grad[:, None] * beta, mask=own
        )
        base += hidden * channels
    if FC2:
        tl.store(base + h[:, None] * channels + c[None, :], fc2_grad, mask=own)
        base += hidden * channels
    if VALUE:
        tl.store(base + h, bias_grad, mask=h < hidden)
    # Every chunk sees all of these rows; one says so.
    tl.store(sums + 2 * channels, tl.where(c + chunk * BLOCK_C < BLOCK_C, grad_sum, 0.0), mask=c < channels)
    if plain_fc2_weight_ptr is not None:
        plain = weight_chunk(plain_fc2_weight_ptr, c, h, channels, hidden).to(tl.float32)
        tl.store(sums + 3 * channels, tl.sum(tl.trans(plain) * fc2_grad, axis=0), mask=c < channels)


@jit
def _column_sum(ptr, first, count, stride, k, size, BLOCK_P: tl.constexpr):
    """Sum over ``count`` parts, ``stride`` values apart, of the values k < ``size`` from ``first`` on."""
    total = tl.zeros((k.shape[0],), tl.float32)
    for start in range(0, count, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        ok = (p < count)[:, None] & (k < size)[None, :]
        where = ptr + first + p.to(tl.int64)[:, None] * stride + k[None, :]
        total += tl.sum(tl.load(where, mask=ok, other=0.0), axis=0)
    return total


@jit
def _store_vector(ptr, value, k, size):
    if ptr is not None:
        tl.store(ptr + k, value.to(ptr.dtype.element_ty), mask=(k >= 0) & (k < size))


@jit
def finish_kernel(
    parts_ptr,
    sums_ptr,
    layer_scale_ptr,
    fc2_bias_ptr,
    fc1_weight_grad_ptr,
    fc1_bias_grad_ptr,
    fc2_weight_grad_ptr,
    fc2_bias_grad_ptr,
    norm_weight_grad_ptr,
    norm_bias_grad_ptr,
    layer_scale_grad_ptr,
    norm_sums_ptr,
    parts,
    sum_parts,
    columns,
    channels,
    hidden,
    VALUE: tl.constexpr,
    FC1: tl.constexpr,
    FC2: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Sum what :func:`weights_kernel` wrote, in a fixed order, and store each gradient where it goes.

    Programs take BLOCK_K columns each: first those of the parts, then the channels of the sums.
    ``norm_sums_ptr`` (2, C) gets the norm's two sums.
    """
    column_blocks = tl.cdiv(columns, BLOCK_K)
    pid = tl.program_id(0)
    if pid < column_blocks:
        k = pid * BLOCK_K + tl.arange(0, BLOCK_K)
        total = _column_sum(parts_ptr, 0, parts, columns, k, columns, BLOCK_P)
        if FC1:
            _store_vector(fc1_weight_grad_ptr, total, k, hidden * channels)
            k -= hidden * channels
        if FC2:
            if fc2_weight_grad_ptr is not None:
                ok = (k >= 0) & (k < hidden * channels)
                value = total
                if layer_scale_ptr is not None:
                    value *= tl.load(layer_scale_ptr + k % channels, mask=ok, other=0.0).to(tl.float32)
                where = fc2_weight_grad_ptr + k % channels * hidden + k // channels
                tl.store(where, value.to(fc2_weight_grad_ptr.dtype.element_ty), mask=ok)
            k -= hidden * channels
        if VALUE:
            _store_vector(fc1_bias_grad_ptr, total, k, hidden)
    else:
        c = (pid - column_blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
        stride = 4 * channels
        if FC1:
            bias_sum = _column_sum(sums_ptr, 0, sum_parts, stride, c, channels, BLOCK_P)
            weight_sum = _column_sum(sums_ptr, channels, sum_parts, stride, c, channels, BLOCK_P)
            _store_vector(norm_bias_grad_ptr, bias_sum, c, channels)
            _store_vector(norm_weight_grad_ptr, weight_sum, c, channels)
            if norm_sums_ptr is not None:
                _store_vector(norm_sums_ptr, bias_sum, c, channels)
                _store_vector(norm_sums_ptr + channels, weight_sum, c, channels)
        grad_sum = _column_sum(sums_ptr, 2 * channels, sum_parts, stride, c, channels, BLOCK_P)
        if layer_scale_grad_ptr is not None:
            value = _column_sum(sums_ptr, 3 * channels, sum_parts, stride, c, channels, BLOCK_P)
            if fc2_bias_ptr is not None:
                bias = tl.load(fc2_bias_ptr + c, mask=c < channels, other=0.0).to(tl.float32)
                value += bias * grad_sum
            _store_vector(layer_scale_grad_ptr, value, c, channels)
        if layer_scale_ptr is not None:
            grad_sum *= tl.load(layer_scale_ptr + c, mask=c < channels, other=0.0).to(tl.float32)
        _store_vector(fc2_bias_grad_ptr, grad_sum, c, channels)


@jit
def input_kernel(
    grad_ptr,
    x_ptr,
    fc1_weight_ptr,
    fc1_bias_ptr,
    fc2_weight_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    mean_ptr,
    var_ptr,
    norm_sums_ptr,
    drop_path_ptr,
    x_grad_ptr,
    rows,
    tokens,
    channels,
    hidden,
    grad_b,
    grad_n,
    grad_c,
    x_b,
    x_n,
    x_c,
    x_grad_b,
    x_grad_n,
    x_grad_c,
    eps,
    one_over_count,
    NORM: tl.constexpr,
    ACTIVATION: tl.constexpr,
    IDENTITY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    """One tile of the input's gradient; ``norm_sums_ptr`` is given where batch statistics normalised."""
    DTYPE: tl.constexpr = fc1_weight_ptr.dtype.element_ty
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.arange(0, BLOCK_C)
    gamma = vector(norm_weight_ptr, c, channels, 1.0)
    grad = load_rows(grad_ptr, m, tokens, c, rows, channels, grad_b, grad_n, grad_c)
    if drop_path_ptr is not None:
        grad *= drop_path_factors(drop_path_ptr, m, tokens, rows)
    grad = grad.to(DTYPE)
    x = load_rows(x_ptr, m, tokens, c, rows, channels, x_b, x_n, x_c)
    z, _ = normalise(x, m, c, rows, channels, mean_ptr, var_ptr, eps, NORM)
    z = (z * gamma + vector(norm_bias_ptr, c, channels, 0.0)).to(DTYPE)
    z_grad = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for chunk in range(0, hidden, BLOCK_HIDDEN):
        h = chunk + tl.arange(0, BLOCK_HIDDEN)
        fc1 = weight_chunk(fc1_weight_ptr, h, c, hidden, channels)
        value = dot(z, tl.trans(fc1), tl.zeros((BLOCK_M, BLOCK_HIDDEN), tl.float32))
        value += vector(fc1_bias_ptr, h, hidden, 0.0)
        fc2 = weight_chunk(fc2_weight_ptr, c, h, channels, hidden)
        value_grad = dot(grad, fc2, tl.zeros((BLOCK_M, BLOCK_HIDDEN), tl.float32))
        value_grad *= activated_gradient(value, ACTIVATION, DTYPE)
        z_grad = dot(value_grad.to(DTYPE), fc1, z_grad)
    if NORM != "none":
        # From the cache: kept through the loop, it would take registers.
        x = load_rows(x_ptr, m, tokens, c, rows, channels, x_b, x_n, x_c)
    x_grad = norm_backward(
        z_grad, x, m, c, rows, channels, norm_weight_ptr, mean_ptr, var_ptr, norm_sums_ptr, eps,
        one_over_count, NORM,
    )  # fmt: skip
    if IDENTITY:
        x_grad += load_rows(grad_ptr, m, tokens, c, rows, channels, grad_b, grad_n, grad_c)
    ok = (m < rows)[:, None] & (c < channels)[None, :]
    where = row_pointers(x_grad_ptr, m, tokens, c, x_grad_b, x_grad_n, x_grad_c)
    tl.store(where, x_grad.to(x_grad_ptr.dtype.element_ty), mask=ok)
