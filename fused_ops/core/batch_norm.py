"""What one call of a BatchNorm uses, taken from the module that owns it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fused_ops.core import distributed
from fused_ops.core.hooks import is_hooked


class BatchNormState(NamedTuple):
    """What one call of a BatchNorm uses.

    Attributes:
        weight, bias: affine parameters (C), or None.
        running_mean, running_var: running statistics (C), or None. Updated in place by the operator when
            ``batch_stats`` and not None.
        batch_stats: normalise with the batch's own statistics.
        momentum: weight of the batch in the running statistics.
        eps: added to the variance.
        group: name of the process group over which batch statistics are taken together, or "".
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    batch_stats: bool
    momentum: float
    eps: float
    group: str = ""

    @classmethod
    def from_module(cls, norm: nn.BatchNorm2d | nn.SyncBatchNorm) -> BatchNormState:
        """State of ``norm`` for one forward pass, with the rules of its own ``forward``.

        Counts the batch in ``num_batches_tracked`` when in training, so call it once per forward.

        Raises:
            TypeError: ``norm`` is neither a BatchNorm2d nor a SyncBatchNorm.
        """
        if not isinstance(norm, (nn.BatchNorm2d, nn.SyncBatchNorm)):
            raise TypeError(
                f"norm is a {type(norm).__name__}; it must be a torch.nn.BatchNorm2d or SyncBatchNorm"
            )
        momentum = 0.0 if norm.momentum is None else norm.momentum
        if norm.training and norm.track_running_stats and norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
            if norm.momentum is None:
                momentum = 1.0 / float(norm.num_batches_tracked)
        batch_stats = norm.training or (norm.running_mean is None and norm.running_var is None)
        tracked = not norm.training or norm.track_running_stats
        synchronised = isinstance(norm, nn.SyncBatchNorm) and norm.training
        return cls(
            norm.weight,
            norm.bias,
            norm.running_mean if tracked else None,
            norm.running_var if tracked else None,
            batch_stats,
            momentum,
            norm.eps,
            distributed.group_name(norm.process_group) if synchronised else "",
        )

    def update_running(self, mean: Tensor, unbiased_var: Tensor) -> None:
        """Mix the statistics (C) of a batch into the running ones, in place; nothing where none are kept."""
        if not self.batch_stats or self.running_mean is None:
            return
        with torch.no_grad():
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_(unbiased_var.to(self.running_var.dtype), self.momentum)


def call_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """``norm(x)`` of a map (B, C, H, W), where a SyncBatchNorm exchanges what the kernels exchange.

    So the processes of one step may run a block in different ways (one has an empty batch, say), anywhere.
    """
    group = ""
    if type(norm) is nn.SyncBatchNorm and norm.training:
        group = distributed.group_name(norm.process_group)
    if not group or is_hooked(norm):
        return norm(x)
    state = BatchNormState.from_module(norm)
    return distributed.synchronised_batch_norm(
        x, state.running_mean, state.running_var, state.weight, state.bias, state.momentum, state.eps, group
    )
