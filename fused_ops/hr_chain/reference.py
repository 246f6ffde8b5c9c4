"""The HR chain in plain PyTorch: the definition.

Runs on any device and dtype, float64 too, with PyTorch's own autograd. It is the oracle of the tests, the
path taken where no kernel can run, and the baseline of the measurements.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fused_ops.core.activations import FUNCTIONS
from fused_ops.core.distributed import synchronised_batch_norm


def hr_chain(
    x: Tensor,
    high_weight: Tensor,
    low_weight: Tensor,
    fc1_weight: Tensor,
    fc2_weight: Tensor,
    high_bias: Tensor | None = None,
    fc1_bias: Tensor | None = None,
    fc2_bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    mean: Tensor | None = None,
    var: Tensor | None = None,
    drop_path: Tensor | None = None,
    *,
    batch_stats: bool,
    momentum: float = 0.0,
    eps: float = 1e-5,
    activation: str = "gelu",
    identity: bool = True,
    group: str = "",
) -> Tensor:
    """``[x +] drop_path * (high(x) + repeat(fc2(act(fc1(BN(low(x)))))))``.

    ``high`` is a 3x3 depthwise convolution, ``low`` one with stride 2; ``repeat`` gives every value to 2x2
    positions, cut to the size of ``x``.

    Args:
        x: input (B, C, H, W).
        high_weight, low_weight: filters (C, 1, 3, 3); cast to the dtype of ``x``, as all weights and biases.
        fc1_weight, fc2_weight: (hidden, C) and (C, hidden).
        high_bias, fc1_bias, fc2_bias: (C), (hidden), (C), or None.
        norm_weight, norm_bias: affine parameters of the norm (C), or None.
        mean, var: running statistics (C). With ``batch_stats`` they are updated in place with ``momentum``
            (``var`` with the unbiased variance) and may be None; without, they normalise.
        drop_path: factor of the branches per image (B), or None.
        identity: add ``x``.
        group: name of the process group over which batch statistics are taken together, or "".

    Returns:
        (B, C, H, W) in the dtype of ``x``.

    Raises:
        ValueError: from PyTorch, for batch statistics over one value per channel.
    """

    def cast(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(x.dtype)

    channels = x.shape[1]
    high = F.conv2d(x, cast(high_weight), cast(high_bias), padding=1, groups=channels)
    low = F.conv2d(x, cast(low_weight), stride=2, padding=1, groups=channels)
    if group:
        low = synchronised_batch_norm(low, mean, var, norm_weight, norm_bias, momentum, eps, group)
    else:
        low = F.batch_norm(low, mean, var, norm_weight, norm_bias, batch_stats, momentum, eps)
    hidden = FUNCTIONS[activation](F.linear(low.permute(0, 2, 3, 1), cast(fc1_weight), cast(fc1_bias)))
    grown = repeat(F.linear(hidden, cast(fc2_weight), cast(fc2_bias)), (x.shape[2], x.shape[3]))
    branch = high + grown
    if drop_path is not None:
        branch = branch * cast(drop_path)[:, None, None, None]
    return x + branch if identity else branch


def repeat(x: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, h, w, C) to the map (B, C, H, W) whose value at (i, j) is that at (i // 2, j // 2)."""
    batch, height, width, channels = x.shape
    twice = x[:, :, None, :, None].expand(batch, height, 2, width, 2, channels)
    grown = twice.reshape(batch, 2 * height, 2 * width, channels)
    return grown[:, : size[0], : size[1]].permute(0, 3, 1, 2)
