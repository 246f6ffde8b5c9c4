"""bench/gpu.sh with a stand-in for Python: order, budget, resume, stop at the first thing that matters."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "bench" / "gpu.sh"
STAGES = ["environment", "build", "smoke", "bench_tests", "step_dsnet_small"]


@pytest.fixture
def run(tmp_path):
    """Run the script with a program in Python's place that appends its arguments to a file."""
    calls = tmp_path / "calls"

    def run(*arguments: str, body: str = "") -> tuple[subprocess.CompletedProcess, list[str]]:
        python = tmp_path / "python"
        python.write_text(f'#!/bin/sh\necho "$@" >> {calls}\n{body}\n')
        python.chmod(0o755)
        calls.write_text("")
        result = subprocess.run(
            ["bash", str(SCRIPT), "--out", str(tmp_path / "results"), *arguments],
            env={**os.environ, "PYTHON": str(python)},
            capture_output=True,
            text=True,
            timeout=120,
        )
        return result, calls.read_text().splitlines()

    return run


def test_dry_run_lists_every_stage_and_runs_nothing(run, tmp_path):
    result, calls = run("--dry-run")
    assert result.returncode == 0
    assert calls == []
    assert not (tmp_path / "results").exists()
    lines = result.stdout.splitlines()
    assert lines[0].startswith("install: ")
    assert "--no-index --no-build-isolation --no-deps" in lines[0]
    assert [line.split()[0] for line in lines[1:6]] == STAGES
    assert lines[-1].startswith("report ")


def test_runs_everything_once_and_resumes(run, tmp_path):
    first, calls = run("--seconds", "3000")
    assert first.returncode == 0, first.stdout + first.stderr
    assert "failed: none; left out: none" in first.stdout
    assert sum("-m pytest" in call for call in calls) == 3
    assert (tmp_path / "results" / "smoke.log").exists()
    second, calls = run("--seconds", "3000")
    assert second.returncode == 0
    # Only the installation runs again.
    assert len(calls) == 1
    assert second.stdout.count("done before") == first.stdout.count("s left")
    _, again = run("--seconds", "3000", "--again")
    assert len(again) > 5


def test_what_does_not_fit_is_left_out_and_named(run):
    result, calls = run("--seconds", "25")
    assert result.returncode == 0
    assert "== smoke: left out, needs 30 s" in result.stdout
    assert "left out: smoke step_dsnet_small" in result.stdout
    assert not any("three_way" in call for call in calls)
    # A short stage further down still runs.
    assert any("report" in call for call in calls)


def test_wrong_kernels_are_not_measured(run):
    result, calls = run("--seconds", "3000", body='case "$*" in *three_way*) exit 1;; esac')
    assert result.returncode == 1
    assert "failed: smoke" in result.stdout
    assert not any("bench" in call for call in calls if "-m pytest" not in call)


def test_a_failing_measurement_does_not_stop_the_rest_and_is_tried_again(run):
    broken = 'case "$*" in *"--op depthwise"*) echo broken; exit 3;; esac'
    result, _ = run("--seconds", "3000", body=broken)
    assert result.returncode == 1
    assert "failed: ops_depthwise; left out: none" in result.stdout
    result, calls = run("--seconds", "3000")
    assert result.returncode == 0
    assert [call for call in calls if "bench ops" in call] == [
        call for call in calls if "--op depthwise" in call
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--second", "5"), "unknown argument '--second'"),
        (("--seconds", "0"), "--seconds '0' is not allowed"),
    ],
)
def test_bad_arguments(run, arguments, message):
    result, calls = run(*arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert calls == []
