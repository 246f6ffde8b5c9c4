"""Attention of many queries on few keys."""

from fused_ops.attention.block import attention_block
from fused_ops.attention.module import SpatialReductionAttention
from fused_ops.attention.op import few_key_attention

__all__ = ["SpatialReductionAttention", "attention_block", "few_key_attention"]
