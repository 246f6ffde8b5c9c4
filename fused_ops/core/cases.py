"""Sample inputs of operators: made once per family in its ``cases.py``, read by tests and bench."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One sample call of an operator.

    Attributes:
        name: unique within the family.
        make: ``make(generator, dtype, device, layout) -> dict`` of keyword arguments for the operator's
            public function. Tensors that get gradients have ``requires_grad`` set. ``layout`` is
            ``channels_last``, ``nchw`` or ``slice`` (a channel slice of a wider channels_last tensor).
        tags: ``model`` for shapes of real models, ``awkward`` for odd ones, ``tiny`` for those small enough
            for Triton's interpreter, ``training`` where batch statistics are used, ``traffic`` where bytes
            are counted, ``resources`` where the kernels launched are compiled for the register report.
        model: the real model that the shape comes from, and how often one step calls it.
        calls: calls per step of that model.
        layout: that the model's maps have: ``channels_last`` or ``nchw``.
    """

    name: str
    make: Callable[[torch.Generator, torch.dtype, torch.device, str], dict[str, Any]]
    tags: frozenset[str] = field(default_factory=frozenset)
    model: str = ""
    calls: int = 1
    layout: str = "channels_last"


LAYOUTS = ("channels_last", "nchw", "slice")


def make_map(
    shape: tuple[int, int, int, int],
    generator: torch.Generator,
    dtype: torch.dtype,
    device: torch.device,
    layout: str,
    *,
    mean: float = 0.3,
    requires_grad: bool = True,
) -> Tensor:
    """Normal random map (B, C, H, W) with a mean that is not zero, in one of :data:`LAYOUTS`."""
    batch, channels, height, width = shape
    width_in_memory = 2 * channels + 8 if layout == "slice" else channels
    values = torch.randn(batch, width_in_memory, height, width, generator=generator, dtype=torch.float64)
    values = (values + mean).to(device=device, dtype=dtype)
    if layout != "nchw":
        values = values.contiguous(memory_format=torch.channels_last)
    if layout == "slice":
        values = values[:, channels : 2 * channels]
    return values.detach().requires_grad_(requires_grad)
