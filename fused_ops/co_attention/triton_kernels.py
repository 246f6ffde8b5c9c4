"""Triton kernels for co-attention: local tokens attend to global tokens and back.

A program owns one head of one image, a block of global tokens (rows of every tile of scores, except where the
text says otherwise) and a part of the local tokens (columns), over which it walks in tiles. Where one block
holds all global tokens (WHOLE), the softmax over them sees its whole column at once: such a program serves
both directions, and its backward recomputes that direction's weights from the inputs alone. Where it does
not, the programs from number ``split`` on own a tile of local tokens each and walk over all global tokens.

The softmax over the local tokens is a running one. Each part writes its outputs, divided by its own sum, and
the logarithm of that sum; merge_kernel adds the parts up in their order. All logarithms are to the base 2.

Numbers of tokens and the width of a head are padded to powers of two inside the tiles, never in memory.
"""

from __future__ import annotations

from fused_ops.core.triton_attention import dot, keep, keep_transposed, load, store
from fused_ops.core.triton_support import jit, tl


@jit
def _accumulate(
    scores,
    value,
    out,
    largest,
    total,
    query,
    first_key,
    seed_ptr,
    row,
    threshold,
    DROPOUT: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One step of a running softmax, by scores (QUERIES, KEYS) and values (KEYS, d).

    ``out`` (QUERIES, d) is the weighted sum of values, ``total`` the weights' sum and ``largest`` the largest
    score so far.
    """
    new = tl.maximum(largest, tl.max(scores, axis=1))
    weights = tl.exp2(scores - new[:, None])
    factor = tl.exp2(largest - new)
    total = total * factor + tl.sum(weights, axis=1)
    if DROPOUT:
        kept = keep(seed_ptr, query, first_key, row, threshold, QUERIES, KEYS)
        weights = tl.where(kept, weights, 0.0)
    out = out * factor[:, None] + dot(weights.to(value.dtype), value, UPCAST, PRECISION)
    return out, new, total


@jit
def _attend(
    query_tile,
    query,
    key_ptr,
    key_n,
    key_d,
    value_ptr,
    value_n,
    value_d,
    first,
    last,
    scale,
    seed_ptr,
    row,
    threshold,
    DROPOUT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Attention of ``query_tile`` (QUERIES, d), whose numbers are ``query``, on keys ``first`` to ``last``.

    Returns the weighted sum of values, divided by the sum of weights, and the logarithm of that sum.
    """
    d = tl.arange(0, BLOCK_D)
    out = tl.zeros((QUERIES, BLOCK_D), tl.float32)
    largest = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    for start in range(first, last, KEYS):
        k = start + tl.arange(0, KEYS)
        key = load(key_ptr, k, d, key_n, key_d, last, HEAD_DIM)
        value = load(value_ptr, k, d, value_n, value_d, last, HEAD_DIM)
        # (QUERIES, KEYS)
        scores = dot(query_tile, tl.trans(key), UPCAST, PRECISION) * scale
        scores = tl.where((k < last)[None, :], scores, float("-inf"))
        out, largest, total = _accumulate(
            scores,
            value,
            out,
            largest,
            total,
            query,
            start,
            seed_ptr,
            row,
            threshold,
            DROPOUT,
            QUERIES,
            KEYS,
            UPCAST,
            PRECISION,
        )
    return out / total[:, None], largest + tl.log2(total)


@jit
def forward_kernel(
    local_query_ptr,
    local_key_ptr,
    local_value_ptr,
    global_query_ptr,
    global_key_ptr,
    global_value_ptr,
    seed_ptr,
    local_out_ptr,
    local_lse_ptr,
    global_out_ptr,
    global_lse_ptr,
    locals_count,
    globals_count,
    heads,
    rows,
    blocks,
    parts,
    part_tokens,
    split,
    local_query_b,
    local_query_n,
    local_query_h,
    local_query_d,
    local_key_b,
    local_key_n,
    local_key_h,
    local_key_d,
    local_value_b,
    local_value_n,
    local_value_h,
    local_value_d,
    global_query_b,
    global_query_n,
    global_query_h,
    global_query_d,
    global_key_b,
    global_key_n,
    global_key_h,
    global_key_d,
    global_value_b,
    global_value_n,
    global_value_h,
    global_value_d,
    local_out_b,
    local_out_n,
    local_out_h,
    local_out_d,
    scale,
    threshold,
    keep_scale,
    WHOLE: tl.constexpr,
    SHARED: tl.constexpr,
    DROPOUT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Outputs of both streams. ``scale`` has log2(e) in it.

    ``global_out_ptr`` is (parts, B, M, heads, HEAD_DIM) and ``global_lse_ptr`` (parts, B, M, heads), dense;
    ``local_lse_ptr`` is (B, N, heads), dense, or None. ``rows`` is B times heads. SHARED: the scores of both
    directions are the same, and ``local_key_ptr`` and ``global_query_ptr`` are not read where WHOLE.
    """
    pid = tl.program_id(0)
    # ``split`` is a multiple of ``rows``.
    row = pid % rows
    head = row % heads
    image = row // heads
    local_query_ptr += image.to(tl.int64) * local_query_b + head.to(tl.int64) * local_query_h
    local_value_ptr += image.to(tl.int64) * local_value_b + head.to(tl.int64) * local_value_h
    global_key_ptr += image.to(tl.int64) * global_key_b + head.to(tl.int64) * global_key_h
    global_value_ptr += image.to(tl.int64) * global_value_b + head.to(tl.int64) * global_value_h
    local_out_ptr += image.to(tl.int64) * local_out_b + head.to(tl.int64) * local_out_h
    d = tl.arange(0, BLOCK_D)
    if not WHOLE:  # noqa: SIM102 (this one is decided when the kernel is compiled)
        if pid >= split:
            n = ((pid - split) // rows) * BLOCK_L + tl.arange(0, BLOCK_L)
            query = load(local_query_ptr, n, d, local_query_n, local_query_d, locals_count, HEAD_DIM)
            out, lse = _attend(
                query,
                n,
                global_key_ptr,
                global_key_n,
                global_key_d,
                global_value_ptr,
                global_value_n,
                global_value_d,
                0,
                globals_count,
                scale,
                seed_ptr,
                row,
                threshold,
                DROPOUT,
                HEAD_DIM,
                BLOCK_L,
                BLOCK_G,
                BLOCK_D,
                UPCAST,
                PRECISION,
            )
            store(local_out_ptr, out * keep_scale, n, d, local_out_n, local_out_d, locals_count, HEAD_DIM)
            if local_lse_ptr is not None:
                where = (image.to(tl.int64) * locals_count + n) * heads + head
                tl.store(local_lse_ptr + where, lse, mask=n < locals_count)
            return
    block = (pid // rows) % blocks
    part = pid // (rows * blocks)
    g = block * BLOCK_G + tl.arange(0, BLOCK_G)
    first = part * part_tokens
    last = tl.minimum(first + part_tokens, locals_count)
    if WHOLE:
        key = load(global_key_ptr, g, d, global_key_n, global_key_d, globals_count, HEAD_DIM)
        value = load(global_value_ptr, g, d, global_value_n, global_value_d, globals_count, HEAD_DIM)
        if SHARED:
            global_sum = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
            largest = tl.full((BLOCK_G,), float("-inf"), tl.float32)
            total = tl.zeros((BLOCK_G,), tl.float32)
        for start in range(first, last, BLOCK_L):
            n = start + tl.arange(0, BLOCK_L)
            query = load(local_query_ptr, n, d, local_query_n, local_query_d, last, HEAD_DIM)
            if SHARED:
                # (BLOCK_G, BLOCK_L), which the softmax over local tokens wants.
                affinity = dot(key, tl.trans(query), UPCAST, PRECISION) * scale
                scores = tl.trans(affinity)
            else:
                scores = dot(query, tl.trans(key), UPCAST, PRECISION) * scale
            # (BLOCK_L, BLOCK_G)
            scores = tl.where((g < globals_count)[None, :], scores, float("-inf"))
            weights = tl.exp2(scores - tl.max(scores, axis=1)[:, None])
            factor = keep_scale / tl.sum(weights, axis=1)
            if DROPOUT:
                kept = keep(seed_ptr, n, 0, row, threshold, BLOCK_L, BLOCK_G)
                weights = tl.where(kept, weights, 0.0)
            out = dot(weights.to(value.dtype), value, UPCAST, PRECISION) * factor[:, None]
            store(local_out_ptr, out, n, d, local_out_n, local_out_d, last, HEAD_DIM)
            if SHARED:
                local_value = load(local_value_ptr, n, d, local_value_n, local_value_d, last, HEAD_DIM)
                affinity = tl.where((n < last)[None, :], affinity, float("-inf"))
                global_sum, largest, total = _accumulate(
                    affinity,
                    local_value,
                    global_sum,
                    largest,
                    total,
                    g,
                    start,
                    seed_ptr,
                    rows + row,
                    threshold,
                    DROPOUT,
                    BLOCK_G,
                    BLOCK_L,
                    UPCAST,
                    PRECISION,
                )
    if WHOLE and SHARED:
        global_out = global_sum / total[:, None]
        global_lse = largest + tl.log2(total)
    else:
        global_query_ptr += image.to(tl.int64) * global_query_b + head.to(tl.int64) * global_query_h
        local_key_ptr += image.to(tl.int64) * local_key_b + head.to(tl.int64) * local_key_h
        global_query = load(global_query_ptr, g, d, global_query_n, global_query_d, globals_count, HEAD_DIM)
        global_out, global_lse = _attend(
            global_query,
            g,
            local_key_ptr,
            local_key_n,
            local_key_d,
            local_value_ptr,
            local_value_n,
            local_value_d,
            first,
            last,
            scale,
            seed_ptr,
            rows + row,
            threshold,
            DROPOUT,
            HEAD_DIM,
            BLOCK_G,
            BLOCK_L,
            BLOCK_D,
            UPCAST,
            PRECISION,
        )
    where = (part * (rows // heads) + image).to(tl.int64) * globals_count
    global_out_ptr += (where * heads + head) * HEAD_DIM
    store(global_out_ptr, global_out * keep_scale, g, d, heads * HEAD_DIM, 1, globals_count, HEAD_DIM)
    tl.store(global_lse_ptr + (where + g) * heads + head, global_lse, mask=g < globals_count)


@jit
def merge_kernel(
    out_parts_ptr,
    lse_parts_ptr,
    out_ptr,
    lse_ptr,
    rows,
    parts,
    HEAD_DIM: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Merges outputs (parts, rows, HEAD_DIM) and logarithms of sums (parts, rows), in the parts' order."""
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    d = tl.arange(0, BLOCK_D)
    out = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    largest = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    for part in range(parts):
        start = tl.cast(part, tl.int64) * rows
        lse = tl.load(lse_parts_ptr + start + r, mask=r < rows, other=0.0)
        part_out = load(out_parts_ptr + start * HEAD_DIM, r, d, HEAD_DIM, 1, rows, HEAD_DIM)
        new = tl.maximum(largest, lse)
        factor = tl.exp2(largest - new)
        weight = tl.exp2(lse - new)
        out = out * factor[:, None] + part_out * weight[:, None]
        total = total * factor + weight
        largest = new
    store(out_ptr, out / total[:, None], r, d, HEAD_DIM, 1, rows, HEAD_DIM)
    tl.store(lse_ptr + r, largest + tl.log2(total), mask=r < rows)


@jit
def _to_local_gradients(
    scores,
    value,
    grad,
    lse,
    delta,
    seed_ptr,
    n,
    first_g,
    row,
    threshold,
    keep_scale,
    WHOLE: tl.constexpr,
    DROPOUT: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_G: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Of the direction to local tokens: weights after dropout, and the gradient of the scores.

    Both are (BLOCK_G, BLOCK_L), as ``scores``; ``value`` is (BLOCK_G, d), ``grad`` (BLOCK_L, d). ``lse`` and
    ``delta`` (BLOCK_L) are None where WHOLE, since then they are at hand.
    """
    if WHOLE:
        weights = tl.exp2(scores - tl.max(scores, axis=0)[None, :])
        weights *= (1.0 / tl.sum(weights, axis=0))[None, :]
    else:
        weights = tl.exp2(scores - lse[None, :])
    weight_grad = dot(value, tl.trans(grad), UPCAST, PRECISION)
    dropped = weights
    if DROPOUT:
        kept = keep_transposed(seed_ptr, n, first_g, row, threshold, BLOCK_L, BLOCK_G)
        dropped = tl.where(kept, weights * keep_scale, 0.0)
        weight_grad = tl.where(kept, weight_grad * keep_scale, 0.0)
    if WHOLE:
        delta = tl.sum(weights * weight_grad, axis=0)
    return dropped, weights * (weight_grad - delta[None, :])


@jit
def _to_global_gradients(
    scores,
    value,
    grad,
    lse,
    delta,
    seed_ptr,
    g,
    first_n,
    row,
    threshold,
    keep_scale,
    DROPOUT: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_G: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The same of the direction to global tokens.

    ``value`` is (BLOCK_L, d), ``grad`` (BLOCK_G, d); ``lse`` and ``delta`` are (BLOCK_G).
    """
    weights = tl.exp2(scores - lse[:, None])
    weight_grad = dot(grad, tl.trans(value), UPCAST, PRECISION)
    dropped = weights
    if DROPOUT:
        kept = keep(seed_ptr, g, first_n, row, threshold, BLOCK_G, BLOCK_L)
        dropped = tl.where(kept, weights * keep_scale, 0.0)
        weight_grad = tl.where(kept, weight_grad * keep_scale, 0.0)
    return dropped, weights * (weight_grad - delta[:, None])


@jit
def _sums(out_ptr, lse_ptr, grad, rows, d, out_n, out_d, heads, row_count, HEAD_DIM: tl.constexpr):
    """Logarithms of sums (rows), and sums over d (rows) of outputs times their gradient ``grad`` (rows, d).

    The latter are what a softmax's backward takes off the gradients of its weights.
    """
    out = load(out_ptr, rows, d, out_n, out_d, row_count, HEAD_DIM)
    lse = tl.load(lse_ptr + rows.to(tl.int64) * heads, mask=rows < row_count, other=0.0)
    return lse, tl.sum(out.to(tl.float32) * grad.to(tl.float32), axis=1)


@jit
def _walk(
    x,
    value,
    global_grad,
    global_lse,
    global_delta,
    local_x_ptr,
    local_value_ptr,
    local_grad_ptr,
    local_out_ptr,
    local_lse_ptr,
    local_x_grad_ptr,
    local_value_grad_ptr,
    local_x_n,
    local_x_d,
    local_value_n,
    local_value_d,
    local_grad_n,
    local_grad_d,
    local_out_n,
    local_out_d,
    gradients_n,
    gradients_d,
    g,
    first_g,
    globals_count,
    first,
    last,
    heads,
    scale,
    score_scale,
    seed_ptr,
    row,
    rows,
    threshold,
    keep_scale,
    TO_LOCAL: tl.constexpr,
    TO_GLOBAL: tl.constexpr,
    X_GRAD: tl.constexpr,
    VALUE_GRAD: tl.constexpr,
    WHOLE: tl.constexpr,
    DROPOUT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Walks over a part of the local tokens with one block of global tokens.

    The scores are those of ``x`` (BLOCK_G, d) with the local tokens of ``local_x_ptr``; TO_LOCAL and
    TO_GLOBAL say whose softmax over them passes a gradient on. Local gradients are written where they have a
    pointer. Returns the gradients (BLOCK_G, d) of ``x``, without the scores' factor, and of ``value``.
    """
    d = tl.arange(0, BLOCK_D)
    x_sum = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
    value_sum = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
    for start in range(first, last, BLOCK_L):
        n = start + tl.arange(0, BLOCK_L)
        local_x = load(local_x_ptr, n, d, local_x_n, local_x_d, last, HEAD_DIM)
        # Tiles of scores and of all that is made from them are (BLOCK_G, BLOCK_L), so that the sums over
        # local tokens take them as first operand, out of registers.
        scores = dot(x, tl.trans(local_x), UPCAST, PRECISION) * score_scale
        if TO_LOCAL:
            grad = load(local_grad_ptr, n, d, local_grad_n, local_grad_d, last, HEAD_DIM)
            lse = None
            delta = None
            if not WHOLE:
                lse, delta = _sums(
                    local_out_ptr, local_lse_ptr, grad, n, d, local_out_n, local_out_d, heads, last, HEAD_DIM
                )
            dropped, score_grad = _to_local_gradients(
                tl.where((g < globals_count)[:, None], scores, float("-inf")),
                value,
                grad,
                lse,
                delta,
                seed_ptr,
                n,
                first_g,
                row,
                threshold,
                keep_scale,
                WHOLE,
                DROPOUT,
                BLOCK_L,
                BLOCK_G,
                UPCAST,
                PRECISION,
            )
            if VALUE_GRAD:
                value_sum += dot(dropped.to(grad.dtype), grad, UPCAST, PRECISION)
        if TO_GLOBAL:
            local_value = load(local_value_ptr, n, d, local_value_n, local_value_d, last, HEAD_DIM)
            dropped_back, score_grad_back = _to_global_gradients(
                tl.where((n < last)[None, :], scores, float("-inf")),
                local_value,
                global_grad,
                global_lse,
                global_delta,
                seed_ptr,
                g,
                start,
                rows + row,
                threshold,
                keep_scale,
                DROPOUT,
                BLOCK_L,
                BLOCK_G,
                UPCAST,
                PRECISION,
            )
            if local_value_grad_ptr is not None:
                dropped_back = tl.trans(dropped_back.to(global_grad.dtype))
                local_value_grad = dot(dropped_back, global_grad, UPCAST, PRECISION)
                store(local_value_grad_ptr, local_value_grad, n, d, gradients_n, gradients_d, last, HEAD_DIM)
            if TO_LOCAL:
                score_grad += score_grad_back
            else:
                score_grad = score_grad_back
        score_grad = score_grad.to(x.dtype)
        if X_GRAD:
            x_sum += dot(score_grad, local_x, UPCAST, PRECISION)
        if local_x_grad_ptr is not None:
            local_x_grad = dot(tl.trans(score_grad), x, UPCAST, PRECISION) * scale
            store(local_x_grad_ptr, local_x_grad, n, d, gradients_n, gradients_d, last, HEAD_DIM)
    return x_sum, value_sum


@jit
def backward_kernel(
    local_grad_ptr,
    global_grad_ptr,
    local_query_ptr,
    local_key_ptr,
    local_value_ptr,
    global_query_ptr,
    global_key_ptr,
    global_value_ptr,
    seed_ptr,
    local_out_ptr,
    local_lse_ptr,
    global_out_ptr,
    global_lse_ptr,
    local_query_grad_ptr,
    local_key_grad_ptr,
    local_value_grad_ptr,
    global_query_grad_ptr,
    global_key_grad_ptr,
    global_value_grad_ptr,
    locals_count,
    globals_count,
    heads,
    rows,
    blocks,
    parts,
    part_tokens,
    part_stride,
    split,
    local_grad_b,
    local_grad_n,
    local_grad_h,
    local_grad_d,
    global_grad_b,
    global_grad_n,
    global_grad_h,
    global_grad_d,
    local_query_b,
    local_query_n,
    local_query_h,
    local_query_d,
    local_key_b,
    local_key_n,
    local_key_h,
    local_key_d,
    local_value_b,
    local_value_n,
    local_value_h,
    local_value_d,
    global_query_b,
    global_query_n,
    global_query_h,
    global_query_d,
    global_key_b,
    global_key_n,
    global_key_h,
    global_key_d,
    global_value_b,
    global_value_n,
    global_value_h,
    global_value_d,
    local_out_b,
    local_out_n,
    local_out_h,
    local_out_d,
    gradients_b,
    gradients_n,
    gradients_h,
    gradients_d,
    scale,
    score_scale,
    threshold,
    keep_scale,
    TO_LOCAL: tl.constexpr,
    TO_GLOBAL: tl.constexpr,
    WHOLE: tl.constexpr,
    SHARED: tl.constexpr,
    DROPOUT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients, each only where its pointer is given.

    TO_LOCAL, TO_GLOBAL: the outputs of that direction have a gradient, and something before it wants one.
    SHARED: the scores are those of ``local_query`` and ``global_key``, whose gradients are the sums over both
    directions; ``local_key`` and ``global_query`` are not read. Local gradients have the strides
    ``gradients_*``. Global ones are (parts, ..., B, M, heads, HEAD_DIM), with ``part_stride`` values between
    parts. ``score_scale`` is ``scale`` times log2(e).
    """
    pid = tl.program_id(0)
    # ``split`` is a multiple of ``rows``.
    row = pid % rows
    head = row % heads
    image = row // heads
    local_query_ptr += image.to(tl.int64) * local_query_b + head.to(tl.int64) * local_query_h
    global_key_ptr += image.to(tl.int64) * global_key_b + head.to(tl.int64) * global_key_h
    # Scores of the direction to global tokens.
    if SHARED:
        back_x_ptr = global_key_ptr
        back_x_n = global_key_n
        back_x_d = global_key_d
        back_local_x_ptr = local_query_ptr
        back_local_x_n = local_query_n
        back_local_x_d = local_query_d
    else:
        back_x_ptr = (
            global_query_ptr + image.to(tl.int64) * global_query_b + head.to(tl.int64) * global_query_h
        )
        back_x_n = global_query_n
        back_x_d = global_query_d
        back_local_x_ptr = local_key_ptr + image.to(tl.int64) * local_key_b + head.to(tl.int64) * local_key_h
        back_local_x_n = local_key_n
        back_local_x_d = local_key_d
    local_value_ptr += image.to(tl.int64) * local_value_b + head.to(tl.int64) * local_value_h
    global_value_ptr += image.to(tl.int64) * global_value_b + head.to(tl.int64) * global_value_h
    local_start = image.to(tl.int64) * gradients_b + head.to(tl.int64) * gradients_h
    global_start = (image.to(tl.int64) * globals_count * heads + head) * HEAD_DIM
    if TO_LOCAL:
        local_grad_ptr += image.to(tl.int64) * local_grad_b + head.to(tl.int64) * local_grad_h
        if not WHOLE:
            local_out_ptr += image.to(tl.int64) * local_out_b + head.to(tl.int64) * local_out_h
            local_lse_ptr += image.to(tl.int64) * locals_count * heads + head
    if TO_GLOBAL:
        global_grad_ptr += image.to(tl.int64) * global_grad_b + head.to(tl.int64) * global_grad_h
        global_out_ptr += global_start
        global_lse_ptr += image.to(tl.int64) * globals_count * heads + head
    if local_query_grad_ptr is not None:
        local_query_grad_ptr += local_start
    if local_key_grad_ptr is not None:
        local_key_grad_ptr += local_start
    if local_value_grad_ptr is not None:
        local_value_grad_ptr += local_start
    if SHARED:
        back_local_x_grad_ptr = local_query_grad_ptr
        back_x_grad_ptr = global_key_grad_ptr
    else:
        back_local_x_grad_ptr = local_key_grad_ptr
        back_x_grad_ptr = global_query_grad_ptr
    d = tl.arange(0, BLOCK_D)

    if not WHOLE:  # noqa: SIM102 (this one is decided when the kernel is compiled)
        if pid >= split:
            first_n = ((pid - split) // rows) * BLOCK_L
            n = first_n + tl.arange(0, BLOCK_L)
            query_grad = tl.zeros((BLOCK_L, BLOCK_D), tl.float32)
            if TO_LOCAL and local_query_grad_ptr is not None:
                query = load(local_query_ptr, n, d, local_query_n, local_query_d, locals_count, HEAD_DIM)
                local_grad = load(local_grad_ptr, n, d, local_grad_n, local_grad_d, locals_count, HEAD_DIM)
                local_lse, local_delta = _sums(
                    local_out_ptr,
                    local_lse_ptr,
                    local_grad,
                    n,
                    d,
                    local_out_n,
                    local_out_d,
                    heads,
                    locals_count,
                    HEAD_DIM,
                )
                for start in range(0, globals_count, BLOCK_G):
                    g = start + tl.arange(0, BLOCK_G)
                    key = load(global_key_ptr, g, d, global_key_n, global_key_d, globals_count, HEAD_DIM)
                    value = load(
                        global_value_ptr, g, d, global_value_n, global_value_d, globals_count, HEAD_DIM
                    )
                    scores = dot(key, tl.trans(query), UPCAST, PRECISION) * score_scale
                    _, score_grad = _to_local_gradients(
                        tl.where((g < globals_count)[:, None], scores, float("-inf")),
                        value,
                        local_grad,
                        local_lse,
                        local_delta,
                        seed_ptr,
                        n,
                        start,
                        row,
                        threshold,
                        keep_scale,
                        WHOLE,
                        DROPOUT,
                        BLOCK_L,
                        BLOCK_G,
                        UPCAST,
                        PRECISION,
                    )
                    query_grad += dot(tl.trans(score_grad.to(key.dtype)), key, UPCAST, PRECISION)
            if TO_GLOBAL and (back_local_x_grad_ptr is not None or local_value_grad_ptr is not None):
                local_key = load(
                    back_local_x_ptr, n, d, back_local_x_n, back_local_x_d, locals_count, HEAD_DIM
                )
                local_value = load(
                    local_value_ptr, n, d, local_value_n, local_value_d, locals_count, HEAD_DIM
                )
                key_grad = tl.zeros((BLOCK_L, BLOCK_D), tl.float32)
                value_grad = tl.zeros((BLOCK_L, BLOCK_D), tl.float32)
                for start in range(0, globals_count, BLOCK_G):
                    g = start + tl.arange(0, BLOCK_G)
                    global_query = load(back_x_ptr, g, d, back_x_n, back_x_d, globals_count, HEAD_DIM)
                    global_grad = load(
                        global_grad_ptr, g, d, global_grad_n, global_grad_d, globals_count, HEAD_DIM
                    )
                    global_lse, global_delta = _sums(
                        global_out_ptr,
                        global_lse_ptr,
                        global_grad,
                        g,
                        d,
                        heads * HEAD_DIM,
                        1,
                        heads,
                        globals_count,
                        HEAD_DIM,
                    )
                    scores = dot(global_query, tl.trans(local_key), UPCAST, PRECISION) * score_scale
                    dropped, score_grad = _to_global_gradients(
                        tl.where((n < locals_count)[None, :], scores, float("-inf")),
                        local_value,
                        global_grad,
                        global_lse,
                        global_delta,
                        seed_ptr,
                        g,
                        first_n,
                        rows + row,
                        threshold,
                        keep_scale,
                        DROPOUT,
                        BLOCK_L,
                        BLOCK_G,
                        UPCAST,
                        PRECISION,
                    )
                    if local_value_grad_ptr is not None:
                        dropped = tl.trans(dropped.to(global_grad.dtype))
                        value_grad += dot(dropped, global_grad, UPCAST, PRECISION)
                    score_grad = tl.trans(score_grad.to(global_query.dtype))
                    key_grad += dot(score_grad, global_query, UPCAST, PRECISION)
                if local_value_grad_ptr is not None:
                    store(
                        local_value_grad_ptr,
                        value_grad,
                        n,
                        d,
                        gradients_n,
                        gradients_d,
                        locals_count,
                        HEAD_DIM,
                    )
                if SHARED:
                    query_grad += key_grad
                elif local_key_grad_ptr is not None:
                    key_grad *= scale
                    store(
                        local_key_grad_ptr, key_grad, n, d, gradients_n, gradients_d, locals_count, HEAD_DIM
                    )
            if local_query_grad_ptr is not None:
                query_grad *= scale
                store(
                    local_query_grad_ptr, query_grad, n, d, gradients_n, gradients_d, locals_count, HEAD_DIM
                )
            return

    first_g = ((pid // rows) % blocks) * BLOCK_G
    part = pid // (rows * blocks)
    g = first_g + tl.arange(0, BLOCK_G)
    first = part * part_tokens
    last = tl.minimum(first + part_tokens, locals_count)
    global_start += part.to(tl.int64) * part_stride
    if not WHOLE:
        # Other programs write these.
        local_query_grad_ptr = None
        local_key_grad_ptr = None
        local_value_grad_ptr = None
        back_local_x_grad_ptr = None
    global_value = None
    global_grad = None
    global_lse = None
    global_delta = None
    if TO_GLOBAL:
        global_grad = load(global_grad_ptr, g, d, global_grad_n, global_grad_d, globals_count, HEAD_DIM)
        global_lse, global_delta = _sums(
            global_out_ptr,
            global_lse_ptr,
            global_grad,
            g,
            d,
            heads * HEAD_DIM,
            1,
            heads,
            globals_count,
            HEAD_DIM,
        )
    key_grad = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
    if TO_LOCAL and (WHOLE or global_key_grad_ptr is not None or global_value_grad_ptr is not None):
        key = load(global_key_ptr, g, d, global_key_n, global_key_d, globals_count, HEAD_DIM)
        global_value = load(global_value_ptr, g, d, global_value_n, global_value_d, globals_count, HEAD_DIM)
        # One walk for both directions where they share their scores. Where they do not, they read and write
        # nothing in common, and one walk after the other holds half the tiles at a time.
        key_grad, value_grad = _walk(
            key,
            global_value,
            global_grad,
            global_lse,
            global_delta,
            local_query_ptr,
            local_value_ptr,
            local_grad_ptr,
            local_out_ptr,
            local_lse_ptr,
            local_query_grad_ptr,
            local_value_grad_ptr,
            local_query_n,
            local_query_d,
            local_value_n,
            local_value_d,
            local_grad_n,
            local_grad_d,
            local_out_n,
            local_out_d,
            gradients_n,
            gradients_d,
            g,
            first_g,
            globals_count,
            first,
            last,
            heads,
            scale,
            score_scale,
            seed_ptr,
            row,
            rows,
            threshold,
            keep_scale,
            True,
            SHARED and TO_GLOBAL,
            global_key_grad_ptr is not None,
            global_value_grad_ptr is not None,
            WHOLE,
            DROPOUT,
            HEAD_DIM,
            BLOCK_L,
            BLOCK_G,
            BLOCK_D,
            UPCAST,
            PRECISION,
        )
        if global_value_grad_ptr is not None:
            global_value_grad_ptr += global_start
            store(global_value_grad_ptr, value_grad, g, d, heads * HEAD_DIM, 1, globals_count, HEAD_DIM)
    if TO_GLOBAL and not (SHARED and TO_LOCAL) and (WHOLE or back_x_grad_ptr is not None):
        back_x = load(back_x_ptr, g, d, back_x_n, back_x_d, globals_count, HEAD_DIM)
        back_x_grad, _ = _walk(
            back_x,
            global_value,
            global_grad,
            global_lse,
            global_delta,
            back_local_x_ptr,
            local_value_ptr,
            local_grad_ptr,
            local_out_ptr,
            local_lse_ptr,
            back_local_x_grad_ptr,
            local_value_grad_ptr,
            back_local_x_n,
            back_local_x_d,
            local_value_n,
            local_value_d,
            local_grad_n,
            local_grad_d,
            local_out_n,
            local_out_d,
            gradients_n,
            gradients_d,
            g,
            first_g,
            globals_count,
            first,
            last,
            heads,
            scale,
            score_scale,
            seed_ptr,
            row,
            rows,
            threshold,
            keep_scale,
            False,
            True,
            back_x_grad_ptr is not None,
            False,
            WHOLE,
            DROPOUT,
            HEAD_DIM,
            BLOCK_L,
            BLOCK_G,
            BLOCK_D,
            UPCAST,
            PRECISION,
        )
        if SHARED:
            key_grad = back_x_grad
        elif global_query_grad_ptr is not None:
            back_x_grad *= scale
            global_query_grad_ptr += global_start
            store(global_query_grad_ptr, back_x_grad, g, d, heads * HEAD_DIM, 1, globals_count, HEAD_DIM)
    if global_key_grad_ptr is not None:
        key_grad *= scale
        global_key_grad_ptr += global_start
        store(global_key_grad_ptr, key_grad, g, d, heads * HEAD_DIM, 1, globals_count, HEAD_DIM)


@jit
def sum_parts_kernel(
    parts_ptr, first_ptr, second_ptr, third_ptr, parts, part_stride, count, BLOCK: tl.constexpr
):
    """Sums over parts, in their order, of up to three sets of ``count`` values each; axis 1 is the set."""
    which = tl.program_id(1)
    where = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = where < count
    total = tl.zeros((BLOCK,), tl.float32)
    source = parts_ptr + which.to(tl.int64) * count
    for part in range(parts):
        total += tl.load(source + tl.cast(part, tl.int64) * part_stride + where, mask=ok, other=0.0)
    total = total.to(first_ptr.dtype.element_ty)
    # The set as a block, since a mask takes no scalars.
    sets = which + tl.zeros((BLOCK,), tl.int32)
    tl.store(first_ptr + where, total, mask=ok & (sets == 0))
    if second_ptr is not None:
        tl.store(second_ptr + where, total, mask=ok & (sets == 1))
    if third_ptr is not None:
        tl.store(third_ptr + where, total, mask=ok & (sets == 2))
