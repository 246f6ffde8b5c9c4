"""What a run shows and writes: progress, metrics, curves, the table at the end."""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Table
from torch.utils.tensorboard import SummaryWriter

from fused_ops.core.files import write_atomically

METRICS = "metrics.jsonl"
CURVES = "curves.png"
PLAIN_SECONDS = 10.0


def make_console(to_stderr: bool) -> Console:
    """Console for people. Lines are wrapped by terminals only, never in a file."""
    console = Console(file=sys.stderr if to_stderr else sys.stdout, highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = 200
    return console


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


class Progress:
    """A bar on a terminal, a line every ten seconds elsewhere."""

    def __init__(self, console: Console, done: int, total: int, plain: bool) -> None:
        self._console, self._total, self._begun_at, self._done = console, total, done, done
        self._start = time.monotonic()
        self._shown = self._start
        self._bar: Bar | None = None
        if console.is_terminal and not plain:
            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[values]}"),
                console=console,
                transient=True,
            )
            self._task = self._bar.add_task("", total=total, completed=done, values="")
            self._bar.start()

    def advance(self) -> None:
        """One update has been made."""
        self._done += 1
        if self._bar:
            self._bar.update(self._task, completed=self._done)

    def show(self, where: str, loss: float, top1: float, images_per_second: float) -> None:
        """Current values."""
        now = time.monotonic()
        left = (now - self._start) / max(1, self._done - self._begun_at) * (self._total - self._done)
        values = (
            f"loss {loss:.4f}  top-1 {top1:.2f} %  {images_per_second:,.0f} images/s  left {duration(left)}"
        )
        if self._bar:
            self._bar.update(self._task, description=where, values=values)
        elif now - self._shown >= PLAIN_SECONDS:
            self._shown = now
            self._console.print(f"{where}  update {self._done}/{self._total}  {values}")

    def close(self) -> None:
        """Remove the bar."""
        if self._bar:
            self._bar.stop()


class Metrics:
    """Rows of `metrics.jsonl`, one per update and one per epoch, and the same as TensorBoard events."""

    def __init__(self, folder: Path, epochs_done: int, updates_done: int) -> None:
        path = folder / METRICS
        rows = [
            row
            for row in read_metrics(path)
            if (row["epoch"] <= epochs_done if row["kind"] == "epoch" else row["update"] <= updates_done)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        write_atomically(path, lambda file: file.write(text.encode()))
        self._file = open(path, "a")  # noqa: SIM115
        self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=updates_done + 1)

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        """Append rows; numbers other than counters become TensorBoard scalars."""
        for row in rows:
            self._file.write(json.dumps(row) + "\n")
            for name, value in row.items():
                if name not in ("kind", "epoch", "update") and value is not None:
                    self._events.add_scalar(f"{row['kind']}/{name}", value, row["update"])
        self._file.flush()

    def close(self) -> None:
        """Flush and close both."""
        self._file.close()
        self._events.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics file; a last line cut short by a kill is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def plot_curves(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Draw loss, accuracy and learning rate over the epochs."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    updates = [row for row in rows if row["kind"] == "update"]
    epochs = [row for row in rows if row["kind"] == "epoch"]
    per_epoch = (epochs[-1]["update"] / epochs[-1]["epoch"]) if epochs else max(1, len(updates))
    times = [row["update"] / per_epoch for row in updates]
    train, val, ema = "#4C72B0", "#DD8452", "#55A868"

    figure = Figure(figsize=(13, 4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=12)
    loss, accuracy, rate = figure.subplots(1, 3)

    def line(axes: Any, name: str, colour: str, label: str) -> None:
        points = [(row["epoch"], row[name]) for row in epochs if row.get(name) is not None]
        if points:
            axes.plot(
                *zip(*points, strict=True),
                color=colour,
                label=label,
                lw=1.8,
                marker="o",
                ms=3 if len(points) < 60 else 0,
            )

    loss.plot(times, [row["loss"] for row in updates], color=train, alpha=0.3, lw=0.7)
    line(loss, "train_loss", train, "training (augmented)")
    line(loss, "val_loss", val, "held out")
    line(loss, "ema_loss", ema, "held out, averaged weights")
    loss.set(title="Loss", xlabel="epoch", ylabel="cross-entropy")
    line(accuracy, "train_top1", train, "training (augmented)")
    line(accuracy, "val_top1", val, "held out")
    line(accuracy, "ema_top1", ema, "held out, averaged weights")
    accuracy.set(title="Top-1 accuracy", xlabel="epoch", ylabel="%")
    best = max((row["val_top1"] for row in epochs if row.get("val_top1") is not None), default=None)
    if best is not None:
        accuracy.axhline(best, color=val, lw=0.8, ls=":")
        accuracy.annotate(
            f"best {best:.2f} %",
            (0.02, best),
            xycoords=("axes fraction", "data"),
            xytext=(0, -4),
            textcoords="offset points",
            va="top",
            color=val,
            fontsize=9,
        )
    rate.plot(times, [row["lr"] for row in updates], color="#444444", lw=1.5)
    rate.set(title="Learning rate", xlabel="epoch")
    rate.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    for axes in (loss, accuracy, rate):
        # An epoch and a half says nothing, except in a run of one epoch.
        axes.xaxis.set_major_locator(MaxNLocator(integer=len(epochs) > 1))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=130))


def step_quantiles(seconds: list[float]) -> dict[str, float | None]:
    """Quantiles of the step time in milliseconds."""
    if len(seconds) < 2:
        return {"step_ms_p10": None, "step_ms_p50": None, "step_ms_p90": None}
    cuts = statistics.quantiles(seconds, n=10, method="inclusive")
    return {f"step_ms_p{10 * n}": round(1000 * cuts[n - 1], 3) for n in (1, 5, 9)}


def peak_memory(device: torch.device) -> dict[str, Any]:
    """Largest memory so far: allocated on the GPU, or resident in this process."""
    if device.type == "cuda":
        return {
            "peak_memory_mib": round(torch.cuda.max_memory_allocated(device) / 2**20, 1),
            "peak_memory_of": "GPU, allocated",
        }
    unit = 1 if sys.platform == "darwin" else 1024
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"peak_memory_mib": round(resident / 2**20, 1), "peak_memory_of": "process, resident"}


def summary_table(row: dict[str, Any]) -> Table:
    """The summary for people."""
    table = Table(title=f"{row['model']} on {row['data']}", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(justify="right")

    def percent(name: str) -> str:
        return "-" if row.get(name) is None else f"{row[name]:.2f} %"

    lines: dict[str, str] = {}
    if "val_top1" in row:
        lines["top-1, top-5"] = f"{percent('val_top1')}, {percent('val_top5')}"
    if "best_top1" in row:
        best = f"{percent('best_top1')} (epoch {row['best_epoch']})" if row["best_epoch"] else "-"
        lines["top-1, best"] = best
        lines["top-1, last"] = percent("last_top1")
        lines["top-5, last"] = percent("last_top5")
        lines["top-1 of averaged weights, best"] = percent("best_ema_top1")
        lines["top-1 of averaged weights, last"] = percent("last_ema_top1")
    lines["images/s"] = f"{row['images_per_second']:,.0f}" if row["images_per_second"] else "-"
    if row.get("step_ms_p50") is not None:
        lines["step time, ms (10 %, median, 90 %)"] = ", ".join(
            f"{row[f'step_ms_p{q}']:.1f}" for q in (10, 50, 90)
        )
    lines["peak memory"] = f"{row['peak_memory_mib']:,.0f} MiB ({row['peak_memory_of']})"
    lines["unreadable images"] = str(row["unreadable"])
    lines["time"] = duration(row["seconds"])
    lines["device, autocast, ranks"] = f"{row['device']}, {row['amp']}, {row['ranks']}"
    if "run" in row:
        lines["run folder"] = row["run"]
    for name, text in lines.items():
        table.add_row(name, text)
    return table
