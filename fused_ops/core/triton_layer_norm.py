"""LayerNorm of rows that lie whole in a tile of a Triton kernel."""

from __future__ import annotations

from fused_ops.core.triton_support import jit, tl


@jit
def normalise_rows(x, ok, channels, eps):
    """Rows of x with mean 0 and variance 1, zero where not ``ok``, and 1 / their deviation (rows, 1)."""
    difference = tl.where(ok, x - tl.sum(x, axis=1)[:, None] / channels, 0.0)
    rstd = tl.rsqrt(tl.sum(difference * difference, axis=1)[:, None] / channels + eps)
    return difference * rstd, rstd


@jit
def normalise_rows_backward(grad, normalised, rstd, channels):
    """Gradient of the rows from that of :func:`normalise_rows`' first result."""
    mean = tl.sum(grad, axis=1)[:, None] / channels
    slope = tl.sum(grad * normalised, axis=1)[:, None] / channels
    return rstd * (grad - mean - normalised * slope)
