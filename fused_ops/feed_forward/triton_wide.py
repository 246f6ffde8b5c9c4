"""The feed-forward chain with its hidden map in memory: products, and Triton kernels in between.

In half precision norm, activation, residual and their backward are part of the products
(:mod:`fused_ops.feed_forward.triton_products`) unless that was measured slower; other products are PyTorch's.

For wide tokens, of which a tile with all channels leaves no registers for hidden units beside it, and for
chains with a convolution. The kernels do each other step in one pass over the hidden map or over the tokens:
the norm; the activation; its derivative together with the activation itself, which is not kept; drop path and
residual; the norm's backward with the residual's gradient. The convolution's are in
:mod:`fused_ops.feed_forward.triton_conv`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_ops.core import distributed
from fused_ops.core.statistics import finish_gradients
from fused_ops.core.triton_support import ceil_div, jit, tl
from fused_ops.feed_forward import triton_conv, triton_norm, triton_products
from fused_ops.feed_forward.triton_rows import (
    activated,
    activated_gradient,
    drop_path_factors,
    load_rows,
    normalise,
    row_pointers,
)


@jit
def residual_kernel(
    value_ptr,
    residual_ptr,
    drop_path_ptr,
    out_ptr,
    rows,
    tokens,
    channels,
    value_b,
    value_n,
    value_c,
    residual_b,
    residual_n,
    residual_c,
    out_b,
    out_n,
    out_c,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """value times its image's factor, plus the residual, where they are given; tiles (BLOCK_M, BLOCK_C)."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.arange(0, BLOCK_C)
    out = load_rows(value_ptr, m, tokens, c, rows, channels, value_b, value_n, value_c)
    if drop_path_ptr is not None:
        out *= drop_path_factors(drop_path_ptr, m, tokens, rows)
    if residual_ptr is not None:
        out += load_rows(residual_ptr, m, tokens, c, rows, channels, residual_b, residual_n, residual_c)
    ok = (m < rows)[:, None] & (c < channels)[None, :]
    where = row_pointers(out_ptr, m, tokens, c, out_b, out_n, out_c)
    tl.store(where, out.to(out_ptr.dtype.element_ty), mask=ok)


@jit
def activation_kernel(value_ptr, out_ptr, count, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """The activation of ``count`` values, BLOCK per program."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(value_ptr + i, mask=i < count, other=0.0).to(tl.float32)
    out = activated(value, ACTIVATION, out_ptr.dtype.element_ty)
    tl.store(out_ptr + i, out.to(out_ptr.dtype.element_ty), mask=i < count)


@jit
def activation_backward_kernel(
    value_ptr, grad_ptr, out_ptr, count, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr
):
    """Multiplies the gradient by the activation's derivative, in place; the activation where it is wanted."""
    DTYPE: tl.constexpr = value_ptr.dtype.element_ty
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(value_ptr + i, mask=i < count, other=0.0).to(tl.float32)
    if out_ptr is not None:
        tl.store(out_ptr + i, activated(value, ACTIVATION, DTYPE).to(DTYPE), mask=i < count)
    if grad_ptr is not None:
        grad = tl.load(grad_ptr + i, mask=i < count, other=0.0).to(tl.float32)
        grad *= activated_gradient(value, ACTIVATION, DTYPE)
        tl.store(grad_ptr + i, grad.to(DTYPE), mask=i < count)


@jit
def norm_sums_kernel(
    z_grad_ptr,
    x_ptr,
    mean_ptr,
    var_ptr,
    parts_ptr,
    rows,
    tokens,
    channels,
    tiles_each,
    x_b,
    x_n,
    x_c,
    eps,
    NORM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sums over ``tiles_each`` tiles (BLOCK_M, BLOCK_C) of the gradient of the norm's output, and of it times
    the normalised value: a part (2, C) per program.
    """
    c = tl.arange(0, BLOCK_C)
    first = tl.zeros((BLOCK_C,), tl.float32)
    second = tl.zeros((BLOCK_C,), tl.float32)
    start = tl.program_id(0) * tiles_each * BLOCK_M
    for tile in range(tiles_each):
        m = start + tile * BLOCK_M + tl.arange(0, BLOCK_M)
        z_grad = load_rows(z_grad_ptr, m, rows, c, rows, channels, 0, channels, 1)
        x = load_rows(x_ptr, m, tokens, c, rows, channels, x_b, x_n, x_c)
        normalised, _ = normalise(x, m, c, rows, channels, mean_ptr, var_ptr, eps, NORM)
        first += tl.sum(z_grad, axis=0)
        second += tl.sum(z_grad * normalised, axis=0)
    base = parts_ptr + tl.program_id(0).to(tl.int64) * 2 * channels + c
    tl.store(base, first, mask=c < channels)
    tl.store(base + channels, second, mask=c < channels)


_VALUES = 2048


def _flat(count: int) -> tuple[tuple[int], dict[str, Any]]:
    return (ceil_div(count, _VALUES),), {"BLOCK": _VALUES, "num_warps": 4, "enable_fp_fusion": True}


def _product(values: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """values (rows, K) times weight (N, K) transposed, plus bias."""
    if bias is None:
        return torch.mm(values, weight.t(), out=out)
    return torch.addmm(bias.to(values.dtype), values, weight.t(), out=out)


def _normalised(launches: Any, statistics: tuple[Tensor | None, Tensor | None], out: Tensor) -> Tensor:
    """The norm's output, packed (rows, C); in ``out`` unless it is x itself."""
    call = launches.call
    rows, _, channels, _ = launches.sizes
    if not call.has_normalised:
        return call.x.reshape(rows, channels)
    return triton_norm.normalised(call.x, call.norm, launches.vectors, statistics, call.eps, out)


def _tokens_like(launches: Any) -> Tensor:
    """Room for what the norm gives; empty where that is x itself."""
    call = launches.call
    rows, _, channels, _ = launches.sizes
    return call.x.new_empty((rows, channels) if call.has_normalised else 0, dtype=call.compute)


def scale_and_add(value: Tensor, drop_path: Tensor | None, residual: Tensor | None, out: Tensor) -> None:
    """``out`` = value (B, N, C) times drop path (B) plus residual, where they are given."""
    batch, tokens, channels = value.shape
    rows = batch * tokens
    programs, meta = triton_norm.tile_plan(rows, channels)
    residual_kernel[(programs,)](
        value,
        residual,
        drop_path,
        out,
        rows,
        tokens,
        channels,
        *value.stride(),
        *(0, 0, 0) if residual is None else residual.stride(),
        *out.stride(),
        **meta,
    )


def forward(
    launches: Any,
    statistics: tuple[Tensor | None, Tensor | None],
    fc2_bias: Tensor | None,
    out: Tensor,
    normalised: Tensor,
    value: Tensor,
) -> None:
    """Fills ``out`` (B, N, C), and the other two where they are kept.

    Args:
        launches: of the call, see :mod:`fused_ops.feed_forward.triton`.
        statistics: mean and variance (C) that a BatchNorm normalises with.
        fc2_bias: after the layer scale, (C), or None.
        normalised, value: what the norm gave, (rows, C), and fc1, (rows, hidden); empty where not kept.
    """
    call = launches.call
    rows, _, channels, _ = launches.sizes
    fc1_weight, fc1_bias, fc2_weight = launches.matrices()
    with_conv = call.conv_weight is not None
    hidden_like = {"dtype": call.compute, "device": call.x.device}
    if not call.keep_value:
        value = None
    tile = triton_products.tile_for("fc1", call)
    if tile != triton_products.PYTORCH:
        kept = normalised if normalised.numel() else None
        source = call.x
        if call.norm != "batch":
            source = _normalised(launches, statistics, _tokens_like(launches) if kept is None else kept)
            kept = None
        if with_conv and value is None:
            value = torch.empty((rows, launches.hidden), **hidden_like)
        hidden = None if with_conv else torch.empty((rows, launches.hidden), **hidden_like)
        triton_products.fc1(launches, tile, fc1_weight, source, statistics, kept, value, hidden)
    else:
        if not normalised.numel():
            normalised = _tokens_like(launches)
        kept = value is not None
        value = torch.empty((rows, launches.hidden), **hidden_like) if value is None else value
        _product(_normalised(launches, statistics, normalised), fc1_weight, fc1_bias, value)
        if not with_conv:
            # Without a gradient to come, in place.
            hidden = torch.empty_like(value) if kept else value
            grid, meta = _flat(value.numel())
            activation_kernel[grid](value, hidden, value.numel(), ACTIVATION=call.activation, **meta)
    if with_conv:
        hidden = torch.empty_like(value)
        triton_conv.convolve(call, value, hidden)
    tile = triton_products.tile_for("fc2", call)
    if tile != triton_products.PYTORCH:
        triton_products.fc2(launches, tile, fc2_weight, hidden, fc2_bias, out)
        return
    branch = _product(hidden, fc2_weight, fc2_bias, call.x.new_empty((rows, channels), dtype=call.compute))
    residual = call.x if call.identity else call.residual
    scale_and_add(branch.view(call.x.shape), call.drop_path, residual, out)


def backward(
    launches: Any,
    grad: Tensor,
    normalised: Tensor,
    value: Tensor,
    gradients: tuple[Tensor | None, ...],
) -> None:
    """Fills the gradients that are not None.

    Args:
        grad: of the result (B, N, C), in any layout.
        normalised, value: what :func:`forward` kept; without the first the norm is computed again.
        gradients: of x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, norm_weight, norm_bias, layer_scale,
            conv_weight, conv_bias.
    """
    (
        x_grad,
        fc1_weight_grad,
        fc1_bias_grad,
        fc2_weight_grad,
        fc2_bias_grad,
        norm_weight_grad,
        norm_bias_grad,
        layer_scale_grad,
        *of_conv,
    ) = gradients
    call = launches.call
    rows, tokens, channels, _ = launches.sizes
    fc1_weight, _, fc2_weight = launches.matrices()
    statistics = (call.mean, call.var)
    tile = triton_products.tile_for("middle", call) if call.conv_weight is None else triton_products.PYTORCH
    # The kernel multiplies by it what it writes.
    drop_path = call.drop_path if tile == triton_products.PYTORCH else None
    branch_grad = grad
    if drop_path is not None or grad.dtype != call.compute or not grad.is_contiguous():
        branch_grad = torch.empty(call.x.shape, dtype=call.compute, device=grad.device)
        scale_and_add(grad, drop_path, None, branch_grad)
    branch_grad = branch_grad.view(rows, channels)

    affine = norm_weight_grad is not None or norm_bias_grad is not None
    to_input = x_grad is not None or affine
    to_value = to_input or fc1_weight_grad is not None or fc1_bias_grad is not None
    of_fc2 = fc2_weight_grad is not None or layer_scale_grad is not None
    to_hidden = to_value or any(gradient is not None for gradient in of_conv)
    branch_sum = None
    if fc2_bias_grad is not None or (layer_scale_grad is not None and call.fc2_bias is not None):
        branch_sum = _sum_over_rows(branch_grad, call.drop_path if drop_path is None else None)
    if tile != triton_products.PYTORCH:
        value_grad = torch.empty_like(value) if to_value else None
        hidden = torch.empty_like(value) if of_fc2 else None
        if to_value or of_fc2:
            triton_products.middle(
                launches, tile, fc2_weight, branch_grad, value, value_grad, hidden, fc1_bias_grad
            )
        if of_fc2:
            _fc2_gradients(launches, branch_grad, hidden, branch_sum, fc2_weight_grad, layer_scale_grad)
    elif call.conv_weight is None:
        value_grad = branch_grad @ fc2_weight if to_value else None
        hidden = torch.empty_like(value) if of_fc2 else None
        if to_value or of_fc2:
            grid, meta = _flat(value.numel())
            activation_backward_kernel[grid](
                value, value_grad, hidden, value.numel(), ACTIVATION=call.activation, **meta
            )
        if of_fc2:
            _fc2_gradients(launches, branch_grad, hidden, branch_sum, fc2_weight_grad, layer_scale_grad)
        if fc1_bias_grad is not None:
            fc1_bias_grad.copy_(value_grad.sum(0, dtype=torch.float32))
    else:
        hidden, raw = triton_conv.convolve_again(call, value, of_fc2, to_hidden)
        if of_fc2:
            _fc2_gradients(launches, branch_grad, hidden, branch_sum, fc2_weight_grad, layer_scale_grad)
        # Before more of its size is allocated.
        del hidden
        if to_hidden:
            value_grad = torch.empty_like(value) if to_input or fc1_weight_grad is not None else None
            triton_conv.backward(
                call, branch_grad @ fc2_weight, value, raw, value_grad, fc1_bias_grad, *of_conv
            )
    if fc2_bias_grad is not None:
        fc2_bias_grad.copy_(branch_sum if call.layer_scale is None else branch_sum * call.layer_scale)
    if fc1_weight_grad is not None:
        if not call.has_normalised:
            normalised = call.x.reshape(rows, channels)
        elif not normalised.numel():
            normalised = _normalised(launches, statistics, _tokens_like(launches))
        fc1_weight_grad.copy_(value_grad.t() @ normalised)
    if not to_input:
        return

    z_grad = value_grad @ fc1_weight
    programs, meta = triton_norm.tile_plan(rows, channels)
    kinds = {"NORM": call.norm, **meta}
    sums = None
    if affine or call.batch_stats:
        sums = launches.floats(2 * channels).view(2, channels) if call.batch_stats else None
        each = max(1, ceil_div(programs, 528))
        parts = ceil_div(programs, each)
        partial = launches.floats(parts * 2 * channels)
        norm_sums_kernel[(parts,)](
            z_grad,
            call.x,
            *statistics,
            partial,
            rows,
            tokens,
            channels,
            each,
            *call.x.stride(),
            call.eps,
            **kinds,
        )
        finish_gradients(
            partial,
            channels,
            parts=0,
            part_stride=0,
            sums=(0, parts, 2 * channels),
            norm_weight_grad=norm_weight_grad,
            norm_bias_grad=norm_bias_grad,
            sums_out=sums,
        )
    if x_grad is None:
        return
    if sums is not None and call.group:
        distributed.exchange_sums(sums, rows, call.group)
    triton_norm.input_gradient(
        z_grad,
        call.x,
        grad if call.identity else None,
        call.norm,
        call.norm_weight,
        statistics,
        sums,
        call.eps,
        x_grad,
    )


def _sum_over_rows(grad: Tensor, drop_path: Tensor | None) -> Tensor:
    """Sum (C) of packed rows, those of each image times its factor where one is given."""
    if drop_path is None:
        return grad.sum(0, dtype=torch.float32)
    of_images = grad.view(drop_path.shape[0], -1, grad.shape[1]).sum(1, dtype=torch.float32)
    return (of_images * drop_path[:, None]).sum(0)


def _fc2_gradients(
    launches: Any,
    branch_grad: Tensor,
    hidden: Tensor,
    branch_sum: Tensor | None,
    fc2_weight_grad: Tensor | None,
    layer_scale_grad: Tensor | None,
) -> None:
    """Gradients of fc2's weight and of the layer scale from that of their result (rows, C) and its sum (C).

    One of ``branch_grad`` and ``hidden`` has the factors of drop path.
    """
    call = launches.call
    product = branch_grad.t() @ hidden
    if fc2_weight_grad is not None:
        scale = None if call.layer_scale is None else call.layer_scale.float()[:, None]
        fc2_weight_grad.copy_(product if scale is None else product * scale)
    if layer_scale_grad is not None:
        total = (product.float() * call.fc2_weight.float()).sum(1)
        if call.fc2_bias is not None:
            total += branch_sum * call.fc2_bias.float()
        layer_scale_grad.copy_(total)


def launch_count(call: Any, direction: str) -> int:
    """Launches beside those for the matrices and a BatchNorm's statistics; PyTorch's included."""
    biases = [bias for bias in (call.fc1_bias, call.fc2_bias) if bias is not None]
    with_conv = call.conv_weight is not None
    kernels = triton_products.can_run(call)
    if direction == "forward":
        if kernels:
            # The norm where it is not fc1's, fc1, the convolution, fc2.
            return (call.has_normalised and call.norm != "batch") + 2 + with_conv
        # The norm, fc1, the activation or the convolution, fc2, the residual.
        return call.has_normalised + 4 + sum(bias.dtype != call.compute for bias in biases)
    scaled = int(call.layer_scale is not None)
    of_fc2_bias = call.fc2_bias is not None
    # Products: each layer's two; the activation; copies to both weights' gradients; the input's gradient.
    count = 4 + 1 + 2 + 1 + 2 * (call.norm != "none")
    if with_conv:
        # In the activation's place the convolution, its gradients and their merge, which is fc1's bias's too;
        # the norm once more.
        count += 2 + call.has_normalised - 2 * (call.fc1_bias is not None)
    whole = kernels and not with_conv
    if whole:
        # The activation is fc2's; drop path needs the sum over each image, and its product with the factor.
        count += 2 * (call.drop_path is not None and of_fc2_bias) - 1
    count += int((call.drop_path is not None and not whole) or call.out_dtype != call.compute)
    count += 2 * len(biases) + scaled * (1 + of_fc2_bias)
    # The layer scale's gradient: two casts, product, sum and copy; fc2's bias in it: product, addition.
    return count + scaled * (5 + 2 * of_fc2_bias)
