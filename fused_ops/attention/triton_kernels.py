"""Triton kernels for attention with few keys: all keys of a head lie in one tile.

A program owns one head of one image and some of its queries. It loads the keys and values once and walks over
tiles of queries. The softmax sees its whole row at once, so that there is no running maximum, and backward
recomputes the probabilities from queries and keys alone.

Keys and the width of a head are padded to powers of two inside the tiles, and never in memory.
"""

from __future__ import annotations

from fused_ops.core.triton_attention import dot, keep, keep_transposed, load, store
from fused_ops.core.triton_support import jit, tl


@jit
def _keys_taken(mask_ptr, image, k, keys, mask_b, mask_k):
    """Which of the keys ``k`` exist and are not masked."""
    taken = k < keys
    if mask_ptr is not None:
        where = image.to(tl.int64) * mask_b + k.to(tl.int64) * mask_k
        taken = taken & (tl.load(mask_ptr + where, mask=taken, other=0) != 0)
    return taken


@jit
def forward_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    bias_ptr,
    mask_ptr,
    seed_ptr,
    out_ptr,
    queries,
    keys,
    heads,
    parts,
    part_queries,
    query_b,
    query_n,
    query_h,
    query_d,
    key_b,
    key_n,
    key_h,
    key_d,
    value_b,
    value_n,
    value_h,
    value_d,
    bias_h,
    bias_n,
    bias_k,
    mask_b,
    mask_k,
    out_b,
    out_n,
    out_h,
    scale,
    threshold,
    keep_scale,
    DROPOUT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One part of the queries of one head. ``scale`` has log2(e) in it, since powers of two are cheaper."""
    head = tl.program_id(0) % heads
    part = (tl.program_id(0) // heads) % parts
    image = tl.program_id(0) // (heads * parts)
    query_ptr += image.to(tl.int64) * query_b + head.to(tl.int64) * query_h
    key_ptr += image.to(tl.int64) * key_b + head.to(tl.int64) * key_h
    value_ptr += image.to(tl.int64) * value_b + head.to(tl.int64) * value_h
    out_ptr += image.to(tl.int64) * out_b + head.to(tl.int64) * out_h
    k = tl.arange(0, BLOCK_K)
    d = tl.arange(0, BLOCK_D)
    taken = _keys_taken(mask_ptr, image, k, keys, mask_b, mask_k)
    key = load(key_ptr, k, d, key_n, key_d, keys, HEAD_DIM)
    value = load(value_ptr, k, d, value_n, value_d, keys, HEAD_DIM)
    first = part * part_queries
    last = tl.minimum(first + part_queries, queries)
    for start in range(first, last, BLOCK_M):
        q = start + tl.arange(0, BLOCK_M)
        query = load(query_ptr, q, d, query_n, query_d, queries, HEAD_DIM)
        scores = dot(query, tl.trans(key), UPCAST, PRECISION) * scale
        if bias_ptr is not None:
            # (BLOCK_M, BLOCK_K)
            bias_where = q.to(tl.int64)[:, None] * bias_n + k.to(tl.int64)[None, :] * bias_k
            bias_ok = (q < queries)[:, None] & (k < keys)[None, :]
            bias = tl.load(bias_ptr + head.to(tl.int64) * bias_h + bias_where, mask=bias_ok, other=0.0)
            scores += bias.to(tl.float32) * 1.4426950408889634
        scores = tl.where(taken[None, :], scores, float("-inf"))
        largest = tl.max(scores, axis=1)
        # Without any key the largest score is minus infinity, and its difference to itself no number.
        largest = tl.where(largest == float("-inf"), 0.0, largest)
        weights = tl.exp2(scores - largest[:, None])
        total = tl.sum(weights, axis=1)
        if DROPOUT:
            kept = keep(seed_ptr, q, 0, image * heads + head, threshold, BLOCK_M, BLOCK_K)
            weights = tl.where(kept, weights, 0.0)
        # Weights of a query without any key are zeros, which any factor leaves as they are.
        factor = (keep_scale / tl.where(total == 0.0, 1.0, total))[:, None]
        weights = weights.to(value_ptr.dtype.element_ty)
        out = dot(weights, value, UPCAST, PRECISION) * factor
        store(out_ptr, out, q, d, out_n, 1, queries, HEAD_DIM)


@jit
def backward_kernel(
    grad_ptr,
    query_ptr,
    key_ptr,
    value_ptr,
    bias_ptr,
    mask_ptr,
    seed_ptr,
    query_grad_ptr,
    key_grad_ptr,
    value_grad_ptr,
    score_grad_ptr,
    queries,
    keys,
    heads,
    parts,
    part_queries,
    part_stride,
    grad_b,
    grad_n,
    grad_h,
    grad_d,
    query_b,
    query_n,
    query_h,
    query_d,
    key_b,
    key_n,
    key_h,
    key_d,
    value_b,
    value_n,
    value_h,
    value_d,
    bias_h,
    bias_n,
    bias_k,
    mask_b,
    mask_k,
    scale,
    score_scale,
    threshold,
    keep_scale,
    DROPOUT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients from one part of the queries of one head; each only where its pointer is given.

    Tiles of scores have keys as rows, so that a tile just computed is the first operand of the products that
    add up in the gradients of keys and values, and need not leave the registers. Those gradients are written
    to part ``part`` of (parts, ..., B, Nk, heads, HEAD_DIM), with ``part_stride`` values between parts.
    ``score_grad_ptr`` takes the gradient of the scores, (B, heads, N, Nk) in float32. ``score_scale`` is
    ``scale`` times log2(e).
    """
    head = tl.program_id(0) % heads
    part = (tl.program_id(0) // heads) % parts
    image = tl.program_id(0) // (heads * parts)
    row = image * heads + head
    grad_ptr += image.to(tl.int64) * grad_b + head.to(tl.int64) * grad_h
    query_ptr += image.to(tl.int64) * query_b + head.to(tl.int64) * query_h
    key_ptr += image.to(tl.int64) * key_b + head.to(tl.int64) * key_h
    value_ptr += image.to(tl.int64) * value_b + head.to(tl.int64) * value_h
    # Gradients are dense (B, tokens, heads, HEAD_DIM).
    token = tl.cast(heads, tl.int64) * HEAD_DIM
    k = tl.arange(0, BLOCK_K)
    d = tl.arange(0, BLOCK_D)
    taken = _keys_taken(mask_ptr, image, k, keys, mask_b, mask_k)
    key = load(key_ptr, k, d, key_n, key_d, keys, HEAD_DIM)
    value = load(value_ptr, k, d, value_n, value_d, keys, HEAD_DIM)
    if key_grad_ptr is not None:
        key_sum = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    if value_grad_ptr is not None:
        value_sum = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    first = part * part_queries
    last = tl.minimum(first + part_queries, queries)
    for start in range(first, last, BLOCK_M):
        q = start + tl.arange(0, BLOCK_M)
        query = load(query_ptr, q, d, query_n, query_d, queries, HEAD_DIM)
        grad = load(grad_ptr, q, d, grad_n, grad_d, queries, HEAD_DIM)
        scores = dot(key, tl.trans(query), UPCAST, PRECISION) * score_scale
        if bias_ptr is not None:
            # (BLOCK_K, BLOCK_M)
            bias_where = q.to(tl.int64)[None, :] * bias_n + k.to(tl.int64)[:, None] * bias_k
            bias_ok = (q < queries)[None, :] & (k < keys)[:, None]
            bias = tl.load(bias_ptr + head.to(tl.int64) * bias_h + bias_where, mask=bias_ok, other=0.0)
            scores += bias.to(tl.float32) * 1.4426950408889634
        scores = tl.where(taken[:, None], scores, float("-inf"))
        largest = tl.max(scores, axis=0)
        largest = tl.where(largest == float("-inf"), 0.0, largest)
        weights = tl.exp2(scores - largest[None, :])
        total = tl.sum(weights, axis=0)
        weights *= (1.0 / tl.where(total == 0.0, 1.0, total))[None, :]
        dropped = weights
        if DROPOUT:
            kept = keep_transposed(seed_ptr, q, 0, row, threshold, BLOCK_M, BLOCK_K)
            dropped = tl.where(kept, weights * keep_scale, 0.0)
        if value_grad_ptr is not None:
            dropped = dropped.to(grad_ptr.dtype.element_ty)
            value_sum += dot(dropped, grad, UPCAST, PRECISION)
        if query_grad_ptr is not None or key_grad_ptr is not None or score_grad_ptr is not None:
            weight_grad = dot(value, tl.trans(grad), UPCAST, PRECISION)
            if DROPOUT:
                weight_grad = tl.where(kept, weight_grad * keep_scale, 0.0)
            delta = tl.sum(weights * weight_grad, axis=0)
            score_grad = weights * (weight_grad - delta[None, :])
            if score_grad_ptr is not None:
                scores_where = (row.to(tl.int64) * queries + q[None, :]) * keys + k[:, None]
                scores_ok = (q < queries)[None, :] & (k < keys)[:, None]
                tl.store(score_grad_ptr + scores_where, score_grad, mask=scores_ok)
            score_grad = score_grad.to(query_ptr.dtype.element_ty)
            if key_grad_ptr is not None:
                key_sum += dot(score_grad, query, UPCAST, PRECISION)
            if query_grad_ptr is not None:
                target = query_grad_ptr + image.to(tl.int64) * queries * token + head * HEAD_DIM
                query_grad = dot(tl.trans(score_grad), key, UPCAST, PRECISION) * scale
                store(target, query_grad, q, d, token, 1, queries, HEAD_DIM)
    offset = part.to(tl.int64) * part_stride + image.to(tl.int64) * keys * token + head * HEAD_DIM
    if key_grad_ptr is not None:
        store(key_grad_ptr + offset, key_sum * scale, k, d, token, 1, keys, HEAD_DIM)
    if value_grad_ptr is not None:
        store(value_grad_ptr + offset, value_sum, k, d, token, 1, keys, HEAD_DIM)


@jit
def sum_parts_kernel(
    parts_ptr, first_ptr, second_ptr, parts, part_stride, second_start, count, BLOCK: tl.constexpr
):
    """Sums over parts, in their order, of one or two sets of ``count`` values that each part has.

    Programs of axis 1 take the set: the first starts at 0, the second at ``second_start`` of a part.
    """
    which = tl.program_id(1)
    where = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = where < count
    source = parts_ptr + which.to(tl.int64) * second_start
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(parts):
        total += tl.load(source + tl.cast(part, tl.int64) * part_stride + where, mask=ok, other=0.0)
    # The set as a block, since a mask takes no scalars.
    sets = which + tl.zeros((BLOCK,), tl.int32)
    tl.store(first_ptr + where, total.to(first_ptr.dtype.element_ty), mask=ok & (sets == 0))
    if second_ptr is not None:
        tl.store(second_ptr + where, total.to(second_ptr.dtype.element_ty), mask=ok & (sets == 1))
