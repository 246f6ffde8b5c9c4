"""The operators of gates: argument checks, choice of backend, torch operators, autograd, formulas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fused_ops.core import library
from fused_ops.core.autocast import autocast_dtype
from fused_ops.core.backends import Backend, choose, reference_can_run
from fused_ops.core.checks import (
    any_requires_grad,
    check_activation,
    check_alike,
    check_choice,
    check_companion,
    check_direction,
    check_map,
    check_parameter,
)
from fused_ops.gate import reference, triton
from fused_ops.gate.cases import (
    channel_cases,
    context_cases,
    fusion_cases,
    map_cases,
    multi_level_cases,
    position_cases,
    render_cases,
    scale_cases,
    weighted_cases,
)

GATES = tuple(reference.GATES)
POOLINGS = reference.POOLINGS
COMBINATIONS = ("product", "sum")
MOST_MAPS = triton.MOST_MAPS


@dataclass
class _Call:
    """What every checked call has: what a backend's ``can_run`` and launchers see."""

    x: Tensor

    def kind(self) -> dict[str, Any]:
        """What measurements of one call say about another depends on, apart from sizes."""
        return {
            "training": self.needs_grad,
            "dtype": str(self.x.dtype),
            "channels_last": library.is_channels_last(self.x),
            **self.options(),
        }

    def sizes(self) -> tuple[int, ...]:
        """Channels, height and width of the input."""
        return tuple(self.x.shape[1:])

    def __str__(self) -> str:
        layout = "channels_last" if library.is_channels_last(self.x) else "NCHW"
        dtype = str(self.x.dtype).removeprefix("torch.")
        options = "".join(f", {name} {value}" for name, value in self.options().items() if value)
        return f"on {tuple(self.x.shape)} {dtype} {layout}{options}"


@dataclass
class PoolCall(_Call):
    """One checked call of a pooling; ``keep``: backward follows, and needs what it cannot compute again."""

    channel_gate: Tensor | None
    channel_poolings: tuple[str, ...]
    position_poolings: tuple[str, ...]
    gate: str
    normalise: bool
    keep: bool = False
    needs_grad: bool = False

    @property
    def is_mean(self) -> bool:
        """Whether the gradient of the map is the same at all positions."""
        return self.channel_poolings == ("mean",) and not self.position_poolings and self.channel_gate is None

    @property
    def entropies(self) -> int:
        return (self.channel_poolings + self.position_poolings).count("entropy")

    def options(self) -> dict[str, Any]:
        return {
            "channels": " ".join(self.channel_poolings),
            "positions": " ".join(self.position_poolings),
            "gate": "" if self.channel_gate is None else self.gate,
        }


@dataclass
class ScaleCall(_Call):
    """One checked call of a scaling."""

    channel_gate: Tensor | None
    position_gate: Tensor | None
    channel_add: Tensor | None
    residual: Tensor | None
    gate: str
    combine: str
    activation: str
    needs_grad: bool = False

    def tensors(self) -> tuple[Tensor | None, ...]:
        return (self.x, self.channel_gate, self.position_gate, self.channel_add, self.residual)

    def options(self) -> dict[str, Any]:
        names = ("channel_gate", "position_gate", "channel_add", "residual")
        given = [name for name in names if getattr(self, name) is not None]
        return {
            "with": " ".join(given),
            "gate": self.gate,
            "combine": self.combine,
            "activation": self.activation,
        }


@dataclass
class ContextCall(_Call):
    """One checked call of the context pooling; ``keep`` as of :class:`PoolCall`."""

    weight: Tensor
    bias: Tensor | None
    keep: bool = False
    needs_grad: bool = False

    def options(self) -> dict[str, Any]:
        return {}


@dataclass
class AggregateCall(_Call):
    """One checked call of an aggregation; ``x`` is the first map.

    Attributes:
        slots: maps, gates of positions, MOST_MAPS of each with None for those that are absent, and the gates
            of channels (B, C, layers) or None.
        opacity, reverse_channels: see :func:`fused_ops.gate.reference.aggregate`.
    """

    slots: tuple[Tensor | None, ...]
    opacity: str
    reverse_channels: bool
    needs_grad: bool = False

    @property
    def count(self) -> int:
        """Number of maps."""
        return sum(one is not None for one in self.slots[:MOST_MAPS])

    @property
    def layers(self) -> int:
        """Number of gates of positions, which is that of channels."""
        return sum(gate is not None for gate in self.slots[MOST_MAPS:-1])

    def options(self) -> dict[str, Any]:
        return {
            "maps": self.count,
            "opacity": self.opacity,
            "channel_gates": self.slots[-1] is not None,
        }


# Poolings


def pool_channels(x: Tensor, poolings: Sequence[str] = ("mean",), *, normalise: bool = True) -> Tensor:
    """Poolings of every channel over its positions, all of them in one pass over the map.

    ``mean``, ``max`` (where values tie, or are not numbers, the first one gets the gradient) and ``entropy``,
    that of the softmax over the positions.

    Args:
        x: (B, C, H, W), channels_last or NCHW, slices too; float32, float16, bfloat16 or float64.
        poolings: any of the three, each at most once.
        normalise: divide the entropy by its largest value, log(H W).

    Returns:
        (B, len(poolings), C), contiguous, in the dtype of ``x``, under autocast too.

    Raises:
        ValueError, TypeError: an argument is not allowed; the message names it, its value and what is.
        fused_ops.BackendUnavailableError: a backend was requested by name and cannot run this call.
    """
    return _pool("pool_channels", x, _poolings("poolings", poolings), (), None, "none", normalise)[0]


def pool_positions(
    x: Tensor,
    poolings: Sequence[str] = ("max", "mean"),
    *,
    channel_gate: Tensor | None = None,
    gate: str = "sigmoid",
    normalise: bool = True,
) -> Tensor:
    """Poolings of every position over the channels of ``x * gate(channel_gate)``, in one pass over ``x``.

    The scaled map, of which CBAM (Woo et al., ECCV 2018, section 3) pools, is not written.

    Args:
        x, normalise: see :func:`pool_channels`; the largest entropy is log(C).
        poolings: as there.
        channel_gate: logits (B, C) in the dtype of ``x`` or float32; None for no scaling.
        gate: sigmoid, hard_sigmoid or none, of the logits.

    Returns:
        (B, len(poolings), H, W), contiguous, in the dtype of ``x``, under autocast too.

    Raises:
        ValueError, TypeError, fused_ops.BackendUnavailableError: as :func:`pool_channels`.
    """
    return _pool("pool_positions", x, (), _poolings("poolings", poolings), channel_gate, gate, normalise)[1]


def pool_map(
    x: Tensor,
    channels: Sequence[str],
    positions: Sequence[str],
    *,
    channel_gate: Tensor | None = None,
    gate: str = "sigmoid",
    normalise: bool = True,
) -> tuple[Tensor, Tensor]:
    """:func:`pool_channels` and :func:`pool_positions` of the same map, in one pass over it.

    Args:
        x, channel_gate, gate, normalise: see there; the gate scales the map for both.
        channels, positions: poolings of each.

    Returns:
        (B, len(channels), C) and (B, len(positions), H, W).

    Raises:
        ValueError, TypeError, fused_ops.BackendUnavailableError: as :func:`pool_channels`.
    """
    names = _poolings("channels", channels), _poolings("positions", positions)
    return _pool("pool_map", x, *names, channel_gate, gate, normalise)


def _poolings(name: str, given: Sequence[str]) -> tuple[str, ...]:
    if isinstance(given, str) or not given or len(set(given)) < len(given):
        raise ValueError(f"{name}={given!r} is not allowed; it must name some of {', '.join(POOLINGS)} once")
    for pooling in given:
        check_choice(f"one of {name}", pooling, POOLINGS)
    return tuple(given)


def _check_x(x: Tensor, name: str = "x") -> None:
    check_map(name, x)
    if min(x.shape[1:]) < 1:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; channels, height and width must be at least 1")


def _suited(x: Tensor, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    """``others``, under autocast in the dtype of ``x``: gates come out of autocast's linear layers."""
    if autocast_dtype(x) is None:
        return others
    return tuple(
        other if other is None or not other.is_floating_point() else other.to(x.dtype) for other in others
    )


def _pool(
    operator: str,
    x: Tensor,
    channels: tuple[str, ...],
    positions: tuple[str, ...],
    channel_gate: Tensor | None,
    gate: str,
    normalise: bool,
) -> tuple[Tensor, Tensor]:
    _check_x(x)
    (channel_gate,) = _suited(x, channel_gate)
    check_parameter("channel_gate", channel_gate, tuple(x.shape[:2]), "one logit per image and channel", x)
    check_choice("gate", gate, GATES)
    needs_grad = any_requires_grad(x, channel_gate)
    call = PoolCall(x, channel_gate, channels, positions, gate, normalise, needs_grad, needs_grad)
    backend = choose(operator, POOL_BACKENDS, call)
    if backend.forward is None:
        return reference.pool(x, channels, positions, channel_gate, gate, normalise)
    return _POOL.run(
        needs_grad,
        x,
        channel_gate,
        ",".join(channels),
        ",".join(positions),
        gate,
        normalise,
        needs_grad,
        backend.name,
    )[:2]


_POOL_OPTIONS = "str channels, str positions, str gate, bool normalise"
_POOL_FORWARD = (
    f"gate_pool_forward(Tensor x, Tensor? channel_gate, {_POOL_OPTIONS}, bool keep, str backend) -> "
    "(Tensor per_channel, Tensor per_position, Tensor channel_index, Tensor channel_stats, "
    "Tensor position_index, Tensor position_stats)"
)
_POOL_BACKWARD = (
    "gate_pool_backward(Tensor? channels_grad, Tensor? positions_grad, Tensor x, Tensor? channel_gate, "
    "Tensor channel_index, Tensor channel_stats, Tensor position_index, Tensor position_stats, "
    f"{_POOL_OPTIONS}, bool[] needs, str backend) -> (Tensor x_grad, Tensor channel_gate_grad)"
)


def _pool_call(x, channel_gate, channels, positions, gate, normalise, keep=False) -> PoolCall:
    names = (tuple(filter(None, text.split(","))) for text in (channels, positions))
    return PoolCall(x, channel_gate, *names, gate, normalise, keep)


def allocate_pool_forward(call: PoolCall) -> tuple[Tensor, ...]:
    """Outputs of the forward operator; absent ones are empty.

    Poolings of channels and positions; of each the places of the maxima (int32) and, for entropies, the
    logarithm of the softmax's sum and the entropy in nats (float32, the first dimension).
    """
    x = call.x
    images, channels, *size = x.shape

    def dense(shape: Sequence[int], dtype: torch.dtype, wanted: bool) -> Tensor:
        return x.new_empty(shape, dtype=dtype) if wanted else library.absent(x, dtype)

    results, kept = [], []
    for names, shape in ((call.channel_poolings, [channels]), (call.position_poolings, size)):
        results.append(dense([images, len(names), *shape], x.dtype, bool(names)))
        kept.append(dense([images, *shape], torch.int32, call.keep and "max" in names))
        kept.append(dense([2, images, *shape], torch.float32, call.keep and "entropy" in names))
    return (*results, *kept)


def _named(name: str, backends: tuple[Backend, ...]) -> Backend:
    return next(backend for backend in backends if backend.name == name)


def _gradients(sources: Sequence[Tensor | None], needs: Sequence[bool], x: Tensor) -> tuple[Tensor, ...]:
    """Dense gradients of ``sources``; absent where not needed."""
    return tuple(
        library.empty(source.shape, source) if needed and source is not None else library.absent(x)
        for source, needed in zip(sources, needs, strict=True)
    )


def _pool_forward(*inputs):
    *arguments, backend = inputs
    call = _pool_call(*arguments)
    return _named(backend, POOL_BACKENDS).forward(call, *allocate_pool_forward(call))


def _pool_forward_fake(*inputs):
    return allocate_pool_forward(_pool_call(*inputs[:-1]))


def _pool_backward(channels_grad, positions_grad, x, channel_gate, *rest):
    *saved, channels, positions, gate, normalise, needs, backend = rest
    call = _pool_call(x, channel_gate, channels, positions, gate, normalise)
    gradients = _gradients((x, channel_gate), needs, x)
    run = _named(backend, POOL_BACKENDS).backward
    return run(call, channels_grad, positions_grad, saved, list(needs), *gradients)


def _pool_backward_fake(channels_grad, positions_grad, x, channel_gate, *rest):
    return _gradients((x, channel_gate), rest[-2], x)


def _pool_setup(ctx, inputs, output) -> None:
    x, channel_gate, *ctx.options, _, ctx.backend = inputs
    _, _, *kept = output
    ctx.save_for_backward(x, channel_gate, *kept)
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)


def _pool_autograd(ctx, channels_grad, positions_grad, *_):
    rest = (None,) * 6
    x, channel_gate, *kept = ctx.saved_tensors
    call = _pool_call(x, channel_gate, *ctx.options)
    # A graph that is traced may bring gradients of outputs that are absent.
    channels_grad = channels_grad if call.channel_poolings else None
    positions_grad = positions_grad if call.position_poolings else None
    if channels_grad is None and positions_grad is None:
        return (None, None, *rest)
    if call.is_mean:
        # The same gradient everywhere, which needs no map in memory.
        positions = x.shape[2] * x.shape[3]
        return ((channels_grad[:, 0] / positions)[:, :, None, None].expand(x.shape), None, *rest)
    needs = [bool(needed) for needed in ctx.needs_input_grad[:2]]
    gradients = _POOL.run_backward(
        channels_grad, positions_grad, x, channel_gate, *kept, *ctx.options, needs, ctx.backend
    )
    return (*gradients, *rest)


def _no_flops(*_, **__) -> int:
    """PyTorch counts matrix products and convolutions, of which there are none."""
    return 0


def pool_least_bytes(call: PoolCall, direction: str) -> int:
    """Bytes that poolings have to move through memory; what there is one of per channel is left out.

    Forward: the map is read, and poolings of positions are written with what is kept for backward. Backward,
    with all gradients: those of poolings of positions and what was kept of them are read, the map's gradient
    is written, and the map is read for entropies and for the channel gate. A mean of channels alone has a
    gradient that is not in memory.
    """
    check_direction(direction)
    size = call.x.element_size()
    x = size * call.x.numel()
    positions = call.x.numel() // call.x.shape[1]
    of_positions = size * len(call.position_poolings)
    if call.keep:
        of_positions += 4 * ("max" in call.position_poolings) + 8 * ("entropy" in call.position_poolings)
    if direction == "forward":
        return x + of_positions * positions
    if call.is_mean:
        return 0
    gate_grad = call.channel_gate is not None and call.channel_gate.requires_grad
    return (1 + (call.entropies > 0 or gate_grad)) * x + of_positions * positions


POOL_BACKENDS = (
    Backend("triton", triton.can_run, triton.pool_forward, triton.pool_backward),
    Backend("reference", reference_can_run),
)
_ONCE = (
    'has no derivative of its own; for second derivatives run the gate inside fused_ops.backend("reference")'
)


_POOL = library.DifferentiableOperator(
    _POOL_FORWARD,
    _POOL_BACKWARD,
    forward=_pool_forward,
    forward_fake=_pool_forward_fake,
    forward_flops=_no_flops,
    backward=_pool_backward,
    backward_fake=_pool_backward_fake,
    backward_flops=_no_flops,
    setup_context=_pool_setup,
    autograd=_pool_autograd,
    once_differentiable=_ONCE,
)
for _name, _function, _cases in (
    ("pool_channels", pool_channels, channel_cases),
    ("pool_positions", pool_positions, position_cases),
    ("pool_map", pool_map, map_cases),
):
    library.register(
        library.Operator(
            _name,
            _function,
            POOL_BACKENDS,
            _cases,
            pool_least_bytes,
            _POOL.overloads,
            triton.pool_launch_count,
        )
    )


# Scaling


def gate_scale(
    x: Tensor,
    channel_gate: Tensor | None = None,
    position_gate: Tensor | None = None,
    *,
    channel_add: Tensor | None = None,
    residual: Tensor | None = None,
    gate: str = "sigmoid",
    combine: str = "product",
    activation: str = "none",
) -> Tensor:
    """``activation(x * g + channel_add + residual)`` in one pass over the maps, forward and backward.

    ``g`` is ``gate(channel_gate) * gate(position_gate)``, or with ``combine="sum"``
    ``gate(channel_gate + position_gate)``; a gate that is None is left out.

    Args:
        x: (B, C, H, W), channels_last or NCHW, slices too; float32, float16, bfloat16 or float64.
        channel_gate: logits (B, C); these and the next two in the dtype of ``x`` or float32.
        position_gate: logits (B, 1, H, W).
        channel_add: (B, C).
        residual: (B, C, H, W) in the dtype of ``x``; fastest in its layout.
        gate: sigmoid, hard_sigmoid (PyTorch's hardsigmoid) or none.
        combine: product or sum.
        activation: none, relu, relu6, silu, gelu (exact), gelu_tanh or hardswish.

    Returns:
        (B, C, H, W) in the dtype, under autocast too, and the memory format of ``x``.

    Raises:
        ValueError, TypeError: an argument is not allowed; the message names it, its value and what is.
        fused_ops.BackendUnavailableError: a backend was requested by name and cannot run this call.
    """
    _check_x(x)
    images, channels, height, width = x.shape
    channel_gate, position_gate, channel_add, residual = _suited(
        x, channel_gate, position_gate, channel_add, residual
    )
    check_parameter("channel_gate", channel_gate, (images, channels), "one logit per image and channel", x)
    check_parameter("position_gate", position_gate, (images, 1, height, width), "one logit per position", x)
    check_parameter("channel_add", channel_add, (images, channels), "one value per image and channel", x)
    if residual is not None:
        if residual.shape != x.shape:
            raise ValueError(
                f"residual has shape {tuple(residual.shape)}; it must be that of x, {tuple(x.shape)}"
            )
        check_alike("residual", residual, x)
    check_choice("gate", gate, GATES)
    check_choice("combine", combine, COMBINATIONS)
    check_activation(activation)
    if combine == "sum" and (channel_gate is None or position_gate is None):
        raise ValueError("combine='sum' needs both channel_gate and position_gate")
    call = ScaleCall(x, channel_gate, position_gate, channel_add, residual, gate, combine, activation)
    call.needs_grad = any_requires_grad(*call.tensors())
    backend = choose("gate_scale", SCALE_BACKENDS, call)
    options = (gate, combine, activation)
    if backend.forward is None:
        return reference.gate_scale(*call.tensors(), gate=gate, combine=combine, activation=activation)
    return _SCALE.run(call.needs_grad, *call.tensors(), *options, backend.name)


_SCALE_TENSORS = (
    "Tensor x, Tensor? channel_gate, Tensor? position_gate, Tensor? channel_add, Tensor? residual"
)
_SCALE_OPTIONS = "str gate, str combine, str activation"
_SCALE_FORWARD = f"gate_scale_forward({_SCALE_TENSORS}, {_SCALE_OPTIONS}, str backend) -> Tensor"
_SCALE_BACKWARD = (
    f"gate_scale_backward(Tensor grad, {_SCALE_TENSORS}, {_SCALE_OPTIONS}, bool[] needs, str backend) -> "
    "(Tensor x_grad, Tensor channel_gate_grad, Tensor position_gate_grad, Tensor channel_add_grad, "
    "Tensor residual_grad)"
)


def _scale_forward(*inputs):
    *arguments, backend = inputs
    call = ScaleCall(*arguments)
    return _named(backend, SCALE_BACKENDS).forward(call, library.empty(call.x.shape, call.x))


def _scale_forward_fake(x, *_):
    return library.empty(x.shape, x)


def _scale_backward(grad, *inputs):
    *arguments, needs, backend = inputs
    call = ScaleCall(*arguments)
    gradients = _gradients(call.tensors(), needs, call.x)
    return _named(backend, SCALE_BACKENDS).backward(call, grad, list(needs), *gradients)


def _scale_backward_fake(grad, *inputs):
    return _gradients(inputs[:5], inputs[-2], inputs[0])


def _scale_setup(ctx, inputs, output) -> None:
    x, channel_gate, position_gate, channel_add, residual, *ctx.options, ctx.backend = inputs
    if ctx.options[-1] == "none":
        # What is added then says nothing about any gradient.
        residual = None
    ctx.save_for_backward(x, channel_gate, position_gate, channel_add, residual)
    ctx.set_materialize_grads(False)


def _scale_autograd(ctx, grad):
    if grad is None:
        return (None,) * 9
    needs = [bool(needed) for needed in ctx.needs_input_grad[:5]]
    wanted = list(needs)
    gradients: list[Tensor | None] = [None] * 5
    if ctx.options[-1] == "none":
        wanted[4] = False
    if any(wanted):
        gradients = _SCALE.run_backward(grad, *ctx.saved_tensors, *ctx.options, wanted, ctx.backend)
    if needs[4] and not wanted[4]:
        gradients[4] = grad
    return (*gradients, *(None,) * 4)


def scale_least_bytes(call: ScaleCall, direction: str) -> int:
    """Bytes that a scaling has to move through memory; what there is one of per channel is left out.

    Forward: the map, the residual and the position gate are read, the result is written. Backward, with all
    gradients: the gradient and the map are read, the map's gradient and the position gate's are written; with
    an activation also the residual is read and its gradient written, which without one is the given gradient.
    """
    check_direction(direction)
    size = call.x.element_size()
    maps = 2 + (call.residual is not None)
    gate = call.position_gate
    position = 0 if gate is None else gate.element_size() * gate.numel()
    if direction == "forward":
        return maps * size * call.x.numel() + position
    activated = call.activation != "none"
    gated = call.channel_gate is not None or gate is not None
    maps = 2 + (gated or activated) + 2 * (activated and call.residual is not None)
    return maps * size * call.x.numel() + 2 * position


SCALE_BACKENDS = (
    Backend("triton", triton.can_run, triton.scale_forward, triton.scale_backward),
    Backend("reference", reference_can_run),
)


_SCALE = library.DifferentiableOperator(
    _SCALE_FORWARD,
    _SCALE_BACKWARD,
    forward=_scale_forward,
    forward_fake=_scale_forward_fake,
    forward_flops=_no_flops,
    backward=_scale_backward,
    backward_fake=_scale_backward_fake,
    backward_flops=_no_flops,
    setup_context=_scale_setup,
    autograd=_scale_autograd,
    once_differentiable=_ONCE,
)
library.register(
    library.Operator(
        "gate_scale",
        gate_scale,
        SCALE_BACKENDS,
        scale_cases,
        scale_least_bytes,
        _SCALE.overloads,
        triton.scale_launch_count,
    )
)


# The context


def context_pool(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Mean over the positions, weighted by a softmax of a 1x1 convolution to one channel, in one pass.

    The context of global context blocks (Cao et al., ICCV workshop 2019, arXiv 1904.11492, section 3.3).

    Args:
        x: (B, C, H, W), channels_last or NCHW, slices too; float32, float16, bfloat16 or float64.
        weight: (1, C, 1, 1), in the dtype of ``x`` or float32.
        bias: (1), which makes no difference to the softmax and gets a zero gradient, or None.

    Returns:
        (B, C) in the dtype of ``x``, under autocast too.

    Raises:
        ValueError, TypeError: an argument is not allowed; the message names it, its value and what is.
        fused_ops.BackendUnavailableError: a backend was requested by name and cannot run this call.
    """
    _check_x(x)
    weight, bias = _suited(x, weight, bias)
    check_parameter("weight", weight, (1, x.shape[1], 1, 1), "one filter from the channels of x", x)
    check_parameter("bias", bias, (1,), "one value", x)
    needs_grad = any_requires_grad(x, weight, bias)
    call = ContextCall(x, weight, bias, needs_grad, needs_grad)
    backend = choose("context_pool", CONTEXT_BACKENDS, call)
    if backend.forward is None:
        return reference.context_pool(x, weight, bias)
    return _CONTEXT.run(needs_grad, x, weight, bias, needs_grad, backend.name)[0]


_CONTEXT_FORWARD = (
    "context_pool_forward(Tensor x, Tensor weight, Tensor? bias, bool keep, str backend) -> "
    "(Tensor out, Tensor context, Tensor log)"
)
_CONTEXT_BACKWARD = (
    "context_pool_backward(Tensor grad, Tensor x, Tensor weight, Tensor context, Tensor log, bool[] needs, "
    "str backend) -> (Tensor x_grad, Tensor weight_grad)"
)


def allocate_context_forward(call: ContextCall) -> tuple[Tensor, ...]:
    """The context, and for backward the same in float32 and the logarithm of the softmax's sum (B)."""
    x = call.x
    kept = x.shape[:2] if call.keep else (0,), x.shape[:1] if call.keep else (0,)
    return x.new_empty(x.shape[:2]), *(x.new_empty(shape, dtype=torch.float32) for shape in kept)


def _context_forward(*inputs):
    *arguments, backend = inputs
    call = ContextCall(*arguments)
    return _named(backend, CONTEXT_BACKENDS).forward(call, *allocate_context_forward(call))


def _context_forward_fake(*inputs):
    return allocate_context_forward(ContextCall(*inputs[:-1]))


def _context_backward(grad, x, weight, context, log, needs, backend):
    gradients = _gradients((x, weight), needs, x)
    call = ContextCall(x, weight, None)
    return _named(backend, CONTEXT_BACKENDS).backward(call, grad, context, log, list(needs), *gradients)


def _context_backward_fake(grad, x, weight, context, log, needs, backend):
    return _gradients((x, weight), needs, x)


def _context_setup(ctx, inputs, output) -> None:
    x, weight, bias, _, ctx.backend = inputs
    _, *kept = output
    ctx.save_for_backward(x, weight, bias, *kept)
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)


def _context_autograd(ctx, grad, *_):
    if grad is None:
        return (None,) * 5
    x, weight, bias, *kept = ctx.saved_tensors
    needs = [bool(needed) for needed in ctx.needs_input_grad[:2]]
    gradients = (None, None)
    if any(needs):
        gradients = _CONTEXT.run_backward(grad, x, weight, *kept, needs, ctx.backend)
    return (*gradients, torch.zeros_like(bias) if ctx.needs_input_grad[2] else None, None, None)


def _context_forward_flops(x_shape, *_, out_shape=None, **__) -> int:
    batch, channels, height, width = x_shape
    return 2 * 2 * batch * channels * height * width


def _context_backward_flops(grad_shape, x_shape, *arguments, out_shape=None, **__) -> int:
    of_x, of_weight = arguments[-2]
    # The convolution's gradients where needed; of the weighted mean, that of its weights always.
    return (1 + 2 * bool(of_x) + bool(of_weight)) * (_context_forward_flops(x_shape) // 2)


def context_least_bytes(call: ContextCall, direction: str) -> int:
    """The map is read; backward its gradient is written too. What there is one of per channel is left out."""
    check_direction(direction)
    x = call.x.element_size() * call.x.numel()
    return x if direction == "forward" else 2 * x


CONTEXT_BACKENDS = (
    Backend("triton", triton.can_run, triton.context_forward, triton.context_backward),
    Backend("reference", reference_can_run),
)


_CONTEXT = library.DifferentiableOperator(
    _CONTEXT_FORWARD,
    _CONTEXT_BACKWARD,
    forward=_context_forward,
    forward_fake=_context_forward_fake,
    forward_flops=_context_forward_flops,
    backward=_context_backward,
    backward_fake=_context_backward_fake,
    backward_flops=_context_backward_flops,
    setup_context=_context_setup,
    autograd=_context_autograd,
    once_differentiable=_ONCE,
)
library.register(
    library.Operator(
        "context_pool",
        context_pool,
        CONTEXT_BACKENDS,
        context_cases,
        context_least_bytes,
        _CONTEXT.overloads,
        triton.context_launch_count,
    )
)


# Aggregation


def attentive_fusion(x: Tensor, y: Tensor, position_gate: Tensor, channel_gate: Tensor) -> Tensor:
    """``s (1 - c) x + (1 - s) c y`` with s and c the sigmoids of two gates, in one pass each way.

    The binary fusion of attentive feature aggregation (Yang et al., WACV 2023, arXiv 2111.00770, section 3):
    where to look comes from the shallower map, what to look for from the deeper one.

    Args:
        x: shallower map (B, C, H, W), channels_last or NCHW, slices too; float32, float16, bfloat16 or
            float64.
        y: deeper map of that size, in the dtype of ``x``; fastest in its layout.
        position_gate: logits of s, (B, 1, H, W), in the dtype of ``x`` or float32.
        channel_gate: logits of c, (B, C), the same.

    Returns:
        (B, C, H, W) in the dtype, under autocast too, and the memory format of ``x``.

    Raises:
        ValueError, TypeError: an argument is not allowed; the message names it, its value and what is.
        fused_ops.BackendUnavailableError: a backend was requested by name and cannot run this call.
    """
    # Where it is clear that one looks, x is in front; what one looks for is in y, before x.
    return _aggregate(
        "attentive_fusion",
        {"x": x, "y": y},
        {"position_gate": position_gate},
        {"channel_gate": channel_gate},
        "sigmoid",
        reverse_channels=True,
    )


def multi_level_fusion(
    maps: Sequence[Tensor], position_gates: Sequence[Tensor], channel_gates: Sequence[Tensor]
) -> Tensor:
    """Sum of up to five maps, coarsest first, each seen through the finer ones, in one pass each way.

    The multi-level fusion of attentive feature aggregation (Yang et al., WACV 2023, arXiv 2111.00770,
    section 3): ``sum_k w_k v_k maps[k]`` with ``w_k = s_k prod_{j>k} (1 - s_j)``, ``v_k`` the same of c, and
    s and c the sigmoids of the gates.

    Args:
        maps: (B, C, H, W) each, all of one size and dtype, channels_last or NCHW, slices too; float32,
            float16, bfloat16 or float64; fastest in one layout.
        position_gates: logits of s, (B, 1, H, W) for each map, in the dtype of the maps or float32.
        channel_gates: logits of c, (B, C) for each map, the same.

    Returns:
        (B, C, H, W) in the dtype, under autocast too, and the memory format of the last map, the finest.

    Raises:
        ValueError, TypeError, fused_ops.BackendUnavailableError: as :func:`attentive_fusion`.
    """
    named = (
        _one_each("maps", maps, maps),
        _one_each("position_gates", position_gates, maps),
        _one_each("channel_gates", channel_gates, maps),
    )
    # Layers are counted from the front, which is the finest map.
    return _aggregate("multi_level_fusion", *(dict(list(given.items())[::-1]) for given in named), "sigmoid")


def render_scales(predictions: Sequence[Tensor], densities: Sequence[Tensor]) -> Tensor:
    """Sum of predictions at up to five scales by volume rendering along the scales, in one pass each way.

    Scale-space rendering (Yang et al., WACV 2023, arXiv 2111.00770, section 3):
    ``sum_r (1 - exp(-phi_r)) prod_{q<r} exp(-phi_q) predictions[r]`` with ``phi = |density|``. The weights
    sum to ``1 - exp(-sum of phi)``.

    Args:
        predictions: (B, C, H, W) each, the smallest scale first, all of one size and dtype, channels_last or
            NCHW, slices too; float32, float16, bfloat16 or float64; fastest in one layout.
        densities: (B, 1, H, W) for each prediction, in its dtype or float32. Their sign is dropped; at zero
            they have a gradient of zero, as PyTorch's ``abs``.

    Returns:
        (B, C, H, W) in the dtype, under autocast too, and the memory format of the first prediction.

    Raises:
        ValueError, TypeError, fused_ops.BackendUnavailableError: as :func:`attentive_fusion`.
    """
    named = _one_each("predictions", predictions, predictions), _one_each("densities", densities, predictions)
    return _aggregate("render_scales", *named, None, "density")


def weighted_sum(maps: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """``sum_k weights[k] maps[k]`` of up to five maps with a weight per position, in one pass each way.

    Args:
        maps: as of :func:`multi_level_fusion`.
        weights: (B, 1, H, W) for each map, in the dtype of the maps or float32.

    Returns:
        (B, C, H, W) in the dtype, under autocast too, and the memory format of the first map.

    Raises:
        ValueError, TypeError, fused_ops.BackendUnavailableError: as :func:`attentive_fusion`.
    """
    named = _one_each("maps", maps, maps), _one_each("weights", weights, maps)
    return _aggregate("weighted_sum", *named, None, "none")


def _one_each(name: str, given: Sequence[Tensor], maps: Sequence[Tensor]) -> dict[str, Tensor]:
    """The tensors of an argument by the names that messages have for them."""
    if not isinstance(given, (tuple, list)):
        raise TypeError(f"{name} is a {type(given).__name__}; it must be a list or tuple of tensors")
    if not 1 <= len(given) <= MOST_MAPS:
        raise ValueError(f"{name} has {len(given)} tensors; it must have 1 to {MOST_MAPS}")
    if len(given) != len(maps):
        raise ValueError(f"{name} has {len(given)} tensors; it must have {len(maps)}, one for each map")
    return {f"{name}[{k}]": tensor for k, tensor in enumerate(given)}


def _aggregate(
    operator: str,
    maps: dict[str, Tensor],
    positions: dict[str, Tensor],
    channels: dict[str, Tensor] | None,
    opacity: str,
    reverse_channels: bool = False,
) -> Tensor:
    """Checks, and the choice of a backend. Maps and gates by name, the front layer of the positions first."""
    (first, x), *_ = maps.items()
    _check_x(x, first)
    for name, one in maps.items():
        if one.shape != x.shape:
            raise ValueError(
                f"{name} has shape {tuple(one.shape)}; it must be that of {first}, {tuple(x.shape)}"
            )
    images, count, height, width = x.shape
    maps, positions, channels = (
        dict(zip(named, _suited(x, *named.values()), strict=True))
        for named in (maps, positions, channels or {})
    )
    for name, one in maps.items():
        check_alike(name, one, x, first)
    for gates, shape, what in (
        (positions, (images, 1, height, width), "one value per position"),
        (channels, (images, count), "one logit per image and channel"),
    ):
        for name, gate in gates.items():
            if tuple(gate.shape) != shape:
                raise ValueError(f"{name} has shape {tuple(gate.shape)}; it must be {shape}, {what}")
            check_companion(name, gate, x, first)
    gates = [gate[:, :, None] for gate in channels.values()]
    channel_gates = torch.cat(gates, 2) if len(gates) > 1 else None
    slots = (
        *maps.values(),
        *(None,) * (MOST_MAPS - len(maps)),
        *positions.values(),
        *(None,) * (MOST_MAPS - len(positions)),
        gates[0] if len(gates) == 1 else channel_gates,
    )
    call = AggregateCall(x, slots, opacity, reverse_channels, any_requires_grad(*slots))
    backend = choose(operator, AGGREGATE_BACKENDS, call)
    if backend.forward is None:
        return reference.aggregate(
            tuple(maps.values()), tuple(positions.values()), slots[-1], opacity, reverse_channels
        )
    return _AGGREGATE.run(call.needs_grad, *slots, opacity, reverse_channels, backend.name)


_AGGREGATE_NAMES = (
    *(f"map_{k}" for k in range(MOST_MAPS)),
    *(f"position_gate_{k}" for k in range(MOST_MAPS)),
    "channel_gates",
)
_AGGREGATE_TENSORS = ", ".join(f"Tensor{'' if name == 'map_0' else '?'} {name}" for name in _AGGREGATE_NAMES)
_AGGREGATE_FORWARD = (
    f"map_aggregate_forward({_AGGREGATE_TENSORS}, str opacity, bool reverse_channels, str backend) -> Tensor"
)
_AGGREGATE_BACKWARD = (
    f"map_aggregate_backward(Tensor grad, {_AGGREGATE_TENSORS}, str opacity, bool reverse_channels, "
    f"bool[] needs, str backend) -> ({', '.join(f'Tensor {name}_grad' for name in _AGGREGATE_NAMES)})"
)


def _aggregate_call(*arguments) -> AggregateCall:
    *slots, opacity, reverse_channels = arguments
    return AggregateCall(slots[0], tuple(slots), opacity, reverse_channels)


def _aggregate_forward(*inputs):
    call = _aggregate_call(*inputs[:-1])
    return _named(inputs[-1], AGGREGATE_BACKENDS).forward(call, library.empty(call.x.shape, call.x))


def _aggregate_forward_fake(x, *_):
    return library.empty(x.shape, x)


def _aggregate_backward(grad, *inputs):
    *arguments, needs, backend = inputs
    call = _aggregate_call(*arguments)
    gradients = _gradients(call.slots, needs, call.x)
    return _named(backend, AGGREGATE_BACKENDS).backward(call, grad, list(needs), *gradients)


def _aggregate_backward_fake(grad, *inputs):
    return _gradients(inputs[: len(_AGGREGATE_NAMES)], inputs[-2], inputs[0])


def _aggregate_setup(ctx, inputs, output) -> None:
    *slots, opacity, reverse_channels, ctx.backend = inputs
    ctx.options = (opacity, reverse_channels)
    ctx.save_for_backward(*slots)
    ctx.set_materialize_grads(False)


def _aggregate_autograd(ctx, grad):
    rest = (None,) * 3
    needs = [bool(needed) for needed in ctx.needs_input_grad[: len(_AGGREGATE_NAMES)]]
    if grad is None or not any(needs):
        return (*(None,) * len(needs), *rest)
    gradients = _AGGREGATE.run_backward(grad, *ctx.saved_tensors, *ctx.options, needs, ctx.backend)
    return (*gradients, *rest)


def aggregate_least_bytes(call: AggregateCall, direction: str) -> int:
    """Bytes that an aggregation has to move through memory; what there is one of per channel is left out.

    Forward: maps and gates of positions are read, the result is written. Backward, with all gradients: the
    gradient, the maps and the gates of positions are read, and a gradient is written for each of the latter.
    """
    check_direction(direction)
    x = call.x.element_size() * call.x.numel()
    gates = (gate for gate in call.slots[MOST_MAPS:-1] if gate is not None)
    positions = sum(gate.element_size() * gate.numel() for gate in gates)
    if direction == "forward":
        return (call.count + 1) * x + positions
    return (2 * call.count + 1) * x + 2 * positions


AGGREGATE_BACKENDS = (
    Backend("triton", triton.can_run, triton.aggregate_forward, triton.aggregate_backward),
    Backend("reference", reference_can_run),
)


_AGGREGATE = library.DifferentiableOperator(
    _AGGREGATE_FORWARD,
    _AGGREGATE_BACKWARD,
    forward=_aggregate_forward,
    forward_fake=_aggregate_forward_fake,
    forward_flops=_no_flops,
    backward=_aggregate_backward,
    backward_fake=_aggregate_backward_fake,
    backward_flops=_no_flops,
    setup_context=_aggregate_setup,
    autograd=_aggregate_autograd,
    once_differentiable=_ONCE,
)
for _name, _function, _cases in (
    ("attentive_fusion", attentive_fusion, fusion_cases),
    ("multi_level_fusion", multi_level_fusion, multi_level_cases),
    ("render_scales", render_scales, render_cases),
    ("weighted_sum", weighted_sum, weighted_cases),
):
    library.register(
        library.Operator(
            _name,
            _function,
            AGGREGATE_BACKENDS,
            _cases,
            aggregate_least_bytes,
            _AGGREGATE.overloads,
            triton.aggregate_launch_count,
        )
    )
