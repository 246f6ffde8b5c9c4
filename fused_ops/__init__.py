"""Fused operators for vision backbones: CUDA and Triton kernels behind PyTorch modules and functions."""

from fused_ops.blocks import DSBlock
from fused_ops.core.backends import BackendUnavailableError, backend
from fused_ops.core.explain import explain
from fused_ops.depthwise import BatchNormState, DepthwiseConvBNAct, depthwise_conv

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailableError",
    "BatchNormState",
    "DSBlock",
    "DepthwiseConvBNAct",
    "backend",
    "depthwise_conv",
    "explain",
]
