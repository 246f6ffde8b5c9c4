"""Calls of the HR chain's kernels in the compiled CUDA library, or in its emulator for CPU tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_ops.core import distributed, environment, library, native

LARGEST_CHANNELS = 128
DTYPES = (torch.float16, torch.bfloat16)

# Hidden units whose weight gradients one block holds in registers, up to 64 channels, half as many above,
# and blocks in a cluster (csrc/hr_chain/plan.h). Above 96 channels a block also takes more shared memory than
# GPUs of compute capability 12 give it.
_UNITS_PER_BLOCK = 256
_LARGEST_CLUSTER = 8


@environment.constant_in_graphs
def _capability(device: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def can_run(call: Any) -> tuple[bool, str]:
    """Whether the CUDA kernels can run ``call``; one sentence says why not. Looks at metadata only."""
    x = call.x
    if not x.is_cuda and not (x.device.type == "cpu" and native.emulator() is not None):
        return False, f"x is on {x.device}; the CUDA backend needs a CUDA tensor"
    if x.dtype not in DTYPES:
        return False, f"x is {x.dtype}; the CUDA kernels multiply in float16 and bfloat16"
    channels, hidden = x.shape[1], call.fc1_weight.shape[0]
    if channels > LARGEST_CHANNELS:
        return False, f"x has {channels} channels; the CUDA kernels are for up to {LARGEST_CHANNELS}"
    if x.numel() == 0:
        return False, f"x is empty, {tuple(x.shape)}"
    if channels > 1 and x.shape[2] * x.shape[3] > 1 and not library.is_channels_last(x):
        return False, "x is in NCHW order; the CUDA kernels read and write channels_last"
    units = _UNITS_PER_BLOCK if channels <= 64 else _UNITS_PER_BLOCK // 2
    most = units * _LARGEST_CLUSTER
    if call.needs_grad and hidden > most:
        return False, f"the hidden width is {hidden}; the CUDA kernels are for up to {most} in training"
    if x.is_cuda:
        ok, reason = native.status(x.device.index)
        if not ok:
            return False, reason
        if call.needs_grad and hidden > units:
            major, minor = _capability(x.device.index)
            if major < 9 or (major >= 12 and channels > 96):
                return False, (
                    f"the hidden width is {hidden} with {channels} channels, and backward has the weights' "
                    f"gradients of {units} on chip on a GPU of compute capability {major}.{minor}"
                )
    return True, ""


def _in_layout(tensor: Tensor) -> Tensor:
    """``tensor`` with channels side by side in memory; copied where they are not."""
    if tensor.shape[1] > 1 and tensor.stride(1) != 1:
        return tensor.contiguous(memory_format=torch.channels_last)
    return tensor


def _inputs(call: Any, mean: Tensor, var: Tensor) -> tuple[Tensor | None, ...]:
    """Input tensors in the order of the library's operators; matrices in the dtype of x."""
    dtype = call.x.dtype
    return (
        _in_layout(call.x),
        call.high_weight,
        call.high_bias,
        call.low_weight,
        call.fc1_weight.to(dtype).contiguous(),
        call.fc1_bias,
        call.fc2_weight.to(dtype).contiguous(),
        call.fc2_bias,
        call.norm_weight,
        call.norm_bias,
        mean,
        var,
        call.drop_path,
    )


def _options(call: Any) -> tuple[Any, ...]:
    return call.batch_stats, call.eps, native.ACTIVATIONS[call.activation], call.identity


def forward(
    call: Any, out: Tensor, low: Tensor, mean: Tensor, var: Tensor, unbiased: Tensor
) -> tuple[Tensor, ...]:
    """Launch the forward kernels of a call that :func:`can_run`; fills and returns the given outputs.

    Args:
        call: the checked call.
        out: result (B, C, H, W).
        low: the strided convolution's output (B, h, w, C), written where ``call.keep_low``.
        mean, var, unbiased: (C) float32, the batch's statistics over the process group, written where
            ``call.batch_stats``.
    """
    statistics = (mean, var) if call.batch_stats else (call.mean, call.var)
    tensors = (
        *_inputs(call, *statistics),
        unbiased if call.batch_stats else None,
        out,
        low if call.keep_low else None,
    )

    def exchange() -> None:
        distributed.exchange_moments(mean, var, unbiased, call.values_per_channel, call.group)

    native.run_stages("hr_chain_forward", tensors, _options(call), exchange=exchange if call.group else None)
    return out, low, mean, var, unbiased


def backward(
    call: Any, grad: Tensor, low: Tensor, needs: list[bool], *gradients: Tensor
) -> tuple[Tensor, ...]:
    """Launch the backward kernels; fills the needed ones of the ten gradients and returns all.

    Args:
        call: the forward's call, with ``mean`` and ``var`` the statistics that it normalised with.
        grad: (B, C, H, W) in any layout; copied where channels lie apart in memory.
        low: the strided convolution's output (B, h, w, C).
        needs: which of x, high_weight, high_bias, low_weight, fc1_weight, fc1_bias, fc2_weight, fc2_bias,
            norm_weight, norm_bias get a gradient.
        gradients: outputs for them, absent ones empty.
    """
    wanted = [gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True)]
    to_low = needs[0] or needs[3]
    group = call.group if to_low or needs[8] or needs[9] else ""
    sums = call.x.new_empty((2, call.x.shape[1]), dtype=torch.float32) if group else None
    tensors = (
        _in_layout(grad),
        low,
        *_inputs(call, call.mean, call.var),
        *wanted,
        torch.empty_like(low) if to_low else None,
        sums,
    )

    def exchange() -> None:
        distributed.exchange_sums(sums, call.values_per_channel, group)

    native.run_stages("hr_chain_backward", tensors, _options(call), exchange=exchange if group else None)
    return gradients
