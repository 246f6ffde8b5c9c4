"""The Triton backend of the attention block: what it can run, its tiles, and its launches.

One launch forward. Backward one where there is one head, else one for the keys' gradients, head by head, and
one for the tokens'. Where programs share an image's tokens, further ones add up their parts in a fixed order.
No atomics: results repeat bitwise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_ops.attention.triton import sum_parts
from fused_ops.attention.triton_block_kernels import (
    block_backward_kernel,
    block_forward_kernel,
    block_rows_kernel,
)
from fused_ops.core import backends, environment, tuning
from fused_ops.core.triton_support import ceil_div, next_power_of_2

LARGEST_CHANNELS = 128
LARGEST_KEYS = 256
# Values in a tile of keys (keys and channels rounded up to powers of two); backward adds up two such tiles.
LARGEST_FORWARD = 256 * 64
LARGEST_BACKWARD = 64 * 128
LARGEST_TOGETHER = 64 * 64
# Two programs for each multiprocessor of the largest GPUs; a constant, so that results repeat on all of them.
PROGRAMS = 264
_INTERPRETED = environment.interpreting()


def can_run(call: Any) -> tuple[bool, str]:
    """Whether the Triton kernels can run ``call``; one sentence says why not."""
    ok, reason = backends.triton_takes("x", call.x)
    if not ok:
        return False, reason
    ok, reason = fits(call)
    if not ok:
        return False, reason
    if call.x.numel() == 0 or call.keys == 0:
        return False, f"x {tuple(call.x.shape)} or key {tuple(call.key.shape)} is empty"
    if call.x.shape[0] * call.x.shape[1] >= 2**31:
        return False, f"x {tuple(call.x.shape)} has 2**31 tokens or more"
    return True, ""


def fits(call: Any) -> tuple[bool, str]:
    """Whether a head's keys and values, as wide as the map, fit a program."""
    return fits_sizes(call.x.shape[2], call.keys, call.needs_grad, call.compute)


def fits_sizes(channels: int, keys: int, training: bool, compute: torch.dtype) -> tuple[bool, str]:
    """:func:`fits` of a call with these sizes, which may be symbols."""
    if channels > LARGEST_CHANNELS:
        return False, f"x has more than {LARGEST_CHANNELS} channels; the Triton kernels take no more"
    largest, what = (LARGEST_BACKWARD, "train") if training else (LARGEST_FORWARD, "run")
    if compute.itemsize == 4:
        largest, what = largest // 2, f"{what} in float32"
    most_keys = LARGEST_KEYS
    while most_keys > 16 and most_keys * channels > largest:
        most_keys //= 2
    if keys > most_keys:
        return False, f"with this many channels the Triton kernels {what} on no more than {most_keys} keys"
    return True, ""


class Plan(NamedTuple):
    """Tiles of one launch.

    Attributes:
        parts: programs that share the tokens of an image.
        part_tokens: tokens of each.
        meta: compile-time values and launch options.
    """

    parts: int
    part_tokens: int
    meta: dict[str, Any]


def _area(call: Any) -> int:
    """Values in a tile of keys."""
    return max(16, next_power_of_2(call.keys)) * max(16, next_power_of_2(call.x.shape[2]))


def _tile(kernel: str, call: Any) -> tuple[int, int, int]:
    """Tokens per tile, warps and pipeline stages, where nothing was measured.

    The largest tiles that spill no registers from sm_80 to sm_120.
    """
    block_k, area = max(16, next_power_of_2(call.keys)), _area(call)
    if call.compute.itemsize == 4:
        # Products of float32 tiles take every operand into registers.
        return 16, 8, 1
    if kernel == "forward":
        if block_k > 128:
            return 16, 4, 1
        # Larger, a tile of keys leaves too few registers on sm_120.
        return (
            32 if area <= 64 * 64 or block_k <= 64 else 16,
            4 if area <= 64 * 64 and call.heads == 1 else 8,
            1,
        )
    if kernel == "rows":
        return 16 if area > 64 * 64 else 32, 8, 1
    return 16, 8 if area > 32 * 64 else 4, 1


def tiles(kernel: str, sizes: tuple[int, ...]) -> Sequence[tuple[int, int, int]]:
    """Tiles worth trying for ``kernel`` on (tokens, keys, channels, heads)."""
    least = max(16, next_power_of_2(sizes[0]))
    blocks = [block for block in (16, 32, 64, 128) if block <= least]
    return [(block, warps, stages) for block in blocks for warps in (4, 8) for stages in (1, 2)]


@lru_cache(maxsize=1024)
def _plan_of(
    tokens: int, keys: int, channels: int, programs: int, per_part: int, tile: tuple[int, int, int]
) -> Plan:
    """Plan where each of ``programs`` walks ``per_part`` tokens at least, if there are enough programs."""
    block_m, warps, stages = tile
    block_m = min(block_m, max(16, next_power_of_2(tokens)))
    parts = max(1, min(ceil_div(PROGRAMS, programs), tokens // per_part))
    each = ceil_div(ceil_div(tokens, block_m), parts)
    meta = {
        "BLOCK_M": block_m,
        "BLOCK_K": max(16, next_power_of_2(keys)),
        "BLOCK_C": max(16, next_power_of_2(channels)),
        "num_warps": warps,
        "num_stages": stages,
        "enable_fp_fusion": True,
    }
    return Plan(ceil_div(tokens, each * block_m), each * block_m, meta)


def _plan(kernel: str, call: Any) -> Plan:
    batch, tokens, channels = call.x.shape
    tile = tuning.tile_of(
        f"attention_block_{kernel} {8 * call.compute.itemsize}-bit",
        (tokens, call.keys, channels, call.heads),
        lambda: _tile(kernel, call),
        call.x,
    )
    # Parts of the keys' gradients are written and read in float32; others write none, or three vectors.
    shared = kernel in ("backward", "keys")
    programs = batch * (call.heads if kernel == "keys" else 1)
    per_part = max(512, 20 * call.keys) if shared else 256
    return _plan_of(tokens, call.keys, channels, programs, per_part, tuple(tile))


def _options(call: Any) -> dict[str, Any]:
    return {
        "NORM": call.norm,
        "IDENTITY": call.identity,
        "UPCAST": _INTERPRETED,
        "PRECISION": "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
    }


def _score_strides(call: Any) -> tuple[int, ...]:
    return (0, 0, 0) if call.score_bias is None else call.score_bias.stride()


def forward(call: Any, out: Tensor) -> Tensor:
    """Launch the forward kernel of a call that :func:`can_run`; fills and returns ``out``."""
    plan = _plan("forward", call)
    batch, tokens, channels = call.x.shape
    with backends.device_of(out):
        block_forward_kernel[(batch * plan.parts,)](
            call.x,
            call.key,
            call.value,
            call.score_bias,
            call.out_bias,
            call.norm_weight,
            call.norm_bias,
            call.residual,
            call.drop_path,
            out,
            tokens,
            call.keys,
            channels,
            call.heads,
            plan.parts,
            plan.part_tokens,
            *call.x.stride(),
            *call.key.stride(),
            *call.value.stride(),
            *_score_strides(call),
            *((0, 0, 0) if call.residual is None else call.residual.stride()),
            call.scale * math.log2(math.e),
            call.eps,
            **_options(call),
            **plan.meta,
        )
    return out


def _launches(call: Any, rows: bool, keys: bool) -> list[tuple[str, bool, bool]]:
    """Kernels of backward: name for their tiles, whether they give tokens' gradients, and keys'.

    One for both holds twice a tile of keys and twice one of their gradients.
    """
    if rows and keys and call.heads == 1 and _area(call) <= LARGEST_TOGETHER:
        return [("backward", True, True)]
    return [("keys", False, True)] * keys + [("rows", True, False)] * rows


def backward(call: Any, grad: Tensor, needs: list[bool], *gradients: Tensor) -> tuple[Tensor, ...]:
    """Launch the backward kernels; fills the needed ones of the gradients and returns all.

    Args:
        call: the forward's call.
        grad: (B, N, C) with any strides.
        needs: which of x, key, value, score_bias, out_bias, norm_weight, norm_bias get a gradient.
        gradients: dense outputs for them, absent ones empty.
    """
    batch, tokens, channels = call.x.shape
    x_grad, key_grad, value_grad, score_grad, *vectors = gradients
    count = batch * call.heads * call.keys
    with backends.device_of(grad):
        for kernel, with_rows, with_keys in _launches(call, *wanted(needs)):
            plan = _plan(kernel, call)
            sums = partial = scores = None
            targets: tuple[Tensor | None, ...] = (None, None)
            if with_rows:
                sums = torch.empty((batch * plan.parts, 3, channels), dtype=torch.float32, device=grad.device)
            if with_keys:
                targets, scores = (key_grad, value_grad), score_grad if needs[3] else None
                if plan.parts > 1:
                    shape = (plan.parts, 2, count * channels)
                    partial = torch.empty(shape, dtype=torch.float32, device=grad.device)
                    targets = (partial[0, 0], partial[0, 1])
                    if needs[3]:
                        scores = torch.empty((plan.parts, count), dtype=torch.float32, device=grad.device)
            shared = (
                grad,
                call.x,
                call.key,
                call.value,
                call.score_bias,
                call.norm_weight,
                call.norm_bias,
                call.drop_path,
                x_grad if with_rows else None,
            )
            sizes = (tokens, call.keys, channels, call.heads, plan.parts, plan.part_tokens)
            numbers = (
                *grad.stride(),
                *call.x.stride(),
                *call.key.stride(),
                *call.value.stride(),
                *_score_strides(call),
                call.scale,
                call.scale * math.log2(math.e),
                call.eps,
            )
            options = {**_options(call), **plan.meta}
            if with_keys:
                block_backward_kernel[(batch * plan.parts, call.heads)](
                    *shared,
                    *targets,
                    scores,
                    sums,
                    *sizes,
                    2 * count * channels,
                    count,
                    *numbers,
                    ROWS=with_rows,
                    **options,
                )
            else:
                block_rows_kernel[(batch * plan.parts,)](*shared, sums, *sizes, *numbers, **options)
            if partial is not None:
                sum_parts(partial, plan.parts, count * channels, key_grad, value_grad)
                if scores is not None:
                    sum_parts(scores, plan.parts, count, score_grad)
            if sums is not None:
                # In the order of the last gradients: of out_bias, norm_weight, norm_bias.
                for target, need, total in zip(vectors, needs[4:], sums.sum(0).roll(1, 0), strict=True):
                    if need:
                        target.copy_(total)
    return gradients


def wanted(needs: Sequence[bool]) -> tuple[bool, bool]:
    """Whether gradients of tokens and vectors, and of keys and values, are asked for; each come together."""
    return needs[0] or any(needs[4:]), any(needs[1:4])


def passes(call: Any) -> int:
    """How often backward with every gradient walks over the tokens."""
    return len(_launches(call, True, True))


def launch_count(call: Any, direction: str) -> int:
    """Launches for ``call``; ``backward`` with every gradient."""
    if direction == "forward":
        return 1
    count = 0
    for kernel, _, with_keys in _launches(call, True, True):
        shared = with_keys and _plan(kernel, call).parts > 1
        count += 1 + shared * (1 + (call.score_bias is not None))
    return count
