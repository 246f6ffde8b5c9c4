"""Attentive feature aggregation and scale-space rendering: maps of several levels or scales made one.

Yang et al., "Dense Prediction with Attentive Feature Aggregation", WACV 2023 (arXiv 2111.00770), section 3.
Attention modules return logits, since sigmoids and products are part of the pass over the maps. Parameters
have the names of the public code, in its form with BatchNorm and ReLU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fused_ops.gate import attentive_fusion, multi_level_fusion, pool_channels, render_scales, weighted_sum
from fused_ops.gate.reference import layer_weights
from fused_ops.resample import resample_map

__all__ = [
    "AttentiveFusion",
    "ChannelAttention",
    "MultiLevelFusion",
    "ScaleSpaceRendering",
    "SpatialAttention",
]

_Device = torch.device | str | None


def _conv_norm_relu(in_channels: int, out_channels: int, kernel_size: int, **factory: Any) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False, **factory),
        nn.Sequential(nn.BatchNorm2d(out_channels, **factory), nn.ReLU(inplace=True)),
    )


class _Attention(nn.Module):
    def init_weights(self) -> None:
        """Initialise as the public code does: convolutions by their inputs, BatchNorm's weights uniformly."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
            elif isinstance(module, nn.modules.batchnorm._BatchNorm):
                nn.init.uniform_(module.weight)
                nn.init.zeros_(module.bias)


class SpatialAttention(_Attention):
    """What a map says about its positions: logits (B, 1, H, W) from two 3x3 convolutions and one of 1x1.

    Args:
        channels: C.
    """

    def __init__(self, channels: int, device: _Device = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.conv = _conv_norm_relu(channels, channels, 3, **factory)
        self.conv_inner = _conv_norm_relu(channels, channels, 3, **factory)
        self.final = nn.Sequential(nn.Conv2d(channels, 1, 1, bias=False, **factory))
        self.init_weights()

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, 1, H, W) of ``x`` (B, C, H, W)."""
        return self.final(self.conv_inner(self.conv(x)))


class ChannelAttention(_Attention):
    """What a map says about its channels: logits (B, C), ``mlp(max x) + mlp(mean x)`` with a shared MLP.

    The MLP has a BatchNorm over the images alone, which sees the maxima and then the means: in training it
    needs more than one image per process, or SyncBatchNorm.

    Args:
        channels: C.
        reduction: C over the width of the MLP.

    Raises:
        ValueError: if nothing would be left of the MLP.
    """

    def __init__(
        self,
        channels: int,
        reduction: int = 16,
        device: _Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        hidden = channels // reduction
        if hidden < 1:
            raise ValueError(f"channels must be at least {reduction} for this reduction, got {channels}")
        self.conv1 = _conv_norm_relu(channels, hidden, 1, **factory)
        self.conv2 = nn.Sequential(nn.Conv2d(hidden, channels, 1, bias=False, **factory))
        self.init_weights()

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, C) of ``x`` (B, C, H, W), which is read once."""
        largest, mean = pool_channels(x, ("max", "mean"))[:, :, :, None, None].unbind(1)
        # Running statistics depend on the order.
        of_largest = self.conv2(self.conv1(largest))
        return (of_largest + self.conv2(self.conv1(mean))).flatten(1)


class AttentiveFusion(nn.Module):
    """Binary fusion of a map with a deeper one of the same size: ``s (1 - c) x + (1 - s) c y``.

    ``s = sigmoid(sa(x))`` per position and ``c = sigmoid(ca(y))`` per channel.

    Args:
        channels: C of both maps.
        reduction: see :class:`ChannelAttention`.

    Raises:
        ValueError: as :class:`ChannelAttention`.
    """

    def __init__(
        self,
        channels: int,
        reduction: int = 16,
        device: _Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.sa = SpatialAttention(channels, device=device, dtype=dtype)
        self.ca = ChannelAttention(channels, reduction, device=device, dtype=dtype)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The fused map, as ``x``: shallower (B, C, H, W); ``y``: deeper, projected and upsampled to that."""
        return attentive_fusion(x, y, self.sa(x), self.ca(y))


class MultiLevelFusion(nn.Module):
    """Fusion of the maps of several levels at the finest one's size and channels.

    All but the finest are projected (``proj_1``, ``proj_2``, ..., coarsest first) and upsampled bilinearly;
    ``sum_k w_k v_k g_k`` with ``w_k = s_k prod_{j>k} (1 - s_j)``, ``v_k`` the same of c, where s and c are
    the sigmoids of one :class:`SpatialAttention` and one :class:`ChannelAttention` for all levels.

    Args:
        channels: of every level, the coarsest first; two to five.
        reduction: see :class:`ChannelAttention`.

    Raises:
        ValueError: as :class:`ChannelAttention`, and for another number of levels.
    """

    def __init__(
        self,
        channels: Sequence[int],
        reduction: int = 16,
        device: _Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 2 <= len(channels) <= 5:
            raise ValueError(f"channels must be of two to five levels, got {tuple(channels)}")
        factory = {"device": device, "dtype": dtype}
        *coarser, finest = channels
        self.level_sa = SpatialAttention(finest, **factory)
        self.level_ca = ChannelAttention(finest, reduction, **factory)
        for k, count in enumerate(coarser, 1):
            self.add_module(f"proj_{k}", _conv_norm_relu(count, finest, 1, **factory))
        self.levels = len(channels)
        self.init_weights()

    def init_weights(self) -> None:
        """Initialise the projections as the public code does: by their outputs."""
        for k in range(1, self.levels):
            nn.init.kaiming_normal_(self.get_submodule(f"proj_{k}")[0].weight, mode="fan_out")

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """The fused map, as the last of ``maps``, which go from the coarsest to the finest."""
        if len(maps) != self.levels:
            raise ValueError(f"maps has {len(maps)} tensors; it must have {self.levels}, one for each level")
        *coarser, finest = maps
        projected = (self.get_submodule(f"proj_{k}")(x) for k, x in enumerate(coarser, 1))
        levels = [*(_resized(x, finest) for x in projected), finest]
        # Both are shared, and their BatchNorms see one level after the other.
        gates = [(self.level_sa(x), self.level_ca(x)) for x in levels]
        return multi_level_fusion(levels, *zip(*gates, strict=True))


class ScaleSpaceRendering(nn.Module):
    """Predictions at several scales made one by volume rendering along the scales.

    ``phi_r = |attention(features_r)|``, and the predictions' weights are
    ``(1 - exp(-phi_r)) prod_{q<r} exp(-phi_q)``: small scales are in front.

    Args:
        channels: of the features.
    """

    def __init__(self, channels: int, device: _Device = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.scale_space_attn = SpatialAttention(channels, device=device, dtype=dtype)

    def forward(self, features: Sequence[Tensor], predictions: Sequence[Tensor], full: int = -1) -> Tensor:
        """The prediction at the size of ``predictions[full]``.

        Args:
            features: (B, C, h, w) at every scale, the smallest first; one to five.
            predictions: (B, classes, H, W) at every scale.
            full: which scale has the sizes that features and predictions are resampled to.

        Raises:
            ValueError: there is not one prediction for each scale.
        """
        if len(features) != len(predictions):
            raise ValueError(
                f"predictions has {len(predictions)} tensors; it must have {len(features)}, one per scale"
            )
        logits = [self.scale_space_attn(_resized(x, features[full])) for x in features]
        predictions = [_resized(x, predictions[full]) for x in predictions]
        if logits[0].shape[2:] == predictions[0].shape[2:]:
            return render_scales(predictions, logits)
        weights = layer_weights(logits, len(logits), "density")
        return weighted_sum(predictions, [_resized(weight, predictions[0]) for weight in weights])


def _resized(x: Tensor, like: Tensor) -> Tensor:
    return x if x.shape[2:] == like.shape[2:] else resample_map(x, like.shape[2:])
