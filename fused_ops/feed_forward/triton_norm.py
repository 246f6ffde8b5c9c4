"""A norm of tokens before a matrix product, where normalised values lie in memory: passes over the tokens.

A BatchNorm's affine part can be multiplied into the product's matrix instead (:func:`fold`). The two sums
that its backward needs then come from the gradient of that matrix, with no pass over the tokens: with
``a = W (w xhat + b) + c``, ``sum(dz) = W^T sum(da)`` and ``sum(dz xhat) = diag(W^T (da^T xhat))``.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from torch import Tensor

from fused_ops.core import distributed
from fused_ops.core.statistics import merge_moments
from fused_ops.core.triton_matrices import vector
from fused_ops.core.triton_support import ceil_div, jit, next_power_of_2, tl
from fused_ops.feed_forward.triton_forward import moments_kernel
from fused_ops.feed_forward.triton_rows import load_rows, norm_backward, normalise, row_pointers


@jit
def normalise_kernel(
    x_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    mean_ptr,
    var_ptr,
    out_ptr,
    rows,
    tokens,
    channels,
    x_b,
    x_n,
    x_c,
    eps,
    NORM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The norm's output, packed (rows, C), in the dtype of the products. One program: (BLOCK_M, BLOCK_C)."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.arange(0, BLOCK_C)
    x = load_rows(x_ptr, m, tokens, c, rows, channels, x_b, x_n, x_c)
    z, _ = normalise(x, m, c, rows, channels, mean_ptr, var_ptr, eps, NORM)
    z = z * vector(norm_weight_ptr, c, channels, 1.0) + vector(norm_bias_ptr, c, channels, 0.0)
    ok = (m < rows)[:, None] & (c < channels)[None, :]
    where = row_pointers(out_ptr, m, rows, c, 0, channels, 1)
    tl.store(where, z.to(out_ptr.dtype.element_ty), mask=ok)


@jit
def norm_backward_kernel(
    z_grad_ptr,
    x_ptr,
    grad_ptr,
    norm_weight_ptr,
    mean_ptr,
    var_ptr,
    norm_sums_ptr,
    x_grad_ptr,
    rows,
    tokens,
    channels,
    x_b,
    x_n,
    x_c,
    grad_b,
    grad_n,
    grad_c,
    x_grad_b,
    x_grad_n,
    x_grad_c,
    eps,
    one_over_count,
    NORM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The input's gradient; ``grad_ptr`` is the residual's share, given where that is the input."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.arange(0, BLOCK_C)
    z_grad = load_rows(z_grad_ptr, m, rows, c, rows, channels, 0, channels, 1)
    x = load_rows(x_ptr, m, tokens, c, rows, channels, x_b, x_n, x_c)
    x_grad = norm_backward(
        z_grad, x, m, c, rows, channels, norm_weight_ptr, mean_ptr, var_ptr, norm_sums_ptr, eps,
        one_over_count, NORM,
    )  # fmt: skip
    if grad_ptr is not None:
        x_grad += load_rows(grad_ptr, m, tokens, c, rows, channels, grad_b, grad_n, grad_c)
    ok = (m < rows)[:, None] & (c < channels)[None, :]
    where = row_pointers(x_grad_ptr, m, tokens, c, x_grad_b, x_grad_n, x_grad_c)
    tl.store(where, x_grad.to(x_grad_ptr.dtype.element_ty), mask=ok)


@jit
def fold_kernel(
    weight_ptr,
    bias_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    out_weight_ptr,
    out_bias_ptr,
    rows,
    columns,
    BLOCK_J: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """``W diag(w)`` (rows, columns) and ``W b + bias`` (rows). BLOCK_J rows per program, BLOCK_C at once."""
    j = tl.program_id(0) * BLOCK_J + tl.arange(0, BLOCK_J)
    j_ok = j < rows
    total = tl.zeros((BLOCK_J,), tl.float32)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + j, mask=j_ok, other=0.0).to(tl.float32)
    for start in range(0, columns, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        ok = j_ok[:, None] & (c < columns)[None, :]
        where = j[:, None] * columns + c[None, :]
        weight = tl.load(weight_ptr + where, mask=ok, other=0.0).to(tl.float32)
        total += tl.sum(weight * vector(norm_bias_ptr, c, columns, 0.0), axis=1)
        weight *= vector(norm_weight_ptr, c, columns, 1.0)
        tl.store(out_weight_ptr + where, weight.to(out_weight_ptr.dtype.element_ty), mask=ok)
    tl.store(out_bias_ptr + j, total.to(out_bias_ptr.dtype.element_ty), mask=j_ok)


@jit
def folded_gradients_kernel(
    product_ptr,
    totals_ptr,
    weight_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    weight_grad_ptr,
    norm_weight_grad_ptr,
    norm_bias_grad_ptr,
    sums_ptr,
    rows,
    columns,
    BLOCK_J: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Gradients of W and of the norm before it, and the norm's sums (2, columns).

    From ``product`` (rows, columns), the outputs' gradient transposed times the normalised values, and
    ``totals`` (rows), its sums. One program: BLOCK_C columns in tiles (BLOCK_J, BLOCK_C).
    """
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_ok = c < columns
    scale = vector(norm_weight_ptr, c, columns, 1.0)
    shift = vector(norm_bias_ptr, c, columns, 0.0)
    first = tl.zeros((BLOCK_C,), tl.float32)
    second = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, rows, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        ok = (j < rows)[:, None] & c_ok[None, :]
        where = j[:, None] * columns + c[None, :]
        product = tl.load(product_ptr + where, mask=ok, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + where, mask=ok, other=0.0).to(tl.float32)
        total = tl.load(totals_ptr + j, mask=j < rows, other=0.0)[:, None]
        first += tl.sum(weight * total, axis=0)
        second += tl.sum(weight * product, axis=0)
        if weight_grad_ptr is not None:
            grad = product * scale + total * shift
            tl.store(weight_grad_ptr + where, grad.to(weight_grad_ptr.dtype.element_ty), mask=ok)
    if norm_bias_grad_ptr is not None:
        tl.store(norm_bias_grad_ptr + c, first.to(norm_bias_grad_ptr.dtype.element_ty), mask=c_ok)
    if norm_weight_grad_ptr is not None:
        tl.store(norm_weight_grad_ptr + c, second.to(norm_weight_grad_ptr.dtype.element_ty), mask=c_ok)
    if sums_ptr is not None:
        tl.store(sums_ptr + c, first, mask=c_ok)
        tl.store(sums_ptr + columns + c, second, mask=c_ok)


@lru_cache(maxsize=4096)
def tile_plan(rows: int, channels: int) -> tuple[int, dict[str, Any]]:
    """Programs and options of a pass over tokens: tiles of 2048 values, and at least one token."""
    block_c = next_power_of_2(channels)
    block_m = max(1, 2048 // block_c)
    meta = {"BLOCK_M": block_m, "BLOCK_C": block_c, "num_warps": 4, "enable_fp_fusion": True}
    return ceil_div(rows, block_m), meta


@lru_cache(maxsize=4096)
def moments_plan(rows: int, channels: int) -> tuple[int, int, dict[str, Any]]:
    """Programs over tokens, tiles of each and options of the pass for moments: a rule of thumb."""
    block_c = min(64, next_power_of_2(channels))
    block_m = max(4, 1024 // block_c)
    blocks = ceil_div(channels, block_c)
    count = ceil_div(rows, block_m)
    each = min(max(4, ceil_div(count * blocks, 1024)), count)
    meta = {"BLOCK_M": block_m, "BLOCK_C": block_c, "num_warps": 4, "enable_fp_fusion": True}
    return ceil_div(count, each), each, meta


def batch_statistics(x: Tensor, mean: Tensor, var: Tensor, unbiased: Tensor, group: str) -> None:
    """Fill mean and both variances (C), in float32, of tokens (B, N, C) over the process group."""
    tokens, channels = x.shape[1:]
    rows = x.shape[0] * tokens
    programs, each, meta = moments_plan(rows, channels)
    moments = mean.new_empty(programs * (2 * channels + 1))
    grid = (programs * ceil_div(channels, meta["BLOCK_C"]),)
    moments_kernel[grid](x, moments, rows, tokens, channels, each, *x.stride(), **meta)
    merge_moments(moments, programs, mean, var, unbiased)
    if group:
        distributed.exchange_moments(mean, var, unbiased, rows, group)


def normalised(
    x: Tensor,
    norm: str,
    vectors: tuple[Tensor | None, Tensor | None],
    statistics: tuple[Tensor | None, Tensor | None],
    eps: float,
    out: Tensor,
) -> Tensor:
    """Fill and return ``out``, packed (rows, C), with what the norm gives for tokens ``x`` (B, N, C).

    Args:
        norm: batch, layer or none.
        vectors: weight and bias of the norm's affine part, None for 1 and 0.
        statistics: mean and variance (C) that a BatchNorm normalises with.
    """
    tokens, channels = x.shape[1:]
    rows = x.shape[0] * tokens
    programs, meta = tile_plan(rows, channels)
    normalise_kernel[(programs,)](
        x, *vectors, *statistics, out, rows, tokens, channels, *x.stride(), eps, NORM=norm, **meta
    )
    return out


def input_gradient(
    z_grad: Tensor,
    x: Tensor,
    residual_grad: Tensor | None,
    norm: str,
    norm_weight: Tensor | None,
    statistics: tuple[Tensor | None, Tensor | None],
    sums: Tensor | None,
    eps: float,
    x_grad: Tensor,
) -> Tensor:
    """Fill and return the gradient of tokens ``x`` (B, N, C); it may have the place of ``z_grad``.

    Args:
        z_grad: (rows, C), packed: of the norm's output.
        residual_grad: (B, N, C), any strides, or None: added.
        sums: (2, C), BatchNorm's, where the batch's statistics normalised.
        x_grad: (B, N, C).
    """
    tokens, channels = x.shape[1:]
    rows = x.shape[0] * tokens
    programs, meta = tile_plan(rows, channels)
    norm_backward_kernel[(programs,)](
        z_grad,
        x,
        residual_grad,
        norm_weight,
        *statistics,
        sums,
        x_grad,
        rows,
        tokens,
        channels,
        *x.stride(),
        *(0, 0, 0) if residual_grad is None else residual_grad.stride(),
        *x_grad.stride(),
        eps,
        1.0 / rows,
        NORM=norm,
        **meta,
    )
    return x_grad


# Values of a tile of a matrix.
_AREA = 2048


def fold(
    weight: Tensor, bias: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None, like: Tensor
) -> tuple[Tensor, Tensor]:
    """A matrix (rows, columns) and its bias with a norm's affine part in them, in the dtype of ``like``."""
    rows, columns = weight.shape
    out = like.new_empty((rows, columns)), like.new_empty(rows)
    block_c = min(128, next_power_of_2(columns))
    block_j = max(1, _AREA // 4 // block_c)
    fold_kernel[(ceil_div(rows, block_j),)](
        weight.contiguous(),
        bias,
        norm_weight,
        norm_bias,
        *out,
        rows,
        columns,
        BLOCK_J=block_j,
        BLOCK_C=block_c,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return out


def folded_gradients(
    product: Tensor,
    totals: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None],
    sums: Tensor | None,
) -> None:
    """Gradients of a matrix (rows, columns) and of the BatchNorm before it, of those that are not None.

    Args:
        product: (rows, columns): the outputs' gradient, transposed, times the values without the affine part.
        totals: (rows) in float32: the outputs' gradient summed over all tokens.
        weight: the matrix as it is, (rows, columns).
        gradients: of the matrix, of the norm's weight and of its bias.
        sums: (2, columns) in float32, or None: BatchNorm's two sums.
    """
    rows, columns = weight.shape
    block_c = min(16, next_power_of_2(columns))
    folded_gradients_kernel[(ceil_div(columns, block_c),)](
        product,
        totals,
        weight.contiguous(),
        norm_weight,
        norm_bias,
        *gradients,
        sums,
        rows,
        columns,
        BLOCK_J=min(_AREA // block_c, next_power_of_2(rows)),
        BLOCK_C=block_c,
        num_warps=4,
        enable_fp_fusion=True,
    )
