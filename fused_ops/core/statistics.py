"""Triton kernels that merge per-program partial results in a fixed order, so that results repeat bitwise."""

from __future__ import annotations

from torch import Tensor

from fused_ops.core.triton_support import ceil_div, jit, next_power_of_2, tl


@jit
def merge_moments_kernel(
    moments_ptr,
    out_mean_ptr,
    out_var_ptr,
    out_unbiased_ptr,
    parts,
    channels,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """(mean and M2 (P, 2, C), count (P)) of P disjoint sets -> their union's mean and two variances (C).

    One program: BLOCK_C channels, P in chunks of BLOCK_P; each chunk in two passes over registers, chunks by
    Chan's formula. Never a difference of large sums, so a mean far above the spread does no harm.
    """
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_ok = c < channels
    count_ptr = moments_ptr + tl.cast(parts, tl.int64) * 2 * channels
    total = 0.0
    mean = tl.zeros((BLOCK_C,), tl.float32)
    m2 = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, parts, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        part_ok = p < parts
        n = tl.load(count_ptr + p, mask=part_ok, other=0.0)
        # (BLOCK_P, BLOCK_C)
        offsets = p.to(tl.int64)[:, None] * 2 * channels + c[None, :]
        ok = part_ok[:, None] & channel_ok[None, :]
        part_mean = tl.load(moments_ptr + offsets, mask=ok, other=0.0)
        part_m2 = tl.load(moments_ptr + offsets + channels, mask=ok, other=0.0)
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
def finish_gradients_kernel(
    parts_ptr,
    weight_grad_ptr,
    bias_grad_ptr,
    norm_weight_grad_ptr,
    norm_bias_grad_ptr,
    sums_ptr,
    parts,
    part_stride,
    sum_start,
    sum_parts,
    sum_stride,
    channels,
    TAPS: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Partial sums of every parameter gradient -> the gradients. One program: BLOCK_C channels of a column.

    Columns are the filter taps, the bias and the two BatchNorm sums, as far as they are asked for. Taps and
    bias are (P, columns, C) with ``part_stride`` values between parts; the norm's sums are (sum_parts, 2, C)
    from ``sum_start`` on, with ``sum_stride`` between parts.
    """
    channel_blocks = tl.cdiv(channels, BLOCK_C)
    column = tl.program_id(0) // channel_blocks
    c = (tl.program_id(0) % channel_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    ok = c < channels
    is_sum = column >= TAPS + BIAS
    which_sum = column - (TAPS + BIAS)
    start = tl.where(is_sum, sum_start + which_sum * channels, column * channels)
    stride = tl.where(is_sum, sum_stride, part_stride)
    count = tl.where(is_sum, sum_parts, parts)
    total = tl.zeros((BLOCK_C,), tl.float32)
    for first in range(0, count, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)
        # (BLOCK_P, BLOCK_C)
        where = parts_ptr + start.to(tl.int64) + p.to(tl.int64)[:, None] * stride + c[None, :]
        values = tl.load(where, mask=(p < count)[:, None] & ok[None, :], other=0.0)
        total += tl.sum(values, axis=0)
    # The column as a block, since a mask takes no scalars.
    columns = column + tl.zeros_like(c)
    if weight_grad_ptr is not None:
        value = total.to(weight_grad_ptr.dtype.element_ty)
        tl.store(weight_grad_ptr + c * TAPS + column, value, mask=ok & (columns < TAPS))
    if bias_grad_ptr is not None:
        value = total.to(bias_grad_ptr.dtype.element_ty)
        tl.store(bias_grad_ptr + c, value, mask=ok & (columns == TAPS))
    if norm_bias_grad_ptr is not None:
        value = total.to(norm_bias_grad_ptr.dtype.element_ty)
        tl.store(norm_bias_grad_ptr + c, value, mask=ok & (columns == TAPS + BIAS))
    if norm_weight_grad_ptr is not None:
        value = total.to(norm_weight_grad_ptr.dtype.element_ty)
        tl.store(norm_weight_grad_ptr + c, value, mask=ok & (columns == TAPS + BIAS + 1))
    if sums_ptr is not None:
        tl.store(sums_ptr + which_sum * channels + c, total, mask=ok & (columns >= TAPS + BIAS))


def merge_moments(moments: Tensor, parts: int, mean: Tensor, var: Tensor, unbiased: Tensor) -> None:
    """Mean and variance of a union of disjoint sets, in a fixed order.

    Args:
        moments: parts * (2 C + 1) values in float32: each set's mean and sum of squared deviations from it
            as (parts, 2, C), followed by the counts (parts), all positive.
        mean, var, unbiased: (C) float32, written: mean, biased and unbiased variance.
    """
    channels = mean.numel()
    # Half a cache line of channels, so that few programs have many parts in flight.
    block_c = min(16, next_power_of_2(channels))
    merge_moments_kernel[(ceil_div(channels, block_c),)](
        moments,
        mean,
        var,
        unbiased,
        parts,
        channels,
        BLOCK_P=min(256, next_power_of_2(parts)),
        BLOCK_C=block_c,
        num_warps=4,
        enable_fp_fusion=True,
    )


def finish_gradients(
    partial: Tensor,
    channels: int,
    *,
    parts: int,
    part_stride: int,
    taps: int = 0,
    bias: bool = False,
    sums: tuple[int, int, int] | None = None,
    weight_grad: Tensor | None = None,
    bias_grad: Tensor | None = None,
    norm_weight_grad: Tensor | None = None,
    norm_bias_grad: Tensor | None = None,
    sums_out: Tensor | None = None,
) -> None:
    """Sum the partial gradients of every parameter in one launch, in a fixed order.

    Args:
        partial: float32; (parts, columns, C) with ``part_stride`` values between parts, and the norm's sums.
        taps: how many filter taps the first columns hold, 0 for none.
        bias: whether the next column is the bias.
        sums: first value, number of parts and values between parts of the norm's two sums (sum of the
            gradient, sum of the gradient times the normalised value), or None where there are none.
        weight_grad: (C, 1, kh, kw), its memory in that order; ``bias_grad``, ``norm_weight_grad``,
            ``norm_bias_grad``: (C); each in any dtype and written where given.
        sums_out: (2, C) float32, written where given.
    """
    columns = taps + bias + (0 if sums is None else 2)
    block_c = min(16, next_power_of_2(channels))
    finish_gradients_kernel[(columns * ceil_div(channels, block_c),)](
        partial,
        weight_grad,
        bias_grad,
        norm_weight_grad,
        norm_bias_grad,
        sums_out,
        parts,
        part_stride,
        *(sums or (0, 0, 0)),
        channels,
        TAPS=taps,
        BIAS=int(bias),
        BLOCK_P=min(256, next_power_of_2(max(parts, sums[1] if sums else 0))),
        BLOCK_C=block_c,
        num_warps=4,
        enable_fp_fusion=True,
    )
