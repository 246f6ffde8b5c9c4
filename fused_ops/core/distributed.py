"""Batch statistics taken together by the processes of a group: one collective forward, one backward.

Kernels and the reference exchange the same numbers in the same order, so that the processes of one step may
run on different backends (an empty batch runs on the reference).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def group_name(group: Any) -> str:
    """Name of a process group (None for the default one); "" where there is nobody to exchange with."""
    if not dist.is_available() or not dist.is_initialized():
        return ""
    group = dist.group.WORLD if group is None else group
    return group.group_name if dist.get_world_size(group) > 1 else ""


def _resolve(name: str) -> Any:
    return dist.distributed_c10d._resolve_process_group(name)


def exchange_moments(mean: Tensor, var: Tensor, unbiased: Tensor, count: int, group: str) -> None:
    """Replace one process's statistics by those of the whole group.

    Args:
        mean, var: (C), of this process's ``count`` values per channel; read and written. ``var`` is biased.
        unbiased: (C), written.
        count: values per channel here; 0 is allowed, and what the tensors hold is then not used.
        group: name of the process group.
    """
    channels = mean.numel()
    mine = mean.new_zeros(2 * channels + 1)
    if count:
        mine[0] = count
        mine[1 : channels + 1] = mean
        mine[channels + 1 :] = var
    resolved = _resolve(group)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(resolved))]
    dist.all_gather(everyone, mine, group=resolved)
    parts = torch.stack(everyone)
    counts, means, variances = parts[:, :1], parts[:, 1 : channels + 1], parts[:, channels + 1 :]
    total = counts.sum()
    # Deviations from one process's mean keep the sums small where all means are large.
    first = means[counts.argmax()]
    merged = first + (counts * (means - first)).sum(0) / total
    m2 = (counts * (variances + (means - merged).square())).sum(0)
    mean.copy_(merged)
    var.copy_(m2 / total)
    unbiased.copy_(m2 / (total - 1))


def exchange_sums(sums: Tensor, count: int, group: str) -> None:
    """Replace BatchNorm's two backward sums by the group's, scaled so that ``sums / count`` are its means.

    Args:
        sums: (2, C), the sums over this process's ``count`` values per channel; read and written.
        count: values per channel here; 0 is allowed.
        group: name of the process group.
    """
    mine = torch.cat([sums.flatten(), sums.new_tensor([count])])
    dist.all_reduce(mine, group=_resolve(group))
    sums.copy_((mine[:-1] * (count / mine[-1])).view_as(sums))


class _SynchronisedBatchNorm(torch.autograd.Function):
    """BatchNorm of (B, C, H, W) by the statistics of a process group, in plain PyTorch."""

    @staticmethod
    def forward(ctx, x, weight, bias, running_mean, running_var, momentum, eps, group):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        count = x.numel() // x.shape[1]
        if count:
            var, mean = torch.var_mean(wide, dim=(0, 2, 3), correction=0)
        else:
            var, mean = (wide.new_zeros(x.shape[1]) for _ in range(2))
        unbiased = torch.empty_like(var)
        exchange_moments(mean, var, unbiased, count, group)
        if running_mean is not None:
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_(unbiased.to(running_var.dtype), momentum)
        rstd = torch.rsqrt(var + eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.count, ctx.group = count, group
        ctx.bias_dtype = None if bias is None else bias.dtype
        out = (wide - _per_channel(mean)) * _per_channel(rstd)
        if weight is not None:
            out = out * _per_channel(weight)
        if bias is not None:
            out = out + _per_channel(bias)
        return out.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, mean, rstd = ctx.saved_tensors
        wide = grad.to(rstd.dtype)
        normalised = (x.to(rstd.dtype) - _per_channel(mean)) * _per_channel(rstd)
        sums = torch.stack([wide.sum((0, 2, 3)), (wide * normalised).sum((0, 2, 3))])
        bias_grad, weight_grad = sums.clone()
        exchange_sums(sums, ctx.count, ctx.group)
        means = sums / max(ctx.count, 1)
        scale = rstd if weight is None else rstd * weight
        x_grad = _per_channel(scale) * (wide - _per_channel(means[0]) - normalised * _per_channel(means[1]))
        needs = ctx.needs_input_grad
        return (
            x_grad.to(x.dtype),
            weight_grad.to(weight.dtype) if needs[1] else None,
            bias_grad.to(ctx.bias_dtype) if needs[2] else None,
            *(None,) * 5,
        )


def _per_channel(values: Tensor) -> Tensor:
    return values[None, :, None, None]


def synchronised_batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
    group: str,
) -> Tensor:
    """BatchNorm in training by the statistics of a process group.

    Args:
        x: (B, C, H, W); B may be 0 on some processes.
        running_mean, running_var: (C), or None. Updated in place, ``running_var`` with the unbiased variance.
        weight, bias: (C), or None.
        momentum: weight of the batch in the running statistics.
        eps: added to the variance.
        group: name of the process group.

    Returns:
        (B, C, H, W) in the dtype of ``x``; differentiable once.
    """
    return _SynchronisedBatchNorm.apply(x, weight, bias, running_mean, running_var, momentum, eps, group)
