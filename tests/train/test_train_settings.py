"""Bad input is refused before training starts, in one line that names argument, value and what is allowed."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from timm.data import create_transform
from training_helpers import CLASSES, arguments, write_images

from fused_ops.train import main
from fused_ops.train.engine import build_optimizer
from fused_ops.train.model import notes_on
from fused_ops.train.settings import (
    MAY_CHANGE,
    PRESETS,
    Settings,
    UsageError,
    build_parser,
    settings_from,
    split_batch,
)

# Presets whose numbers are checked with the system that brings them.
ELSEWHERE = ("hiri_vit", "hiri_vit_768")


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
        ({"schedule": "stairs"}, ["--schedule", "stairs", "multistep"]),
        ({"schedule": "step"}, ["--schedule step", "--decay-epochs above 0"]),
        ({"schedule": "exponential", "decay_epochs": -1}, ["--decay-epochs -1.0", "at least 0"]),
        ({"schedule": "step", "decay_epochs": 1, "decay_rate": 1.5}, ["--decay-rate 1.5", "at most 1"]),
        ({"schedule": "multistep"}, ["--decay-milestones is missing", "such as 30,60,90"]),
        (
            {"schedule": "multistep", "decay_milestones": "60,30"},
            ["--decay-milestones 60,30", "ascending order"],
        ),
        ({"schedule": "multistep", "decay_milestones": "0.5"}, ["--decay-milestones 0.5", "whole epochs"]),
        ({"schedule": "poly", "poly_power": 0}, ["--poly-power 0.0", "above 0"]),
        ({"decay_epochs": 30}, ["--decay-epochs 30.0", "step or exponential", "--schedule cosine"]),
        ({"poly_power": 2}, ["--poly-power 2.0", "--schedule poly", "--schedule cosine"]),
        (
            {"schedule": "step", "decay_epochs": 1, "cooldown_epochs": 2},
            ["--cooldown-epochs 2", "cosine or poly", "--schedule step"],
        ),
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
    for name in ("imagenet", "digits", "synthetic"):
        values = PRESETS[name].settings
        settings = settings_from({"data": values.get("data", "folder")})
        assert settings.preset == name
        assert {key: getattr(settings, key) for key in values} == values
    # A folder may have the name of a system.
    assert settings_from({"data": "pvt"}).preset == "imagenet"
    assert settings_from({"data": "digits", "epochs": 7}).epochs == 7
    assert "seed" not in MAY_CHANGE


# What the recipes are, written from the publications and programs that the presets name and not from the
# presets: optimizer, rate at its peak, batch, epochs, weight decay, epochs of warm-up, last rate, clipping,
# random erasing, mixup, CutMix, label smoothing, stochastic depth, averaging.
RECIPES = {
    "dsnet_small": ("imagenet", "adamw", 1e-3, 1024, 300, 0.05, 5, 1e-5, 0, 0.25, 0.8, 1, 0.1, 0.1, 0.99996),
    "pvt_small": ("pvt", "adamw", 1e-3, 1024, 300, 0.05, 5, 1e-5, 0, 0.25, 0.8, 1, 0.1, 0.1, 0),
    "pvt_large": ("pvt", "adamw", 1e-3, 1024, 300, 0.05, 5, 1e-5, 1, 0.25, 0.8, 1, 0.1, 0.3, 0),
    "pvt_v2_b2": ("pvt_v2", "adamw", 1e-3, 1024, 300, 0.05, 5, 1e-5, 0, 0.25, 0.8, 1, 0.1, 0.1, 0),
    "pvt_v2_b3": ("pvt_v2", "adamw", 1e-3, 1024, 300, 0.05, 5, 1e-5, 1, 0.25, 0.8, 1, 0.1, 0.3, 0),
    "fcvit_b12": ("fcvit", "adamw", 1e-3, 1024, 300, 0.05, 5, 1e-6, 0, 0.25, 0.8, 1, 0.1, 0.1, 0),
    "fcvit_b48": ("fcvit", "adamw", 1e-3, 1024, 300, 0.05, 5, 1e-6, 0, 0.25, 0.8, 1, 0.1, 0.2, 0),
    "vip_tiny": ("vip", "adamw", 1e-3, 1024, 300, 0.03, 20, 1e-5, 0, 0, 0.8, 1, 0.1, 0.1, 0.99996),
    "vip_base": ("vip", "adamw", 1e-3, 1024, 300, 0.05, 20, 1e-5, 0, 0, 0.8, 1, 0.1, 0.3, 0.99996),
    "hlg_small": ("hlg", "adamw", 1e-3, 1024, 300, 0.05, 20, 1e-5, 5, 0.25, 0.8, 1, 0.1, 0.2, 0.99996),
    "fishnet_150": ("fishnet", "momentum", 0.1, 256, 100, 1e-4, 0, 0, 0, 0, 0, 0, 0, 0, 0),
    "cbam_resnet_50": ("resnet_gates", "momentum", 0.1, 256, 100, 1e-4, 0, 0, 0, 0, 0, 0, 0, 0, 0),
    "sem_resnet_164_cifar": ("sem_cifar", "momentum", 0.1, 128, 164, 1e-4, 0, 0, 0, 0, 0, 0, 0, 0, 0),
    "sda_resnet_86": ("sda", "momentum", 0.1, 256, 120, 1e-4, 0, 0, 0, 0, 0, 0, 0.1, 0, 0),
    "dcdc_resnet_50": ("dcdc", "sgd", 0.8, 2048, 130, 1e-4, 5, 0, 0, 0, 0, 0, 0, 0, 0),
    "res2net50_26w_4s": ("res2net", "momentum", 0.1, 256, 100, 1e-4, 0, 0, 0, 0, 0, 0, 0.1, 0, 0),
    "hrnet_w18": ("hrnet", "sgd", 0.05, 128, 100, 1e-4, 0, 0, 0, 0, 0, 0, 0, 0, 0),
    "focalnet_tiny_srf": (
        "focalnet",
        "adamw",
        1e-3,
        1024,
        300,
        0.05,
        20,
        1e-5,
        5,
        0.25,
        0.8,
        0.8,
        0.1,
        0.2,
        0,
    ),
    "focalnet_base_lrf": (
        "focalnet",
        "adamw",
        1e-3,
        1024,
        300,
        0.05,
        20,
        1e-5,
        5,
        0.25,
        0.8,
        0.8,
        0.1,
        0.5,
        0,
    ),
    "focalnet_large_fl4": (
        "focalnet",
        "adamw",
        1e-3,
        4096,
        90,
        0.05,
        5,
        1e-5,
        5,
        0.25,
        0.8,
        0.8,
        0.1,
        0.2,
        0,
    ),
    "nextvit_large": ("next_vit", "adamw", 2e-3, 2048, 300, 0.1, 20, 1e-5, 5, 0.25, 0.8, 1, 0.1, 0.2, 0),
    "davit_tiny": ("davit", "adamw", 1e-3, 1024, 300, 0.05, 5, 1e-5, 1, 0.25, 0.8, 1, 0.1, 0.1, 0),
    "convnext_small": (
        "convnext",
        "adamw",
        4e-3,
        4096,
        300,
        0.05,
        20,
        1e-6,
        0,
        0.25,
        0.8,
        1,
        0.1,
        0.4,
        0.9999,
    ),
    "efficientnet_b2": (
        "efficientnet",
        "rmsproptf",
        0.256,
        4096,
        350,
        1e-5,
        5,
        0,
        0,
        0,
        0,
        0,
        0.1,
        0.2,
        0.9999,
    ),
    "mobilenetv3_large_100": (
        *("mobilenetv3", "rmsproptf", 0.1, 4096, 350, 1e-5, 5, 0, 0, 0, 0, 0, 0.1, 0, 0.9999),
    ),
}
AUGMENTED = "rand-m9-mstd0.5-inc1"


@pytest.mark.parametrize("model", RECIPES)
def test_recipes(model):
    preset, *expected = RECIPES[model]
    s = settings_from({"data": "folder", "preset": preset, "model": model})
    assert s.peak_lr == pytest.approx(expected.pop(1))
    found = [s.optimizer, s.batch_size, s.epochs, s.weight_decay, s.warmup_epochs, s.min_lr, s.clip_grad]
    found += [s.random_erasing, s.mixup, s.cutmix, s.label_smoothing, s.drop_path, s.ema_decay]
    assert found == expected
    # Repeated augmentation belongs to DeiT's descendants alone.
    assert s.repeats == (3 if preset in ("imagenet", "pvt", "pvt_v2") else 1)
    policy = {"efficientnet": "v0"}.get(preset, AUGMENTED if s.optimizer == "adamw" else "none")
    assert s.rand_augment == policy
    assert s.cooldown_epochs == (10 if preset in ("fcvit", "vip") else 0)
    assert split_batch(s, 8).device_batch <= 128


# Schedules other than the cosine to the last rate, from the same sources.
DECAYS = {
    **dict.fromkeys(("fishnet", "resnet_gates", "res2net"), ("step", 30.0, "", 0.1)),
    **dict.fromkeys(("sda", "hrnet"), ("multistep", 0.0, "30,60,90", 0.1)),
    "sem_cifar": ("multistep", 0.0, "81,122", 0.1),
    "efficientnet": ("step", 2.4, "", 0.97),
    "mobilenetv3": ("step", 3.0, "", 0.99),
}


@pytest.mark.parametrize("preset", PRESETS)
def test_schedules_of_the_recipes(preset):
    s = settings_from({"data": "folder", "preset": preset})
    expected = DECAYS.get(preset, ("cosine", 0.0, "", 0.1))
    assert (s.schedule, s.decay_epochs, s.decay_milestones, s.decay_rate) == expected


def test_notes_on_models():
    assert notes_on("timm/resnet18", "imagenet") == []
    assert notes_on("fishnet_99", "fishnet") == notes_on("fishnet_99", "digits") == []
    assert notes_on("fishnet_99", "imagenet") == ["the recipe of fishnet_99 is --preset fishnet"]
    (note,) = notes_on("fishnext_150", "fishnet")
    assert note.startswith("fishnext_150: inferred: no public code")


def test_another_schedule_than_the_presets():
    """What a preset says of its schedule does not follow into another one."""
    s = settings_from({"data": "folder", "preset": "efficientnet", "schedule": "cosine"})
    assert (s.decay_epochs, s.decay_rate) == (0.0, 0.1)
    s = settings_from({"data": "folder", "preset": "fcvit", "schedule": "step", "decay_epochs": 30.0})
    assert (s.cooldown_epochs, s.decay_epochs) == (0, 30.0)
    # Nor does saying what the preset says change anything.
    s = settings_from({"data": "folder", "preset": "efficientnet", "schedule": "step"})
    assert (s.decay_epochs, s.decay_rate) == (2.4, 0.97)


def test_every_recipe_is_checked_and_has_a_source():
    assert {recipe[0] for recipe in RECIPES.values()} == set(PRESETS) - {"digits", "synthetic", *ELSEWHERE}
    for name, preset in PRESETS.items():
        assert preset.source, name


def test_preset_brings_its_model():
    s = settings_from({"data": "folder", "preset": "vip"})
    assert (s.model, s.drop_path) == ("vip_small", 0.1)
    # What is given counts more, and a model of timm is known by its own name.
    s = settings_from({"data": "folder", "preset": "pvt_v2", "model": "timm/pvt_v2_b5", "clip_grad": 2.0})
    assert (s.drop_path, s.clip_grad) == (0.3, 2.0)
    s = settings_from({"data": "folder", "preset": "efficientnet", "model": "efficientnet_b7"})
    assert (s.img_size, s.crop_pct) == (600, 0.949)
    with pytest.raises(UsageError, match="--preset pvt_v3: no such preset; nearest: pvt_v2"):
        settings_from({"data": "folder", "preset": "pvt_v3"})


@pytest.mark.parametrize("preset", ["efficientnet", "hrnet", "fishnet"])
def test_optimizer_and_policy_of_a_recipe_are_timms(preset):
    """Names that this program does not check itself lead to what they say."""
    s = settings_from({"data": "folder", "preset": preset})
    model = torch.nn.Linear(2, 2)
    optimizer = build_optimizer(s, model, torch.device("cpu"))
    assert optimizer.defaults["momentum"] == 0.9
    assert optimizer.defaults.get("nesterov", False) == (preset == "hrnet")
    decays = {group["weight_decay"] for group in optimizer.param_groups}
    assert decays == {0.0, s.weight_decay}
    policy = None if s.rand_augment == "none" else s.rand_augment
    steps = create_transform(32, is_training=True, auto_augment=policy).transforms
    assert any(type(step).__name__ == "AutoAugment" for step in steps) == (preset == "efficientnet")


def test_help_lists_the_presets(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = build_parser().format_help().split("Presets, each")[1].splitlines()
    for name in PRESETS:
        assert any(line.startswith(f"  {name}: ") for line in lines), name
    assert max(map(len, lines)) < 80
    assert "weight decay is on every parameter" in " ".join(" ".join(lines).split())


def test_help_needs_no_timm():
    code = "import sys; sys.modules['timm'] = None; from fused_ops.train import main; main(['--help'])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    assert done.returncode == 0
    assert "--label-smoothing" in done.stdout
