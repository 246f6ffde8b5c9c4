"""Blocks of published vision backbones, composed of the operator families."""

from fused_ops.blocks.ds_block import DSBlock

__all__ = ["DSBlock"]
