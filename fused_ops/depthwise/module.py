"""Depthwise convolution, BatchNorm and activation as one module with the parameters of the stock pair."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fused_ops.depthwise.op import ACTIVATIONS, BatchNormState, depthwise_conv


class DepthwiseConvBNAct(nn.Module):
    """``act(BN(conv(x)))``, optionally with a residual, where a depthwise Conv2d and a BatchNorm2d stood.

    The two submodules ``conv`` and ``bn`` are stock modules, so that parameters, initialisation, buffers and
    the state_dict equal those of timm's ``ConvNormAct`` with ``groups=channels``.

    Args:
        channels: C.
        kernel_size: odd size of the filters.
        stride, padding, dilation: as in ``torch.nn.Conv2d``; ``padding=None`` keeps the map's size at
            stride 1 (and ``ceil(size / stride)`` at others).
        bias: whether the convolution has a bias.
        activation: none, relu, relu6, silu, gelu (exact), gelu_tanh or hardswish.
        eps, momentum, affine, track_running_stats: of the BatchNorm.
        residual_placement: ``after`` or ``before`` the activation, for the residual given to ``forward``.

    Shapes: input (B, C, H, W), channels_last or NCHW; output (B, C, Ho, Wo) in the same layout.

    Raises:
        ValueError: an argument is not allowed.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int = 3,
        *,
        stride: int = 1,
        padding: int | None = None,
        dilation: int = 1,
        bias: bool = False,
        activation: str = "none",
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        residual_placement: str = "after",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if channels < 1:
            raise ValueError(f"channels={channels} is not allowed; it must be at least 1")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={kernel_size} is not allowed; it must be odd")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation={activation!r} is unknown; use one of {', '.join(ACTIVATIONS)}")
        if residual_placement not in ("before", "after"):
            raise ValueError(
                f"residual_placement={residual_placement!r} is not allowed; use 'before' or 'after'"
            )
        self.conv = nn.Conv2d(
            channels,
            channels,
            kernel_size,
            stride=stride,
            padding=dilation * (kernel_size // 2) if padding is None else padding,
            dilation=dilation,
            groups=channels,
            bias=bias,
            device=device,
            dtype=dtype,
        )
        self.bn = nn.BatchNorm2d(
            channels,
            eps=eps,
            momentum=momentum,
            affine=affine,
            track_running_stats=track_running_stats,
            device=device,
            dtype=dtype,
        )
        self.activation = activation
        self.residual_placement = residual_placement

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        conv = self.conv
        return depthwise_conv(
            x,
            conv.weight,
            conv.bias,
            stride=conv.stride,
            padding=conv.padding,
            dilation=conv.dilation,
            norm=BatchNormState.from_module(self.bn),
            activation=self.activation,
            residual=residual,
            residual_placement=self.residual_placement,
        )

    def extra_repr(self) -> str:
        return f"activation={self.activation}, residual_placement={self.residual_placement}"
