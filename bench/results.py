"""Rows of measurements: the CSV files under ``bench/results/<gpu>/``, and ``fused-ops bench results``.

A file is replaced as a whole after every case, so that a run cut off at any moment loses nothing that it had
finished. Rows of older commits stay: the history is what the regression gate compares with.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import io
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fused_ops.core import environment
from fused_ops.core.files import write_atomically


@dataclass(frozen=True)
class Row:
    """One provider's measurement of one case. Empty or None: does not apply, or was not measured.

    Attributes:
        gpu: the GPU's name as its driver gives it, or ``cpu``.
        op: operator family, for operator rows.
        model: the model measured; for operator rows, the model that the case's shape comes from.
        case: the operator's case, or batch and size of a model.
        mode: eval, forward, backward or both; train or infer for models.
        provider: see :mod:`fused_ops.bench.providers`.
        dtype: of the activations.
        p20_us, p50_us, p80_us: quantiles of the time of one call or step, in microseconds.
        ratio_to_best_alternative: median of the fastest alternative over this median: above 1 is faster than
            every alternative. Only for what this package provides, and never for a failed check.
        fraction_of_limit: least possible time over the median.
        peak_bytes: greatest device memory allocated during one call above what was allocated before. For a
            model step, the model's parameters, gradients and optimizer state count too.
        saved_bytes: what the forward pass keeps for the backward, parameters left out.
        commit: of this package, with ``-dirty`` if the sources differ from it.
        l2: ``cold`` or ``warm``.
        graph: whether the calls ran in a CUDA graph.
        note: ``failed: ...``, ``not measured: ...``, or what else a reader must know.
        copy_gb_s, gemm_tflops: this run's copy bandwidth (1e9 B/s) and bfloat16 matrix peak (1e12/s).
        noise_floor: relative difference of one provider measured twice, side by side, in this case.
        sm_clock_mhz, power_w: right after the timing.
        date: UTC, ISO 8601.
    """

    gpu: str
    op: str
    model: str
    case: str
    mode: str
    provider: str
    dtype: str
    p20_us: float | None = None
    p50_us: float | None = None
    p80_us: float | None = None
    ratio_to_best_alternative: float | None = None
    fraction_of_limit: float | None = None
    peak_bytes: int | None = None
    saved_bytes: int | None = None
    commit: str = ""
    driver: str = ""
    torch: str = ""
    cudnn: str = ""
    triton: str = ""
    cuda: str = ""
    l2: str = ""
    graph: bool = False
    note: str = ""
    copy_gb_s: float | None = None
    gemm_tflops: float | None = None
    noise_floor: float | None = None
    sm_clock_mhz: float | None = None
    power_w: float | None = None
    date: str = ""

    @property
    def key(self) -> tuple[str, ...]:
        """What is measured: rows of the same key are measurements of the same thing."""
        return (
            self.gpu,
            self.op,
            self.model,
            self.case,
            self.mode,
            self.provider,
            self.dtype,
            self.l2,
            str(self.graph),
        )

    @property
    def subject(self) -> tuple[str, ...]:
        """The key without the ways of timing: a check that fails speaks for all of them."""
        return self.key[:-2]

    @property
    def measured(self) -> bool:
        return self.p50_us is not None


COLUMNS = tuple(field.name for field in dataclasses.fields(Row))
_FLOATS = {
    "p20_us",
    "p50_us",
    "p80_us",
    "ratio_to_best_alternative",
    "fraction_of_limit",
    "copy_gb_s",
    "gemm_tflops",
    "noise_floor",
    "sm_clock_mhz",
    "power_w",
}
_INTEGERS = {"peak_bytes", "saved_bytes"}


def _to_text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value)


def _from_text(name: str, text: str) -> Any:
    if name in _FLOATS:
        return float(text) if text else None
    if name in _INTEGERS:
        return int(text) if text else None
    if name == "graph":
        return text == "True"
    return text


def read_rows(path: Path) -> list[Row]:
    """Rows of one CSV file; none if it is not there.

    Raises:
        ValueError: the file's columns are not those of :class:`Row`, or a figure cannot be read.
    """
    if not path.exists():
        return []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path} has the columns {reader.fieldnames}; they must be {list(COLUMNS)}")
        try:
            return [Row(**{name: _from_text(name, line[name]) for name in COLUMNS}) for line in reader]
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}, line {reader.line_num}: {error}") from error


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Replace the file at once: whoever reads it sees the old rows or the new ones, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows([_to_text(getattr(row, name)) for name in COLUMNS] for row in rows)
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))


def latest(rows: Iterable[Row]) -> list[Row]:
    """Of each key the row that was measured last (by date, then by place), in the order of first mention.

    A provider's older figures are left out once its check has failed, and an older reason for not measuring
    once another commit was measured.
    """
    newest: dict[tuple[str, ...], Row] = {}
    for row in rows:
        if row.key not in newest or row.date >= newest[row.key].date:
            newest[row.key] = row
    failed: dict[tuple[str, ...], str] = {}
    measured: dict[tuple[str, ...], Row] = {}
    for row in newest.values():
        if row.note.startswith("failed"):
            failed[row.subject] = max(row.date, failed.get(row.subject, ""))
        if row.measured and (row.subject not in measured or row.date >= measured[row.subject].date):
            measured[row.subject] = row

    def stands(row: Row) -> bool:
        if row.measured:
            return row.date >= failed.get(row.subject, "")
        later = measured.get(row.subject)
        return later is None or later.commit == row.commit or row.date >= later.date

    return [row for row in newest.values() if stands(row)]


class Store:
    """One CSV file of results that grows, or nothing but memory where ``path`` is None."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.rows = read_rows(path) if path is not None else []

    def add(self, rows: Sequence[Row]) -> None:
        """Add all rows of a case and write the file; rows of the same commit and subject are replaced."""
        new = {(row.commit, row.subject) for row in rows}
        self.rows = [row for row in self.rows if (row.commit, row.subject) not in new] + list(rows)
        if self.path is not None:
            write_rows(self.path, self.rows)

    def find(self, commit: str, **columns: str) -> list[Row]:
        """Rows of ``commit`` whose columns have the given values."""
        return [
            row
            for row in self.rows
            if row.commit == commit and all(getattr(row, name) == value for name, value in columns.items())
        ]


def results_root() -> Path:
    """Where committed results are: ``bench/results`` of the checkout."""
    return Path(__file__).resolve().parent / "results"


def results_path(gpu: str, kind: str, results: str | None) -> Path | None:
    """File for rows of ``kind`` (ops or models).

    None for a CPU unless a folder is named: its timings are no results to commit.
    """
    if results is None and gpu == "cpu":
        return None
    return (Path(results) if results else results_root()) / environment.gpu_slug(gpu) / f"{kind}.csv"


def all_rows(root: Path | None = None) -> list[Row]:
    """Every row under ``root`` (the committed results by default), by file."""
    root = root or results_root()
    return [row for path in sorted(root.glob("*/*.csv")) for row in read_rows(path)]


def commit_name() -> str:
    """This package's commit, with ``-dirty`` if sources differ from it; ``unknown`` outside a checkout."""
    commit = environment.git_commit()
    if commit is None:
        return "unknown"
    # A run writes results as it goes, which must not change the name of what it measures.
    command = ["git", "status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)bench/results"]
    changes = environment.command_output(command, cwd=Path(__file__).resolve().parents[1])
    return f"{commit}-dirty" if changes else commit


def machine_columns(gpu: str, commit: str | None = None) -> dict[str, str]:
    """The columns that every row of a run shares: versions and commit."""
    report = environment.environment_report()
    return {
        "gpu": gpu,
        "commit": commit or commit_name(),
        "driver": report["driver"] or "",
        "torch": report["packages"]["torch"] or "",
        "cudnn": str(report["cudnn"] or ""),
        "triton": report["packages"]["triton"] or "",
        "cuda": report["cuda"] or "",
    }


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def to_json(rows: Iterable[Row]) -> str:
    """One JSON list; figures as they are in the file, null where there are none."""
    return json.dumps([dataclasses.asdict(row) for row in rows], indent=1)


def print_table(columns: Sequence[str], lines: Sequence[Sequence[str]], left: int = 3) -> None:
    """Print a table with rich, or plain where it is not installed; the first ``left`` columns are text."""
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        widths = [max(map(len, column)) for column in zip(columns, *lines, strict=True)]
        for line in (columns, *lines):
            print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
        return
    table = Table(box=box.SIMPLE_HEAD)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < left else "right", no_wrap=True)
    for line in lines:
        table.add_row(*map(Text, line))
    console = Console()
    # Piped output is not cut to the width of a terminal that is not there.
    (console if console.is_terminal else Console(width=240)).print(table)


def figure(value: float | None, form: str, unit: float = 1.0) -> str:
    return "-" if value is None else format(value / unit, form)


TABLE = ("case", "mode", "provider", "L2", "graph", "p20 us", "p50 us", "p80 us", "ratio", "limit", "peak MB")
TABLE = (*TABLE, "saved MB", "note")


def table_line(row: Row) -> tuple[str, ...]:
    """Cells of :data:`TABLE`."""
    name = f"{row.op or row.model} {row.case}"
    return (
        name,
        row.mode,
        row.provider,
        row.l2,
        "yes" if row.graph else "no",
        *(figure(value, ".1f") for value in (row.p20_us, row.p50_us, row.p80_us)),
        "-" if row.ratio_to_best_alternative is None else f"{row.ratio_to_best_alternative:.2f}x",
        figure(row.fraction_of_limit, ".2f"),
        figure(row.peak_bytes, ".1f", 1e6),
        figure(row.saved_bytes, ".1f", 1e6),
        row.note,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="fused-ops bench results", description="List the measurements that are there."
    )
    parser.add_argument("--gpu", help="part of a GPU's name, e.g. h100")
    parser.add_argument("--results", help="folder of the results (default: those of the checkout)")
    parser.add_argument("--all", action="store_true", help="older measurements of the same thing too")
    parser.add_argument("--json", action="store_true", help="print one JSON list")
    options = parser.parse_args(arguments)
    try:
        rows = all_rows(Path(options.results) if options.results else None)
    except ValueError as error:
        print(f"fused-ops bench results: {error}", file=sys.stderr)
        return 2
    if options.gpu:
        known = sorted({row.gpu for row in rows})
        rows = [row for row in rows if environment.gpu_slug(options.gpu) in environment.gpu_slug(row.gpu)]
        if known and not rows:
            print(f"fused-ops bench results: --gpu={options.gpu!r} matches none of {known}", file=sys.stderr)
            return 2
    rows = rows if options.all else latest(rows)
    if options.json:
        print(to_json(rows))
    elif not rows:
        print("no results: `fused-ops bench ops` and `fused-ops bench models` on a GPU make them")
    for gpu in [] if options.json else sorted({row.gpu for row in rows}):
        print(gpu)
        print_table(TABLE, [table_line(row) for row in rows if row.gpu == gpu])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
