"""Tiny images, the command for a short training on them, and what it left behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CLASSES = ("ant", "bee", "cat")
CONVNEXT = "timm/test_convnext"


def write_images(folder: Path, per_class: int, without_last: int = 0) -> None:
    """Noise around a colour per class."""
    rng = np.random.default_rng(len(folder.name))
    for number, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for k in range(per_class - (without_last if number == len(CLASSES) - 1 else 0)):
            pixels = rng.integers(0, 100, (40, 36, 3))
            pixels[..., number] += 120
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{k}.png")


def arguments(folder: Path | str, output: Path, **changes: Any) -> list[str]:
    """A short training with everything random switched on; a change to None leaves the flag out."""
    settings = {
        "model": CONVNEXT,
        "data": folder,
        "output": output,
        "img_size": 32,
        "epochs": 3,
        "warmup_epochs": 1,
        "batch_size": 8,
        "device_batch": 4,
        "repeats": 2,
        "lr": 0.05,
        "ema_decay": 0.8,
        "drop_path": 0.2,
        "workers": 0,
        "threads": 1,
        "log_every": 2,
        "device": "cpu",
        **changes,
    }
    return [f"--{name.replace('_', '-')}={value}" for name, value in settings.items() if value is not None]


def losses(run: Path) -> list[float]:
    """The loss of every update, in order."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    updates = [row for row in rows if row["kind"] == "update"]
    assert [row["update"] for row in updates] == list(range(1, len(updates) + 1))
    return [row["loss"] for row in updates]


def epochs(run: Path) -> list[dict[str, Any]]:
    """The rows of the epochs, without what depends on the clock."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    clock = ("kind", "images_per_second")
    return [{k: v for k, v in row.items() if k not in clock} for row in rows if row["kind"] == "epoch"]
