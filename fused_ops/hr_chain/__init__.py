"""HIRI-ViT's HR-block: two depthwise convolutions, BatchNorm and two fully connected layers, fused."""

from fused_ops.hr_chain.module import HRBlock
from fused_ops.hr_chain.op import hr_block

__all__ = ["HRBlock", "hr_block"]
