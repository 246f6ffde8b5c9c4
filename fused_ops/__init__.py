"""Fused operators for vision backbones: CUDA and Triton kernels behind PyTorch modules and functions."""

from fused_ops.accelerate import Report, accelerate, restore
from fused_ops.attention import SpatialReductionAttention, attention_block, few_key_attention
from fused_ops.blocks import DSBlock
from fused_ops.co_attention import CoAttention
from fused_ops.core.backends import BackendUnavailableError, backend
from fused_ops.core.explain import explain
from fused_ops.core.layer_norm import LayerNormState
from fused_ops.depthwise import BatchNormState, DepthwiseConv2d, DepthwiseConvBNAct, depthwise_conv, fold
from fused_ops.feed_forward import ConvMLPBlock, MLPBlock, conv_mlp_block, mlp_block
from fused_ops.gate import (
    attentive_fusion,
    context_pool,
    gate_scale,
    multi_level_fusion,
    pool_channels,
    pool_map,
    pool_positions,
    render_scales,
    squeeze_excite,
    weighted_sum,
)
from fused_ops.hr_chain import HRBlock, hr_block
from fused_ops.resample import resample_map

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailableError",
    "BatchNormState",
    "CoAttention",
    "ConvMLPBlock",
    "DSBlock",
    "DepthwiseConv2d",
    "DepthwiseConvBNAct",
    "HRBlock",
    "LayerNormState",
    "MLPBlock",
    "Report",
    "SpatialReductionAttention",
    "accelerate",
    "attention_block",
    "attentive_fusion",
    "backend",
    "context_pool",
    "conv_mlp_block",
    "depthwise_conv",
    "explain",
    "few_key_attention",
    "fold",
    "gate_scale",
    "hr_block",
    "mlp_block",
    "multi_level_fusion",
    "pool_channels",
    "pool_map",
    "pool_positions",
    "render_scales",
    "resample_map",
    "restore",
    "squeeze_excite",
    "weighted_sum",
]
