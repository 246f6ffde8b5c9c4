"""Depthwise convolution with BatchNorm, activation and residual in plain PyTorch: the definition.

Runs on any device and dtype, float64 too, with PyTorch's own autograd (second derivatives included). It is
the oracle of the tests, the path taken where no kernel can run, and the baseline of the measurements.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_ops.core.activations import FUNCTIONS
from fused_ops.core.distributed import synchronised_batch_norm


def depthwise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    mean: Tensor | None = None,
    var: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    norm: str = "none",
    batch_stats: bool = False,
    momentum: float = 0.0,
    eps: float = 1e-5,
    activation: str = "none",
    residual_mode: str = "none",
    group: str = "",
) -> Tensor:
    """``act(norm(conv(norm(x)))) + residual`` with at most one of the two norms.

    With ``z = BN(x)`` for ``norm="pre"`` (padding is added after the norm), ``c = conv(z) + bias``,
    ``n = BN(c)`` for ``norm="post"``: the result is ``act(n + residual)`` for ``residual_mode="before"``
    and ``act(n) + residual`` for ``"after"``.

    Args:
        x: input (B, C, H, W).
        weight: filters (C, 1, kh, kw); cast to the dtype of ``x``, as are ``bias``.
        norm_weight, norm_bias: affine parameters of the norm (C), or None.
        mean, var: running statistics (C). With ``batch_stats`` they are updated in place with ``momentum``
            (``var`` with the unbiased variance) and may be None; without, they normalise.
        group: name of the process group over which batch statistics are taken together, or "".

    Returns:
        (B, C, Ho, Wo) in the dtype of ``x``.

    Raises:
        ValueError: from PyTorch, for batch statistics over one value per channel.
    """

    def batch_norm(value: Tensor) -> Tensor:
        if group:
            return synchronised_batch_norm(value, mean, var, norm_weight, norm_bias, momentum, eps, group)
        return F.batch_norm(value, mean, var, norm_weight, norm_bias, batch_stats, momentum, eps)

    value = batch_norm(x) if norm == "pre" else x
    value = F.conv2d(
        value,
        weight.to(x.dtype),
        None if bias is None else bias.to(x.dtype),
        stride,
        padding,
        dilation,
        groups=x.shape[1],
    )
    if norm == "post":
        value = batch_norm(value)
    if residual_mode == "before":
        value = value + residual
    value = FUNCTIONS[activation](value)
    if residual_mode == "after":
        value = value + residual
    return value


def statistics(value: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance per channel of (B, C, H, W), in float32 or wider."""
    wide = value.to(torch.promote_types(value.dtype, torch.float32))
    var, mean = torch.var_mean(wide, dim=(0, 2, 3), correction=0)
    return mean, var
