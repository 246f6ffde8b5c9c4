"""What the contract tests share: running a case on a backend, and the three-way error rule."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_ops
from fused_ops.core import environment, library, native
from fused_ops.core.cases import Case

CPU = torch.device("cpu")
# Devices on which kernels can be tested: the interpreter and the emulator run them on CPU tensors.
DEVICES = (
    pytest.param("cpu", id="cpu"),
    pytest.param("cuda", id="gpu", marks=pytest.mark.gpu),
)


def operator_cases(*tags: str, without: tuple[str, ...] = ()) -> list[Any]:
    """(operator, case) of every registered operator whose case carries all ``tags``."""
    return [
        pytest.param(operator, case, id=f"{operator.name}-{case.name}")
        for operator in library.operators().values()
        for case in operator.cases()
        if case.tags.issuperset(tags) and not case.tags.intersection(without)
    ]


def make(
    case: Case, dtype: torch.dtype, layout: str = "channels_last", device: str | torch.device = "cpu"
) -> dict[str, Any]:
    """The case's arguments, the same at every call."""
    return case.make(torch.Generator().manual_seed(17), dtype, torch.device(device), layout)


def named_tensors(arguments: dict[str, Any]) -> dict[str, Tensor]:
    """Tensors of an operator's arguments by name; those inside a named tuple as ``argument.field``."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in arguments.items():
        fields = value._asdict() if hasattr(value, "_asdict") else {None: value}
        for field, entry in fields.items():
            if isinstance(entry, Tensor) and id(entry) not in seen:
                seen.add(id(entry))
                found[name if field is None else f"{name}.{field}"] = entry
    return found


def convert(arguments: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The same arguments with every floating tensor in ``dtype``; one tensor given twice stays one."""
    converted: dict[int, Tensor] = {}

    def visit(value: Any) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in converted:
                new = value.detach().to(dtype, copy=True)
                converted[id(value)] = new.requires_grad_(value.requires_grad)
            return converted[id(value)]
        if hasattr(value, "_replace"):
            return type(value)(*(visit(entry) for entry in value))
        return value

    return {name: visit(value) for name, value in arguments.items()}


def cotangent(out: Tensor) -> Tensor:
    """Random gradient for ``out``, in its layout, the same values at every call."""
    values = torch.randn(out.shape, generator=torch.Generator().manual_seed(23), dtype=torch.float64)
    return torch.empty_like(out).copy_(values)


def run(
    operator: library.Operator,
    arguments: dict[str, Any],
    backend: str,
    *,
    gradients: bool = True,
    grad: Tensor | None = None,
) -> dict[str, Tensor]:
    """Output, gradients and updated running statistics of one call on ``backend``."""
    tensors = named_tensors(arguments)
    leaves = {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}
    with fused_ops.backend(backend), contextlib.nullcontext() if gradients else torch.no_grad():
        out = operator.function(**arguments)
    results = {"out": out.detach()}
    if gradients and leaves:
        incoming = cotangent(out) if grad is None else grad
        found = torch.autograd.grad(out, list(leaves.values()), incoming, allow_unused=True)
        results |= {f"grad {name}": value for name, value in zip(leaves, found, strict=True)}
    results |= {name: tensor.detach() for name, tensor in tensors.items() if "running" in name}
    return results


def assert_three_way(
    result: dict[str, Tensor], eager: dict[str, Tensor], exact: dict[str, Tensor], dtype: torch.dtype
) -> None:
    """Contract C1: error against float64 at most twice eager's at the same precision, plus a floor.

    The floor is two roundings of the tensor's dtype at the tensor's largest value. A gradient that is
    zero by algebra (a bias under batch statistics) has no scale of its own, so the largest gradient of a
    parameter gives it.
    """
    scale = max(
        (
            value.abs().max().item()
            for name, value in exact.items()
            if name.startswith("grad ") and value.numel()
        ),
        default=0.0,
    )
    for name, value in result.items():
        want = exact[name]
        assert value is not None, f"{name}: no value"
        assert value.shape == want.shape, f"{name}: shape {tuple(value.shape)}, not {tuple(want.shape)}"
        if value.numel() == 0:
            continue
        error = (value.double() - want).abs().max().item()
        eager_error = (eager[name].double() - want).abs().max().item()
        largest = want.abs().max().item()
        if name.startswith("grad ") and name.endswith("bias"):
            largest = max(largest, scale)
        allowed = 2 * eager_error + 2 * torch.finfo(value.dtype).eps * largest
        if "running" in name:
            # Eager's CPU statistics are summed in float64; float32 ones may lose a few roundings more.
            allowed += 16 * torch.finfo(value.dtype).eps * largest
        if value.dtype != dtype:
            # A float32 result of half-precision maps: half of one rounding of what went into it.
            allowed += 0.25 * torch.finfo(dtype).eps * largest
        assert error <= allowed, f"{name}: error {error:.3e} above {allowed:.3e} (eager {eager_error:.3e})"


def kernel_backends(operator: library.Operator) -> list[str]:
    return [backend.name for backend in operator.backends if backend.name != "reference"]


def require(backend: str, device: str, request: pytest.FixtureRequest | None = None) -> None:
    """Skip where ``backend`` can run nothing on ``device`` in this process, with the reason.

    ``request`` lets the CUDA kernels run on CPU tensors, in the emulator, until the test ends.
    """
    if device == "cpu":
        if backend == "triton" and not environment.interpreting():
            pytest.skip("Triton compiles for the GPU in this run; its interpreter is off")
        if backend == "cuda":
            if request is None:
                pytest.skip("the CUDA backend is not asked for here without a GPU")
            request.getfixturevalue("emulator")
    elif backend == "cuda" and not native.status()[0]:
        pytest.skip(native.status()[1])
