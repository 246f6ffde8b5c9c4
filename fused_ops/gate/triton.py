"""The Triton backend of gates: what it can run, and its launches.

Poolings: one launch forward, two where several programs share a channel's positions; backward one, and a
second one that adds up the channel gate's gradient where that has parts. Scaling and sums of maps: one launch
each way, and one that adds up sums per channel where these have parts. Context pooling: two launches each
way. All sums are taken in a fixed order, without atomics: results repeat bitwise.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_ops.core.backends import device_of, triton_takes
from fused_ops.core.library import is_channels_last
from fused_ops.core.statistics import finish_gradients
from fused_ops.core.triton_support import ceil_div, next_power_of_2
from fused_ops.gate.triton_aggregation import aggregate_backward_kernel, aggregate_forward_kernel
from fused_ops.gate.triton_context import (
    context_backward_kernel,
    context_forward_kernel,
    context_merge_kernel,
)
from fused_ops.gate.triton_pool import pool_backward_kernel, pool_forward_kernel, pool_merge_kernel
from fused_ops.gate.triton_scale import scale_backward_kernel, scale_forward_kernel

# Eight programs for each multiprocessor of the largest GPUs. A constant, so that the order of the sums, and
# with it every bit of the result, is the same on all GPUs.
PROGRAMS = 1056
# Maps that the kernels of an aggregation have arguments for.
MOST_MAPS = 5


def can_run(call: Any) -> tuple[bool, str]:
    """Whether the Triton kernels can run ``call``; one sentence says why not."""
    x = call.x
    ok, reason = triton_takes("x", x)
    if not ok:
        return False, reason
    if x.numel() == 0:
        return False, f"x is empty, {tuple(x.shape)}"
    if x.shape[2] * x.shape[3] >= 2**30:
        return False, f"x {tuple(x.shape)} has 2**30 positions or more"
    return True, ""


class Plan(NamedTuple):
    """Ranges and tiles of one launch.

    Attributes:
        grid: number of programs.
        parts, part_positions: ranges of positions, and how long they are.
        blocks, block_channels: the same of channels.
        meta: compile-time values and launch options.
    """

    grid: tuple[int]
    parts: int
    part_positions: int
    blocks: int
    block_channels: int
    meta: dict[str, Any]

    @property
    def ranges(self) -> tuple[int, int, int, int]:
        return self.parts, self.part_positions, self.blocks, self.block_channels

    @property
    def steps(self) -> int:
        """Tiles over a range of positions."""
        return ceil_div(self.part_positions, self.meta["BLOCK_P"])


@lru_cache(maxsize=4096)
def plan(
    images: int,
    channels: int,
    positions: int,
    channels_inner: bool,
    form: str,
    block_p: int = 0,
    area: int = 2048,
    least_part: int = 512,
    per_thread: int = 8,
    **options: int,
) -> Plan:
    """Plan for a map, a rule of thumb.

    Args:
        channels_inner: channels lie side by side in memory, else positions.
        form: ``tiles``: a program has one tile; ``positions``: one block of positions and all channels;
            ``channels``: one block of channels and a part of the positions, so long that what is written per
            part weighs little, and so many that they fill a GPU.
        block_p: positions of a tile, 0 for what suits the layout.
        area: values of a tile.
        least_part: of ``channels``: positions of a part, at least.
        per_thread: values of a tile per thread, each with its running values.
        options: of the launch.
    """
    block_p = block_p or (area // min(64, next_power_of_2(channels)) if channels_inner else 128)
    block_p = min(block_p, next_power_of_2(positions), area)
    block_c = min(area // block_p, next_power_of_2(channels), 128)
    blocks, block_channels = ceil_div(channels, block_c), block_c
    part_positions = block_p
    if form == "positions":
        blocks, block_channels = 1, channels
    elif form == "channels":
        parts = max(1, min(ceil_div(PROGRAMS, images * blocks), positions // least_part))
        part_positions = ceil_div(ceil_div(positions, parts), block_p) * block_p
    parts = ceil_div(positions, part_positions)
    meta = {
        "BLOCK_P": block_p,
        "BLOCK_C": block_c,
        "num_warps": max(1, min(16, block_p * block_c // (32 * per_thread))),
        "enable_fp_fusion": True,
        **options,
    }
    return Plan((images * parts * blocks,), parts, part_positions, blocks, block_channels, meta)


def _plan(x: Tensor, form: str, **options: int) -> Plan:
    images, channels, height, width = x.shape
    inner = channels > 1 and (height * width == 1 or x.stride(1) < _position_stride(x))
    return plan(images, channels, height * width, inner, form, **options)


def _position_stride(x: Tensor) -> int:
    return x.stride(2) if x.shape[3] == 1 else x.stride(3)


def _is_flat(x: Tensor) -> bool:
    """Whether all neighbouring positions are equally far apart."""
    return x.shape[2] == 1 or x.shape[3] == 1 or x.stride(2) == x.shape[3] * x.stride(3)


def _map_strides(*maps: Tensor | None) -> tuple[list[int], bool]:
    """Strides (image, channel, row, column) of every map, and whether all are flat: then the last is that of
    positions."""
    flat = all(x is None or _is_flat(x) for x in maps)
    strides: list[int] = []
    for x in maps:
        if x is None:
            strides += [0] * 4
        else:
            strides += [*x.stride()[:3], _position_stride(x) if flat else x.stride(3)]
    return strides, flat


def _dense_strides(x: Tensor | None) -> tuple[int, int, int]:
    """Strides of images, channels and positions of a dense map."""
    return (0, 0, 0) if x is None else (x.stride(0), x.stride(1), _position_stride(x))


def _strides(tensor: Tensor | None, dims: int) -> tuple[int, ...]:
    return (0,) * dims if tensor is None else tensor.stride()


def _present(gradient: Tensor, needed: bool) -> Tensor | None:
    return gradient if needed else None


def _floats(shape: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


class _Sums:
    """Sums per channel of parts: where kernels write them, and the launch that adds them up in order."""

    def __init__(self, first: Tensor | None, second: Tensor | None, parts: int) -> None:
        self.targets, self.parts = (first, second), parts
        present = [target for target in self.targets if target is not None]
        self.places, self.stride, self.partial = self.targets, 0, None
        if parts > 1 and present:
            count = present[0].numel()
            self.partial = _floats((parts, len(present), count), present[0])
            self.stride = len(present) * count
            self.places = (
                None if first is None else self.partial[0, 0],
                None if second is None else self.partial[0, -1],
            )

    def finish(self) -> None:
        if self.partial is None:
            return
        first, second = self.targets
        finish_gradients(
            self.partial,
            self.partial.shape[2],
            parts=self.parts,
            part_stride=self.stride,
            taps=int(first is not None),
            bias=second is not None,
            weight_grad=first,
            bias_grad=second,
        )


# Of poolings


def _slots(names: tuple[str, ...], prefix: str, wanted: bool = True) -> dict[str, int]:
    """Compile-time place of every pooling among those asked for, -1 for none."""
    return {
        f"{prefix}_{name.upper()}": names.index(name) if wanted and name in names else -1
        for name in ("mean", "max", "entropy")
    }


def _entropy_scale(count: int, normalise: bool) -> float:
    return 1.0 / math.log(count) if normalise and count > 1 else 1.0


def _pool_plan(call: Any) -> Plan:
    if not call.position_poolings:
        return _plan(call.x, "channels")
    if not call.channel_poolings:
        return _plan(call.x, "positions")
    # A part of channels' poolings costs up to 40 bytes per channel, so parts are long.
    if call.entropies < 2:
        return _plan(call.x, "positions", block_p=256, area=4096)
    # Running values of entropies both ways need the registers of smaller tiles, and more of them than the
    # compiler for some architectures would take.
    return _plan(call.x, "positions", block_p=256, maxnreg=168)


def _pool_backward_plan(call: Any) -> Plan:
    return _plan(call.x, "channels", area=1024 if call.entropies == 2 else 2048, least_part=256)


def pool_forward(call: Any, *outputs: Tensor) -> tuple[Tensor, ...]:
    """Launch the forward kernels of poolings that :func:`can_run`; fills the outputs, absent ones empty."""
    x = call.x
    images, channels, height, width = x.shape
    positions = height * width
    per_channel, per_position, *saved = outputs
    saved = [None if tensor.numel() == 0 else tensor for tensor in saved]
    made = _pool_plan(call)
    strides, flat = _map_strides(x)
    slots = {"C_SLOTS": len(call.channel_poolings), **_slots(call.channel_poolings, "C")}
    scales = (_entropy_scale(positions, call.normalise), _entropy_scale(channels, call.normalise))
    partial = None
    if call.channel_poolings and made.parts > 1:
        partial = _floats((5, made.parts, images, channels), x)
    with device_of(x):
        pool_forward_kernel[made.grid](
            x,
            call.channel_gate,
            per_channel if call.channel_poolings else None,
            saved[0],
            saved[1],
            partial,
            per_position if call.position_poolings else None,
            saved[2],
            saved[3],
            images,
            channels,
            positions,
            width,
            *made.ranges,
            made.steps,
            *scales,
            *strides,
            *_strides(call.channel_gate, 2),
            **slots,
            P_SLOTS=len(call.position_poolings),
            **_slots(call.position_poolings, "P"),
            GATE=call.gate,
            FLAT=flat,
            **made.meta,
        )
        if partial is not None:
            block_c = min(128, next_power_of_2(channels))
            blocks = ceil_div(channels, block_c)
            pool_merge_kernel[(images * blocks,)](
                partial,
                per_channel,
                saved[0],
                saved[1],
                images,
                channels,
                positions,
                made.parts,
                blocks,
                scales[0],
                **slots,
                BLOCK_C=block_c,
                num_warps=4,
                enable_fp_fusion=True,
            )
    return outputs


def pool_backward(
    call: Any,
    channels_grad: Tensor | None,
    positions_grad: Tensor | None,
    saved: tuple[Tensor, ...],
    needs: list[bool],
    *gradients: Tensor,
) -> tuple[Tensor, ...]:
    """Launch the backward kernels; fills the needed ones of the two gradients and returns both.

    Args:
        channels_grad, positions_grad: gradients of the poolings with any strides, or None.
        saved: places of maxima and sums of softmaxes, of channels and then of positions.
        needs: which of the map and its channel gate get a gradient.
    """
    x = call.x
    images, channels, height, width = x.shape
    x_grad, gate_grad = (_present(*pair) for pair in zip(gradients, needs, strict=True))
    made = _pool_backward_plan(call)
    sums = _Sums(gate_grad, None, made.parts)
    strides, flat = _map_strides(x)
    with device_of(x):
        pool_backward_kernel[made.grid](
            x,
            call.channel_gate,
            channels_grad,
            *saved[:2],
            positions_grad,
            *saved[2:],
            x_grad,
            sums.places[0],
            images,
            channels,
            height * width,
            width,
            *made.ranges,
            _entropy_scale(height * width, call.normalise),
            _entropy_scale(channels, call.normalise),
            *strides,
            *_strides(call.channel_gate, 2),
            *_strides(channels_grad, 3),
            *_strides(positions_grad, 4),
            *_dense_strides(x_grad),
            **_slots(call.channel_poolings, "C", channels_grad is not None),
            **_slots(call.position_poolings, "P", positions_grad is not None),
            GATE=call.gate,
            FLAT=flat,
            **made.meta,
        )
        sums.finish()
    return gradients


# Of scaling


def _scale_plan(call: Any, needs: list[bool] | None = None) -> Plan:
    if needs is None:
        return _plan(call.x, "tiles")
    return _sums_plan(call.x, needs[2])


def _sums_plan(x: Tensor, per_position: bool, least_p: int = 16, **options: int) -> Plan:
    """Plan for sums over channels, ``per_position``, or else only over positions; a tile has ``least_p``."""
    if not per_position:
        return _plan(x, "channels", least_part=256, **options)
    images, _, height, width = x.shape
    # Small maps have few programs of 64 positions each.
    few = images * ceil_div(height * width, 64) < PROGRAMS // 4
    return _plan(x, "positions", block_p=least_p if few else 64, **options)


def _scale_arguments(call: Any) -> tuple[tuple[Tensor | None, ...], tuple[int, ...], dict[str, Any]]:
    """What both kernels take: pointers, strides of vectors, compile-time values."""
    pointers = (call.x, call.channel_gate, call.position_gate, call.channel_add, call.residual)
    position = _strides(call.position_gate, 4)
    strides = (*_strides(call.channel_gate, 2), *_strides(call.channel_add, 2), position[0], *position[2:])
    both = call.channel_gate is not None and call.position_gate is not None
    options = {"GATE": call.gate, "SUM": call.combine == "sum" and both, "ACTIVATION": call.activation}
    return pointers, strides, options


def scale_forward(call: Any, out: Tensor) -> Tensor:
    """Launch the forward kernel of a scaling that :func:`can_run`; fills and returns ``out``."""
    _, channels, height, width = call.x.shape
    made = _scale_plan(call)
    pointers, vector_strides, options = _scale_arguments(call)
    strides, flat = _map_strides(call.x, call.residual)
    with device_of(out):
        scale_forward_kernel[made.grid](
            *pointers,
            out,
            channels,
            height * width,
            width,
            *made.ranges,
            *strides,
            *vector_strides,
            *_dense_strides(out),
            **options,
            FLAT=flat,
            **made.meta,
        )
    return out


def scale_backward(call: Any, grad: Tensor, needs: list[bool], *gradients: Tensor) -> tuple[Tensor, ...]:
    """Launch the backward kernels; fills the needed ones of the five gradients and returns all.

    Args:
        grad: (B, C, H, W) with any strides.
        needs: which of x, channel gate, position gate, channel add, residual get a gradient.
    """
    _, channels, height, width = call.x.shape
    x_grad, channel_grad, position_grad, add_grad, residual_grad = (
        _present(*pair) for pair in zip(gradients, needs, strict=True)
    )
    made = _scale_plan(call, needs)
    sums = _Sums(channel_grad, add_grad, made.parts)
    pointers, vector_strides, options = _scale_arguments(call)
    strides, flat = _map_strides(call.x, call.residual, grad)
    with device_of(grad):
        scale_backward_kernel[made.grid](
            grad,
            *pointers,
            x_grad,
            residual_grad,
            *sums.places,
            position_grad,
            channels,
            height * width,
            width,
            *made.ranges,
            made.steps,
            sums.stride,
            *strides,
            *vector_strides,
            *_dense_strides(x_grad),
            *_dense_strides(residual_grad),
            **options,
            FLAT=flat,
            **made.meta,
        )
        sums.finish()
    return gradients


# Of the context


def _context_plan(call: Any) -> Plan:
    # Parts are short enough for the second walk to find them in the L2 cache, and so long that their sums
    # weigh a sixteenth of the map in half precision.
    return _plan(call.x, "positions", block_p=64)


def context_forward(call: Any, out: Tensor, context: Tensor, log: Tensor) -> tuple[Tensor, ...]:
    """Launch the forward kernels of a context pooling that :func:`can_run`; fills the outputs.

    ``context`` and ``log`` are for backward, and empty where none comes.
    """
    images, channels, height, width = call.x.shape
    made = _context_plan(call)
    strides, flat = _map_strides(call.x)
    partial = _floats((made.parts, images, channels), call.x)
    stats = _floats((2, made.parts, images), call.x)
    block_c = min(128, next_power_of_2(channels))
    blocks = ceil_div(channels, block_c)
    kept = context.numel() > 0
    with device_of(out):
        context_forward_kernel[made.grid](
            call.x,
            call.weight,
            partial,
            stats,
            images,
            channels,
            height * width,
            width,
            made.parts,
            *strides,
            call.weight.stride(1),
            FLAT=flat,
            **made.meta,
        )
        context_merge_kernel[(images * blocks,)](
            partial,
            stats,
            out,
            context if kept else None,
            log if kept else None,
            images,
            channels,
            made.parts,
            blocks,
            BLOCK_C=block_c,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return out, context, log


def context_backward(
    call: Any, grad: Tensor, context: Tensor, log: Tensor, needs: list[bool], *gradients: Tensor
) -> tuple[Tensor, ...]:
    """Launch the backward kernels; fills the needed gradients of x and of the weight, and returns both.

    Args:
        grad: (B, C) with any strides.
        context, log: what forward kept.
    """
    images, channels, height, width = call.x.shape
    x_grad, weight_grad = (_present(*pair) for pair in zip(gradients, needs, strict=True))
    made = _context_plan(call)
    strides, flat = _map_strides(call.x)
    partial = None
    if weight_grad is not None:
        partial = _floats((images, made.parts, channels), grad)
    with device_of(grad):
        context_backward_kernel[made.grid](
            grad,
            call.x,
            call.weight,
            context,
            log,
            x_grad,
            partial,
            channels,
            height * width,
            width,
            made.parts,
            *grad.stride(),
            *strides,
            call.weight.stride(1),
            *_dense_strides(x_grad),
            FLAT=flat,
            **made.meta,
        )
        if partial is not None:
            finish_gradients(
                partial,
                channels,
                parts=images * made.parts,
                part_stride=channels,
                taps=1,
                weight_grad=weight_grad,
            )
    return gradients


# Of aggregation


def _aggregate_plan(call: Any, needs: list[bool] | None = None) -> Plan:
    # Each map has values of its own in flight, and backward running ones.
    if needs is None:
        return _plan(call.x, "tiles", area=1024, per_thread=4)
    options = {}
    if call.count > 2:
        area = 512 if call.count > 3 else 1024
        # What 512 threads may have: the compiler for some architectures would rather spill a few registers.
        options = {"area": area, "per_thread": area // 512, "maxnreg": 128}
    # Every layer has a sum per channel and part: at 16 positions, more than a tenth of what the maps weigh.
    return _sums_plan(call.x, any(needs[MOST_MAPS:-1]), 16 if call.layers < 2 else 32, **options)


def _aggregate_arguments(
    call: Any, read: tuple[Tensor, ...], written: tuple[Tensor | None, ...]
) -> tuple[tuple[Any, ...], tuple[int, ...], dict[str, Any]]:
    """What both kernels take: pointers, strides, compile-time values.

    Args:
        read: further maps that the kernel reads, whose strides come first.
        written: dense maps that it writes, None for those that nobody asked for.
    """
    maps = call.slots[:MOST_MAPS]
    strides, flat = _map_strides(*read, *maps)
    alike = all(one is None or one.stride() == call.x.stride() for one in (*read, *maps, *written))
    inner = (not alike and one is not None and is_channels_last(one) for one in written)
    for gate in call.slots[MOST_MAPS:-1]:
        position = _strides(gate, 4)
        strides += [position[0], *position[2:]]
    options = {
        "COUNT": call.count,
        "LAYERS": call.layers,
        "OPACITY": call.opacity,
        "REVERSED": call.reverse_channels,
        "ALIKE": alike,
        "INNER": sum(bit << k for k, bit in enumerate(inner)),
        "FLAT": flat,
    }
    return call.slots, (*strides, *_strides(call.slots[-1], 3)), options


def aggregate_forward(call: Any, out: Tensor) -> Tensor:
    """Launch the forward kernel of an aggregation that :func:`can_run`; fills and returns ``out``."""
    _, channels, height, width = out.shape
    made = _aggregate_plan(call)
    pointers, strides, options = _aggregate_arguments(call, (), (out,))
    with device_of(out):
        aggregate_forward_kernel[made.grid](
            *pointers,
            out,
            channels,
            height * width,
            width,
            *made.ranges,
            *strides,
            **options,
            **made.meta,
        )
    return out


def aggregate_backward(call: Any, grad: Tensor, needs: list[bool], *gradients: Tensor) -> tuple[Tensor, ...]:
    """Launch the backward kernels; fills the needed ones of the gradients and returns all.

    Args:
        grad: (B, C, H, W) with any strides.
        needs: which of the maps, the gates of positions and those of channels get a gradient.
    """
    images, channels, height, width = call.x.shape
    wanted = [_present(*pair) for pair in zip(gradients, needs, strict=True)]
    made = _aggregate_plan(call, needs)
    sums, partial = wanted[-1], None
    # Strides of parts, layers and channels.
    sum_strides = (0, 1, call.layers)
    if sums is not None and made.parts > 1:
        partial = _floats((made.parts, call.layers, images * channels), grad)
        sum_strides = partial.stride()
    pointers, strides, options = _aggregate_arguments(call, (grad,), tuple(wanted[:MOST_MAPS]))
    with device_of(grad):
        aggregate_backward_kernel[made.grid](
            grad,
            *pointers,
            *wanted[:-1],
            sums if partial is None else partial,
            channels,
            height * width,
            width,
            *made.ranges,
            made.steps,
            *sum_strides,
            *strides,
            **options,
            POSITION_SUMS=any(needs[MOST_MAPS:-1]),
            **made.meta,
        )
        if partial is not None:
            finish_gradients(
                partial,
                images * channels,
                parts=made.parts,
                part_stride=sum_strides[0],
                taps=call.layers,
                weight_grad=sums,
            )
    return gradients


def pool_launch_count(call: Any, direction: str) -> int:
    """Launches of poolings with every gradient."""
    if direction == "forward":
        return 1 + (len(call.channel_poolings) > 0 and _pool_plan(call).parts > 1)
    if call.is_mean:
        return 0
    gated = call.channel_gate is not None
    return 1 + (gated and _pool_backward_plan(call).parts > 1)


def scale_launch_count(call: Any, direction: str) -> int:
    """Launches of a scaling with every gradient."""
    if direction == "forward":
        return 1
    needs = [True, *(tensor is not None for tensor in call.tensors()[1:])]
    return 1 + ((needs[1] or needs[3]) and _scale_plan(call, needs).parts > 1)


def context_launch_count(call: Any, direction: str) -> int:
    """Launches of a context pooling with every gradient."""
    return 2


def aggregate_launch_count(call: Any, direction: str) -> int:
    """Launches of an aggregation with every gradient."""
    if direction == "forward":
        return 1
    needs = [tensor is not None for tensor in call.slots]
    return 1 + (needs[-1] and _aggregate_plan(call, needs).parts > 1)
