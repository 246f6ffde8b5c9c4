"""Memory traffic of kernels, counted without a GPU.

Triton kernels run in Triton's interpreter and CUDA kernels in the emulator; both say which addresses they
touch. Three figures per launch: ``counted_bytes``, the distinct bytes touched (reads and writes apart), which
is what memory sees behind a perfect cache; ``block_bytes``, the distinct bytes of each program or thread
block, summed, which is what the L2 cache delivers; ``requested_bytes``, everything asked for, which the L1
cache serves.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from fused_ops.bench.correctness import gradients_of, leaves, outputs
from fused_ops.core import backends, environment, library, native

FIGURES = ("counted_bytes", "block_bytes", "requested_bytes")


@dataclass
class Launch:
    """Traffic of one kernel launch, in bytes."""

    kernel: str
    counted_bytes: int = 0
    block_bytes: int = 0
    requested_bytes: int = 0
    _blocks: dict[tuple[str, int, Any], list[np.ndarray]] = field(default_factory=dict, repr=False)

    def touch(self, kind: str, size: int, block: Any, addresses: np.ndarray) -> None:
        self.requested_bytes += size * addresses.size
        self._blocks.setdefault((kind, size, block), []).append(addresses)

    def finish(self) -> None:
        """Turn the recorded addresses into counts, and forget them."""
        whole: dict[tuple[str, int], list[np.ndarray]] = {}
        for (kind, size, _), addresses in self._blocks.items():
            distinct = np.unique(np.concatenate(addresses))
            self.block_bytes += size * distinct.size
            whole.setdefault((kind, size), []).append(distinct)
        for (_, size), addresses in whole.items():
            self.counted_bytes += size * np.unique(np.concatenate(addresses)).size
        self._blocks.clear()


@contextlib.contextmanager
def count_triton() -> Iterator[list[Launch]]:
    """Record the traffic of every Triton kernel launched inside the ``with`` block, in the interpreter.

    Raises:
        RuntimeError: Triton is not interpreting (``TRITON_INTERPRET=1`` was not set before the import).
    """
    if not environment.interpreting():
        raise RuntimeError("counting Triton's traffic needs TRITON_INTERPRET=1, set before the first import")
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    executor = interpreter.GridExecutor
    originals = builder.create_masked_load, builder.create_masked_store, executor.__call__
    launches: list[Launch] = []

    def record(self: Any, kind: str, pointers: Any, mask: Any) -> None:
        if launches:
            size = pointers.get_element_ty().primitive_bitwidth // 8
            launches[-1].touch(kind, size, self.grid_idx, pointers.data[mask.data.astype(bool)].ravel())

    def load(self: Any, pointers: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        record(self, "read", pointers, mask)
        return originals[0](self, pointers, mask, *rest, **options)

    def store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        record(self, "write", pointers, mask)
        return originals[1](self, pointers, value, mask, *rest, **options)

    def call(self: Any, *arguments: Any, **options: Any) -> Any:
        launches.append(Launch(self.fn.__name__))
        result = originals[2](self, *arguments, **options)
        launches[-1].finish()
        return result

    builder.create_masked_load, builder.create_masked_store, executor.__call__ = load, store, call
    try:
        yield launches
    finally:
        builder.create_masked_load, builder.create_masked_store, executor.__call__ = originals


@contextlib.contextmanager
def count_cuda() -> Iterator[list[Launch]]:
    """Record the traffic of every CUDA kernel launched inside the ``with`` block, in the emulator.

    Raises:
        RuntimeError: no emulator stands in the CUDA library's place.
    """
    emulator = native.emulator()
    if emulator is None:
        raise RuntimeError("counting the CUDA kernels' traffic needs the emulator: native.set_emulator")
    emulator.reset_traffic()
    launches: list[Launch] = []
    yield launches
    launches.extend(Launch(*launch) for launch in emulator.launches())


def operator_traffic(
    operator: library.Operator, backend: str, name: str, make: Callable[[], dict[str, Any]]
) -> list[dict[str, Any]]:
    """Traffic of one forward and backward of ``operator`` on ``backend``: a row per launch and a total each.

    Args:
        operator: from :func:`fused_ops.core.library.operators`.
        backend: ``triton``, or ``cuda`` with the emulator in the library's place.
        name: of the case, for the rows.
        make: arguments of the operator's public function; small enough for the interpreter.

    Returns:
        Rows with op, backend, kernel (``total`` in the last row of a direction), case, direction,
        counted_bytes, block_bytes, requested_bytes, and least_bytes in the total.

    Raises:
        BackendUnavailableError: the backend cannot run the case.
    """
    arguments = make()
    calls: list[Any] = []
    count = count_triton if backend == "triton" else count_cuda
    has_backward = next(entry for entry in operator.backends if entry.name == backend).backward is not None
    with (
        torch.set_grad_enabled(has_backward),
        backends.backend(backend),
        calls_of(operator, calls),
        count() as forward,
    ):
        out = operator.function(**arguments)
    rows = _rows(operator, backend, name, "forward", forward, calls[0])
    wanted = list(leaves(arguments).values())
    if wanted and any(value.requires_grad for value in outputs(out)):
        grads = [torch.randn_like(value) for value in outputs(out)]
        with count() as backward:
            gradients_of(out, wanted, grads)
        rows += _rows(operator, backend, name, "backward", backward, calls[0])
    return rows


@contextlib.contextmanager
def calls_of(operator: library.Operator, calls: list[Any]) -> Iterator[None]:
    """Collect the checked calls that reach the choice of a backend."""
    module = sys.modules[operator.function.__module__]
    original = module.choose

    def choose(name: str, candidates: Any, call: Any) -> Any:
        calls.append(call)
        return original(name, candidates, call)

    module.choose = choose
    try:
        yield
    finally:
        module.choose = original


def _rows(
    operator: library.Operator, backend: str, name: str, direction: str, launches: list[Launch], call: Any
) -> list[dict[str, Any]]:
    common = {"op": operator.name, "backend": backend, "case": name, "direction": direction}
    keys = ("counted_bytes", "block_bytes", "requested_bytes")
    rows = [
        {
            **common,
            "kernel": launch.kernel,
            **{key: getattr(launch, key) for key in keys},
            "least_bytes": None,
        }
        for launch in launches
    ]
    total = {key: sum(row[key] for row in rows) for key in keys}
    least = operator.least_bytes(call, direction)
    return [*rows, {**common, "kernel": "total", **total, "least_bytes": least}]


def all_traffic(backend: str | None = None) -> list[dict[str, Any]]:
    """Traffic of every operator's cases tagged ``traffic``, in bfloat16, on the backends that run them."""
    rows = []
    for operator in library.operators().values():
        for case in operator.cases():
            if "traffic" not in case.tags:
                continue
            for candidate in operator.backends:
                if candidate.forward is None or backend not in (None, candidate.name):
                    continue
                generator = torch.Generator().manual_seed(0)
                with contextlib.suppress(backends.BackendUnavailableError):
                    rows += operator_traffic(
                        operator,
                        candidate.name,
                        case.name,
                        lambda case=case, generator=generator: case.make(
                            generator, torch.bfloat16, torch.device("cpu"), case.layout
                        ),
                    )
    return rows


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as aligned text, with the ratio of counted to least bytes where that is defined."""
    header = ["op", "backend", "case", "direction", "kernel", *FIGURES, "least_bytes", "counted/least"]
    lines = [header]
    for row in rows:
        least = row["least_bytes"]
        ratio = "" if least is None else f"{row['counted_bytes'] / least:.3f}"
        lines.append([*(str(row[key]) for key in header[:-2]), "" if least is None else str(least), ratio])
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column >= 5 else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fused-ops bench traffic", description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=("cuda", "triton"), help="only the kernels of one backend")
    parser.add_argument("--json", action="store_true", help="print one JSON list")
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = parser.parse_args(arguments)
    if not environment.interpreting():
        # Triton decides when kernels are defined, which has happened in this process.
        command = [sys.executable, "-m", "fused_ops.bench.traffic", *arguments]
        return subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}).returncode
    if options.backend != "triton":
        try:
            native.set_emulator(native.build_emulator())
        except RuntimeError as error:
            print(f"fused-ops bench traffic: the CUDA kernels are left out: {error}", file=sys.stderr)
            if options.backend == "cuda":
                return 2
            options.backend = "triton"
    rows = all_traffic(options.backend)
    print(json.dumps(rows, indent=2) if options.json else format_table(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
