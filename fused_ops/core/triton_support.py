"""Triton where it can be imported, and a stand-in that lets kernel files be imported where it cannot.

Kernel files take ``jit`` and ``tl`` from here and start with ``from __future__ import annotations``.
"""

from __future__ import annotations

from typing import Any

try:
    import triton
    import triton.language as tl

    jit = triton.jit
    available = True
except ImportError:
    tl: Any = None
    available = False

    def jit(function: Any) -> Any:
        return function


def next_power_of_2(value: int) -> int:
    """Smallest power of two that is not below ``value`` (1 for values below 1)."""
    return 1 << max(value - 1, 0).bit_length()


def ceil_div(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)
