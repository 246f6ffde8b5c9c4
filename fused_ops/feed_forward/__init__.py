"""The feed-forward chain: norm, two fully connected layers with an activation between them, residual."""

from fused_ops.feed_forward.module import MLPBlock
from fused_ops.feed_forward.op import mlp_block

__all__ = ["MLPBlock", "mlp_block"]
