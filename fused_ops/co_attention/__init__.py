"""Co-attention: local tokens attend to global tokens and back."""

from fused_ops.co_attention.module import CoAttention
from fused_ops.co_attention.op import co_attention

__all__ = ["CoAttention", "co_attention"]
