"""Bad input is refused before training starts, in one line that names argument, value and what is allowed."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from training_helpers import CLASSES, arguments, write_images

from fused_ops.train import main
from fused_ops.train.settings import (
    MAY_CHANGE,
    PRESETS,
    Settings,
    UsageError,
    build_parser,
    settings_from,
    split_batch,
)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"epochs": 0}, ["--epochs 0", "at least 1"]),
        ({"epochs": "many"}, ["--epochs", "'many'"]),
        ({"batch_size": -4}, ["--batch-size -4", "at least 1"]),
        ({"batch_size": 64, "device_batch": 8}, ["--batch-size 64", "at most the 30 training images"]),
        ({"device_batch": 3}, ["--device-batch 3", "--batch-size 8"]),
        ({"device_batch": 1}, ["--device-batch 1", "even", "mixup"]),
        ({"lr": 0}, ["--lr 0.0", "above 0"]),
        ({"lr": "nan"}, ["--lr nan", "above 0"]),
        ({"lr": "inf"}, ["--lr inf", "finite"]),
        ({"min_lr": 1}, ["--min-lr 1.0", "at most the peak learning rate"]),
        ({"label_smoothing": 1}, ["--label-smoothing 1.0", "at most"]),
        ({"drop_path": -0.1}, ["--drop-path -0.1", "at least 0"]),
        ({"warmup_epochs": 3}, ["--warmup-epochs 3.0", "less than --epochs 3"]),
        ({"amp": "fp8"}, ["--amp", "fp8", "bf16"]),
        ({"amp": "fp16"}, ["--amp fp16", "bf16, none"]),
        ({"mixup_mode": "half"}, ["--mixup-mode", "half", "batch"]),
        ({"rand_augment": "wild"}, ["--rand-augment wild", "rand-m9"]),
        ({"optimizer": "adamq"}, ["--optimizer adamq", "nearest: adam"]),
        ({"model": "dsnet_smal"}, ["--model dsnet_smal", "nearest: dsnet_small"]),
        ({"model": "timm/resnet_18"}, ["--model timm/resnet_18", "nearest: ", "timm/resnet18"]),
        ({"model": "timm/vgg11"}, ["--drop-path 0.2", "timm/vgg11"]),
        ({"img_size": 8}, ["--img-size 8", "too small for timm/test_convnext", "smallest that works: 32"]),
        ({"model": "dsnet_test", "img_size": 8}, ["--img-size 8", "too small for dsnet_test"]),
        ({"data": "/no/such/folder"}, ["--data /no/such/folder", "no such folder", "digits, synthetic"]),
        ({"data": None}, ["--data is missing"]),
        ({"epocs": 3}, ["--epocs=3", "no such argument", "--epochs"]),
        (
            {"sync_batch_norm": None, "finetune": "/no/file.safetensors"},
            ["--finetune /no/file", "no such file"],
        ),
        ({"checkpoint": "a.safetensors"}, ["--checkpoint a.safetensors", "--evaluate"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_value(changes, parts, image_folder, tmp_path, fails):
    error = fails(arguments(image_folder, tmp_path / "run", **changes))
    for part in parts:
        assert part in error
    assert not (tmp_path / "run").exists()


def test_flags_without_value(image_folder, tmp_path, fails):
    base = arguments(image_folder, tmp_path / "run")
    assert "CUDA" in fails([*base, "--sync-batch-norm"])
    assert "--checkpoint" in fails([*base, "--evaluate"])


def test_no_gpu_is_said(image_folder, tmp_path, fails, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "--device cuda" in fails(arguments(image_folder, tmp_path / "run", device="cuda"))


def test_folder_without_parts(tmp_path, fails):
    assert "train and val missing" in fails(arguments(tmp_path, tmp_path / "run"))
    (tmp_path / "train").mkdir()
    assert "val missing" in fails(arguments(tmp_path, tmp_path / "run"))
    (tmp_path / "val").mkdir()
    assert "no class folders" in fails(arguments(tmp_path, tmp_path / "run"))
    for part in ("train", "val"):
        for name in CLASSES:
            (tmp_path / part / name).mkdir()
    assert "no images in" in fails(arguments(tmp_path, tmp_path / "run"))


def test_class_without_images(tmp_path, fails):
    write_images(tmp_path / "train", 2)
    write_images(tmp_path / "val", 2)
    for path in (tmp_path / "val" / "bee").iterdir():
        path.unlink()
    assert "no images of bee" in fails(arguments(tmp_path, tmp_path / "run"))


def test_classes_differ(tmp_path, fails):
    write_images(tmp_path / "train", 2)
    write_images(tmp_path / "val", 2)
    (tmp_path / "val" / "bee").rename(tmp_path / "val" / "dog")
    error = fails(arguments(tmp_path, tmp_path / "run"))
    assert "only in train: bee; only in val: dog" in error


def test_one_class(tmp_path, fails):
    for part in ("train", "val"):
        (tmp_path / part / "ant").mkdir(parents=True)
        Image.new("RGB", (40, 40)).save(tmp_path / part / "ant" / "0.png")
    assert "only one class, ant" in fails(arguments(tmp_path, tmp_path / "run"))


@pytest.fixture(scope="module")
def finished_run(image_folder, tmp_path_factory):
    run = tmp_path_factory.mktemp("settings") / "run"
    assert main(arguments(image_folder, run, epochs=2)) == 0
    return run


def test_run_folder_is_complete(finished_run):
    names = {path.name for path in finished_run.iterdir()}
    assert names == {
        *("settings.json", "environment.json", "classes.json", "metrics.jsonl", "curves.png", "tensorboard"),
        *("last.pt", "best.pt", "model.safetensors", "model_ema.safetensors"),
    }
    settings = json.loads((finished_run / "settings.json").read_text())
    assert list(settings) == sorted(settings)
    assert settings["epochs"] == 2
    assert settings["amp"] == "none"
    assert json.loads((finished_run / "classes.json").read_text()) == list(CLASSES)


def test_output_holds_a_run(finished_run, image_folder, fails):
    error = fails(arguments(image_folder, finished_run))
    assert f"--output {finished_run}: already holds a run" in error


def test_resume_refusals(finished_run, image_folder, tmp_path, fails):
    assert "no such folder" in fails([f"--resume={tmp_path}/none"])
    assert "holds no run" in fails([f"--resume={tmp_path}"])
    assert "has finished its 2 epochs" in fails([f"--resume={finished_run}"])

    error = fails([f"--resume={finished_run}", "--lr=0.1", "--mixup=0", "--workers=2"])
    assert "--lr 0.1 (the run has 0.05)" in error
    assert "--mixup 0.0 (the run has 0.8)" in error
    assert "--workers" not in error.split("May change:")[0]
    assert "--workers" in error.split("May change:")[1]

    other = tmp_path / "other"
    shutil.copytree(image_folder, other)
    (other / "train" / "ant" / "0.png").unlink()
    error = fails([f"--resume={finished_run}", f"--data={other}"])
    assert "training images were 30, are 29" in error

    damaged = tmp_path / "damaged"
    shutil.copytree(finished_run, damaged)
    (damaged / "last.pt").write_bytes((damaged / "last.pt").read_bytes()[:1000])
    assert "last.pt is unreadable" in fails([f"--resume={damaged}"])
    (damaged / "last.pt").write_bytes(b"")
    assert "last.pt is unreadable" in fails([f"--resume={damaged}"])


def test_checkpoint_of_another_model(finished_run, image_folder, tmp_path, fails):
    weights = finished_run / "model.safetensors"
    error = fails(arguments(image_folder, tmp_path / "run", model="dsnet_test", finetune=weights))
    assert f"--finetune {weights}: holds weights of test_convnext, not of --model dsnet_test" in error
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(weights.read_bytes()[:5000])
    assert "no readable safetensors file" in fails(
        arguments(image_folder, tmp_path / "run", finetune=damaged)
    )


def test_batch_must_divide_among_ranks():
    with pytest.raises(UsageError, match="--batch-size 10: must be a multiple of the 4 ranks"):
        split_batch(Settings(data="x", batch_size=10), 4)
    with pytest.raises(UsageError, match="--device-batch 8: times 4 ranks must divide --batch-size 16"):
        split_batch(Settings(data="x", batch_size=16, device_batch=8), 4)


@pytest.mark.parametrize(("ranks", "expected"), [(1, 128), (8, 128), (16, 64), (64, 16)])
def test_device_batch_of_the_recipe(ranks, expected):
    assert split_batch(Settings(data="x"), ranks).device_batch == expected


def test_every_setting_is_a_flag_with_help():
    text = build_parser().format_help()
    for f in dataclasses.fields(Settings):
        assert "--" + f.name.replace("_", "-") in text
        assert f.metadata["help"]
    assert "--workers" in text.split("may be given anew")[1]


def test_presets_are_valid_and_chosen_by_data():
    for name, values in PRESETS.items():
        settings = settings_from({"data": values.get("data", "folder")})
        assert settings.preset == name
        assert {key: getattr(settings, key) for key in values} == values
    assert settings_from({"data": "digits", "epochs": 7}).epochs == 7
    assert "seed" not in MAY_CHANGE


def test_help_needs_no_timm():
    code = "import sys; sys.modules['timm'] = None; from fused_ops.train import main; main(['--help'])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    assert done.returncode == 0
    assert "--label-smoothing" in done.stdout
