"""Residual blocks in two parts, and a ResNet of any of them: what the systems built on ResNet share.

timm's blocks add the shortcut and apply the ReLU at their end. Here :meth:`residual` ends before that, since
what several systems change is exactly the end: gates scale the branch before it is added, SDA keeps the sum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.resnet import BasicBlock, Bottleneck, downsample_conv
from torch import Tensor, nn

from fused_ops.core.checks import check_choice
from fused_ops.core.drop_path import DropPath
from fused_ops.models.arguments import check_lengths
from fused_ops.models.common import StagedBackbone, drop_path_rates, init_conv_fan_out

STEMS = ("imagenet", "cifar")
Gate = Callable[..., nn.Module]


class _GatedBlock(nn.Module):
    """The end of a residual block: ``relu(drop_path(gate(residual(x))) + shortcut(x))``."""

    gate_name: str | None

    def _add_gate(
        self, channels: int, gate_name: str, gate: Gate | None, drop_path: float, factory: dict[str, Any]
    ) -> None:
        """Put the gate under ``gate_name``, the name that it has in the public code."""
        self.gate_name = gate_name if gate is not None else None
        if gate is not None:
            self.add_module(gate_name, gate(channels, **factory))
        self.drop_path = DropPath(drop_path)

    def residual(self, x: Tensor) -> Tensor:
        """The branch up to its last BatchNorm."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.residual(x)
        if self.gate_name is None:
            return F.relu(self.drop_path(x) + shortcut)
        gate = getattr(self, self.gate_name)
        if self.training and self.drop_path.drop_prob > 0:
            return F.relu(self.drop_path(gate(x)) + shortcut)
        return gate(x, shortcut)


class GatedBasicBlock(_GatedBlock, BasicBlock):
    """timm's block of two 3x3 convolutions, (B, in, H, W) to (B, planes, H/stride, W/stride), with a gate.

    Args:
        inplanes, planes, stride, downsample: see timm's block.
        gate: ``gate(channels, device=, dtype=)`` makes a gate of :mod:`fused_ops.blocks.gates`; None for
            none.
        gate_name: the sub-module's name.
        drop_path: stochastic depth probability.
    """

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        gate: Gate | None = None,
        gate_name: str = "gate",
        drop_path: float = 0.0,
        **factory: Any,
    ) -> None:
        BasicBlock.__init__(self, inplanes, planes, stride, downsample, **factory)
        self._add_gate(planes * self.expansion, gate_name, gate, drop_path, factory)

    def residual(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x)))))


class GatedBottleneck(_GatedBlock, Bottleneck):
    """timm's 1x1, 3x3, 1x1 block, (B, in, H, W) to (B, 4 * planes, H/stride, W/stride), with a gate.

    The stride is on the 3x3 convolution.

    Args:
        groups: of the 3x3 convolution.
        inplanes, planes, stride, downsample, gate, gate_name, drop_path: see :class:`GatedBasicBlock`.
    """

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        gate: Gate | None = None,
        gate_name: str = "gate",
        drop_path: float = 0.0,
        groups: int = 1,
        **factory: Any,
    ) -> None:
        # timm's width is planes * base_width / 64 * cardinality; here it stays planes.
        Bottleneck.__init__(
            self,
            inplanes,
            planes,
            stride,
            downsample,
            cardinality=groups,
            base_width=64 // groups,
            **factory,
        )
        self._add_gate(planes * self.expansion, gate_name, gate, drop_path, factory)

    def residual(self, x: Tensor) -> Tensor:
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.act2(self.bn2(self.conv2(x)))
        return self.bn3(self.conv3(x))


class ResNetBackbone(StagedBackbone):
    """ResNet under public names: ``conv1``, ``bn1``, ``layer1`` to ``layer4``, ``fc``.

    The stride is on the 3x3 convolutions. Images (B, in_chans, H, W) from the total stride (32; 4 with the
    CIFAR stem) on. Feature maps are those of the stages: strides 4, 8, 16 and 32, or 1, 2 and 4.

    Args:
        in_chans: channels of the image.
        num_classes: 0 for no classifier.
        global_pool: ``avg``, ``max``, ``avgmax``, ``catavgmax``, or ``""`` for none (then ``num_classes``
            must be 0).
        depths: blocks per stage.
        planes: width of the blocks per stage.
        bottleneck: blocks of three convolutions, otherwise of two.
        stem: ``imagenet`` (7x7 stride 2, then max pooling) or ``cifar`` (3x3 stride 1).
        drop_rate: dropout before the classifier.
        drop_path_rate: largest stochastic depth probability, rising linearly from 0 at the first block.
        block_arguments: per stage, further arguments of its blocks.

    Raises:
        ValueError: for arguments that do not fit together and for images that are too small.
    """

    classifier_name = "fc"
    gate_name = "gate"

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        depths: Sequence[int] = (3, 4, 6, 3),
        planes: Sequence[int] = (64, 128, 256, 512),
        bottleneck: bool = True,
        stem: str = "imagenet",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        block_arguments: Sequence[dict[str, Any]] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_chans)
        factory = {"device": device, "dtype": dtype}
        block_arguments = [{}] * len(depths) if block_arguments is None else block_arguments
        check_lengths(len(depths), "stage", planes=planes, block_arguments=block_arguments)
        check_choice("stem", stem, STEMS)
        width = planes[0]
        if stem == "imagenet":
            self.conv1 = nn.Conv2d(in_chans, width, 7, stride=2, padding=3, bias=False, **factory)
            self.maxpool: nn.Module = nn.MaxPool2d(3, stride=2, padding=1)
            self.total_stride = 4
        else:
            self.conv1 = nn.Conv2d(in_chans, width, 3, padding=1, bias=False, **factory)
            self.maxpool = nn.Identity()
        self.bn1 = nn.BatchNorm2d(width, **factory)
        self.act1 = nn.ReLU(inplace=True)

        block_class = self._block_class(bottleneck)
        rates = drop_path_rates(drop_path_rate, depths, "cumulative")
        channels = width
        for index, depth in enumerate(depths):
            out_channels = planes[index] * block_class.expansion
            blocks = []
            for block in range(depth):
                stride = 2 if block == 0 and index > 0 else 1
                downsample = None
                if stride != 1 or channels != out_channels:
                    downsample = downsample_conv(channels, out_channels, 1, stride=stride, **factory)
                blocks.append(
                    block_class(
                        channels,
                        planes[index],
                        stride,
                        downsample,
                        gate_name=self.gate_name,
                        drop_path=rates[index][block],
                        **block_arguments[index],
                        **factory,
                    )
                )
                channels = out_channels
            self.add_module(f"layer{index + 1}", nn.Sequential(*blocks))
            self._add_stage(channels, 1 if index == 0 else 2, f"layer{index + 1}")

        self.head_drop = nn.Dropout(drop_rate)
        self._init_weights()
        self._set_classifier(num_classes, global_pool, factory)

    def _block_class(self, bottleneck: bool) -> type[nn.Module]:
        return GatedBottleneck if bottleneck else GatedBasicBlock

    def _init_weights(self) -> None:
        """Convolutions by fan-out; gates as their papers say."""
        gates = [m for m in self.modules() if hasattr(m, "init_gate")]
        inside = {id(m) for gate in gates for m in gate.modules()}
        for module in self.modules():
            if id(module) not in inside:
                init_conv_fan_out(module)
        for gate in gates:
            gate.init_gate()

    def _init_classifier(self, head: nn.Module) -> None:
        """PyTorch's own, as in the public code."""

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups for layer-wise rates: per stage if ``coarse``, otherwise per block."""
        return {"stem": r"^(?:conv1|bn1)\.", "blocks": r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"}

    def _begin(self, x: Tensor) -> Tensor:
        return self.maxpool(self.act1(self.bn1(self.conv1(x))))

    def _stage(self, state: Tensor, index: int) -> Tensor:
        return self._run_blocks(self.get_submodule(f"layer{index + 1}"), state)

    def _final(self, state: Tensor) -> Tensor:
        return state

    def _stage_modules(self, index: int) -> tuple[str, ...]:
        return (f"layer{index + 1}",)

    def _tail_modules(self) -> tuple[str, ...]:
        return ()
