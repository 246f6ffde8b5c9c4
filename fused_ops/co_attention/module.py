"""DS-Net's inter-scale alignment as a module, with the parameters of the public code."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fused_ops.co_attention.op import co_attention
from fused_ops.core.batch_norm import call_norm
from fused_ops.core.initialise import init_linear


class CoAttention(nn.Module):
    """A map of local tokens and a coarser grid of global tokens attend to each other, each with a residual.

    ``local + fuse_channel_conv(a_l)`` and ``tokens + fuse_channel_sa(a_g)``, where ``a_l``, ``a_g`` are the
    outputs of :func:`fused_ops.co_attention.op.co_attention` on projections of both streams. The submodules
    have the names that DS-Net's public code (SteveTsui/DS-Net, PaddleClas) has in its block:

    - ``norm_conv2`` (BatchNorm) and ``cross_channel_up_conv`` (1x1 convolution) project the map,
    - ``norm_sa2`` (LayerNorm) and ``cross_channel_up_sa`` (Linear) the tokens, to [query | key | value],
    - ``fuse_channel_conv`` and ``fuse_channel_sa`` (both Linear) project the outputs.

    Args:
        dim: channels of either stream; ``num_heads`` must divide them.
        num_heads: attention heads; channels are [head][d].
        attn_drop: dropout of the attention weights of both directions in training.
        shared_affinity: one affinity for both directions, as in the paper's wording, in place of one each, as
            in the public code. The projections then are [query | value] of the map and [key | value] of the
            tokens.
        eps: of both norms.

    Shapes: ``local`` (B, dim, H, W), channels_last being the fast layout; ``tokens`` (B, M, dim). Outputs the
    same, ``local`` in its layout.

    Raises:
        ValueError: an argument is not allowed, or an input does not fit.

    Source: Mao et al., "Dual-stream Network for Visual Recognition", NeurIPS 2021 (arXiv 2105.14734).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        attn_drop: float = 0.1,
        *,
        shared_affinity: bool = False,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dim < 1 or num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads={num_heads} is not allowed; it must divide the {dim} channels")
        factory = {"device": device, "dtype": dtype}
        width = (2 if shared_affinity else 3) * dim
        self.dim = dim
        self.num_heads = num_heads
        self.shared_affinity = shared_affinity
        self.norm_conv2 = nn.BatchNorm2d(dim, eps=eps, **factory)
        self.norm_sa2 = nn.LayerNorm(dim, eps=eps, **factory)
        self.cross_channel_up_conv = nn.Conv2d(dim, width, 1, **factory)
        self.cross_channel_up_sa = nn.Linear(dim, width, **factory)
        self.fuse_channel_conv = nn.Linear(dim, dim, **factory)
        self.fuse_channel_sa = nn.Linear(dim, dim, **factory)
        self.attn_drop = nn.Dropout(attn_drop)
        for linear in (self.cross_channel_up_sa, self.fuse_channel_conv, self.fuse_channel_sa):
            init_linear(linear)

    def reset_parameters(self) -> None:
        """Initialise all parameters and statistics again, for instance after ``to_empty``.

        Linear layers: truncated normal with standard deviation 0.02, zero bias. All else: PyTorch's defaults.
        """
        for module in self.children():
            if isinstance(module, nn.Linear):
                init_linear(module)
            elif hasattr(module, "reset_parameters"):
                module.reset_parameters()

    def forward(self, local: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        if local.dim() != 4 or local.shape[1] != self.dim:
            raise ValueError(f"local has shape {tuple(local.shape)}; it must be (B, {self.dim}, H, W)")
        if tokens.dim() != 3 or (tokens.shape[0], tokens.shape[2]) != (local.shape[0], self.dim):
            raise ValueError(
                f"tokens has shape {tuple(tokens.shape)}; it must be ({local.shape[0]}, M, {self.dim})"
            )
        dropout = self.attn_drop.p if self.training else 0.0
        return align(self, local, tokens, self.num_heads, dropout, self.shared_affinity)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, shared_affinity={self.shared_affinity}"


def align(
    owner: nn.Module,
    local: Tensor,
    tokens: Tensor,
    num_heads: int,
    dropout: float,
    shared_affinity: bool = False,
) -> tuple[Tensor, Tensor]:
    """:class:`CoAttention` with the submodules of ``owner``, which has them under the same names."""
    projected = owner.cross_channel_up_conv(call_norm(owner.norm_conv2, local)).flatten(2).transpose(1, 2)
    heads = (2 if shared_affinity else 3, num_heads, -1)
    local_query, *local_key, local_value = projected.unflatten(-1, heads).unbind(2)
    projected = owner.cross_channel_up_sa(owner.norm_sa2(tokens))
    *global_query, global_key, global_value = projected.unflatten(-1, heads).unbind(2)
    back = {} if shared_affinity else {"local_key": local_key[0], "global_query": global_query[0]}
    to_local, to_global = co_attention(
        local_query, local_value, global_key, global_value, **back, dropout=dropout
    )
    # (B, H W, dim), of which a map is a view.
    to_local = owner.fuse_channel_conv(to_local.flatten(2)).transpose(1, 2)
    to_local = to_local.unflatten(2, (local.shape[2], local.shape[3]))
    return local + to_local, tokens + owner.fuse_channel_sa(to_global.flatten(2))
