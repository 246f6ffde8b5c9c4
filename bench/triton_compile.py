"""Compiles Triton kernels for any architecture without a GPU, with the arguments that launchers use."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fused_ops.bench.correctness import outputs
from fused_ops.core import backends, environment, library

_POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
    torch.uint8: "*u8",
}


@dataclass(frozen=True)
class Specialisation:
    """A kernel with the types and compile-time values of one launch. Equal launches compare equal."""

    kernel: Any
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[str, ...]
    options: tuple[tuple[str, Any], ...]

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    @property
    def config(self) -> str:
        """Compile-time values, short enough for a table: no absent pointers, no sizes of 1."""
        declared = {parameter.name for parameter in self.kernel.params if parameter.is_constexpr}
        shown = [f"{key}={value}" for key, value in self.constants if key in declared]
        pointers = sorted({kind for _, kind in self.signature if kind.startswith("*") and kind != "*fp32"})
        return " ".join([*shown, *pointers])

    def compile(self, capability: int) -> tuple[bytes, int]:
        """The cubin for compute capability ``capability`` (90 for sm_90), and its dynamic shared memory."""
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        names = self.kernel.arg_names
        source = ASTSource(
            self.kernel,
            dict(self.signature),
            {(names.index(key),): value for key, value in self.constants},
            {(names.index(key),): [["tt.divisibility", 16]] for key in self.divisible},
        )
        compiled = triton.compile(
            source, target=GPUTarget("cuda", capability, 32), options=dict(self.options)
        )
        return compiled.asm["cubin"], compiled.metadata.shared


def _specialise(kernel: Any, arguments: Sequence[Any], keywords: dict[str, Any]) -> Specialisation:
    """What Triton's launcher would make of the arguments: 1 and None compiled in, 16-divisibility noted."""
    names = kernel.arg_names
    values = dict(zip(names, arguments, strict=False))
    options = {key: value for key, value in keywords.items() if key not in names}
    values |= {key: value for key, value in keywords.items() if key in names}
    constexprs = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
    signature, constants, divisible = [], [], []
    for name in names:
        value = values[name]
        kind = "constexpr"
        if isinstance(value, Tensor):
            kind = _POINTERS[value.dtype]
            # Fresh allocations are aligned; on the CPU by less than on a GPU, so it is not asked.
            divisible.append(name)
        elif name in constexprs or value is None:
            constants.append((name, value))
        elif isinstance(value, int) and value == 1:
            constants.append((name, 1))
        elif isinstance(value, int):
            kind = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                divisible.append(name)
        else:
            kind = "fp32"
        signature.append((name, kind))
    return Specialisation(
        kernel, tuple(signature), tuple(constants), tuple(divisible), tuple(sorted(options.items()))
    )


@contextlib.contextmanager
def _recorded_launches() -> Iterator[dict[Specialisation, None]]:
    """Launches inside the ``with`` block are recorded, in order and each once, and do not run."""
    from triton.runtime.jit import JITFunction

    seen: dict[Specialisation, None] = {}

    def run(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        seen[_specialise(kernel, arguments, keywords)] = None

    with (
        mock.patch.object(JITFunction, "run", run),
        # Nothing is launched, so that CPU tensors will do.
        mock.patch.object(environment, "interpreting", return_value=True),
        mock.patch.object(backends, "triton_status", return_value=(True, "recording")),
    ):
        yield seen


def specialisations(operator: library.Operator | library.Block, dtype: torch.dtype) -> list[Specialisation]:
    """Every kernel that the operator's or block's cases tagged ``resources`` launch, forward and backward.

    Raises:
        RuntimeError: Triton is interpreting in this process, so that kernels are not compiled.
    """
    if environment.interpreting():
        raise RuntimeError("Triton is interpreting; unset TRITON_INTERPRET to compile kernels")
    with _recorded_launches() as seen, backends.backend("triton"):
        for case in operator.cases():
            if "resources" not in case.tags:
                continue
            arguments = case.make(torch.Generator().manual_seed(0), dtype, torch.device("cpu"), case.layout)
            out = outputs(operator.function(**arguments))
            torch.autograd.backward(out, [torch.zeros_like(value) for value in out])
    return list(seen)
