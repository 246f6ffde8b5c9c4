"""Gates at the end of residual branches: what a map's own statistics say about its channels and positions.

Every gate maps (B, C, H, W) to the same shape, and with a second map, the shortcut, to the end of a residual
block, ``relu(gate(x) + shortcut)``: scaling, addition and activation are one pass over memory. Small networks
on the pooled values are stock modules. Parameters have the names of the public code.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_ops.gate import context_pool, gate_scale, pool_channels, pool_map, pool_positions
from fused_ops.gate.reference import softmax_entropy

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
    """A gate: subclasses define :meth:`gates` and, where PyTorch's own is not meant, :meth:`init_gate`."""

    def gates(self, x: Tensor) -> dict[str, Any]:
        """What :func:`fused_ops.gate.gate_scale` does to ``x`` (B, C, H, W): its arguments by name."""
        raise NotImplementedError

    def init_gate(self) -> None:
        """Initialise what is initialised otherwise than PyTorch does."""

    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        """The gated map, or ``relu(gated + shortcut)``; all maps are (B, C, H, W)."""
        activation = "none" if shortcut is None else "relu"
        return gate_scale(x, **self.gates(x), residual=shortcut, activation=activation)


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
        mean, largest = pool_channels(x, ("mean", "max")).unbind(1)
        return self.mlp(mean) + self.mlp(largest)


class _SpatialGate(nn.Module):
    """Largest and mean channel of the scaled map, 7x7 convolution, BatchNorm: logits (B, 1, H, W)."""

    def __init__(self, **factory: Any) -> None:
        super().__init__()
        self.spatial = nn.Sequential(
            OrderedDict(
                conv=nn.Conv2d(2, 1, 7, padding=3, bias=False, **factory),
                bn=nn.BatchNorm2d(1, momentum=0.01, **factory),
            )
        )

    def forward(self, x: Tensor, channel_gate: Tensor) -> Tensor:
        return self.spatial(pool_positions(x, ("max", "mean"), channel_gate=channel_gate))


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

    def gates(self, x: Tensor) -> dict[str, Any]:
        channel = self.ChannelGate(x)
        return {"channel_gate": channel, "position_gate": self.SpatialGate(x, channel)}


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

    def gates(self, x: Tensor) -> dict[str, Any]:
        return {"channel_gate": self.conv(pool_channels(x))[:, 0]}


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

    def gates(self, x: Tensor) -> dict[str, Any]:
        if self.conv_mask is None:
            context = pool_channels(x)[:, 0]
        else:
            context = context_pool(x, self.conv_mask.weight, self.conv_mask.bias)
        context = context[:, :, None, None]
        transforms = {"channel_gate": self.channel_mul_conv, "channel_add": self.channel_add_conv}
        return {
            name: transform(context)[:, :, 0, 0]
            for name, transform in transforms.items()
            if transform is not None
        }


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

    def gates(self, x: Tensor) -> dict[str, Any]:
        v = pool_channels(x)[:, 0]
        switch = self.switch_fc(v).sigmoid()
        logits = (
            self.fc2(F.relu(self.fc1(v))),
            self.conv(v[:, None])[:, 0],
            self.w1.flatten(1) * v + self.b1.flatten(1),
        )
        gate = (switch[:, :1] * logits[0]).sigmoid()
        for i in (1, 2):
            gate = gate * (switch[:, i : i + 1] * logits[i]).sigmoid()
        return {"channel_gate": gate, "gate": "none"}


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

    def gates(self, x: Tensor) -> dict[str, Any]:
        poolings = ("mean", "max", "entropy")
        pooled, maps = pool_map(x, poolings, poolings, normalise=self.normalise)
        # The MLP has no bias but a ReLU, so the factors must come after it.
        channel = torch.einsum("p,bpc->bc", self.interior_c, self.mlp(pooled))
        spatial = self.spatial(torch.einsum("p,bphw->bhw", self.interior_s, maps).unsqueeze(1))
        e1, e2 = self.exterior
        return {
            "channel_gate": e1 * channel.sigmoid(),
            "position_gate": e2 * spatial.sigmoid(),
            "combine": "sum",
        }


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
