"""One page, plots and README's table from the measurements, predictions beside them and never among them.

    fused-ops bench report [--results DIR] [--out DIR] [--json] [--update-readme]
    fused-ops bench report --with-traffic --with-resources --with-steps    # also what needs no GPU

Figures of other commands are read from ``traffic.json``, ``resources.json`` and ``steps.json`` in the results
folder where they are there; the flags work them out anew.
"""

from __future__ import annotations

import argparse
import base64
import html
import io
import json
import math
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fused_ops.bench import limits, resources, results
from fused_ops.bench.dispatch import ALTERNATIVES, CONDITIONS_MEASURED, correct
from fused_ops.bench.results import Row
from fused_ops.core import environment

OURS = ("auto", "triton", "cuda")
MODES = ("eval", "forward", "backward", "both", "infer", "train")
NOT_MEASURED = "not measured"
PREDICTED = "#1d5fbf"
MEASURED = "#0b7a3b"
PROVIDER_STYLES = {
    "triton": (MEASURED, "D"),
    "cuda": ("#55a630", "s"),
    "auto": ("#073b1e", "P"),
    "reference": ("#888888", "x"),
    "eager_nchw": ("#c1121f", "v"),
    "eager_channels_last": ("#e85d04", "^"),
    "compile_default": ("#9d4edd", "<"),
    "compile_max_autotune": ("#5a189a", ">"),
}
SDPA_STYLE = ("#b08900", "o")
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"


@dataclass
class Group:
    """Providers measured side by side: one GPU, case, mode and dtype, under one cache and graph condition.

    Attributes:
        gpu, subject, case, mode, dtype, l2, graph: what was measured; the subject is the operator or model.
        is_op: an operator's, not a model's.
        rows: by provider, all of them, measured or not.
    """

    gpu: str
    subject: str
    is_op: bool
    case: str
    mode: str
    dtype: str
    l2: str
    graph: bool
    rows: dict[str, Row] = field(default_factory=dict)

    @property
    def ours(self) -> Row | None:
        """The fastest of what this package provides whose result was right."""
        return self._fastest(OURS)

    @property
    def alternative(self) -> Row | None:
        """The fastest of what a user without this package would run."""
        return self._fastest(ALTERNATIVES)

    def _fastest(self, names: Iterable[str]) -> Row | None:
        rows = [self.rows[name] for name in names if name in self.rows and correct(self.rows[name])]
        return min(rows, key=lambda row: row.p50_us, default=None)

    @property
    def ratio(self) -> float | None:
        """How many times faster ours is than the best alternative."""
        if self.ours is None or self.alternative is None:
            return None
        return self.alternative.p50_us / self.ours.p50_us

    @property
    def failed(self) -> list[Row]:
        return [row for row in self.rows.values() if row.note.startswith("failed")]


def group_rows(rows: Iterable[Row]) -> list[Group]:
    """Rows side by side. Of several cache and graph conditions the first of cold in a graph, cold, warm in a
    graph, warm is taken in which anything of ours was measured, else anything at all."""
    by_case: dict[tuple[Any, ...], dict[tuple[str, bool], Group]] = {}
    loose: dict[tuple[Any, ...], list[Row]] = {}
    for row in results.latest(rows):
        key = (row.gpu, row.op or row.model, bool(row.op), row.case, row.mode, row.dtype)
        by_case.setdefault(key, {})
        if not row.measured:
            loose.setdefault(key, []).append(row)
            continue
        condition = (row.l2, row.graph)
        by_case[key].setdefault(condition, Group(*key, *condition)).rows[row.provider] = row
    groups = []
    for key, conditions in by_case.items():
        group = _preferred(conditions) or Group(*key, "", False)
        for row in loose.get(key, ()):
            group.rows.setdefault(row.provider, row)
        groups.append(group)
    return groups


def _preferred(conditions: Mapping[tuple[str, bool], Group]) -> Group | None:
    order = [*(entry for entry in CONDITIONS_MEASURED if entry in conditions), *conditions]
    for condition in order:
        if conditions[condition].ratio is not None:
            return conditions[condition]
    return conditions[order[0]] if order else None


@dataclass(frozen=True)
class Summary:
    """How often this package wins on one GPU.

    Attributes:
        gpu: its name.
        count: comparisons: groups in which ours and an alternative were both measured.
        wins: share of them at least 1, 1.5 and 2 times as fast as the best alternative.
        geometric_mean: of the ratios.
        worst: the smallest ratio, and of what.
    """

    gpu: str
    count: int
    wins: dict[float, float]
    geometric_mean: float
    worst: tuple[float, str]


def summarise(gpu: str, groups: Iterable[Group]) -> Summary | None:
    """None where nothing was compared."""
    ratios = [(group.ratio, label(group)) for group in groups if group.ratio is not None]
    if not ratios:
        return None
    wins = {least: sum(ratio >= least for ratio, _ in ratios) / len(ratios) for least in (1.0, 1.5, 2.0)}
    return Summary(
        gpu, len(ratios), wins, statistics.geometric_mean(ratio for ratio, _ in ratios), min(ratios)
    )


def label(group: Group) -> str:
    return f"{group.subject} {group.case} {group.mode}"


def losing_first(groups: Iterable[Group]) -> list[Group]:
    """Failed checks, then smallest ratio first, then what has none."""
    return sorted(
        groups,
        key=lambda group: (not group.failed, group.ratio is None, group.ratio or 0.0, label(group)),
    )


def datasheet(name: str) -> limits.Gpu | None:
    try:
        return limits.find_gpu(name)
    except ValueError:
        return None


Predicted = dict[tuple[str, str, str, str], dict[str, Any]]


def by_case(predictions: Iterable[Mapping[str, Any]]) -> Predicted:
    """Predictions by GPU, operator, case and mode."""
    return {(row["gpu"], row["op"], row["case"], row["mode"]): dict(row) for row in predictions}


def per_model(predictions: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Predictions of all calls of an operator in one step of a model, by GPU, operator, model and mode.

    Rows with gpu, op, case (the model's name), mode and predicted_us; cases of no model are left out.
    """
    sums: dict[tuple[str, ...], float] = {}
    for row in predictions:
        if row["model"]:
            key = (row["gpu"], row["op"], row["model"], row["mode"])
            sums[key] = sums.get(key, 0.0) + row["calls"] * row["predicted_us"]
    return [
        dict(zip(("gpu", "op", "case", "mode", "predicted_us"), (*key, value), strict=True))
        for key, value in sums.items()
    ]


def compared_per_model(
    groups: Iterable[Group], predictions: Iterable[Mapping[str, Any]]
) -> list[tuple[str, str, float, float, int]]:
    """Measured times of an operator's calls in one step of each model, ours beside the best alternative.

    Returns:
        (operator and model, mode, microseconds of ours, of the alternatives, cases that were compared).
    """
    calls = {(row["op"], row["case"]): row["calls"] for row in predictions}
    sums: dict[tuple[str, str], list[float]] = {}
    for group in groups:
        ours, other = group.ours, group.alternative
        if not group.is_op or ours is None or other is None or not ours.model:
            continue
        weight = calls.get((group.subject, group.case), 1)
        total = sums.setdefault((f"{group.subject}, {ours.model}", group.mode), [0.0, 0.0, 0])
        total[0] += weight * ours.p50_us
        total[1] += weight * other.p50_us
        total[2] += 1
    return [(*key, *values) for key, values in sums.items()]


def prediction_of(group: Group, predicted: Predicted) -> dict[str, Any] | None:
    gpu = datasheet(group.gpu)
    if gpu is None or group.dtype != "bfloat16":
        return None
    return predicted.get((gpu.name, group.subject, group.case, group.mode))


def combined(groups: Sequence[Group], predictions: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Predicted and measured side by side, for scripts: one entry per case, mode and GPU.

    ``predicted_us`` is a least possible time; everything under ``measured`` is a measurement or None.
    """
    predicted = by_case(predictions)
    entries, used = [], set()
    for group in losing_first(groups):
        found = prediction_of(group, predicted)
        if found is not None:
            used.add((found["gpu"], found["op"], found["case"], found["mode"]))
        ours, other = group.ours, group.alternative
        measured = None
        if ours is not None or other is not None:
            measured = {
                "ours": ours.provider if ours else None,
                "ours_us": ours.p50_us if ours else None,
                "best_alternative": other.provider if other else None,
                "best_alternative_us": other.p50_us if other else None,
                "ratio": group.ratio,
                "fraction_of_limit": ours.fraction_of_limit if ours else None,
                "l2": group.l2,
                "graph": group.graph,
            }
        entries.append(
            {
                "gpu": group.gpu,
                "subject": group.subject,
                "case": group.case,
                "mode": group.mode,
                "dtype": group.dtype,
                "predicted_us": found["predicted_us"] if found else None,
                "predicted_term": found["term"] if found else None,
                "measured": measured,
                "failed": [f"{row.provider}: {row.note}" for row in group.failed],
            }
        )
    for key, row in predicted.items():
        if key not in used:
            entries.append(
                {
                    "gpu": row["gpu"],
                    "subject": row["op"],
                    "case": row["case"],
                    "mode": row["mode"],
                    "dtype": row["dtype"],
                    "predicted_us": row["predicted_us"],
                    "predicted_term": row["term"],
                    "measured": None,
                    "failed": [],
                }
            )
    return entries


def images_per_second(row: Row) -> float | None:
    """Of a model row, from the batch that its case begins with."""
    batch = re.search(r"\d+", row.case)
    if batch is None or not row.measured:
        return None
    return int(batch.group()) / (row.p50_us * 1e-6)


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError("plots need matplotlib: pip install 'fused-ops[bench]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update(
        {
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.color": "#e3e6ea",
            "axes.axisbelow": True,
            "figure.facecolor": "white",
        }
    )
    return pyplot


def _style(provider: str) -> tuple[str, str]:
    return SDPA_STYLE if provider.startswith("sdpa_") else PROVIDER_STYLES.get(provider, ("#444444", "o"))


Series = dict[str, list[float | None]]


def _dots(axes: Any, labels: Sequence[str], series: Series, styles: Mapping[str, tuple[str, str]]) -> None:
    """Values of every series on a line per label; series of one line lie a little apart."""
    apart = [name for name in series if name != _LIMIT]
    for name, values in series.items():
        colour, marker = styles[name]
        offset = 0.0
        if name != _LIMIT and len(apart) > 1:
            offset = 0.5 * (apart.index(name) / (len(apart) - 1) - 0.5)
        points = [(value, row + offset) for row, value in enumerate(values) if value is not None]
        hollow = {} if marker in "x|" else {"edgecolors": "white", "linewidths": 0.5}
        if marker == "|":
            hollow = {"linewidths": 2.5}
        axes.scatter(
            [x for x, _ in points],
            [y for _, y in points],
            c=colour,
            marker=marker,
            s=420 if marker == "|" else 38,
            label=name,
            zorder=2 if marker == "|" else 3,
            **hollow,
        )
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    for row in range(1, len(labels), 2):
        axes.axhspan(row - 0.5, row + 0.5, color="#f5f7f9", zorder=0)


def _log_axis(axes: Any, title: str) -> None:
    from matplotlib import ticker

    axes.set_xscale("log")
    axes.set_xlabel(title)
    low, high = axes.get_xlim()
    if low > 0 and high / low < 6:
        # An axis of nearly one value would have no tick to read it by.
        centre = math.sqrt(low * high)
        low, high = centre / 2.6, centre * 2.6
        axes.set_xlim(low, high)
    decades = math.log10(high / low) if low > 0 else 1.0
    steps = (1.0, 2.0, 5.0) if decades < 2 else (1.0, 3.0) if decades < 3.2 else (1.0,)
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=steps, numticks=12))
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    axes.tick_params(axis="x", labelsize=8)


def _panels(
    title: str,
    axis_title: str | Sequence[str],
    labels: Sequence[str],
    panels: Mapping[str, Series],
    styles: Mapping[str, tuple[str, str]],
    *,
    log: bool = True,
    shared_scale: bool = False,
) -> Any:
    """A dot plot with one panel per entry of ``panels`` and one legend below."""
    pyplot = _pyplot()
    columns = min(len(panels), 2)
    lines = math.ceil(len(panels) / columns)
    legend = list(dict.fromkeys(name for series in panels.values() for name in series))
    legend_lines = math.ceil(len(legend) / 6)
    height = 0.75 + 0.3 * legend_lines + lines * (0.85 + 0.3 * len(labels))
    figure, axes = pyplot.subplots(
        lines,
        columns,
        figsize=(9.4 if columns == 2 else 6.5, height),
        sharey=True,
        sharex=shared_scale,
        squeeze=False,
    )
    titles = [axis_title] * len(panels) if isinstance(axis_title, str) else axis_title
    handles: dict[str, Any] = {}
    for panel, (name, series), x_title in zip(axes.flat, panels.items(), titles, strict=False):
        _dots(panel, labels, series, styles)
        panel.set_title(name, fontsize=10, loc="left")
        if log:
            _log_axis(panel, x_title)
        else:
            panel.set_xlabel(x_title)
            panel.set_xlim(left=0)
            panel.tick_params(labelbottom=True)
        handles |= dict(zip(*reversed(panel.get_legend_handles_labels()), strict=True))
    for panel in axes.flat[len(panels) :]:
        panel.set_visible(False)
    figure.suptitle(title, fontsize=11, x=0.01, ha="left", fontweight="bold")
    figure.legend(
        handles.values(),
        handles,
        loc="lower center",
        ncols=math.ceil(len(legend) / legend_lines),
        frameon=False,
        fontsize=8.5,
        markerscale=0.9,
    )
    figure.tight_layout(rect=(0, (0.1 + 0.26 * legend_lines) / height, 1, 1 - 0.08 / height))
    return figure


def _png(figure: Any) -> bytes:
    from matplotlib import pyplot

    buffer = io.BytesIO()
    # No date or version in the file: the same results give the same bytes.
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    pyplot.close(figure)
    return buffer.getvalue()


GPU_STYLES = {
    "A100 80GB": ("#7b8fa6", "v"),
    "L40S": ("#c08552", "^"),
    "H100 SXM": ("#1d5fbf", "D"),
    "H200": ("#00a3c4", "s"),
    "B200": ("#0b2e6f", "P"),
    "RTX 4090": ("#a44a9a", "o"),
}
_LIMIT = "limit"


def plot_predicted(predictions: Sequence[Mapping[str, Any]]) -> bytes:
    """Least possible times per GPU of all calls in one step of each model."""
    predictions = per_model(predictions)
    cases = list(dict.fromkeys(f"{row['op']}  {row['case']}" for row in predictions))
    gpus = list(dict.fromkeys(row["gpu"] for row in predictions))
    found = {(f"{row['op']}  {row['case']}", row["gpu"], row["mode"]): row for row in predictions}
    panels = {
        title: {
            gpu: [
                found[case, gpu, mode]["predicted_us"] if (case, gpu, mode) in found else None
                for case in cases
            ]
            for gpu in gpus
        }
        for mode, title in (("forward", "forward, training"), ("backward", "backward"))
    }
    labels = [case.removeprefix("depthwise  ") if len({c.split()[0] for c in cases}) == 1 else case
              for case in cases]  # fmt: skip
    return _png(
        _panels(
            "PREDICTED, not measured: least possible time of all calls of one step, bfloat16",
            "microseconds (predicted)",
            labels,
            panels,
            {gpu: GPU_STYLES.get(gpu, ("#444444", "o")) for gpu in gpus},
        )
    )


def _providers(groups: Iterable[Group]) -> list[str]:
    found = {name for group in groups for name, row in group.rows.items() if correct(row)}
    return [name for name in PROVIDER_STYLES if name in found] + sorted(found - set(PROVIDER_STYLES))


def _table_of(groups: Sequence[Group]) -> tuple[list[str], list[str], dict[tuple[str, str], Group]]:
    cases = list(dict.fromkeys(group.case for group in groups))
    modes = [mode for mode in MODES if any(group.mode == mode for group in groups)]
    return cases, modes, {(group.case, group.mode): group for group in groups}


def _series(
    cases: Sequence[str],
    mode: str,
    found: Mapping[tuple[str, str], Group],
    providers: Sequence[str],
    value: Callable[[Row], float | None],
) -> Series:
    series: Series = {}
    for provider in providers:
        values: list[float | None] = []
        for case in cases:
            group = found.get((case, mode))
            row = group.rows.get(provider) if group else None
            values.append(value(row) if row is not None and correct(row) else None)
        series[provider] = values
    return series


def _limit_us(group: Group | None) -> float | None:
    """The limit that this run's own copy bandwidth gives, from any row that says how near it came."""
    for row in group.rows.values() if group else ():
        if correct(row) and row.fraction_of_limit:
            return row.p50_us * row.fraction_of_limit
    return None


def plot_times(gpu: str, subject: str, groups: Sequence[Group]) -> bytes:
    """Measured medians of every provider, and the limit, per case and mode."""
    cases, modes, found = _table_of(groups)
    providers = _providers(groups)
    panels = {}
    for mode in modes:
        limit = [_limit_us(found.get((case, mode))) for case in cases]
        panels[mode] = ({_LIMIT: limit} if any(limit) else {}) | _series(
            cases, mode, found, providers, lambda row: row.p50_us
        )
    styles = {provider: _style(provider) for provider in providers} | {_LIMIT: ("#111111", "|")}
    return _png(_panels(f"{subject} on {gpu}: measured median time", "microseconds", cases, panels, styles))


def plot_fractions(gpu: str, subject: str, groups: Sequence[Group], predicted: Predicted) -> bytes | None:
    """Least bytes over the time, as a share of the copy bandwidth measured in the same run."""

    def fraction(row: Row) -> float | None:
        found = predicted.get((sheet.name, row.op, row.case, row.mode)) if sheet else None
        if found is None or not row.copy_gb_s:
            return None
        return found["bytes"] / (row.p50_us * 1e-6) / (row.copy_gb_s * 1e9)

    sheet = datasheet(gpu)
    cases, modes, found = _table_of(groups)
    providers = _providers(groups)
    panels = {mode: _series(cases, mode, found, providers, fraction) for mode in modes}
    if not any(value for series in panels.values() for values in series.values() for value in values):
        return None
    figure = _panels(
        f"{subject} on {gpu}: share of the copy bandwidth of the same run (least bytes / time)",
        "share of copy bandwidth",
        cases,
        panels,
        {provider: _style(provider) for provider in providers},
        log=False,
        shared_scale=True,
    )
    for axes in figure.axes:
        axes.axvline(1.0, color="#111111", linewidth=1)
        axes.set_xlim(0, max(1.05, axes.get_xlim()[1]))
    return _png(figure)


def plot_memory(gpu: str, subject: str, groups: Sequence[Group]) -> bytes | None:
    """Bytes kept for the backward, and peak memory, per provider."""
    training = [group for group in groups if group.mode in ("both", "train")] or list(groups)
    cases, modes, found = _table_of(training)
    providers = _providers(training)
    panels = {}
    for title, key in (("kept for the backward", "saved_bytes"), ("peak of one call", "peak_bytes")):
        series = _series(
            cases,
            modes[-1],
            found,
            providers,
            lambda row, key=key: getattr(row, key) / 1e6 if getattr(row, key) else None,
        )
        if any(value for values in series.values() for value in values):
            panels[title] = series
    if not panels:
        return None
    styles = {provider: _style(provider) for provider in providers}
    return _png(_panels(f"{subject} on {gpu}: measured memory", "MB", cases, panels, styles))


def plot_models(gpu: str, groups: Sequence[Group]) -> bytes:
    """Images per second and peak memory of every model, batch and mode."""
    labels = [f"{group.subject} {group.case} {group.mode}" for group in groups]
    providers = _providers(groups)
    panels = {}
    for title, value in (
        ("images per second", images_per_second),
        ("peak memory, MB", lambda row: row.peak_bytes / 1e6 if row.peak_bytes else None),
    ):
        panels[title] = {
            provider: [
                value(group.rows[provider])
                if provider in group.rows and correct(group.rows[provider])
                else None
                for group in groups
            ]
            for provider in providers
        }
    styles = {provider: _style(provider) for provider in providers}
    return _png(_panels(f"Models on {gpu}: measured", ["images per second", "MB"], labels, panels, styles))


def plot_roofline(
    gpu: limits.Gpu, predictions: Sequence[Mapping[str, Any]], groups: Sequence[Group] = ()
) -> bytes:
    """Operations per second over operations per byte: roofs, what is predicted, what was measured."""
    pyplot = _pyplot()
    rows = [row for row in predictions if row["gpu"] == gpu.name and row["mode"] in ("forward", "backward")]
    figure, axes = pyplot.subplots(figsize=(7.2, 4.4))
    copies = [row.copy_gb_s * 1e9 for group in groups for row in group.rows.values() if row.copy_gb_s]
    gemms = [row.gemm_tflops * 1e12 for group in groups for row in group.rows.values() if row.gemm_tflops]
    measured_roof = bool(copies)
    bandwidth = max(copies) if copies else gpu.assumed_copy or gpu.memory_bandwidth
    tensor = max(gemms) if gemms else gpu.assumed_gemm or gpu.tensor_peak
    kind = "measured in this run" if measured_roof else "assumed" if gpu.assumed_copy else "datasheet"
    low, high = 0.5, 2000.0
    for peak, name, style in (
        (tensor, f"matrix units {tensor / 1e12:.0f} T/s", "-"),
        (gpu.fma_peak, f"float32 multiply-add {gpu.fma_peak / 1e12:.3g} T/s (datasheet)", "--"),
    ):
        ridge = peak / bandwidth
        axes.plot([low, ridge, high], [low * bandwidth, peak, peak], style, color="#333333", linewidth=1.3)
        axes.annotate(name, (high, peak), xytext=(-4, 4), textcoords="offset points", ha="right", fontsize=8)
    axes.annotate(
        f"memory {bandwidth / 1e12:.3g} TB/s ({kind})",
        (low, low * bandwidth),
        xytext=(14, -2),
        textcoords="offset points",
        fontsize=8,
    )
    for mode, marker in (("forward", "o"), ("backward", "s")):
        chosen = [row for row in rows if row["mode"] == mode and row["flops"]]
        axes.scatter(
            [row["flops"] / row["bytes"] for row in chosen],
            [row["flops"] / (row["predicted_us"] * 1e-6) for row in chosen],
            facecolors="none",
            edgecolors=PREDICTED,
            marker=marker,
            s=42,
            label=f"predicted limit, {mode}",
        )
    found = by_case(rows)
    for mode, marker in (("forward", "o"), ("backward", "s")):
        points = []
        for group in groups:
            row = prediction_of(group, found) if group.mode == mode else None
            if row and group.ours:
                points.append((row["flops"] / row["bytes"], row["flops"] / (group.ours.p50_us * 1e-6)))
        if points:
            axes.scatter(*zip(*points, strict=True), color=MEASURED, marker=marker, s=36,
                         label=f"measured, ours, {mode}")  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(low, high)
    axes.set_ylim(low * bandwidth * 0.4, tensor * 2.2)
    axes.set_xlabel("operations per byte of least traffic")
    axes.set_ylabel("operations per second")
    title = "measured and predicted" if groups else "PREDICTED, not measured"
    axes.set_title(f"Roofline of {gpu.name}: {title}", fontsize=11, loc="left", fontweight="bold")
    axes.legend(fontsize=8, loc="lower right", frameon=True, framealpha=1)
    figure.tight_layout()
    return _png(figure)


_CSS = f"""
:root {{ color-scheme: light; --predicted: {PREDICTED}; --measured: {MEASURED}; --line: #d9dde3; }}
* {{ box-sizing: border-box; }}
body {{ font: 15px/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; color: #1c2430;
  margin: 0 auto; max-width: 1460px; padding: 24px 20px 80px; background: #fff; }}
h1 {{ font-size: 26px; margin: 0 0 4px; }}
h2 {{ font-size: 20px; margin: 44px 0 8px; padding-top: 12px; border-top: 2px solid var(--line); }}
h3 {{ font-size: 16px; margin: 24px 0 6px; }}
p {{ max-width: 78ch; margin: 6px 0 10px; }}
nav a {{ margin-right: 14px; white-space: nowrap; }}
a {{ color: #0b4fa8; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: 12.5px; margin: 6px 0 14px;
  font-variant-numeric: tabular-nums; }}
th, td {{ padding: 4px 8px; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }}
th {{ background: #f2f4f7; border-bottom: 2px solid var(--line);
  vertical-align: bottom; }}
td.n, th.n {{ text-align: right; }}
td.n {{ white-space: nowrap; }}
td.note {{ min-width: 160px; }}
td.name, td.whole {{ white-space: nowrap; }}
td.predicted {{ color: var(--predicted); background: #eef4fd; font-style: italic; }}
th.predicted {{ color: var(--predicted); background: #dfeafb; }}
td.measured {{ color: var(--measured); background: #edf8f1; font-weight: 600; }}
th.measured {{ color: var(--measured); background: #dcf1e4; }}
td.none {{ color: #8a93a0; }}
tr.loses td.name, td.loses {{ color: #b3261e; font-weight: 600; }}
.notice {{ border-left: 4px solid #b26a00; background: #fff6e5; padding: 10px 14px; margin: 14px 0; }}
.tiles {{ display: flex; flex-wrap: wrap; gap: 12px; margin: 10px 0; }}
.tile {{ border: 1px solid var(--line); border-radius: 6px; padding: 8px 14px; min-width: 120px; }}
.tile b {{ display: block; font-size: 22px; }}
.tile span {{ font-size: 12.5px; color: #525c69; }}
img {{ max-width: 100%; height: auto; display: block; margin: 8px 0 16px; }}
details > summary {{ cursor: pointer; color: #0b4fa8; margin: 6px 0; }}
.key span {{ padding: 1px 8px; border-radius: 4px; margin-right: 8px; }}
.key .p {{ color: var(--predicted); background: #eef4fd; font-style: italic; }}
.key .m {{ color: var(--measured); background: #edf8f1; font-weight: 600; }}
"""


@dataclass(frozen=True)
class Cell:
    """Text of a table cell, and its classes in the style sheet."""

    text: str
    kind: str = ""


def _number(value: float | None, form: str = ".1f", kind: str = "n", unit: float = 1.0) -> Cell:
    if value is None:
        return Cell("-", "n none")
    return Cell(format(value / unit, form), f"n {kind}".replace("n n", "n"))


def _measured(value: float | None, form: str = ".1f", unit: float = 1.0) -> Cell:
    return Cell(NOT_MEASURED, "n none") if value is None else _number(value, form, "measured", unit)


def _predicted(value: float | None, form: str = ".1f", unit: float = 1.0) -> Cell:
    return Cell("-", "n none") if value is None else _number(value, form, "predicted", unit)


def _table(columns: Sequence[tuple[str, str]], lines: Sequence[tuple[str, Sequence[Cell]]]) -> str:
    """HTML of a table: columns as (title, class), lines as (class of the row, cells)."""
    head = "".join(f'<th class="{kind}">{html.escape(title)}</th>' for title, kind in columns)
    body = []
    for kind, cells in lines:
        inner = "".join(f'<td class="{cell.kind}">{html.escape(cell.text)}</td>' for cell in cells)
        body.append(f'<tr class="{kind}">{inner}</tr>')
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
    return f'<div class="scroll">{table}</div>'


def _image(png: bytes, text: str) -> str:
    data = base64.b64encode(png).decode()
    return f'<img alt="{html.escape(text)}" src="data:image/png;base64,{data}">'


def _dictionaries(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    lines = []
    for row in rows:
        cells = []
        for column in columns:
            value = row.get(column)
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                cells.append(Cell(f"{value:,}" if isinstance(value, int) else f"{value:.3f}", "n"))
            else:
                cells.append(Cell("" if value is None else str(value), "" if column == "config" else "name"))
        lines.append(("", cells))
    numeric = {column for column in columns if any(isinstance(row.get(column), (int, float)) for row in rows)}
    return _table([(column, "n" if column in numeric else "") for column in columns], lines)


def comparison_table(groups: Sequence[Group], predicted: Predicted) -> str:
    """Measured beside predicted, losing rows first."""
    columns = [
        ("what", ""),
        ("mode", ""),
        ("predicted least us", "n predicted"),
        ("ours us", "n measured"),
        ("best alternative us", "n measured"),
        ("times faster", "n measured"),
        ("share of limit", "n measured"),
        ("kept MB, ours / other", "n measured"),
        ("peak MB, ours / other", "n measured"),
        ("L2, graph", ""),
        ("note", ""),
    ]
    lines = []
    for group in losing_first(groups):
        ours, other = group.ours, group.alternative
        found = prediction_of(group, predicted)
        loses = group.ratio is not None and group.ratio < 1
        notes = [f"{row.provider} {row.note}" for row in group.failed]
        if ours is None and not notes:
            notes = [f"{name} {row.note}" for name, row in group.rows.items() if name in OURS and row.note]
        ratio = _measured(group.ratio, ".2f")
        lines.append(
            (
                "loses" if loses or group.failed else "",
                (
                    Cell(f"{group.subject} {group.case}", "name"),
                    Cell(group.mode),
                    Cell(f"{found['predicted_us']:.1f} {found['term']}", "n predicted")
                    if found
                    else Cell("-", "n none"),
                    _time_and_provider(ours),
                    _time_and_provider(other),
                    Cell(ratio.text, ratio.kind + " loses") if loses else ratio,
                    _number(ours.fraction_of_limit if ours else None, ".0%", "measured"),
                    _pair(ours, other, "saved_bytes"),
                    _pair(ours, other, "peak_bytes"),
                    Cell(f"{group.l2 or '-'}, {'graph' if group.graph else 'no graph'}", "whole"),
                    Cell("; ".join(notes), "note"),
                ),
            )
        )
    return _table(columns, lines)


def _time_and_provider(row: Row | None) -> Cell:
    if row is None:
        return Cell(NOT_MEASURED, "n none")
    return Cell(f"{row.p50_us:,.1f} {row.provider}", "n measured")


def _pair(ours: Row | None, other: Row | None, key: str) -> Cell:
    values = [getattr(row, key) if row else None for row in (ours, other)]
    if all(value is None for value in values):
        return Cell("-", "n none")
    return Cell(" / ".join(results.figure(value, ".1f", 1e6) for value in values), "n measured")


def predicted_table(predictions: Sequence[Mapping[str, Any]], measured: Sequence[Group]) -> str:
    """Least times of every case on every GPU, and the measured time beside it where there is one."""
    gpus = list(dict.fromkeys(row["gpu"] for row in predictions))
    times: dict[tuple[str, str, str, str], float] = {}
    for group in measured:
        sheet = datasheet(group.gpu)
        if sheet and group.ours:
            times[sheet.name, group.subject, group.case, group.mode] = group.ours.p50_us
    columns = [("case", ""), ("per step", ""), ("mode", "")]
    for gpu in gpus:
        columns += [(f"{gpu} predicted us", "n predicted"), (f"{gpu} measured us", "n measured")]
    found = by_case(predictions)
    lines = []
    for op, case, model, mode in dict.fromkeys(
        (row["op"], row["case"], f"x{row['calls']}", row["mode"]) for row in predictions
    ):
        cells = [Cell(f"{op} {case}", "name"), Cell(model, "name"), Cell(mode)]
        for gpu in gpus:
            key = (gpu, op, case, mode)
            cells.append(_predicted(found[key]["predicted_us"] if key in found else None))
            cells.append(_measured(times.get(key)))
        lines.append(("", cells))
    return _table(columns, lines)


def datasheet_table() -> str:
    columns = [("GPU", ""), ("architecture", ""), ("memory TB/s", "n"), ("copy assumed TB/s", "n"),
               ("bf16 matrix T/s", "n"), ("product assumed T/s", "n"), ("float32 T/s", "n"),
               ("multiprocessors", "n"), ("clock GHz", "n"), ("L2 MB", "n"), ("source", "")]  # fmt: skip
    lines = []
    for gpu in limits.GPUS:
        cells = [
            Cell(gpu.name, "name"),
            Cell(gpu.architecture),
            _number(gpu.memory_bandwidth, ".3f", unit=1e12),
            _number(gpu.assumed_copy, ".2f", unit=1e12),
            _number(gpu.tensor_peak, ".0f", unit=1e12),
            _number(gpu.assumed_gemm, ".0f", unit=1e12),
            _number(gpu.fma_peak, ".1f", unit=1e12),
            _number(gpu.multiprocessors, ".0f"),
            _number(gpu.clock, ".3f", unit=1e9),
            _number(gpu.l2_bytes, ".0f", unit=2**20),
            Cell(gpu.source),
        ]
        lines.append(("", cells))
    return _table(columns, lines)


@dataclass
class Report:
    """Everything that the page shows.

    Attributes:
        rows: latest measurements.
        predictions: from :func:`fused_ops.bench.limits.all_predictions`.
        traffic, resources, steps: rows of what is counted without a GPU; None where it was not asked for.
        profiles: kernel times of model steps, as :func:`fused_ops.bench.models.write_profiles` has them.
    """

    rows: list[Row]
    predictions: list[dict[str, Any]]
    traffic: list[dict[str, Any]] | None = None
    resources: list[dict[str, Any]] | None = None
    steps: list[dict[str, Any]] | None = None
    profiles: Sequence[dict[str, Any]] = ()

    def __post_init__(self) -> None:
        groups = group_rows(self.rows)
        self.cpu = [group for group in groups if group.gpu == "cpu"]
        self.measured = [group for group in groups if group.gpu != "cpu"]
        self.predicted = by_case(self.predictions)

    @property
    def gpus(self) -> list[str]:
        return sorted({group.gpu for group in self.measured})

    def on(self, gpu: str) -> list[Group]:
        return [group for group in self.measured if group.gpu == gpu]

    def plots(self) -> dict[str, bytes]:
        """PNG files by name; ``main`` is the one for README."""
        found = {}
        if self.predictions:
            found["predicted"] = plot_predicted(self.predictions)
        for gpu in self.gpus:
            slug = environment.gpu_slug(gpu)
            groups = self.on(gpu)
            for subject in dict.fromkeys(group.subject for group in groups if group.is_op):
                chosen = [group for group in groups if group.is_op and group.subject == subject]
                if any(group.ours or group.alternative for group in chosen):
                    found[f"{slug}-{subject}-time"] = plot_times(gpu, subject, chosen)
                    fractions = plot_fractions(gpu, subject, chosen, self.predicted)
                    memory = plot_memory(gpu, subject, chosen)
                    found |= {f"{slug}-{subject}-bandwidth": fractions} if fractions else {}
                    found |= {f"{slug}-{subject}-memory": memory} if memory else {}
            models = [group for group in groups if not group.is_op and (group.ours or group.alternative)]
            if models:
                found[f"{slug}-models"] = plot_models(gpu, models)
            sheet = datasheet(gpu)
            if sheet and self.predictions:
                found[f"{slug}-roofline"] = plot_roofline(sheet, self.predictions, groups)
        if not self.gpus and self.predictions:
            for gpu in limits.GPUS:
                if any(row["gpu"] == gpu.name for row in self.predictions):
                    found[f"roofline-{environment.gpu_slug(gpu.name)}"] = plot_roofline(gpu, self.predictions)
        main = next((name for name in found if name.endswith("-time")), "predicted")
        return ({"main": found[main]} if main in found else {}) | found


_WORKED_OUT = (
    "The least time is the largest of three: least bytes over memory bandwidth, operations over float32 "
    "multiply-add peak, and an estimate of issued instructions over the issue rate. Real kernels take longer."
)


def page(report: Report, plots: Mapping[str, bytes]) -> str:
    """The HTML page: no script, nothing loaded from elsewhere."""
    parts: list[str] = []
    titles: list[tuple[str, str]] = []

    def section(title: str) -> None:
        anchor = environment.gpu_slug(title)
        titles.append((anchor, title))
        parts.append(f'<h2 id="{anchor}">{html.escape(title)}</h2>')

    def image(name: str, text: str) -> None:
        if name in plots:
            parts.append(_image(plots[name], text))

    if not report.gpus:
        parts.append(
            '<div class="notice"><b>Nothing has been measured on a GPU yet.</b> What follows is predicted '
            "from datasheets, or counted; no speed is claimed.</div>"
        )
    for gpu in report.gpus:
        section(f"Measured on {gpu}")
        parts += _gpu_section(report, gpu, plots)
    if report.predictions:
        section("Predicted least times")
        parts.append(f"<p>{_WORKED_OUT} Predicted from datasheets, with an H100's bandwidth and matrix peak "
                     "assumed from elsewhere until this bench has run on one.</p>")  # fmt: skip
        image("predicted", "Predicted least times per case and GPU")
        parts.append(predicted_table(report.predictions, report.measured))
        if not report.gpus:
            parts.append("<h3>Rooflines</h3>")
            for gpu in limits.GPUS:
                image(f"roofline-{environment.gpu_slug(gpu.name)}", f"Roofline of {gpu.name}, predicted")
        parts += [
            "<details><summary>Datasheet figures and their sources</summary>",
            datasheet_table(),
            "</details>",
        ]
    if report.steps is not None:
        section("Launches and bytes, counted")
        parts.append("<p>Counted on tensors without data, in bfloat16: operations that write memory "
                     "(a lower bound of launches) and the bytes they read and write, eager and with the "
                     "kernels of this package where they run. Attention counts as one operation; training is "
                     "forward and backward without the optimizer.</p>")  # fmt: skip
        parts.append(_dictionaries(report.steps, list(limits.Step.__dataclass_fields__)))
    if report.traffic is not None:
        section("Memory traffic, counted")
        parts.append("<p>Counted without a GPU, on small maps: counted are the distinct bytes touched, block "
                     "those of each program summed (from L2), requested everything asked for (from L1); "
                     "least is the formula.</p>")  # fmt: skip
        rows = [
            row | {"counted/least": row["counted_bytes"] / row["least_bytes"] if row["least_bytes"] else None}
            for row in report.traffic
        ]
        columns = ["op", "backend", "case", "direction", "kernel", "counted_bytes", "block_bytes",
                   "requested_bytes", "least_bytes", "counted/least"]  # fmt: skip
        parts.append(_dictionaries(rows, columns))
    if report.resources is not None:
        section("Registers and shared memory, compiled")
        parts.append("<p>Read from the compiled kernels, without a GPU.</p>")
        columns = ["op", "backend", "kernel", "arch", "registers", "spill_bytes", "shared_bytes",
                   "threads", "occupancy", "config"]  # fmt: skip
        parts += ["<details><summary>Every kernel, configuration and architecture "
                  f"({len(report.resources)})</summary>"]  # fmt: skip
        parts += [_dictionaries(report.resources, columns), "</details>"]
    if report.cpu:
        section("CPU timings")
        parts.append("<p>On a CPU, with small batches: they show that everything runs, and say nothing about "
                     "a GPU.</p>")  # fmt: skip
        parts.append(comparison_table(report.cpu, {}))
    missing = [name for name in ("steps", "traffic", "resources") if getattr(report, name) is None]
    if missing:
        flags = ", ".join(f"<code>--with-{name}</code>" for name in missing)
        parts.append(f"<p>Left out of this page: {', '.join(missing)}; {flags} adds them.</p>")
    links = "".join(f'<a href="#{anchor}">{html.escape(title)}</a>' for anchor, title in titles)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>fused-ops: measurements</title><style>{_CSS}</style></head><body>"
        '<h1>fused-ops: measurements</h1><p class="key">'
        '<span class="m">measured</span><span class="p">predicted</span>'
        f"<span>never in the same column</span></p><nav>{links}</nav>{''.join(parts)}</body></html>\n"
    )


def _gpu_section(report: Report, gpu: str, plots: Mapping[str, bytes]) -> list[str]:
    groups = report.on(gpu)
    slug = environment.gpu_slug(gpu)
    rows = [row for group in groups for row in group.rows.values()]
    facts = []
    for name in ("commit", "torch", "triton", "cuda", "cudnn", "driver"):
        values = sorted({getattr(row, name) for row in rows} - {""})
        facts += [f"{name} {', '.join(values)}"] if values else []
    facts.append(max(row.date for row in rows))
    for name, unit, form in (
        ("copy_gb_s", "copy GB/s", ".0f"),
        ("gemm_tflops", "bf16 matrix T/s", ".0f"),
        ("noise_floor", "noise floor", ".1%"),
        ("sm_clock_mhz", "clock MHz", ".0f"),
    ):
        values = [getattr(row, name) for row in rows if getattr(row, name) is not None]
        if values:
            facts.append(f"{unit} {min(values):{form}} to {max(values):{form}}")
    parts = [f"<p>{html.escape('; '.join(facts))}.</p>"]
    for kind, chosen in (
        ("Operators", [group for group in groups if group.is_op]),
        ("Models", [group for group in groups if not group.is_op]),
    ):
        if not chosen:
            continue
        parts.append(f"<h3>{kind}</h3>")
        summary = summarise(gpu, chosen)
        if summary is None:
            parts.append('<p class="notice">Nothing of this package was measured beside an alternative.</p>')
        else:
            tiles = [
                *((f"{share:.0%}", f"at least {least:g} times as fast as the best alternative")
                  for least, share in summary.wins.items()),
                (f"{summary.geometric_mean:.2f}x", "geometric mean"),
                (f"{summary.worst[0]:.2f}x", f"worst: {summary.worst[1]}"),
                (str(summary.count), "comparisons"),
            ]  # fmt: skip
            parts.append('<div class="tiles">')
            parts += [f'<div class="tile"><b>{html.escape(value)}</b><span>{html.escape(text)}</span></div>'
                      for value, text in tiles]  # fmt: skip
            parts.append("</div>")
        if kind == "Models" and f"{slug}-models" in plots:
            parts.append(_image(plots[f"{slug}-models"], f"Images per second and memory on {gpu}"))
            parts.append(_matrix_share(chosen))
        parts.append(comparison_table(chosen, report.predicted))
        if kind == "Models":
            parts += [_profile(row) for row in report.profiles if row["gpu"] == gpu]
        if kind == "Operators":
            for subject in dict.fromkeys(group.subject for group in chosen):
                for what in ("time", "bandwidth", "memory"):
                    if f"{slug}-{subject}-{what}" in plots:
                        text = f"{subject} on {gpu}: {what}"
                        parts.append(_image(plots[f"{slug}-{subject}-{what}"], text))
    if f"{slug}-roofline" in plots:
        parts.append(_image(plots[f"{slug}-roofline"], f"Roofline of {gpu}"))
    return parts


def _profile(row: Mapping[str, Any]) -> str:
    """Where the time of one model step goes, with the line that says what can be gained."""
    lines = [
        ("", [Cell(name), _measured(spent), _measured(100 * spent / row["total_us"]), Cell(str(count), "n")])
        for name, spent, count in row["kernels"]
    ]
    columns = [("kernel", ""), ("us", "n"), ("% of the step", "n"), ("launches", "n")]
    title = f"Kernel times of {row['subject']}: {row['total_us'] / 1e3:.2f} ms a step"
    return (
        f"<details><summary>{html.escape(title)}</summary><p>{html.escape(row['amdahl'])}.</p>"
        f"{_table(columns, lines)}</details>"
    )


def _matrix_share(groups: Sequence[Group]) -> str:
    """Images per second, and the model's operations as a share of the matrix peak of the same run."""
    macs = _macs()
    lines = []
    for group in groups:
        for row in (group.ours, group.alternative):
            rate = images_per_second(row) if row else None
            if row is None or rate is None:
                continue
            # Backward is two more of every product.
            operations = 2 * macs.get(row.model, 0) * (3 if row.mode == "train" else 1)
            share = rate * operations / (row.gemm_tflops * 1e12) if row.gemm_tflops and operations else None
            lines.append(
                (
                    "",
                    (
                        Cell(f"{row.model} {row.case}", "name"),
                        Cell(row.mode),
                        Cell(row.provider),
                        _measured(rate, ",.0f"),
                        _measured(row.peak_bytes, ",.0f", 1e6),
                        _number(share, ".1%", "measured"),
                    ),
                )
            )
    columns = [("model", ""), ("mode", ""), ("provider", ""), ("images/s", "n measured"),
               ("peak MB", "n measured"), ("share of matrix peak", "n measured")]  # fmt: skip
    return _table(columns, lines)


def _macs() -> dict[str, int]:
    """Multiply-accumulates of one image per model; empty where timm is not installed."""
    try:
        from fused_ops.models import model_table
    except ImportError:
        return {}
    return {row["name"]: row["macs"] for row in model_table() if row.get("macs")}


def readme_block(report: Report, plot: str) -> str:
    """Markdown between README's markers.

    Args:
        plot: path of the main plot as README refers to it.
    """
    lines = [BEGIN]
    if not report.gpus:
        lines += [
            "**Nothing has been measured on a GPU yet, so no speed is claimed.** Below are *predicted* least "
            "possible times (microseconds, bfloat16, forward + backward of all calls in one training step) "
            "from datasheet figures; kernels take longer. `fused-ops bench report` makes this block, and a "
            "page with every case.",
            "",
            f"![Predicted least possible times, not measured]({plot})",
            "",
        ]
        gpus = list(dict.fromkeys(row["gpu"] for row in report.predictions))
        lines.append("| *predicted* | " + " | ".join(gpus) + " |")
        lines.append("|---" * (len(gpus) + 1) + "|")
        models = {
            (row["op"], row["case"], row["gpu"]): row["predicted_us"]
            for row in per_model(report.predictions)
            if row["mode"] == "both"
        }
        for op, model in dict.fromkeys(key[:2] for key in models):
            cells = [f"*{models[op, model, gpu]:.0f}*" if (op, model, gpu) in models else "-" for gpu in gpus]
            lines.append(f"| {op}, {model} | " + " | ".join(cells) + " |")
        return "\n".join([*lines, END])
    for gpu in report.gpus:
        groups = [group for group in report.on(gpu) if group.mode in ("eval", "both", "infer", "train")]
        summary = summarise(gpu, groups)
        if summary is not None:
            share = ", ".join(f"{value:.0%} at {least:g}x" for least, value in summary.wins.items())
            lines.append(
                f"**{gpu}**, measured: faster than the best alternative in {share}; "
                f"worst {summary.worst[0]:.2f}x ({summary.worst[1]}). Losing rows first."
            )
        else:
            lines.append(f"**{gpu}**: nothing of this package was measured beside an alternative.")
        lines.append("")
        if gpu == report.gpus[0]:
            lines += [f"![Measured times]({plot})", ""]
        lines.append("| measured | mode | ours us | best alternative us | times faster | share of limit |")
        lines.append("|---|---|---:|---:|---:|---:|")
        for name, mode, mine, theirs, count in compared_per_model(groups, report.predictions):
            lines.append(
                f"| {name}, {count} cases | {mode} | {mine:.0f} | {theirs:.0f} | {theirs / mine:.2f} | - |"
            )
        # Whole models, and of single calls those that lose; the page has them all.
        shown = [
            group
            for group in groups
            if not group.is_op or group.failed or group.ratio is None or group.ratio < 1
        ]
        for group in losing_first(shown):
            ours, other = group.ours, group.alternative
            mine = f"{ours.p50_us:.1f} ({ours.provider})" if ours else NOT_MEASURED
            theirs = f"{other.p50_us:.1f} ({other.provider})" if other else NOT_MEASURED
            ratio = f"{group.ratio:.2f}" if group.ratio is not None else "-"
            fraction = f"{ours.fraction_of_limit:.0%}" if ours and ours.fraction_of_limit else "-"
            lines.append(
                f"| {group.subject} {group.case} | {group.mode} | {mine} | {theirs} | {ratio} | {fraction} |"
            )
        lines.append("")
    return "\n".join([*lines[:-1], END])


def update_readme(path: Path, block: str) -> bool:
    """Replace what lies between the markers in ``path``; whether anything changed.

    Raises:
        ValueError: the markers are not there, each once and in order.
    """
    text = path.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{path} needs the lines {BEGIN} and {END}, each once, around the block")
    new = text[: text.index(BEGIN)] + block + text[text.index(END) + len(END) :]
    if new != text:
        path.write_text(new)
    return new != text


def _rows_of(folder: Path, name: str, wanted: bool, models: Sequence[str]) -> list[dict[str, Any]] | None:
    """Rows of what is counted: made if wanted, else those of the results folder, else None."""
    if not wanted:
        path = folder / f"{name}.json"
        if not path.is_file():
            return None
        if name == "resources":
            return [asdict(row) for row in resources.read_report(path)[1]]
        return _read_json(path)
    if name == "steps":
        return [asdict(step) for step in [*limits.block_steps(), *limits.model_steps(models)]]
    # Processes of their own: counting needs Triton's interpreter, compiling needs it off.
    command = [sys.executable, "-m", f"fused_ops.bench.{name}", "--json"]
    result = subprocess.run(command, capture_output=True, text=True)
    try:
        return json.loads(result.stdout)
    except json.JSONDecodeError:
        last = (result.stderr.strip().splitlines() or ["no output"])[-1]
        raise ValueError(f"--with-{name}: {last}") from None


def _read_json(path: Path) -> list[dict[str, Any]]:
    try:
        rows = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} is not a list of rows")
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="fused-ops bench report",
        description="One HTML page, PNG plots and README's block from the measurements.",
    )
    parser.add_argument("--results", type=Path, help="folder of results (default: those of the checkout)")
    parser.add_argument("--out", type=Path, help="folder to write to (default: report/ in that of results)")
    parser.add_argument("--json", action="store_true", help="print one JSON list, and write the page as well")
    parser.add_argument("--update-readme", action="store_true", help="write README's block")
    parser.add_argument("--readme", type=Path, help="the README to update (default: the checkout's)")
    for name in ("traffic", "resources", "steps"):
        parser.add_argument(f"--with-{name}", action="store_true", help=f"work out the {name} table now")
    parser.add_argument("--models", nargs="*", default=["dsnet_small"], help="models of the steps table")
    options = parser.parse_args(arguments)
    folder = options.results or results.results_root()
    out = options.out or folder / "report"
    readme = options.readme or Path(__file__).resolve().parents[1] / "README.md"
    try:
        if not folder.is_dir():
            raise ValueError(f"--results={folder} is not a folder")
        report = Report(
            results.latest(results.all_rows(folder)),
            limits.all_predictions(),
            **{
                name: _rows_of(folder, name, getattr(options, f"with_{name}"), options.models)
                for name in ("traffic", "resources", "steps")
            },
            profiles=[row for path in sorted(folder.glob("*/profiles.json")) for row in _read_json(path)],
        )
        plots = report.plots()
        out.mkdir(parents=True, exist_ok=True)
        (out / "index.html").write_text(page(report, plots))
        for name, png in plots.items():
            (out / f"{name}.png").write_bytes(png)
        if options.update_readme:
            plot = (out / "main.png").resolve()
            root = readme.resolve().parent
            if not plot.is_relative_to(root):
                raise ValueError(f"--out={out} is outside {root}, so README cannot refer to its plot")
            changed = update_readme(readme, readme_block(report, plot.relative_to(root).as_posix()))
            print(f"{readme}: {'written' if changed else 'as it was'}", file=sys.stderr)
    except (ValueError, OSError) as error:
        print(f"fused-ops bench report: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(combined([*report.measured, *report.cpu], report.predictions), indent=1))
        return 0
    for gpu in report.gpus:
        summary = summarise(gpu, report.on(gpu))
        if summary is not None:
            share = ", ".join(f"{value:.0%} at {least:g}x" for least, value in summary.wins.items())
            worst = f"{summary.worst[0]:.2f}x {summary.worst[1]}"
            print(f"{gpu}: {summary.count} comparisons, won {share}; worst {worst}")
    if not report.gpus:
        print("nothing was measured on a GPU yet; the page shows predictions, labelled as such")
    print(f"{out / 'index.html'} and {len(plots)} plots")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
