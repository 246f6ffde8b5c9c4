"""Unreadable images, loaders, digits, weights files, and a whole run."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from training_helpers import CONVNEXT, arguments, epochs, losses

from fused_ops.train import main
from fused_ops.train.data import Digits, Draw, Folder, Samples


@pytest.fixture
def broken_folder(image_folder, tmp_path):
    """The images, of which two for training and one held out cannot be read."""
    folder = tmp_path / "broken"
    shutil.copytree(image_folder, folder)
    (folder / "train" / "ant" / "3.png").write_bytes(b"no image")
    path = folder / "train" / "cat" / "9.png"
    path.write_bytes(path.read_bytes()[:300])
    (folder / "val" / "bee" / "1.png").write_bytes(b"")
    return folder


def test_replacement_is_the_next_readable_one(broken_folder):
    source = Folder(broken_folder / "train")
    samples = Samples(source, lambda image: np.array(image).transpose(2, 0, 1), 32, 0, training=True)
    for index in range(len(source)):
        image, target, unreadable = samples[Draw(index)]
        name = source.name(index)
        if name.endswith(("ant/3.png", "cat/9.png")):
            assert unreadable == [name]
            following = (index + 1) % len(source)
            expected, expected_target, _ = samples[Draw(following)]
            assert torch.equal(image, expected)
            assert target == expected_target
        else:
            assert unreadable == []
            assert target == source.target(index)


def test_unreadable_are_named_counted_and_skipped(broken_folder, tmp_path, capsys):
    runs = [tmp_path / "one", tmp_path / "two"]
    for run, workers in zip(runs, (0, 2), strict=True):
        assert main([*arguments(broken_folder, run, workers=workers, repeats=1, epochs=4), "--json"]) == 0
        captured = capsys.readouterr()
        row = json.loads(captured.out)[0]
        assert row["unreadable"] == 3
        for name in ("train/ant/3.png", "train/cat/9.png", "val/bee/1.png"):
            assert captured.err.count(name) == 1
    assert losses(runs[0]) == losses(runs[1])
    assert epochs(runs[0]) == epochs(runs[1])


def test_limit_of_unreadable_and_going_on(broken_folder, tmp_path, capsys):
    run, whole = tmp_path / "run", tmp_path / "whole"
    command = arguments(broken_folder, run, max_unreadable=0, repeats=1)
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "--max-unreadable 0: " in error
    assert "cannot be read" in error
    assert f"fused-ops train --resume {run} --max-unreadable N" in error

    assert main([f"--resume={run}", "--max-unreadable=3"]) == 0
    assert main(arguments(broken_folder, whole, max_unreadable=3, repeats=1)) == 0
    assert losses(run) == losses(whole)


def test_digits_are_split_once_and_stratified():
    train, val = Digits(train=True), Digits(train=False)
    assert (len(train), len(val)) == (1437, 360)
    assert not {train.name(k) for k in range(1437)} & {val.name(k) for k in range(360)}
    counts = np.bincount([val.target(k) for k in range(360)])
    assert counts.min() >= 34
    assert counts.max() <= 38
    pixels = np.array(train.load(0))
    assert pixels.shape == (8, 8, 3)
    assert pixels.max() == 255


@pytest.fixture(scope="module")
def finished_run(image_folder, tmp_path_factory):
    run = tmp_path_factory.mktemp("weights") / "run"
    assert main(arguments(image_folder, run, model="dsnet_test", epochs=2)) == 0
    return run


def test_evaluate_repeats_the_accuracy_of_the_run(finished_run, image_folder, capsys):
    rows = epochs(finished_run)
    expected = {
        "model.safetensors": max(row["val_top1"] for row in rows),
        "model_ema.safetensors": max(row["ema_top1"] for row in rows),
    }
    for name, top1 in expected.items():
        command = ["--evaluate", "--model=dsnet_test", f"--checkpoint={finished_run / name}", "--json"]
        capsys.readouterr()
        assert main([*command, f"--data={image_folder}", "--batch-size=4", "--workers=0"]) == 0
        row = json.loads(capsys.readouterr().out)[0]
        assert row["val_top1"] == pytest.approx(top1)
        assert row["images"] == 11


def test_evaluate_needs_the_same_classes(finished_run, fails):
    weights = finished_run / "model.safetensors"
    error = fails(["--evaluate", "--data=digits", f"--checkpoint={weights}"])
    assert f"--checkpoint {weights}: has 3 classes, --data digits has 10" in error


@pytest.mark.parametrize("model", ["dsnet_test", CONVNEXT])
def test_finetune_keeps_all_but_the_classifier(model, image_folder, tmp_path, monkeypatch):
    source = tmp_path / "source"
    assert main(arguments(image_folder, source, model=model, epochs=2)) == 0
    two_classes = tmp_path / "two"
    shutil.copytree(image_folder, two_classes)
    for part in ("train", "val"):
        shutil.rmtree(two_classes / part / "bee")
    weights, tuned = source / "model.safetensors", tmp_path / "tuned"
    # Rates of practically zero: what was loaded is what is saved.
    still = {"lr": 1e-30, "min_lr": 0, "warmup_lr": 0, "warmup_epochs": 0, "epochs": 1}
    assert main(arguments(two_classes, tuned, model=model, finetune=weights, **still)) == 0
    before, after = load_file(weights), load_file(tuned / "model.safetensors")
    changed = {
        name for name in before if not torch.equal(before[name], after[name]) and "running" not in name
    }
    changed -= {name for name in changed if name.endswith("num_batches_tracked")}
    assert changed == {
        name
        for name in before
        if name.startswith("head.") and name.endswith(("fc.weight", "fc.bias", "head.weight", "head.bias"))
    }
    assert {len(after[name]) for name in changed} == {2}


def test_synthetic_needs_no_images(tmp_path, capsys):
    command = [
        "--data=synthetic",
        "--model=dsnet_test",
        "--batch-size=4",
        "--synthetic-updates=16",
        "--device=cpu",
    ]
    assert main([*command, f"--output={tmp_path / 'run'}", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)[0]
    assert row["updates"] == 16
    assert row["images_per_second"] > 0
    assert row["step_ms_p10"] <= row["step_ms_p50"] <= row["step_ms_p90"]


@pytest.mark.slow
def test_digits_are_learnt(tmp_path, capsys):
    """The command of `make train`, cut short."""
    run = tmp_path / "run"
    assert main(["--data=digits", "--epochs=6", f"--output={run}", "--json"]) == 0
    captured = capsys.readouterr()
    row = json.loads(captured.out)[0]
    assert row["last_top1"] >= 97
    assert row["last_ema_top1"] >= 97
    assert row["best_top1"] == max(epoch["val_top1"] for epoch in epochs(run))
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list((run / "tensorboard").iterdir())
    assert "--model dsnet_small --data DIR" in captured.err
