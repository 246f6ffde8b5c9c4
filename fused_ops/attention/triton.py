"""The Triton backend of attention with few keys: what it can run, its tiles, and its launches.

One launch forward. Backward one too where the programs of one head walk all its queries; where there are too
few heads to fill a GPU, several programs share a head's queries, and a second launch adds up their gradients
of keys and values in a fixed order. A bias that gets a gradient takes one more launch, which adds up the
gradients of the scores over the batch. No atomics: results repeat bitwise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_ops.attention.triton_kernels import backward_kernel, forward_kernel, sum_parts_kernel
from fused_ops.core import backends, environment, tuning
from fused_ops.core.dropout import dropout_threshold
from fused_ops.core.triton_support import ceil_div, next_power_of_2

LARGEST_KEYS = 256
LARGEST_HEAD = 128
# Values in a tile of keys: more spill registers on some architecture. Backward adds up two such tiles in
# float32.
LARGEST_FORWARD = 256 * 64
LARGEST_BACKWARD = 256 * 32
# Two programs for each multiprocessor of the largest GPUs. A constant, so that with the same tiles the order
# of the sums over queries, and with it every bit of the result, is the same on all GPUs.
PROGRAMS = 264
# Fixed when the kernels are defined.
_INTERPRETED = environment.interpreting()


def can_run(call: Any) -> tuple[bool, str]:
    """Whether the Triton kernels can run ``call``; one sentence says why not."""
    query = call.query
    ok, reason = backends.triton_takes("query", query)
    if not ok:
        return False, reason
    ok, reason = fits(call)
    if not ok:
        return False, reason
    keys = call.key.shape[1]
    if query.numel() == 0 or keys == 0:
        return False, f"query {tuple(query.shape)} or key {tuple(call.key.shape)} is empty"
    if query.shape[0] * query.shape[2] * query.shape[1] >= 2**31:
        return False, f"query {tuple(query.shape)} has 2**31 rows or more"
    return True, ""


def fits(call: Any) -> tuple[bool, str]:
    """Whether keys and values of one head fit one tile, and their gradients the registers beside it.

    Compares sizes and names none in the reason: while a graph is traced they may be symbols, which rounding
    and printing would turn into numbers, for one graph each.
    """
    keys, head_dim = call.key.shape[1], call.query.shape[3]
    if keys > LARGEST_KEYS:
        return False, f"there are more than {LARGEST_KEYS} keys; the Triton kernels hold no more in one tile"
    if head_dim > LARGEST_HEAD:
        return False, f"heads are wider than {LARGEST_HEAD}; the Triton kernels take no wider ones"
    largest, what = LARGEST_FORWARD, "run"
    if call.query.element_size() == 4:
        largest, what = LARGEST_FORWARD // 2, "run in float32"
    if call.needs_grad:
        largest, what = LARGEST_BACKWARD, "train"
        if call.bias is not None or call.dropout:
            largest, what = LARGEST_BACKWARD // 2, "train with a bias or dropout"
    most_keys = largest // 16
    while most_keys * head_dim > largest:
        most_keys //= 2
    if keys > most_keys:
        return False, f"with heads this wide the Triton kernels {what} on no more than {most_keys} keys"
    return True, ""


def _blocks(keys: int, head_dim: int) -> tuple[int, int]:
    """Keys and width of a head as tiles have them."""
    return max(16, next_power_of_2(keys)), max(16, next_power_of_2(head_dim))


class Plan(NamedTuple):
    """Tiles of one launch.

    Attributes:
        grid: number of programs.
        parts: programs that share the queries of a head.
        part_queries: queries of each.
        meta: compile-time values and launch options.
    """

    grid: tuple[int]
    parts: int
    part_queries: int
    meta: dict[str, Any]


def _tile(direction: str, call: Any) -> tuple[int, int, int]:
    """Queries per tile, warps and pipeline stages, where nothing was measured.

    The largest tiles that spill no registers from sm_80 to sm_120. (In float32, 49 keys of width 128 do.)
    """
    queries, head_dim = call.query.shape[1], call.query.shape[3]
    block_k, block_d = _blocks(call.key.shape[1], head_dim)
    area = block_k * block_d
    has_bias, has_dropout = call.bias is not None, call.dropout > 0
    warps, stages = 8 if area > 64 * 64 or block_k > 128 else 4, 2
    if call.query.element_size() == 4:
        # Products of float32 tiles take every operand into registers.
        block_m, warps, stages = 16, 8, 1
    elif direction == "backward":
        block_m = 32
        if has_bias or has_dropout:
            warps, stages = 8, 1
        if has_bias and (has_dropout or block_k > 128):
            block_m = 16
    elif block_k > 128:
        block_m, stages = 32 if block_d > 32 else 16, 1
    else:
        block_m = 32 if area > 128 * 64 or (area > 64 * 64 and has_bias) else 64
    return min(block_m, max(16, next_power_of_2(queries))), warps, stages


def tiles(kernel: str, sizes: tuple[int, ...]) -> Sequence[tuple[int, int, int]]:
    """Tiles worth trying for ``kernel`` on (queries, keys, width of a head)."""
    least = max(16, next_power_of_2(sizes[0]))
    blocks = [block for block in (16, 32, 64, 128) if block <= least]
    return [(block, warps, stages) for block in blocks for warps in (2, 4, 8) for stages in (1, 2, 3)]


def _meta(keys: int, head_dim: int, block_m: int, warps: int, stages: int) -> dict[str, Any]:
    block_k, block_d = _blocks(keys, head_dim)
    return {
        "HEAD_DIM": head_dim,
        "BLOCK_M": block_m,
        "BLOCK_K": block_k,
        "BLOCK_D": block_d,
        "num_warps": warps,
        "num_stages": stages,
        "enable_fp_fusion": True,
    }


@lru_cache(maxsize=1024)
def forward_plan(rows: int, queries: int, keys: int, head_dim: int, tile: tuple[int, int, int]) -> Plan:
    """Plan for ``rows`` heads of all images; each program takes up to eight tiles to reuse its keys."""
    block_m, warps, stages = tile
    blocks = ceil_div(queries, block_m)
    each = min(8, max(1, rows * blocks // (2 * PROGRAMS)))
    parts = ceil_div(blocks, each)
    meta = _meta(keys, head_dim, block_m, warps, stages)
    if meta["BLOCK_K"] > 128:
        # The compiler keeps a tile of 256 x 16 in too many registers, and one of 256 x 32 in memory.
        meta["BLOCK_D"] = max(32, meta["BLOCK_D"])
    return Plan((rows * parts,), parts, each * block_m, meta)


@lru_cache(maxsize=1024)
def backward_plan(rows: int, queries: int, keys: int, head_dim: int, tile: tuple[int, int, int]) -> Plan:
    """Plan for ``rows`` heads of all images.

    Parts cost a write and a read of float32 gradients of keys and values each. So there are no more than fill
    the GPU, each walks 512 queries at least, and their traffic stays below a tenth of the least as long as
    that leaves half the multiprocessors something to do.
    """
    block_m, warps, stages = tile
    cheap = int(0.1 * (3 * queries + 4 * keys) / (8 * keys))
    busy = ceil_div(PROGRAMS // 4, rows)
    wanted = min(PROGRAMS // rows, queries // 512, max(cheap, busy))
    blocks = ceil_div(queries, block_m)
    each = ceil_div(blocks, max(1, wanted))
    parts = ceil_div(blocks, each)
    return Plan((rows * parts,), parts, each * block_m, _meta(keys, head_dim, block_m, warps, stages))


def _plan(direction: str, call: Any) -> Plan:
    batch, queries, heads, head_dim = call.query.shape
    keys = call.key.shape[1]
    extras = " with bias or dropout" if call.bias is not None or call.dropout else ""
    tile = tuning.tile_of(
        f"attention_{direction} {8 * call.query.element_size()}-bit{extras}",
        (queries, keys, head_dim),
        lambda: _tile(direction, call),
        call.query,
    )
    make = forward_plan if direction == "forward" else backward_plan
    return make(batch * heads, queries, keys, head_dim, tuple(tile))


def _shared_arguments(call: Any) -> tuple[tuple[Any, ...], tuple[int, ...], tuple[Any, ...], dict[str, Any]]:
    """What both kernels take: pointers, strides, dropout's numbers, compile-time values."""
    mask = None if call.key_mask is None else call.key_mask.view(torch.uint8)
    bias_strides = (0, 0, 0)
    if call.bias is not None:
        bias_strides = call.bias.stride()
        if call.bias.shape[0] == 1:
            bias_strides = (0, *bias_strides[1:])
    pointers = (call.query, call.key, call.value, call.bias, mask, call.seed)
    strides = (
        *call.query.stride(),
        *call.key.stride(),
        *call.value.stride(),
        *bias_strides,
        *((0, 0) if mask is None else mask.stride()),
    )
    numbers = (dropout_threshold(call.dropout), 1.0 / (1.0 - call.dropout))
    options = {
        "DROPOUT": call.dropout > 0,
        "UPCAST": _INTERPRETED,
        "PRECISION": "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
    }
    return pointers, strides, numbers, options


def forward(call: Any, out: Tensor) -> Tensor:
    """Launch the forward kernel of a call that :func:`can_run`; fills and returns ``out``."""
    plan = _plan("forward", call)
    pointers, strides, numbers, options = _shared_arguments(call)
    with backends.device_of(out):
        forward_kernel[plan.grid](
            *pointers,
            out,
            call.query.shape[1],
            call.key.shape[1],
            call.query.shape[2],
            plan.parts,
            plan.part_queries,
            *strides,
            *out.stride()[:3],
            call.scale * math.log2(math.e),
            *numbers,
            **options,
            **plan.meta,
        )
    return out


def backward(call: Any, grad: Tensor, needs: list[bool], *gradients: Tensor) -> tuple[Tensor, ...]:
    """Launch the backward kernels; fills the needed ones of the four gradients and returns all.

    Args:
        call: the forward's call.
        grad: (B, N, heads, d) with any strides.
        needs: which of query, key, value, bias get a gradient.
        gradients: dense outputs for them, absent ones empty.
    """
    query_grad, key_grad, value_grad, bias_grad = (
        gradient if need else None for gradient, need in zip(gradients, needs, strict=True)
    )
    batch, queries, heads, head_dim = call.query.shape
    keys = call.key.shape[1]
    plan = _plan("backward", call)
    pointers, strides, numbers, options = _shared_arguments(call)
    sums = [gradient for gradient in (key_grad, value_grad) if gradient is not None]
    count = batch * keys * heads * head_dim
    targets = (key_grad, value_grad)
    partial, part_stride = None, 0
    if plan.parts > 1 and sums:
        part_stride = len(sums) * count
        partial = torch.empty((plan.parts, len(sums), count), dtype=torch.float32, device=grad.device)
        key_part = None if key_grad is None else partial[0, 0]
        value_part = None if value_grad is None else partial[0, len(sums) - 1]
        targets = (key_part, value_part)
    scores = None
    if bias_grad is not None:
        scores = torch.empty((batch, heads, queries, keys), dtype=torch.float32, device=grad.device)
    with backends.device_of(grad):
        backward_kernel[plan.grid](
            grad,
            *pointers,
            query_grad,
            *targets,
            scores,
            queries,
            keys,
            heads,
            plan.parts,
            plan.part_queries,
            part_stride,
            *grad.stride(),
            *strides,
            call.scale,
            call.scale * math.log2(math.e),
            *numbers,
            **options,
            **plan.meta,
        )
        if partial is not None:
            sum_parts(partial, plan.parts, count, *sums)
        if bias_grad is not None:
            # A bias that all heads share gets the sum over them too.
            sum_parts(scores, batch * heads // bias_grad.shape[0], bias_grad.numel(), bias_grad)
    return gradients


def launch_count(call: Any, direction: str) -> int:
    """Launches for ``call``; ``backward`` with every gradient."""
    if direction == "forward":
        return 1
    return 1 + (_plan("backward", call).parts > 1) + (call.bias is not None and call.bias.requires_grad)


def sum_parts(partial: Tensor, parts: int, count: int, first: Tensor, second: Tensor | None = None) -> None:
    sets = 1 if second is None else 2
    block = min(1024, max(128, next_power_of_2(count)))
    sum_parts_kernel[(ceil_div(count, block), sets)](
        partial,
        first,
        second,
        parts,
        sets * count,
        count,
        count,
        BLOCK=block,
        num_warps=4,
        enable_fp_fusion=True,
    )
