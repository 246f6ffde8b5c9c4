"""Self-attention whose keys and values are taken from a map reduced by a strided convolution."""

from __future__ import annotations

import torch

from fused_ops.attention import SpatialReductionAttention


class SpatialReducedAttention(SpatialReductionAttention):
    """softmax(Q Kᵀ / sqrt(d)) V with an output projection; K and V from (H/R) x (W/R) tokens.

    The form of :class:`~fused_ops.attention.SpatialReductionAttention` that PVT has: the reduction is a
    convolution with kernel and stride R followed by a LayerNorm, and feeds both keys and values. With R = 1
    there is none, and this is plain multi-head attention. Rows and columns of the map beyond a multiple of R
    are queries only. Parameter names and shapes are those of whai362/PVT.

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
        super().__init__(
            dim,
            num_heads,
            reduction_ratio,
            qkv_bias=qkv_bias,
            norm_eps=reduced_norm_eps,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
            device=device,
            dtype=dtype,
        )
