"""Depthwise convolution fused with BatchNorm, activation and residual."""

from fused_ops.depthwise.module import DepthwiseConvBNAct
from fused_ops.depthwise.op import BatchNormState, depthwise_conv

__all__ = ["BatchNormState", "DepthwiseConvBNAct", "depthwise_conv"]
