"""Attention with few keys in plain PyTorch: the definition, and the stock operator.

:func:`attention` is the definition: any device and dtype, float64 too, with PyTorch's own autograd (second
derivatives included). It is the oracle of the tests. :func:`sdpa` is what a user would call instead; it runs
where no kernel can, and is the baseline of the measurements.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_ops.core.dropout import dropout_keep
from fused_ops.core.layer_norm import LayerNormState


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    seed: Tensor | None = None,
    *,
    scale: float,
    dropout: float = 0.0,
) -> Tensor:
    """``dropout(softmax(scale Q Kᵀ + bias)) V`` per head; a query without any key gets zeros.

    Args:
        query: (B, N, heads, d).
        key, value: (B, Nk, heads, d).
        bias: added to the scores, (heads or 1, N, Nk), or None.
        key_mask: bool (B, Nk), true where a key takes part, or None.
        seed: (2) int64, see :func:`dropout_keep`; needed where ``dropout`` is not 0.

    Returns:
        (B, N, heads, d), contiguous.
    """
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    scores = (query @ key.transpose(-1, -2)) * scale
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask[:, None, None, :], float("-inf"))
    if bias is not None or key_mask is not None:
        # Softmax over nothing but minus infinity would be not-a-number, and so would its gradient.
        without_key = (scores == float("-inf")).all(-1, keepdim=True)
        scores = scores.masked_fill(without_key, 0.0)
        probabilities = scores.softmax(-1).masked_fill(without_key, 0.0)
    else:
        probabilities = scores.softmax(-1)
    if dropout:
        keep = dropout_keep(seed, *probabilities.shape, dropout)
        probabilities = probabilities.masked_fill(~keep, 0.0) / (1.0 - dropout)
    return (probabilities @ value).transpose(1, 2).contiguous()


def sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    *,
    scale: float,
    dropout: float = 0.0,
) -> Tensor:
    """The same by ``torch.nn.functional.scaled_dot_product_attention``, with PyTorch's own dropout."""
    mask, without_key = None, None
    # What a query without keys gets depends on PyTorch's choice of kernel, so it attends to all of them here.
    if key_mask is not None:
        without_key = ~key_mask.any(-1)[:, None, None, None]
        mask = key_mask[:, None, None, :] | without_key
    if bias is not None:
        added = bias.to(query.dtype)[None]
        added = added if key_mask is None else added.masked_fill(~key_mask[:, None, None, :], float("-inf"))
        without_key = (added == float("-inf")).all(-1, keepdim=True)
        mask = added.masked_fill(without_key, 0.0)
    out = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=mask,
        dropout_p=dropout,
        scale=scale,
    )
    out = out.transpose(1, 2).contiguous()
    if without_key is not None:
        out = out.masked_fill(without_key.transpose(1, 2), 0.0)
    return out


def attention_block(
    x: Tensor,
    key: Tensor,
    value: Tensor,
    query_weight: Tensor,
    out_weight: Tensor,
    norm: LayerNormState | None,
    query_bias: Tensor | None,
    out_bias: Tensor | None,
    key_mask: Tensor | None,
    scale: float,
    drop_path: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    """``[residual +] drop_path * out(attention(query(norm(x)), key, value))``, with products in key's dtype.

    Args and returns as of :func:`fused_ops.attention_block`.
    """
    z = x
    if norm is not None:
        weight, bias = (None if tensor is None else tensor.to(x.dtype) for tensor in norm[:2])
        z = F.layer_norm(x, x.shape[-1:], weight, bias, norm.eps)
    parameters = (
        None if tensor is None else tensor.to(key.dtype)
        for tensor in (query_weight, query_bias, out_weight, out_bias)
    )
    query_weight, query_bias, out_weight, out_bias = parameters
    query = F.linear(z.to(key.dtype), query_weight, query_bias).unflatten(-1, key.shape[2:])
    # In float64, the oracle's dtype, the definition, which has second derivatives on every device.
    core = attention if key.dtype == torch.float64 or 0 in (query.numel(), key.numel()) else sdpa
    heads = core(query, key, value, key_mask=key_mask, scale=scale)
    out = F.linear(heads.flatten(2), out_weight, out_bias)
    if drop_path is not None:
        out = out * drop_path[:, None, None].to(out.dtype)
    return out if residual is None else out.to(residual.dtype) + residual
