"""The dispatch table of ``auto``, made from committed measurements: the fastest backend per GPU and case.

python -m fused_ops.bench.dispatch             # write fused_ops/configs/dispatch.json
python -m fused_ops.bench.dispatch --check     # say whether the committed table is what the results give
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fused_ops.bench import results
from fused_ops.bench.limits import kernels_chosen, without_batch_statistics
from fused_ops.bench.providers import ALL
from fused_ops.bench.results import Row
from fused_ops.core import dispatch, library

ALTERNATIVES = frozenset(provider.name for provider in ALL if provider.alternative)
KERNELS = ("triton", "cuda")
# What decides: an inference call, and a training call with its backward, since one backend does both.
MODES = ("eval", "both")
# Like is compared with like; the first of these in which a kernel and an alternative were both measured.
CONDITIONS_MEASURED = (("cold", True), ("cold", False), ("warm", True), ("warm", False))

Table = dict[str, dict[str, list[dict[str, Any]]]]


def correct(row: Row) -> bool:
    """Whether the row has a time, and its result was right."""
    return row.measured and not row.note.startswith("failed")


def conditions(operator: library.Operator, case: Any, mode: str, dtype: torch.dtype) -> dict[str, Any]:
    """Kind and sizes of the case's checked call, as a choice at run time compares them."""
    chosen: list[tuple[str, Any, str]] = []
    training = mode == "both"
    with FakeTensorMode(), kernels_chosen(chosen), torch.set_grad_enabled(training):
        arguments = case.make(torch.Generator(), dtype, torch.device("cpu"), case.layout)
        operator.function(**(arguments if training else without_batch_statistics(arguments)))
    call = chosen[0][1]
    return {"kind": call.kind(), "sizes": list(call.sizes())}


def best(rows: Sequence[Row]) -> tuple[str, float] | None:
    """The backend for one case and mode, and how many times faster it is than the best alternative.

    Args:
        rows: measurements of every provider, of one GPU, case, mode and dtype.

    Returns:
        ``reference`` where the fastest correct kernel is slower than the best stock alternative, with the
        kernel's ratio (below 1), or, where no kernel is correct, with 1. None with nothing to compare.
    """
    for l2, graph in CONDITIONS_MEASURED:
        alike = [row for row in rows if row.l2 == l2 and row.graph == graph]
        alternatives = [row.p50_us for row in alike if row.provider in ALTERNATIVES and correct(row)]
        kernels = [row for row in alike if row.provider in KERNELS and row.measured]
        if not alternatives or not kernels:
            continue
        right = [row for row in kernels if correct(row)]
        if not right:
            return "reference", 1.0
        fastest = min(right, key=lambda row: row.p50_us)
        ratio = min(alternatives) / fastest.p50_us
        return (fastest.provider if ratio >= 1 else "reference"), round(ratio, 3)
    return None


def dispatch_table(rows: Iterable[Row]) -> Table:
    """The table from measurements; CPU rows and cases that are no longer there are left out."""
    groups: dict[tuple[str, str, str, str, str], list[Row]] = {}
    for row in results.latest(rows):
        if row.op and row.gpu != "cpu" and row.mode in MODES:
            groups.setdefault((row.gpu, row.op, row.case, row.mode, row.dtype), []).append(row)
    operators = library.operators()
    table: Table = {}
    for (gpu, op, name, mode, dtype), alike in sorted(groups.items()):
        decided = best(alike)
        if decided is None or op not in operators:
            continue
        case = next((case for case in operators[op].cases() if case.name == name), None)
        if case is None:
            continue
        backend, ratio = decided
        entry = conditions(operators[op], case, mode, getattr(torch, dtype))
        entry |= {"backend": backend, "ratio": ratio, "case": name}
        table.setdefault(gpu, {}).setdefault(op, []).append(entry)
    return table


def to_text(table: Table) -> str:
    return json.dumps(table, indent=1, sort_keys=True) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fused_ops.bench.dispatch", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--results", type=Path, help="folder of results (default: those of the checkout)")
    parser.add_argument("--out", type=Path, help="file to write (default: the committed table)")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the table is outdated")
    parser.add_argument("--json", action="store_true", help="print the table")
    options = parser.parse_args(arguments)
    try:
        if options.results is not None and not options.results.is_dir():
            raise ValueError(f"--results={options.results} is not a folder of results")
        table = dispatch_table(results.all_rows(options.results))
        path = options.out or dispatch.PATH
        text = to_text(table)
        if options.check:
            same = path.is_file() and path.read_text() == text
            print(f"{path} {'agrees with' if same else 'is not what comes from'} the results")
            return 0 if same else 1
        if options.json:
            print(text, end="")
            return 0
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    except (ValueError, OSError) as error:
        print(f"fused-ops bench dispatch: {error}", file=sys.stderr)
        return 2
    entries = sum(len(cases) for ops in table.values() for cases in ops.values())
    print(f"{path}: {entries} entries for {len(table)} GPUs")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
