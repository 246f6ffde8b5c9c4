"""Triton kernels for the context pooling: the mean over positions, weighted by a softmax over them.

A program owns one block of positions of one image and walks over the channels twice: for its logits, and for
what these weigh. The second walk finds in the L2 cache what the first one read.
"""

from __future__ import annotations

from fused_ops.core.triton_support import jit, tl
from fused_ops.gate.triton_tiles import load_tile, position_offsets


@jit
def context_forward_kernel(
    x_ptr,
    weight_ptr,
    partial_ptr,
    stats_ptr,
    images,
    channels,
    positions,
    width,
    parts,
    x_b,
    x_c,
    x_h,
    x_w,
    weight_c,
    FLAT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One block of positions, in tiles (BLOCK_P, BLOCK_C).

    Sums of exp(logit - largest) x go to ``partial_ptr`` (parts, images, C); the largest logit and the sum of
    the exponentials to ``stats_ptr`` (2, parts, images).
    """
    image = tl.program_id(0) // parts
    part = tl.program_id(0) % parts
    p = part * BLOCK_P + tl.arange(0, BLOCK_P)
    p_ok = p < positions
    p_offsets = image.to(tl.int64) * x_b + position_offsets(p, width, x_h, x_w, FLAT)
    # Reduced once, after the last tile.
    products = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start in range(0, channels, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        x = load_tile(x_ptr, p_offsets, c, x_c, p_ok[:, None] & (c < channels)[None, :])
        weight = tl.load(weight_ptr + c.to(tl.int64) * weight_c, mask=c < channels, other=0.0).to(tl.float32)
        products += x * weight[None, :]
    logits = tl.sum(products, 1)
    largest = tl.max(tl.where(p_ok, logits, float("-inf")), 0)
    shares = tl.where(p_ok, tl.exp(logits - largest), 0.0)
    row = part.to(tl.int64) * images + image
    tl.store(stats_ptr + row, largest)
    tl.store(stats_ptr + tl.cast(parts, tl.int64) * images + row, tl.sum(shares, 0))
    for start in range(0, channels, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        x = load_tile(x_ptr, p_offsets, c, x_c, p_ok[:, None] & (c < channels)[None, :])
        tl.store(partial_ptr + row * channels + c, tl.sum(x * shares[:, None], 0), mask=c < channels)


@jit
def context_merge_kernel(
    partial_ptr,
    stats_ptr,
    out_ptr,
    context_ptr,
    log_ptr,
    images,
    channels,
    parts,
    blocks,
    BLOCK_C: tl.constexpr,
):
    """Parts of :func:`context_forward_kernel` -> the context, in their order.

    One program: BLOCK_C channels of one image. For backward also the context in float32 (images, C), and the
    logarithm of the softmax's sum (images).
    """
    image = tl.program_id(0) // blocks
    c = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    ok = c < channels
    total = tl.zeros((BLOCK_C,), tl.float32)
    weight = tl.zeros((BLOCK_C,), tl.float32)
    largest = tl.full((BLOCK_C,), float("-inf"), tl.float32)
    for part in range(parts):
        row = tl.cast(part, tl.int64) * images + image
        # The same number in every lane.
        top = tl.load(stats_ptr + row + tl.zeros_like(c))
        top_weight = tl.load(stats_ptr + tl.cast(parts, tl.int64) * images + row + tl.zeros_like(c))
        merged = tl.where((top > largest) | (top != top), top, largest)
        scale, top_scale = tl.exp(largest - merged), tl.exp(top - merged)
        total = total * scale + tl.load(partial_ptr + row * channels + c, mask=ok, other=0.0) * top_scale
        weight = weight * scale + top_weight * top_scale
        largest = merged
    total /= weight
    target = image.to(tl.int64) * channels + c
    tl.store(out_ptr + target, total.to(out_ptr.dtype.element_ty), mask=ok)
    if context_ptr is not None:
        tl.store(context_ptr + target, total, mask=ok)
        tl.store(log_ptr + image + tl.zeros_like(c), largest + tl.log(weight), mask=c == 0)


@jit
def context_backward_kernel(
    grad_ptr,
    x_ptr,
    weight_ptr,
    context_ptr,
    log_ptr,
    x_grad_ptr,
    weight_sum_ptr,
    channels,
    positions,
    width,
    parts,
    grad_b,
    grad_c,
    x_b,
    x_c,
    x_h,
    x_w,
    weight_c,
    x_grad_b,
    x_grad_c,
    x_grad_p,
    FLAT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One block of positions, in tiles: the map's gradient, and a part (images, parts, C) of the weight's.

    With a the softmax, l the logits and G the gradient: ``da = G x``, ``dl = a (da - G context)``,
    ``dx = a G + dl weight``, ``dweight = sum of dl x``.
    """
    image = tl.program_id(0) // parts
    part = tl.program_id(0) % parts
    row = image.to(tl.int64)
    p = part * BLOCK_P + tl.arange(0, BLOCK_P)
    p_ok = p < positions
    p_offsets = row * x_b + position_offsets(p, width, x_h, x_w, FLAT)
    # Reduced once, after the last tile.
    logits = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    share_grad = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    mean_grad = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, channels, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        c_ok = c < channels
        x = load_tile(x_ptr, p_offsets, c, x_c, p_ok[:, None] & c_ok[None, :])
        weight = tl.load(weight_ptr + c.to(tl.int64) * weight_c, mask=c_ok, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + row * grad_b + c.to(tl.int64) * grad_c, mask=c_ok, other=0.0)
        grad = grad.to(tl.float32)
        mean_grad += grad * tl.load(context_ptr + row * channels + c, mask=c_ok, other=0.0)
        logits += x * weight[None, :]
        share_grad += x * grad[None, :]
    share = tl.where(p_ok, tl.exp(tl.sum(logits, 1) - tl.load(log_ptr + row)), 0.0)
    logit_grad = share * (tl.sum(share_grad, 1) - tl.sum(mean_grad, 0))
    for start in range(0, channels, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        c_ok = c < channels
        ok = p_ok[:, None] & c_ok[None, :]
        if weight_sum_ptr is not None:
            x = load_tile(x_ptr, p_offsets, c, x_c, ok)
            weight_grad = tl.sum(x * logit_grad[:, None], 0)
            tl.store(weight_sum_ptr + (row * parts + part) * channels + c, weight_grad, mask=c_ok)
        if x_grad_ptr is not None:
            weight = tl.load(weight_ptr + c.to(tl.int64) * weight_c, mask=c_ok, other=0.0).to(tl.float32)
            grad = tl.load(grad_ptr + row * grad_b + c.to(tl.int64) * grad_c, mask=c_ok, other=0.0)
            value = share[:, None] * grad.to(tl.float32)[None, :] + logit_grad[:, None] * weight[None, :]
            target = x_grad_ptr + row * x_grad_b + p.to(tl.int64)[:, None] * x_grad_p
            target += c.to(tl.int64)[None, :] * x_grad_c
            tl.store(target, value.to(x_grad_ptr.dtype.element_ty), mask=ok)
