"""Every ``FUSED_OPS_*`` environment variable, and the report for bug reports (``fused-ops env``)."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Variable:
    """An environment variable of the project."""

    name: str
    default: str
    description: str
    choices: tuple[str, ...] = ()


VARIABLES: dict[str, Variable] = {
    variable.name: variable
    for variable in (
        Variable(
            "FUSED_OPS_BACKEND",
            "auto",
            "Backend of every operator. `auto` takes the first that can run; a named backend that cannot "
            "run raises with the reason.",
            ("auto", "reference", "triton", "cuda"),
        ),
        Variable(
            "FUSED_OPS_BUILD_CUDA",
            "auto",
            "Whether installing compiles the CUDA library. `1` makes a missing or failing compiler an "
            "error, `0` skips the library, `auto` compiles where a compiler is found.",
            ("auto", "0", "1"),
        ),
        Variable(
            "FUSED_OPS_CUDA_ARCHS",
            "",
            "Architectures to compile for, e.g. `80;90`. Empty: those of the GPUs present, or all "
            "supported ones where there is no GPU.",
        ),
        Variable(
            "FUSED_OPS_CONFIGS",
            "",
            "Folder of tile choices that `fused-ops tune` wrote, read before those that are shipped.",
        ),
        Variable("FUSED_OPS_NVCC", "", "Path of the CUDA compiler to build with. Empty: the first found."),
    )
}


def get(name: str) -> str:
    """Value of the environment variable ``name`` of this project.

    Raises:
        KeyError: ``name`` is not one of :data:`VARIABLES`.
        ValueError: the value is not one of the variable's choices.
    """
    variable = VARIABLES[name]
    value = os.environ.get(name, variable.default)
    if variable.choices and value not in variable.choices:
        allowed = ", ".join(variable.choices)
        raise ValueError(f"{name}={value!r} is not allowed; use one of {allowed}")
    return value


# Triton decides when a kernel is defined, so the variable counts only if set before the first import.
_INTERPRETING = os.environ.get("TRITON_INTERPRET", "0") == "1"


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on CPU tensors (``TRITON_INTERPRET=1``)."""
    return _INTERPRETING


def constant_in_graphs(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let ``torch.compile`` call ``function`` while tracing and take its result as a constant.

    For facts about the machine, which are found in ways that cannot be traced. What
    ``torch.compiler.assume_constant_result`` does, without importing the compiler along with the package.
    """
    function._dynamo_marked_constant = True
    return function


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def command_output(command: Sequence[str], cwd: Path | None = None) -> str | None:
    """What ``command`` prints, stripped; None where it is missing, fails or takes over 20 seconds."""
    try:
        result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


def git_commit() -> str | None:
    """Commit of the checkout that this package lies in; None outside one."""
    root = Path(__file__).resolve().parents[2]
    # An installed copy may lie inside some other project's repository.
    if not (root / ".git").exists():
        return None
    return command_output(["git", "rev-parse", "HEAD"], cwd=root)


def gpu_slug(name: str) -> str:
    """A GPU's name for files and folders: ``NVIDIA H100 80GB HBM3`` is ``nvidia-h100-80gb-hbm3``."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _driver_version() -> str | None:
    versions = command_output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    return versions.splitlines()[0] if versions else None


def environment_report() -> dict[str, Any]:
    """What a bug report or a measurement needs to say about the machine. Plain values, for JSON."""
    import torch

    from fused_ops.core import backends

    gpus = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            gpus.append(
                {
                    "name": properties.name,
                    "compute_capability": f"{properties.major}.{properties.minor}",
                    "memory_bytes": properties.total_memory,
                }
            )
    packages = ("fused-ops", "torch", "triton", "torchvision", "timm", "safetensors", "numpy")
    return {
        "packages": {package: _version(package) for package in packages},
        "commit": git_commit(),
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if gpus else None,
        "driver": _driver_version(),
        "gpus": gpus,
        "backends": {
            name: {"runs": ok, "reason": reason} for name, (ok, reason) in backends.status().items()
        },
        "variables": {name: os.environ.get(name) for name in VARIABLES},
    }
