"""Modules for where a depthwise Conv2d stood, alone or beside a BatchNorm2d, with the stock parameters."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from fused_ops.core.batch_norm import BatchNormState
from fused_ops.core.checks import check_activation, check_choice
from fused_ops.depthwise.op import depthwise_conv


def _check_options(activation: str, residual_placement: str) -> None:
    check_activation(activation)
    check_choice("residual_placement", residual_placement, ("before", "after"))


def _make_conv(channels: int, kernel_size: int, padding: int | None, dilation: int, **options: Any) -> Any:
    """Arguments of a depthwise ``torch.nn.Conv2d``; ``padding=None`` keeps the map's size at stride 1."""
    if channels < 1:
        raise ValueError(f"channels={channels} is not allowed; it must be at least 1")
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size={kernel_size} is not allowed; it must be odd")
    padding = dilation * (kernel_size // 2) if padding is None else padding
    return {
        "in_channels": channels,
        "out_channels": channels,
        "kernel_size": kernel_size,
        "padding": padding,
        "dilation": dilation,
        "groups": channels,
        **options,
    }


def check_depthwise(conv: nn.Module) -> None:
    """Raise ValueError, with the reason, unless ``conv`` is depthwise and one that the operator covers."""
    if not isinstance(conv, nn.Conv2d):
        raise ValueError(f"conv is a {type(conv).__name__}; it must be a torch.nn.Conv2d")
    if type(conv).forward is not nn.Conv2d.forward and not isinstance(conv, DepthwiseConv2d):
        raise ValueError(f"conv is a {type(conv).__name__}, whose forward is not torch.nn.Conv2d's")
    if not conv.in_channels == conv.out_channels == conv.groups:
        raise ValueError(
            f"conv has {conv.in_channels} input and {conv.out_channels} output channels in {conv.groups} "
            "groups; the three must be equal"
        )
    if any(size % 2 == 0 for size in conv.kernel_size):
        raise ValueError(f"conv has kernel_size={conv.kernel_size}; sizes must be odd")
    if conv.padding_mode != "zeros":
        raise ValueError(f"conv has padding_mode={conv.padding_mode!r}; it must be 'zeros'")
    if conv.padding == "same" and any(step != 1 for step in conv.stride):
        raise ValueError(f"conv has padding='same' and stride={conv.stride}; it needs stride 1")


def _padding(conv: nn.Conv2d) -> tuple[int, ...] | str:
    return 0 if conv.padding == "valid" else conv.padding


class DepthwiseConv2d(nn.Conv2d):
    """``act(conv(x) + bias)`` with an optional residual, where a depthwise ``torch.nn.Conv2d`` stood.

    Parameters, initialisation and state_dict are those of ``torch.nn.Conv2d(groups=channels)``: ConvNeXt's
    and FocalNet's convolutions, PVTv2's (with its activation), and with ``identity`` the positional
    convolution ``x + conv(x)`` of DS-Net.

    Args:
        channels: C.
        kernel_size: odd size of the filters.
        stride, dilation, bias, device, dtype: as in ``torch.nn.Conv2d``.
        padding: as there; None keeps the map's size at stride 1 (and ``ceil(size / stride)`` at others).
        activation: none, relu, relu6, silu, gelu (exact), gelu_tanh or hardswish.
        identity: add ``x`` itself; the kernels read it once.
        residual_placement: ``after`` or ``before`` the activation, for ``x`` or the residual given to
            ``forward``.
        recompute: keep nothing of the output's size for backward, which then convolves once more.

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
        bias: bool = True,
        activation: str = "none",
        identity: bool = False,
        residual_placement: str = "after",
        recompute: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _check_options(activation, residual_placement)
        super().__init__(
            **_make_conv(
                channels, kernel_size, padding, dilation, stride=stride, bias=bias, device=device, dtype=dtype
            )
        )
        self.activation = activation
        self.identity = identity
        self.residual_placement = residual_placement
        self.recompute = recompute

    @classmethod
    def from_stock(cls, conv: nn.Conv2d, activation: str = "none", **options: Any) -> DepthwiseConv2d:
        """The module with the parameters (the same objects) and hyperparameters of ``conv``.

        Args:
            conv: a depthwise convolution; left as it is.
            activation: of the module that followed it.
            options: ``identity``, ``residual_placement``, ``recompute``.

        Raises:
            ValueError: ``conv`` is not a depthwise convolution, or one that the operator does not cover.
        """
        check_depthwise(conv)
        module = cls(conv.in_channels, activation=activation, device="meta", **options)
        for name in ("kernel_size", "stride", "padding", "dilation"):
            setattr(module, name, getattr(conv, name))
        module.weight, module.bias = conv.weight, conv.bias
        return module.train(conv.training)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if self.identity and residual is not None:
            raise ValueError("residual is given, and identity=True adds x itself; only one is allowed")
        return depthwise_conv(
            x,
            self.weight,
            self.bias,
            stride=self.stride,
            padding=_padding(self),
            dilation=self.dilation,
            activation=self.activation,
            residual=x if self.identity else residual,
            residual_placement=self.residual_placement,
            recompute=self.recompute,
        )

    def extra_repr(self) -> str:
        identity = ", identity=True" if self.identity else ""
        return f"{super().extra_repr()}, activation={self.activation}{identity}"


class DepthwiseConvBNAct(nn.Module):
    """``act(BN(conv(x)))``, optionally with a residual, where a depthwise Conv2d and a BatchNorm2d stood.

    The two submodules ``conv`` and ``bn`` are stock modules, so that parameters, initialisation, buffers and
    the state_dict equal those of timm's ``ConvNormAct`` with ``groups=channels``, and
    ``torch.nn.SyncBatchNorm.convert_sync_batchnorm`` finds the norm.

    Args:
        channels: C.
        kernel_size: odd size of the filters.
        stride, padding, dilation: as in ``torch.nn.Conv2d``; ``padding=None`` keeps the map's size at
            stride 1 (and ``ceil(size / stride)`` at others).
        bias: whether the convolution has a bias.
        activation: none, relu, relu6, silu, gelu (exact), gelu_tanh or hardswish.
        eps, momentum, affine, track_running_stats: of the BatchNorm.
        norm_placement: ``post``, or ``pre`` for ``act(conv(BN(x)))``, where the padding is zero after the
            norm (the local branch of DS-Net's block).
        identity: add ``x`` itself; the kernels read it once.
        residual_placement: ``after`` or ``before`` the activation, for ``x`` or the residual given to
            ``forward``.
        recompute: keep only the input for backward, which then convolves once more.

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
        norm_placement: str = "post",
        identity: bool = False,
        residual_placement: str = "after",
        recompute: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_options(activation, residual_placement)
        check_choice("norm_placement", norm_placement, ("pre", "post"))
        self.conv = nn.Conv2d(
            **_make_conv(
                channels, kernel_size, padding, dilation, stride=stride, bias=bias, device=device, dtype=dtype
            )
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
        self.norm_placement = norm_placement
        self.identity = identity
        self.residual_placement = residual_placement
        self.recompute = recompute

    @classmethod
    def from_stock(
        cls,
        conv: nn.Conv2d,
        norm: nn.BatchNorm2d | nn.SyncBatchNorm,
        activation: str = "none",
        **options: Any,
    ) -> DepthwiseConvBNAct:
        """The module around the given ``conv`` and ``norm`` themselves.

        Args:
            conv: a depthwise convolution.
            norm: the BatchNorm that followed it (or came before it, with ``norm_placement="pre"``).
            activation: of the module that followed.
            options: ``norm_placement``, ``identity``, ``residual_placement``, ``recompute``.

        Raises:
            ValueError: ``conv`` is not a depthwise convolution, or one that the operator does not cover.
        """
        check_depthwise(conv)
        module = cls(conv.in_channels, activation=activation, device="meta", **options)
        module.conv, module.bn = conv, norm
        return module.train(norm.training)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if self.identity and residual is not None:
            raise ValueError("residual is given, and identity=True adds x itself; only one is allowed")
        conv = self.conv
        return depthwise_conv(
            x,
            conv.weight,
            conv.bias,
            stride=conv.stride,
            padding=_padding(conv),
            dilation=conv.dilation,
            norm=BatchNormState.from_module(self.bn),
            norm_placement=self.norm_placement,
            activation=self.activation,
            residual=x if self.identity else residual,
            residual_placement=self.residual_placement,
            recompute=self.recompute,
        )

    def folded(self) -> nn.Module:
        """A module for inference with the norm's running statistics folded into filters and bias.

        The new module has parameters of its own. Returned unchanged (a copy) are: a norm without running
        statistics, and one before a padded convolution, whose shift is not constant at the borders.
        """
        conv, bn = self.conv, self.bn
        padded = conv.padding == "same" or (conv.padding != "valid" and any(conv.padding))
        if bn.running_mean is None or (self.norm_placement == "pre" and padded):
            return copy.deepcopy(self)
        with torch.no_grad():
            scale = torch.rsqrt(bn.running_var.double() + bn.eps)
            if bn.weight is not None:
                scale = scale * bn.weight.double()
            shift = -bn.running_mean.double() * scale
            if bn.bias is not None:
                shift = shift + bn.bias.double()
            weight = conv.weight.double()
            bias = torch.zeros_like(shift) if conv.bias is None else conv.bias.double()
            if self.norm_placement == "pre":
                bias = bias + shift * weight.sum((1, 2, 3))
            else:
                bias = bias * scale + shift
            weight = weight * scale[:, None, None, None]
        folded = DepthwiseConv2d.from_stock(
            conv,
            self.activation,
            identity=self.identity,
            residual_placement=self.residual_placement,
        )
        for name, value in (("weight", weight), ("bias", bias)):
            value = value.to(conv.weight.dtype)
            setattr(folded, name, nn.Parameter(value, requires_grad=conv.weight.requires_grad))
        return folded.eval()

    def extra_repr(self) -> str:
        placement = "" if self.norm_placement == "post" else ", norm_placement=pre"
        identity = ", identity=True" if self.identity else ""
        return (
            f"activation={self.activation}{placement}{identity}, residual_placement={self.residual_placement}"
        )


def fold(model: nn.Module) -> nn.Module:
    """A copy of ``model`` for inference, with every norm that can be folded into its depthwise filters.

    ``model`` itself stays as it is, so that training can go on.

    Args:
        model: any module; its :class:`DepthwiseConvBNAct` are replaced, see
            :meth:`DepthwiseConvBNAct.folded`.

    Returns:
        A deep copy in evaluation mode.
    """
    if isinstance(model, DepthwiseConvBNAct):
        return model.folded().eval()
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        if isinstance(parent, DepthwiseConvBNAct):
            continue
        for name, child in parent.named_children():
            if isinstance(child, DepthwiseConvBNAct):
                setattr(parent, name, child.folded())
    return model.eval()
