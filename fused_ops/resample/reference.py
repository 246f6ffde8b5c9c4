"""Resampling in plain PyTorch: the definition.

Runs on any device and dtype, float64 too, with PyTorch's own autograd. It is the oracle of the tests, the
path taken where no kernel can run, and the baseline of the measurements.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

MODES = ("bilinear", "nearest")


def resample(
    x: Tensor,
    size: tuple[int, int],
    mode: str = "bilinear",
    add: Tensor | None = None,
    drop_path: Tensor | None = None,
) -> Tensor:
    """``drop_path * interpolate(x, size) + add``.

    Args:
        x: (B, C, H, W).
        size: height and width of the result.
        mode: ``bilinear`` (``align_corners=False``, no antialiasing) or ``nearest``.
        add: (B, C, *size), or None.
        drop_path: factor per image (B), or None.
    """
    out = F.interpolate(x, size, mode=mode, align_corners=False if mode == "bilinear" else None)
    if drop_path is not None:
        out = out * drop_path.to(x.dtype)[:, None, None, None]
    return out if add is None else out + add
