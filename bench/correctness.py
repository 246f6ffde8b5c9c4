"""Arguments of a case as the bench needs them, and whether what a provider returns is right.

No speed-up is stated for a provider whose result is wrong, so the check runs in the same process as the
timing, on the same shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

# Arguments that a module holds; everything else is data that moves with the batch.
_PARAMETERS = ("weight", "bias", "running", "gamma", "scale", "table")


def is_parameter(name: str) -> bool:
    """Whether the argument ``name`` (or ``argument.field``) is held by a module and not data."""
    return any(part in name.rpartition(".")[2] for part in _PARAMETERS)


def named_tensors(arguments: dict[str, Any]) -> dict[str, Tensor]:
    """Tensors of an operator's arguments by name, each once.

    Those of a named tuple are ``argument.field``, of another tuple or a list ``argument.index``.
    """
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in arguments.items():
        fields = {"": value}
        if hasattr(value, "_asdict"):
            fields = value._asdict()
        elif isinstance(value, (tuple, list)):
            fields = {str(index): entry for index, entry in enumerate(value)}
        for field, entry in fields.items():
            if isinstance(entry, Tensor) and id(entry) not in seen:
                seen.add(id(entry))
                found[f"{name}.{field}" if field else name] = entry
    return found


def copy_arguments(
    arguments: dict[str, Any],
    *,
    dtype: torch.dtype | None = None,
    layout: str | None = None,
    batch: int | None = None,
    evaluation: bool = False,
) -> dict[str, Any]:
    """The same arguments in memory of their own; a tensor given twice stays one tensor.

    Args:
        dtype: of every floating tensor, or None for each its own.
        layout: ``nchw`` or ``channels_last`` for maps, or None for as they are.
        batch: keep only the first images of data.
        evaluation: BatchNorm uses its running statistics.
    """
    copies: dict[int, Tensor] = {}

    def visit(name: str, value: Any) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in copies:
                copies[id(value)] = one(name, value)
            return copies[id(value)]
        if hasattr(value, "_asdict"):
            fields = {field: visit(f"{name}.{field}", entry) for field, entry in value._asdict().items()}
            if evaluation and "batch_stats" in fields:
                fields["batch_stats"] = False
            return type(value)(**fields)
        if isinstance(value, (tuple, list)):
            return type(value)(visit(f"{name}.{index}", entry) for index, entry in enumerate(value))
        return value

    def one(name: str, value: Tensor) -> Tensor:
        data = not is_parameter(name)
        new = value.detach()
        if batch is not None and data:
            new = new[:batch]
        memory_format = torch.preserve_format
        if layout is not None and data and new.dim() == 4:
            memory_format = torch.contiguous_format if layout == "nchw" else torch.channels_last
        target = dtype if dtype is not None and new.is_floating_point() else new.dtype
        new = new.to(target, copy=True, memory_format=memory_format)
        return new.requires_grad_(value.requires_grad)

    return {name: visit(name, value) for name, value in arguments.items()}


def data_bytes(arguments: dict[str, Any]) -> int:
    """Bytes of the arguments that are data."""
    return sum(
        tensor.numel() * tensor.element_size()
        for name, tensor in named_tensors(arguments).items()
        if not is_parameter(name)
    )


def leaves(arguments: dict[str, Any]) -> dict[str, Tensor]:
    """Arguments that get a gradient, by name."""
    return {name: tensor for name, tensor in named_tensors(arguments).items() if tensor.requires_grad}


def outputs(out: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What an operator returned, as a tuple."""
    return out if isinstance(out, tuple) else (out,)


def named_outputs(out: Tensor | tuple[Tensor, ...]) -> dict[str, Tensor]:
    """The output as ``out``, or several as ``out 0`` and so on."""
    if isinstance(out, tuple):
        return {f"out {number}": value for number, value in enumerate(out)}
    return {"out": out}


def cotangents(results: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """:func:`cotangent` of every output among the results of :func:`outcome`."""
    return tuple(cotangent(value) for name, value in results.items() if name.split(" ")[0] == "out")


def gradients_of(
    out: Tensor | tuple[Tensor, ...], wanted: Sequence[Tensor], grads: Sequence[Tensor], **options: Any
) -> tuple[Tensor | None, ...]:
    """Gradients of ``wanted`` from those of the outputs; an output that has none of them plays no part."""
    pairs = [(one, grad) for one, grad in zip(outputs(out), grads, strict=True) if one.requires_grad]
    ends, incoming = zip(*pairs, strict=True)
    return torch.autograd.grad(ends, wanted, incoming, allow_unused=True, **options)


def cotangent(out: Tensor) -> Tensor:
    """Random gradient for ``out``, in its layout, the same values for every provider."""
    generator = torch.Generator(out.device).manual_seed(23)
    values = torch.randn(out.shape, generator=generator, device=out.device)
    return torch.empty_like(out).copy_(values)


def outcome(function: Callable[..., Any], arguments: dict[str, Any], gradients: bool) -> dict[str, Tensor]:
    """Outputs, gradients and updated running statistics of one call.

    ``arguments`` are used up: running statistics are updated in place.
    """
    wanted = leaves(arguments) if gradients else {}
    with torch.set_grad_enabled(bool(wanted)):
        out = function(**arguments)
    results = {name: value.detach() for name, value in named_outputs(out).items()}
    if wanted:
        found = gradients_of(out, list(wanted.values()), cotangents(results))
        results |= {f"grad {name}": value for name, value in zip(wanted, found, strict=True)}
    running = {name: value for name, value in named_tensors(arguments).items() if "running" in name}
    return results | {name: value.detach() for name, value in running.items()}


def _wrong(
    result: dict[str, Tensor], eager: dict[str, Tensor], exact: dict[str, Tensor], dtype: torch.dtype
) -> Iterator[str]:
    exact = {name: want for name, want in exact.items() if want is not None}
    gradients = (value for name, value in exact.items() if name.startswith("grad ") and value.numel())
    # The gradient of a bias under batch statistics is zero by algebra and has no scale of its own; so is that
    # of a filter on a map of one pixel.
    scale = max((value.abs().max().item() for value in gradients), default=0.0)
    for name, want in exact.items():
        value = result.get(name)
        if value is None or value.shape != want.shape:
            yield f"{name}: {'no value' if value is None else f'shape {tuple(value.shape)}'}"
            continue
        if value.numel() == 0:
            continue
        error = (value.double() - want).abs().max().item()
        eager_error = (eager[name].double() - want).abs().max().item()
        largest = want.abs().max().item()
        is_sum = name.startswith("grad ") and value.dtype == torch.float32
        if is_sum or (name.startswith("grad ") and name.endswith("bias")):
            largest = max(largest, scale)
        roundings = 8 if is_sum else 2
        allowed = 2 * eager_error + roundings * torch.finfo(value.dtype).eps * largest
        if "running" in name:
            allowed += 16 * torch.finfo(value.dtype).eps * largest
        if value.dtype != dtype:
            summed = scale if name.startswith("grad ") else 0.25 * largest
            allowed += torch.finfo(dtype).eps * summed
        # Written so that not-a-number fails.
        if not error <= allowed:
            yield f"{name}: error {error:.2e} above {allowed:.2e}"


def three_way(
    result: dict[str, Tensor], eager: dict[str, Tensor], exact: dict[str, Tensor], dtype: torch.dtype
) -> str:
    """What is wrong with ``result``, or nothing.

    The greatest error against float64 is at most twice eager's in the same ``dtype`` (the rule of
    flash-attention's tests), plus two roundings at the tensor's largest value. Float32 gradients, sums over
    the map that may cancel, may lose eight at the largest gradient's value, and running statistics a few more
    than two, since eager sums in float64 on the CPU. A float32 gradient of half-precision data is a sum of
    rounded terms, so it has one rounding of the data at the largest gradient's value.
    """
    return "; ".join(_wrong(result, eager, exact, dtype))
