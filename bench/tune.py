"""``fused-ops tune``: measure the tile choices of every kernel on this GPU and write ``configs/<gpu>.json``.

    fused-ops tune                                   # every kernel, on the shapes of real models
    fused-ops tune --op depthwise --case dsnet_local_32x56 --seconds 120

Every candidate of a kernel is timed inside the operator's own call, side by side with the others and with the
heuristic's choice, which stays unless another is faster by more than the noise. A candidate that does not
compile or whose result is wrong is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fused_ops.bench import results, timing
from fused_ops.bench.correctness import copy_arguments, cotangents, data_bytes, outcome, three_way
from fused_ops.bench.ops import DTYPES, check_choices, make_arguments, make_call, release, selected_cases
from fused_ops.core import environment, library, tuning
from fused_ops.core.backends import Backend, BackendUnavailableError, backend
from fused_ops.core.files import write_atomically

MODES = ("eval", "both")
# A candidate must be this much faster than the heuristic's tile, beyond the noise, to take its place.
MARGIN = 0.01


def candidates(entry: Backend, kernel: str, sizes: tuple[int, ...], own: tuple[int, ...]) -> list[tuple]:
    """The heuristic's own tile first, then every other one that may be tried."""
    others = entry.tiles(kernel, sizes) if entry.tiles is not None else ()
    return [own, *(tile for tile in others if tuple(tile) != own)]


def _context(name: str, mode: str, kernel: str, tile: tuple[int, ...]) -> Callable[[], Any]:
    @contextlib.contextmanager
    def enter() -> Iterator[None]:
        with backend(name), torch.set_grad_enabled(mode != "eval"), tuning.force(kernel, tile):
            yield

    return enter


def tune_kernel(
    operator: library.Operator,
    entry: Backend,
    mode: str,
    arguments: dict[str, Any],
    expected: tuple[dict[str, Tensor], dict[str, Tensor]],
    kernel: str,
    sizes: tuple[int, ...],
    own: tuple[int, ...],
    device: timing.Device,
    plan: timing.Plan,
    deadline: timing.Deadline,
) -> dict[str, Any] | None:
    """Time every candidate of one kernel; the row for the file, or None if nothing could be compared.

    Args:
        expected: results of eager at the same precision, and in float64.
        own: the heuristic's tile.
    """
    eager, exact = expected
    grads = cotangents(eager)
    moved = data_bytes(arguments) + sum(grad.nbytes for grad in grads)
    turn = timing.rotation(moved, device.l2_bytes, plan)
    ready = []
    for tile in candidates(entry, kernel, sizes, own):
        active = _context(entry.name, mode, kernel, tile)
        try:
            with device.active(), active():
                got = outcome(operator.function, copy_arguments(arguments), gradients=mode != "eval")
                if three_way(got, eager, exact, next(iter(eager.values())).dtype):
                    continue
                calls = [
                    make_call(mode, operator.function, copy_arguments(arguments), grads)
                    for _ in range(turn.sets)
                ]
            contestant = timing.Contestant(str(tile), calls, active)
            if not timing.prepare(device, [contestant], turn, plan, graph=not device.is_cpu):
                ready.append((tile, contestant))
        except BackendUnavailableError:
            raise
        # A tile may need more registers or shared memory than there are, which compilers say in any way.
        except Exception as error:
            print(f"{kernel} {tile}: {type(error).__name__}: {str(error).splitlines()[0]}", file=sys.stderr)
    if len(ready) < 2 or ready[0][0] != own:
        return None
    contestants = timing.with_again([contestant for _, contestant in ready])
    timing.prepare(device, contestants[-1:], turn, plan, graph=not device.is_cpu)
    timings = timing.interleave(device, contestants, turn, plan, deadline)
    floor = timing.noise_floor(timings) or 0.0
    medians = {tile: timings[str(tile)].p50 for tile, _ in ready}
    best = min(medians, key=medians.__getitem__)
    if medians[best] > medians[own] * (1 - MARGIN - floor):
        best = own
    return {
        "sizes": list(sizes),
        "tile": list(best),
        "microseconds": round(medians[best] * 1e6, 2),
        "heuristic_tile": list(own),
        "heuristic_microseconds": round(medians[own] * 1e6, 2),
        "noise_floor": round(floor, 4),
    }


def asked_for(
    operator: library.Operator, name: str, mode: str, arguments: dict[str, Any]
) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Kernels that one call tunes: sizes and the tile that they get now, by kernel."""
    with backend(name), torch.set_grad_enabled(mode != "eval"), tuning.record() as used:
        outcome(operator.function, copy_arguments(arguments), gradients=mode != "eval")
    return dict(used)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fused-ops tune", description=__doc__.splitlines()[0])
    parser.add_argument("--op", nargs="+", help="operators (default: all that have tiles to choose)")
    parser.add_argument("--case", nargs="+", help="cases (default: those of real models)")
    parser.add_argument("--backend", nargs="+", default=["triton", "cuda"], help="triton, cuda or both")
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"], help=f"of {', '.join(DTYPES)}")
    parser.add_argument("--seconds", type=float, help="stop after this time; what was measured is written")
    parser.add_argument("--out", type=Path, help="folder to write to (default: that of the shipped choices)")
    parser.add_argument("--json", action="store_true", help="print one JSON list with a row per choice")
    options = parser.parse_args(arguments)
    known = library.operators()
    check_choices(parser, "op", options.op, known)
    check_choices(parser, "backend", options.backend, ("triton", "cuda"))
    check_choices(parser, "dtype", options.dtype, DTYPES)
    if options.seconds is not None and not options.seconds > 0:
        parser.error(f"--seconds={options.seconds} is not allowed; it must be more than 0")
    try:
        cases = selected_cases([known[name] for name in options.op or known], options.case)
    except ValueError as error:
        parser.error(str(error))
    device = timing.default_device()
    if device.is_cpu:
        print("fused-ops tune: needs a GPU, and there is none", file=sys.stderr)
        return 2
    rows = run(cases, options.backend, options.dtype, device, timing.Deadline(options.seconds, device.now))
    path = (options.out or tuning.SHIPPED) / f"{environment.gpu_slug(device.name)}.json"
    about = results.machine_columns(device.name)
    about.pop("gpu")
    text = tuning.text_of(device.name, rows, **about)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write(text.encode()))
    if options.json:
        print(json.dumps([{"kernel": kernel, **row} for kernel, each in rows.items() for row in each]))
    else:
        print(f"{path}: {sum(map(len, rows.values()))} choices for {len(rows)} kernels")
    return 0


def run(
    cases: Sequence[tuple[library.Operator, Any]],
    names: Sequence[str],
    dtypes: Sequence[str],
    device: timing.Device,
    deadline: timing.Deadline,
    plan: timing.Plan | None = None,
    batch: int | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """Tune every kernel that the cases call; rows by kernel, one per sizes.

    Args:
        cases: operators with their cases.
        names: backends.
        dtypes: names of element types.
        plan: how long to measure.
        batch: images of each case, or None for the case's own.
    """
    plan = plan or timing.Plan(warmup_seconds=0.02, rounds=7)
    found: dict[str, dict[tuple[int, ...], dict[str, Any]]] = {}
    choices = [
        (operator, case, dtype, mode, entry)
        for operator, case in cases
        for dtype in dtypes
        for mode in MODES
        for entry in operator.backends
        if entry.name in names and entry.tiles is not None and (mode == "eval" or entry.backward is not None)
    ]
    for operator, case, dtype, mode, entry in choices:
        if deadline.fits(f"{operator.name} {case.name} {dtype} {mode} {entry.name}"):
            made = make_arguments(case, getattr(torch, dtype), device, batch)
            _tune_case(operator, entry, case, made, mode, device, plan, deadline, found)
        release()
    return {kernel: list(rows.values()) for kernel, rows in sorted(found.items())}


def _tune_case(
    operator: library.Operator,
    entry: Backend,
    case: Any,
    made: dict[str, Any],
    mode: str,
    device: timing.Device,
    plan: timing.Plan,
    deadline: timing.Deadline,
    found: dict[str, dict[tuple[int, ...], dict[str, Any]]],
) -> None:
    with device.active():
        arguments = copy_arguments(made, evaluation=mode == "eval")
        try:
            kernels = asked_for(operator, entry.name, mode, arguments)
        except BackendUnavailableError:
            return
        with backend("reference"):
            gradients = mode != "eval"
            exact = outcome(operator.function, copy_arguments(arguments, dtype=torch.float64), gradients)
            eager = outcome(operator.function, copy_arguments(arguments), gradients)
    for kernel, (sizes, own) in kernels.items():
        if sizes in found.get(kernel, {}) or deadline.left() <= 0:
            continue
        row = tune_kernel(
            operator, entry, mode, arguments, (eager, exact), kernel, sizes, own, device, plan, deadline
        )
        if row is not None:
            found.setdefault(kernel, {})[sizes] = {**row, "case": case.name}
            gain = f"{row['microseconds']} us, heuristic {own} {row['heuristic_microseconds']} us"
            # Progress, beside what --json prints.
            print(f"{kernel} {sizes}: {row['tile']} {gain}", file=sys.stderr)


if __name__ == "__main__":
    raise SystemExit(main())
