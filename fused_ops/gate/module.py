"""Gates as functions of the parameters that stock modules hold."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fused_ops.core.activations import FUNCTIONS
from fused_ops.core.checks import check_activation
from fused_ops.gate.op import gate_scale, pool_channels


def squeeze_excite(
    x: Tensor,
    reduce_weight: Tensor,
    reduce_bias: Tensor | None,
    expand_weight: Tensor,
    expand_bias: Tensor | None,
    *,
    hidden_activation: str = "relu",
    gate: str = "sigmoid",
    residual: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """Squeeze-and-excitation, Hu et al., CVPR 2018 (arXiv 1709.01507), section 3: two passes over the map.

    ``activation(x * gate(expand(hidden_activation(reduce(mean x)))) + residual)``, with the parameters of
    timm's ``SqueezeExcite`` (``conv_reduce``, ``conv_expand``) and ``SEModule`` (``fc1``, ``fc2``), of
    torchvision's ``SqueezeExcitation`` (``fc1``, ``fc2``), or of linear layers.

    Args:
        x, gate, residual, activation: see :func:`fused_ops.gate.gate_scale`.
        reduce_weight, expand_weight: (hidden, C) and (C, hidden), or with two more dimensions of 1.
        reduce_bias, expand_bias: (hidden) and (C), or None.
        hidden_activation: as ``activation``.

    Returns:
        (B, C, H, W) in the dtype and the memory format of ``x``.

    Raises:
        ValueError, TypeError, fused_ops.BackendUnavailableError: as :func:`fused_ops.gate.gate_scale`.
    """
    check_activation(hidden_activation)
    squeezed = pool_channels(x)[:, 0]
    hidden = FUNCTIONS[hidden_activation](F.linear(squeezed, reduce_weight.flatten(1), reduce_bias))
    logits = F.linear(hidden, expand_weight.flatten(1), expand_bias)
    return gate_scale(x, logits, residual=residual, gate=gate, activation=activation)
