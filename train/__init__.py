"""Training and evaluation of image classifiers: `fused-ops train`, `python -m fused_ops.train`."""

from __future__ import annotations

from typing import Any

from .main import main
from .settings import Settings, UsageError

__all__ = ["Settings", "UsageError", "main", "train"]


def __getattr__(name: str) -> Any:
    # timm and torchvision take seconds to import; the settings and `--help` do without.
    if name == "train":
        from .run import train

        return train
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
