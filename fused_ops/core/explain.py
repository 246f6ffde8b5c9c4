"""Which backend runs each operator of a module, and why: without running it."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fused_ops.core import backends
from fused_ops.core.backends import Choice


@dataclass(frozen=True)
class Explanation:
    """Choices in the order of the calls. ``str()``: a line per call, then each reason once with its count."""

    choices: tuple[Choice, ...]

    def rows(self) -> list[dict[str, Any]]:
        return [
            {
                "module": choice.module,
                "op": choice.operator,
                "call": choice.call,
                "backend": choice.backend,
                "reason": choice.reason,
                "rejected": choice.rejected,
            }
            for choice in self.choices
        ]

    def __str__(self) -> str:
        if not self.choices:
            return "no fused operator is called"
        width = max(len(choice.module or "(top)") for choice in self.choices)
        lines = [
            f"{choice.module or '(top)':{width}}  {choice.backend:9}  {choice.operator} {choice.call}"
            for choice in self.choices
        ]
        chosen = Counter((choice.backend, choice.reason) for choice in self.choices)
        declined = Counter(entry for choice in self.choices for entry in choice.rejected.items())
        lines.append("")
        lines += [f"{count:4} x {name}: {reason}" for (name, reason), count in chosen.items()]
        lines += [f"{count:4} x not {name}: {reason}" for (name, reason), count in declined.items()]
        return "\n".join(lines)


@contextlib.contextmanager
def _module_paths(module: nn.Module) -> Iterator[None]:
    """Make choices carry the dotted name of the submodule that they are made in."""
    handles = []

    def enter(name: str):
        def hook(_module, _args):
            backends._module_path.append(name)

        return hook

    def leave(_module, _args, _output):
        backends._module_path.pop()

    for name, child in module.named_modules():
        if name:
            handles.append(child.register_forward_pre_hook(enter(name)))
            handles.append(child.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        backends._module_path.clear()


def explain(module: nn.Module, *inputs: Tensor) -> Explanation:
    """Say per operator call which backend runs, why, and why not the others.

    Nothing is computed: the forward pass goes over fake tensors, so parameters, buffers and random states
    stay as they are and any size costs nothing.

    Args:
        module: any module; its training flag and the gradient mode count.
        inputs: arguments of its forward.

    Raises:
        BackendUnavailableError: a backend was requested by name and cannot run one of the calls.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    fakes = {name: _fake(mode, tensor) for name, tensor in state.items()}
    arguments = [_fake(mode, value) if isinstance(value, Tensor) else value for value in inputs]
    with mode, _module_paths(module), backends.record() as choices:
        torch.func.functional_call(module, fakes, tuple(arguments))
    return Explanation(tuple(choices))


def _fake(mode: FakeTensorMode, tensor: Tensor) -> Tensor:
    fake = mode.from_tensor(tensor.detach(), static_shapes=True)
    return fake.requires_grad_(tensor.requires_grad)
