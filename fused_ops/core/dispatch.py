"""What was measured to be fastest: the table that ``auto`` consults, ``fused_ops/configs/dispatch.json``.

The table is written by ``python -m fused_ops.bench.dispatch`` from committed measurements. An entry holds for
calls of the same kind (everything but sizes: kernel, stride, norm, dtype, layout, ...) on the same GPU whose
sizes are near.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from fused_ops.core import environment
from fused_ops.core.tuning import nearest

PATH = Path(__file__).resolve().parents[1] / "configs" / "dispatch.json"


class Measured(Protocol):
    """What a checked call says of itself."""

    def kind(self) -> dict[str, Any]:
        """Everything but sizes that decides how fast a backend is, in JSON types (no lists)."""

    def sizes(self) -> tuple[int, ...]:
        """Sizes of one image: channels, height, width. Without the batch, so that it may vary in a graph."""


class Entry(NamedTuple):
    """One measured call.

    Attributes:
        sizes: see :meth:`Measured.sizes`.
        backend: the fastest one; ``reference`` where stock PyTorch is faster than every kernel.
        ratio: time of the best stock alternative over that of the fastest kernel.
        case: what was measured.
    """

    sizes: tuple[int, ...]
    backend: str
    ratio: float
    case: str


def key_of(kind: dict[str, Any]) -> str:
    """The kind as one string."""
    return ", ".join(f"{name} {value}" for name, value in sorted(kind.items()))


@cache
def _table() -> dict[str, dict[str, list[dict[str, Any]]]]:
    try:
        return json.loads(PATH.read_text())
    except FileNotFoundError:
        return {}


@cache
def _entries(gpu: str, operator: str) -> dict[str, tuple[Entry, ...]]:
    found: dict[str, tuple[Entry, ...]] = {}
    for row in _table().get(gpu, {}).get(operator, ()):
        entry = Entry(tuple(row["sizes"]), row["backend"], row["ratio"], row["case"])
        key = key_of(row["kind"])
        found[key] = (*found.get(key, ()), entry)
    return found


@cache
def _gpu_name(device: int | None) -> str:
    return torch.cuda.get_device_name(device)


@environment.constant_in_graphs
def is_measured(operator: str, device: int | None) -> bool:
    """Whether the table has anything about ``operator`` on the GPU with this index."""
    return bool(_entries(_gpu_name(device), operator))


@environment.constant_in_graphs
def entries(operator: str, key: str, device: int | None) -> tuple[tuple[Any, ...], ...]:
    """Entries for calls of the kind ``key`` on the GPU with this index, as plain tuples."""
    return tuple(map(tuple, _entries(_gpu_name(device), operator).get(key, ())))


def preferred(operator: str, call: Any) -> Entry | None:
    """The measurement that speaks for ``call``, whose ``x`` is on a GPU; None where nothing does."""
    device = call.x.device.index
    if not is_measured(operator, device):
        return None
    found = nearest(call.sizes(), entries(operator, key_of(call.kind()), device))
    return None if found is None else Entry(*found)
