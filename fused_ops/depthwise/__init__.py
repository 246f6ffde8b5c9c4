"""Depthwise convolution fused with BatchNorm, activation and residual."""

from fused_ops.core.batch_norm import BatchNormState
from fused_ops.depthwise.module import DepthwiseConv2d, DepthwiseConvBNAct, fold
from fused_ops.depthwise.op import depthwise_conv

__all__ = ["BatchNormState", "DepthwiseConv2d", "DepthwiseConvBNAct", "depthwise_conv", "fold"]
