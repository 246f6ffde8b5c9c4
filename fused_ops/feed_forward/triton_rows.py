"""What the feed-forward chain's Triton kernels share: rows of tokens, the norm, the activation.

A tile is BLOCK_M tokens, in the order of the batch, as rows of a (BLOCK_M, BLOCK_C) matrix with all channels.
"""

from __future__ import annotations

from fused_ops.core.activations import activate, activation_gradient
from fused_ops.core.triton_layer_norm import normalise_rows, normalise_rows_backward
from fused_ops.core.triton_matrices import vector
from fused_ops.core.triton_support import jit, tl


@jit
def row_pointers(ptr, m, tokens, c, stride_b, stride_n, stride_c):
    """Pointers (BLOCK_M, BLOCK_C) to rows ``m`` of tokens (B, N, C) with any strides, by 64-bit offsets."""
    rows = (m // tokens).to(tl.int64) * stride_b + (m % tokens).to(tl.int64) * stride_n
    return ptr + rows[:, None] + (c.to(tl.int64) * stride_c)[None, :]


@jit
def load_rows(ptr, m, tokens, c, rows, channels, stride_b, stride_n, stride_c):
    """Rows ``m`` in float32, zero outside."""
    ok = (m < rows)[:, None] & (c < channels)[None, :]
    where = row_pointers(ptr, m, tokens, c, stride_b, stride_n, stride_c)
    return tl.load(where, mask=ok, other=0.0).to(tl.float32)


@jit
def drop_path_factors(drop_path_ptr, m, tokens, rows):
    """Factor of each row's image (BLOCK_M, 1)."""
    return tl.load(drop_path_ptr + m // tokens, mask=m < rows, other=0.0).to(tl.float32)[:, None]


@jit
def normalise(x, m, c, rows, channels, mean_ptr, var_ptr, eps, NORM: tl.constexpr):
    """What the norm's affine part gets (BLOCK_M, BLOCK_C), zero outside, and one over the spread.

    NORM batch: by statistics per channel; the spread is (1, BLOCK_C). layer: by each row's own; (BLOCK_M, 1).
    none: ``x``, and 1.
    """
    ok = (m < rows)[:, None] & (c < channels)[None, :]
    if NORM == "batch":
        rstd = tl.rsqrt(vector(var_ptr, c, channels, 1.0) + eps)
        return tl.where(ok, (x - vector(mean_ptr, c, channels, 0.0)) * rstd, 0.0), rstd
    elif NORM == "layer":
        return normalise_rows(x, ok, channels, eps)
    else:
        return x, 1.0


@jit
def norm_backward(
    z_grad, x, m, c, rows, channels, norm_weight_ptr, mean_ptr, var_ptr, norm_sums_ptr, eps, one_over_count,
    NORM: tl.constexpr,
):  # fmt: skip
    """Gradient of the norm's input from that of its output, (BLOCK_M, BLOCK_C) in float32.

    ``norm_sums_ptr`` (2, C): the sums over all tokens, given where batch statistics normalised.
    """
    if NORM == "none":
        return z_grad
    else:
        gamma = vector(norm_weight_ptr, c, channels, 1.0)
        normalised, rstd = normalise(x, m, c, rows, channels, mean_ptr, var_ptr, eps, NORM)
        if NORM == "layer":
            return normalise_rows_backward(z_grad * gamma, normalised, rstd, channels)
        else:
            if norm_sums_ptr is not None:
                mean = vector(norm_sums_ptr, c, channels, 0.0) * one_over_count
                slope = vector(norm_sums_ptr + channels, c, channels, 0.0) * one_over_count
                z_grad -= mean + normalised * slope
            return gamma * rstd * z_grad


@jit
def _normal_distribution(x):
    """The standard normal's distribution function (used on bfloat16 data) as a logistic of an odd polynomial.

    x times it is within 2.3e-4 of GELU, relative, for |x| up to 5.5, and within 2e-7, absolute, beyond: an
    eighth of what rounding to bfloat16 may do. The error function takes twice as many instructions, and they
    are what limits a chain of narrow layers, not memory.
    """
    t = tl.minimum(x * x, 30.25)
    p = 6.275649999665234e-10
    p = p * t - 6.887727721505144e-08
    p = p * t + 2.870405523935915e-06
    p = p * t - 4.765147969010286e-05
    p = p * t - 0.0004507458652369678
    p = p * t + 0.0737018808722496
    p = p * t + 1.594930648803711
    return tl.sigmoid(x * p)


@jit
def activated(x, ACTIVATION: tl.constexpr, DTYPE: tl.constexpr):
    """The activation in float32 of what will be rounded to DTYPE."""
    if (ACTIVATION == "gelu") & (tl.bfloat16 == DTYPE):
        return x * _normal_distribution(x)
    else:
        return activate(x, ACTIVATION)


@jit
def activated_gradient(x, ACTIVATION: tl.constexpr, DTYPE: tl.constexpr):
    """The derivative of :func:`activated`."""
    if (ACTIVATION == "gelu") & (tl.bfloat16 == DTYPE):
        return _normal_distribution(x) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    else:
        return activation_gradient(x, ACTIVATION)
