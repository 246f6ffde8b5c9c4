"""Resampling of maps to a given size, bilinear or nearest, with what is added to the result."""

from fused_ops.resample.op import resample_map

__all__ = ["resample_map"]
