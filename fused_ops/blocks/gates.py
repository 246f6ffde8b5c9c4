"""Gates at the end of residual branches: what a map's own statistics say about its channels and positions.

Every gate maps (B, C, H, W) to the same shape, and with a second map, the shortcut, to the end of a residual
block, ``relu(gate(x) + shortcut)``, so that scaling, addition and activation can be one pass over memory.
Parameters have the names of the public code.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "CBAM",
    "ECA",
    "CollaborativeAttention",
    "Gate",
    "GlobalContext",
    "SwitchableExcitation",
    "adaptive_kernel_size",
    "softmax_entropy",
]


class Gate(nn.Module):
    """A gate: subclasses define :meth:`gated` and, where PyTorch's own is not meant, :meth:`init_gate`."""

    def gated(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        raise NotImplementedError

    def init_gate(self) -> None:
        """Initialise what is initialised otherwise than PyTorch does."""

    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        """``gated(x)``, or ``relu(gated(x) + shortcut)``; all maps are (B, C, H, W)."""
        out = self.gated(x)
        return out if shortcut is None else F.relu(out + shortcut)


class _ChannelGate(nn.Module):
    """Two poolings through one MLP, summed: logits (B, C)."""

    def __init__(self, channels: int, hidden: int, **factory: Any) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Flatten(),
            nn.Linear(channels, hidden, **factory),
            nn.ReLU(),
            nn.Linear(hidden, channels, **factory),
        )

    def forward(self, x: Tensor) -> Tensor:
        # Pooling by index: where values tie, the first one gets the gradient.
        return self.mlp(F.adaptive_avg_pool2d(x, 1)) + self.mlp(F.adaptive_max_pool2d(x, 1))


class _SpatialGate(nn.Module):
    """Largest and mean channel, 7x7 convolution, BatchNorm: logits (B, 1, H, W)."""

    def __init__(self, **factory: Any) -> None:
        super().__init__()
        self.spatial = nn.Sequential(
            OrderedDict(
                conv=nn.Conv2d(2, 1, 7, padding=3, bias=False, **factory),
                bn=nn.BatchNorm2d(1, momentum=0.01, **factory),
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.spatial(torch.cat((x.max(1, keepdim=True).values, x.mean(1, keepdim=True)), 1))


class CBAM(Gate):
    """Convolutional block attention, Woo et al., ECCV 2018 (arXiv 1807.06521), section 3.

    First channels, then positions: ``y = x * sigmoid(mlp(avg x) + mlp(max x))``, then
    ``y * sigmoid(bn(conv7x7([max over channels of y; mean over channels of y])))``. The MLP is shared, and
    its biases count twice.

    From the public code: the spatial BatchNorm's momentum of 0.01, and its weight of 0 at the start, which
    makes the spatial gate one half everywhere.

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
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.ChannelGate = _ChannelGate(channels, _reduced(channels, 1 / reduction), **factory)
        self.SpatialGate = _SpatialGate(**factory)
        self.init_gate()

    def init_gate(self) -> None:
        spatial = self.SpatialGate.spatial
        nn.init.kaiming_normal_(spatial.conv.weight, mode="fan_out")
        nn.init.zeros_(spatial.bn.weight)
        for index in (1, 3):
            nn.init.zeros_(self.ChannelGate.mlp[index].bias)

    def gated(self, x: Tensor) -> Tensor:
        x = x * self.ChannelGate(x).sigmoid()[:, :, None, None]
        return x * self.SpatialGate(x).sigmoid()


def adaptive_kernel_size(channels: int) -> int:
    """ECA's odd kernel size for a number of channels, with gamma 2 and b 1 (paper equation 12).

    The released checkpoints of ECA-Net do not follow it.
    """
    size = int(abs((math.log2(channels) + 1) / 2))
    return size if size % 2 else size + 1


class ECA(Gate):
    """Efficient channel attention, Wang et al., CVPR 2020 (arXiv 1910.03151), section 3.

    ``x * sigmoid(conv1d(avg x))``, where the convolution runs over the channels as a sequence.

    Args:
        channels: C.
        kernel_size: odd; :func:`adaptive_kernel_size` if None.

    Raises:
        ValueError: for an even kernel size.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        kernel_size = adaptive_kernel_size(channels) if kernel_size is None else kernel_size
        self.conv = _channel_conv(kernel_size, device=device, dtype=dtype)

    def gated(self, x: Tensor) -> Tensor:
        return x * self.conv(x.mean((2, 3))[:, None]).sigmoid().view(x.shape[0], -1, 1, 1)


class GlobalContext(Gate):
    """Global context block, Cao et al., ICCV workshop 2019 (arXiv 1904.11492), section 3.3.

    The context is a weighted mean over the positions, its weights a softmax of a 1x1 convolution to one
    channel. ``add``: ``x + transform(context)``, without a sigmoid. The transform is convolution, LayerNorm,
    ReLU, convolution on (B, C, 1, 1).

    From the public code: ``pooling="avg"``, and ``mul``: ``x * sigmoid(transform(context))``, before the
    addition where both are asked for; the last convolutions start at 0, so the block starts as the identity
    of ``add``.

    Args:
        channels: C.
        ratio: width of the transform as a part of C, 1/16 or 1/4 in the paper.
        pooling: ``att`` or ``avg``.
        fusions: any of ``add`` and ``mul``.

    Raises:
        ValueError: for other words, and if nothing would be left of the transform.
    """

    def __init__(
        self,
        channels: int,
        ratio: float = 1 / 16,
        pooling: str = "att",
        fusions: Sequence[str] = ("add",),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        if pooling not in ("att", "avg"):
            raise ValueError(f"pooling must be 'att' or 'avg', got {pooling!r}")
        if not fusions or not {"add", "mul"}.issuperset(fusions):
            raise ValueError(f"fusions must be any of 'add' and 'mul', got {tuple(fusions)}")
        hidden = _reduced(channels, ratio)

        def transform(wanted: str) -> nn.Module | None:
            if wanted not in fusions:
                return None
            return nn.Sequential(
                nn.Conv2d(channels, hidden, 1, **factory),
                nn.LayerNorm([hidden, 1, 1], **factory),
                nn.ReLU(inplace=True),
                nn.Conv2d(hidden, channels, 1, **factory),
            )

        self.conv_mask = nn.Conv2d(channels, 1, 1, **factory) if pooling == "att" else None
        self.channel_add_conv = transform("add")
        self.channel_mul_conv = transform("mul")
        self.init_gate()

    def init_gate(self) -> None:
        if self.conv_mask is not None:
            nn.init.kaiming_normal_(self.conv_mask.weight, mode="fan_in")
            nn.init.zeros_(self.conv_mask.bias)
        for transform in (self.channel_add_conv, self.channel_mul_conv):
            if transform is not None:
                nn.init.zeros_(transform[-1].weight)
                nn.init.zeros_(transform[-1].bias)

    def gated(self, x: Tensor) -> Tensor:
        if self.conv_mask is None:
            context = x.mean((2, 3), keepdim=True)
        else:
            weights = self.conv_mask(x).flatten(2).softmax(2)
            context = (x.flatten(2) @ weights.transpose(1, 2)).unsqueeze(3)
        if self.channel_mul_conv is not None:
            x = x * self.channel_mul_conv(context).sigmoid()
        return x if self.channel_add_conv is None else x + self.channel_add_conv(context)


class SwitchableExcitation(Gate):
    """Switchable excitation module (SEM), Zhong et al., 2022 (arXiv 2209.05680).

    Three excitation operators of the pooled vector ``v`` (B, C): an MLP as in SE, a convolution over the
    channels as in ECA, and ``w1 * v + b1``. A linear layer and a sigmoid give three factors s per sample, and
    ``x * product of sigmoid(s_i * e_i(v))``. All three always run; the choice is soft.

    As in the public code: w1 starts at 0 and b1 at -1, so a fresh gate lets about a tenth through.

    Args:
        channels: C.
        hidden: width of the MLP; C/16 if None.
        kernel_size: of the convolution, odd; :func:`adaptive_kernel_size` if None.

    Raises:
        ValueError: for an even kernel size, and if nothing would be left of the MLP.
    """

    def __init__(
        self,
        channels: int,
        hidden: int | None = None,
        kernel_size: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        hidden = _reduced(channels, 1 / 16) if hidden is None else hidden
        kernel_size = adaptive_kernel_size(channels) if kernel_size is None else kernel_size
        self.switch_fc = nn.Linear(channels, 3, **factory)
        self.fc1 = nn.Linear(channels, hidden, **factory)
        self.fc2 = nn.Linear(hidden, channels, **factory)
        self.conv = _channel_conv(kernel_size, **factory)
        self.w1 = nn.Parameter(torch.empty(1, channels, 1, 1, **factory))
        self.b1 = nn.Parameter(torch.empty(1, channels, 1, 1, **factory))
        self.init_gate()

    def init_gate(self) -> None:
        nn.init.zeros_(self.w1)
        nn.init.constant_(self.b1, -1.0)

    def gated(self, x: Tensor) -> Tensor:
        v = x.mean((2, 3))
        switch = self.switch_fc(v).sigmoid()
        logits = (
            self.fc2(F.relu(self.fc1(v))),
            self.conv(v[:, None])[:, 0],
            self.w1.flatten(1) * v + self.b1.flatten(1),
        )
        gate = (switch[:, :1] * logits[0]).sigmoid()
        for i in (1, 2):
            gate = gate * (switch[:, i : i + 1] * logits[i]).sigmoid()
        return x * gate[:, :, None, None]


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
    count = x.numel() // max(entropy.numel(), 1)
    if normalise and count > 1:
        entropy = entropy / math.log(count)
    return entropy.to(x.dtype)


class CollaborativeAttention(Gate):
    """A RECONSTRUCTION of CAT, Wu et al., IET Computer Vision 2023 (arXiv 2212.06335).

    This is not the published module: the authors released no code. Known are a channel and a spatial branch,
    three poolings in each (mean, maximum and entropy of a softmax), an MLP shared by the poolings, and
    trainable scalars ("colla-factors") that weigh poolings and branches. The rest is this project's choice:

    * channel logits ``a1 mlp(mean) + a2 mlp(max) + a3 mlp(entropy)``, MLP without biases;
    * spatial logits ``conv7x7(b1 mean + b2 max + b3 entropy)`` over the channels, without bias;
    * ``x * sigmoid(e1 sigmoid(channel) + e2 sigmoid(spatial))``;
    * scalars start at 1; entropies are divided by their largest value.

    Args:
        channels: C.
        reduction: C over the width of the MLP.
        normalise: divide the entropies by their largest value.

    Raises:
        ValueError: if nothing would be left of the MLP.
    """

    def __init__(
        self,
        channels: int,
        reduction: int = 16,
        normalise: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        hidden = _reduced(channels, 1 / reduction)
        self.normalise = normalise
        self.mlp = nn.Sequential(
            nn.Linear(channels, hidden, bias=False, **factory),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, channels, bias=False, **factory),
        )
        self.spatial = nn.Conv2d(1, 1, 7, padding=3, bias=False, **factory)
        self.interior_c = nn.Parameter(torch.empty(3, **factory))
        self.interior_s = nn.Parameter(torch.empty(3, **factory))
        self.exterior = nn.Parameter(torch.empty(2, **factory))
        self.init_gate()

    def init_gate(self) -> None:
        for factors in (self.interior_c, self.interior_s, self.exterior):
            nn.init.ones_(factors)

    def gated(self, x: Tensor) -> Tensor:
        pooled = (x.mean((2, 3)), F.adaptive_max_pool2d(x, 1).flatten(1), self._entropy(x, (2, 3)))
        # The MLP has no bias but a ReLU, so the factors must come after it.
        channel = torch.einsum("p,pbc->bc", self.interior_c, self.mlp(torch.stack(pooled)))
        maps = (x.mean(1), x.max(1).values, self._entropy(x, 1))
        spatial = self.spatial(torch.einsum("p,pbhw->bhw", self.interior_s, torch.stack(maps)).unsqueeze(1))
        e1, e2 = self.exterior
        gate = e1 * channel.sigmoid()[:, :, None, None] + e2 * spatial.sigmoid()
        return x * gate.sigmoid()

    def _entropy(self, x: Tensor, dim: int | tuple[int, ...]) -> Tensor:
        return softmax_entropy(x, dim, self.normalise)


def _reduced(channels: int, ratio: float) -> int:
    hidden = int(channels * ratio)
    if hidden < 1:
        raise ValueError(
            f"channels must be at least {math.ceil(1 / ratio)} for this reduction, got {channels}"
        )
    return hidden


def _channel_conv(kernel_size: int, **factory: Any) -> nn.Conv1d:
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd and positive, got {kernel_size}")
    return nn.Conv1d(1, 1, kernel_size, padding=kernel_size // 2, bias=False, **factory)
