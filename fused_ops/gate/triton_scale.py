"""Triton kernels for the end of a gate: scale, add, activate, in one pass over the maps each way."""

from __future__ import annotations

from fused_ops.core.activations import activate, activation_gradient
from fused_ops.core.triton_support import jit, tl
from fused_ops.gate.triton_tiles import (
    gate_backward,
    gate_of,
    load_channels,
    load_positions,
    load_tile,
    position_offsets,
    program_ranges,
)


@jit
def scale_forward_kernel(
    x_ptr,
    channel_ptr,
    position_ptr,
    add_ptr,
    residual_ptr,
    out_ptr,
    channels,
    positions,
    width,
    parts,
    part_positions,
    blocks,
    block_channels,
    x_b,
    x_c,
    x_h,
    x_w,
    residual_b,
    residual_c,
    residual_h,
    residual_w,
    channel_b,
    channel_c,
    add_b,
    add_c,
    position_b,
    position_h,
    position_w,
    out_b,
    out_c,
    out_p,
    GATE: tl.constexpr,
    SUM: tl.constexpr,
    ACTIVATION: tl.constexpr,
    FLAT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One tile (BLOCK_P, BLOCK_C) of ``activation(x * g + add + residual)``."""
    image, _, first_p, last_p, first_c, last_c = program_ranges(
        positions, channels, parts, part_positions, blocks, block_channels
    )
    p = first_p + tl.arange(0, BLOCK_P)
    c = first_c + tl.arange(0, BLOCK_C)
    p_ok = p < last_p
    c_ok = c < last_c
    ok = p_ok[:, None] & c_ok[None, :]
    x_ptr += image.to(tl.int64) * x_b
    value = load_tile(x_ptr, position_offsets(p, width, x_h, x_w, FLAT), c, x_c, ok)
    if channel_ptr is not None:
        channel = load_channels(channel_ptr, image, c, channel_b, channel_c, c_ok)
    if position_ptr is not None:
        position = load_positions(position_ptr, image, p, width, position_b, position_h, position_w, p_ok)
    if SUM:
        value *= gate_of(channel[None, :] + position[:, None], GATE)
    else:
        if channel_ptr is not None:
            value *= gate_of(channel, GATE)[None, :]
        if position_ptr is not None:
            value *= gate_of(position, GATE)[:, None]
    if add_ptr is not None:
        value += load_channels(add_ptr, image, c, add_b, add_c, c_ok)[None, :]
    if residual_ptr is not None:
        residual_ptr += image.to(tl.int64) * residual_b
        where = position_offsets(p, width, residual_h, residual_w, FLAT)
        value += load_tile(residual_ptr, where, c, residual_c, ok)
    value = activate(value, ACTIVATION)
    target = out_ptr + image.to(tl.int64) * out_b + p.to(tl.int64)[:, None] * out_p
    target += c.to(tl.int64)[None, :] * out_c
    tl.store(target, value.to(out_ptr.dtype.element_ty), mask=ok)


@jit
def scale_backward_kernel(
    grad_ptr,
    x_ptr,
    channel_ptr,
    position_ptr,
    add_ptr,
    residual_ptr,
    x_grad_ptr,
    residual_grad_ptr,
    channel_sum_ptr,
    add_sum_ptr,
    position_grad_ptr,
    channels,
    positions,
    width,
    parts,
    part_positions,
    blocks,
    block_channels,
    steps,
    sum_stride,
    x_b,
    x_c,
    x_h,
    x_w,
    residual_b,
    residual_c,
    residual_h,
    residual_w,
    grad_b,
    grad_c,
    grad_h,
    grad_w,
    channel_b,
    channel_c,
    add_b,
    add_c,
    position_b,
    position_h,
    position_w,
    x_grad_b,
    x_grad_c,
    x_grad_p,
    residual_grad_b,
    residual_grad_c,
    residual_grad_p,
    GATE: tl.constexpr,
    SUM: tl.constexpr,
    ACTIVATION: tl.constexpr,
    FLAT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Gradients from one part of the positions and one block of the channels of one image.

    Tiles are (BLOCK_P, BLOCK_C); each gradient is computed only where its pointer is given. Sums per channel
    go to part ``part`` of (parts, ..., images, C), ``sum_stride`` values apart. A gradient of the position
    gate (images, H, W) needs all channels in one block and all the part's positions in one tile, so that
    ``steps``, the tiles over the positions, is a compile-time 1.
    """
    image, part, first_p, last_p, first_c, last_c = program_ranges(
        positions, channels, parts, part_positions, blocks, block_channels
    )
    row = image.to(tl.int64)
    x_ptr += row * x_b
    grad_ptr += row * grad_b
    if residual_ptr is not None:
        residual_ptr += row * residual_b
    # Sums are reduced once, after their last tile.
    position_sum = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start_c in range(first_c, last_c, BLOCK_C):
        c = start_c + tl.arange(0, BLOCK_C)
        c_ok = c < last_c
        if channel_ptr is not None:
            channel = load_channels(channel_ptr, image, c, channel_b, channel_c, c_ok)
        if add_ptr is not None:
            add = load_channels(add_ptr, image, c, add_b, add_c, c_ok)
        channel_sum = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
        add_sum = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
        for step in range(steps):
            p = first_p + step * BLOCK_P + tl.arange(0, BLOCK_P)
            p_ok = p < last_p
            ok = p_ok[:, None] & c_ok[None, :]
            grad = load_tile(grad_ptr, position_offsets(p, width, grad_h, grad_w, FLAT), c, grad_c, ok)
            if position_ptr is not None:
                position = load_positions(
                    position_ptr, image, p, width, position_b, position_h, position_w, p_ok
                )
            if SUM:
                logits = channel[None, :] + position[:, None]
                factor = gate_of(logits, GATE)
            else:
                # Broadcast one after the other, so that an absent gate costs nothing.
                factor = tl.full((BLOCK_P, BLOCK_C), 1.0, tl.float32)
                if channel_ptr is not None:
                    factor *= gate_of(channel, GATE)[None, :]
                if position_ptr is not None:
                    factor *= gate_of(position, GATE)[:, None]
            if ACTIVATION != "none" or channel_sum_ptr is not None or position_grad_ptr is not None:
                x = load_tile(x_ptr, position_offsets(p, width, x_h, x_w, FLAT), c, x_c, ok)
            if ACTIVATION != "none":
                before = x * factor
                if add_ptr is not None:
                    before += add[None, :]
                if residual_ptr is not None:
                    where = position_offsets(p, width, residual_h, residual_w, FLAT)
                    before += load_tile(residual_ptr, where, c, residual_c, ok)
                grad *= activation_gradient(before, ACTIVATION)
            if residual_grad_ptr is not None:
                target = residual_grad_ptr + row * residual_grad_b + p.to(tl.int64)[:, None] * residual_grad_p
                target += c.to(tl.int64)[None, :] * residual_grad_c
                tl.store(target, grad.to(residual_grad_ptr.dtype.element_ty), mask=ok)
            if x_grad_ptr is not None:
                target = x_grad_ptr + row * x_grad_b + p.to(tl.int64)[:, None] * x_grad_p
                target += c.to(tl.int64)[None, :] * x_grad_c
                tl.store(target, (grad * factor).to(x_grad_ptr.dtype.element_ty), mask=ok)
            # What is outside adds nothing: the map and the gradient are zeros there.
            if add_sum_ptr is not None:
                add_sum += grad
            if channel_sum_ptr is not None or position_grad_ptr is not None:
                product = grad * x
                if SUM:
                    product = gate_backward(product, logits, GATE)
                if channel_sum_ptr is not None:
                    of_channel = product
                    if position_ptr is not None and not SUM:
                        of_channel = product * gate_of(position, GATE)[:, None]
                    channel_sum += of_channel
                if position_grad_ptr is not None:
                    of_position = product
                    if channel_ptr is not None and not SUM:
                        of_position = product * gate_of(channel, GATE)[None, :]
                    position_sum += of_position
        target = tl.cast(part, tl.int64) * sum_stride + row * channels + c
        if channel_sum_ptr is not None:
            value = tl.sum(channel_sum, 0)
            if not SUM:
                value = gate_backward(value, channel, GATE)
            tl.store(channel_sum_ptr + target, value.to(channel_sum_ptr.dtype.element_ty), mask=c_ok)
        if add_sum_ptr is not None:
            value = tl.sum(add_sum, 0)
            tl.store(add_sum_ptr + target, value.to(add_sum_ptr.dtype.element_ty), mask=c_ok)
    if position_grad_ptr is not None:
        p = first_p + tl.arange(0, BLOCK_P)
        total = tl.sum(position_sum, 1)
        if not SUM:
            position = load_positions(
                position_ptr, image, p, width, position_b, position_h, position_w, p < last_p
            )
            total = gate_backward(total, position, GATE)
        value = total.to(position_grad_ptr.dtype.element_ty)
        tl.store(position_grad_ptr + row * positions + p, value, mask=p < last_p)
