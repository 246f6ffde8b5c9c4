"""The dispatch table: made-up rows by hand, and the committed one against the committed results."""

from __future__ import annotations

import dataclasses
import json

import torch

from fused_ops.bench import dispatch, results
from fused_ops.bench.results import Row
from fused_ops.core import library

CASE = "dsnet_local_32x56"
BASE = Row(
    gpu="Made-up GPU",
    op="depthwise",
    model="dsnet_small",
    case=CASE,
    mode="eval",
    provider="",
    dtype="bfloat16",
    l2="cold",
    graph=True,
)


def rows(times, **changes):
    return [dataclasses.replace(BASE, provider=name, p50_us=time, **changes) for name, time in times.items()]


def test_the_committed_table_is_what_the_committed_results_give():
    table = dispatch.dispatch_table(results.all_rows())
    assert json.loads(dispatch.table_path().read_text()) == table
    assert dispatch.table_path().read_text() == dispatch.to_text(table)


def test_the_fastest_kernel_wins():
    times = {"eager_nchw": 50.0, "compile_default": 30.0, "triton": 20.0, "cuda": 15.0, "auto": 1.0}
    assert dispatch.best(rows(times)) == ("cuda", 2.0)


def test_a_kernel_slower_than_stock_is_not_used():
    assert dispatch.best(rows({"eager_channels_last": 10.0, "triton": 20.0})) == ("reference", 0.5)


def test_a_wrong_kernel_is_not_used():
    found = rows({"eager_nchw": 50.0, "triton": 20.0})
    wrong = rows({"cuda": 10.0}, note="failed: 3 times the error of eager")
    assert dispatch.best([*found, *wrong]) == ("triton", 2.5)
    assert dispatch.best([*rows({"eager_nchw": 50.0}), *wrong]) == ("reference", 1.0)


def test_without_a_comparison_there_is_no_entry():
    assert dispatch.best(rows({"triton": 1.0})) is None
    assert dispatch.best(rows({"eager_nchw": 1.0})) is None
    assert dispatch.best([*rows({"triton": 1.0}), *rows({"eager_nchw": 2.0}, l2="warm")]) is None


def test_cold_graphs_decide_first():
    cold = rows({"eager_nchw": 10.0, "triton": 20.0})
    warm = rows({"eager_nchw": 20.0, "triton": 10.0}, l2="warm")
    assert dispatch.best([*warm, *cold]) == ("reference", 0.5)


def test_table():
    times = {"eager_nchw": 50.0, "triton": 20.0}
    training = rows({"eager_nchw": 10.0, "triton": 20.0}, mode="both")
    cpu = rows(times, gpu="cpu")
    gone = rows(times, case="no such case")
    table = dispatch.dispatch_table([*rows(times), *training, *cpu, *gone])
    assert list(table) == ["Made-up GPU"]
    both, evaluation = table["Made-up GPU"]["depthwise"]
    assert (both["training"], both["batch_stats"], both["backend"], both["ratio"]) == (
        True,
        True,
        "reference",
        0.5,
    )
    assert evaluation | {"case": CASE} == evaluation
    expected = {
        "training": False,
        "dtype": "bfloat16",
        "x_shape": [128, 32, 56, 56],
        "weight_shape": [32, 1, 3, 3],
        "stride": [1, 1],
        "norm": "pre",
        "batch_stats": False,
        "activation": "none",
        "identity": True,
        "bias": True,
        "backend": "triton",
        "ratio": 2.5,
    }
    assert expected.items() <= evaluation.items()
    json.loads(dispatch.to_text(table))


def test_conditions_of_every_model_case_differ():
    operator = library.operators()["depthwise"]
    cases = [case for case in operator.cases() if "model" in case.tags]
    found = {json.dumps(dispatch.conditions(operator, case, "both", torch.bfloat16)) for case in cases}
    assert len(found) == len(cases)


def test_command(tmp_path, capsys):
    results.write_rows(tmp_path / "made-up-gpu" / "ops.csv", rows({"eager_nchw": 50.0, "triton": 20.0}))
    arguments = ["--results", str(tmp_path), "--out", str(tmp_path / "table.json")]
    assert dispatch.main([*arguments, "--check"]) == 1
    assert dispatch.main(arguments) == 0
    assert dispatch.main([*arguments, "--check"]) == 0
    assert dispatch.main(["--results", str(tmp_path / "no")]) == 2
    assert "is not a folder" in capsys.readouterr().err
