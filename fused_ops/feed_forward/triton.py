"""The Triton backend of the feed-forward chain: what it can run, and its launches.

Launches of narrow tokens, forward: one; with batch statistics three (moments of the input, their merge, the
pass that writes the result). Backward, all gradients: the weights', their merge, the input's. Those of wide
tokens, and of all with a convolution, are in :mod:`fused_ops.feed_forward.triton_wide`. Before either,
matrices of another dtype than the products' are cast; a layer scale is multiplied into fc2.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_ops.core import backends, distributed, tuning
from fused_ops.core.triton_support import ceil_div, next_power_of_2
from fused_ops.feed_forward import triton_conv, triton_norm, triton_products, triton_wide
from fused_ops.feed_forward.triton_backward import finish_kernel, input_kernel, weights_kernel
from fused_ops.feed_forward.triton_forward import forward_kernel

# Of wider tokens a tile with all channels leaves too few registers for anything else.
LARGEST_NARROW = 128
LARGEST_CHANNELS = 2048


def can_run(call: Any) -> tuple[bool, str]:
    """Whether the Triton kernels can run ``call``; one sentence says why not."""
    ok, reason = backends.triton_takes("x", call.x)
    if not ok:
        return False, reason
    channels = call.x.shape[-1]
    if channels > LARGEST_CHANNELS:
        return False, f"x has {channels} channels; the Triton kernels are for up to {LARGEST_CHANNELS}"
    if call.x.numel() == 0:
        return False, f"x is empty, {tuple(call.x.shape)}"
    if call.conv_weight is not None:
        return triton_conv.can_run(call)
    return True, ""


def is_narrow(channels: int) -> bool:
    """Whether a tile with all channels leaves room for hidden units."""
    return channels <= LARGEST_NARROW


def stays_on_chip(call: Any) -> bool:
    """Whether the hidden values of ``call`` are never in memory."""
    return call.conv_weight is None and is_narrow(call.x.shape[-1])


class Tile(NamedTuple):
    """A kernel's tile: tokens, hidden units at a time, warps."""

    tokens: int
    hidden: int
    warps: int


class Plan(NamedTuple):
    """Launch of one kernel.

    Attributes:
        programs: over the tokens, for every chunk of hidden units where weights get gradients.
        tiles_each: tiles per program.
        meta: compile-time options.
    """

    programs: int
    tiles_each: int
    meta: dict[str, Any]


def _block_c(channels: int) -> int:
    return max(16, next_power_of_2(channels))


def heuristic(kernel: str, channels: int, hidden: int, size: int) -> Tile:
    """A rule of thumb; ``size`` is that of the products' element in bytes."""
    block_c = _block_c(channels)
    if size == 4:
        tokens, chunk = (16, 4096 // block_c) if kernel == "weights" else (32, 32)
    elif kernel == "forward":
        # Both matrices pass through every program: larger tiles read them less often.
        tokens, chunk = (128, 32) if block_c <= 64 else (64, 64)
    elif kernel == "input":
        tokens, chunk = 64, 32
    else:
        tokens, chunk = {64: (16, 128), 128: (16, 32)}.get(block_c, (32, 128))
    return Tile(tokens, min(max(16, next_power_of_2(hidden)), chunk), 8)


def tiles(kernel: str, sizes: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Tiles worth measuring for a kernel name as :func:`tuning.tile_of` sees it, on (C, hidden)."""
    if kernel in triton_products.TUNED.values():
        return triton_products.tiles()
    channels, hidden = sizes
    block_c = _block_c(channels)
    found = []
    for tokens in (16, 32, 64, 128):
        for chunk in (16, 32, 64, 128):
            for warps in (4, 8):
                if chunk > next_power_of_2(max(hidden, 16)):
                    continue
                held = chunk * 2 * block_c if "_weights " in kernel else tokens * (block_c + chunk)
                # Accumulators alone would take more than 160 of a thread's registers, or none worth a warp.
                if 8 <= held // (32 * warps) <= 128:
                    found.append((tokens, chunk, warps))
    return found


def _tile(kernel: str, call: Any) -> Tile:
    channels, hidden = call.x.shape[-1], call.fc1_weight.shape[0]
    size = call.compute.itemsize
    return Tile(
        *tuning.tile_of(
            f"feed_forward_{kernel} {8 * size}-bit",
            (channels, hidden),
            lambda: heuristic(kernel, channels, hidden, size),
            call.x,
        )
    )


def _options(tile: Tile, channels: int, stages: int) -> dict[str, Any]:
    options = {
        "BLOCK_M": tile.tokens,
        "BLOCK_C": _block_c(channels),
        "BLOCK_HIDDEN": tile.hidden,
        "num_warps": tile.warps,
        "num_stages": stages,
        "enable_fp_fusion": True,
    }
    if options["BLOCK_C"] >= 64:
        # Some compilers would take a few more, others spill a value to stay far below.
        options["maxnreg"] = 240
    return options


@lru_cache(maxsize=4096)
def rows_plan(rows: int, channels: int, tile: Tile) -> Plan:
    """A pass in which each program writes one tile."""
    return Plan(ceil_div(rows, tile.tokens), 1, _options(tile, channels, 2))


@lru_cache(maxsize=4096)
def weights_plan(rows: int, channels: int, hidden: int, tile: Tile) -> Plan:
    """The pass for the weights' gradients.

    Each program writes partial gradients as large as its chunk of the weights: of a part of 32 hidden tokens
    they come to a twentieth of what backward moves for those tokens. Where that leaves less than a program
    per multiprocessor, more programs are worth more than fewer bytes, down to 1024 tokens each.
    """
    count, chunks = ceil_div(rows, tile.tokens), ceil_div(hidden, tile.hidden)
    fewest = ceil_div(count * chunks, 528)
    few_bytes = 32 * hidden // tile.tokens
    one_each = max(1024 // tile.tokens, ceil_div(count * chunks, 132))
    each = min(max(fewest, min(few_bytes, one_each), 1), count)
    return Plan(ceil_div(count, each), each, _options(tile, channels, 1))


class _Launches:
    """Sizes and tensors that every launch of one call takes."""

    def __init__(self, call: Any) -> None:
        self.call = call
        batch, tokens, self.channels = call.x.shape
        self.rows = batch * tokens
        self.hidden = call.fc1_weight.shape[0]
        self.sizes = (self.rows, tokens, self.channels, self.hidden)
        self.vectors = (call.norm_weight, call.norm_bias)

    def floats(self, count: int) -> Tensor:
        return torch.empty(count, dtype=torch.float32, device=self.call.x.device)

    def plain_fc2(self) -> Tensor:
        """fc2's weight as the products take it, before the layer scale."""
        return self.call.fc2_weight.to(self.call.compute).contiguous()

    def matrices(self) -> tuple[Tensor, Tensor | None, Tensor]:
        """fc1's weight and bias and fc2's weight, as the products take them."""
        call = self.call
        if call.layer_scale is None:
            fc2 = self.plain_fc2()
        else:
            fc2 = (call.fc2_weight.float() * call.layer_scale.float()[:, None]).to(call.compute)
        return call.fc1_weight.to(call.compute).contiguous(), call.fc1_bias, fc2.contiguous()


def forward(
    call: Any,
    out: Tensor,
    normalised: Tensor,
    value: Tensor,
    mean: Tensor,
    var: Tensor,
    unbiased: Tensor,
) -> tuple[Tensor, ...]:
    """Launch the forward kernels of a call that :func:`can_run`; fills and returns the given outputs.

    Args:
        call: the checked call.
        out: result (B, N, C).
        normalised, value: what the norm and fc1 gave, written where ``call.keep_value``.
        mean, var, unbiased: (C) float32, the batch's statistics over the process group, written where
            ``call.batch_stats``.
    """
    with backends.device_of(call.x):
        _forward(call, out, normalised, value, mean, var, unbiased)
    return out, normalised, value, mean, var, unbiased


def _forward(
    call: Any,
    out: Tensor,
    normalised: Tensor,
    value: Tensor,
    mean: Tensor,
    var: Tensor,
    unbiased: Tensor,
) -> None:
    launches = _Launches(call)
    rows, _, channels, _ = launches.sizes
    statistics = (call.mean, call.var)
    if call.batch_stats:
        triton_norm.batch_statistics(call.x, mean, var, unbiased, call.group)
        statistics = (mean, var)
    fc2_bias = call.fc2_bias
    if fc2_bias is not None and call.layer_scale is not None:
        fc2_bias = fc2_bias.float() * call.layer_scale.float()
    if not stays_on_chip(call):
        triton_wide.forward(launches, statistics, fc2_bias, out, normalised, value)
        return
    plan = rows_plan(rows, channels, _tile("forward", call))
    forward_kernel[(plan.programs,)](
        call.x,
        *launches.matrices(),
        fc2_bias,
        *launches.vectors,
        *statistics,
        call.residual,
        call.drop_path,
        out,
        *launches.sizes,
        *call.x.stride(),
        *(0, 0, 0) if call.residual is None else call.residual.stride(),
        *out.stride(),
        call.eps,
        NORM=call.norm,
        ACTIVATION=call.activation,
        IDENTITY=call.identity,
        **plan.meta,
    )


def backward(
    call: Any, grad: Tensor, normalised: Tensor, value: Tensor, needs: list[bool], *gradients: Tensor
) -> tuple[Tensor, ...]:
    """Launch the backward kernels; fills the needed ones of the ten gradients and returns all.

    Args:
        call: the forward's call, with ``mean`` and ``var`` the statistics that it normalised with.
        grad: (B, N, C) in any layout.
        normalised, value: what forward kept.
        needs: which of x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, norm_weight, norm_bias, layer_scale,
            conv_weight, conv_bias get a gradient.
        gradients: outputs for them, absent ones empty.
    """
    with backends.device_of(call.x):
        wanted = tuple(gradient if need else None for gradient, need in zip(gradients, needs, strict=True))
        if stays_on_chip(call):
            _backward(call, grad, wanted)
        else:
            triton_wide.backward(_Launches(call), grad, normalised, value, wanted)
    return gradients


def _backward(call: Any, grad: Tensor, gradients: tuple[Tensor | None, ...]) -> None:
    (
        x_grad,
        fc1_weight_grad,
        fc1_bias_grad,
        fc2_weight_grad,
        fc2_bias_grad,
        norm_weight_grad,
        norm_bias_grad,
        layer_scale_grad,
        *_,
    ) = gradients
    launches = _Launches(call)
    rows, _, channels, hidden = launches.sizes
    matrices = launches.matrices()
    statistics = (call.mean, call.var)
    strides = (*grad.stride(), *call.x.stride())
    kinds = {"NORM": call.norm, "ACTIVATION": call.activation}
    sums = None
    if x_grad is not None and call.batch_stats:
        sums = launches.floats(2 * channels).view(2, channels)
    # The norm's sums follow from the gradient of fc1's weight.
    fc1 = any(g is not None for g in (sums, fc1_weight_grad, norm_weight_grad, norm_bias_grad))
    fc2 = fc2_weight_grad is not None or layer_scale_grad is not None
    value = fc1 or fc1_bias_grad is not None
    if value or fc2 or fc2_bias_grad is not None:
        plan = weights_plan(rows, channels, hidden, _tile("weights", call))
        chunks = ceil_div(hidden, plan.meta["BLOCK_HIDDEN"])
        columns = (fc1 + fc2) * hidden * channels + value * hidden
        part_sums = plan.programs * chunks * 4 * channels
        partial = launches.floats(plan.programs * columns + part_sums)
        parts, partial_sums = partial[: plan.programs * columns], partial[plan.programs * columns :]
        flags = {"VALUE": value, "FC1": fc1, "FC2": fc2}
        weights_kernel[(plan.programs * chunks,)](
            grad,
            call.x,
            *matrices,
            None if layer_scale_grad is None else launches.plain_fc2(),
            *launches.vectors,
            *statistics,
            call.drop_path,
            parts,
            partial_sums,
            *launches.sizes,
            plan.tiles_each,
            columns,
            *strides,
            call.eps,
            **kinds,
            **flags,
            **plan.meta,
        )
        # Whole cache lines of columns, and enough programs of them.
        block_k = 128
        finish_kernel[(ceil_div(columns, block_k) + ceil_div(channels, block_k),)](
            parts,
            partial_sums,
            call.layer_scale,
            call.fc2_bias,
            fc1_weight_grad,
            fc1_bias_grad,
            fc2_weight_grad,
            fc2_bias_grad,
            norm_weight_grad,
            norm_bias_grad,
            layer_scale_grad,
            sums,
            plan.programs,
            plan.programs * chunks,
            columns,
            channels,
            hidden,
            **flags,
            BLOCK_P=min(4096 // block_k, next_power_of_2(plan.programs * chunks)),
            BLOCK_K=block_k,
            num_warps=4,
            enable_fp_fusion=True,
        )
    if x_grad is None:
        return
    if sums is not None and call.group:
        distributed.exchange_sums(sums, rows, call.group)
    plan = rows_plan(rows, channels, _tile("input", call))
    input_kernel[(plan.programs,)](
        grad,
        call.x,
        *matrices,
        *launches.vectors,
        *statistics,
        sums,
        call.drop_path,
        x_grad,
        *launches.sizes,
        *strides,
        *x_grad.stride(),
        call.eps,
        1.0 / rows,
        **kinds,
        IDENTITY=call.identity,
        **plan.meta,
    )


def launch_count(call: Any, direction: str) -> int:
    """Launches for ``call``, PyTorch's casts and products included; ``backward`` with every gradient."""
    scaled, biased = call.layer_scale is not None, call.fc2_bias is not None
    fc1_cast, fc2_cast = (weight.dtype != call.compute for weight in (call.fc1_weight, call.fc2_weight))
    scaling = scaled * (1 + (call.compute != torch.float32))
    narrow = stays_on_chip(call)
    if direction == "forward":
        count = fc1_cast + (scaling if scaled else fc2_cast) + (scaled and biased) + 2 * call.batch_stats
        return count + 1 if narrow else count + triton_wide.launch_count(call, direction)
    if narrow:
        return fc1_cast + fc2_cast + scaling + 3
    return fc1_cast + (scaling if scaled else fc2_cast) + triton_wide.launch_count(call, direction)
