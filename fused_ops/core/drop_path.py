"""Stochastic depth: dropping the branch of a residual block for whole samples."""

from __future__ import annotations

from torch import Tensor, nn


def _factors(x: Tensor, drop_prob: float) -> Tensor:
    """0 or 1 / (1 - drop_prob) for each sample, (B, 1, ...) with as many dimensions as ``x``."""
    keep_prob = 1.0 - drop_prob
    mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep_prob)
    return mask / keep_prob if keep_prob > 0.0 else mask


def drop_path(x: Tensor, drop_prob: float, training: bool) -> Tensor:
    """Zero ``x`` for a random subset of the batch and rescale the rest by ``1 / (1 - drop_prob)``.

    Args:
        x: branch output, batch first, any further dimensions.
        drop_prob: probability that a sample loses the branch, in [0, 1].
        training: outside training ``x`` is returned as it is.

    Returns:
        A tensor like ``x``; ``x`` itself where nothing is dropped.
    """
    if drop_prob == 0.0 or not training:
        return x
    return x * _factors(x, drop_prob)


class DropPath(nn.Module):
    """Module form of :func:`drop_path`; every call draws anew.

    Args:
        drop_prob: probability that a sample loses the branch, in [0, 1].

    Raises:
        ValueError: for a probability outside [0, 1].
    """

    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= drop_prob <= 1.0:
            raise ValueError(f"drop_path must be in [0, 1], got {drop_prob}")
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        return drop_path(x, self.drop_prob, self.training)

    def factors(self, x: Tensor) -> Tensor | None:
        """What this call would multiply each image of ``x`` by, (B), the same draw; None for 1."""
        if self.drop_prob == 0.0 or not self.training:
            return None
        return _factors(x, self.drop_prob).flatten()

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:g}"
