"""Compares measurements with the last committed ones of the same GPU; says which became slower.

    fused-ops bench gate NEW.csv [--against DIR] [--json]

A row fails if its median is more than 3 % above the committed one and the two 20/80 bands do not meet, or if
it reaches over 2 points less of the limit than before, or has no figure any more. Exit status: 0 nothing
failed, 1 something failed, 2 bad input.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fused_ops.bench import results
from fused_ops.bench.results import Row

SLOWER = 0.03
POINTS = 0.02
# The rows that a commit of this package can make slower; the others measure somebody else's code.
OURS = ("triton", "cuda", "auto")


@dataclass(frozen=True)
class Comparison:
    """One row against the committed one.

    Attributes:
        gpu, op, model, case, mode, provider, dtype, l2, graph: what was measured, as in the results.
        old_us, new_us: medians in microseconds; None where there is none.
        change: new over old median, minus 1.
        old_fraction, new_fraction: of the limit.
        status: ``same``, ``faster``, ``slower``, ``below the limit``, ``missing`` (committed, not in the new
            results), ``not measured`` (in them without a figure), ``new``.
        fails: whether it trips the gate.
        reason: one sentence for everything but ``same``.
        old_commit: of the committed row.
    """

    gpu: str
    op: str
    model: str
    case: str
    mode: str
    provider: str
    dtype: str
    l2: str
    graph: bool
    old_us: float | None
    new_us: float | None
    change: float | None
    old_fraction: float | None
    new_fraction: float | None
    status: str
    fails: bool
    reason: str
    old_commit: str


def _comparison(row: Row, old: Row | None, new: Row | None, status: str, reason: str) -> Comparison:
    measured = old is not None and new is not None and old.measured and new.measured
    return Comparison(
        row.gpu,
        row.op,
        row.model,
        row.case,
        row.mode,
        row.provider,
        row.dtype,
        row.l2,
        row.graph,
        old.p50_us if old else None,
        new.p50_us if new else None,
        new.p50_us / old.p50_us - 1 if measured else None,
        old.fraction_of_limit if old else None,
        new.fraction_of_limit if new else None,
        status,
        status in ("slower", "below the limit", "not measured") and row.provider in OURS,
        reason,
        old.commit if old else "",
    )


def compare_rows(old: Row, new: Row) -> Comparison:
    """``new`` against ``old``, a measured row of the same key."""
    if not new.measured:
        reason = f"measured before, now not: {new.note or 'no reason is given'}"
        return _comparison(new, old, new, "not measured", reason)
    change = new.p50_us / old.p50_us - 1
    old_20, old_80 = old.p20_us or old.p50_us, old.p80_us or old.p50_us
    new_20, new_80 = new.p20_us or new.p50_us, new.p80_us or new.p50_us
    if change > SLOWER and new_20 > old_80:
        reason = (
            f"{change:+.1%}, and its 20 % quantile {new_20:.1f} us is above the old 80 %, {old_80:.1f} us"
        )
        return _comparison(new, old, new, "slower", reason)
    if old.fraction_of_limit is not None and new.fraction_of_limit is not None:
        lost = old.fraction_of_limit - new.fraction_of_limit
        if lost > POINTS:
            return _comparison(new, old, new, "below the limit", f"{100 * lost:.1f} points of the limit lost")
    if change < -SLOWER and new_80 < old_20:
        return _comparison(new, old, new, "faster", f"{change:+.1%}")
    return _comparison(new, old, new, "same", "")


def compare(new: Sequence[Row], committed: Sequence[Row]) -> list[Comparison]:
    """Every row of ``new`` against the last committed measurement of the same key; failures first.

    Committed rows that ``new`` lacks are named too, for the GPUs, kinds (ops or models) and what of them (the
    operators or models) that ``new`` has: a run of one operator is not blamed for the others.
    """
    newest = {row.key: row for row in results.latest(new)}
    # The new file may be one of the committed ones, grown: a row is not compared with itself. And a later run
    # that could not measure does not hide the last figure that there is.
    earlier = (row for row in committed if row.measured and row != newest.get(row.key))
    old = {row.key: row for row in results.latest(earlier)}
    found = []
    for key, row in newest.items():
        if key in old:
            found.append(compare_rows(old[key], row))
        elif row.measured:
            found.append(_comparison(row, None, row, "new", "nothing committed to compare with"))
    covered = {_subject(row) for row in newest.values()}
    for key, row in old.items():
        if key not in newest and _subject(row) in covered:
            reason = f"committed at {row.commit or 'an unknown commit'}, not in the new results"
            found.append(_comparison(row, row, None, "missing", reason))
    order = ("slower", "below the limit", "not measured", "missing", "new", "faster", "same")
    return sorted(found, key=lambda row: (not row.fails, order.index(row.status), -(row.change or 0)))


def _subject(row: Row) -> tuple[str, str]:
    return row.gpu, row.op or row.model


def print_comparisons(rows: Sequence[Comparison]) -> None:
    columns = ("result", "what", "mode", "provider", "old us", "new us", "change", "limit", "why")
    lines = []
    for row in rows:
        fractions = [results.figure(100 * value if value is not None else None, ".0f") for value in
                     (row.old_fraction, row.new_fraction)]  # fmt: skip
        lines.append(
            (
                "FAIL " + row.status if row.fails else row.status,
                f"{row.op or row.model} {row.case}",
                row.mode,
                row.provider,
                results.figure(row.old_us, ".1f"),
                results.figure(row.new_us, ".1f"),
                "-" if row.change is None else f"{row.change:+.1%}",
                " -> ".join(fractions) + " %",
                row.reason,
            )
        )
    results.print_table(columns, lines, left=4)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="fused-ops bench gate",
        description="Compare measurements with the committed ones of the same GPU.",
    )
    parser.add_argument("new", type=Path, help="CSV file of new measurements")
    parser.add_argument("--against", type=Path, help="folder of results (default: those of the checkout)")
    parser.add_argument("--json", action="store_true", help="print one JSON list")
    options = parser.parse_args(arguments)
    try:
        if not options.new.is_file():
            raise ValueError(f"{options.new} is not a file; give the CSV of new measurements")
        if options.against is not None and not options.against.is_dir():
            raise ValueError(f"--against={options.against} is not a folder of results")
        new = results.read_rows(options.new)
        if not new:
            raise ValueError(f"{options.new} has no rows")
        found = compare(new, results.all_rows(options.against))
    except (ValueError, OSError) as error:
        print(f"fused-ops bench gate: {error}", file=sys.stderr)
        return 2
    failed = [row for row in found if row.fails]
    if options.json:
        print(json.dumps([asdict(row) for row in found], indent=1))
    else:
        if found:
            print_comparisons(found)
        missing = sum(row.status == "missing" for row in found)
        compared = sum(row.change is not None for row in found)
        print(f"{compared} compared, {len(failed)} failed, {missing} missing from {options.new}")
        if not compared:
            print("nothing is committed for this GPU, operator or model, so nothing could be compared")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
