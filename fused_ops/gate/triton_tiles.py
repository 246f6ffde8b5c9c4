"""What the kernels of gates share: where positions lie, the gate functions, one tile's share of a pooling.

Tiles are (BLOCK_P positions, BLOCK_C channels) of one image. Programs of a grid take an image, one of
``parts`` ranges of positions and one of ``blocks`` ranges of channels, channels fastest.
"""

from __future__ import annotations

from fused_ops.core.triton_support import jit, tl


@jit
def program_ranges(positions, channels, parts, part_positions, blocks, block_channels):
    """(image, part, first and last position, first and last channel) of this program."""
    program = tl.program_id(0)
    part = (program // blocks) % parts
    first_p = part * part_positions
    first_c = (program % blocks) * block_channels
    last_p = tl.minimum(first_p + part_positions, positions)
    last_c = tl.minimum(first_c + block_channels, channels)
    return program // (blocks * parts), part, first_p, last_p, first_c, last_c


@jit
def position_offsets(p, width, stride_h, stride_w, FLAT: tl.constexpr):
    """Offsets of positions; FLAT: all of them are ``stride_w`` apart."""
    if FLAT:
        return p.to(tl.int64) * stride_w
    else:
        return (p // width).to(tl.int64) * stride_h + (p % width).to(tl.int64) * stride_w


@jit
def load_tile(pointer, p_offsets, c, stride_c, ok):
    """Tile (BLOCK_P, BLOCK_C) in float32; zeros where not ``ok``."""
    where = p_offsets[:, None] + c.to(tl.int64)[None, :] * stride_c
    return tl.load(pointer + where, mask=ok, other=0.0).to(tl.float32)


@jit
def load_channels(pointer, image, c, stride_b, stride_c, ok):
    """Values (BLOCK_C) of a vector per image in float32; zeros where not ``ok``."""
    where = image.to(tl.int64) * stride_b + c.to(tl.int64) * stride_c
    return tl.load(pointer + where, mask=ok, other=0.0).to(tl.float32)


@jit
def load_positions(pointer, image, p, width, stride_b, stride_h, stride_w, ok):
    """Values (BLOCK_P) of a map of one channel in float32; zeros where not ``ok``."""
    where = position_offsets(p, width, stride_h, stride_w, False)
    return tl.load(pointer + image.to(tl.int64) * stride_b + where, mask=ok, other=0.0).to(tl.float32)


@jit
def gate_of(logits, GATE: tl.constexpr):
    if GATE == "sigmoid":
        return tl.sigmoid(logits)
    elif GATE == "hard_sigmoid":
        return tl.where(logits > 3.0, 6.0, tl.where(logits < -3.0, 0.0, logits + 3.0)) * 0.16666666666666666
    else:
        return logits


@jit
def gate_backward(grad, logits, GATE: tl.constexpr):
    """Gradient of the logits from that of the gate. A flat part gives 0 even for what is not a number."""
    if GATE == "sigmoid":
        value = tl.sigmoid(logits)
        return grad * value * (1.0 - value)
    elif GATE == "hard_sigmoid":
        return tl.where((logits > -3.0) & (logits < 3.0), grad * 0.16666666666666666, 0.0)
    else:
        return grad


@jit
def larger(top, largest):
    """Whether ``top`` replaces ``largest`` as the maximum: not-a-number is larger than every number."""
    return (top > largest) | ((top != top) & (largest == largest))


@jit
def add_weights(largest, weight, moment, top, top_weight, top_moment):
    """Sums of exp(x - m) and of exp(x - m) (x - m), m the maximum, of the union of two sets of x.

    Returns the union's maximum and the two sums. An empty set has weight 0.
    """
    merged = tl.where(larger(top, largest), top, largest)
    # Minus infinity for an empty set, which has to stay out of the products.
    drift = tl.where(weight > 0.0, largest - merged, 0.0)
    top_drift = tl.where(top_weight > 0.0, top - merged, 0.0)
    scale, top_scale = tl.exp(drift), tl.exp(top_drift)
    moment = scale * (moment + weight * drift) + top_scale * (top_moment + top_weight * top_drift)
    return merged, scale * weight + top_scale * top_weight, moment


@jit
def pool_tile(
    value,
    index,
    ok,
    total,
    largest,
    at,
    weight,
    moment,
    MEAN: tl.constexpr,
    MAX: tl.constexpr,
    ENTROPY: tl.constexpr,
):
    """Adds a tile's values to what was found at each place of the tiles before it.

    ``total``: sum; ``largest`` and ``at``: maximum and the first ``index`` that has it; ``weight`` and
    ``moment``: see :func:`add_weights`. What is outside, not ``ok``, has values of 0. Tiles are reduced once,
    after the last of them (:func:`reduce_pooled`), since that takes an exchange between all threads.
    """
    if MEAN:
        total += value
    if MAX or ENTROPY:
        better = ok & larger(value, largest)
    if ENTROPY:
        drift = tl.where(weight > 0.0, value - largest, 0.0)
        # One exponential for both ways, of a number that is never positive.
        share = tl.where(ok, tl.exp(-tl.abs(value - largest)), 0.0)
        moment = tl.where(better, share * (moment - weight * drift), moment + share * drift)
        weight = tl.where(better, share * weight + 1.0, weight + share)
    if MAX:
        at = tl.where(better, index, at)
    if MAX or ENTROPY:
        largest = tl.where(better, value, largest)
    return total, largest, at, weight, moment


@jit
def reduce_pooled(
    total,
    largest,
    at,
    weight,
    moment,
    AXIS: tl.constexpr,
):
    """What :func:`pool_tile` found, over AXIS. The compiler leaves out what is not used."""
    totals = tl.sum(total, AXIS)
    # A maximum on the GPU passes over not-a-number.
    missing = largest != largest
    top = tl.max(tl.where(missing, float("-inf"), largest), AXIS)
    top = tl.where(tl.max(missing.to(tl.int32), AXIS) > 0, float("nan"), top)
    wide = tl.expand_dims(top, AXIS)
    first = tl.min(tl.where(missing | (largest == wide), at, 2147483647), AXIS)
    drift = tl.where(weight > 0.0, largest - wide, 0.0)
    scale = tl.exp(drift)
    return totals, top, first, tl.sum(scale * weight, AXIS), tl.sum(scale * (moment + weight * drift), AXIS)


@jit
def store_pooled(
    out_ptr,
    index_ptr,
    stats_ptr,
    image,
    k,
    ok,
    count,
    images,
    reduced,
    entropy_scale,
    total,
    largest,
    at,
    weight,
    moment,
    SLOTS: tl.constexpr,
    MEAN: tl.constexpr,
    MAX: tl.constexpr,
    ENTROPY: tl.constexpr,
):
    """Writes poolings of the ``count`` values ``k`` of an image, each over ``reduced`` values.

    ``out_ptr`` is (images, SLOTS, count), with slot MEAN for the mean and so on, -1 for what is not there;
    ``index_ptr`` (images, count) takes the place of the maximum; ``stats_ptr`` (2, images, count) takes the
    logarithm of the sum of exponentials, and the entropy in nats.
    """
    row = image.to(tl.int64)
    target = out_ptr + row * SLOTS * count + k
    if MEAN >= 0:
        tl.store(target + MEAN * count, (total / reduced).to(out_ptr.dtype.element_ty), mask=ok)
    if MAX >= 0:
        tl.store(target + MAX * count, largest.to(out_ptr.dtype.element_ty), mask=ok)
        if index_ptr is not None:
            tl.store(index_ptr + row * count + k, at, mask=ok)
    if ENTROPY >= 0:
        log_weight = tl.log(weight)
        entropy = log_weight - moment / weight
        tl.store(target + ENTROPY * count, (entropy * entropy_scale).to(out_ptr.dtype.element_ty), mask=ok)
        if stats_ptr is not None:
            tl.store(stats_ptr + row * count + k, largest + log_weight, mask=ok)
            tl.store(stats_ptr + (images + row) * count + k, entropy, mask=ok)
