"""How the public code of a system names and stores what we store, in both directions.

Every model file declares one :class:`OfficialLayout` per public code base. Those whose names are ours need no
code of their own: :func:`same_names_layout` and :func:`paddle_layout`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Converter = Callable[[Mapping[str, Tensor], nn.Module], dict[str, Tensor]]

PADDLE_STATISTICS = {"_mean": "running_mean", "_variance": "running_var"}
_TO_PADDLE = {ours: theirs for theirs, ours in PADDLE_STATISTICS.items()}


@dataclass(frozen=True)
class OfficialLayout:
    """State-dict layout of one public code base.

    Attributes:
        framework: ``pytorch`` or ``paddle``; says what kind of file holds it.
        source: the repository.
        official_to_ours: ``(state, model) -> state`` in our names and shapes. It may be handed anything, so
            it passes unknown entries through, where they are reported as unexpected.
        ours_to_official: the inverse.
    """

    framework: str
    source: str
    official_to_ours: Converter
    ours_to_official: Converter


def same_names(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The converter for public code whose names and shapes are ours."""
    return dict(state)


def paddle_to_ours(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Paddle conventions to PyTorch's, for equal module names.

    Linear weights are (in, out) in Paddle and are transposed; which ones are Linear is read from ``model``,
    since the shape of a square one does not tell. BatchNorm statistics are renamed, and its batch counter,
    which Paddle has not, is 0.
    """
    linear = _linear_weights(model)
    converted: dict[str, Tensor] = {}
    for name, value in state.items():
        module, _, last = name.rpartition(".")
        if last in PADDLE_STATISTICS:
            converted[f"{module}.{PADDLE_STATISTICS[last]}"] = value
            converted[f"{module}.num_batches_tracked"] = torch.zeros((), dtype=torch.int64)
        else:
            converted[name] = value.t() if name in linear and value.ndim == 2 else value
    return converted


def ours_to_paddle(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The inverse of :func:`paddle_to_ours`."""
    linear = _linear_weights(model)
    converted: dict[str, Tensor] = {}
    for name, value in state.items():
        module, _, last = name.rpartition(".")
        if last == "num_batches_tracked":
            continue
        if last in _TO_PADDLE:
            converted[f"{module}.{_TO_PADDLE[last]}"] = value
        else:
            converted[name] = value.t().contiguous() if name in linear else value
    return converted


def _linear_weights(model: nn.Module) -> set[str]:
    return {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def same_names_layout(source: str) -> OfficialLayout:
    """Layout of a PyTorch repository whose names and shapes are ours."""
    return OfficialLayout("pytorch", source, same_names, same_names)


def paddle_layout(source: str) -> OfficialLayout:
    """Layout of a Paddle repository whose module names are ours."""
    return OfficialLayout("paddle", source, paddle_to_ours, ours_to_paddle)
