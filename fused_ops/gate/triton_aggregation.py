"""Triton kernels for sums of maps, each weighted per position and per channel, in one pass over the maps.

Weights are those of layers one behind the other: how opaque a layer is, times how clear those in front are.
Maps, their logits and their gradients are tuples here, of up to five, of which COUNT are there.
"""

from __future__ import annotations

from fused_ops.core.triton_support import jit, tl
from fused_ops.gate.triton_tiles import (
    load_channels,
    load_positions,
    load_tile,
    position_offsets,
    program_ranges,
)


@jit
def _opacity(value, OPACITY: tl.constexpr):
    """How opaque and how clear a layer is, both exact where they are small."""
    size = tl.abs(value)
    decay = tl.exp(-size)
    if OPACITY == "sigmoid":
        large = 1.0 / (1.0 + decay)
        small = decay * large
        return tl.where(value >= 0.0, large, small), tl.where(value >= 0.0, small, large)
    else:
        series = 1.0 - size * (1.0 / 3) * (1.0 - size * 0.25 * (1.0 - size * 0.2 * (1.0 - size * (1.0 / 6))))
        return tl.where(size < 0.25, size * (1.0 - size * 0.5 * series), 1.0 - decay), decay


@jit
def _opacity_backward(grad, value, opaque, clear, OPACITY: tl.constexpr):
    """Gradient of the value from that of how opaque its layer is."""
    if OPACITY == "sigmoid":
        return grad * opaque * clear
    else:
        sign = tl.where(value > 0.0, 1.0, tl.where(value < 0.0, -1.0, 0.0))
        return grad * sign * clear


@jit
def _reversed(values, COUNT: tl.constexpr):
    found = ()
    for k in tl.static_range(COUNT):
        found += (values[COUNT - 1 - k],)
    return found


@jit
def _layer_weights(values, COUNT: tl.constexpr, OPACITY: tl.constexpr, REVERSED: tl.constexpr):
    """Weights of COUNT maps from the values of layers, the front one first, with REVERSED the last map.

    One value less than maps: the layer at the back is opaque. OPACITY none: the values are the weights.
    """
    if OPACITY == "none":
        return values
    else:
        weights = ()
        before = tl.full(values[0].shape, 1.0, tl.float32)
        for layer in tl.static_range(COUNT):
            weight = before
            if layer < len(values):
                opaque, clear = _opacity(values[layer], OPACITY)
                weight = before * opaque
                before *= clear
            weights += (weight,)
        return _reversed(weights, COUNT) if REVERSED else weights


@jit
def _layer_backward(grads, values, COUNT: tl.constexpr, OPACITY: tl.constexpr, REVERSED: tl.constexpr):
    """Gradients of ``values`` from those of the weights of :func:`_layer_weights`.

    A more opaque layer shows more of itself and less of all behind it, which is summed from the back.
    """
    if OPACITY == "none":
        return grads
    else:
        opaque = ()
        clear = ()
        in_front = ()
        before = tl.full(values[0].shape, 1.0, tl.float32)
        for layer in tl.static_range(len(values)):
            this_opaque, this_clear = _opacity(values[layer], OPACITY)
            opaque += (this_opaque,)
            clear += (this_clear,)
            in_front += (before,)
            before *= this_clear
        behind = tl.zeros(values[0].shape, tl.float32)
        found = ()
        for layer in tl.static_range(COUNT - 1, -1, -1):
            own = grads[COUNT - 1 - layer if REVERSED else layer]
            if layer < len(values):
                shown = in_front[layer] * (own - behind)
                found += (_opacity_backward(shown, values[layer], opaque[layer], clear[layer], OPACITY),)
                behind = opaque[layer] * own + clear[layer] * behind
            else:
                behind = own
        return _reversed(found, len(values))


@jit
def _load_layers(pointer, image, c, stride_b, stride_c, stride_layer, ok, LAYERS: tl.constexpr):
    """Values per channel of every layer."""
    values = ()
    for layer in tl.static_range(LAYERS):
        value = load_channels(pointer + layer * stride_layer, image, c, stride_b, stride_c, ok)
        values += (value,)
    return values


@jit
def _load_gates(pointers, stride_b, stride_h, stride_w, image, p, width, ok, LAYERS: tl.constexpr):
    """Values per position of every layer."""
    values = ()
    for layer in tl.static_range(LAYERS):
        value = load_positions(
            pointers[layer], image, p, width, stride_b[layer], stride_h[layer], stride_w[layer], ok
        )
        values += (value,)
    return values


@jit
def _store_tile(
    pointer,
    value,
    row,
    p,
    c,
    channels,
    positions,
    where,
    stride_c,
    ok,
    ALIKE: tl.constexpr,
    INNER: tl.constexpr,
):
    """Writes a tile of a dense map.

    ALIKE: its positions lie at ``where`` and its channels ``stride_c`` apart; else INNER says whether its
    channels lie side by side, or its positions.
    """
    if ALIKE:
        target = pointer + where[:, None] + c.to(tl.int64)[None, :] * stride_c
    else:
        pointer += row * channels * positions
        if INNER:
            target = pointer + p.to(tl.int64)[:, None] * channels + c[None, :]
        else:
            target = pointer + c.to(tl.int64)[None, :] * positions + p[:, None]
    tl.store(target, value.to(pointer.dtype.element_ty), mask=ok)


@jit
def aggregate_forward_kernel(
    x0_ptr,
    x1_ptr,
    x2_ptr,
    x3_ptr,
    x4_ptr,
    position0_ptr,
    position1_ptr,
    position2_ptr,
    position3_ptr,
    position4_ptr,
    channel_ptr,
    out_ptr,
    channels,
    positions,
    width,
    parts,
    part_positions,
    blocks,
    block_channels,
    x0_b,
    x0_c,
    x0_h,
    x0_w,
    x1_b,
    x1_c,
    x1_h,
    x1_w,
    x2_b,
    x2_c,
    x2_h,
    x2_w,
    x3_b,
    x3_c,
    x3_h,
    x3_w,
    x4_b,
    x4_c,
    x4_h,
    x4_w,
    position0_b,
    position0_h,
    position0_w,
    position1_b,
    position1_h,
    position1_w,
    position2_b,
    position2_h,
    position2_w,
    position3_b,
    position3_h,
    position3_w,
    position4_b,
    position4_h,
    position4_w,
    channel_b,
    channel_c,
    channel_layer,
    COUNT: tl.constexpr,
    LAYERS: tl.constexpr,
    OPACITY: tl.constexpr,
    REVERSED: tl.constexpr,
    ALIKE: tl.constexpr,
    INNER: tl.constexpr,
    FLAT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One tile (BLOCK_P, BLOCK_C) of the sum. ALIKE: all maps have the strides of the first one."""
    image, _, first_p, last_p, first_c, last_c = program_ranges(
        positions, channels, parts, part_positions, blocks, block_channels
    )
    maps = (x0_ptr, x1_ptr, x2_ptr, x3_ptr, x4_ptr)
    map_b = (x0_b, x1_b, x2_b, x3_b, x4_b)
    map_c = (x0_c, x1_c, x2_c, x3_c, x4_c)
    map_h = (x0_h, x1_h, x2_h, x3_h, x4_h)
    map_w = (x0_w, x1_w, x2_w, x3_w, x4_w)
    gates = (position0_ptr, position1_ptr, position2_ptr, position3_ptr, position4_ptr)
    gate_b = (position0_b, position1_b, position2_b, position3_b, position4_b)
    gate_h = (position0_h, position1_h, position2_h, position3_h, position4_h)
    gate_w = (position0_w, position1_w, position2_w, position3_w, position4_w)
    row = image.to(tl.int64)
    p = first_p + tl.arange(0, BLOCK_P)
    c = first_c + tl.arange(0, BLOCK_C)
    p_ok = p < last_p
    c_ok = c < last_c
    ok = p_ok[:, None] & c_ok[None, :]
    values = _load_gates(gates, gate_b, gate_h, gate_w, image, p, width, p_ok, LAYERS)
    of_positions = _layer_weights(values, COUNT, OPACITY, False)
    if channel_ptr is not None:
        values = _load_layers(channel_ptr, image, c, channel_b, channel_c, channel_layer, c_ok, LAYERS)
        of_channels = _layer_weights(values, COUNT, OPACITY, REVERSED)
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    first = row * x0_b + position_offsets(p, width, x0_h, x0_w, FLAT)
    for k in tl.static_range(COUNT):
        if ALIKE:
            value = load_tile(maps[k], first, c, x0_c, ok)
        else:
            where = row * map_b[k] + position_offsets(p, width, map_h[k], map_w[k], FLAT)
            value = load_tile(maps[k], where, c, map_c[k], ok)
        value *= of_positions[k][:, None]
        if channel_ptr is not None:
            value *= of_channels[k][None, :]
        total += value
    _store_tile(out_ptr, total, row, p, c, channels, positions, first, x0_c, ok, ALIKE, INNER)


@jit
def aggregate_backward_kernel(
    grad_ptr,
    x0_ptr,
    x1_ptr,
    x2_ptr,
    x3_ptr,
    x4_ptr,
    position0_ptr,
    position1_ptr,
    position2_ptr,
    position3_ptr,
    position4_ptr,
    channel_ptr,
    x0_grad_ptr,
    x1_grad_ptr,
    x2_grad_ptr,
    x3_grad_ptr,
    x4_grad_ptr,
    position0_grad_ptr,
    position1_grad_ptr,
    position2_grad_ptr,
    position3_grad_ptr,
    position4_grad_ptr,
    channel_sum_ptr,
    channels,
    positions,
    width,
    parts,
    part_positions,
    blocks,
    block_channels,
    steps,
    sum_part,
    sum_layer,
    sum_value,
    grad_b,
    grad_c,
    grad_h,
    grad_w,
    x0_b,
    x0_c,
    x0_h,
    x0_w,
    x1_b,
    x1_c,
    x1_h,
    x1_w,
    x2_b,
    x2_c,
    x2_h,
    x2_w,
    x3_b,
    x3_c,
    x3_h,
    x3_w,
    x4_b,
    x4_c,
    x4_h,
    x4_w,
    position0_b,
    position0_h,
    position0_w,
    position1_b,
    position1_h,
    position1_w,
    position2_b,
    position2_h,
    position2_w,
    position3_b,
    position3_h,
    position3_w,
    position4_b,
    position4_h,
    position4_w,
    channel_b,
    channel_c,
    channel_layer,
    COUNT: tl.constexpr,
    LAYERS: tl.constexpr,
    OPACITY: tl.constexpr,
    REVERSED: tl.constexpr,
    POSITION_SUMS: tl.constexpr,
    ALIKE: tl.constexpr,
    INNER: tl.constexpr,
    FLAT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Gradients from one part of the positions and one block of the channels of one image.

    Tiles are (BLOCK_P, BLOCK_C); a gradient is written only where its pointer is given. Sums per channel go
    to ``part * sum_part + layer * sum_layer + (image * C + channel) * sum_value``. POSITION_SUMS, for
    gradients of the position gates (images, H, W), needs all channels in one block and all the part's
    positions in one tile, so that ``steps``, the tiles over the positions, is a compile-time 1. ALIKE: maps
    and gradients have the strides of the first map; else bit k of INNER says whether the gradient of map k
    has its channels side by side.
    """
    image, part, first_p, last_p, first_c, last_c = program_ranges(
        positions, channels, parts, part_positions, blocks, block_channels
    )
    maps = (x0_ptr, x1_ptr, x2_ptr, x3_ptr, x4_ptr)
    map_b = (x0_b, x1_b, x2_b, x3_b, x4_b)
    map_c = (x0_c, x1_c, x2_c, x3_c, x4_c)
    map_h = (x0_h, x1_h, x2_h, x3_h, x4_h)
    map_w = (x0_w, x1_w, x2_w, x3_w, x4_w)
    map_grads = (x0_grad_ptr, x1_grad_ptr, x2_grad_ptr, x3_grad_ptr, x4_grad_ptr)
    gates = (position0_ptr, position1_ptr, position2_ptr, position3_ptr, position4_ptr)
    gate_b = (position0_b, position1_b, position2_b, position3_b, position4_b)
    gate_h = (position0_h, position1_h, position2_h, position3_h, position4_h)
    gate_w = (position0_w, position1_w, position2_w, position3_w, position4_w)
    gate_grads = (
        position0_grad_ptr,
        position1_grad_ptr,
        position2_grad_ptr,
        position3_grad_ptr,
        position4_grad_ptr,
    )
    row = image.to(tl.int64)
    if POSITION_SUMS:
        all_p = first_p + tl.arange(0, BLOCK_P)
        gate_values = _load_gates(gates, gate_b, gate_h, gate_w, image, all_p, width, all_p < last_p, LAYERS)
        of_positions = _layer_weights(gate_values, COUNT, OPACITY, False)
    # Sums are reduced once, after their last tile.
    empty_sums = ()
    for _ in tl.static_range(COUNT):
        empty_sums += (tl.zeros((BLOCK_P, BLOCK_C), tl.float32),)
    position_sums = empty_sums
    for start_c in range(first_c, last_c, BLOCK_C):
        c = start_c + tl.arange(0, BLOCK_C)
        c_ok = c < last_c
        if channel_ptr is not None:
            channel_values = _load_layers(
                channel_ptr, image, c, channel_b, channel_c, channel_layer, c_ok, LAYERS
            )
            of_channels = _layer_weights(channel_values, COUNT, OPACITY, REVERSED)
        channel_sums = empty_sums
        for step in range(steps):
            p = first_p + step * BLOCK_P + tl.arange(0, BLOCK_P)
            p_ok = p < last_p
            ok = p_ok[:, None] & c_ok[None, :]
            if not POSITION_SUMS:
                values = _load_gates(gates, gate_b, gate_h, gate_w, image, p, width, p_ok, LAYERS)
                of_positions = _layer_weights(values, COUNT, OPACITY, False)
            first = row * x0_b + position_offsets(p, width, x0_h, x0_w, FLAT)
            if ALIKE:
                grad = load_tile(grad_ptr, first, c, x0_c, ok)
            else:
                where = row * grad_b + position_offsets(p, width, grad_h, grad_w, FLAT)
                grad = load_tile(grad_ptr, where, c, grad_c, ok)
            more_position_sums = ()
            more_channel_sums = ()
            for k in tl.static_range(COUNT):
                of_position = of_positions[k][:, None]
                if map_grads[k] is not None:
                    value = grad * of_position
                    if channel_ptr is not None:
                        value *= of_channels[k][None, :]
                    _store_tile(
                        map_grads[k],
                        value,
                        row,
                        p,
                        c,
                        channels,
                        positions,
                        first,
                        x0_c,
                        ok,
                        ALIKE,
                        (INNER >> k) & 1,
                    )
                if POSITION_SUMS or channel_sum_ptr is not None:
                    # What is outside adds nothing: the maps and the gradient are zeros there.
                    if ALIKE:
                        product = grad * load_tile(maps[k], first, c, x0_c, ok)
                    else:
                        where = row * map_b[k] + position_offsets(p, width, map_h[k], map_w[k], FLAT)
                        product = grad * load_tile(maps[k], where, c, map_c[k], ok)
                    if channel_sum_ptr is not None:
                        channel_sum = channel_sums[k] + product * of_position
                        more_channel_sums += (channel_sum,)
                    if POSITION_SUMS:
                        if channel_ptr is not None:
                            product *= of_channels[k][None, :]
                        more_position_sums += (position_sums[k] + product,)
            if POSITION_SUMS:
                position_sums = more_position_sums
            if channel_sum_ptr is not None:
                channel_sums = more_channel_sums
        if channel_sum_ptr is not None:
            sums = ()
            for k in tl.static_range(COUNT):
                sums += (tl.sum(channel_sums[k], 0),)
            sums = _layer_backward(sums, channel_values, COUNT, OPACITY, REVERSED)
            target = channel_sum_ptr + tl.cast(part, tl.int64) * sum_part + (row * channels + c) * sum_value
            for layer in tl.static_range(LAYERS):
                value = sums[layer].to(channel_sum_ptr.dtype.element_ty)
                tl.store(target + tl.cast(sum_layer, tl.int64) * layer, value, mask=c_ok)
    if POSITION_SUMS:
        sums = ()
        for k in tl.static_range(COUNT):
            sums += (tl.sum(position_sums[k], 1),)
        sums = _layer_backward(sums, gate_values, COUNT, OPACITY, False)
        for layer in tl.static_range(LAYERS):
            if gate_grads[layer] is not None:
                value = sums[layer].to(gate_grads[layer].dtype.element_ty)
                tl.store(gate_grads[layer] + row * positions + all_p, value, mask=all_p < last_p)
