"""SDA-xNet: stages that weigh the outputs of all their blocks against each other.

Guo et al., "Selective Depth Attention Networks for Adaptive Multi-scale Feature Representation", IEEE
Transactions on Artificial Intelligence 2024 (arXiv 2209.10327, identifier not verified). Public code:
QingbeiGuo/SDA-xNet (PyTorch), with the depths 5, 6, 12, 5 alone and four kinds of blocks: grouped bottlenecks
("ResNet"), SE bottlenecks, Res2Net and PyConv.

* The 86-layer models are as in the public code, but for its fixed pooling windows (56, 28, 14 and 7 in the SE
  blocks, 7 in the head): here pooling is global, the same at 224 pixels.
* ``sda_resnet_50`` and ``sda_resnet_101`` are this project's: the published module and blocks in the usual
  depths.
* Variants with CBAM and EPSA blocks are in the paper without public code and are not here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import generate_default_cfgs, register_model
from timm.models.res2net import Bottle2neck
from timm.models.resnet import downsample_conv
from torch import Tensor, nn

from fused_ops.blocks.checkpointing import checkpoint_block
from fused_ops.core.checks import check_choice
from fused_ops.core.drop_path import DropPath
from fused_ops.gate import gate_scale, pool_channels, squeeze_excite
from fused_ops.models.arguments import check_lengths
from fused_ops.models.common import (
    StagedBackbone,
    build_backbone,
    classification_cfg,
    drop_path_rates,
)
from fused_ops.models.layouts import same_names_layout
from fused_ops.models.registry import ModelInfo, System, register_system
from fused_ops.models.resnet import GatedBottleneck

__all__ = ["SDANet", "SDAStage"]

_EXPANSION = 4
_GROUPS = 8
_SE_REDUCTION = 16
_RES2NET_WIDTH, _RES2NET_SCALE = 26, 4
# Kernel sizes and groups of the pyramidal convolution, per stage.
_PYRAMIDS = (
    ((3, 5, 7, 9), (1, 4, 8, 16)),
    ((3, 5, 7), (1, 4, 8)),
    ((3, 5), (1, 4)),
    ((3,), (1,)),
)


class _OpenEnd(nn.Module):
    """A block that leaves its ReLU to the stage: the branch plus the shortcut."""

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.drop_path(self.residual(x)) + shortcut


class _Grouped(_OpenEnd, GatedBottleneck):
    """1x1, grouped 3x3, 1x1. Channels of a group are an eighth of ``planes``."""

    def __init__(self, inplanes: int, planes: int, stride: int, downsample: Any, index: int, **kwargs: Any):
        super().__init__(inplanes, planes, stride, downsample, groups=_GROUPS, **kwargs)


class _SE(_OpenEnd, GatedBottleneck):
    """1x1, 3x3, 1x1, then a channel gate from two linear layers on the pooled map."""

    def __init__(self, inplanes: int, planes: int, stride: int, downsample: Any, index: int, **kwargs: Any):
        super().__init__(inplanes, planes, stride, downsample, **kwargs)
        factory = {key: kwargs.get(key) for key in ("device", "dtype")}
        channels = planes * _EXPANSION
        self.fc1 = nn.Linear(channels, channels // _SE_REDUCTION, **factory)
        self.fc2 = nn.Linear(channels // _SE_REDUCTION, channels, **factory)

    def _excite(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        parameters = (self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)
        return squeeze_excite(x, *parameters, residual=shortcut)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.residual(x)
        if self.training and self.drop_path.drop_prob > 0:
            return self.drop_path(self._excite(x)) + shortcut
        return self._excite(x, shortcut)


class _PyramidConv(nn.Module):
    """Convolutions of several kernel sizes side by side, concatenated.

    Two convolutions share the output channels in halves, four in quarters, three as quarter, quarter, half.
    """

    def __init__(
        self, channels: int, kernel_sizes: Sequence[int], groups: Sequence[int], stride: int, **factory: Any
    ) -> None:
        super().__init__()
        count = len(kernel_sizes)
        outputs = [channels // 4, channels // 4, channels // 2] if count == 3 else [channels // count] * count
        for i, (size, out, group) in enumerate(zip(kernel_sizes, outputs, groups, strict=True), start=1):
            conv = nn.Conv2d(
                channels, out, size, stride=stride, padding=size // 2, groups=group, bias=False, **factory
            )
            self.add_module(f"conv2_{i}", conv)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([conv(x) for conv in self.children()], 1)


class _Pyramid(_OpenEnd, GatedBottleneck):
    """1x1, pyramidal convolution, 1x1."""

    def __init__(self, inplanes: int, planes: int, stride: int, downsample: Any, index: int, **kwargs: Any):
        super().__init__(inplanes, planes, stride, downsample, **kwargs)
        factory = {key: kwargs.get(key) for key in ("device", "dtype")}
        kernel_sizes, groups = _PYRAMIDS[index]
        # In the last stage the pyramid has one level, the 3x3 convolution that is there.
        if len(kernel_sizes) > 1:
            self.conv2 = _PyramidConv(planes, kernel_sizes, groups, stride, **factory)


class _Res2Net(_OpenEnd, Bottle2neck):
    """timm's Res2Net block, its end left to the stage."""

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int,
        downsample: Any,
        index: int,
        drop_path: float = 0.0,
        **factory: Any,
    ) -> None:
        super().__init__(
            inplanes,
            planes,
            stride,
            downsample,
            base_width=_RES2NET_WIDTH,
            scale=_RES2NET_SCALE,
            norm_layer=nn.BatchNorm2d,
            **factory,
        )
        self.drop_path = DropPath(drop_path)

    def residual(self, x: Tensor) -> Tensor:
        splits = self.relu(self.bn1(self.conv1(x))).split(self.width, 1)
        outs: list[Tensor] = []
        for i, (conv, bn) in enumerate(zip(self.convs, self.bns, strict=True)):
            # Blocks at the head of a stage do not hand one split's result to the next.
            split = splits[i] if i == 0 or self.is_first else splits[i] + outs[-1]
            outs.append(self.relu(bn(conv(split))))
        outs.append(splits[-1] if self.pool is None else self.pool(splits[-1]))
        return self.bn3(self.conv3(torch.cat(outs, 1)))


_BLOCKS = {"resnet": _Grouped, "senet": _SE, "res2net": _Res2Net, "pyconv": _Pyramid}


class SDAStage(nn.Module):
    """A stage (B, in, H, W) to (B, C, H/stride, W/stride), paper section on selective depth attention.

    With z_i the sum of block i before its ReLU, and block i + 1 fed with relu(z_i):
    ``relu(sum of w_i * z_i)``, where the weights (B, C) are a softmax over the blocks, per channel, of
    ``fcs[i](fc(mean over positions of the sum of all z_i))``.

    Args:
        blocks: modules that return their sum before the ReLU.
        channels: C.
        reduction, least: ``fc`` has max(C // reduction, least) channels.
    """

    grad_checkpointing = False

    def __init__(
        self, blocks: Sequence[nn.Module], channels: int, reduction: int, least: int, **factory: Any
    ) -> None:
        super().__init__()
        hidden = max(channels // reduction, least)
        self.layers = nn.ModuleList(blocks)
        self.fc = nn.Sequential(
            nn.Conv2d(channels, hidden, 1, bias=False, **factory),
            nn.BatchNorm2d(hidden, **factory),
            nn.ReLU(inplace=True),
        )
        self.fcs = nn.ModuleList(nn.Conv2d(hidden, channels, 1, **factory) for _ in blocks)

    def forward(self, x: Tensor) -> Tensor:
        checkpointing = self.grad_checkpointing and torch.is_grad_enabled()
        sums: list[Tensor] = []
        for block in self.layers:
            sums.append(checkpoint_block(block, x) if checkpointing else block(x))
            x = F.relu(sums[-1])
        # The mean of a sum is the sum of means, so the summed map is never made.
        pooled = torch.stack([pool_channels(z)[:, 0] for z in sums]).sum(0)
        hidden = self.fc(pooled[:, :, None, None])
        weights = torch.stack([fc(hidden).flatten(1) for fc in self.fcs]).softmax(0)
        out: Tensor | None = None
        for index, (weight, z) in enumerate(zip(weights, sums, strict=True), start=1):
            activation = "relu" if index == len(sums) else "none"
            out = gate_scale(z, weight, residual=out, gate="none", activation=activation)
        return out


class SDANet(StagedBackbone):
    """A residual network with selective depth attention in every stage.

    Images (B, in_chans, H, W) from 32 pixels on; feature maps at strides 4, 8, 16 and 32. The attention's
    BatchNorm sees maps of one pixel, so training needs at least two images. One more BatchNorm follows the
    pooling.

    Args:
        in_chans: channels of the image.
        num_classes: 0 for no classifier.
        global_pool: ``avg``, ``max``, ``avgmax``, or ``""`` for none (then ``num_classes`` must be 0).
        depths: blocks per stage.
        planes: width of the blocks per stage; their outputs have four times as many channels.
        block: ``resnet`` (3x3 convolutions in eight groups), ``senet``, ``res2net`` or ``pyconv``.
        reduction, least: see :class:`SDAStage`.
        drop_rate: dropout before the classifier; none in the public code.
        drop_path_rate: largest stochastic depth probability; none in the public code.

    Raises:
        ValueError: for arguments that do not fit together and for images that are too small.
    """

    classifier_name = "fc"
    # The BatchNorm after pooling has as many channels as the last map.
    pools = ("avg", "max", "avgmax", "")

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        depths: Sequence[int] = (5, 6, 12, 5),
        planes: Sequence[int] = (64, 128, 256, 512),
        block: str = "resnet",
        reduction: int = 16,
        least: int = 64,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_chans)
        factory = {"device": device, "dtype": dtype}
        check_choice("block", block, tuple(_BLOCKS))
        check_lengths(4, "stage", depths=depths, planes=planes)
        pyramid = block == "pyconv"
        channels = planes[0]
        self.conv1 = nn.Conv2d(in_chans, channels, 7, stride=2, padding=3, bias=False, **factory)
        self.bn1 = nn.BatchNorm2d(channels, **factory)
        self.relu = nn.ReLU(inplace=True)
        # With pyramids the first stage reduces instead of the stem.
        self.maxpool = nn.Identity() if pyramid else nn.MaxPool2d(3, stride=2, padding=1)
        self.total_stride = 2 if pyramid else 4
        rates = drop_path_rates(drop_path_rate, depths, "cumulative")
        for index, depth in enumerate(depths):
            blocks = []
            stage_stride = 2 if pyramid or index > 0 else 1
            for i in range(depth):
                stride = stage_stride if i == 0 else 1
                out_channels = planes[index] * _EXPANSION
                downsample = None
                if stride != 1 or channels != out_channels:
                    downsample = (_pooled_downsample if pyramid else _strided_downsample)(
                        channels, out_channels, stride, factory
                    )
                blocks.append(
                    _BLOCKS[block](
                        channels,
                        planes[index],
                        stride,
                        downsample,
                        index,
                        drop_path=rates[index][i],
                        **factory,
                    )
                )
                channels = out_channels
            self.add_module(f"stage{index + 1}", SDAStage(blocks, channels, reduction, least, **factory))
            self._add_stage(channels, stage_stride, f"stage{index + 1}")
        self.bn2 = nn.BatchNorm2d(channels, **factory)
        self.head_drop = nn.Dropout(drop_rate)
        self._init_weights()
        self._set_classifier(num_classes, global_pool, factory)

    def _init_weights(self) -> None:
        """Convolutions by fan-out; the biases of ``fcs`` as PyTorch has them."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def _init_classifier(self, head: nn.Module) -> None:
        """PyTorch's own, as in the public code."""

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups for layer-wise rates: per stage if ``coarse``, otherwise per block."""
        blocks = [(r"^stage(\d+)\.layers\.(\d+)\.", None), (r"^stage(\d+)\.fcs?\.", (99998,))]
        return {"stem": r"^(?:conv1|bn1)\.", "blocks": r"^stage(\d+)" if coarse else blocks}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only each block's input and sum for the backward pass. Running statistics are updated once."""
        super().set_grad_checkpointing(enable)
        for module in self.modules():
            if isinstance(module, SDAStage):
                module.grad_checkpointing = enable

    def _begin(self, x: Tensor) -> Tensor:
        return self.maxpool(self.relu(self.bn1(self.conv1(x))))

    def _stage(self, state: Tensor, index: int) -> Tensor:
        return self.get_submodule(f"stage{index + 1}")(state)

    def _final(self, state: Tensor) -> Tensor:
        return state

    def _stage_modules(self, index: int) -> tuple[str, ...]:
        return (f"stage{index + 1}",)

    def _tail_modules(self) -> tuple[str, ...]:
        return ("bn2",)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool, normalise, drop out and classify the map of :meth:`forward_features`."""
        x = self.global_pool(x)
        x = self.head_drop(self.bn2(x[:, :, None, None]).flatten(1) if x.ndim == 2 else self.bn2(x))
        return x if pre_logits else self.fc(x)


def _strided_downsample(before: int, after: int, stride: int, factory: dict[str, Any]) -> nn.Module:
    return downsample_conv(before, after, 1, stride=stride, **factory)


def _pooled_downsample(before: int, after: int, stride: int, factory: dict[str, Any]) -> nn.Module:
    """Shortcut of pyramidal blocks: pooling for the stride, then a 1x1 convolution."""
    pool = [nn.MaxPool2d(3, stride=stride, padding=1)] if stride > 1 else []
    return nn.Sequential(*pool, *downsample_conv(before, after, 1, **factory))


def _create(variant: str, pretrained: bool, defaults: dict[str, Any], kwargs: dict[str, Any]) -> SDANet:
    return build_backbone(SDANet, variant, pretrained, {"depths": (5, 6, 12, 5), **defaults}, kwargs)


def _cfg() -> dict[str, Any]:
    return classification_cfg(
        first_conv="conv1", classifier="fc", crop_pct=0.875, interpolation="bilinear", license="apache-2.0"
    )


default_cfgs = generate_default_cfgs(
    {
        "sda_resnet_50.untrained": _cfg(),
        "sda_resnet_86.untrained": _cfg(),
        "sda_resnet_101.untrained": _cfg(),
        "sda_senet_86.untrained": _cfg(),
        "sda_res2net_86.untrained": _cfg(),
        "sda_pyconv_86.untrained": _cfg(),
    }
)


@register_model
def sda_resnet_50(pretrained: bool = False, **kwargs: Any) -> SDANet:
    """SDA-ResNet with ResNet-50's depths; this project's, see the module's docstring."""
    return _create("sda_resnet_50", pretrained, {"depths": (3, 4, 6, 3)}, kwargs)


@register_model
def sda_resnet_86(pretrained: bool = False, **kwargs: Any) -> SDANet:
    """SDA-ResNet-86 as in QingbeiGuo/SDA-xNet."""
    return _create("sda_resnet_86", pretrained, {}, kwargs)


@register_model
def sda_resnet_101(pretrained: bool = False, **kwargs: Any) -> SDANet:
    """SDA-ResNet with ResNet-101's depths; this project's, see the module's docstring."""
    return _create("sda_resnet_101", pretrained, {"depths": (3, 4, 23, 3)}, kwargs)


@register_model
def sda_senet_86(pretrained: bool = False, **kwargs: Any) -> SDANet:
    """SDA-SENet-86 as in QingbeiGuo/SDA-xNet."""
    return _create("sda_senet_86", pretrained, {"block": "senet"}, kwargs)


@register_model
def sda_res2net_86(pretrained: bool = False, **kwargs: Any) -> SDANet:
    """SDA-Res2Net-86 (26w4s) as in QingbeiGuo/SDA-xNet."""
    return _create("sda_res2net_86", pretrained, {"block": "res2net"}, kwargs)


@register_model
def sda_pyconv_86(pretrained: bool = False, **kwargs: Any) -> SDANet:
    """SDA-PyConv-86 as in QingbeiGuo/SDA-xNet."""
    return _create("sda_pyconv_86", pretrained, {"block": "pyconv"}, kwargs)


_OWN_NOTE = "not published: the paper's stages and grouped blocks in the depths of a ResNet"


def _info(params: int, macs: int, millions: float, billions: float, top1: float) -> ModelInfo:
    return ModelInfo(
        params=params,
        macs=macs,
        published_params=millions * 1e6,
        published_macs=billions * 1e9,
        published_top1=top1,
        source="QingbeiGuo/SDA-xNet, README",
    )


SYSTEM = register_system(
    System(
        name="SDA-xNet",
        paper="Guo et al., Selective Depth Attention Networks for Adaptive Multi-scale Feature "
        "Representation, IEEE Transactions on Artificial Intelligence 2024, DOI 10.1109/TAI.2024.3401652",
        model_class=SDANet,
        preset="sda",
        fused=("pool_channels", "gate_scale"),
        models={
            "sda_resnet_50": ModelInfo(17_410_984, 2_472_443_904, note=_OWN_NOTE),
            "sda_resnet_86": _info(27_219_880, 3_879_993_344, 27.22, 3.88, 78.76),
            "sda_resnet_101": ModelInfo(28_761_000, 4_466_147_328, note=_OWN_NOTE),
            "sda_senet_86": _info(49_130_808, 6_716_760_064, 49.13, 6.72, 78.95),
            "sda_res2net_86": _info(45_254_544, 6_948_606_976, 45.26, 6.95, 79.36),
            "sda_pyconv_86": _info(43_331_176, 6_221_606_912, 43.33, 6.22, 79.27),
        },
        layouts=(same_names_layout("QingbeiGuo/SDA-xNet"),),
    )
)
