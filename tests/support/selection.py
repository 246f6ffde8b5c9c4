"""Which cases of a parametrised test run at every commit."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def only(now: Iterable[str], names: Iterable[str]) -> list[Any]:
    """All of ``names`` for ``parametrize``, of which those not in ``now`` are extended tests."""
    now = set(now)
    return [name if name in now else pytest.param(name, marks=pytest.mark.extended) for name in names]
