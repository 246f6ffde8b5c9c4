"""HIRI-ViT's recipes, and that EMA distillation costs no accuracy on the built-in data."""

from __future__ import annotations

import json

import pytest

from fused_ops.models import create_model, list_models
from fused_ops.train import main
from fused_ops.train.presets import PRESETS
from fused_ops.train.settings import settings_from, split_batch


def recipe(preset, **given):
    return settings_from({"data": "folder", "preset": preset, **given})


@pytest.mark.parametrize(
    ("model", "crop_pct", "drop_path", "clip_grad"),
    [
        ("hiri_vit_small", 1.0, 0.1, 0.0),
        ("hiri_vit_base", 1.0, 0.15, 0.0),
        ("hiri_vit_large", 1.0, 0.3, 1.0),
        ("hiri_vit_small_224", 0.875, 0.1, 0.0),
        ("hiri_vit_base_224", 0.875, 0.15, 0.0),
        ("hiri_vit_large_224", 0.875, 0.3, 1.0),
    ],
)
def test_recipe_of_448_and_224(model, crop_pct, drop_path, clip_grad):
    """Section 5.1 of the paper, and of the sibling models where it is silent."""
    s = recipe("hiri_vit", model=model)
    assert (s.optimizer, s.weight_decay, s.batch_size, s.epochs) == ("adamw", 0.05, 1024, 300)
    assert (s.peak_lr, s.warmup_epochs, s.warmup_lr, s.min_lr) == (pytest.approx(1e-3), 5.0, 1e-6, 1e-5)
    assert (s.mixup, s.cutmix, s.mixup_switch, s.mixup_prob, s.random_erasing) == (0.8, 1.0, 0.5, 1.0, 0.25)
    assert (s.rand_augment, s.label_smoothing, s.repeats) == ("rand-m9-mstd0.5-inc1", 0.1, 1)
    assert (s.ema_distillation, s.ema_distillation_warmup) == (0.5, 0.0)
    assert (s.ema_decay, s.ema_warmup, s.ema_warmup_form) == (0.9999, True, "ratio")
    assert (s.crop_pct, s.drop_path, s.clip_grad) == (crop_pct, drop_path, clip_grad)
    # Size 0 is the model's own: 448, or 224 of the four-stage forms.
    assert s.img_size == 0
    model = create_model(model, device="meta", drop_path_rate=drop_path)
    assert model.default_cfg["input_size"][-1] == (224 if crop_pct < 1 else 448)
    assert split_batch(s, 8).device_batch == 128


@pytest.mark.parametrize(
    ("model", "drop_path", "clip_grad"),
    [("hiri_vit_small", 0.1, 0.0), ("hiri_vit_base", 0.15, 0.0), ("hiri_vit_large", 0.3, 1.0)],
)
def test_recipe_of_768(model, drop_path, clip_grad):
    s = recipe("hiri_vit_768", model=model)
    assert (s.img_size, s.crop_pct) == (768, 1.0)
    assert (s.optimizer, s.beta1, s.weight_decay, s.epochs) == ("adamw", 0.9, 1e-8, 30)
    assert (s.peak_lr, s.warmup_epochs, s.min_lr) == (pytest.approx(1e-5), 0.0, 0.0)
    assert (s.drop_path, s.clip_grad, s.ema_distillation) == (drop_path, clip_grad, 0.0)
    assert "INFERRED" in "".join(PRESETS["hiri_vit_768"].notes)


def test_recipe_of_lifted_backbones():
    for name in list_models("*_lift_?"):
        s = recipe("hiri_vit", model=name)
        assert (s.drop_path == 0.0) == name.startswith("hrnet")
        # DaViT's head has a norm behind the pooling.
        assert (s.ema_distillation == 0.0) == name.startswith("davit")


@pytest.mark.extended
def test_distillation_costs_no_accuracy_on_digits(tmp_path, capsys):
    """A very small HIRI-ViT on mixed digits, cut short; both runs are the same but for the targets."""
    command = "--data=digits --model=hiri_vit_test --img-size=64 --mixup=0.8 --cutmix=1 --epochs=4 --json"
    top1 = {}
    for weight in (0, 0.2):
        options = [f"--ema-distillation={weight}", "--eval-every=4"]
        assert main([*command.split(), *options, f"--output={tmp_path / str(weight)}"]) == 0
        row = json.loads(capsys.readouterr().out)[0]
        top1[weight] = max(row["last_top1"], row["last_ema_top1"])
    assert top1[0] >= 85
    # One of 360 images is 0.28 %.
    assert top1[0.2] >= top1[0] - 2
