"""Self-attention whose keys and values are taken from a map reduced by a strided convolution."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_ops.blocks.layout import map_to_tokens, tokens_to_map


class SpatialReducedAttention(nn.Module):
    """softmax(Q Kᵀ / sqrt(d)) V with an output projection; K and V from (H/R) x (W/R) tokens.

    The reduction is a convolution with kernel and stride R followed by a LayerNorm, and feeds both keys and
    values. With R = 1 there is none, and this is plain multi-head attention. Rows and columns of the map
    beyond a multiple of R are queries only. Parameter names and shapes are those of whai362/PVT.

    Args:
        dim: channels; ``num_heads`` must divide them.
        num_heads: attention heads; channels are [head][d].
        reduction_ratio: R.
        qkv_bias: whether queries, keys and values have biases.
        reduced_norm_eps: of the LayerNorm after the reduction; 1e-5 in the public code.
        attn_drop: dropout of the softmax output in training.
        proj_drop: dropout after the output projection.

    Shapes: tokens (B, P + H·W, dim), row-major, with ``size`` (H, W); the P prefix tokens (a class token) are
    allowed with R = 1 only. Output like the input.

    Source: Wang et al., "Pyramid Vision Transformer", ICCV 2021 (arXiv 2102.12122), section 3.3.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        reduction_ratio: int = 1,
        qkv_bias: bool = True,
        reduced_norm_eps: float = 1e-5,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads must divide the {dim} channels, got {num_heads}")
        if reduction_ratio < 1:
            raise ValueError(f"reduction_ratio must be at least 1, got {reduction_ratio}")
        factory = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.reduction_ratio = reduction_ratio
        self.q = nn.Linear(dim, dim, bias=qkv_bias, **factory)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias, **factory)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, **factory)
        self.proj_drop = nn.Dropout(proj_drop)
        if reduction_ratio > 1:
            self.sr = nn.Conv2d(dim, dim, reduction_ratio, stride=reduction_ratio, **factory)
            self.norm = nn.LayerNorm(dim, eps=reduced_norm_eps, **factory)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        reduced = x
        if self.reduction_ratio > 1:
            reduced = self.norm(map_to_tokens(self.sr(tokens_to_map(x, size))))
        query = self.q(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        key, value = self.kv(reduced).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        dropout = self.attn_drop.p if self.training else 0.0
        out = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, reduction_ratio={self.reduction_ratio}"
