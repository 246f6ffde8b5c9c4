"""The dispatch table: made-up rows by hand, and the committed one against the committed results."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fused_ops
from fused_ops.bench import dispatch, results
from fused_ops.bench.results import Row
from fused_ops.core import backends
from fused_ops.core import dispatch as core_dispatch
from fused_ops.core.dispatch import PATH
from fused_ops.core.tuning import nearest

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
    assert json.loads(PATH.read_text()) == table
    assert PATH.read_text() == dispatch.to_text(table)


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
    assert (both["kind"]["training"], both["kind"]["batch_stats"]) == (True, True)
    assert (both["backend"], both["ratio"]) == ("reference", 0.5)
    assert evaluation == {
        "kind": {
            "training": False,
            "dtype": "torch.bfloat16",
            "channels_last": True,
            "kernel": "3x3",
            "stride": "1x1",
            "dilation": "1x1",
            "norm": "pre",
            "batch_stats": False,
            "residual": "identity after",
        },
        "sizes": [32, 56, 56],
        "case": CASE,
        "backend": "triton",
        "ratio": 2.5,
    }
    json.loads(dispatch.to_text(table))


def test_nearest_entry():
    near, far = ((64, 56, 56), "cuda", 2.0, "near"), ((64, 14, 14), "triton", 2.0, "far")
    assert nearest((64, 56, 56), (far, near))[-1] == "near"
    assert nearest((96, 40, 60), (far, near))[-1] == "near"
    assert nearest((40, 20, 28), (far, near))[-1] == "far"
    assert nearest((64, 224, 224), (far, near)) is None
    assert nearest((64, 56, 56), ()) is None


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """A table for a made-up GPU, on which fake tensors lie and the Triton kernels can run."""
    times = {"eager_nchw": 10.0, "triton": 20.0}
    both = rows(times, mode="both")
    table = dispatch.dispatch_table([*both, *rows({"eager_nchw": 20.0, "triton": 10.0})])
    (tmp_path / "dispatch.json").write_text(dispatch.to_text(table))
    monkeypatch.setattr(core_dispatch, "PATH", tmp_path / "dispatch.json")
    monkeypatch.setattr(core_dispatch, "_gpu_name", lambda device: "Made-up GPU")
    monkeypatch.setattr(backends, "triton_status", lambda device=None: (True, ""))
    for cached in (core_dispatch._table, core_dispatch._entries):
        cached.cache_clear()
    yield
    for cached in (core_dispatch._table, core_dispatch._entries):
        cached.cache_clear()


@pytest.mark.parametrize(
    ("training", "size", "backend", "reason"),
    [
        (True, 56, "reference", f"stock PyTorch was measured faster for {CASE}"),
        (False, 56, "triton", f"measured fastest for {CASE} (2 times the best alternative)"),
        (True, 48, "reference", f"stock PyTorch was measured faster for {CASE}"),
        (True, 8, "triton", "first in the order of auto that can run"),
    ],
)
def test_auto_takes_what_was_measured_faster(measured, recwarn, training, size, backend, reason):
    with FakeTensorMode(), torch.device("cuda"):
        module = fused_ops.DepthwiseConvBNAct(32, bias=True, norm_placement="pre", identity=True)
        x = torch.empty(4, 32, size, size, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
        with backends.record() as choices, torch.set_grad_enabled(training):
            module.train(training)(x)
    assert [(choice.backend, choice.reason) for choice in choices] == [(backend, reason)]
    # The reference path by measurement is nothing to warn of.
    assert not [warning for warning in recwarn if "runs on the reference path" in str(warning.message)]


def test_command(tmp_path, capsys):
    results.write_rows(tmp_path / "made-up-gpu" / "ops.csv", rows({"eager_nchw": 50.0, "triton": 20.0}))
    arguments = ["--results", str(tmp_path), "--out", str(tmp_path / "table.json")]
    assert dispatch.main([*arguments, "--check"]) == 1
    assert dispatch.main(arguments) == 0
    assert dispatch.main([*arguments, "--check"]) == 0
    assert dispatch.main(["--results", str(tmp_path / "no")]) == 2
    assert "is not a folder" in capsys.readouterr().err
