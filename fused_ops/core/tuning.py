"""Tile choices of kernels: from ``configs/<gpu>.json`` where one was measured, else a heuristic.

``fused-ops tune`` measures and writes such a file. Nothing is ever tuned by a call of an operator.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from fused_ops.core import environment

SHIPPED = Path(__file__).resolve().parents[1] / "configs"
Tile = tuple[int, ...]
# A measurement speaks for maps whose every size is within this factor of its own.
NEAR = 2.0

_forced: dict[str, Tile] = {}
_used: dict[str, tuple[tuple[int, ...], Tile]] | None = None


def nearest(sizes: tuple[int, ...], measured: Sequence[tuple[Any, ...]]) -> tuple[Any, ...] | None:
    """The row whose sizes (its first entry) are nearest, by the largest factor between any two.

    None if all are farther than :data:`NEAR`; the first of equals.
    """
    best, best_factor = None, NEAR
    for row in measured:
        factor = 1.0
        for mine, theirs in zip(sizes, row[0], strict=True):
            factor = max(factor, mine / theirs, theirs / mine)
        if factor < best_factor or (factor == best_factor and best is None):
            best, best_factor = row, factor
    return best


def folders() -> list[Path]:
    """Where files with choices are looked for, first match wins."""
    own = environment.get("FUSED_OPS_CONFIGS")
    return ([Path(own)] if own else []) + [SHIPPED]


def read(path: Path) -> dict[str, list[tuple[tuple[int, ...], Tile]]]:
    """Kernel -> (sizes, tile) of a file that :func:`text_of` wrote.

    Raises:
        ValueError: the file has another form; the message names it.
    """
    try:
        kernels = json.loads(path.read_text())["kernels"]
        found = {}
        for kernel, rows in kernels.items():
            found[kernel] = [(tuple(map(int, row["sizes"])), tuple(map(int, row["tile"]))) for row in rows]
        return found
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is not a file of tile choices ({type(error).__name__}: {error})") from error


def text_of(gpu: str, kernels: dict[str, list[dict[str, Any]]], **about: Any) -> str:
    """Content of a file of choices.

    Args:
        gpu: its name as the driver gives it.
        kernels: rows with ``sizes``, ``tile`` and what was measured, by kernel.
        about: what else a reader should know, such as versions and the commit.
    """
    return json.dumps({"gpu": gpu, **about, "kernels": kernels}, indent=1, sort_keys=True) + "\n"


@cache
def _choices(device: int | None) -> dict[str, list[tuple[tuple[int, ...], Tile]]]:
    gpu = torch.cuda.get_device_name(device)
    for folder in folders():
        path = folder / f"{environment.gpu_slug(gpu)}.json"
        if path.is_file():
            try:
                return read(path)
            except ValueError as error:
                warnings.warn(f"{error}; tiles are chosen by a heuristic", RuntimeWarning, stacklevel=2)
                return {}
    warnings.warn(
        f"no measured tiles for {gpu}; they are chosen by a heuristic. `fused-ops tune` measures them.",
        RuntimeWarning,
        stacklevel=2,
    )
    return {}


@cache
def _measured(kernel: str, sizes: tuple[int, ...], device: int | None) -> Tile | None:
    found = nearest(sizes, _choices(device).get(kernel, ()))
    return None if found is None else found[1]


def tile_of(kernel: str, sizes: tuple[int, ...], heuristic: Callable[[], Tile], x: torch.Tensor) -> Tile:
    """Tile for one launch of ``kernel``.

    Args:
        kernel: name under which it is tuned, with what else decides (direction, element type).
        sizes: (C, H, W) of the map.
        heuristic: makes the tile where nothing was measured.
        x: a tensor of the call; its device decides.
    """
    if kernel in _forced:
        return _forced[kernel]
    tile = _measured(kernel, sizes, x.device.index) if x.is_cuda else None
    if tile is None:
        tile = heuristic()
    if _used is not None:
        _used[kernel] = (sizes, tuple(heuristic()))
    return tile


@contextlib.contextmanager
def force(kernel: str, tile: Tile) -> Iterator[None]:
    """Give ``kernel`` this tile inside the ``with`` block: for tests, and for measuring candidates."""
    previous = _forced.get(kernel)
    _forced[kernel] = tile
    try:
        yield
    finally:
        if previous is None:
            del _forced[kernel]
        else:
            _forced[kernel] = previous


@contextlib.contextmanager
def record() -> Iterator[dict[str, tuple[tuple[int, ...], Tile]]]:
    """Collect the kernels that ask for a tile inside the ``with`` block: sizes, and the heuristic's tile."""
    global _used
    previous, _used = _used, {}
    try:
        yield _used
    finally:
        _used = previous
