"""DCDC-ResNet, a RECONSTRUCTION: residual networks whose 3x3 convolutions predict their own kernels.

Yan et al., "Dual Complementary Dynamic Convolution for Image Recognition", 2022 (arXiv 2211.06163). No code
was published, and only the abstract could be read.

Known from it: an operator with two branches whose outputs are added, one that predicts a kernel per position
(LSA, local spatial-adaptive) and one that predicts a kernel per image (GSI, global shift-invariant); ResNets
built with it are smaller than the usual ones.

Everything else is this project's choice, close to the involution operator, and no published number belongs to
it: form and size of the branches, 7x7 kernels, 16 channels per kernel, reduction 4, and that the operator
stands in for the 3x3 convolution of every bottleneck.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from fused_ops.models.common import build_backbone, classification_cfg
from fused_ops.models.registry import ModelInfo, System, register_system
from fused_ops.models.resnet import GatedBottleneck, ResNetBackbone

__all__ = ["DCDCResNet", "DualDynamicConv2d", "apply_position_kernels"]


def apply_position_kernels(x: Tensor, kernels: Tensor, kernel_size: int, stride: int = 1) -> Tensor:
    """Depthwise convolution whose kernels differ from position to position.

    ``y[b, c, i, j] = sum over u of kernels[b, g(c), u, i, j] * x[b, c, stride * i + u_y, stride * j + u_x]``
    over the taps u with zero padding of half a kernel, where ``g`` gives every group the same number of
    adjacent channels. The taps are added one after the other, so that no map of ``kernel_size**2`` times the
    size is made.

    Args:
        x: (B, C, H, W).
        kernels: (B, G, kernel_size**2, H', W'), where G divides C, H' and W' are those of the result.
        kernel_size: odd.
        stride: of the taps.

    Returns:
        (B, C, H', W') with H' = ceil(H / stride).
    """
    height, width = kernels.shape[-2:]
    padded = F.pad(x, (kernel_size // 2,) * 4).unflatten(1, (kernels.shape[1], -1))
    out = None
    for tap in range(kernel_size**2):
        top, left = divmod(tap, kernel_size)
        rows = slice(top, top + stride * (height - 1) + 1, stride)
        columns = slice(left, left + stride * (width - 1) + 1, stride)
        window, weight = padded[..., rows, columns], kernels[:, :, tap].unsqueeze(2)
        out = window * weight if out is None else torch.addcmul(out, window, weight)
    return out.flatten(1, 2)


class _LocalKernels(nn.Module):
    """A kernel per position: (B, C, H, W) to (B, G, kernel_size**2, H', W')."""

    def __init__(self, channels: int, hidden: int, outputs: int, stride: int, **factory: Any) -> None:
        super().__init__()
        # Rounding up keeps odd maps at the size that strided taps have.
        self.pool = nn.AvgPool2d(stride, stride, ceil_mode=True) if stride > 1 else nn.Identity()
        self.reduce = nn.Sequential(
            nn.Conv2d(channels, hidden, 1, bias=False, **factory),
            nn.BatchNorm2d(hidden, **factory),
            nn.ReLU(inplace=True),
        )
        self.span = nn.Conv2d(hidden, outputs, 1, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return self.span(self.reduce(self.pool(x)))


class _GlobalKernels(nn.Module):
    """A kernel per image: (B, C, H, W) to (B, G * kernel_size**2)."""

    def __init__(self, channels: int, hidden: int, outputs: int, **factory: Any) -> None:
        super().__init__()
        self.reduce = nn.Sequential(
            nn.Linear(channels, hidden, bias=False, **factory),
            nn.BatchNorm1d(hidden, **factory),
            nn.ReLU(inplace=True),
        )
        self.span = nn.Linear(hidden, outputs, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return self.span(self.reduce(x.mean((2, 3))))


class DualDynamicConv2d(nn.Module):
    """Dual dynamic convolution (B, C, H, W) to (B, C, H', W'); reconstructed, see the module's docstring.

    Both branches have the same groups, kernel size and stride, so their kernels are added and applied once.
    In training the branch with a kernel per image normalises over the batch and needs at least two images.

    Args:
        channels: C.
        kernel_size: odd.
        stride: of the taps.
        reduction: C over the width of the branches.
        group_channels: channels that share a kernel.

    Raises:
        ValueError: for an even kernel size, and if ``group_channels`` or ``reduction`` do not divide C.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int = 7,
        stride: int = 1,
        reduction: int = 4,
        group_channels: int = 16,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and positive, got {kernel_size}")
        for name, divisor in (("group_channels", group_channels), ("reduction", reduction)):
            if channels % divisor:
                raise ValueError(f"{name} must divide the {channels} channels, got {divisor}")
        self.kernel_size, self.stride = kernel_size, stride
        self.groups = channels // group_channels
        outputs = self.groups * kernel_size**2
        self.lsa = _LocalKernels(channels, channels // reduction, outputs, stride, **factory)
        self.gsi = _GlobalKernels(channels, channels // reduction, outputs, **factory)

    def forward(self, x: Tensor) -> Tensor:
        kernels = self.lsa(x) + self.gsi(x)[:, :, None, None]
        kernels = kernels.unflatten(1, (self.groups, self.kernel_size**2))
        return apply_position_kernels(x, kernels, self.kernel_size, self.stride)


class _DCDCBottleneck(GatedBottleneck):
    """1x1, dual dynamic convolution, 1x1."""

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        kernel_size: int = 7,
        reduction: int = 4,
        group_channels: int = 16,
        gate_name: str = "gate",
        drop_path: float = 0.0,
        **factory: Any,
    ) -> None:
        super().__init__(
            inplanes, planes, stride, downsample, gate_name=gate_name, drop_path=drop_path, **factory
        )
        self.conv2 = DualDynamicConv2d(planes, kernel_size, stride, reduction, group_channels, **factory)


class DCDCResNet(ResNetBackbone):
    """ResNet with dual dynamic convolutions for its 3x3 ones: a RECONSTRUCTION, see the module's docstring.

    Args:
        kernel_size, reduction, group_channels: see :class:`DualDynamicConv2d`.
        **kwargs: see :class:`~fused_ops.models.resnet.ResNetBackbone`.
    """

    def __init__(
        self,
        depths: Sequence[int] = (3, 4, 6, 3),
        kernel_size: int = 7,
        reduction: int = 4,
        group_channels: int = 16,
        **kwargs: Any,
    ) -> None:
        arguments = {"kernel_size": kernel_size, "reduction": reduction, "group_channels": group_channels}
        super().__init__(depths=depths, block_arguments=[arguments] * len(depths), **kwargs)

    def _block_class(self, bottleneck: bool) -> type[nn.Module]:
        if not bottleneck:
            raise ValueError("bottleneck must be True, since only such blocks have dynamic convolutions")
        return _DCDCBottleneck


default_cfgs = generate_default_cfgs(
    {
        "dcdc_resnet_50.untrained": classification_cfg(
            first_conv="conv1", classifier="fc", license="apache-2.0"
        )
    }
)


@register_model
def dcdc_resnet_50(pretrained: bool = False, **kwargs: Any) -> DCDCResNet:
    """DCDC-ResNet-50, a reconstruction; no public code, see the module's docstring."""
    return build_backbone(DCDCResNet, "dcdc_resnet_50", pretrained, {"depths": (3, 4, 6, 3)}, kwargs)


SYSTEM = register_system(
    System(
        name="DCDC",
        paper="Yan et al., Dual Complementary Dynamic Convolution for Image Recognition, 2022, "
        "arXiv 2211.06163",
        model_class=DCDCResNet,
        preset="dcdc",
        models={
            "dcdc_resnet_50": ModelInfo(
                16_820_928,
                2_449_505_472,
                note="inferred: no public code; a reconstruction from the abstract. Applying the predicted "
                "kernels takes 0.068 G more, which the counter does not see (0.135 G, branch by branch)",
            ),
        },
    )
)
