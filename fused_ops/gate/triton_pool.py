"""Triton kernels for poolings of a map, per channel over positions and per position over channels.

One launch reads the map once, whatever is asked for. Where only channels are pooled, a program owns one
block of channels and walks over its part of the positions. Where positions are pooled, it owns one block of
positions and walks over all channels; what it finds out about a channel, if that is asked for too, is a part.
"""

from __future__ import annotations

from fused_ops.core.triton_support import jit, tl
from fused_ops.gate.triton_tiles import (
    add_weights,
    gate_backward,
    gate_of,
    larger,
    load_tile,
    pool_tile,
    position_offsets,
    program_ranges,
    reduce_pooled,
    store_pooled,
)


@jit
def pool_forward_kernel(
    x_ptr,
    gate_ptr,
    channels_ptr,
    channel_index_ptr,
    channel_stats_ptr,
    partial_ptr,
    positions_ptr,
    position_index_ptr,
    position_stats_ptr,
    images,
    channels,
    positions,
    width,
    parts,
    part_positions,
    blocks,
    block_channels,
    steps,
    channel_entropy_scale,
    position_entropy_scale,
    x_b,
    x_c,
    x_h,
    x_w,
    gate_b,
    gate_c,
    C_SLOTS: tl.constexpr,
    C_MEAN: tl.constexpr,
    C_MAX: tl.constexpr,
    C_ENTROPY: tl.constexpr,
    P_SLOTS: tl.constexpr,
    P_MEAN: tl.constexpr,
    P_MAX: tl.constexpr,
    P_ENTROPY: tl.constexpr,
    GATE: tl.constexpr,
    FLAT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One part of the positions and one block of the channels of one image, in tiles (BLOCK_P, BLOCK_C).

    ``steps``: tiles over the positions; a compile-time 1, which is no loop, where positions are pooled.
    Poolings of channels go to ``channels_ptr`` (images, C_SLOTS, C), or, where there are parts, their running
    values to ``partial_ptr`` (5, parts, images, C) in float32. Poolings of positions go to ``positions_ptr``
    (images, P_SLOTS, H, W).
    """
    image, part, first_p, last_p, first_c, last_c = program_ranges(
        positions, channels, parts, part_positions, blocks, block_channels
    )
    x_ptr += image.to(tl.int64) * x_b
    if gate_ptr is not None:
        gate_ptr += image.to(tl.int64) * gate_b
    zeros = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    p_total, p_weight, p_moment = zeros, zeros, zeros
    p_largest = zeros + float("-inf")
    # Where all values are minus infinity, none is larger than another, and the first tile's are the first.
    p_at = first_c + tl.arange(0, BLOCK_C)[None, :] + tl.zeros((BLOCK_P, BLOCK_C), tl.int32)
    for start_c in range(first_c, last_c, BLOCK_C):
        c = start_c + tl.arange(0, BLOCK_C)
        if gate_ptr is not None:
            logits = tl.load(gate_ptr + c.to(tl.int64) * gate_c, mask=c < last_c, other=0.0)
            factor = gate_of(logits.to(tl.float32), GATE)
        c_total, c_weight, c_moment = zeros, zeros, zeros
        c_largest = zeros + float("-inf")
        c_at = first_p + tl.arange(0, BLOCK_P)[:, None] + tl.zeros((BLOCK_P, BLOCK_C), tl.int32)
        for step in range(steps):
            p = first_p + step * BLOCK_P + tl.arange(0, BLOCK_P)
            ok = (p < last_p)[:, None] & (c < last_c)[None, :]
            value = load_tile(x_ptr, position_offsets(p, width, x_h, x_w, FLAT), c, x_c, ok)
            if gate_ptr is not None:
                # What is outside stays 0, whatever the factor.
                value = tl.where(ok, value * factor[None, :], 0.0)
            if C_SLOTS > 0:
                c_total, c_largest, c_at, c_weight, c_moment = pool_tile(
                    value,
                    p[:, None],
                    ok,
                    c_total,
                    c_largest,
                    c_at,
                    c_weight,
                    c_moment,
                    C_MEAN >= 0,
                    C_MAX >= 0,
                    C_ENTROPY >= 0,
                )
            if P_SLOTS > 0:
                p_total, p_largest, p_at, p_weight, p_moment = pool_tile(
                    value,
                    c[None, :],
                    ok,
                    p_total,
                    p_largest,
                    p_at,
                    p_weight,
                    p_moment,
                    P_MEAN >= 0,
                    P_MAX >= 0,
                    P_ENTROPY >= 0,
                )
        if C_SLOTS > 0:
            totals, largest, at, weight, moment = reduce_pooled(
                c_total, c_largest, c_at, c_weight, c_moment, 0
            )
            if partial_ptr is None:
                store_pooled(
                    channels_ptr,
                    channel_index_ptr,
                    channel_stats_ptr,
                    image,
                    c,
                    c < last_c,
                    channels,
                    images,
                    positions,
                    channel_entropy_scale,
                    totals,
                    largest,
                    at,
                    weight,
                    moment,
                    C_SLOTS,
                    C_MEAN,
                    C_MAX,
                    C_ENTROPY,
                )
            else:
                row = tl.cast(images, tl.int64) * channels
                target = partial_ptr + part * row + image.to(tl.int64) * channels + c
                row *= parts
                if C_MEAN >= 0:
                    tl.store(target, totals, mask=c < last_c)
                if C_MAX >= 0 or C_ENTROPY >= 0:
                    tl.store(target + row, largest, mask=c < last_c)
                if C_MAX >= 0:
                    tl.store(target + 2 * row, at.to(tl.float32, bitcast=True), mask=c < last_c)
                if C_ENTROPY >= 0:
                    tl.store(target + 3 * row, weight, mask=c < last_c)
                    tl.store(target + 4 * row, moment, mask=c < last_c)
    if P_SLOTS > 0:
        totals, largest, at, weight, moment = reduce_pooled(p_total, p_largest, p_at, p_weight, p_moment, 1)
        p = first_p + tl.arange(0, BLOCK_P)
        store_pooled(
            positions_ptr,
            position_index_ptr,
            position_stats_ptr,
            image,
            p,
            p < last_p,
            positions,
            images,
            channels,
            position_entropy_scale,
            totals,
            largest,
            at,
            weight,
            moment,
            P_SLOTS,
            P_MEAN,
            P_MAX,
            P_ENTROPY,
        )


@jit
def pool_merge_kernel(
    partial_ptr,
    channels_ptr,
    channel_index_ptr,
    channel_stats_ptr,
    images,
    channels,
    positions,
    parts,
    blocks,
    entropy_scale,
    C_SLOTS: tl.constexpr,
    C_MEAN: tl.constexpr,
    C_MAX: tl.constexpr,
    C_ENTROPY: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Running values (5, parts, images, C) of parts -> the poolings, parts in their order.

    One program: BLOCK_C channels of one image.
    """
    image = tl.program_id(0) // blocks
    c = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    ok = c < channels
    total = tl.zeros((BLOCK_C,), tl.float32)
    largest = tl.full((BLOCK_C,), float("-inf"), tl.float32)
    at = tl.full((BLOCK_C,), 2147483647, tl.int32)
    weight = tl.zeros((BLOCK_C,), tl.float32)
    moment = tl.zeros((BLOCK_C,), tl.float32)
    each = tl.cast(images, tl.int64) * channels
    row = each * parts
    for part in range(parts):
        source = partial_ptr + part * each + image.to(tl.int64) * channels + c
        if C_MEAN >= 0:
            total += tl.load(source, mask=ok, other=0.0)
        if C_MAX >= 0 or C_ENTROPY >= 0:
            top = tl.load(source + row, mask=ok, other=0.0)
        if C_MAX >= 0:
            first = tl.load(source + 2 * row, mask=ok, other=0.0).to(tl.int32, bitcast=True)
            at = tl.where(larger(top, largest) | (at == 2147483647), first, at)
        if C_ENTROPY >= 0:
            weights = tl.load(source + 3 * row, mask=ok, other=1.0)
            moments = tl.load(source + 4 * row, mask=ok, other=0.0)
            largest, weight, moment = add_weights(largest, weight, moment, top, weights, moments)
        elif C_MAX >= 0:
            largest = tl.where(larger(top, largest), top, largest)
    store_pooled(
        channels_ptr,
        channel_index_ptr,
        channel_stats_ptr,
        image,
        c,
        ok,
        channels,
        images,
        positions,
        entropy_scale,
        total,
        largest,
        at,
        weight,
        moment,
        C_SLOTS,
        C_MEAN,
        C_MAX,
        C_ENTROPY,
    )


@jit
def pool_backward_kernel(
    x_ptr,
    gate_ptr,
    channels_grad_ptr,
    channel_index_ptr,
    channel_stats_ptr,
    positions_grad_ptr,
    position_index_ptr,
    position_stats_ptr,
    x_grad_ptr,
    gate_sum_ptr,
    images,
    channels,
    positions,
    width,
    parts,
    part_positions,
    blocks,
    block_channels,
    channel_entropy_scale,
    position_entropy_scale,
    x_b,
    x_c,
    x_h,
    x_w,
    gate_b,
    gate_c,
    channels_grad_b,
    channels_grad_k,
    channels_grad_c,
    positions_grad_b,
    positions_grad_k,
    positions_grad_h,
    positions_grad_w,
    x_grad_b,
    x_grad_c,
    x_grad_p,
    C_MEAN: tl.constexpr,
    C_MAX: tl.constexpr,
    C_ENTROPY: tl.constexpr,
    P_MEAN: tl.constexpr,
    P_MAX: tl.constexpr,
    P_ENTROPY: tl.constexpr,
    GATE: tl.constexpr,
    FLAT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Gradients of the map and of its channel gate from those of all poolings, in tiles (BLOCK_P, BLOCK_C).

    The map is read only for entropies and for the gate's gradient, whose sum over this part goes to
    ``gate_sum_ptr`` (parts, images, C). Slots are -1 for poolings that get no gradient.
    """
    image, part, first_p, last_p, first_c, last_c = program_ranges(
        positions, channels, parts, part_positions, blocks, block_channels
    )
    x_ptr += image.to(tl.int64) * x_b
    row = image.to(tl.int64)
    c = first_c + tl.arange(0, BLOCK_C)
    c_ok = c < last_c
    if gate_ptr is not None:
        logits = tl.load(gate_ptr + row * gate_b + c.to(tl.int64) * gate_c, mask=c_ok, other=0.0)
        logits = logits.to(tl.float32)
        factor = gate_of(logits, GATE)
    if channels_grad_ptr is not None:
        channels_grad_ptr += row * channels_grad_b
        c_source = channels_grad_ptr + c.to(tl.int64) * channels_grad_c
        if C_MEAN >= 0:
            c_mean = (
                tl.load(c_source + C_MEAN * channels_grad_k, mask=c_ok, other=0.0).to(tl.float32) / positions
            )
        if C_MAX >= 0:
            c_max = tl.load(c_source + C_MAX * channels_grad_k, mask=c_ok, other=0.0).to(tl.float32)
            c_at = tl.load(channel_index_ptr + row * channels + c, mask=c_ok, other=0)
        if C_ENTROPY >= 0:
            c_slope = tl.load(c_source + C_ENTROPY * channels_grad_k, mask=c_ok, other=0.0).to(tl.float32)
            c_slope *= channel_entropy_scale
            c_log = tl.load(channel_stats_ptr + row * channels + c, mask=c_ok, other=0.0)
            c_entropy = tl.load(channel_stats_ptr + (images + row) * channels + c, mask=c_ok, other=0.0)
    # Reduced once, after the last tile.
    gate_sum = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start_p in range(first_p, last_p, BLOCK_P):
        p = start_p + tl.arange(0, BLOCK_P)
        p_ok = p < last_p
        ok = p_ok[:, None] & c_ok[None, :]
        if C_ENTROPY >= 0 or P_ENTROPY >= 0 or gate_sum_ptr is not None:
            x = load_tile(x_ptr, position_offsets(p, width, x_h, x_w, FLAT), c, x_c, ok)
            value = x
            if gate_ptr is not None:
                value = x * factor[None, :]
        grad = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
        if C_MEAN >= 0:
            grad += c_mean[None, :]
        if C_MAX >= 0:
            grad += tl.where(p[:, None] == c_at[None, :], c_max[None, :], 0.0)
        if C_ENTROPY >= 0:
            log_share = value - c_log[None, :]
            grad -= c_slope[None, :] * tl.exp(log_share) * (log_share + c_entropy[None, :])
        if positions_grad_ptr is not None:
            p_source = positions_grad_ptr + row * positions_grad_b
            p_source += position_offsets(p, width, positions_grad_h, positions_grad_w, False)
            if P_MEAN >= 0:
                p_mean = tl.load(p_source + P_MEAN * positions_grad_k, mask=p_ok, other=0.0).to(tl.float32)
                grad += (p_mean / channels)[:, None]
            if P_MAX >= 0:
                p_max = tl.load(p_source + P_MAX * positions_grad_k, mask=p_ok, other=0.0).to(tl.float32)
                p_at = tl.load(position_index_ptr + row * positions + p, mask=p_ok, other=0)
                grad += tl.where(c[None, :] == p_at[:, None], p_max[:, None], 0.0)
            if P_ENTROPY >= 0:
                p_slope = tl.load(p_source + P_ENTROPY * positions_grad_k, mask=p_ok, other=0.0)
                p_slope = p_slope.to(tl.float32) * position_entropy_scale
                p_log = tl.load(position_stats_ptr + row * positions + p, mask=p_ok, other=0.0)
                p_entropy = tl.load(position_stats_ptr + (images + row) * positions + p, mask=p_ok, other=0.0)
                log_share = value - p_log[:, None]
                grad -= p_slope[:, None] * tl.exp(log_share) * (log_share + p_entropy[:, None])
        if gate_sum_ptr is not None:
            gate_sum += tl.where(ok, grad * x, 0.0)
        if x_grad_ptr is not None:
            if gate_ptr is not None:
                grad *= factor[None, :]
            target = x_grad_ptr + row * x_grad_b + p.to(tl.int64)[:, None] * x_grad_p
            target += c.to(tl.int64)[None, :] * x_grad_c
            tl.store(target, grad.to(x_grad_ptr.dtype.element_ty), mask=ok)
    if gate_sum_ptr is not None:
        target = gate_sum_ptr + (tl.cast(part, tl.int64) * images + row) * channels + c
        gate_grad = gate_backward(tl.sum(gate_sum, 0), logits, GATE)
        tl.store(target, gate_grad.to(gate_sum_ptr.dtype.element_ty), mask=c_ok)
