"""Products of wide tokens in half precision, with what comes before and after them as prologue and epilogue.

Each is a matrix product in tiles of BLOCK_M rows of tokens x BLOCK_N columns, BLOCK_K of the sum at a time,
in float32; neighbouring programs share rows and columns in groups of GROUP tiles of rows, so that operands
are read from L2. PyTorch's products leave their results in memory for a pass of their own; here that pass is
the epilogue:

    fc1      norm by the batch's statistics on load, its output for backward; bias; fc1's result for backward;
             activation
    fc2      bias, drop path, residual
    middle   backward of fc2 and of the activation: the gradient of fc1's result and its sums for fc1's bias,
             and the activation once more, times drop path, for fc2's weight
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_ops.core import tuning
from fused_ops.core.triton_matrices import dot, vector
from fused_ops.core.triton_support import ceil_div, jit, tl
from fused_ops.feed_forward.triton_rows import (
    activated,
    activated_gradient,
    drop_path_factors,
    load_rows,
    normalise,
    row_pointers,
)


@jit
def tile_of_program(rows, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """Which tiles a program has: GROUP tiles of rows take all columns before the next."""
    across = tl.cdiv(columns, BLOCK_N)
    first = tl.program_id(0) // (GROUP * across) * GROUP
    together = tl.minimum(tl.cdiv(rows, BLOCK_M) - first, GROUP)
    within = tl.program_id(0) % (GROUP * across)
    return first + within % together, within // together


@jit
def packed_product(
    left_ptr, right_ptr, m, n, rows, columns, depth, right_n, right_k, accumulator, BLOCK_K: tl.constexpr
):  # fmt: skip
    """accumulator (BLOCK_M, BLOCK_N) plus packed rows (rows, depth) times a matrix with any two strides."""
    for start in range(0, depth, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        left = tl.load(
            left_ptr + m.to(tl.int64)[:, None] * depth + k[None, :],
            mask=(m < rows)[:, None] & (k < depth)[None, :],
            other=0.0,
        )
        right = tl.load(
            right_ptr + k[:, None] * right_k + n[None, :] * right_n,
            mask=(k < depth)[:, None] & (n < columns)[None, :],
            other=0.0,
        )
        accumulator = dot(left, right, accumulator)
    return accumulator


@jit
def fc1_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    mean_ptr,
    var_ptr,
    normalised_ptr,
    value_ptr,
    hidden_ptr,
    rows,
    tokens,
    channels,
    hidden,
    x_b,
    x_n,
    x_c,
    eps,
    NORM: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """fc1 of the norm's output; NORM none: of packed ``x``. Outputs that are None are not written."""
    row, column = tile_of_program(rows, hidden, BLOCK_M, BLOCK_N, GROUP)
    m = row * BLOCK_M + tl.arange(0, BLOCK_M)
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    DTYPE: tl.constexpr = weight_ptr.dtype.element_ty
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if NORM == "none":
        accumulator = packed_product(
            x_ptr, weight_ptr, m, n, rows, hidden, channels, channels, 1, accumulator, BLOCK_K
        )
    else:
        for start in range(0, channels, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            x = load_rows(x_ptr, m, tokens, k, rows, channels, x_b, x_n, x_c)
            x, _ = normalise(x, m, k, rows, channels, mean_ptr, var_ptr, eps, NORM)
            weight = vector(norm_weight_ptr, k, channels, 1.0)
            z = (x * weight + vector(norm_bias_ptr, k, channels, 0.0)).to(DTYPE)
            if normalised_ptr is not None:
                # By the programs of the first columns alone.
                own = (m < tl.where(column == 0, rows, 0))[:, None] & (k < channels)[None, :]
                tl.store(normalised_ptr + m.to(tl.int64)[:, None] * channels + k[None, :], z, mask=own)
            ok = (k < channels)[:, None] & (n < hidden)[None, :]
            right = tl.load(weight_ptr + n[None, :] * channels + k[:, None], mask=ok, other=0.0)
            accumulator = dot(z, right, accumulator)
    accumulator += vector(bias_ptr, n, hidden, 0.0)
    # Backward sees the rounded value, so this is what gets activated.
    value = accumulator.to(DTYPE)
    where = m.to(tl.int64)[:, None] * hidden + n[None, :]
    ok = (m < rows)[:, None] & (n < hidden)[None, :]
    if value_ptr is not None:
        tl.store(value_ptr + where, value, mask=ok)
    if hidden_ptr is not None:
        out = activated(value.to(tl.float32), ACTIVATION, DTYPE)
        tl.store(hidden_ptr + where, out.to(DTYPE), mask=ok)


@jit
def fc2_kernel(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    drop_path_ptr,
    out_ptr,
    rows,
    tokens,
    channels,
    hidden,
    residual_b,
    residual_n,
    residual_c,
    out_b,
    out_n,
    out_c,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """The residual plus drop path times fc2 of packed hidden values, into tokens with any strides."""
    row, column = tile_of_program(rows, channels, BLOCK_M, BLOCK_N, GROUP)
    m = row * BLOCK_M + tl.arange(0, BLOCK_M)
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    out = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    out = packed_product(hidden_ptr, weight_ptr, m, n, rows, channels, hidden, hidden, 1, out, BLOCK_K)
    out += vector(bias_ptr, n, channels, 0.0)
    if drop_path_ptr is not None:
        out *= drop_path_factors(drop_path_ptr, m, tokens, rows)
    if residual_ptr is not None:
        out += load_rows(residual_ptr, m, tokens, n, rows, channels, residual_b, residual_n, residual_c)
    ok = (m < rows)[:, None] & (n < channels)[None, :]
    where = row_pointers(out_ptr, m, tokens, n, out_b, out_n, out_c)
    tl.store(where, out.to(out_ptr.dtype.element_ty), mask=ok)


@jit
def middle_kernel(
    grad_ptr,
    weight_ptr,
    value_ptr,
    drop_path_ptr,
    value_grad_ptr,
    hidden_ptr,
    sums_ptr,
    rows,
    tokens,
    channels,
    hidden,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Gradient of fc1's result from that of fc2's, packed; outputs that are None are not written.

    ``sums_ptr`` (tiles of rows, hidden): the gradient's sums over each tile, before rounding.
    """
    row, column = tile_of_program(rows, hidden, BLOCK_M, BLOCK_N, GROUP)
    m = row * BLOCK_M + tl.arange(0, BLOCK_M)
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    DTYPE: tl.constexpr = weight_ptr.dtype.element_ty
    where = m.to(tl.int64)[:, None] * hidden + n[None, :]
    ok = (m < rows)[:, None] & (n < hidden)[None, :]
    grad = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if value_grad_ptr is not None:
        grad = packed_product(grad_ptr, weight_ptr, m, n, rows, hidden, channels, 1, hidden, grad, BLOCK_K)
    value = tl.load(value_ptr + where, mask=ok, other=0.0).to(tl.float32)
    if drop_path_ptr is not None:
        factor = drop_path_factors(drop_path_ptr, m, tokens, rows)
    if hidden_ptr is not None:
        out = activated(value, ACTIVATION, DTYPE)
        if drop_path_ptr is not None:
            out *= factor
        tl.store(hidden_ptr + where, out.to(DTYPE), mask=ok)
    if value_grad_ptr is not None:
        grad *= activated_gradient(value, ACTIVATION, DTYPE)
        if drop_path_ptr is not None:
            grad *= factor
        tl.store(value_grad_ptr + where, grad.to(DTYPE), mask=ok)
        if sums_ptr is not None:
            grad = tl.where(ok, grad, 0.0)
            tl.store(sums_ptr + row.to(tl.int64) * hidden + n, tl.sum(grad, axis=0), mask=n < hidden)


class Tile(NamedTuple):
    """A product's tile: rows, columns, terms at a time, warps. All 0: PyTorch's product, and a pass."""

    rows: int
    columns: int
    depth: int
    warps: int


PYTORCH = Tile(0, 0, 0, 0)

# Under what the tile of a kernel is tuned.
TUNED = {kernel: f"feed_forward_{kernel} 16-bit" for kernel in ("fc1", "fc2", "middle")}


def heuristic(kernel: str, columns: int) -> Tile:
    """A rule of thumb: large tiles, and columns that most widths are multiples of."""
    # With two tiles of values beside its sums, the kernel in the middle has registers for half as many.
    return Tile(128, 64 if kernel == "middle" or columns % 128 else 128, 32, 8)


def tiles() -> list[tuple[int, ...]]:
    """Tiles worth measuring."""
    return [
        PYTORCH,
        *((rows, columns, 32, 8) for rows in (64, 128) for columns in (64, 128, 256)),
        (128, 64, 64, 4),
        (128, 128, 64, 8),
        (64, 64, 64, 4),
    ]


def can_run(call: Any) -> bool:
    """Whether the kernels take the products of ``call``; float32 ones are left to PyTorch and its flag."""
    return call.compute in (torch.float16, torch.bfloat16)


def tile_for(kernel: str, call: Any) -> Tile:
    """The tile of one of the kernels for ``call``."""
    channels, hidden = call.x.shape[-1], call.fc1_weight.shape[0]
    if not can_run(call):
        return PYTORCH
    columns = channels if kernel == "fc2" else hidden
    return Tile(
        *tuning.tile_of(TUNED[kernel], (channels, hidden), lambda: heuristic(kernel, columns), call.x)
    )


def _launch(tile: Tile, rows: int, columns: int) -> tuple[tuple[int], dict[str, Any]]:
    programs = ceil_div(rows, tile.rows) * ceil_div(columns, tile.columns)
    return (programs,), {
        "BLOCK_M": tile.rows,
        "BLOCK_N": tile.columns,
        "BLOCK_K": tile.depth,
        "GROUP": 8,
        "num_warps": tile.warps,
        "num_stages": 3,
        "enable_fp_fusion": True,
    }


def fc1(
    launches: Any,
    tile: Tile,
    weight: Tensor,
    source: Tensor,
    statistics: tuple[Tensor | None, Tensor | None],
    normalised: Tensor | None,
    value: Tensor | None,
    hidden: Tensor | None,
) -> None:
    """fc1 of tokens, and the activation.

    Args:
        launches: of the call, see :mod:`fused_ops.feed_forward.triton`.
        weight: (hidden, C), in half precision as all packed operands.
        source: x (B, N, C), to be normalised by the batch's statistics, or the packed operand (rows, C).
        statistics: mean and variance (C), with the first.
        normalised: gets the norm's output (rows, C), with the first.
        value, hidden: get fc1's result and the activation's, (rows, hidden).
    """
    call = launches.call
    rows, tokens, channels, width = launches.sizes
    on_load = source.dim() == 3
    grid, meta = _launch(tile, rows, width)
    fc1_kernel[grid](
        source,
        weight,
        call.fc1_bias,
        *(launches.vectors if on_load else (None, None)),
        *(statistics if on_load else (None, None)),
        normalised,
        value,
        hidden,
        rows,
        tokens,
        channels,
        width,
        *(source.stride() if on_load else (0, channels, 1)),
        call.eps,
        NORM="batch" if on_load else "none",
        ACTIVATION=call.activation,
        **meta,
    )


def fc2(launches: Any, tile: Tile, weight: Tensor, hidden: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """fc2 of ``hidden`` (rows, hidden), drop path, residual; weight and bias are those with layer scale."""
    call = launches.call
    rows, tokens, channels, width = launches.sizes
    residual = call.x if call.identity else call.residual
    grid, meta = _launch(tile, rows, channels)
    fc2_kernel[grid](
        hidden,
        weight,
        bias,
        residual,
        call.drop_path,
        out,
        rows,
        tokens,
        channels,
        width,
        *(0, 0, 0) if residual is None else residual.stride(),
        *out.stride(),
        **meta,
    )


def middle(
    launches: Any,
    tile: Tile,
    weight: Tensor,
    grad: Tensor,
    value: Tensor,
    value_grad: Tensor | None,
    hidden: Tensor | None,
    fc1_bias_grad: Tensor | None,
) -> None:
    """From the gradient of the result (rows, C), packed, before drop path, to that of fc1's (rows, hidden).

    Args:
        weight: fc2's, with layer scale.
        value: fc1's result.
        value_grad: gets its gradient.
        hidden: gets the activation once more, times drop path.
        fc1_bias_grad: gets the sums of ``value_grad``.
    """
    call = launches.call
    rows, tokens, channels, width = launches.sizes
    grid, meta = _launch(tile, rows, width)
    sums = None if fc1_bias_grad is None else launches.floats(ceil_div(rows, tile.rows) * width)
    middle_kernel[grid](
        grad,
        weight,
        value,
        call.drop_path,
        value_grad,
        hidden,
        sums,
        rows,
        tokens,
        channels,
        width,
        ACTIVATION=call.activation,
        **meta,
    )
    if sums is not None:
        fc1_bias_grad.copy_(sums.view(-1, width).sum(0))
