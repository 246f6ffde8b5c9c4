"""What accelerate() decided, for people and for programs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

# What the rows of a report are about.
KINDS = {
    "depthwise": "depthwise convolutions",
    "attention": "spatial-reduction attentions",
    "mlp": "MLPs",
    "gate": "gates",
    "hr_chain": "HR chains",
}


@dataclass(frozen=True)
class Row:
    """What was decided about one module.

    Attributes:
        module: dotted name of the convolution, of an MLP's first layer, or of the module that is exchanged as
            a whole.
        kind: a key of ``KINDS``.
        pattern: what stands there.
        exchanged: whether it is computed by a fused operator now (with ``dry_run``: would be).
        reason: why not, or what else stays outside of the operator and why.
        members: names of the modules that the operator computes.
        stock_bytes, fused_bytes: expected bytes through memory per step, in separate passes and fused; None
            where no example was given.
    """

    module: str
    pattern: str
    exchanged: bool
    kind: str = "depthwise"
    reason: str = ""
    members: tuple[str, ...] = ()
    stock_bytes: int | None = None
    fused_bytes: int | None = None

    @property
    def saved_bytes(self) -> int | None:
        return None if self.stock_bytes is None else self.stock_bytes - self.fused_bytes


@dataclass(frozen=True)
class Report:
    """What :func:`accelerate` did, a row per module that it looked at. ``str()`` gives a table."""

    results: tuple[Row, ...]
    note: str = ""

    @property
    def exchanged(self) -> int:
        return sum(row.exchanged for row in self.results)

    @property
    def saved_bytes(self) -> int | None:
        """Expected bytes saved per step by everything exchanged; None where no example was given."""
        saved = [row.saved_bytes for row in self.results if row.exchanged and row.saved_bytes is not None]
        return sum(saved) if saved else None

    def rows(self) -> list[dict[str, Any]]:
        return [asdict(row) | {"saved_bytes": row.saved_bytes} for row in self.results]

    COLUMNS = ("module", "pattern", "exchanged", "saved MB", "reason")

    def lines(self) -> list[tuple[str, ...]]:
        """Cells of :attr:`COLUMNS`."""
        return [
            (
                row.module or "(top)",
                row.pattern,
                "yes" if row.exchanged else "no",
                "-" if row.saved_bytes is None else f"{row.saved_bytes / 1e6:.1f}",
                row.reason,
            )
            for row in self.results
        ]

    def summary(self) -> str:
        counts = []
        for kind, words in KINDS.items():
            rows = [row for row in self.results if row.kind == kind]
            if rows:
                counts.append(f"{sum(row.exchanged for row in rows)} of {len(rows)} {words}")
        *others, last = KINDS.values()
        text = f"{', '.join(counts)} exchanged" if counts else f"no {', '.join(others)} or {last}"
        if self.saved_bytes is not None:
            text += f", {self.saved_bytes / 1e6:.1f} MB of memory traffic saved per step (expected)"
        return f"{text}. {self.note}" if self.note else text

    def __str__(self) -> str:
        lines = [self.COLUMNS, *self.lines()] if self.results else []
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        ]
        return "\n".join([*table, *([""] if table else []), self.summary()])
