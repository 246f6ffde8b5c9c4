"""What the Triton kernels of attention share: tiles of tokens in any layout, products, dropout."""

from __future__ import annotations

from fused_ops.core.triton_support import jit, tl


@jit
def load(pointer, rows, columns, row_stride, column_stride, row_count, WIDTH: tl.constexpr):
    """(rows, columns) of a matrix with ``row_count`` rows and WIDTH columns; zeros outside."""
    where = rows.to(tl.int64)[:, None] * row_stride + columns.to(tl.int64)[None, :] * column_stride
    mask = (rows < row_count)[:, None] & (columns < WIDTH)[None, :]
    return tl.load(pointer + where, mask=mask, other=0.0)


@jit
def store(pointer, value, rows, columns, row_stride, column_stride, row_count, WIDTH: tl.constexpr):
    where = rows.to(tl.int64)[:, None] * row_stride + columns.to(tl.int64)[None, :] * column_stride
    mask = (rows < row_count)[:, None] & (columns < WIDTH)[None, :]
    tl.store(pointer + where, value.to(pointer.dtype.element_ty), mask=mask)


@jit
def dot(a, b, UPCAST: tl.constexpr, PRECISION: tl.constexpr):
    """Product of two tiles in float32. UPCAST: the interpreter's product of bfloat16 tiles is wrong."""
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, input_precision=PRECISION)


@jit
def _random_words(seed_ptr, c0, c1, c2):
    """Philox for the counters (c0, c1, c2, seed[1]) under the key seed[0]; c0 and c1 are tiles."""
    offset = tl.load(seed_ptr + 1).to(tl.int32)
    c2 = tl.zeros_like(c0) + c2
    c3 = tl.zeros_like(c0) + offset
    return tl.philox(tl.load(seed_ptr), c0, c1, c2, c3)


@jit
def _at_least(word, threshold):
    return (word >> 1).to(tl.int32) >= threshold


@jit
def keep(seed_ptr, query, first_key, row, threshold, QUERIES: tl.constexpr, KEYS: tl.constexpr):
    """Which weights (QUERIES, KEYS) dropout keeps; four keys per counter.

    ``query`` (QUERIES) are the queries' numbers, ``first_key`` the first key's, a multiple of four.
    """
    group = first_key // 4 + tl.arange(0, KEYS // 4)
    c0 = query[:, None] + tl.zeros_like(group)[None, :]
    c1 = group[None, :] + tl.zeros_like(query)[:, None]
    w0, w1, w2, w3 = _random_words(seed_ptr, c0, c1, row)
    even = tl.join(_at_least(w0, threshold), _at_least(w2, threshold))
    odd = tl.join(_at_least(w1, threshold), _at_least(w3, threshold))
    return tl.reshape(tl.join(even, odd), (QUERIES, KEYS))


@jit
def keep_transposed(seed_ptr, query, first_key, row, threshold, QUERIES: tl.constexpr, KEYS: tl.constexpr):
    """The same as (KEYS, QUERIES)."""
    group = first_key // 4 + tl.arange(0, KEYS // 4)
    c0 = query[None, :] + tl.zeros_like(group)[:, None]
    c1 = group[:, None] + tl.zeros_like(query)[None, :]
    w0, w1, w2, w3 = _random_words(seed_ptr, c0, c1, row)
    even = tl.join(_at_least(w0, threshold), _at_least(w2, threshold))
    odd = tl.join(_at_least(w1, threshold), _at_least(w3, threshold))
    return tl.reshape(tl.permute(tl.join(even, odd), (0, 2, 3, 1)), (KEYS, QUERIES))
