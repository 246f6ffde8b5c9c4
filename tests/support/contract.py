"""What the contract tests share: running a case on a backend, and the three-way error rule."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fused_ops
from fused_ops.bench.correctness import (
    copy_arguments,
    cotangent,  # noqa: F401 (tests take it from here)
    cotangents,
    gradients_of,
    named_outputs,
    named_tensors,
    three_way,
)
from fused_ops.core import environment, library, native
from fused_ops.core.cases import Case

CPU = torch.device("cpu")
# By PyTorch's own functions, for oracles that use nothing of the package.
ACTIVATIONS = {
    "none": lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "hardswish": F.hardswish,
}
# Devices on which kernels can be tested: the interpreter and the emulator run them on CPU tensors.
DEVICES = (
    pytest.param("cpu", id="cpu"),
    pytest.param("cuda", id="gpu", marks=pytest.mark.gpu),
)


def operator_cases(*tags: str, without: tuple[str, ...] = (), only: str | None = None) -> list[Any]:
    """(operator, case) of every registered operator, or ``only`` one, whose case carries all ``tags``."""
    return [
        pytest.param(operator, case, id=f"{operator.name}-{case.name}")
        for operator in library.operators().values()
        for case in operator.cases()
        if only in (None, operator.name)
        if case.tags.issuperset(tags) and not case.tags.intersection(without)
    ]


def case_named(name: str, operator: str = "depthwise") -> Case:
    return next(case for case in library.operators()[operator].cases() if case.name == name)


class RecordCalls(TorchDispatchMode):
    """Collects the calls of some torch operators as (operator, arguments)."""

    def __init__(self, overloads: tuple[Any, ...]) -> None:
        super().__init__()
        self.overloads = overloads
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in self.overloads:
            self.calls.append((function, args))
        return function(*args, **(kwargs or {}))


def make(
    case: Case, dtype: torch.dtype, layout: str = "channels_last", device: str | torch.device = "cpu"
) -> dict[str, Any]:
    """The case's arguments, the same at every call."""
    return case.make(torch.Generator().manual_seed(17), dtype, torch.device(device), layout)


def convert(arguments: dict[str, Any], dtype: torch.dtype | None = None) -> dict[str, Any]:
    """A deep copy of the arguments with every floating tensor in ``dtype``, or each in its own."""
    return copy_arguments(arguments, dtype=dtype)


def run(
    operator: library.Operator,
    arguments: dict[str, Any],
    backend: str,
    *,
    gradients: bool = True,
    grad: Tensor | None = None,
) -> dict[str, Tensor]:
    """Outputs, gradients and updated running statistics of one call on ``backend``."""
    tensors = named_tensors(arguments)
    leaves = {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}
    with fused_ops.backend(backend), contextlib.nullcontext() if gradients else torch.no_grad():
        out = operator.function(**arguments)
    results = {name: value.detach() for name, value in named_outputs(out).items()}
    if gradients and leaves:
        incoming = cotangents(results) if grad is None else (grad,)
        found = gradients_of(out, list(leaves.values()), incoming)
        results |= {f"grad {name}": value for name, value in zip(leaves, found, strict=True)}
    results |= {name: tensor.detach() for name, tensor in tensors.items() if "running" in name}
    return results


def assert_three_way(
    result: dict[str, Tensor], eager: dict[str, Tensor], exact: dict[str, Tensor], dtype: torch.dtype
) -> None:
    """Contract C1, the rule that the bench applies too: see :func:`fused_ops.bench.correctness.three_way`."""
    problem = three_way(result, eager, exact, dtype)
    assert not problem, problem


def kernel_backends(operator: library.Operator) -> list[str]:
    return [backend.name for backend in operator.backends if backend.forward is not None]


def require(backend: str, device: str, request: pytest.FixtureRequest | None = None) -> None:
    """Skip where ``backend`` can run nothing on ``device`` in this process, with the reason.

    ``request`` lets the CUDA kernels run on CPU tensors, in the emulator, until the test ends.
    """
    if device == "cpu":
        if backend == "triton" and not environment.interpreting():
            pytest.skip("Triton compiles for the GPU in this run; its interpreter is off")
        if backend == "cuda":
            request.getfixturevalue("emulator")
    elif backend == "cuda" and not native.status()[0]:
        pytest.skip(native.status()[1])


def check_operators(operator: library.Operator, arguments: dict[str, Any]) -> None:
    """G3: schema and fake of the torch operators that a call on Triton and its backward go through."""
    with RecordCalls(operator.overloads) as recorded, fused_ops.backend("triton"):
        out = operator.function(**arguments)
        leaves = [tensor for tensor in named_tensors(arguments).values() if tensor.requires_grad]
        torch.autograd.grad(out.sum(), leaves)
    assert [function for function, _ in recorded.calls] == list(operator.overloads)
    for function, args in recorded.calls:
        detached = tuple(arg.detach() if isinstance(arg, Tensor) else arg for arg in args)
        torch.library.opcheck(function, detached, test_utils=("test_schema", "test_faketensor"))
