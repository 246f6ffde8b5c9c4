"""Files of a run that must survive a kill at any moment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from fused_ops.core.files import write_atomically

from .settings import UsageError

LAST = "last.pt"
BEST = "best.pt"
WEIGHTS = "model.safetensors"
EMA_WEIGHTS = "model_ema.safetensors"
FORMAT = 1


def write_json(path: Path, value: Any) -> None:
    """Write JSON for reading by people."""
    text = json.dumps(value, indent=2, sort_keys=True, default=str) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Save a training state of tensors and plain values."""
    write_atomically(path, lambda file: torch.save({"format": FORMAT, **state}, file))


def load_state(path: Path) -> dict[str, Any]:
    """Load a training state. Raises `UsageError` if it is none of ours."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UsageError(f"--resume {path.parent}: no checkpoint yet ({path.name} is missing)") from None
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(f"--resume {path.parent}: {path.name} is unreadable: {reason}") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UsageError(f"--resume {path.parent}: {path.name} is no training state of format {FORMAT}")
    return state


def save_weights(path: Path, model: nn.Module) -> None:
    """Save the weights alone, with model name and class count as metadata."""
    from fused_ops.models import save_checkpoint

    save_checkpoint(model, path)


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files of a process that was killed while it wrote."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def weights_metadata(flag: str, path: str) -> dict[str, str]:
    """What a weights file says about itself; nothing if it is no safetensors file.

    Raises `UsageError` naming `flag` if there is no such file or it is damaged.
    """
    if not Path(path).is_file():
        raise UsageError(f"{flag} {path}: no such file")
    if not path.endswith(".safetensors"):
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except SafetensorError as error:
        raise UsageError(f"{flag} {path}: no readable safetensors file ({error})") from None
