"""Refusing arguments and images that a model cannot take, with messages that say what would do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fused_ops.core.checks import check_choice

POOLS = ("avg", "max", "avgmax", "catavgmax", "")


def check_classifier(num_classes: int, global_pool: str, pools: Sequence[str] = POOLS) -> None:
    """Refuse arguments of a classifier that do not fit together.

    Raises:
        ValueError: for an unknown pooling, a negative number of classes, and classes without pooling.
    """
    check_choice("global_pool", global_pool, pools)
    if num_classes < 0:
        raise ValueError(f"num_classes must be at least 0, got {num_classes}")
    if not global_pool and num_classes:
        raise ValueError(f"global_pool='' needs num_classes=0, got {num_classes}")


def check_lengths(length: int, per: str, **sequences: Sequence[Any]) -> None:
    """Refuse sequences of another length; ``per`` says what there is one entry of.

    Raises:
        ValueError: naming the first sequence that does not fit.
    """
    for name, value in sequences.items():
        if len(value) != length:
            raise ValueError(f"{name} must have {length} entries, one per {per}, got {tuple(value)}")


def check_image(x: Tensor, in_chans: int, total_stride: int, multiple: bool = False) -> None:
    """Refuse an image that the model cannot take.

    Args:
        x: what should be an image (B, in_chans, H, W).
        in_chans: channels of the image.
        total_stride: least height and width.
        multiple: whether height and width must be multiples of ``total_stride``.

    Raises:
        ValueError: for another rank, other channels, and heights and widths that do not fit.
    """
    if x.ndim != 4 or x.shape[1] != in_chans:
        raise ValueError(f"x must be (B, {in_chans}, H, W), got {tuple(x.shape)}")
    height, width = x.shape[-2:]
    if min(height, width) < total_stride:
        raise ValueError(
            f"x must be at least {total_stride} x {total_stride} pixels, the total stride, "
            f"got {height} x {width}"
        )
    if multiple and (height % total_stride or width % total_stride):
        raise ValueError(
            f"height and width of x must be multiples of {total_stride}, the total stride, "
            f"got {height} x {width}; pad the image"
        )
