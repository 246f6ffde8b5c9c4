"""Finds, loads and builds the compiled CUDA library, and says why it cannot be used.

Nothing here raises at import, and nothing is loaded before the first question. For tests, an emulator (the
same kernels on CPU threads) can be put in the library's place for CPU tensors.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from fused_ops.core import environment

LIBRARY = Path(__file__).resolve().parents[1] / "_native.so"
SOURCES = Path(__file__).resolve().parents[2] / "csrc"

# What this package expects of the library; INTERFACE in csrc/build.py has the same number.
INTERFACE = 4

REMEDY = "`python csrc/build.py library` in the checkout builds it"

# Numbers of csrc/common/options.h.
SCALAR_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
ACTIVATIONS = {
    name: number
    for number, name in enumerate(("none", "relu", "relu6", "silu", "gelu", "gelu_tanh", "hardswish"))
}

# Parts of a launch sequence (csrc/depthwise/params.h); between them, processes exchange their statistics.
STATISTICS_STAGE, RESULT_STAGE = 1, 2

_emulator: ModuleType | None = None


class _Loaded:
    """The library file at one path: loaded, or the sentence about why not."""

    def __init__(self, path: Path) -> None:
        self.info: dict[str, str] = {}
        self.reason = ""
        if not path.is_file():
            self.reason = f"the CUDA library is not built; {REMEDY}"
            return
        try:
            handle = ctypes.CDLL(str(path))
            handle.fused_ops_build_info.restype = ctypes.c_char_p
            interface = handle.fused_ops_interface()
            info = json.loads(handle.fused_ops_build_info())
            if interface == INTERFACE:
                torch.ops.load_library(str(path))
        except (OSError, AttributeError, ValueError) as error:
            message = " ".join(str(error).split())
            self.reason = f"the CUDA library cannot be loaded ({message}); {REMEDY}"
            return
        if interface != INTERFACE:
            self.reason = (
                f"the CUDA library has interface {interface} and this fused_ops needs {INTERFACE}; {REMEDY}"
            )
            return
        self.info = info

    @property
    def architectures(self) -> list[str]:
        return self.info["architectures"].split()

    @property
    def ptx(self) -> list[str]:
        return self.info["ptx"].split()


@cache
def _load(path: Path) -> _Loaded:
    return _Loaded(path)


def architecture_is_covered(
    capability: tuple[int, int], architectures: Sequence[str], ptx: Sequence[str]
) -> bool:
    """Whether a GPU of compute capability ``capability`` can run code for ``architectures`` or JIT ``ptx``.

    Machine code runs on its own major version from its minor version on (with an ``a``: only exactly there);
    PTX is compiled by the driver for anything not older.
    """

    def numbers(architecture: str) -> tuple[int, int]:
        digits = architecture.rstrip("a")
        return int(digits[:-1]), int(digits[-1])

    for architecture in architectures:
        major, minor = numbers(architecture)
        exact = architecture.endswith("a")
        if capability == (major, minor) or (not exact and capability[0] == major and capability[1] > minor):
            return True
    return any(not entry.endswith("a") and numbers(entry) <= capability for entry in ptx)


@cache
def _status(path: Path, device: int | None) -> tuple[bool, str]:
    loaded = _load(path)
    if loaded.reason:
        return False, loaded.reason
    if not torch.cuda.is_available():
        return False, "no CUDA device is available"
    capability = torch.cuda.get_device_capability(device)
    if not architecture_is_covered(capability, loaded.architectures, loaded.ptx):
        built = ", ".join(f"sm_{architecture}" for architecture in loaded.architectures)
        return False, (
            f"the GPU's architecture is sm_{capability[0]}{capability[1]} and the CUDA library is built for "
            f"{built}; {REMEDY}"
        )
    return True, f"built with CUDA {loaded.info['cuda']} against torch {loaded.info['torch']}"


@environment.constant_in_graphs
def status(device: int | None = None) -> tuple[bool, str]:
    """Whether the CUDA library can run on a device, and one sentence: how it was built, or why it cannot.

    Args:
        device: index of the CUDA device; None for the current one.
    """
    return _status(LIBRARY, device)


def library() -> Any:
    """The library's torch operators.

    Raises:
        RuntimeError: the library cannot be used; the message says why.
    """
    loaded = _load(LIBRARY)
    if loaded.reason:
        raise RuntimeError(loaded.reason)
    return torch.ops.fused_ops_native


def build_info() -> dict[str, Any]:
    """How the library was built: CUDA and torch version, architectures, PTX. Empty if it cannot be loaded."""
    loaded = _load(LIBRARY)
    if loaded.reason:
        return {}
    return {**loaded.info, "architectures": loaded.architectures, "ptx": loaded.ptx}


def emulator() -> ModuleType | None:
    """What runs the CUDA kernels on CPU tensors; None unless a test has set one."""
    return _emulator


def run_stages(
    name: str,
    tensors: Sequence[torch.Tensor | None],
    options: Sequence[Any],
    tile: Sequence[int] = (),
    *,
    exchange: Callable[[], None] | None = None,
) -> None:
    """Call a launch sequence of the library, or of the emulator where the first tensor is on the CPU.

    Args:
        name: of the library's operator.
        tensors: its tensors, all on one device.
        options, tile: what follows them, before and after the stages that run.
        exchange: run between the two stages, for the statistics of a process group; None: one call does both.
    """
    if tensors[0].is_cuda:
        operator = getattr(library(), name)
    else:
        operator = getattr(emulator(), name)
        tensors = [_view(tensor) for tensor in tensors]
    if exchange is None:
        operator(*tensors, *options, STATISTICS_STAGE | RESULT_STAGE, *tile)
        return
    operator(*tensors, *options, STATISTICS_STAGE, *tile)
    exchange()
    operator(*tensors, *options, RESULT_STAGE, *tile)


def _view(tensor: torch.Tensor | None) -> tuple[int, int, tuple[int, ...], tuple[int, ...]] | None:
    """What the emulator takes for a tensor."""
    if tensor is None:
        return None
    return tensor.data_ptr(), SCALAR_TYPES[tensor.dtype], tuple(tensor.shape), tensor.stride()


def set_emulator(module: ModuleType | None) -> None:
    """Let calls of the CUDA backend on CPU tensors run in ``module``; None ends it."""
    global _emulator
    _emulator = module


def forget() -> None:
    """Look for the library anew at the next question, as after building it or changing ``LIBRARY``."""
    _load.cache_clear()
    _status.cache_clear()


@cache
def build_tools() -> ModuleType:
    """``csrc/build.py`` of the checkout that this package lies in.

    Raises:
        RuntimeError: the package is installed without its sources.
    """
    path = SOURCES / "build.py"
    if not path.is_file():
        raise RuntimeError("the CUDA sources are not installed with the package; build in a checkout of it")
    spec = importlib.util.spec_from_file_location("fused_ops_build", path)
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up while they are defined.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def build_emulator(out_dir: Path | None = None) -> ModuleType:
    """Compile the emulator (kept under build/ and compiled again only when its sources change) and load it.

    Raises:
        RuntimeError: it cannot be built; the message says why.
    """
    path = build_tools().build_emulator(out_dir)
    spec = importlib.util.spec_from_file_location("fused_ops_emulator", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
