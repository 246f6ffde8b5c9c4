"""Fused operators for vision backbones: CUDA and Triton kernels behind PyTorch modules and functions."""

from fused_ops.accelerate import Report, accelerate, restore
from fused_ops.attention import SpatialReductionAttention, few_key_attention
from fused_ops.blocks import DSBlock
from fused_ops.co_attention import CoAttention
from fused_ops.core.backends import BackendUnavailableError, backend
from fused_ops.core.explain import explain
from fused_ops.core.layer_norm import LayerNormState
from fused_ops.depthwise import BatchNormState, DepthwiseConv2d, DepthwiseConvBNAct, depthwise_conv, fold
from fused_ops.feed_forward import MLPBlock, mlp_block
from fused_ops.gate import (
    context_pool,
    gate_scale,
    pool_channels,
    pool_map,
    pool_positions,
    squeeze_excite,
)
from fused_ops.hr_chain import HRBlock, hr_block
from fused_ops.resample import resample_map

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailableError",
    "BatchNormState",
    "CoAttention",
    "DSBlock",
    "DepthwiseConv2d",
    "DepthwiseConvBNAct",
    "HRBlock",
    "LayerNormState",
    "MLPBlock",
    "Report",
    "SpatialReductionAttention",
    "accelerate",
    "backend",
    "context_pool",
    "depthwise_conv",
    "explain",
    "few_key_attention",
    "fold",
    "gate_scale",
    "hr_block",
    "mlp_block",
    "pool_channels",
    "pool_map",
    "pool_positions",
    "resample_map",
    "restore",
    "squeeze_excite",
]
