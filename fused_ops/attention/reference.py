"""Attention with few keys in plain PyTorch: the definition, and the stock operator.

:func:`attention` is the definition: any device and dtype, float64 too, with PyTorch's own autograd (second
derivatives included). It is the oracle of the tests. :func:`sdpa` is what a user would call instead; it runs
where no kernel can, and is the baseline of the measurements.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Philox4x32-10: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.
_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


def _multiply(factor: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of the product of two 32-bit numbers, in int64."""
    low, high = factor * (word & 0xFFFF), factor * (word >> 16)
    return ((high + (low >> 16)) >> 16) & _WORD, (factor * word) & _WORD


def philox(
    seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four random 32-bit numbers, in int64, for each counter (c0, c1, c2, c3) under a 64-bit key."""
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(_ROUNDS):
        high_a, low_a = _multiply(_MULTIPLIERS[0], c0)
        high_b, low_b = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def dropout_threshold(dropout: float) -> int:
    """A probability is kept where 31 random bits are at least this."""
    return round(dropout * 2**31)


def dropout_keep(seed: Tensor, batch: int, heads: int, queries: int, keys: int, dropout: float) -> Tensor:
    """Which probabilities dropout keeps, bool (batch, heads, queries, keys).

    The numbers of query q, keys 4 j to 4 j + 3 of head h of image b come from the counter
    (q, j, b * heads + h, seed[1]) under the key seed[0].
    """
    groups = -(-keys // 4)
    c0 = torch.arange(queries, device=seed.device)[None, :, None]
    c1 = torch.arange(groups, device=seed.device)[None, None, :]
    c2 = torch.arange(batch * heads, device=seed.device)[:, None, None]
    words = philox(seed[0], c0, c1, c2, seed[1] & _WORD)
    bits = torch.stack(torch.broadcast_tensors(*words), -1).flatten(-2)[..., :keys] >> 1
    return (bits >= dropout_threshold(dropout)).view(batch, heads, queries, keys)


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
