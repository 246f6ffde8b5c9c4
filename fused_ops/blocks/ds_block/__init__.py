"""The DS-Block of DS-Net: a convolution stream and an attention stream that attend to each other."""

from fused_ops.blocks.ds_block.module import DSBlock

__all__ = ["DSBlock"]
