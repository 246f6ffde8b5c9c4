"""HIRI-ViT's HR-block as a module, with the parameters of the stock modules that it is composed of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fused_ops.core.activations import FUNCTIONS
from fused_ops.core.batch_norm import BatchNormState
from fused_ops.core.checks import check_activation
from fused_ops.core.drop_path import DropPath
from fused_ops.hr_chain.op import hr_block
from fused_ops.hr_chain.reference import repeat


class HRBlock(nn.Module):
    """Two branches on maps (B, dim, H, W) of any size: y = [x +] DropPath(high(x) + repeat(low(x))).

    high: 3x3 depthwise convolution. low: strided 3x3 depthwise convolution, BatchNorm, two fully connected
        layers with an activation between them, up-sampling by repeating every value 2x2 times, cut to H x W
        where that is odd (HIRI-ViT, arXiv 2403.11999, section 4.2).

    The submodules ``hr``, ``lr_dw``, ``lr_bn``, ``fc1``, ``fc2`` are stock modules that hold the parameters;
    ``torch.nn.SyncBatchNorm.convert_sync_batchnorm`` finds the norm. A norm of another kind that a converter
    puts in its place runs the stock way, with everything else.

    Args:
        dim: C.
        expansion: width between the fully connected layers as a multiple of ``dim``.
        drop_path: probability that an image loses both branches in training.
        activation: none, relu, relu6, silu, gelu (exact), gelu_tanh or hardswish.
        high_bias: bias of the convolution at full resolution.
        fc_bias: biases of the fully connected layers.
        shortcut: add ``x``.
        eps, momentum, affine, track_running_stats: of the BatchNorm.

    Shapes: input (B, dim, H, W), channels_last or NCHW; output the same, in the same layout.

    Raises:
        ValueError: an argument is not allowed.
    """

    def __init__(
        self,
        dim: int,
        expansion: float = 4,
        drop_path: float = 0.0,
        *,
        activation: str = "gelu",
        high_bias: bool = True,
        fc_bias: bool = True,
        shortcut: bool = True,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(f"dim={dim} is not allowed; it must be at least 1")
        hidden_dim = int(dim * expansion)
        if hidden_dim < 1:
            raise ValueError(f"expansion={expansion} leaves no hidden unit of {dim} channels")
        check_activation(activation)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}

        def depthwise(stride: int, bias: bool) -> nn.Conv2d:
            return nn.Conv2d(dim, dim, 3, stride=stride, padding=1, groups=dim, bias=bias, **factory)

        self.hr = depthwise(1, high_bias)
        self.lr_dw = depthwise(2, False)
        self.lr_bn = nn.BatchNorm2d(
            dim,
            eps=eps,
            momentum=momentum,
            affine=affine,
            track_running_stats=track_running_stats,
            **factory,
        )
        self.fc1 = nn.Linear(dim, hidden_dim, bias=fc_bias, **factory)
        self.fc2 = nn.Linear(hidden_dim, dim, bias=fc_bias, **factory)
        self.drop_path = DropPath(drop_path)
        self.activation = activation
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        factors = self.drop_path.factors(x)
        if not isinstance(self.lr_bn, nn.BatchNorm2d | nn.SyncBatchNorm):
            return self._stock(x, factors)
        return hr_block(
            x,
            self.hr.weight,
            self.lr_dw.weight,
            self.fc1.weight,
            self.fc2.weight,
            BatchNormState.from_module(self.lr_bn),
            high_bias=self.hr.bias,
            fc1_bias=self.fc1.bias,
            fc2_bias=self.fc2.bias,
            activation=self.activation,
            identity=self.shortcut,
            drop_path=factors,
        )

    def _stock(self, x: Tensor, factors: Tensor | None) -> Tensor:
        low = self.lr_bn(self.lr_dw(x)).permute(0, 2, 3, 1)
        hidden = FUNCTIONS[self.activation](self.fc1(low))
        branch = self.hr(x) + repeat(self.fc2(hidden), (x.shape[2], x.shape[3]))
        if factors is not None:
            branch = branch * factors[:, None, None, None].to(branch.dtype)
        return x + branch if self.shortcut else branch

    def extra_repr(self) -> str:
        return f"activation={self.activation}, shortcut={self.shortcut}"
