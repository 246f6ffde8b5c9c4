"""Triton kernels that merge per-program partial results in a fixed order, so that results repeat bitwise."""

from __future__ import annotations

from torch import Tensor

from fused_ops.core.triton_support import ceil_div, jit, next_power_of_2, tl


@jit
def merge_moments_kernel(
    count_ptr,
    mean_ptr,
    m2_ptr,
    out_mean_ptr,
    out_var_ptr,
    out_unbiased_ptr,
    parts,
    channels,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """(count (P), mean (P, C), M2 (P, C)) of P disjoint sets -> their union's mean and two variances (C).

    One program: BLOCK_C channels, P in chunks of BLOCK_P; each chunk in two passes over registers, chunks by
    Chan's formula. Never a difference of large sums, so a mean far above the spread does no harm.
    """
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_ok = c < channels
    total = 0.0
    mean = tl.zeros((BLOCK_C,), tl.float32)
    m2 = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, parts, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        part_ok = p < parts
        n = tl.load(count_ptr + p, mask=part_ok, other=0.0)
        # (BLOCK_P, BLOCK_C)
        offsets = p.to(tl.int64)[:, None] * channels + c[None, :]
        ok = part_ok[:, None] & channel_ok[None, :]
        part_mean = tl.load(mean_ptr + offsets, mask=ok, other=0.0)
        part_m2 = tl.load(m2_ptr + offsets, mask=ok, other=0.0)
        chunk = tl.sum(n, axis=0)
        # Deviations from one part's mean keep the sum small where all means are large.
        first = tl.sum(tl.where((p == start)[:, None], part_mean, 0.0), axis=0)
        chunk_mean = first + tl.sum(n[:, None] * (part_mean - first[None, :]), axis=0) / chunk
        deviation = part_mean - chunk_mean[None, :]
        chunk_m2 = tl.sum(part_m2 + n[:, None] * deviation * deviation, axis=0)
        merged = total + chunk
        delta = chunk_mean - mean
        mean += delta * (chunk / merged)
        m2 += chunk_m2 + delta * delta * (total * chunk / merged)
        total = merged
    tl.store(out_mean_ptr + c, mean, mask=channel_ok)
    tl.store(out_var_ptr + c, m2 / total, mask=channel_ok)
    tl.store(out_unbiased_ptr + c, m2 / (total - 1.0), mask=channel_ok)


@jit
def sum_parts_kernel(part_ptr, out_ptr, parts, columns, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr):
    """(P, K) float32 -> sum over P (K), cast to the dtype of the output. One program: BLOCK_K columns."""
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    column_ok = k < columns
    total = tl.zeros((BLOCK_K,), tl.float32)
    for start in range(0, parts, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        ok = (p < parts)[:, None] & column_ok[None, :]
        values = tl.load(part_ptr + p.to(tl.int64)[:, None] * columns + k[None, :], mask=ok, other=0.0)
        total += tl.sum(values, axis=0)
    tl.store(out_ptr + k, total.to(out_ptr.dtype.element_ty), mask=column_ok)


def merge_moments(
    count: Tensor, mean: Tensor, m2: Tensor, out_mean: Tensor, out_var: Tensor, out_unbiased: Tensor
) -> None:
    """Mean and variance of a union of disjoint sets, in a fixed order.

    Args:
        count: (P) float32, all positive.
        mean, m2: (P, C) float32, each set's mean and sum of squared deviations from it.
        out_mean, out_var, out_unbiased: (C) float32, written: mean, biased and unbiased variance.
    """
    parts, channels = mean.shape
    block_c = min(32, next_power_of_2(channels))
    merge_moments_kernel[(ceil_div(channels, block_c),)](
        count,
        mean,
        m2,
        out_mean,
        out_var,
        out_unbiased,
        parts,
        channels,
        BLOCK_P=min(64, next_power_of_2(parts)),
        BLOCK_C=block_c,
        num_warps=4,
        enable_fp_fusion=True,
    )


def sum_parts(parts: Tensor, out: Tensor) -> None:
    """Sum of (P, ...) float32 over P into ``out`` (any dtype, contiguous), in a fixed order."""
    count = parts.shape[0]
    columns = parts.numel() // count
    block_k = min(64, next_power_of_2(columns))
    sum_parts_kernel[(ceil_div(columns, block_k),)](
        parts,
        out,
        count,
        columns,
        BLOCK_P=min(64, next_power_of_2(count)),
        BLOCK_K=block_k,
        num_warps=4,
        enable_fp_fusion=True,
    )
