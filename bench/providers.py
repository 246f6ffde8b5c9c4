"""What is measured side by side: PyTorch as a user would run it, and every backend of this package."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import fused_ops
from fused_ops.core import backends

SDPA_BACKENDS = {
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}


@dataclass(frozen=True)
class Provider:
    """One way to run an operator or a model.

    Attributes:
        name: as in the results.
        alternative: what a user without this package would run; the fastest of these is what the rest is
            compared with.
        layout: of the data, ``nchw`` or ``channels_last``.
        backend: of this package's operators; ``reference`` is plain PyTorch.
        compile_mode: of ``torch.compile``, or None for no compilation. The bench captures CUDA graphs itself,
            so the modes are those without.
        sdpa: the one backend that ``scaled_dot_product_attention`` may use, or None for its own choice.
    """

    name: str
    alternative: bool
    layout: str = "channels_last"
    backend: str = "reference"
    compile_mode: str | None = None
    sdpa: str | None = None

    @property
    def needs_gpu(self) -> bool:
        return self.backend in ("triton", "cuda") or self.sdpa in ("efficient", "cudnn")

    def unavailable(self, on_cpu: bool, implemented: Sequence[str] | None = None) -> str:
        """Why this provider cannot run in this process; empty if it can.

        Args:
            on_cpu: the device is the CPU, where kernels run for tests only.
            implemented: backends of the operator that is measured, or None for a model.
        """
        if implemented is not None and self.backend not in ("auto", *implemented):
            return f"the operator has no {self.backend} backend"
        if not self.needs_gpu:
            return ""
        if on_cpu:
            return "needs a GPU, and there is none"
        if self.sdpa is not None:
            return ""
        ok, reason = backends.status()[self.backend]
        return "" if ok else reason

    def build(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function`` as this provider runs it; to be called inside :meth:`active`."""
        if self.compile_mode is None:
            return function
        # Without dynamic=False the second shape would be compiled for sizes of every kind, and slower.
        return torch.compile(function, mode=self.compile_mode, dynamic=False)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Context in which everything of this provider runs."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(fused_ops.backend(self.backend))
            if self.sdpa is not None:
                stack.enter_context(sdpa_kernel(SDPA_BACKENDS[self.sdpa]))
            yield


ALL = (
    Provider("eager_nchw", True, layout="nchw"),
    Provider("eager_channels_last", True),
    *(Provider(f"sdpa_{name}", True, sdpa=name) for name in SDPA_BACKENDS),
    Provider("reference", False),
    Provider("triton", False, backend="triton"),
    Provider("cuda", False, backend="cuda"),
    Provider("auto", False, backend="auto"),
    # Last, because they take longest to prepare: what a budget cuts off is these.
    Provider("compile_default", True, compile_mode="default"),
    Provider("compile_max_autotune", True, compile_mode="max-autotune-no-cudagraphs"),
)
NAMES = tuple(provider.name for provider in ALL)


def select(names: Sequence[str] | None, *, attention: bool) -> list[Provider]:
    """The providers called ``names``, or all that apply.

    Args:
        names: from :data:`NAMES`, or None for all.
        attention: what is measured calls ``scaled_dot_product_attention``; otherwise its backends make no
            difference and are left out.

    Raises:
        ValueError: an unknown name.
    """
    for name in names or ():
        if name not in NAMES:
            raise ValueError(f"provider={name!r} is unknown; use one of {', '.join(NAMES)}")
    return [
        provider
        for provider in ALL
        if (names is None or provider.name in names) and (attention or provider.sdpa is None)
    ]


def reason_of(error: BaseException) -> str:
    """One line that says why a provider did not run."""
    text = str(error).strip().splitlines()
    if isinstance(error, backends.BackendUnavailableError):
        return text[0]
    return f"{type(error).__name__}: {text[0] if text else 'no message'}"[:300]
