"""Rows and their files: what is written survives a kill, and a second run goes on where the first stopped."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fused_ops.bench import __main__ as bench
from fused_ops.bench import results
from fused_ops.bench.results import COLUMNS, Row, Store
from fused_ops.core import environment

CONTRACT = [
    "gpu",
    "op",
    "model",
    "case",
    "mode",
    "provider",
    "dtype",
    "p20_us",
    "p50_us",
    "p80_us",
    "ratio_to_best_alternative",
    "fraction_of_limit",
    "peak_bytes",
    "saved_bytes",
    "commit",
]
ROW = Row("NVIDIA H100 80GB HBM3", "depthwise", "m", "case", "both", "auto", "bfloat16")


def row(**columns) -> Row:
    return dataclasses.replace(ROW, **columns)


def test_columns_start_with_the_documented_ones():
    assert list(COLUMNS[: len(CONTRACT)]) == CONTRACT


def test_rows_survive_the_file(tmp_path):
    rows = [
        row(
            p20_us=1.5, p50_us=2.25, p80_us=1234.5, graph=True, l2="cold", saved_bytes=2**40, note='a, "b"\nc'
        ),
        row(provider="triton", note="not measured: no GPU"),
    ]
    results.write_rows(tmp_path / "ops.csv", rows)
    assert results.read_rows(tmp_path / "ops.csv") == rows
    assert os.listdir(tmp_path) == ["ops.csv"]


def test_a_missing_file_has_no_rows(tmp_path):
    assert results.read_rows(tmp_path / "ops.csv") == []


def test_a_file_of_other_columns_is_refused(tmp_path):
    (tmp_path / "ops.csv").write_text("gpu,op\nx,y\n")
    with pytest.raises(ValueError, match="has the columns"):
        results.read_rows(tmp_path / "ops.csv")


def test_a_bad_figure_is_named(tmp_path):
    results.write_rows(tmp_path / "ops.csv", [row(p50_us=1.0)])
    text = (tmp_path / "ops.csv").read_text().replace(",1,", ",fast,")
    (tmp_path / "ops.csv").write_text(text)
    with pytest.raises(ValueError, match=r"ops\.csv, line 2.*fast"):
        results.read_rows(tmp_path / "ops.csv")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "ops.csv"
    results.write_rows(path, [ROW])

    def broken():
        yield ROW
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        results.write_rows(path, broken())
    assert results.read_rows(path) == [ROW]
    assert os.listdir(tmp_path) == ["ops.csv"]


def test_a_new_commit_is_added_and_the_same_one_replaced(tmp_path):
    store = Store(tmp_path / "gpu" / "ops.csv")
    store.add([row(commit="a", p50_us=1.0), row(commit="a", provider="cuda")])
    store.add([row(commit="b", p50_us=2.0)])
    store.add([row(commit="a", p50_us=3.0)])
    again = Store(tmp_path / "gpu" / "ops.csv")
    assert [(entry.commit, entry.provider, entry.p50_us) for entry in again.rows] == [
        ("a", "cuda", None),
        ("b", "auto", 2.0),
        ("a", "auto", 3.0),
    ]
    assert len(again.find("a", case="case", provider="auto")) == 1
    assert not again.find("c", case="case")


def test_a_store_without_a_file_keeps_rows_in_memory():
    store = Store(None)
    store.add([ROW])
    assert store.rows == [ROW]


def test_latest_takes_the_newest_of_each_key():
    rows = [
        row(commit="a", date="2026-01-02", p50_us=1.0),
        row(commit="b", date="2026-01-03", p50_us=2.0),
        row(commit="c", date="2026-01-01", p50_us=3.0),
        row(commit="a", date="2026-01-02", l2="warm", p50_us=4.0),
    ]
    assert [(entry.commit, entry.l2) for entry in results.latest(rows)] == [("b", ""), ("a", "warm")]


def test_a_failed_check_hides_older_figures():
    good = row(commit="a", date="2026-01-01", p50_us=1.0, l2="cold", graph=True)
    failed = row(commit="b", date="2026-01-02", note="failed: out: error 1 above 0.1")
    mended = row(commit="c", date="2026-01-03", p50_us=2.0, l2="cold", graph=True)
    assert results.latest([good, failed]) == [failed]
    assert results.latest([good, failed, mended]) == [mended]


def test_adding_a_case_again_replaces_its_reasons_for_not_measuring():
    store = Store(None)
    store.add([row(commit="a", note="not measured: out of memory")])
    store.add([row(commit="a", l2=kind, p50_us=1.0) for kind in ("cold", "warm")])
    assert [(entry.l2, entry.p50_us) for entry in store.rows] == [("cold", 1.0), ("warm", 1.0)]


def test_slug_and_paths(tmp_path):
    assert environment.gpu_slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert results.results_path("cpu", "ops", None) is None
    assert results.results_path("cpu", "ops", str(tmp_path)) == tmp_path / "cpu" / "ops.csv"
    committed = results.results_path("NVIDIA L4", "models", None)
    assert committed.parts[-4:] == ("bench", "results", "nvidia-l4", "models.csv")


WRITER = """
import dataclasses, sys
from pathlib import Path
from fused_ops.bench.results import Row, Store
store = Store(Path(sys.argv[1]))
done = {row.case for row in store.rows}
for number in range(int(sys.argv[2])):
    case = f"case{number}"
    if case not in done:
        store.add([Row("gpu", "op", "", case, "both", "auto", "bfloat16", p50_us=float(number), commit="c")])
        print(case, flush=True)
"""


def test_a_kill_while_writing_loses_nothing_that_was_finished(tmp_path):
    path = tmp_path / "ops.csv"
    command = [sys.executable, "-c", WRITER, str(path)]
    process = subprocess.Popen([*command, "100000"], stdout=subprocess.PIPE, text=True)
    seen = []
    try:
        while len(seen) < 40:
            seen.append(process.stdout.readline().strip())
        # Somewhere in the middle of a write, most likely.
        time.sleep(0.003)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        rest = process.stdout.read().split()
        process.stdout.close()
    rows = results.read_rows(path)
    finished = {entry.case for entry in rows}
    assert finished.issuperset([*seen, *rest])
    assert all(math.isfinite(entry.p50_us) for entry in rows)
    # The second run writes only what is missing.
    count = len(rows)
    output = subprocess.run([*command, str(count + 3)], capture_output=True, text=True, check=True).stdout
    assert output.split() == [f"case{count}", f"case{count + 1}", f"case{count + 2}"]
    assert len(results.read_rows(path)) == count + 3


def written(folder: Path) -> Path:
    root = folder / "results"
    results.write_rows(
        root / "nvidia-h100-80gb-hbm3" / "ops.csv",
        [row(date="2026-01-01", p50_us=1.0), row(date="2026-01-02", p50_us=2.0)],
    )
    return root


def test_command_lists_results_as_json(tmp_path, capsys):
    root = written(tmp_path)
    assert bench.main(["results", "--results", str(root), "--json", "--gpu", "H100"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [list(entry) for entry in found] == [list(COLUMNS)]
    assert found[0]["p50_us"] == 2.0
    assert bench.main(["results", "--results", str(root), "--json", "--all"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 2


def test_command_prints_a_table(tmp_path, capsys):
    assert bench.main(["results", "--results", str(written(tmp_path))]) == 0
    assert "depthwise case" in capsys.readouterr().out
    assert bench.main(["results", "--results", str(tmp_path / "none")]) == 0
    assert "no results" in capsys.readouterr().out


def test_command_refuses_an_unknown_gpu(tmp_path, capsys):
    assert bench.main(["results", "--results", str(written(tmp_path)), "--gpu", "A100"]) == 2
    assert "--gpu='A100' matches none of ['NVIDIA H100" in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "message"), [(["fly"], "unknown command 'fly'"), ([], "is missing")])
def test_unknown_commands_are_refused(arguments, message, capsys):
    assert bench.main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "resources" in captured.err


def test_usage_names_every_command(capsys):
    assert bench.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in bench.COMMANDS)
