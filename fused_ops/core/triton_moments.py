"""Mean and spread of every channel over the tiles that a Triton program walks over, by Welford's recurrence.

No difference of large sums, and no reduction in the loop: each row of the tile (BLOCK_M, BLOCK_C) keeps its
own count (BLOCK_M), mean and sum of squared deviations (BLOCK_M, BLOCK_C), all zero at first.
"""

from __future__ import annotations

from fused_ops.core.triton_support import jit, tl


@jit
def add_to_moments(count, mean, m2, value, row_ok, ok):
    """The moments with one more tile; ``row_ok`` (BLOCK_M) and ``ok`` say which of its values there are."""
    count += tl.where(row_ok, 1.0, 0.0)
    difference = tl.where(ok, value - mean, 0.0)
    mean += difference / tl.maximum(count, 1.0)[:, None]
    m2 += difference * tl.where(ok, value - mean, 0.0)
    return count, mean, m2


@jit
def store_moments(moments_ptr, count, mean, m2, part, parts, c, channels):
    """Merge the rows and store them as ``part`` of ``parts``, laid out as
    :func:`fused_ops.core.statistics.merge_moments` reads them. A program's first row must exist.
    """
    total = tl.sum(count, axis=0)
    # Deviations from the first row keep sums small under a large mean.
    is_first = (tl.arange(0, count.shape[0]) == 0)[:, None]
    shift = tl.sum(tl.where(is_first, mean, 0.0), axis=0)
    part_mean = shift + tl.sum(count[:, None] * (mean - shift[None, :]), axis=0) / total
    deviation = mean - part_mean[None, :]
    part_m2 = tl.sum(m2 + count[:, None] * deviation * deviation, axis=0)
    base = moments_ptr + part.to(tl.int64) * 2 * channels + c
    tl.store(base, part_mean, mask=c < channels)
    tl.store(base + channels, part_m2, mask=c < channels)
    # Every channel block of this part writes the same number.
    tl.store(moments_ptr + parts.to(tl.int64) * 2 * channels + part, total)
