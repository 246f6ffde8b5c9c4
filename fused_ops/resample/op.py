"""The operator that resamples maps: checks of arguments, choice of backend, torch operators, autograd."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fused_ops.core import library
from fused_ops.core.autocast import autocast_dtype, cast
from fused_ops.core.backends import Backend, choose, reference_can_run
from fused_ops.core.checks import (
    any_requires_grad,
    check_alike,
    check_choice,
    check_direction,
    check_map,
    check_parameter,
)
from fused_ops.resample import reference, triton
from fused_ops.resample.cases import cases


@dataclass
class ResampleCall:
    """One checked call: what a backend's ``can_run`` and launchers see."""

    x: Tensor
    add: Tensor | None
    drop_path: Tensor | None
    size: tuple[int, int]
    mode: str
    needs_grad: bool = False

    def kind(self) -> dict[str, Any]:
        """What measurements of one call say about another depends on, apart from sizes."""
        return {
            "training": self.needs_grad,
            "dtype": str(self.x.dtype),
            "channels_last": is_channels_last(self.x),
            "mode": self.mode,
            "add": self.add is not None,
        }

    def sizes(self) -> tuple[int, ...]:
        """Channels, height and width of the input, height and width of the output."""
        return (*self.x.shape[1:], *self.size)

    def __str__(self) -> str:
        layout = "channels_last" if is_channels_last(self.x) else "NCHW"
        dtype = str(self.x.dtype).removeprefix("torch.")
        options = "".join(f", {name}" for name in ("add", "drop_path") if getattr(self, name) is not None)
        height, width = self.size
        return f"{self.mode} of {tuple(self.x.shape)} {dtype} {layout} to {height}x{width}{options}"


def resample_map(
    x: Tensor,
    size: int | Sequence[int],
    *,
    mode: str = "bilinear",
    add: Tensor | None = None,
    drop_path: Tensor | None = None,
) -> Tensor:
    """``drop_path * interpolate(x, size) + add`` in one pass over the maps, forward and backward.

    Positions as in ``torch.nn.functional.interpolate`` with ``size``: bilinear with ``align_corners=False``
    and without antialiasing, or nearest; up or down, by any ratio.

    Args:
        x: (B, C, H, W), channels_last or NCHW, slices too; float32, float16, bfloat16 or float64.
        size: height and width of the result, or one number for both.
        mode: bilinear or nearest.
        add: (B, C, *size) in the dtype of ``x``; fastest in its layout. Its gradient is the one that comes.
        drop_path: factor of the resampled map per image (B) in the dtype of ``x`` or float32, 0 or one over
            the probability to keep it; None for 1. Gets no gradient.

    Returns:
        (B, C, *size) in the dtype, under autocast too, and the memory format of ``x``.

    Raises:
        ValueError, TypeError: an argument is not allowed; the message names it, its value and what is.
        fused_ops.BackendUnavailableError: a backend was requested by name and cannot run this call.
    """
    check_map("x", x)
    if min(x.shape[1:]) < 1:
        raise ValueError(f"x has shape {tuple(x.shape)}; channels, height and width must be at least 1")
    size = _checked_size(size)
    check_choice("mode", mode, reference.MODES)
    if autocast_dtype(x) is not None:
        # What is added comes out of autocast's products, the map may not.
        add, drop_path = cast(add, x.dtype), cast(drop_path, x.dtype)
    if add is not None:
        shape = (*x.shape[:2], *size)
        if tuple(add.shape) != shape:
            raise ValueError(f"add has shape {tuple(add.shape)}; it must be that of the result, {shape}")
        check_alike("add", add, x)
    check_parameter("drop_path", drop_path, (x.shape[0],), "one factor per image", x)
    if drop_path is not None and drop_path.requires_grad:
        raise ValueError("drop_path requires grad; it is a random factor and gets no gradient")
    call = ResampleCall(x, add, drop_path, size, mode, any_requires_grad(x, add))
    backend = choose("resample", BACKENDS, call)
    if backend.forward is None:
        return reference.resample(x, size, mode, add, drop_path)
    return _RESAMPLE.run(call.needs_grad, x, add, drop_path, *size, mode, backend.name)


def _checked_size(size: int | Sequence[int]) -> tuple[int, int]:
    whole = (int, torch.SymInt)
    pair = (size, size) if isinstance(size, whole) else size
    if (
        not isinstance(pair, Sequence)
        or len(pair) != 2
        or not all(isinstance(number, whole) and number >= 1 for number in pair)
    ):
        raise ValueError(f"size={size!r} is not allowed; it must be an integer of at least 1, or two of them")
    return pair[0], pair[1]


def is_channels_last(x: Tensor) -> bool:
    """Whether stock PyTorch would give the result of resampling ``x`` a channels_last layout.

    Maps of one position are in both layouts at once, and larger ones made of them are not: then the strides
    decide although nothing lies at them.
    """
    if x.shape[2] == 1 and x.shape[3] == 1 and x.shape[1] > 1:
        batch, channel, row, column = x.stride()
        return channel > 0 and channel * x.shape[1] <= column <= row <= batch
    return library.is_channels_last(x)


def _empty(shape: Sequence[int], like: Tensor, channels_last: bool) -> Tensor:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format)


_FORWARD_SCHEMA = (
    "resample_forward(Tensor x, Tensor? add, Tensor? drop_path, SymInt height, SymInt width, str mode, "
    "str backend) -> Tensor"
)
# The map is not needed, only what it looks like.
_BACKWARD_SCHEMA = (
    "resample_backward(Tensor grad, Tensor? drop_path, SymInt height, SymInt width, bool channels_last, "
    "str mode, str backend) -> Tensor"
)


def allocate_forward(call: ResampleCall) -> Tensor:
    """The output: dense, in the layout of the input."""
    return _empty((*call.x.shape[:2], *call.size), call.x, is_channels_last(call.x))


def _forward(x, add, drop_path, height, width, mode, backend):
    call = ResampleCall(x, add, drop_path, (height, width), mode)
    return _BY_NAME[backend].forward(call, allocate_forward(call))


def _forward_fake(x, add, drop_path, height, width, mode, backend):
    return allocate_forward(ResampleCall(x, add, drop_path, (height, width), mode))


def _backward(grad, drop_path, height, width, channels_last, mode, backend):
    x_grad = _backward_fake(grad, drop_path, height, width, channels_last, mode, backend)
    return _BY_NAME[backend].backward(grad, drop_path, mode, x_grad)


def _backward_fake(grad, drop_path, height, width, channels_last, mode, backend):
    return _empty((*grad.shape[:2], height, width), grad, channels_last)


def _setup_context(ctx, inputs, output) -> None:
    x, _, drop_path, _, _, mode, backend = inputs
    ctx.options = (x.shape[2], x.shape[3], is_channels_last(x), mode, backend)
    ctx.save_for_backward(drop_path)
    ctx.set_materialize_grads(False)


def _autograd(ctx, grad):
    x_grad = None
    if grad is not None and ctx.needs_input_grad[0]:
        (drop_path,) = ctx.saved_tensors
        # Where gradients are recorded, the registered operator, which refuses.
        registered = torch.is_grad_enabled() or not library.plain_eager(grad, drop_path)
        x_grad = (_RESAMPLE.backward if registered else _backward)(grad, drop_path, *ctx.options)
    return x_grad, grad if ctx.needs_input_grad[1] else None, None, None, None, None, None


def _no_flops(*_, **__) -> int:
    """PyTorch counts matrix products and convolutions, of which there are none."""
    return 0


def read_of(size: int, out_size: int, mode: str) -> int:
    """Number of the ``size`` input pixels of one axis that have a weight in any of ``out_size`` outputs."""
    if mode == "nearest":
        return min(size, out_size)
    if size <= 2 * out_size:
        return size
    # Two pixels for each output, none of them twice, and one where the position is that of a pixel: where an
    # odd number of pixels goes to an odd number of outputs, once.
    common = math.gcd(size, out_size)
    odd = size // common % 2 == 1 and out_size // common % 2 == 1
    return 2 * out_size - (common if odd else 0)


def least_bytes(call: ResampleCall, direction: str) -> int:
    """Bytes that have to move through memory; the factors per image are left out.

    Forward: the pixels of the map that have a weight in any output and what is added are read, the result is
    written. Backward: the gradient is read, that of the map is written; that of what is added is the given
    one.
    """
    check_direction(direction)
    element = call.x.element_size()
    planes = call.x.shape[0] * call.x.shape[1]
    size, out = tuple(call.x.shape[2:]), call.size[0] * call.size[1]
    if direction == "backward":
        return element * planes * (out + size[0] * size[1])
    read = math.prod(read_of(*axis, call.mode) for axis in zip(size, call.size, strict=True))
    return element * planes * (read + (1 + (call.add is not None)) * out)


BACKENDS = (
    Backend("triton", triton.can_run, triton.forward, triton.backward),
    Backend("reference", reference_can_run),
)
_BY_NAME = {backend.name: backend for backend in BACKENDS}

_RESAMPLE = library.DifferentiableOperator(
    _FORWARD_SCHEMA,
    _BACKWARD_SCHEMA,
    forward=_forward,
    forward_fake=_forward_fake,
    forward_flops=_no_flops,
    backward=_backward,
    backward_fake=_backward_fake,
    backward_flops=_no_flops,
    setup_context=_setup_context,
    autograd=_autograd,
    once_differentiable="has no derivative of its own; for second derivatives run resample_map inside "
    'fused_ops.backend("reference")',
)
OPERATOR = library.register(
    library.Operator(
        "resample",
        resample_map,
        BACKENDS,
        cases,
        least_bytes,
        _RESAMPLE.overloads,
        triton.launch_count,
    )
)
