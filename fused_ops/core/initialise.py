"""Initialisations that modules and models share."""

from __future__ import annotations

from torch import nn


def init_linear(module: nn.Module) -> None:
    """Linear layers of vision transformers: truncated normal with standard deviation 0.02, zero bias."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
