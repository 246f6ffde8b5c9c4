"""Dropout by counters: the same draws on every backend, in both directions, from nothing but a seed."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_ops.core.checks import check_device

# Philox4x32-10: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.
_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


def _multiply(factor: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of the product of two 32-bit numbers, in int64."""
    low, high = factor * (word & 0xFFFF), factor * (word >> 16)
    return ((high + (low >> 16)) >> 16) & _WORD, (factor * word) & _WORD


def philox(
    seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four random 32-bit numbers, in int64, for each counter (c0, c1, c2, c3) under a 64-bit key."""
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(_ROUNDS):
        high_a, low_a = _multiply(_MULTIPLIERS[0], c0)
        high_b, low_b = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def dropout_threshold(dropout: float) -> int:
    """A probability is kept where 31 random bits are at least this."""
    return round(dropout * 2**31)


def dropout_keep(seed: Tensor, batch: int, heads: int, queries: int, keys: int, dropout: float) -> Tensor:
    """Which probabilities dropout keeps, bool (batch, heads, queries, keys).

    The numbers of query q, keys 4 j to 4 j + 3 of head h of image b come from the counter
    (q, j, b * heads + h, seed[1]) under the key seed[0].
    """
    groups = -(-keys // 4)
    c0 = torch.arange(queries, device=seed.device)[None, :, None]
    c1 = torch.arange(groups, device=seed.device)[None, None, :]
    c2 = torch.arange(batch * heads, device=seed.device)[:, None, None]
    words = philox(seed[0], c0, c1, c2, seed[1] & _WORD)
    bits = torch.stack(torch.broadcast_tensors(*words), -1).flatten(-2)[..., :keys] >> 1
    return (bits >= dropout_threshold(dropout)).view(batch, heads, queries, keys)


def check_dropout(dropout: float, seed: Tensor | None, x: Tensor, x_name: str) -> None:
    """Raise ValueError unless ``dropout`` is a probability below 1, and a given seed suits ``x``."""
    if seed is not None and (tuple(seed.shape) != (2,) or seed.dtype != torch.int64):
        raise ValueError(f"seed is {seed.dtype} {tuple(seed.shape)}; it must be int64 (2,): key and offset")
    check_device("seed", seed, x, x_name)
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout={dropout} is not allowed; it must be at least 0 and below 1")


def draw_seed(like: Tensor) -> Tensor:
    """Seed of dropout, (2) int64 on the device of ``like``, from PyTorch's default generator there.

    A tensor and not two numbers: a captured CUDA graph then draws a new one at each replay.
    """
    return torch.randint(-(2**63), 2**63 - 1, (2,), dtype=torch.int64, device=like.device)
