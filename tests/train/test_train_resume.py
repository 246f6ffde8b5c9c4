"""A run that was stopped anywhere goes on as if it had not been, bit for bit."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from training_helpers import CONVNEXT, arguments, epochs, losses

from fused_ops.train import main
from fused_ops.train.checkpoint import LAST, load_state, save_state
from fused_ops.train.engine import Engine
from fused_ops.train.presets import PRESETS
from fused_ops.train.report import METRICS
from fused_ops.train.settings import SETTINGS_FILE

UPDATES_PER_EPOCH = 3


@pytest.fixture(scope="module", params=[CONVNEXT, "dsnet_test"])
def reference(request, image_folder, tmp_path_factory):
    """An uninterrupted run. dsnet_test adds BatchNorm's running statistics to the state."""
    run = tmp_path_factory.mktemp("reference") / "run"
    assert main(arguments(image_folder, run, model=request.param)) == 0
    assert len(losses(run)) == 3 * UPDATES_PER_EPOCH
    return request.param, run


def assert_equal_runs(run: Path, reference: Path) -> None:
    assert losses(run) == losses(reference)
    assert epochs(run) == epochs(reference)
    ours, theirs = load_state(run / LAST), load_state(reference / LAST)
    for part in ("model", "ema"):
        assert ours[part].keys() == theirs[part].keys()
        for name, value in theirs[part].items():
            assert torch.equal(ours[part][name], value), f"{part}: {name}"
    for key, slots in theirs["optimizer"]["state"].items():
        for name, value in slots.items():
            assert torch.equal(ours["optimizer"]["state"][key][name], value), f"optimizer: {key} {name}"


def scramble_generators() -> None:
    random.seed(12345)
    np.random.seed(12345)
    torch.manual_seed(12345)


def signal_at(monkeypatch: pytest.MonkeyPatch, method: str, call: int, number: int) -> None:
    """Send this process a signal in the `call`-th call of a method of the engine."""
    original, calls = getattr(Engine, method), []

    def wrapped(*args, **kwargs):
        calls.append(None)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    monkeypatch.setattr(Engine, method, wrapped)


# The call of a method of the engine, the signal, and the exit code.
STOPS = {
    "mid-epoch": ("update", UPDATES_PER_EPOCH + 2, signal.SIGTERM, 143),
    "after the last update of an epoch": ("update", UPDATES_PER_EPOCH, signal.SIGINT, 130),
    "evaluation": ("evaluate", 2, signal.SIGTERM, 143),
    "last evaluation": ("evaluate", 5, signal.SIGTERM, 143),
}


@pytest.mark.parametrize(
    ("method", "call", "number", "code", "workers"),
    [
        # Workers begin in the middle of an epoch in the first alone.
        pytest.param(
            *(*stop, workers),
            id=f"{workers}-{name}",
            marks=pytest.mark.extended if workers and name != "mid-epoch" else (),
        )
        for name, stop in STOPS.items()
        for workers in (0, 2)
    ],
)
def test_stop_and_resume(
    reference, image_folder, tmp_path, monkeypatch, capsys, method, call, number, code, workers
):
    model, expected = reference
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        signal_at(patch, method, call, number)
        assert main(arguments(image_folder, run, model=model)) == code
    message = capsys.readouterr().err
    assert f"Stopped by {signal.Signals(number).name}" in message
    assert f"fused-ops train --resume {run}" in message
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL

    scramble_generators()
    assert main([f"--resume={run}", f"--workers={workers}"]) == 0
    assert_equal_runs(run, expected)


def test_resume_at_an_epoch_boundary(reference, image_folder, tmp_path, monkeypatch):
    model, expected = reference
    run = tmp_path / "run"

    class PowerCutError(Exception):
        pass

    original = Engine.update

    def update(self, next_batch, epoch, number):
        if epoch == 1:
            raise PowerCutError
        return original(self, next_batch, epoch, number)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "update", update)
        with pytest.raises(PowerCutError):
            main(arguments(image_folder, run, model=model))
    scramble_generators()
    assert main([f"--resume={run}"]) == 0
    assert_equal_runs(run, expected)


def rates(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / METRICS).read_text().splitlines()]
    return [row["lr"] for row in rows if row["kind"] == "update"]


def test_resume_between_decays(image_folder, tmp_path, monkeypatch):
    """The rate falls after epochs 1 and 2; the run stops in epoch 2."""
    changes = {"schedule": "multistep", "decay_milestones": "1,2", "decay_rate": 0.5, "warmup_epochs": 0.5}
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert main(arguments(image_folder, whole, **changes)) == 0
    with monkeypatch.context() as patch:
        signal_at(patch, "update", UPDATES_PER_EPOCH + 2, signal.SIGTERM)
        assert main(arguments(image_folder, stopped, **changes)) == 143
    assert main([f"--resume={stopped}"]) == 0
    assert_equal_runs(stopped, whole)
    peak = 0.05 * 8 / 512
    ramp = [1e-6 + k / 2 * (peak - 1e-6) for k in range(2)]
    assert rates(stopped) == rates(whole) == pytest.approx([*ramp, peak, *[peak / 2] * 3, *[peak / 4] * 3])


def test_run_from_before_a_setting_existed(image_folder, tmp_path, monkeypatch, capsys):
    """It goes on along the cosine that it began with, whatever its preset has become.

    What is to be known of the preset is said at the start alone.
    """
    run = tmp_path / "run"
    changes = {"preset": "fishnet", "schedule": "cosine", "epochs": 2, "min_lr": 0, "warmup_epochs": 0}
    with monkeypatch.context() as patch:
        signal_at(patch, "update", 2, signal.SIGTERM)
        assert main(arguments(image_folder, run, **changes)) == 143
    path = run / SETTINGS_FILE
    stored = json.loads(path.read_text())
    for name in ("schedule", "decay_epochs", "decay_milestones", "decay_rate", "poly_power"):
        del stored[name]
    path.write_text(json.dumps(stored))
    out = capsys.readouterr().out
    assert "preset fishnet: kevin-ssy/FishNet, README and cfgs (momentum, rate 0.00078" in out
    for note in PRESETS["fishnet"].notes:
        assert f"note: {note}\n" in out
    assert main([f"--resume={run}"]) == 0
    assert "note:" not in capsys.readouterr().out
    peak = 0.05 * 8 / 512
    assert rates(run) == pytest.approx([peak * (1 + math.cos(math.pi * k / 6)) / 2 for k in range(6)])


def start(command: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "fused_ops.train", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("reference", ["dsnet_test"], indirect=True)
def test_sigterm_to_the_process(reference, image_folder, tmp_path):
    model, expected = reference
    run = tmp_path / "run"
    process = start(arguments(image_folder, run, model=model, workers=1, checkpoint_every=1))
    wait_for(run / LAST)
    process.terminate()
    error = process.communicate(timeout=120)[1]
    assert process.returncode == 143, error
    assert error.startswith("Stopped by SIGTERM after update")
    assert "Traceback" not in error
    assert main([f"--resume={run}"]) == 0
    assert_equal_runs(run, expected)


@pytest.mark.parametrize("reference", ["dsnet_test"], indirect=True)
def test_sigkill_to_the_process(reference, image_folder, tmp_path):
    model, expected = reference
    run = tmp_path / "run"
    process = start(arguments(image_folder, run, model=model, checkpoint_every=1))
    wait_for(run / LAST)
    time.sleep(random.random() * 0.5)
    process.kill()
    process.communicate(timeout=120)
    if load_state(run / LAST)["epoch"] < 3:
        assert main([f"--resume={run}"]) == 0
    assert not list(run.glob(".*.tmp"))
    assert_equal_runs(run, expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_sigkill_while_writing(tmp_path):
    """Killed 25 times while it writes checkpoints in a loop: the file is always a whole one."""
    path = tmp_path / LAST
    rng = random.Random(0)
    seen, cut_short = set(), 0
    for kill in range(25):
        child = os.fork()
        if child == 0:
            for number in range(10_000 * kill, 10_000 * (kill + 1)):
                save_state(path, {"number": number, "tensor": torch.full((200_000,), float(number))})
            os._exit(1)
        wait_for(path)
        time.sleep(rng.uniform(0.0, 0.1))
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        state = load_state(path)
        assert torch.equal(state["tensor"], torch.full((200_000,), float(state["number"])))
        seen.add(state["number"])
        cut_short += bool(list(tmp_path.glob(".*.tmp")))
    assert len(seen) > 10
    assert cut_short > 3
