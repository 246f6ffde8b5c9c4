"""The feed-forward chain: norm, two fully connected layers with an activation between them, residual."""

from fused_ops.feed_forward.module import ConvMLPBlock, MLPBlock
from fused_ops.feed_forward.op import conv_mlp_block, mlp_block

__all__ = ["ConvMLPBlock", "MLPBlock", "conv_mlp_block", "mlp_block"]
