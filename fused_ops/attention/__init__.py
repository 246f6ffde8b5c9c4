"""Attention of many queries on few keys."""

from fused_ops.attention.module import SpatialReductionAttention
from fused_ops.attention.op import few_key_attention

__all__ = ["SpatialReductionAttention", "few_key_attention"]
