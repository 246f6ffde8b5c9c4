"""Which implementation of an operator runs: ``reference``, ``triton`` or ``cuda``, and why.

An operator lists its backends in the order in which ``auto`` tries them. Each has a predicate
``can_run(call) -> (ok, reason)`` that looks at metadata only (never at data), so that it works on fake
tensors and inside ``torch.compile``; ``reason`` is one exact sentence when ``ok`` is false.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

from fused_ops.core import dispatch, environment

BACKENDS = ("reference", "triton", "cuda")


class BackendUnavailableError(RuntimeError):
    """A backend was requested by name and cannot run; the message has the reasons."""


@dataclass(frozen=True)
class Backend:
    """One implementation of one operator.

    Attributes:
        name: one of :data:`BACKENDS`.
        can_run: predicate on the call; one sentence says why not.
        forward: launcher of the forward pass. The reference has none: it runs as plain PyTorch.
        backward: launcher of the backward pass, or None where the backend has none.
        tiles: ``tiles(kernel, sizes)``, the tiles worth trying for a kernel that asks
            :func:`fused_ops.core.tuning.tile_of`; None where there is nothing to choose.
    """

    name: str
    can_run: Callable[[Any], tuple[bool, str]]
    forward: Callable[..., Any] | None = None
    backward: Callable[..., Any] | None = None
    tiles: Callable[[str, tuple[int, ...]], Sequence[tuple[int, ...]]] | None = None


@dataclass(frozen=True)
class Choice:
    """What :func:`choose` decided for one call of one operator."""

    operator: str
    backend: str
    requested: str
    reason: str
    rejected: dict[str, str] = field(default_factory=dict)
    module: str = ""
    call: str = ""


# Process-wide, like torch.backends flags: a plain global can be guarded on by torch.compile and is seen
# by the autograd engine's threads.
_requested: str | None = None
_recorder: list[Choice] | None = None
_module_path: list[str] = []
_warned: set[str] = set()


def requested_backend() -> str:
    """The backend asked for: by :func:`backend`, else by ``FUSED_OPS_BACKEND``, else ``auto``."""
    if _requested is not None:
        return _requested
    return _environment_backend


# Read once: reading the environment inside a traced function would break torch.compile's graph.
_environment_backend = os.environ.get("FUSED_OPS_BACKEND", environment.VARIABLES["FUSED_OPS_BACKEND"].default)


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Run every operator inside the ``with`` block on the backend ``name``.

    The choice is made when an operator's forward is called; its backward uses the same backend wherever it
    runs. Process-wide, like ``torch.backends`` flags.

    Args:
        name: ``reference``, ``triton``, ``cuda`` or ``auto``.

    Raises:
        ValueError: unknown name.
        BackendUnavailableError: from the operator call, when the backend cannot run it.
    """
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"backend={name!r} is unknown; use one of auto, {', '.join(BACKENDS)}")
    global _requested
    previous = _requested
    _requested = name
    try:
        yield
    finally:
        _requested = previous


def choose(operator: str, backends: tuple[Backend, ...], call: Any) -> Backend:
    """The backend that runs ``call``.

    Raises:
        BackendUnavailableError: the requested backend is not implemented or cannot run this call.
    """
    chosen, measured, rejected = _first_that_can_run(operator, backends, call)
    requested = requested_backend()
    if chosen is None:
        if requested not in rejected:
            rejected[requested] = f"{operator} has no {requested} backend"
        raise BackendUnavailableError(
            f"{operator}: backend {requested!r} was requested and cannot run: {rejected[requested]}"
        )
    _note(operator, chosen.name, measured, rejected, call)
    by_measurement = measured is not None and measured.backend == "reference"
    if (
        requested == "auto"
        and chosen.name == "reference"
        and not by_measurement
        and not torch.compiler.is_compiling()
    ):
        _say_once(operator, call, rejected)
    return chosen


def choose_whole(operator: str, backends: tuple[Backend, ...], call: Any) -> str | None:
    """Which kernels run ``call``, a block, as one operator; None where its parts run one by one.

    Returns:
        triton, or auto where the block's parts may take the first kernels that can run.
    """
    if requested_backend() not in ("auto", "triton"):
        return None
    chosen, measured, rejected = _first_that_can_run(operator, backends, call)
    if chosen is None or chosen.name == "reference":
        return None
    _note(operator, chosen.name, measured, rejected, call)
    return requested_backend()


def _first_that_can_run(
    operator: str, backends: tuple[Backend, ...], call: Any
) -> tuple[Backend | None, Any, dict[str, str]]:
    """The first backend of those allowed, what was measured for such calls, and why others were not taken."""
    requested = requested_backend()
    if requested != "auto" and requested not in BACKENDS:
        # An import must not fail for a mistyped variable, so the first operator call says it.
        raise ValueError(
            f"FUSED_OPS_BACKEND={requested!r} is unknown; use one of auto, {', '.join(BACKENDS)}"
        )
    rejected: dict[str, str] = {}
    measured = dispatch.preferred(operator, call) if requested == "auto" and call.x.is_cuda else None
    if measured is not None:
        backends = (*(b for b in backends if b.name == measured.backend), *backends)
    for candidate in backends:
        if requested != "auto" and candidate.name != requested:
            continue
        ok, reason = candidate.can_run(call)
        if ok and requested == "auto" and candidate.name != "reference" and not call.x.is_cuda:
            ok = False
            reason = f"x is on {call.x.device}, where kernels run for tests only, asked for by name"
        if ok:
            return candidate, measured, rejected
        rejected[candidate.name] = reason
    return None, measured, rejected


def _note(operator: str, chosen: str, measured: Any, rejected: dict[str, str], call: Any) -> None:
    """Tell a recorder what was chosen and why."""
    if _recorder is None:
        return
    reason = "requested" if requested_backend() != "auto" else "first in the order of auto that can run"
    if measured is not None and chosen == measured.backend:
        reason = f"measured fastest for {measured.case} ({measured.ratio:g} times the best alternative)"
        if chosen == "reference":
            reason = f"stock PyTorch was measured faster for {measured.case}"
    path = _module_path[-1] if _module_path else ""
    _recorder.append(Choice(operator, chosen, requested_backend(), reason, rejected, path, str(call)))


def _say_once(operator: str, call: Any, rejected: dict[str, str]) -> None:
    # On a CPU the reference is the only sensible choice, and nothing worth a warning; on a GPU the user
    # expected a kernel.
    if not call.x.is_cuda or operator in _warned:
        return
    _warned.add(operator)
    reasons = "; ".join(f"{name}: {reason}" for name, reason in rejected.items())
    warnings.warn(
        f"{operator} runs on the reference path (plain PyTorch): {reasons}. Said once per operator; "
        "fused_ops.explain(module, input) lists every choice.",
        RuntimeWarning,
        stacklevel=4,
    )


@contextlib.contextmanager
def record() -> Iterator[list[Choice]]:
    """Collect every choice made inside the ``with`` block."""
    global _recorder
    previous = _recorder
    _recorder = []
    try:
        yield _recorder
    finally:
        _recorder = previous


@cache
def _triton_status(device: int | None) -> tuple[bool, str]:
    try:
        import triton
    except ImportError as error:
        return False, f"Triton cannot be imported ({error})"
    if environment.interpreting():
        return True, "Triton's interpreter, on CPU tensors"
    if not torch.cuda.is_available():
        return False, "no CUDA device is available, and TRITON_INTERPRET=1 was not set before the import"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return False, f"the GPU's compute capability is {major}.{minor}; the Triton kernels need 8.0"
    return True, f"Triton {triton.__version__}"


@environment.constant_in_graphs
def triton_status(device: int | None = None) -> tuple[bool, str]:
    """Whether Triton kernels can run on a device, and if not, why. Found out once, since every call asks.

    Args:
        device: index of the CUDA device; None for the current one.
    """
    return _triton_status(device)


TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def triton_takes(name: str, x: torch.Tensor) -> tuple[bool, str]:
    """Whether Triton kernels run on tensors like ``x``, the argument ``name``; one sentence says why not."""
    ok, reason = triton_status(x.device.index)
    if not ok:
        return False, reason
    if not x.is_cuda and not environment.interpreting():
        return False, f"{name} is on {x.device}; the Triton kernels need a CUDA tensor"
    if x.dtype not in TRITON_DTYPES:
        return False, f"{name} is {x.dtype}; the Triton kernels are for float32, float16 and bfloat16"
    return True, ""


def device_of(x: torch.Tensor) -> contextlib.AbstractContextManager:
    """Makes the device of ``x`` the current one, on which Triton launches."""
    if not x.is_cuda or torch.cuda.current_device() == x.device.index:
        return contextlib.nullcontext()
    return torch.cuda.device(x.device)


def reference_can_run(call: Any) -> tuple[bool, str]:
    """The reference takes every call."""
    return True, ""


def status() -> dict[str, tuple[bool, str]]:
    """For every backend: whether it can run anything in this process, and the reason."""
    from fused_ops.core import native

    return {
        "reference": (True, "plain PyTorch, any device"),
        "triton": triton_status(),
        "cuda": native.status(),
    }
