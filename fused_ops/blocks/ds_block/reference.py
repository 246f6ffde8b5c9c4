"""The DS-Block in plain PyTorch functions over its parameters: the definition.

Written for reading, not for speed: NCHW, 1x1 convolutions, both score matrices spelt out. Runs on any device
and dtype, float64 too, with PyTorch's own autograd. It is the oracle of the tests.

Source: Mao et al., "Dual-stream Network for Visual Recognition", NeurIPS 2021 (arXiv 2105.14734), in the form
of the public code SteveTsui/DS-Net and PaddleClas. The forms without alignment and with the depthwise
down-sampler have no public code and are inferred; see the README of this folder.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_ops.core.drop_path import drop_path as apply_drop_path

GLOBAL_DOWN = ("bilinear", "dwconv")


def split_channels(dim: int, alpha: float) -> tuple[int, int]:
    """Channels of the global and of the local stream: ``alpha`` is the share of the global one.

    The local stream has ``int(dim * (1 - alpha))`` channels; the small constant only undoes the rounding of
    ``1 - alpha`` (0.9 of 320 leaves 32, not 31).
    """
    local = int(dim * (1.0 - alpha) + 1e-6)
    return dim - local, local


def grid_size(height: int, width: int, downsample: int) -> tuple[int, int]:
    """Token grid of the bilinear down-sampler: floors, never empty."""
    return max(height // downsample, 1), max(width // downsample, 1)


def attention(query: Tensor, key: Tensor, value: Tensor, num_heads: int, dropout: float = 0.0) -> Tensor:
    """Multi-head softmax(Q Kᵀ / sqrt(d_h)) V of (B, Nq, C), (B, Nk, C), (B, Nk, C); returns (B, Nq, C)."""
    query, key, value = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (query, key, value))
    scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
    weights = F.dropout(scores.softmax(dim=-1), dropout, training=dropout > 0.0)
    return (weights @ value).transpose(1, 2).flatten(2)


def ds_block(
    x: Tensor,
    tensors: Mapping[str, Tensor],
    *,
    num_heads: int,
    downsample: int,
    alpha: float = 0.5,
    align: bool = True,
    global_down: str = "bilinear",
    training: bool = False,
    attn_drop: float = 0.0,
    proj_drop: float = 0.0,
    drop_path: float = 0.0,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """One DS-Block.

    Args:
        x: input (B, dim, H, W), any strides, any floating dtype.
        tensors: parameters and buffers by their official names (``pos_embed.weight``, ``norm1.running_mean``,
            ...), as in the module's ``state_dict(keep_vars=True)``.
        num_heads: heads of every attention.
        downsample: s; the global stream attends over a grid of floor(H/s) x floor(W/s) tokens.
        alpha: share of channels of the global stream; 0 is convolution only, 1 attention only.
        align: inter-scale alignment, the co-attention between the streams.
        global_down: ``"bilinear"``, or ``"dwconv"`` for a depthwise convolution with kernel 2s+1, stride s.
        training: batch statistics; running ones are updated in place with ``momentum``.
        attn_drop: dropout of all softmax outputs, in training.
        proj_drop: dropout after the last 1x1 convolution and inside the MLP, in training.
        drop_path: stochastic depth of both residual branches, in training.
        eps: of BatchNorm and LayerNorm.

    Returns:
        (B, dim, H, W).
    """
    dim, (height, width) = x.shape[1], x.shape[-2:]
    num_global, num_local = split_channels(dim, alpha)
    attn_drop = attn_drop if training else 0.0

    def batch_norm(value: Tensor, name: str) -> Tensor:
        if training and f"{name}.num_batches_tracked" in tensors:
            tensors[f"{name}.num_batches_tracked"].add_(1)
        return F.batch_norm(
            value,
            tensors.get(f"{name}.running_mean"),
            tensors.get(f"{name}.running_var"),
            tensors[f"{name}.weight"],
            tensors[f"{name}.bias"],
            training,
            momentum,
            eps,
        )

    def layer_norm(value: Tensor, name: str) -> Tensor:
        return F.layer_norm(value, value.shape[-1:], tensors[f"{name}.weight"], tensors[f"{name}.bias"], eps)

    def conv(value: Tensor, name: str, stride: int = 1, padding: int = 0) -> Tensor:
        weight = tensors[f"{name}.weight"]
        groups = value.shape[1] // weight.shape[1]
        return F.conv2d(value, weight, tensors[f"{name}.bias"], stride, padding, groups=groups)

    def linear(value: Tensor, name: str) -> Tensor:
        return F.linear(value, tensors[f"{name}.weight"], tensors[f"{name}.bias"])

    def resize(value: Tensor, size: tuple[int, int]) -> Tensor:
        return F.interpolate(value, size, mode="bilinear", align_corners=False, antialias=False)

    def project_dropout(value: Tensor) -> Tensor:
        return F.dropout(value, proj_drop, training)

    x1 = x + conv(x, "pos_embed", padding=1)
    y = conv(batch_norm(x1, "norm1"), "conv1")
    global_in, local_in = y.split((num_global, num_local), dim=1)
    streams = []

    if num_local:
        local = local_in + conv(batch_norm(local_in, "norm_conv1"), "conv", padding=1)

    if num_global:
        if global_down == "dwconv":
            grid = conv(global_in, "attn_down", stride=downsample, padding=downsample)
        else:
            grid = resize(global_in, grid_size(height, width, downsample))
        size = (grid.shape[-2], grid.shape[-1])
        tokens = grid.flatten(2).transpose(1, 2)
        qkv = linear(layer_norm(tokens, "norm_sa1"), "channel_up").chunk(3, dim=-1)
        tokens = tokens + attention(*qkv, num_heads, attn_drop)

    if align:
        local_projected = conv(batch_norm(local, "norm_conv2"), "cross_channel_up_conv")
        query_l, key_l, value_l = local_projected.flatten(2).transpose(1, 2).chunk(3, dim=-1)
        query_g, key_g, value_g = linear(layer_norm(tokens, "norm_sa2"), "cross_channel_up_sa").chunk(3, -1)
        to_local = linear(attention(query_l, key_g, value_g, num_heads, attn_drop), "fuse_channel_conv")
        to_global = linear(attention(query_g, key_l, value_l, num_heads, attn_drop), "fuse_channel_sa")
        local = local + to_local.transpose(1, 2).unflatten(2, (height, width))
        tokens = tokens + to_global

    if num_local:
        streams.append(local)
    if num_global:
        streams.append(resize(tokens.transpose(1, 2).unflatten(2, size), (height, width)))

    mixed = project_dropout(conv(torch.cat(streams, dim=1), "conv2"))
    x2 = x1 + apply_drop_path(mixed, drop_path, training)
    hidden = project_dropout(F.gelu(conv(batch_norm(x2, "norm2"), "mlp.fc1")))
    return x2 + apply_drop_path(project_dropout(conv(hidden, "mlp.fc2")), drop_path, training)
