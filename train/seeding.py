"""Randomness as a function of the seed and of where the run stands.

Nothing random has a state that outlives one sample or one forward pass: each begins by seeding from
(seed, epoch, position). A run can therefore stop and continue anywhere, with any number of loader processes
and ranks, and draw the same numbers; checkpoints need no generator states.
"""

from __future__ import annotations

import random
from enum import IntEnum

import numpy as np
import torch


class Purpose(IntEnum):
    """Keeps streams apart that have the same position."""

    INIT = 0
    ORDER = 1
    SAMPLE = 2
    PASS = 3


def derive(seed: int, purpose: Purpose, *position: int) -> int:
    """A 63-bit seed for one purpose at one position."""
    words = np.random.SeedSequence((seed, purpose, *position)).generate_state(1, np.uint64)
    return int(words[0]) >> 1


def seed_all(seed: int) -> None:
    """Seed Python, NumPy and PyTorch on every device."""
    seed_cpu(seed)
    torch.manual_seed(seed)


def seed_cpu(seed: int) -> None:
    """Seed Python, NumPy and PyTorch's CPU generator: all that a loader process uses."""
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed)
