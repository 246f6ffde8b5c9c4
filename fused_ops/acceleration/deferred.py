"""The result of an operator that waits for what is added to it.

The modules of a chain cannot see the ``x + ...`` of the block around them. Where the data flow says that one
follows, the chain's first module returns a :class:`Deferred` in place of a tensor: permutations, factors per
channel (layer scale) and per image (drop path) are noted, and the addition runs the operator with all of
them. Anything else that is done to it runs the operator as it is, so that no result depends on the addition.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_ops.acceleration.exchange import Chain

# Factors that an operator may take.
SCALES = ("layer_scale", "drop_path")
_ADDITIONS = {"add", "__add__", "__radd__"}
_PRODUCTS = {"mul", "mul_", "__mul__", "__rmul__"}


def _drops(input: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> bool:
    """Whether ``torch.nn.functional.dropout`` would do anything, with its arguments."""
    return training and p > 0.0


class Deferred:
    """Stands for ``compute()`` until something needs it.

    Args:
        compute: takes ``residual``, a tensor like its result, and what ``factors`` names, by name.
        x: the operator's input; its shape is the result's.
        dtypes: of the result, and what a residual may have, which the result with it has.
        factors: any of ``layer_scale`` (C) and ``drop_path`` (B).
        channel_dim: of the result.
    """

    def __init__(
        self,
        compute: Callable[..., Tensor],
        x: Tensor,
        dtypes: Sequence[torch.dtype],
        factors: tuple[str, ...] = (),
        channel_dim: int = -1,
    ) -> None:
        self._compute = compute
        self._x = x
        self._dtypes = dtypes
        self._takes_factors = factors
        self._channel_dim = channel_dim
        self._dims = tuple(range(x.dim()))
        self._factors: dict[str, Tensor] = {}

    @property
    def shape(self) -> torch.Size:
        return torch.Size([self._x.shape[dim] for dim in self._dims])

    @property
    def dtype(self) -> torch.dtype:
        # A factor in float32 makes a result of it, as PyTorch's promotion does.
        dtype = self._dtypes[0]
        for factor in self._factors.values():
            dtype = torch.promote_types(dtype, factor.dtype)
        return dtype

    @property
    def device(self) -> torch.device:
        return self._x.device

    @property
    def ndim(self) -> int:
        return len(self._dims)

    def size(self, dim: int | None = None) -> torch.Size | int:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return self.ndim

    def new_empty(self, size: Sequence[int], **options: Any) -> Tensor:
        return self._x.new_empty(size, **{"dtype": self.dtype, **options})

    def permute(self, *dims: Any) -> Deferred:
        order = dims if isinstance(dims[0], int) else dims[0]
        return self._with({}, tuple(self._dims[dim] for dim in order))

    def value(self, **residual: Tensor) -> Tensor:
        """The result, with the factors noted so far."""
        out = self._compute(**self._factors, **residual).permute(self._dims)
        return out if residual else out.to(self.dtype)

    def __add__(self, other: Any) -> Tensor:
        return torch.add(self, other)

    __radd__ = add = __add__

    def __mul__(self, other: Any) -> Deferred | Tensor:
        return torch.mul(self, other)

    # In place too: nothing is in memory yet, and nobody else has it.
    __rmul__ = __imul__ = mul = mul_ = __mul__

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.value(), name)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.permute:
            return args[0].permute(*args[1:])
        if func is F.dropout and not _drops(*args, **(kwargs or {})):
            return args[0]
        if not kwargs and len(args) == 2:
            deferred, other = args if isinstance(args[0], Deferred) else args[::-1]
            if isinstance(other, Deferred):
                other = other.value()
            if isinstance(other, Tensor):
                if func.__name__ in _ADDITIONS and deferred._takes(other):
                    return deferred.value(residual=deferred._as_computed(other))
                if func.__name__ in _PRODUCTS:
                    noted = deferred._times(other)
                    if noted is not None:
                        return noted
        plain = [arg.value() if isinstance(arg, Deferred) else arg for arg in args]
        return func(*plain, **(kwargs or {}))

    def _takes(self, residual: Tensor) -> bool:
        if residual.shape != self.shape or residual.dtype not in self._dtypes[1:]:
            return False
        return torch.promote_types(self.dtype, residual.dtype) == residual.dtype

    def _as_computed(self, residual: Tensor) -> Tensor:
        """``residual`` with the dimensions in the operator's order; itself if they are."""
        order = sorted(range(self.ndim), key=self._dims.__getitem__)
        return residual if order == list(range(self.ndim)) else residual.permute(order)

    def _times(self, factor: Tensor) -> Deferred | None:
        """With a factor per channel or per image noted; None for any other."""
        if factor.dim() > self.ndim:
            return None
        sizes = (1,) * (self.ndim - factor.dim()) + tuple(factor.shape)
        varies = [dim for dim, size in zip(self._dims, sizes, strict=True) if size != 1]
        if any(factor.numel() != self._x.shape[dim] for dim in varies):
            return None
        if factor.dtype not in (self._x.dtype, self._dtypes[0], torch.float32):
            return None
        free = [name for name in self._takes_factors if name not in self._factors]
        if varies == [self._channel_dim] and "layer_scale" in free:
            return self._with({"layer_scale": factor.flatten()})
        per_image = varies == [0] or (not varies and self._x.shape[0] == 1)
        if per_image and not factor.requires_grad and "drop_path" in free:
            return self._with({"drop_path": factor.flatten()})
        return None

    def _with(self, factors: dict[str, Tensor], dims: tuple[int, ...] | None = None) -> Deferred:
        given = (self._dtypes, self._takes_factors, self._channel_dim)
        noted = Deferred(self._compute, self._x, *given)
        noted._dims = self._dims if dims is None else dims
        noted._factors = {**self._factors, **factors}
        return noted


def computed_or_deferred(
    chain: Chain, compute: Callable[..., Tensor], x: Tensor, dtypes: Sequence[torch.dtype], *factors: Any
) -> Tensor | Deferred:
    """``compute()``, or what waits for an addition where one certainly follows; arguments of Deferred."""
    return Deferred(compute, x, dtypes, *factors) if chain.awaits_addition() else compute()
