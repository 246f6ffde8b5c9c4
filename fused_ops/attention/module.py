"""Self-attention on a reduced map, with the parameters of the published variants."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_ops.attention.block import attention_block
from fused_ops.attention.op import few_key_attention
from fused_ops.attention.triton_block import fits_sizes
from fused_ops.core.checks import check_choice
from fused_ops.core.drop_path import DropPath
from fused_ops.core.layer_norm import LayerNormState

REDUCTIONS = ("conv", "pool", "token_pool")
# Of the map that PVTv2's linear attention pools to, whatever the input's size.
POOLED_SIZE = 7


def residual_attention(
    x: Tensor,
    norm: nn.LayerNorm,
    attention: SpatialReductionAttention,
    size: Sequence[int] | None,
    drop_path: DropPath,
) -> Tensor:
    """``x + drop_path(attention(norm(x), size))`` of a block, by :func:`attention_branch` on stock norms."""
    # With dropout, random numbers are drawn in the order in which the modules would.
    if type(norm) is not nn.LayerNorm or _drops(attention):
        return x + drop_path(attention(norm(x), size))
    state, factors = LayerNormState.from_module(norm), drop_path.factors(x)
    form = (attention.reduction, attention.reduction_ratio)
    return attention_branch(attention, x, size, *form, norm=state, residual=x, drop_path=factors)


def attention_branch(
    module: nn.Module,
    x: Tensor,
    size: Sequence[int] | None,
    reduction: str,
    ratio: int,
    *,
    norm: LayerNormState | None = None,
    residual: Tensor | None = None,
    drop_path: Tensor | None = None,
) -> Tensor:
    """``[residual +] drop_path * attention(norm(x))``, by :func:`fused_ops.attention_block` where that fits.

    Keys and values come from ``norm(x)``, which is computed for them by itself.

    Args:
        module: has ``num_heads`` and the layers that :class:`SpatialReductionAttention` says for
            ``reduction``, dropouts included, under the same names.
        x: tokens (B, N, C).
        size: (H, W), for what asks for it.
        reduction, ratio: ``conv``, ``pool`` or ``token_pool``, and R.
        norm: of a LayerNorm over channels, or None.
        residual: like the result, or None.
        drop_path: factor per image (B), or None.
    """
    z = x if norm is None else F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)
    key, value = _keys_and_values(module, z, size, reduction, ratio)
    plain = type(module.q) is type(module.proj) is nn.Linear and module.proj.out_features == x.shape[-1]
    plain = plain and (residual is None or residual.dtype == x.dtype)
    fits, _ = fits_sizes(x.shape[-1], key.shape[1], torch.is_grad_enabled(), key.dtype)
    if fits and plain and not _drops(module):
        return attention_block(
            x,
            key,
            value,
            module.q.weight,
            module.proj.weight,
            norm,
            query_bias=module.q.bias,
            out_bias=module.proj.bias,
            drop_path=drop_path,
            residual=residual,
        )
    out = _attend(module, z, key, value)
    if drop_path is not None:
        out = out * drop_path[:, None, None]
    return out if residual is None else residual + out


def _drops(module: nn.Module) -> bool:
    return any(layer.training and layer.p > 0.0 for layer in (module.attn_drop, module.proj_drop))


def _attend(module: nn.Module, x: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The projections and what is between them, of tokens on given keys and values."""
    query = module.q(x).unflatten(-1, (module.num_heads, -1))
    out = few_key_attention(query, key, value, dropout=module.attn_drop.p if module.training else 0.0)
    return module.proj_drop(module.proj(out.flatten(2)))


def _keys_and_values(
    module: nn.Module, x: Tensor, size: Sequence[int] | None, reduction: str, ratio: int
) -> tuple[Tensor, ...]:
    """(B, Nk, heads, d) each."""
    reduced, heads = _reduce(module, x, size, reduction, ratio), (module.num_heads, -1)
    if reduction == "token_pool":
        return module.k(reduced).unflatten(-1, heads), module.v(reduced).unflatten(-1, heads)
    return module.kv(reduced).unflatten(-1, (2, *heads)).unbind(2)


def _reduce(module: nn.Module, x: Tensor, size: Sequence[int] | None, reduction: str, ratio: int) -> Tensor:
    """The tokens that keys and values are taken from, (B, Nk, dim)."""
    if ratio == 1 and reduction != "pool":
        return x
    if reduction == "token_pool":
        run = ratio**2
        count = x.shape[1] // run
        pooled = x[:, : count * run].unflatten(1, (count, run)).mean(2)
        # (B * Nk, dim) has the same statistics as (B, dim, Nk), and needs no transposed copy.
        return module.norm(pooled.flatten(0, 1)).unflatten(0, (x.shape[0], count))
    if size is None or size[0] * size[1] != x.shape[1]:
        raise ValueError(f"size={size} does not fit the {x.shape[1]} tokens; it must be (height, width)")
    # A channels_last view of the tokens, so that nothing is copied on the way to the convolution.
    grid = x.unflatten(1, (size[0], size[1])).permute(0, 3, 1, 2)
    if reduction == "pool":
        grid = F.adaptive_avg_pool2d(grid, POOLED_SIZE)
    tokens = module.norm(module.sr(grid).permute(0, 2, 3, 1).flatten(1, 2))
    return F.gelu(tokens) if reduction == "pool" else tokens


class SpatialReductionAttention(nn.Module):
    """softmax(Q Kᵀ / sqrt(d)) V with an output projection; K and V from a reduced map.

    ``reduction`` says how, and with it what the parameters are called:

    - ``conv``: a convolution with kernel and stride R, then LayerNorm: PVT, PVTv2, the global attention of
      Twins, SegFormer. R = 1 has neither, and is plain multi-head attention. Rows and columns of the map
      beyond a multiple of R are queries only. ``q``, ``kv``, ``proj``, ``sr``, ``norm``, as in whai362/PVT,
      NVlabs/SegFormer and timm's ``pvt_v2`` and ``twins``.
    - ``pool``: the linear form of PVTv2: adaptive average pooling to 7x7, 1x1 convolution, LayerNorm, GELU.
      The same names. R plays no part.
    - ``token_pool``: Next-ViT's E-MHSA: the mean over runs of R² tokens in raster order (not over squares of
      the map), then BatchNorm. Tokens beyond a multiple of R² are queries only. ``q``, ``k``, ``v``,
      ``proj``, ``norm``, as in bytedance/Next-ViT and timm's ``nextvit``. R = 1 has no ``norm``.

    Args:
        dim: channels; ``num_heads`` must divide them.
        num_heads: attention heads; channels are [head][d].
        reduction_ratio: R.
        reduction: ``conv``, ``pool`` or ``token_pool``.
        qkv_bias: whether queries, keys and values have biases.
        norm_eps: of the norm after the reduction; 1e-5 in all public code.
        attn_drop: dropout of the attention weights in training.
        proj_drop: dropout after the output projection.
        out_dim: channels of the output; None for ``dim``.

    Shapes: tokens (B, P + H·W, dim), row-major, with ``size`` (H, W), which ``token_pool`` does not ask for;
    the P prefix tokens (a class token) are allowed with ``conv`` and R = 1 only. Output
    (B, P + H·W, out_dim).

    Sources: Wang et al., "Pyramid Vision Transformer", ICCV 2021 (arXiv 2102.12122), section 3.3; Wang et
    al., "PVT v2", CVMJ 2022 (arXiv 2106.13797); Li et al., "Next-ViT" (arXiv 2207.05501).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        reduction_ratio: int = 1,
        *,
        reduction: str = "conv",
        qkv_bias: bool = True,
        norm_eps: float = 1e-5,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        out_dim: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads must divide the {dim} channels, got {num_heads}")
        if reduction_ratio < 1:
            raise ValueError(f"reduction_ratio must be at least 1, got {reduction_ratio}")
        check_choice("reduction", reduction, REDUCTIONS)
        factory = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.reduction_ratio = reduction_ratio
        self.reduction = reduction
        self.q = nn.Linear(dim, dim, bias=qkv_bias, **factory)
        if reduction == "token_pool":
            self.k = nn.Linear(dim, dim, bias=qkv_bias, **factory)
            self.v = nn.Linear(dim, dim, bias=qkv_bias, **factory)
        else:
            self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias, **factory)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim if out_dim is None else out_dim, **factory)
        self.proj_drop = nn.Dropout(proj_drop)
        if reduction == "pool":
            self.sr = nn.Conv2d(dim, dim, 1, **factory)
            self.norm = nn.LayerNorm(dim, eps=norm_eps, **factory)
        elif reduction_ratio > 1 and reduction == "conv":
            self.sr = nn.Conv2d(dim, dim, reduction_ratio, stride=reduction_ratio, **factory)
            self.norm = nn.LayerNorm(dim, eps=norm_eps, **factory)
        elif reduction_ratio > 1:
            self.norm = nn.BatchNorm1d(dim, eps=norm_eps, **factory)

    def forward(self, x: Tensor, size: Sequence[int] | None = None) -> Tensor:
        return _attend(self, x, *_keys_and_values(self, x, size, self.reduction, self.reduction_ratio))

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, reduction_ratio={self.reduction_ratio}, reduction={self.reduction}"
        )
