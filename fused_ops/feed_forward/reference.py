"""The feed-forward chain in plain PyTorch: the definition.

Runs on any device and dtype, float64 too, with PyTorch's own autograd. It is the oracle of the tests, the
path taken where no kernel can run, and the baseline of the measurements.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_ops.core.activations import FUNCTIONS
from fused_ops.core.distributed import synchronised_batch_norm


def feed_forward(
    x: Tensor,
    fc1_weight: Tensor,
    fc2_weight: Tensor,
    fc1_bias: Tensor | None = None,
    fc2_bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    layer_scale: Tensor | None = None,
    mean: Tensor | None = None,
    var: Tensor | None = None,
    residual: Tensor | None = None,
    drop_path: Tensor | None = None,
    *,
    norm: str = "none",
    batch_stats: bool = False,
    momentum: float = 0.0,
    eps: float = 1e-5,
    activation: str = "gelu",
    group: str = "",
    compute: torch.dtype | None = None,
    conv_weight: Tensor | None = None,
    conv_bias: Tensor | None = None,
    conv_activation: str = "none",
    conv_identity: bool = False,
    size: tuple[int, ...] = (),
) -> Tensor:
    """``[residual +] drop_path * layer_scale * fc2(q)`` with ``h = act(fc1(norm(x)))`` and ``q = h``.

    With ``conv_weight``, ``q = conv_activation(conv(h) + conv_bias) [+ h]``, where conv is depthwise, on maps
    padded with zeros.

    Args:
        x: tokens (B, ..., C).
        fc1_weight, fc2_weight: (hidden, C) and (C, hidden); cast to ``compute``, as both biases.
        fc1_bias, fc2_bias: (hidden) and (C), or None.
        norm_weight, norm_bias: affine parameters of the norm (C), or None.
        layer_scale: factor per channel (C), or None.
        mean, var: running statistics (C) of a BatchNorm. With ``batch_stats`` they are updated in place with
            ``momentum`` (``var`` with the unbiased variance) and may be None; without, they normalise.
        residual: (B, ..., C), or None.
        drop_path: factor per image (B), or None.
        norm: none, batch (over all tokens) or layer (over channels).
        group: name of the process group over which batch statistics are taken together, or "".
        compute: dtype of both products and the convolution; None for that of ``x``.
        conv_weight, conv_bias: (hidden, 1, 3, 3) and (hidden), or None; cast to ``compute``.
        conv_identity: add what the convolution gets.
        size: (H, W) of the map that tokens (B, H*W, C) are, where there is a convolution.

    Returns:
        (B, ..., C) in the dtype of ``residual``, without one in that of the products.

    Raises:
        ValueError: from PyTorch, for batch statistics over one value per channel.
    """
    compute = x.dtype if compute is None else compute

    def cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        return None if tensor is None else tensor.to(dtype)

    z = x
    if norm == "layer":
        channels = (x.shape[-1],)
        z = F.layer_norm(x, channels, cast(norm_weight, x.dtype), cast(norm_bias, x.dtype), eps)
    elif norm == "batch":
        rows = x.reshape(-1, x.shape[-1])
        if group:
            rows = rows[:, :, None, None]
            z = synchronised_batch_norm(rows, mean, var, norm_weight, norm_bias, momentum, eps, group)
        else:
            z = F.batch_norm(rows, mean, var, norm_weight, norm_bias, batch_stats, momentum, eps)
        z = z.reshape(x.shape)
    hidden = FUNCTIONS[activation](
        F.linear(z.to(compute), cast(fc1_weight, compute), cast(fc1_bias, compute))
    )
    if conv_weight is not None:
        given = hidden.unflatten(1, size).permute(0, 3, 1, 2)
        convolved = F.conv2d(
            given, cast(conv_weight, compute), cast(conv_bias, compute), padding=1, groups=given.shape[1]
        )
        convolved = FUNCTIONS[conv_activation](convolved)
        convolved = convolved + given if conv_identity else convolved
        hidden = convolved.permute(0, 2, 3, 1).flatten(1, 2)
    out = F.linear(hidden, cast(fc2_weight, compute), cast(fc2_bias, compute))
    if layer_scale is not None:
        out = out * layer_scale.to(out.dtype)
    if drop_path is not None:
        out = out * drop_path.to(out.dtype).view(-1, *(1,) * (x.dim() - 1))
    return out if residual is None else residual + out
