"""What one call of a LayerNorm over channels uses, taken from the module that owns it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn


class LayerNormState(NamedTuple):
    """What one call of a LayerNorm over channels uses.

    Attributes:
        weight, bias: affine parameters (C), or None.
        eps: added to the variance.
    """

    weight: Tensor | None
    bias: Tensor | None
    eps: float

    @classmethod
    def from_module(cls, norm: nn.LayerNorm) -> LayerNormState:
        """State of ``norm``, which must normalise one dimension.

        Raises:
            TypeError: ``norm`` is no LayerNorm.
            ValueError: it normalises more than one dimension.
        """
        if not isinstance(norm, nn.LayerNorm):
            raise TypeError(f"norm is a {type(norm).__name__}; it must be a torch.nn.LayerNorm")
        if len(norm.normalized_shape) != 1:
            raise ValueError(f"norm is over {norm.normalized_shape}; it must be over channels alone")
        return cls(norm.weight, norm.bias, norm.eps)
