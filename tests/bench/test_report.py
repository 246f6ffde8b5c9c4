"""The report on made-up results, in a temporary folder, and on none; no figure here is a measurement."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

from fused_ops.bench import limits, models, report, results
from fused_ops.bench.results import Row
from fused_ops.core import environment

GPU = "NVIDIA H100 80GB HBM3"
DATE = "2000-01-01T00:00:00+00:00"
TIMES = {"eager_nchw": 9.0, "eager_channels_last": 4.0, "compile_default": 3.0, "triton": 1.2, "auto": 1.25}


def made_up_rows(gpu: str = GPU, predictions: list | None = None) -> list[Row]:
    """Rows of every provider, so many times the predicted least time; one case loses, one check fails."""
    if predictions is None:
        predictions = limits.all_predictions([limits.find_gpu(gpu)])
    rows = []
    for number, found in enumerate(predictions):
        for provider, factor in TIMES.items():
            ours = provider in ("triton", "auto")
            slow = 3.5 if ours and found["case"] == "dsnet_local_256x7" and found["mode"] == "both" else 1.0
            failed = provider == "triton" and found["case"] == "dsnet_positional_512x7"
            microseconds = (
                None if failed else found["predicted_us"] * factor * slow * (1 + 0.01 * (number % 5))
            )
            rows.append(
                Row(
                    gpu=gpu,
                    op=found["op"],
                    model=found["model"],
                    case=found["case"],
                    mode=found["mode"],
                    provider=provider,
                    dtype="bfloat16",
                    p20_us=microseconds and microseconds * 0.99,
                    p50_us=microseconds,
                    p80_us=microseconds and microseconds * 1.01,
                    ratio_to_best_alternative=None,
                    fraction_of_limit=microseconds and found["predicted_us"] / microseconds,
                    peak_bytes=int(found["bytes"] * (1 if ours else 1.6)),
                    saved_bytes=int(found["bytes"] * (0.3 if ours else 0.7)),
                    commit="0000000",
                    driver="0.0",
                    torch="2.11.0",
                    cudnn="0",
                    triton="3.6.0",
                    cuda="13.0",
                    l2="cold",
                    graph=True,
                    note="failed: made-up check" if failed else "",
                    copy_gb_s=2950.0,
                    gemm_tflops=780.0,
                    noise_floor=0.004,
                    sm_clock_mhz=1755.0,
                    date=DATE,
                )
            )
    return rows


def made_up_models(gpu: str = GPU) -> list[Row]:
    return [
        Row(
            gpu=gpu,
            op="",
            model=model,
            case=f"{batch}x3x224x224",
            mode=mode,
            provider=provider,
            dtype="bfloat16",
            p50_us=batch * 100.0 * factor * (3 if mode == "train" else 1),
            peak_bytes=int(batch * 5e7 * factor),
            l2="warm",
            graph=batch == 1,
            gemm_tflops=780.0,
            date=DATE,
        )
        for model in ("dsnet_tiny", "dsnet_small")
        for batch, mode in ((1, "infer"), (128, "infer"), (128, "train"))
        for provider, factor in (("eager_channels_last", 2.0), ("compile_default", 1.3), ("auto", 1.0))
    ]


@pytest.fixture(scope="module")
def predictions():
    return limits.all_predictions([limits.find_gpu("h100"), limits.find_gpu("l40s")])


@pytest.fixture(scope="module")
def h100(predictions):
    cases = ("dsnet_positional_64x56", "dsnet_positional_512x7", "dsnet_local_256x7")
    chosen = [row for row in predictions if row["gpu"] == "H100 SXM" and row["case"] in cases]
    return made_up_rows(predictions=chosen)


@pytest.fixture(scope="module")
def full(h100, predictions):
    steps = [{"kind": "block", "name": "stage1", "launches": 3, "bytes": 1000}]
    return report.Report([*h100, *made_up_models()], predictions, steps=steps)


def group_of(times, **changes):
    rows = [
        Row(GPU, "depthwise", "", "case", "forward", name, "bfloat16", p50_us=time, l2="cold", graph=True)
        for name, time in times.items()
    ]
    (group,) = report.group_rows(rows)
    return group


def test_ratio_is_to_the_fastest_alternative():
    group = group_of({"eager_nchw": 90.0, "compile_default": 30.0, "triton": 20.0, "auto": 25.0})
    assert (group.ours.provider, group.alternative.provider, group.ratio) == (
        "triton",
        "compile_default",
        1.5,
    )


def test_a_failed_check_gives_no_ratio():
    rows = [
        Row(GPU, "depthwise", "", "c", "forward", "triton", "bfloat16", p50_us=1.0, note="failed: wrong"),
        Row(GPU, "depthwise", "", "c", "forward", "eager_nchw", "bfloat16", p50_us=9.0),
    ]
    (group,) = report.group_rows(rows)
    assert group.ratio is None
    assert [row.provider for row in group.failed] == ["triton"]


def test_rows_without_figures_join_their_case():
    rows = [
        Row(GPU, "depthwise", "", "c", "eval", "cuda", "bfloat16", note="not measured: no CUDA backend"),
        Row(GPU, "depthwise", "", "c", "eval", "eager_nchw", "bfloat16", p50_us=9.0, l2="cold", graph=True),
        Row(GPU, "depthwise", "", "c", "eval", "eager_nchw", "bfloat16", p50_us=2.0, l2="warm", graph=True),
    ]
    (group,) = report.group_rows(rows)
    assert (group.l2, set(group.rows)) == ("cold", {"cuda", "eager_nchw"})


def test_summary():
    times = [(10.0, 5.0), (30.0, 20.0), (10.0, 10.0), (10.0, 20.0)]
    groups = [group_of({"eager_nchw": other, "triton": ours}) for other, ours in times]
    summary = report.summarise(GPU, groups)
    # Ratios 2, 1.5, 1 and 0.5.
    assert summary.wins == {1.0: 0.75, 1.5: 0.5, 2.0: 0.25}
    assert summary.worst == (0.5, "depthwise case forward")
    assert summary.geometric_mean == pytest.approx(math.prod((2, 1.5, 1, 0.5)) ** 0.25)
    assert [group.ratio for group in report.losing_first(groups)] == [0.5, 1.0, 1.5, 2.0]
    assert report.summarise(GPU, []) is None


def test_images_per_second():
    row = Row(GPU, "", "dsnet_tiny", "128x3x224x224", "infer", "auto", "bfloat16", p50_us=64_000.0)
    assert report.images_per_second(row) == pytest.approx(2000.0)


def test_combined_never_mixes(full, predictions):
    entries = report.combined(full.measured, predictions)
    h100 = [entry for entry in entries if entry["gpu"] == GPU and entry["subject"] == "depthwise"]
    assert len(h100) == 12
    assert all(entry["measured"] and entry["predicted_us"] for entry in h100)
    l40s = [entry for entry in entries if entry["gpu"] == "L40S"]
    assert l40s
    assert all(entry["measured"] is None for entry in l40s)
    json.dumps(entries)


def test_page(full):
    text = report.page(full, full.plots())
    assert "Nothing has been measured" not in text
    for expected in (f"Measured on {GPU}", "failed: made-up check", "0.71", "stage1", "images/s"):
        assert expected in text
    # The losing row comes before those that win, and after the failed check.
    table = text[text.index("<table") :]
    assert table.index("dsnet_positional_512x7") < table.index("dsnet_local_256x7")
    assert table.index("dsnet_local_256x7") < table.index("dsnet_positional_64x56")
    self_contained(text)
    cells = re.findall(r'<td class="([^"]*)">', text)
    assert not any("predicted" in kind and "measured" in kind for kind in cells)


def self_contained(text):
    assert not re.search(r"https?://|<script|<link|@import|url\(", text)
    assert all(source.startswith("data:image/png;base64,") for source in re.findall(r'src="([^"]*)', text))


def test_page_without_results(predictions):
    empty = report.Report([], predictions)
    plots = empty.plots()
    assert plots["main"] == plots["predicted"]
    text = report.page(empty, plots)
    self_contained(text)
    assert "Nothing has been measured on a GPU yet" in text
    assert 'class="n measured">' not in text.split("<tbody>", 1)[1].replace('<th class="n measured">', "")
    assert "not measured" in text


def test_cpu_rows_are_called_so(predictions):
    page = report.page(report.Report(made_up_rows("cpu", predictions[:4]), predictions), {})
    assert "Nothing has been measured on a GPU yet" in page
    assert page.index("CPU timings") < page.index("say nothing about a GPU")


def test_readme_block(full, predictions):
    empty = report.readme_block(report.Report([], predictions), "plot.png")
    assert "no speed is claimed" in empty
    # Least times of one call (microseconds on an H100), and how often a step of DS-Net-S makes it.
    positional, local = ((87, 3), (44, 4), (27, 8), (11, 3)), ((77, 3), (39, 4), (24, 8), (10, 3))
    (line,) = (line for line in empty.splitlines() if line.startswith("| depthwise, dsnet_small "))
    assert float(line.split("*")[1]) == pytest.approx(sum(t * n for t, n in (*positional, *local)), rel=0.01)
    measured = report.readme_block(full, "plot.png")
    assert measured.startswith(report.BEGIN)
    assert measured.endswith(report.END)
    assert "predicted" not in measured
    # Of single calls only those that lose are listed; the others are in the sum.
    assert "dsnet_positional_64x56" not in measured
    (line,) = (
        line for line in measured.splitlines() if line.startswith("| depthwise, dsnet_small, 3 cases | both")
    )
    ours, theirs, times = (float(cell) for cell in line.split("|")[3:6])
    assert times == pytest.approx(theirs / ours, abs=0.01)
    assert "| dsnet_small 128x3x224x224 | train |" in measured


def test_measured_sums_are_weighted_by_calls(predictions):
    times = {"eager_nchw": 10.0, "triton": 4.0}
    rows = [
        Row(
            GPU,
            "depthwise",
            "dsnet_small",
            case,
            "both",
            name,
            "bfloat16",
            p50_us=time,
            l2="cold",
            graph=True,
        )
        for case in ("dsnet_positional_64x56", "dsnet_positional_320x14")
        for name, time in times.items()
    ]
    # 3 calls of the first and 8 of the second in one step.
    assert report.compared_per_model(report.group_rows(rows), predictions) == [
        ("depthwise, dsnet_small", "both", 44.0, 110.0, 2)
    ]


def test_command(tmp_path, capsys, monkeypatch, predictions, h100):
    monkeypatch.setattr(limits, "all_predictions", lambda: predictions)
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    folder = tmp_path / "results"
    results.write_rows(folder / environment.gpu_slug(GPU) / "ops.csv", h100[:60])
    (folder / "steps.json").write_text('[{"kind": "block", "name": "from a file"}]')
    arguments = ["--results", str(folder), "--readme", str(readme), "--update-readme"]
    assert report.main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "](results/report/main.png)" in text
    out = folder / "report"
    assert (out / "main.png").read_bytes().startswith(b"\x89PNG")
    assert "from a file" in (out / "index.html").read_text()


def test_bad_input(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(limits, "all_predictions", list)
    (tmp_path / "traffic.json").write_text("{}")
    readme = tmp_path / "README.md"
    readme.write_text("no markers")
    for arguments, word in (
        (["--results", str(tmp_path / "no")], "not a folder"),
        (["--results", str(tmp_path)], "not a list of rows"),
    ):
        assert report.main(arguments) == 2
        assert word in capsys.readouterr().err
    with pytest.raises(ValueError, match="bench:begin"):
        report.update_readme(Path(readme), "block")


def test_kernel_times_are_in_the_page(predictions, tmp_path):
    """Where a model step's time goes, and how much could be gained, beside the model's own figures."""
    path = tmp_path / "profiles.json"
    first = models.Profile((("gemm", 2e-3, 7), ("depthwise", 1e-3, 3)), 4e-3, 1e-3)
    models.write_profiles(path, GPU, "c0ffee", {"dsnet_tiny train b8_224 auto": first})
    second = models.Profile((("gemm", 1e-3, 7),), 2e-3, 1e-3)
    models.write_profiles(path, GPU, "c0ffee", {"dsnet_tiny infer b8_224 auto": second})
    rows = json.loads(path.read_text())
    assert [row["subject"].split()[1] for row in rows] == ["infer", "train"]
    assert rows[1]["kernels"] == [["gemm", 2000.0, 7], ["depthwise", 1000.0, 3]]
    made = report.Report(made_up_models(), predictions, profiles=rows)
    text = report.page(made, {})
    assert "Kernel times of dsnet_tiny train b8_224 auto: 4.00 ms a step" in text
    # A quarter of the time, made twice as fast.
    assert "f = 0.250" in text
    assert "1.14x" in text
