"""Forward Triton kernels of the feed-forward chain: a BatchNorm's moments, and everything in one pass."""

from __future__ import annotations

from fused_ops.core.triton_matrices import dot, vector, weight_chunk
from fused_ops.core.triton_moments import add_to_moments, store_moments
from fused_ops.core.triton_support import jit, tl
from fused_ops.feed_forward.triton_rows import (
    activated,
    drop_path_factors,
    load_rows,
    normalise,
    row_pointers,
)


@jit
def moments_kernel(
    x_ptr,
    moments_ptr,
    rows,
    tokens,
    channels,
    tiles_each,
    x_b,
    x_n,
    x_c,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Moments of ``tiles_each`` tiles (BLOCK_M, BLOCK_C) per program, laid out as
    :func:`fused_ops.core.statistics.merge_moments` reads them.
    """
    blocks = tl.cdiv(channels, BLOCK_C)
    part = tl.program_id(0) // blocks
    parts = tl.num_programs(0) // blocks
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    count = tl.zeros((BLOCK_M,), tl.float32)
    mean = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    m2 = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    start = part * tiles_each * BLOCK_M
    for tile in range(tiles_each):
        m = start + tile * BLOCK_M + tl.arange(0, BLOCK_M)
        x = load_rows(x_ptr, m, tokens, c, rows, channels, x_b, x_n, x_c)
        ok = (m < rows)[:, None] & (c < channels)[None, :]
        count, mean, m2 = add_to_moments(count, mean, m2, x, m < rows, ok)
    store_moments(moments_ptr, count, mean, m2, part, parts, c, channels)


@jit
def forward_kernel(
    x_ptr,
    fc1_weight_ptr,
    fc1_bias_ptr,
    fc2_weight_ptr,
    fc2_bias_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    mean_ptr,
    var_ptr,
    residual_ptr,
    drop_path_ptr,
    out_ptr,
    rows,
    tokens,
    channels,
    hidden,
    x_b,
    x_n,
    x_c,
    residual_b,
    residual_n,
    residual_c,
    out_b,
    out_n,
    out_c,
    eps,
    NORM: tl.constexpr,
    ACTIVATION: tl.constexpr,
    IDENTITY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    """One tile of the result, hidden units in chunks (BLOCK_M, BLOCK_HIDDEN); fc2 holds the layer scale."""
    DTYPE: tl.constexpr = fc1_weight_ptr.dtype.element_ty
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.arange(0, BLOCK_C)
    x = load_rows(x_ptr, m, tokens, c, rows, channels, x_b, x_n, x_c)
    z, _ = normalise(x, m, c, rows, channels, mean_ptr, var_ptr, eps, NORM)
    z = z * vector(norm_weight_ptr, c, channels, 1.0) + vector(norm_bias_ptr, c, channels, 0.0)
    z = z.to(DTYPE)
    out = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for chunk in range(0, hidden, BLOCK_HIDDEN):
        h = chunk + tl.arange(0, BLOCK_HIDDEN)
        fc1 = weight_chunk(fc1_weight_ptr, h, c, hidden, channels)
        value = dot(z, tl.trans(fc1), tl.zeros((BLOCK_M, BLOCK_HIDDEN), tl.float32))
        value = activated(value + vector(fc1_bias_ptr, h, hidden, 0.0), ACTIVATION, DTYPE)
        fc2 = weight_chunk(fc2_weight_ptr, c, h, channels, hidden)
        out = dot(value.to(DTYPE), tl.trans(fc2), out)
    out += vector(fc2_bias_ptr, c, channels, 0.0)
    if drop_path_ptr is not None:
        out *= drop_path_factors(drop_path_ptr, m, tokens, rows)
    if IDENTITY:
        # From the cache: kept through the loop, it would take registers.
        out += load_rows(x_ptr, m, tokens, c, rows, channels, x_b, x_n, x_c)
    if residual_ptr is not None:
        out += load_rows(residual_ptr, m, tokens, c, rows, channels, residual_b, residual_n, residual_c)
    ok = (m < rows)[:, None] & (c < channels)[None, :]
    where = row_pointers(out_ptr, m, tokens, c, out_b, out_n, out_c)
    tl.store(where, out.to(out_ptr.dtype.element_ty), mask=ok)
