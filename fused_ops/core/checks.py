"""Checks of what users pass to operators; every message names the argument, its value and what is allowed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fused_ops.core.activations import FUNCTIONS
from fused_ops.core.batch_norm import BatchNormState

FLOAT_TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def check_float(name: str, tensor: Tensor) -> None:
    """Raise TypeError unless ``tensor`` has a floating-point dtype that operators take."""
    if tensor.dtype not in FLOAT_TYPES:
        raise TypeError(f"{name} has dtype {tensor.dtype}; use float32, float16, bfloat16 or float64")


def check_map(name: str, x: Tensor) -> None:
    """Raise ValueError or TypeError unless ``x`` is a floating-point map (B, C, H, W)."""
    if x.dim() != 4:
        raise ValueError(f"{name} has {x.dim()} dimensions; it must be (B, C, H, W)")
    check_float(name, x)


def check_device(name: str, tensor: Tensor | None, x: Tensor, x_name: str = "x") -> None:
    """Raise ValueError unless ``tensor`` lies where ``x`` does; None passes."""
    if tensor is not None and tensor.device != x.device:
        raise ValueError(f"{name} is on {tensor.device}; it must be where {x_name} is, on {x.device}")


def check_companion(name: str, tensor: Tensor, x: Tensor, x_name: str = "x") -> None:
    """Raise unless a parameter lies where ``x`` does, in its dtype or float32."""
    check_device(name, tensor, x, x_name)
    if tensor.dtype not in (x.dtype, torch.float32):
        raise TypeError(f"{name} has dtype {tensor.dtype}; it must be float32 or that of {x_name}, {x.dtype}")


def check_parameter(name: str, tensor: Tensor | None, shape: tuple[int, ...], what: str, x: Tensor) -> None:
    """Raise unless a parameter has ``shape`` (said to be ``what``) and suits ``x``; None passes."""
    if tensor is None:
        return
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be {shape}, {what}")
    check_companion(name, tensor, x)


def check_alike(name: str, tensor: Tensor, x: Tensor, x_name: str = "x") -> None:
    """Raise TypeError unless ``tensor`` has the dtype and the device of ``x``."""
    if tensor.dtype != x.dtype or tensor.device != x.device:
        raise TypeError(
            f"{name} is {tensor.dtype} on {tensor.device}; it must be as {x_name}, {x.dtype} on {x.device}"
        )


def check_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    """Raise ValueError, with the known ones, unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        known = ", ".join(word or "''" for word in allowed)
        raise ValueError(f"{name}={value!r} is unknown; use one of {known}")


def check_activation(activation: str) -> None:
    """Raise ValueError unless there is such an activation."""
    check_choice("activation", activation, tuple(FUNCTIONS))


def check_norm(norm: BatchNormState, x: Tensor, channels: int) -> None:
    """Raise unless the state of a BatchNorm suits the ``channels`` of ``x``."""
    for name in ("weight", "bias", "running_mean", "running_var"):
        check_parameter(f"norm.{name}", getattr(norm, name), (channels,), "one per channel", x)
    if not norm.batch_stats and (norm.running_mean is None or norm.running_var is None):
        raise ValueError("norm has no running statistics, so batch_stats must be true")


def check_values_per_channel(normalised: tuple[int, ...]) -> None:
    """Raise ValueError where batch statistics would be taken over one value per channel of (B, C, H, W)."""
    batch, _, height, width = normalised
    if batch * height * width == 1:
        # torch's own words, so that code that looks for them goes on working.
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {normalised}")


def check_direction(direction: str) -> None:
    """Raise ValueError unless ``direction`` is ``forward`` or ``backward``."""
    check_choice("direction", direction, ("forward", "backward"))


def any_requires_grad(*tensors: Tensor | None) -> bool:
    """Whether a call on ``tensors`` has to be recorded for gradients."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
