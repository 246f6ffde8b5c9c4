"""Co-attention in plain PyTorch: the definition, and the stock operators.

:func:`co_attention` is the definition: any device and dtype, float64 too, with PyTorch's own autograd (second
derivatives included). It is the oracle of the tests. :func:`sdpa` is what a user would call instead; it runs
where no kernel can, and is the baseline of the measurements.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fused_ops.core.dropout import dropout_keep


def is_nchw(tokens: Tensor) -> bool:
    """Whether tokens (B, N, heads, d) are a view of an NCHW map: neighbouring tokens are neighbours."""
    return tokens.shape[1] > 1 and tokens.stride(1) == 1 and tokens.stride(3) != 1


def _lay_out(out: Tensor, like: Tensor) -> Tensor:
    """(B, heads, N, d) as tokens (B, N, heads, d) in the map layout of the tokens ``like``."""
    if is_nchw(like):
        return out.transpose(2, 3).contiguous().permute(0, 3, 1, 2)
    return out.transpose(1, 2).contiguous()


def co_attention(
    local_query: Tensor,
    local_value: Tensor,
    global_key: Tensor,
    global_value: Tensor,
    local_key: Tensor | None = None,
    global_query: Tensor | None = None,
    seed: Tensor | None = None,
    *,
    scale: float,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Both directions with all scores spelt out; see :func:`fused_ops.co_attention.op.co_attention`.

    The weights that dropout keeps are those of :func:`fused_ops.core.dropout.dropout_keep`, where the
    images of the direction to global tokens count on from those of the direction to local tokens.
    """
    to_local = local_query.transpose(1, 2) @ global_key.permute(0, 2, 3, 1) * scale
    to_global = to_local.transpose(-1, -2)
    if global_query is not None:
        to_global = global_query.transpose(1, 2) @ local_key.permute(0, 2, 3, 1) * scale
    batch = local_query.shape[0]
    outputs = []
    for direction, (scores, value) in enumerate(((to_local, global_value), (to_global, local_value))):
        weights = scores.softmax(-1)
        if dropout:
            keep = dropout_keep(seed, 2 * batch, *weights.shape[1:], dropout)
            keep = keep.unflatten(0, (2, batch))[direction]
            weights = weights.masked_fill(~keep, 0.0) / (1.0 - dropout)
        outputs.append(weights @ value.transpose(1, 2))
    return _lay_out(outputs[0], local_query), outputs[1].transpose(1, 2).contiguous()


def sdpa(
    local_query: Tensor,
    local_value: Tensor,
    global_key: Tensor,
    global_value: Tensor,
    local_key: Tensor | None = None,
    global_query: Tensor | None = None,
    *,
    scale: float,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The same by ``scaled_dot_product_attention`` for each direction, with PyTorch's own dropout."""
    if global_query is None:
        global_query, local_key = global_key, local_query
    to_local, to_global = (
        F.scaled_dot_product_attention(
            *(tensor.transpose(1, 2) for tensor in tensors), dropout_p=dropout, scale=scale
        )
        for tensors in ((local_query, global_key, global_value), (global_query, local_key, local_value))
    )
    return _lay_out(to_local, local_query), to_global.transpose(1, 2).contiguous()
