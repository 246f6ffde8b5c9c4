"""Operators under autocast: maps and tokens take its dtype, parameters are left to the kernels."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype of the autocast that is on for the device of ``x``, or None where there is none."""
    device_type = x.device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def result_dtype(x: Tensor) -> torch.dtype:
    """The dtype that products with ``x`` have: the autocast's, or its own."""
    return x.dtype if x.dtype == torch.float64 else autocast_dtype(x) or x.dtype


def autocast_off(x: Tensor) -> AbstractContextManager[None]:
    """A context without autocast for the device of ``x``; tensors without data have none to turn off."""
    return nullcontext() if x.device.type == "meta" else torch.autocast(x.device.type, enabled=False)


def cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """What autocast does to an input: floating-point tensors but float64 ones are cast; None passes."""
    if tensor is None or not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(dtype)
