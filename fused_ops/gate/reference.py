"""Poolings of a map, its gating, and gated sums of maps in plain PyTorch: the definition.

Runs on any device and dtype, float64 too, with PyTorch's own autograd. It is the oracle of the tests, the
path taken where no kernel can run, and the baseline of the measurements.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_ops.core.activations import FUNCTIONS

GATES = {"sigmoid": torch.sigmoid, "hard_sigmoid": F.hardsigmoid, "none": lambda x: x}
POOLINGS = ("mean", "max", "entropy")
OPACITIES = ("sigmoid", "density", "none")


def softmax_entropy(x: Tensor, dim: int | tuple[int, ...], normalise: bool = True) -> Tensor:
    """Entropy of a softmax over ``dim``, in nats, or in [0, 1] after division by the largest one.

    Computed in at least float32; the result has the dtype of ``x``, without ``dim``.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    shifted = wide - wide.amax(dim, keepdim=True)
    # With Z the sum of exp(shifted): entropy = log Z - sum(exp(shifted) * shifted) / Z. A probability that
    # underflows contributes 0 here, where p * log p would be NaN.
    weights = shifted.exp()
    total = weights.sum(dim)
    entropy = total.log() - (weights * shifted).sum(dim) / total
    dims = (dim,) if isinstance(dim, int) else dim
    count = math.prod(x.shape[d] for d in dims)
    if normalise and count > 1:
        entropy = entropy / math.log(count)
    return entropy.to(x.dtype)


def pool(
    x: Tensor,
    channels: Sequence[str] = (),
    positions: Sequence[str] = (),
    channel_gate: Tensor | None = None,
    gate: str = "sigmoid",
    normalise: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """Poolings of ``x``, or of ``x * gate(channel_gate)``: per channel over positions, and the other way.

    Args:
        x: (B, C, H, W).
        channels, positions: any of :data:`POOLINGS`.
        channel_gate: logits (B, C), or None.
        gate: of :data:`GATES`.
        normalise: divide entropies by their largest value.

    Returns:
        (B, len(channels), C) and (B, len(positions), H, W), each None where nothing is asked for. Where
        values tie, the first one is the maximum that gets the gradient.
    """
    if channel_gate is not None:
        x = x * GATES[gate](channel_gate.to(x.dtype))[:, :, None, None]

    def per_channel(name: str) -> Tensor:
        if name == "mean":
            return x.mean((2, 3))
        # Pooling by index, since amax would share the gradient among ties.
        return (
            F.adaptive_max_pool2d(x, 1).flatten(1) if name == "max" else softmax_entropy(x, (2, 3), normalise)
        )

    def per_position(name: str) -> Tensor:
        if name == "mean":
            return x.mean(1)
        return x.max(1).values if name == "max" else softmax_entropy(x, 1, normalise)

    return (
        torch.stack([per_channel(name) for name in channels], 1) if channels else None,
        torch.stack([per_position(name) for name in positions], 1) if positions else None,
    )


def context_pool(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(B, C): mean over positions, weighted by a softmax of ``conv1x1(x)``; ``weight`` (1, C, 1, 1)."""
    bias = None if bias is None else bias.to(x.dtype)
    weights = F.conv2d(x, weight.to(x.dtype), bias).flatten(2).softmax(2)
    return (x.flatten(2) @ weights.transpose(1, 2)).flatten(1)


def gate_scale(
    x: Tensor,
    channel_gate: Tensor | None = None,
    position_gate: Tensor | None = None,
    channel_add: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    gate: str = "sigmoid",
    combine: str = "product",
    activation: str = "none",
) -> Tensor:
    """``activation(x * g + channel_add + residual)`` with g from logits per channel and per position.

    Args:
        x: (B, C, H, W).
        channel_gate, channel_add: (B, C), or None for no scaling and nothing to add.
        position_gate: (B, 1, H, W), or None.
        residual: (B, C, H, W), or None.
        gate: of :data:`GATES`.
        combine: ``product``: ``g = gate(channel) * gate(position)``; ``sum``: ``gate(channel + position)``.
        activation: of :data:`fused_ops.core.activations.FUNCTIONS`.
    """
    channel = None if channel_gate is None else channel_gate.to(x.dtype)[:, :, None, None]
    position = None if position_gate is None else position_gate.to(x.dtype)
    if combine == "sum" and channel is not None and position is not None:
        out = x * GATES[gate](channel + position)
    else:
        out = x
        for logits in (channel, position):
            if logits is not None:
                out = out * GATES[gate](logits)
    if channel_add is not None:
        out = out + channel_add.to(x.dtype)[:, :, None, None]
    if residual is not None:
        out = out + residual
    return FUNCTIONS[activation](out)


def layer_weights(values: Sequence[Tensor], count: int, opacity: str) -> list[Tensor]:
    """Weights of ``count`` layers, the front one first: its opacity times how clear those before it are.

    Args:
        values: one per layer, or one less, which makes the last layer opaque.
        opacity: ``sigmoid``: that of the value; ``density``: ``1 - exp(-|value|)``; ``none``: the values are
            the weights.
    """
    if opacity == "none":
        return list(values)
    weights = []
    before = None
    for value in values:
        if opacity == "sigmoid":
            opaque, clear = value.sigmoid(), (-value).sigmoid()
        else:
            density = value.abs()
            opaque, clear = -torch.expm1(-density), (-density).exp()
        weights.append(opaque if before is None else before * opaque)
        before = clear if before is None else before * clear
    return weights if len(values) == count else [*weights, before]


def aggregate(
    maps: Sequence[Tensor],
    positions: Sequence[Tensor],
    channels: Tensor | None = None,
    opacity: str = "sigmoid",
    reverse_channels: bool = False,
) -> Tensor:
    """Sum of ``maps``, each times its weight per position and its weight per channel.

    Args:
        maps: (B, C, H, W) each, the front layer of the positions first.
        positions: (B, 1, H, W) each, see :func:`layer_weights`.
        channels: (B, C, layers), the same for channels; None for no weights per channel.
        opacity: of :data:`OPACITIES`.
        reverse_channels: the front layer of the channels is the last map.
    """
    dtype = maps[0].dtype
    weights = layer_weights([value.to(dtype) for value in positions], len(maps), opacity)
    if channels is not None:
        values = [value[:, :, None, None] for value in channels.to(dtype).unbind(2)]
        others = layer_weights(values, len(maps), opacity)
        others = others[::-1] if reverse_channels else others
        weights = [weight * other for weight, other in zip(weights, others, strict=True)]
    out = maps[0] * weights[0]
    for one, weight in zip(maps[1:], weights[1:], strict=True):
        out = out + one * weight
    return out
