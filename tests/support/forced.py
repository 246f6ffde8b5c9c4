"""Recorded numbers with kernels forced, at float32.

A record says how far the official code in float32 is from itself in float64. Kernels may be twice as far.
The exact outputs are those of the module on the reference path in float64, which are compared with the record
first.
"""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import fused_ops
from fused_ops.core import backends

from . import golden

Run = Callable[[nn.Module, Tensor], Sequence[Tensor]]


@contextlib.contextmanager
def kernels_of(backend: str) -> Iterator[list[backends.Choice]]:
    """Run what ``backend`` has a kernel for on it, all else on the reference; yields the choices made."""
    choose = backends.choose

    def prefer(operator: str, known: tuple[backends.Backend, ...], call: Any) -> backends.Backend:
        able = any(one.name == backend and one.can_run(call)[0] for one in known)
        with fused_ops.backend(backend if able else "reference"):
            return choose(operator, known, call)

    with contextlib.ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.startswith("fused_ops.") and getattr(module, "choose", None) is choose:
                stack.enter_context(mock.patch.object(module, "choose", prefer))
        stack.enter_context(fused_ops.backend(backend))
        yield stack.enter_context(backends.record())


def check_golden(
    model: nn.Module,
    record: Mapping[str, Any],
    backend: str,
    run: Run = lambda model, x: [model(x)],
    device: str = "cpu",
) -> None:
    """Outputs of a filled float64 model in eval mode, in float32 and with kernels where there are any.

    Args:
        model: on the CPU.
        record: its first eval record is used, the one that errors are stated for.
        backend: must run one call at least.
        run: ``(model, input) -> outputs``, in the order of the record.
        device: where the kernels run.
    """
    case = record["eval"][0]
    x = golden.normal(case["input"]["seed"], case["input"]["shape"])
    model.eval()
    single = copy.deepcopy(model).to(device, torch.float32)
    deviation = golden.Deviation()
    with torch.no_grad():
        with fused_ops.backend("reference"):
            exact = run(model, x)
        for expected, value in zip(case["outputs"], exact, strict=True):
            deviation.compare(expected["name"], value, expected)
        deviation.check(golden.EVAL_TOLERANCE)
        with kernels_of(backend) as choices:
            found = run(single, x.to(device, torch.float32))
    assert backend in {choice.backend for choice in choices}
    for value, wanted, stated in zip(found, exact, case["float32_relative_l2_error"], strict=True):
        assert value.dtype == torch.float32
        error = float((value.cpu().double() - wanted).norm() / wanted.norm())
        assert error <= 2 * stated, f"{error:.3g} > 2 * {stated:.3g}"
