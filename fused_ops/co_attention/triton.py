"""The Triton backend of co-attention: what it can run, its tiles, and its launches.

One launch in each direction for both directions of attention, and one small launch more where several
programs share the local tokens of a head: it adds their parts up in a fixed order. No atomics: results repeat
bitwise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_ops.co_attention.triton_kernels import (
    backward_kernel,
    forward_kernel,
    merge_kernel,
    sum_parts_kernel,
)
from fused_ops.core import backends, environment, tuning
from fused_ops.core.dropout import dropout_threshold
from fused_ops.core.triton_support import ceil_div, next_power_of_2

LARGEST_HEAD = 128
# Two programs for each multiprocessor of the largest GPUs. A constant, so that with the same tiles the order
# of the sums over local tokens, and with it every bit of the result, is the same on all GPUs.
PROGRAMS = 264
# Fixed when the kernels are defined.
_INTERPRETED = environment.interpreting()


def can_run(call: Any) -> tuple[bool, str]:
    """Whether the Triton kernels can run ``call``; one sentence says why not.

    Compares sizes and names none: while a graph is traced they may be symbols, which printing would turn into
    numbers, for one graph each.
    """
    ok, reason = backends.triton_takes("local_query", call.local_query)
    if not ok:
        return False, reason
    batch, tokens, heads, head_dim = call.local_query.shape
    if head_dim > LARGEST_HEAD:
        return False, f"heads are wider than {LARGEST_HEAD}; the Triton kernels take no wider ones"
    keys = call.global_key.shape[1]
    if batch == 0 or tokens == 0 or heads == 0 or head_dim == 0 or keys == 0:
        return False, "local_query or global_key is empty"
    if batch * heads * tokens >= 2**30 or batch * heads * keys >= 2**30:
        return False, "there are 2**30 tokens or more, counted once for each head"
    return True, ""


def largest_block(head_dim: int, crowded: bool = False) -> int:
    """Global tokens of one block, at most; more would take all registers.

    ``crowded``: both directions share scores and have dropout, so that a tile holds the most at once.
    """
    return 32 if head_dim > (32 if crowded else 64) else 64


def _crowded(call: Any) -> bool:
    return call.shared and call.dropout > 0


def whole(call: Any) -> bool:
    """Whether one block holds all global tokens of a head, so that its programs serve both directions."""
    return call.global_key.shape[1] <= largest_block(call.global_key.shape[3], _crowded(call))


class Plan(NamedTuple):
    """Tiles of one launch.

    Attributes:
        blocks: of global tokens.
        parts: programs that share the local tokens of a head with one block of global tokens.
        part_tokens: local tokens of each.
        tiles: of local tokens, in whose programs the direction to local tokens runs where there are several
            blocks; 0 where there is one.
        meta: compile-time values and launch options.
    """

    blocks: int
    parts: int
    part_tokens: int
    tiles: int
    meta: dict[str, Any]


def _tile(direction: str, call: Any) -> tuple[int, int, int, int]:
    """Local tokens per tile, global tokens per block, warps and pipeline stages, where nothing was measured.

    The largest tiles that spill no registers from sm_80 to sm_120.
    """
    _, tokens, _, head_dim = call.local_query.shape
    block_g = min(largest_block(head_dim, _crowded(call)), max(16, next_power_of_2(call.global_key.shape[1])))
    if call.local_query.element_size() == 4:
        # Products of float32 tiles take every operand into registers.
        block_l, warps, stages = 16, 8, 1
    elif direction == "forward":
        block_l, warps, stages = 64, 4, 2
        if call.dropout and (call.shared or head_dim > 32):
            block_l = 16 if head_dim > 64 else 32
    else:
        block_l, stages = (16 if call.dropout or head_dim > 32 else 32), 1
        warps = 8 if head_dim > 32 or _crowded(call) else 4
    return min(block_l, max(16, next_power_of_2(tokens))), block_g, warps, stages


def tiles(kernel: str, sizes: tuple[int, ...]) -> Sequence[tuple[int, int, int, int]]:
    """Tiles worth trying for ``kernel`` on (local tokens, global tokens, width of a head)."""
    least = max(16, next_power_of_2(sizes[0]))
    most = max(16, next_power_of_2(sizes[1]))
    locals_ = [block for block in (16, 32, 64, 128) if block <= least]
    # One block has to hold few global tokens.
    largest = largest_block(sizes[2])
    globals_ = [most] if most <= largest else [block for block in (16, 32, 64) if block <= largest]
    return [
        (block_l, block_g, warps, stages)
        for block_l in locals_
        for block_g in globals_
        for warps in (2, 4, 8)
        for stages in (1, 2)
    ]


@lru_cache(maxsize=1024)
def make_plan(
    direction: str,
    rows: int,
    tokens: int,
    keys: int,
    head_dim: int,
    tile: tuple[int, int, int, int],
    crowded: bool = False,
) -> Plan:
    """Plan for ``rows`` heads of all images with ``keys`` global tokens each.

    Parts cost a write and a read of float32 outputs or gradients of all global tokens. So there are no more
    than fill the GPU, each walks 512 local tokens at least, and their traffic stays below a twelfth of the
    least as long as that leaves about half the multiprocessors something to do.
    """
    block_l, block_g, warps, stages = tile
    largest = largest_block(head_dim, crowded)
    one_block = keys <= largest
    # A tile may have been measured on other numbers of tokens and other widths.
    block_g = max(16, next_power_of_2(keys)) if one_block else min(block_g, largest)
    blocks = ceil_div(keys, block_g)
    # In elements of half precision, relative to the width of a head.
    least, part = (4 * tokens, 4 * keys) if direction == "forward" else (7 * tokens, 12 * keys)
    cheap = least // (12 * part)
    busy = PROGRAMS // 4 // (rows * blocks)
    wanted = min(PROGRAMS // (rows * blocks), tokens // 512, max(cheap, busy))
    count = ceil_div(tokens, block_l)
    each = ceil_div(count, max(1, wanted))
    meta = {
        "WHOLE": one_block,
        "HEAD_DIM": head_dim,
        "BLOCK_L": block_l,
        "BLOCK_G": block_g,
        "BLOCK_D": max(16, next_power_of_2(head_dim)),
        "num_warps": warps,
        "num_stages": stages,
        "enable_fp_fusion": True,
    }
    tiles = 0 if one_block else count
    return Plan(blocks, ceil_div(count, each), each * block_l, tiles, meta)


def plan_of(direction: str, call: Any) -> Plan:
    """The plan of a call's ``forward`` or ``backward``."""
    batch, tokens, heads, head_dim = call.local_query.shape
    keys = call.global_key.shape[1]
    extras = (" shared" if call.shared else "") + (" with dropout" if call.dropout else "")
    tile = tuning.tile_of(
        f"co_attention_{direction} {8 * call.local_query.element_size()}-bit{extras}",
        (tokens, keys, head_dim),
        lambda: _tile(direction, call),
        call.local_query,
    )
    return make_plan(direction, batch * heads, tokens, keys, head_dim, tuple(tile), _crowded(call))


def launch_count(call: Any, direction: str) -> int:
    """Launches of a call with every gradient."""
    return 1 + (plan_of(direction, call).parts > 1)


def _inputs(call: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """The six inputs in the kernels' order, and their strides. Shared scores stand for those of both."""
    tensors = (
        call.local_query,
        call.local_query if call.local_key is None else call.local_key,
        call.local_value,
        call.global_key if call.global_query is None else call.global_query,
        call.global_key,
        call.global_value,
    )
    return (*tensors, call.seed), tuple(stride for tensor in tensors for stride in tensor.stride())


def _options(call: Any, plan: Plan) -> dict[str, Any]:
    return {
        "SHARED": call.shared,
        "DROPOUT": call.dropout > 0,
        "UPCAST": _INTERPRETED,
        "PRECISION": "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
        **plan.meta,
    }


def forward(
    call: Any, local_out: Tensor, global_out: Tensor, local_lse: Tensor, global_lse: Tensor
) -> tuple[Tensor, ...]:
    """Launch the forward kernels of a call that :func:`can_run`; fills and returns the outputs.

    Args:
        call: the checked call.
        local_out: (B, N, heads, d), any strides.
        global_out: (B, M, heads, d), dense.
        local_lse: (B, N, heads) in float32, dense; empty where not kept.
        global_lse: (B, M, heads) in float32, dense.
    """
    batch, tokens, heads, head_dim = call.local_query.shape
    keys = call.global_key.shape[1]
    plan = plan_of("forward", call)
    rows = batch * heads
    out, lse = global_out, global_lse
    if plan.parts > 1:
        out = torch.empty((plan.parts, *out.shape), dtype=torch.float32, device=out.device)
        lse = torch.empty((plan.parts, *lse.shape), dtype=torch.float32, device=out.device)
    split = rows * plan.blocks * plan.parts
    inputs, strides = _inputs(call)
    with backends.device_of(local_out):
        forward_kernel[(split + rows * plan.tiles,)](
            *inputs,
            local_out,
            local_lse if local_lse.numel() else None,
            out,
            lse,
            tokens,
            keys,
            heads,
            rows,
            plan.blocks,
            plan.parts,
            plan.part_tokens,
            split,
            *strides,
            *local_out.stride(),
            call.scale * math.log2(math.e),
            dropout_threshold(call.dropout),
            1.0 / (1.0 - call.dropout),
            **_options(call, plan),
        )
        if plan.parts > 1:
            count = rows * keys
            block = min(64, max(16, next_power_of_2(count)))
            merge_kernel[(ceil_div(count, block),)](
                out,
                lse,
                global_out,
                global_lse,
                count,
                plan.parts,
                HEAD_DIM=head_dim,
                BLOCK_R=block,
                BLOCK_D=plan.meta["BLOCK_D"],
                num_warps=4,
                enable_fp_fusion=True,
            )
    return local_out, global_out, local_lse, global_lse


def backward(
    call: Any,
    local_grad: Tensor | None,
    global_grad: Tensor | None,
    outputs: Sequence[Tensor | None],
    needs: Sequence[bool],
    *gradients: Tensor,
) -> tuple[Tensor, ...]:
    """Launch the backward kernels; fills the needed ones of the six gradients and returns all.

    Args:
        call: the forward's call.
        local_grad: (B, N, heads, d) with any strides, or None for zeros; at least one is given.
        global_grad: (B, M, heads, d) with any strides, or None for zeros.
        outputs: local_out and local_lse (not read where one block holds all global tokens), global_out and
            global_lse, as forward gave them.
        needs: which of local_query, local_value, global_key, global_value, local_key, global_query get a
            gradient; none that is zero because its direction's output has none.
        gradients: outputs for them, local ones strided alike, global ones dense, absent ones empty.
    """
    local_query, local_value, global_key, global_value, local_key, global_query = (
        gradient if need else None for gradient, need in zip(gradients, needs, strict=True)
    )
    batch, tokens, heads, head_dim = call.local_query.shape
    keys = call.global_key.shape[1]
    rows = batch * heads
    plan = plan_of("backward", call)
    scores_back = (local_query, global_key) if call.shared else (local_key, global_query)
    to_local = local_grad is not None and any(x is not None for x in (local_query, global_key, global_value))
    to_global = global_grad is not None and any(x is not None for x in (*scores_back, local_value))
    local_side = [x for x in (local_query, local_key, local_value) if x is not None]
    global_side = [x for x in (global_query, global_key, global_value) if x is not None]
    targets = {id(x): x for x in global_side}
    partial, part_stride = None, 0
    if plan.parts > 1 and global_side:
        part_stride = len(global_side) * rows * keys * head_dim
        partial = torch.empty(
            (plan.parts, len(global_side), rows * keys * head_dim),
            dtype=torch.float32,
            device=call.local_query.device,
        )
        targets = {id(x): partial[0, index] for index, x in enumerate(global_side)}
    split = rows * plan.blocks * plan.parts if global_side or not plan.tiles else 0
    like = local_side[0] if local_side else call.local_query
    inputs, strides = _inputs(call)
    with backends.device_of(call.local_query):
        backward_kernel[(split + (rows * plan.tiles if local_side else 0),)](
            local_grad,
            global_grad,
            *inputs,
            *outputs,
            local_query,
            local_key,
            local_value,
            *(targets.get(id(x)) for x in (global_query, global_key, global_value)),
            tokens,
            keys,
            heads,
            rows,
            plan.blocks,
            plan.parts,
            plan.part_tokens,
            part_stride,
            split,
            *_strides_of(local_grad),
            *_strides_of(global_grad),
            *strides,
            *_strides_of(outputs[0]),
            *like.stride(),
            call.scale,
            call.scale * math.log2(math.e),
            dropout_threshold(call.dropout),
            1.0 / (1.0 - call.dropout),
            TO_LOCAL=to_local,
            TO_GLOBAL=to_global,
            **_options(call, plan),
        )
        if partial is not None:
            count = rows * keys * head_dim
            block = min(1024, max(128, next_power_of_2(count)))
            sum_parts_kernel[(ceil_div(count, block), len(global_side))](
                partial,
                *global_side,
                *(None,) * (3 - len(global_side)),
                plan.parts,
                part_stride,
                count,
                BLOCK=block,
                num_warps=4,
                enable_fp_fusion=True,
            )
    return gradients


def _strides_of(tensor: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0, 0) if tensor is None else tensor.stride()
