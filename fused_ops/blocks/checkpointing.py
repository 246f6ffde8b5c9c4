"""Activation checkpointing that leaves BatchNorm's running statistics as if there were none."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@contextlib.contextmanager
def preserve_running_statistics(module: nn.Module) -> Iterator[None]:
    """Let every BatchNorm in ``module`` update a throw-away copy of its running statistics.

    The recomputed forward pass needs the statistics of the batch again, but the running ones have already
    taken this batch in; without this a checkpointed block would count every batch twice.
    """
    saved: list[tuple[nn.Module, str, Tensor]] = []
    for layer in module.modules():
        if isinstance(layer, _BatchNorm) and layer.training:
            for name in _STATISTICS:
                value = getattr(layer, name)
                if value is not None:
                    saved.append((layer, name, value))
                    setattr(layer, name, value.clone())
    try:
        yield
    finally:
        for layer, name, value in saved:
            setattr(layer, name, value)


def checkpoint_block(block: nn.Module, *inputs: Any) -> Any:
    """``block(*inputs)``, keeping only the inputs for the backward pass.

    Outputs, gradients, random draws and running statistics are those of the plain call. A compiled graph
    recomputes without side effects, so there the plain checkpoint is enough.
    """
    if torch.compiler.is_compiling():
        return checkpoint(block, *inputs, use_reentrant=False)
    return checkpoint(
        block,
        *inputs,
        use_reentrant=False,
        context_fn=lambda: (contextlib.nullcontext(), preserve_running_statistics(block)),
    )
