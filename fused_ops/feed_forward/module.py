"""The feed-forward chain as a module, and on the stock modules of somebody else's block."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fused_ops.core.activations import FUNCTIONS
from fused_ops.core.batch_norm import BatchNormState
from fused_ops.core.checks import check_activation, check_choice
from fused_ops.core.drop_path import DropPath
from fused_ops.core.layer_norm import LayerNormState
from fused_ops.feed_forward.op import conv_mlp_block, mlp_block

NORMS = ("layer", "batch", "none")
# Where layers come from whose parameters say all that they do.
_STOCK = ("torch.", "fused_ops.")
_NORMS = (nn.LayerNorm, nn.BatchNorm2d, nn.SyncBatchNorm, nn.Identity, type(None))


def norm_state(norm: nn.Module | None) -> BatchNormState | LayerNormState | None:
    """What ``mlp_block`` takes for a norm over channels; counts the batch, so call it once per forward.

    Raises:
        TypeError: ``norm`` is none of BatchNorm2d, SyncBatchNorm, LayerNorm over channels, Identity, None.
    """
    if norm is None or isinstance(norm, nn.Identity):
        return None
    if isinstance(norm, nn.LayerNorm) and len(norm.normalized_shape) == 1:
        return LayerNormState.from_module(norm)
    return BatchNormState.from_module(norm)


def mlp_on_modules(
    x: Tensor,
    norm: nn.Module | None,
    fc1: nn.Linear | nn.Conv2d,
    fc2: nn.Linear | nn.Conv2d,
    **options: Any,
) -> Tensor:
    """:func:`mlp_block` with the parameters of stock modules, which are read and not called.

    Args:
        x: tokens (B, ..., C), with 1x1 convolutions as ``fc1`` and ``fc2`` maps (B, C, H, W).
        norm: BatchNorm, LayerNorm over channels, Identity or None; one of another kind, which a converter put
            in the place of a BatchNorm2d, is called with channels first.
        options: further arguments of :func:`mlp_block`; a ``residual`` in the shape of ``x``.

    Returns:
        In the shape of ``x``.
    """
    weights = [layer.weight.flatten(1) for layer in (fc1, fc2)]
    biases = {"fc1_bias": fc1.bias, "fc2_bias": fc2.bias}
    is_map = isinstance(fc1, nn.Conv2d)
    tokens = x.permute(0, 2, 3, 1) if is_map else x
    if (residual := options.get("residual")) is not None:
        options["residual"] = tokens if residual is x else residual.movedim(1, -1) if is_map else residual
    if not isinstance(norm, _NORMS):
        tokens, norm = norm(tokens.movedim(-1, 1)).movedim(1, -1).to(x.dtype), None
    out = mlp_block(tokens, *weights, norm_state(norm), **biases, **options)
    return out.permute(0, 3, 1, 2) if is_map else out


def conv_mlp_on_modules(
    x: Tensor,
    norm: nn.Module | None,
    fc1: nn.Linear | nn.Conv2d,
    conv: nn.Conv2d,
    fc2: nn.Linear | nn.Conv2d,
    **options: Any,
) -> Tensor:
    """:func:`conv_mlp_block` with the parameters of stock modules, which are read and not called.

    Args:
        x: map (B, C, H, W), or tokens (B, H*W, C) with ``size`` among the options.
        norm: as for :func:`mlp_on_modules`.
        fc1, fc2: fully connected layers or 1x1 convolutions, whatever ``x`` is.
        conv: the depthwise convolution.
        options: further arguments of :func:`conv_mlp_block`; activations by name.

    Returns:
        In the shape of ``x``.

    Raises:
        ValueError: ``conv`` is another convolution than a 3x3 depthwise one that keeps the map's size.
    """
    check_conv(conv)
    if not isinstance(norm, _NORMS):
        is_map = x.dim() == 4
        z = norm(x) if is_map else norm(x.transpose(1, 2)).transpose(1, 2)
        # The residual is what came before the norm.
        x, norm = z.to(x.dtype), None
    weights = (fc1.weight.flatten(1), conv.weight, fc2.weight.flatten(1))
    biases = {"fc1_bias": fc1.bias, "conv_bias": conv.bias, "fc2_bias": fc2.bias}
    return conv_mlp_block(x, *weights, norm_state(norm), **biases, **options)


def check_conv(conv: nn.Conv2d) -> None:
    """Raise ValueError unless ``conv`` is a 3x3 depthwise convolution that keeps the map's size."""
    for name, allowed in (
        ("kernel_size", ((3, 3),)),
        ("stride", ((1, 1),)),
        ("padding", ((1, 1), "same")),
        ("dilation", ((1, 1),)),
        ("padding_mode", ("zeros",)),
        ("groups", (conv.in_channels,)),
        ("out_channels", (conv.in_channels,)),
    ):
        if (value := getattr(conv, name)) not in allowed:
            raise ValueError(f"conv has {name}={value!r}; it must be {' or '.join(map(repr, allowed))}")


def residual_mlp(x: Tensor, norm: nn.Module, mlp: nn.Module, drop_path: DropPath) -> Tensor:
    """``x + drop_path(mlp(norm(x)))`` of a block, as one operator where its modules are stock ones.

    Args:
        x: tokens (B, ..., C), or maps (B, C, H, W) where ``mlp`` has 1x1 convolutions.
        mlp: has ``fc1`` and ``fc2``, ``act`` between them, and ``drop`` after both.
    """
    layers = (mlp.fc1, mlp.fc2)
    stock = all(isinstance(layer, nn.Linear | nn.Conv2d) for layer in layers)
    stock = stock and all(type(layer).__module__.startswith(_STOCK) for layer in layers)
    stock = stock and type(mlp.act) is nn.GELU and not (mlp.drop.training and mlp.drop.p > 0.0)
    if not stock:
        return x + drop_path(mlp(norm(x)))
    activation = "gelu" if mlp.act.approximate == "none" else "gelu_tanh"
    factors = drop_path.factors(x)
    return mlp_on_modules(x, norm, *layers, activation=activation, drop_path=factors, residual=x)


def _hidden_width(dim: int, expansion: float) -> int:
    if dim < 1:
        raise ValueError(f"dim={dim} is not allowed; it must be at least 1")
    hidden_dim = int(dim * expansion)
    if hidden_dim < 1:
        raise ValueError(f"expansion={expansion} leaves no hidden unit of {dim} channels")
    return hidden_dim


def _make_norm(norm: str, dim: int, eps: float | None, factory: dict[str, Any]) -> nn.Module:
    check_choice("norm", norm, NORMS)
    if norm == "batch":
        return nn.BatchNorm2d(dim, eps=1e-5 if eps is None else eps, **factory)
    if norm == "layer":
        return nn.LayerNorm(dim, eps=1e-6 if eps is None else eps, **factory)
    return nn.Identity()


class MLPBlock(nn.Module):
    """``[x +] DropPath(gamma * fc2(act(fc1(norm(x)))))`` on tokens (B, ..., dim), as one operator.

    The submodules ``norm``, ``fc1`` and ``fc2`` are stock modules that hold the parameters;
    ``torch.nn.SyncBatchNorm.convert_sync_batchnorm`` finds the norm. A norm of another kind that a converter
    puts in its place is called as it is.

    Args:
        dim: channels C.
        expansion: hidden width as a multiple of ``dim``.
        norm: ``layer`` (over channels), ``batch`` (over all tokens) or ``none``.
        activation: none, relu, relu6, silu, gelu (exact), gelu_tanh or hardswish.
        layer_scale: initial value of ``gamma``, a factor per channel; None for no such parameter.
        drop_path: probability that an image loses the branch in training.
        shortcut: add ``x``.
        bias: of both fully connected layers.
        eps: of the norm; None for 1e-5 of a BatchNorm and 1e-6 of a LayerNorm.

    Shapes: input (B, ..., dim); output the same. Maps as (B, H, W, dim).

    Raises:
        ValueError: an argument is not allowed.
    """

    def __init__(
        self,
        dim: int,
        expansion: float = 4,
        *,
        norm: str = "layer",
        activation: str = "gelu",
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        shortcut: bool = True,
        bias: bool = True,
        eps: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_activation(activation)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        hidden_dim = _hidden_width(dim, expansion)
        self.norm = _make_norm(norm, dim, eps, factory)
        self.fc1 = nn.Linear(dim, hidden_dim, bias=bias, **factory)
        self.fc2 = nn.Linear(hidden_dim, dim, bias=bias, **factory)
        scaled = layer_scale is not None
        self.gamma = nn.Parameter(torch.full((dim,), layer_scale, **factory)) if scaled else None
        self.drop_path = DropPath(drop_path)
        self.activation = activation
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        return mlp_on_modules(
            x,
            self.norm,
            self.fc1,
            self.fc2,
            activation=self.activation,
            layer_scale=self.gamma,
            drop_path=self.drop_path.factors(x),
            residual=x if self.shortcut else None,
        )

    def extra_repr(self) -> str:
        return f"activation={self.activation}, shortcut={self.shortcut}"


class ConvMLPBlock(nn.Module):
    """:class:`MLPBlock` with a 3x3 depthwise convolution of the hidden map, as one operator.

    ``[x +] DropPath(gamma * fc2(q))`` with ``h = activation(fc1(norm(x)))`` and
    ``q = conv_activation(conv(h)) [+ h]``. The defaults are PVTv2's MLP with the norm and the shortcut around
    it; HIRI-ViT's CFFN is ``norm="batch", activation="gelu", conv_activation="none", conv_identity=True``.

    The submodules ``norm``, ``fc1``, ``dwconv`` and ``fc2`` are stock modules that hold the parameters, under
    the names of timm's ``MlpWithDepthwiseConv``; ``torch.nn.SyncBatchNorm.convert_sync_batchnorm`` finds the
    norm. A norm of another kind that a converter puts in its place is called as it is.

    Args:
        dim: channels C.
        expansion: hidden width as a multiple of ``dim``.
        norm: ``layer`` (over channels), ``batch`` (over all positions) or ``none``.
        activation, conv_activation: before and behind the convolution: none, relu, relu6, silu, gelu (exact),
            gelu_tanh or hardswish.
        conv_identity: add what the convolution gets.
        layer_scale: initial value of ``gamma``, a factor per channel; None for no such parameter.
        drop_path: probability that an image loses the branch in training.
        shortcut: add ``x``.
        bias: of both fully connected layers and the convolution.
        eps: of the norm; None for 1e-5 of a BatchNorm and 1e-6 of a LayerNorm.

    Shapes: input (B, dim, H, W), channels_last or NCHW, or tokens (B, H*W, dim) with their ``size`` (H, W);
    output the same, in the same layout.

    Raises:
        ValueError: an argument is not allowed.
    """

    def __init__(
        self,
        dim: int,
        expansion: float = 4,
        *,
        norm: str = "layer",
        activation: str = "none",
        conv_activation: str = "gelu",
        conv_identity: bool = False,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        shortcut: bool = True,
        bias: bool = True,
        eps: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_activation(activation)
        check_choice("conv_activation", conv_activation, tuple(FUNCTIONS))
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        hidden_dim = _hidden_width(dim, expansion)
        self.norm = _make_norm(norm, dim, eps, factory)
        self.fc1 = nn.Linear(dim, hidden_dim, bias=bias, **factory)
        self.dwconv = nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1, groups=hidden_dim, bias=bias, **factory)
        self.fc2 = nn.Linear(hidden_dim, dim, bias=bias, **factory)
        scaled = layer_scale is not None
        self.gamma = nn.Parameter(torch.full((dim,), layer_scale, **factory)) if scaled else None
        self.drop_path = DropPath(drop_path)
        self.activation = activation
        self.conv_activation = conv_activation
        self.conv_identity = conv_identity
        self.shortcut = shortcut

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        return conv_mlp_on_modules(
            x,
            self.norm,
            self.fc1,
            self.dwconv,
            self.fc2,
            size=size,
            activation=self.activation,
            conv_activation=self.conv_activation,
            conv_identity=self.conv_identity,
            layer_scale=self.gamma,
            drop_path=self.drop_path.factors(x),
            residual=x if self.shortcut else None,
        )

    def extra_repr(self) -> str:
        identity = ", conv_identity=True" if self.conv_identity else ""
        return (
            f"activation={self.activation}, conv_activation={self.conv_activation}{identity}, "
            f"shortcut={self.shortcut}"
        )
