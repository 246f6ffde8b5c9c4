"""Triton kernels of the attention block: LayerNorm, attention with few keys, projections and residual.

Both projections are in the keys and values, which are as wide as the map then (see ``block.py``): a program
walks over tiles of tokens, and per head multiplies with one tile of keys and one of values. Nothing but the
result is written; backward recomputes the norm and the probabilities.
"""

from __future__ import annotations

from fused_ops.core.triton_attention import dot
from fused_ops.core.triton_layer_norm import normalise_rows, normalise_rows_backward
from fused_ops.core.triton_matrices import vector
from fused_ops.core.triton_support import jit, tl


@jit
def _head_tile(pointer, head, k, c, head_stride, key_stride, channel_stride, keys, channels):
    """Keys or values (BLOCK_K, BLOCK_C) of a head; zeros outside."""
    where = k.to(tl.int64)[:, None] * key_stride + c.to(tl.int64)[None, :] * channel_stride
    ok = (k < keys)[:, None] & (c < channels)[None, :]
    return tl.load(pointer + tl.cast(head, tl.int64) * head_stride + where, mask=ok, other=0.0)


@jit
def _score_bias(pointer, head, k, head_stride, key_stride, keys):
    """What is added to all scores of a key (BLOCK_K), for powers of two; minus infinity without a key."""
    if pointer is not None:
        where = tl.cast(head, tl.int64) * head_stride + k.to(tl.int64) * key_stride
        bias = (
            tl.load(pointer + where, mask=k < keys, other=float("-inf")).to(tl.float32) * 1.4426950408889634
        )
    else:
        bias = tl.where(k < keys, 0.0, float("-inf"))
    return bias


@jit
def _probabilities(scores, bias):
    """Softmax over the keys of scores (BLOCK_M, BLOCK_K) for powers of two; zeros without any key."""
    scores += bias[None, :]
    largest = tl.max(scores, axis=1)
    # Without any key the largest score is minus infinity, and its difference to itself no number.
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    weights = tl.exp2(scores - largest[:, None])
    total = tl.sum(weights, axis=1)
    return weights * (1.0 / tl.where(total == 0.0, 1.0, total))[:, None]


@jit
def block_forward_kernel(
    x_ptr,
    key_ptr,
    value_ptr,
    score_bias_ptr,
    out_bias_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    residual_ptr,
    drop_path_ptr,
    out_ptr,
    tokens,
    keys,
    channels,
    heads,
    parts,
    part_tokens,
    x_b,
    x_n,
    x_c,
    key_b,
    key_h,
    key_n,
    key_c,
    value_b,
    value_h,
    value_n,
    value_c,
    score_b,
    score_h,
    score_n,
    residual_b,
    residual_n,
    residual_c,
    scale,
    eps,
    NORM: tl.constexpr,
    IDENTITY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One part of the tokens of one image. ``scale`` has log2(e) in it."""
    DTYPE: tl.constexpr = key_ptr.dtype.element_ty
    part = tl.program_id(0) % parts
    image = (tl.program_id(0) // parts).to(tl.int64)
    x_ptr += image * x_b
    key_ptr += image * key_b
    value_ptr += image * value_b
    out_ptr += image * tokens * channels
    if score_bias_ptr is not None:
        score_bias_ptr += image * score_b
    if residual_ptr is not None:
        residual_ptr += image * residual_b
    k = tl.arange(0, BLOCK_K)
    c = tl.arange(0, BLOCK_C)
    gamma = vector(norm_weight_ptr, c, channels, 1.0)
    beta = vector(norm_bias_ptr, c, channels, 0.0)
    out_bias = vector(out_bias_ptr, c, channels, 0.0)
    first = part * part_tokens
    last = tl.minimum(first + part_tokens, tokens)
    for start in range(first, last, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        x = load_tokens(x_ptr, m, c, x_n, x_c, tokens, channels)
        z = x
        if NORM:
            normalised = normalise_rows(x, (c < channels)[None, :], channels, eps)[0]
            z = normalised * gamma + beta
        z = z.to(DTYPE)
        out = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
        for head in range(heads):
            key = _head_tile(key_ptr, head, k, c, key_h, key_n, key_c, keys, channels)
            weights = _probabilities(
                dot(z, tl.trans(key), UPCAST, PRECISION) * scale,
                _score_bias(score_bias_ptr, head, k, score_h, score_n, keys),
            )
            value = _head_tile(value_ptr, head, k, c, value_h, value_n, value_c, keys, channels)
            out += dot(weights.to(DTYPE), value, UPCAST, PRECISION)
        out += out_bias
        if drop_path_ptr is not None:
            out *= tl.load(drop_path_ptr + image).to(tl.float32)
        if IDENTITY:
            # Once more, from cache: kept, it would be held in registers beside everything else.
            out += load_tokens(x_ptr, m, c, x_n, x_c, tokens, channels)
        if residual_ptr is not None:
            out += load_tokens(residual_ptr, m, c, residual_n, residual_c, tokens, channels)
        where = m.to(tl.int64)[:, None] * channels + c[None, :]
        ok = (m < tokens)[:, None] & (c < channels)[None, :]
        tl.store(out_ptr + where, out.to(out_ptr.dtype.element_ty), mask=ok)


@jit
def load_tokens(pointer, m, c, token_stride, channel_stride, tokens, channels):
    """Tokens (BLOCK_M, BLOCK_C) of one image in float32; zeros outside."""
    where = m.to(tl.int64)[:, None] * token_stride + c.to(tl.int64)[None, :] * channel_stride
    ok = (m < tokens)[:, None] & (c < channels)[None, :]
    return tl.load(pointer + where, mask=ok, other=0.0).to(tl.float32)


@jit
def block_backward_kernel(
    grad_ptr,
    x_ptr,
    key_ptr,
    value_ptr,
    score_bias_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    drop_path_ptr,
    x_grad_ptr,
    key_grad_ptr,
    value_grad_ptr,
    score_grad_ptr,
    sums_ptr,
    tokens,
    keys,
    channels,
    heads,
    parts,
    part_tokens,
    part_stride,
    score_part_stride,
    grad_b,
    grad_n,
    grad_c,
    x_b,
    x_n,
    x_c,
    key_b,
    key_h,
    key_n,
    key_c,
    value_b,
    value_h,
    value_n,
    value_c,
    score_b,
    score_h,
    score_n,
    scale,
    score_scale,
    eps,
    NORM: tl.constexpr,
    IDENTITY: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of one head's keys, values and score biases, from one part of the tokens of one image.

    They are written as (parts, B, heads, Nk, C) and (parts, B, heads, Nk) in float32, with ``part_stride``
    and ``score_part_stride`` values between parts; axis 1 of the grid is the head. ROWS, for one head only:
    also what :func:`block_rows_kernel` gives.

    Tiles of scores have keys as rows, so that they are the first operand of the products that add up.
    """
    DTYPE: tl.constexpr = key_ptr.dtype.element_ty
    part = tl.program_id(0) % parts
    image = (tl.program_id(0) // parts).to(tl.int64)
    head = tl.program_id(1)
    grad_ptr += image * grad_b
    x_ptr += image * x_b
    key_ptr += image * key_b
    value_ptr += image * value_b
    if score_bias_ptr is not None:
        score_bias_ptr += image * score_b
    if ROWS:
        x_grad_ptr += image * tokens * channels
    k = tl.arange(0, BLOCK_K)
    c = tl.arange(0, BLOCK_C)
    gamma = vector(norm_weight_ptr, c, channels, 1.0)
    beta = vector(norm_bias_ptr, c, channels, 0.0)
    key = _head_tile(key_ptr, head, k, c, key_h, key_n, key_c, keys, channels)
    value = _head_tile(value_ptr, head, k, c, value_h, value_n, value_c, keys, channels)
    bias = _score_bias(score_bias_ptr, head, k, score_h, score_n, keys)
    key_sum = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
    value_sum = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
    score_sum = tl.zeros((BLOCK_K,), tl.float32)
    if ROWS:
        norm_weight_sum = tl.zeros((BLOCK_C,), tl.float32)
        norm_bias_sum = tl.zeros((BLOCK_C,), tl.float32)
        out_bias_sum = tl.zeros((BLOCK_C,), tl.float32)
    first = part * part_tokens
    last = tl.minimum(first + part_tokens, tokens)
    for start in range(first, last, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        z = load_tokens(x_ptr, m, c, x_n, x_c, tokens, channels)
        if NORM:
            normalised = normalise_rows(z, (c < channels)[None, :], channels, eps)[0]
            z = normalised * gamma + beta
        z = z.to(DTYPE)
        grad = load_tokens(grad_ptr, m, c, grad_n, grad_c, tokens, channels)
        if drop_path_ptr is not None:
            grad *= tl.load(drop_path_ptr + image).to(tl.float32)
        if ROWS:
            out_bias_sum += tl.sum(grad, axis=0)
        grad = grad.to(DTYPE)
        weights, score_grad = _score_gradients(z, grad, key, value, bias, score_scale, UPCAST, PRECISION)
        value_sum += dot(weights.to(DTYPE), grad, UPCAST, PRECISION)
        # Tokens outside have no gradient, and so none of their scores has one.
        score_sum += tl.sum(score_grad, axis=1)
        score_grad = score_grad.to(DTYPE)
        key_sum += dot(score_grad, z, UPCAST, PRECISION)
        if ROWS:
            z_grad = dot(tl.trans(score_grad), key, UPCAST, PRECISION)
        if ROWS:
            weight_share, bias_share = _store_token_gradient(
                x_grad_ptr, z_grad * scale, x_ptr, grad_ptr, m, c, gamma, x_n, x_c, grad_n, grad_c, tokens,
                channels, eps, NORM, IDENTITY,
            )  # fmt: skip
            norm_weight_sum += weight_share
            norm_bias_sum += bias_share
    row = (image * heads + head) * keys
    where = row * channels + k[:, None] * channels + c[None, :]
    ok = (k < keys)[:, None] & (c < channels)[None, :]
    where += part.to(tl.int64) * part_stride
    tl.store(key_grad_ptr + where, (key_sum * scale).to(key_grad_ptr.dtype.element_ty), mask=ok)
    tl.store(value_grad_ptr + where, value_sum.to(value_grad_ptr.dtype.element_ty), mask=ok)
    if score_grad_ptr is not None:
        where_score = part.to(tl.int64) * score_part_stride + row + k
        tl.store(score_grad_ptr + where_score, score_sum, mask=k < keys)
    if ROWS:
        _store_sums(sums_ptr, norm_weight_sum, norm_bias_sum, out_bias_sum, c, channels)


@jit
def _score_gradients(z, grad, key, value, bias, score_scale, UPCAST: tl.constexpr, PRECISION: tl.constexpr):
    """Probabilities (BLOCK_K, BLOCK_M) and the gradients of the scores, recomputed from tokens and keys."""
    scores = dot(key, tl.trans(z), UPCAST, PRECISION) * score_scale + bias[:, None]
    largest = tl.max(scores, axis=0)
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    weights = tl.exp2(scores - largest[None, :])
    total = tl.sum(weights, axis=0)
    weights *= (1.0 / tl.where(total == 0.0, 1.0, total))[None, :]
    weight_grad = dot(value, tl.trans(grad), UPCAST, PRECISION)
    delta = tl.sum(weights * weight_grad, axis=0)
    return weights, weights * (weight_grad - delta[None, :])


@jit
def _store_token_gradient(
    x_grad_ptr, z_grad, x_ptr, grad_ptr, m, c, gamma, x_n, x_c, grad_n, grad_c, tokens, channels, eps,
    NORM: tl.constexpr, IDENTITY: tl.constexpr,
):  # fmt: skip
    """Store tokens' gradient, given that of the norm's output; shares of the norm's own two gradients."""
    weight_share = tl.zeros((z_grad.shape[1],), tl.float32)
    bias_share = weight_share
    if NORM:
        # Once more, from cache: the normalised tile would be held in registers all the while.
        x = load_tokens(x_ptr, m, c, x_n, x_c, tokens, channels)
        normalised, rstd = normalise_rows(x, (c < channels)[None, :], channels, eps)
        weight_share = tl.sum(z_grad * normalised, axis=0)
        bias_share = tl.sum(z_grad, axis=0)
        z_grad = normalise_rows_backward(z_grad * gamma, normalised, rstd, channels)
    if IDENTITY:
        z_grad += load_tokens(grad_ptr, m, c, grad_n, grad_c, tokens, channels)
    where = m.to(tl.int64)[:, None] * channels + c[None, :]
    ok = (m < tokens)[:, None] & (c < channels)[None, :]
    tl.store(x_grad_ptr + where, z_grad.to(x_grad_ptr.dtype.element_ty), mask=ok)
    return weight_share, bias_share


@jit
def _store_sums(sums_ptr, norm_weight_sum, norm_bias_sum, out_bias_sum, c, channels):
    sums = sums_ptr + tl.program_id(0).to(tl.int64) * 3 * channels + c
    tl.store(sums, norm_weight_sum, mask=c < channels)
    tl.store(sums + channels, norm_bias_sum, mask=c < channels)
    tl.store(sums + 2 * channels, out_bias_sum, mask=c < channels)


@jit
def block_rows_kernel(
    grad_ptr,
    x_ptr,
    key_ptr,
    value_ptr,
    score_bias_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    drop_path_ptr,
    x_grad_ptr,
    sums_ptr,
    tokens,
    keys,
    channels,
    heads,
    parts,
    part_tokens,
    grad_b,
    grad_n,
    grad_c,
    x_b,
    x_n,
    x_c,
    key_b,
    key_h,
    key_n,
    key_c,
    value_b,
    value_h,
    value_n,
    value_c,
    score_b,
    score_h,
    score_n,
    scale,
    score_scale,
    eps,
    NORM: tl.constexpr,
    IDENTITY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of the tokens of one part of one image, through all heads; sums (programs, 3, C) for vectors.

    Of the norm's weight and bias and of the output's bias. ``score_scale`` has log2(e) in it.
    """
    DTYPE: tl.constexpr = key_ptr.dtype.element_ty
    part = tl.program_id(0) % parts
    image = (tl.program_id(0) // parts).to(tl.int64)
    grad_ptr += image * grad_b
    x_ptr += image * x_b
    x_grad_ptr += image * tokens * channels
    key_ptr += image * key_b
    value_ptr += image * value_b
    if score_bias_ptr is not None:
        score_bias_ptr += image * score_b
    k = tl.arange(0, BLOCK_K)
    c = tl.arange(0, BLOCK_C)
    gamma = vector(norm_weight_ptr, c, channels, 1.0)
    beta = vector(norm_bias_ptr, c, channels, 0.0)
    norm_weight_sum = tl.zeros((BLOCK_C,), tl.float32)
    norm_bias_sum = tl.zeros((BLOCK_C,), tl.float32)
    out_bias_sum = tl.zeros((BLOCK_C,), tl.float32)
    first = part * part_tokens
    last = tl.minimum(first + part_tokens, tokens)
    for start in range(first, last, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        z = load_tokens(x_ptr, m, c, x_n, x_c, tokens, channels)
        if NORM:
            normalised = normalise_rows(z, (c < channels)[None, :], channels, eps)[0]
            z = normalised * gamma + beta
        z = z.to(DTYPE)
        grad = load_tokens(grad_ptr, m, c, grad_n, grad_c, tokens, channels)
        if drop_path_ptr is not None:
            grad *= tl.load(drop_path_ptr + image).to(tl.float32)
        out_bias_sum += tl.sum(grad, axis=0)
        grad = grad.to(DTYPE)
        z_grad = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
        for head in range(heads):
            key = _head_tile(key_ptr, head, k, c, key_h, key_n, key_c, keys, channels)
            weights = _probabilities(
                dot(z, tl.trans(key), UPCAST, PRECISION) * score_scale,
                _score_bias(score_bias_ptr, head, k, score_h, score_n, keys),
            )
            value = _head_tile(value_ptr, head, k, c, value_h, value_n, value_c, keys, channels)
            weight_grad = dot(grad, tl.trans(value), UPCAST, PRECISION)
            delta = tl.sum(weights * weight_grad, axis=1)
            score_grad = weights * (weight_grad - delta[:, None])
            z_grad += dot(score_grad.to(DTYPE), key, UPCAST, PRECISION)
        weight_share, bias_share = _store_token_gradient(
            x_grad_ptr, z_grad * scale, x_ptr, grad_ptr, m, c, gamma, x_n, x_c, grad_n, grad_c, tokens,
            channels, eps, NORM, IDENTITY,
        )  # fmt: skip
        norm_weight_sum += weight_share
        norm_bias_sum += bias_share
    _store_sums(sums_ptr, norm_weight_sum, norm_bias_sum, out_bias_sum, c, channels)
