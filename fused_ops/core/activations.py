"""Activations: as PyTorch functions, and with their derivatives for Triton kernels, on float32 tiles."""

from __future__ import annotations

import torch.nn.functional as F

from fused_ops.core.triton_support import jit, tl

# The names that every operator takes, and what they mean.
FUNCTIONS = {
    "none": lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "hardswish": F.hardswish,
}


@jit
def activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        # A comparison, not a maximum: NaN has to come out as NaN, as from torch.
        return tl.where(x < 0.0, 0.0, x)
    elif ACTIVATION == "relu6":
        return tl.where(x > 6.0, 6.0, tl.where(x < 0.0, 0.0, x))
    elif ACTIVATION == "silu":
        return x * tl.sigmoid(x)
    elif ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # 0.5 (1 + tanh(u)) = sigmoid(2 u)
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == "hardswish":
        return x * tl.where(x > 3.0, 6.0, tl.where(x < -3.0, 0.0, x + 3.0)) * 0.16666666666666666
    else:
        return x


@jit
def activation_gradient(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        return tl.where(x <= 0.0, 0.0, 1.0)
    elif ACTIVATION == "relu6":
        return tl.where((x <= 0.0) | (x >= 6.0), 0.0, 1.0)
    elif ACTIVATION == "silu":
        s = tl.sigmoid(x)
        return s * (1.0 + x * (1.0 - s))
    elif ACTIVATION == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        return cdf + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif ACTIVATION == "gelu_tanh":
        s = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        return s + x * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    elif ACTIVATION == "hardswish":
        return tl.where(x > 3.0, 1.0, tl.where(x < -3.0, 0.0, (2.0 * x + 3.0) * 0.16666666666666666))
    else:
        return tl.full(x.shape, 1.0, tl.float32)
