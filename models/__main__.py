"""``python -m fused_ops.models``: the tables of models and systems, and the card of one model.

Counted columns are ours; published ones are the papers', from the sources in the table of systems.
"""

from __future__ import annotations

import argparse
import collections
import inspect
import itertools
import json
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

import torch

from fused_ops.core.explain import explain
from fused_ops.models.registry import System, create_model, find_system, model_table, preset_of

COLUMNS = (
    "name",
    "system",
    "params",
    "MACs",
    "input",
    "published\nparams",
    "published\nMACs",
    "top-1",
)
SYSTEM_COLUMNS = (
    "system",
    "published figures from",
    "checkpoints of",
    "operators of this package",
    "recipe (preset)",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; returns the exit status: 1 if no model matches the filter."""
    parser = argparse.ArgumentParser(prog="fused-ops models", description="List the models of the zoo.")
    parser.add_argument("filter", nargs="?", default="", help="pattern (dsnet_*star) or part of a name")
    parser.add_argument("--json", action="store_true", help="print JSON rows with sources and notes")
    parser.add_argument(
        "--card",
        metavar="NAME",
        help="what is the paper's, the code's or inferred in one model; its checkpoints and fused operators",
    )
    arguments = parser.parse_args(argv)
    if arguments.card is not None:
        try:
            print(card(arguments.card))
        except ValueError as error:
            parser.error(str(error))
        return 0
    rows = model_table(arguments.filter)
    if arguments.json:
        print(json.dumps(rows, indent=1))
    elif rows:
        _print_table(rows)
    else:
        print(f"no model matches {arguments.filter!r}", file=sys.stderr)
    return 0 if rows else 1


def card(name: str) -> str:
    """The card of a model as text.

    Raises:
        ValueError: an unknown name, with the nearest known ones.
    """
    system = find_system(name)
    info = system.models[name]
    size = "x".join(map(str, info.input_size[1:]))
    lines = [
        f"{name}, of {system.name}",
        f"{info.params:,} parameters, {info.macs:,} multiply-accumulates at {size} (counted)",
    ]
    published = {
        "parameters": info.published_params,
        "multiply-accumulates": info.published_macs,
        "top-1": info.published_top1,
    }
    numbers = ", ".join(f"{value:,.12g} {what}" for what, value in published.items() if value is not None)
    lines.append(f"published: {numbers} ({info.source})" if numbers else "published: nothing for this model")
    if info.note:
        lines.append(f"note: {info.note}")
    lines += [f"checkpoints: {layout.framework}, {layout.source}" for layout in system.layouts]
    if not system.layouts:
        lines.append("checkpoints: none were published")
    if preset_of(name):
        lines.append(f"recipe: fused-ops train --preset {preset_of(name)} --model {name} --data DIR")
        lines.append("        (fused-ops train --help says whose it is and what of it is done otherwise)")
    lines += ["", describe(system), "", "Fused operators:"]
    explanation = explain(create_model(name).eval(), torch.empty(1, *info.input_size))
    calls = collections.Counter(row["op"] for row in explanation.rows())
    lines += [f"  {count} calls of {operator}" for operator, count in calls.items()] or ["  none"]
    return "\n".join(lines)


def describe(system: System) -> str:
    """What is the paper's, the released code's and inferred in a system."""
    if system.card:
        whose = "timm's models, with the layers exchanged that fused_ops.accelerate() knows. "
        return textwrap.fill(("" if system.model_class else whose) + system.card, 110)
    return inspect.getdoc(sys.modules[system.model_class.__module__]) or ""


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    def scaled(value: float | None, unit: float, digits: int, suffix: str) -> str:
        return "-" if value is None else f"{value / unit:.{digits}f} {suffix}"

    def printed(value: float | None, unit: float, suffix: str) -> str:
        return "-" if value is None else f"{value / unit:.4g} {suffix}"

    return (
        row["name"] + (" *" if row["note"] else ""),
        row["system"] + (" (inferred)" if row["inferred"] else ""),
        scaled(row["params"], 1e6, 3, "M"),
        scaled(row["macs"], 1e9, 3, "G"),
        "x".join(map(str, row["input_size"])),
        printed(row["published_params"], 1e6, "M"),
        printed(row["published_macs"], 1e9, "G"),
        "-" if row["published_top1"] is None else f"{row['published_top1']:g}",
    )


def _system_cells(rows: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """One line per system: where the figures of all its rows are from, whose checkpoints, what runs fused."""
    lines = []
    for system, group in itertools.groupby(
        sorted(rows, key=lambda row: row["system"]), lambda row: row["system"]
    ):
        group = list(group)
        sources = dict.fromkeys(row["source"] for row in group if row["source"])
        lines.append(
            (
                system,
                "; ".join(sources) or "-",
                "; ".join(group[0]["checkpoints"]) or "none published",
                ", ".join(group[0]["fused"]) or "none",
                ", ".join(dict.fromkeys(row["preset"] for row in group)),
            )
        )
    return lines


def _print_table(rows: list[dict[str, Any]]) -> None:
    cells, systems = [_cells(row) for row in rows], _system_cells(rows)
    notes = [f"* {row['name']}: {row['note']}" for row in rows if row["note"]]
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        _print_aligned((tuple(column.replace("\n", " ") for column in COLUMNS), *cells))
        print(*notes, "", sep="\n")
        _print_aligned((SYSTEM_COLUMNS, *systems))
        return
    console = Console()
    if not console.is_terminal:
        # Piped output is not cut to the width of a terminal that is not there.
        console = Console(width=200)
    table = Table()
    for column in COLUMNS:
        # Where the terminal is narrow, systems are folded, names and numbers are not.
        table.add_column(
            column,
            justify="left" if column in ("name", "system") else "right",
            no_wrap=column != "system",
            overflow="fold",
        )
    for line in cells:
        table.add_row(*line)
    console.print(table)
    for note in notes:
        console.print(note, highlight=False)
    table = Table()
    for column in SYSTEM_COLUMNS:
        table.add_column(column, overflow="fold")
    for line in systems:
        table.add_row(*line)
    console.print(table)


def _print_aligned(lines: Sequence[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


if __name__ == "__main__":
    sys.exit(main())
