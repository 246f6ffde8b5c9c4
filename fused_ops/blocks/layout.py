"""Memory layout of maps (B, C, H, W) inside the blocks.

channels_last is the working layout: its tokens (B, H, W, C) are a view, so Linear and LayerNorm act on the
last dimension without a permuted copy. Maps in NCHW are converted once at the entry and once at the exit.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def is_channels_last(x: Tensor) -> bool:
    """Whether channels are the fastest dimension of ``x`` (B, C, H, W).

    Where the two layouts are the same bytes (one channel, or a 1x1 map) the answer is False, as in PyTorch.
    """
    return x.stride(1) == 1 and not x.is_contiguous()


def to_channels_last(x: Tensor) -> Tensor:
    """``x`` itself where it is dense channels_last, otherwise one copy."""
    return x.contiguous(memory_format=torch.channels_last)


def like_input(x: Tensor, channels_last: bool) -> Tensor:
    """``x`` in channels_last where ``channels_last`` is set, otherwise in NCHW; copies only to change it."""
    return to_channels_last(x) if channels_last else x.contiguous()


def map_to_tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) to (B, H·W, C), row-major; a view of a channels_last map or of a channel slice of one."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def tokens_to_map(x: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, H·W, C) to (B, C, H, W) in channels_last; a view of contiguous tokens."""
    return x.unflatten(1, size).permute(0, 3, 1, 2)


class PointwiseConv2d(nn.Conv2d):
    """1x1 convolution computed as a matrix product over the tokens of a channels_last map.

    Parameters, names and initialisation are those of ``nn.Conv2d(in_channels, out_channels, 1)``. Input and
    output are (B, C, H, W); a channels_last input is read as a view and the output is channels_last.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels, 1, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        tokens = F.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias)
        return tokens.permute(0, 3, 1, 2)
