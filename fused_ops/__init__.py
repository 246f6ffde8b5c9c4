"""Fused operators for vision backbones: CUDA and Triton kernels behind PyTorch modules and functions."""

from fused_ops.blocks import DSBlock
from fused_ops.core.backends import BackendUnavailableError, backend
from fused_ops.core.explain import explain
from fused_ops.depthwise import BatchNormState, DepthwiseConv2d, DepthwiseConvBNAct, depthwise_conv, fold

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailableError",
    "BatchNormState",
    "DSBlock",
    "DepthwiseConv2d",
    "DepthwiseConvBNAct",
    "backend",
    "depthwise_conv",
    "explain",
    "fold",
]
