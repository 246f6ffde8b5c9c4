"""Reading and writing weights, and refusing what does not fit.

Three kinds of source are read: checkpoints of the public PyTorch code (``torch.load`` with
``weights_only=True``), ``.pdparams`` files of the public Paddle code (through an unpickler that can build
numpy arrays and nothing else), and our own safetensors files. Names, shapes and number kinds are checked in
full before the first value is copied.
"""

from __future__ import annotations

import argparse
import io
import os
import pickle
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

import fused_ops
from fused_ops.core.files import write_atomically
from fused_ops.models.layouts import PADDLE_STATISTICS
from fused_ops.models.registry import system_of

ROOT_KEYS = ("model", "state_dict")
FORMAT = "fused_ops"
_SHOWN = 4
# Entries of a Paddle state dict that name parameters and hold no weights.
_PADDLE_BOOKKEEPING = ("StructuredToParameterName@@",)


class CheckpointError(ValueError):
    """A checkpoint cannot be read, or does not fit the model. The model is as it was."""


def load_checkpoint(
    model: nn.Module,
    source: str | os.PathLike[str] | Mapping[str, Any],
    *,
    root_key: str | None = None,
    new_classifier: bool = False,
) -> None:
    """Copy weights into ``model``: all of them or, with an exception, none.

    Args:
        model: a model of the zoo, on a real device.
        source: a path or a loaded state dict. Files: ``.safetensors`` written by :func:`save_checkpoint`,
            ``.pdparams`` of Paddle, all else as a PyTorch checkpoint. The weights of a PyTorch checkpoint
            may be under ``model`` or ``state_dict``, and their names may begin with ``module.``.
        root_key: entry of the checkpoint that holds the weights, for instance ``model_ema``.
        new_classifier: leave the model's classifier as it is, whatever the checkpoint has there.

    Raises:
        CheckpointError: the file is of another kind, belongs to another model, or some entries are missing,
            unexpected or mis-shaped (named in the message).
        FileNotFoundError: there is no such file.
    """
    model = _unwrap(model)
    system = system_of(model)
    if isinstance(source, Mapping):
        raw, framework = dict(source), None
    else:
        raw, framework = _read(Path(source), model)
    state = _state_tensors(raw, root_key)
    if framework is None:
        names = {name.rpartition(".")[2] for name in state}
        framework = "paddle" if names & PADDLE_STATISTICS.keys() else "pytorch"

    candidates = [dict(state)] if framework != "paddle" else []
    if framework != FORMAT:
        candidates += [
            layout.official_to_ours(state, model)
            for layout in system.layouts
            if layout.framework == framework
        ]
    if not candidates:
        raise CheckpointError(f"{system.name} has no public {framework} code, so its names are not known")
    problems = []
    for candidate in candidates:
        ready = _without_classifier(candidate, model) if new_classifier else candidate
        problem = _mismatch(ready, model)
        if not problem:
            model.load_state_dict(ready, strict=True)
            return
        problems.append(problem)
    raise CheckpointError(f"checkpoint does not fit {_model_name(model)}: {min(problems, key=len)}")


def official_state_dict(model: nn.Module, framework: str = "pytorch") -> dict[str, Tensor]:
    """The model's state under the names and shapes of the public code; the inverse of loading it.

    Args:
        model: a model of the zoo.
        framework: ``pytorch`` or ``paddle``.

    Raises:
        ValueError: the system has no public code in that framework.
    """
    model = _unwrap(model)
    system = system_of(model)
    for layout in system.layouts:
        if layout.framework == framework:
            return layout.ours_to_official(model.state_dict(), model)
    known = ", ".join(sorted({layout.framework for layout in system.layouts})) or "none"
    raise ValueError(f"framework must be one with public code of {system.name} ({known}), got {framework!r}")


def save_checkpoint(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the model's state as safetensors, with model name, number of classes and package version.

    The file appears under ``path`` complete or not at all.
    """
    model = _unwrap(model)
    path = Path(path)
    metadata = {
        "format": FORMAT,
        "model": _model_name(model),
        "num_classes": str(model.num_classes),
        "fused_ops_version": fused_ops.__version__,
    }
    tensors = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    write_atomically(path, lambda file: file.write(safetensors.torch.save(tensors, metadata)))


def _unwrap(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel and torch.compile."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        else:
            return model


def _model_name(model: nn.Module) -> str:
    """The registered name, or the class's for a model that was built without the registry."""
    return (getattr(model, "pretrained_cfg", None) or {}).get("architecture") or type(model).__name__


def _read(path: Path, model: nn.Module) -> tuple[Any, str | None]:
    """Contents of a checkpoint file and the framework that it is from, None if that must be seen."""
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    if path.suffix == ".safetensors":
        return _read_safetensors(path, model), FORMAT
    if path.suffix == ".pdparams":
        return _read_paddle(path), "paddle"
    try:
        # The public code stores its command line beside the weights. A Namespace is a plain record.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True), None
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        # PyTorch's message goes on to recommend loading without protection.
        cause = str(error).rpartition("WeightsUnpickler error: ")[2].partition("Please use")[0].strip()
        raise CheckpointError(
            f"{path.name} is not a PyTorch checkpoint of plain tensors, and nothing else is run: {cause}"
        ) from error


def _read_safetensors(path: Path, model: nn.Module) -> dict[str, Tensor]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise CheckpointError(
                    f"{path.name} was not written by fused_ops.models.save_checkpoint, by its metadata"
                )
            name = _model_name(model)
            if metadata.get("model") != name:
                raise CheckpointError(f"{path.name} holds {metadata.get('model')}, not {name}")
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path.name} is not a safetensors file: {error}") from error


def _encode_latin1(text: str, encoding: str) -> bytes:
    """How pickle protocol 2 spells bytes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"encoding {encoding!r} is not allowed")
    return text.encode("latin1")


def _array_globals() -> dict[tuple[str, str], Any]:
    """What a pickle of a dict of numpy arrays refers to, under the names of numpy 1 and 2."""
    reconstruct = np.empty(0).__reduce__()[0]
    from_buffer = np.empty(1).__reduce_ex__(5)[0]
    allowed: dict[tuple[str, str], Any] = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("collections", "OrderedDict"): OrderedDict,
        ("_codecs", "encode"): _encode_latin1,
    }
    for core in ("numpy.core", "numpy._core"):
        allowed[f"{core}.multiarray", "_reconstruct"] = reconstruct
        allowed[f"{core}.numeric", "_frombuffer"] = from_buffer
    return allowed


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickler that can build dicts, tuples, strings and numpy arrays, and refuses the rest."""

    _allowed = _array_globals()

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._allowed[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed in a weight file") from None


def _read_paddle(path: Path) -> dict[str, Any]:
    try:
        state = _ArrayUnpickler(io.BytesIO(path.read_bytes())).load()
    except Exception as error:
        # A damaged pickle can raise almost anything.
        raise CheckpointError(f"{path.name} is not a pickled dict of numpy arrays: {error}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path.name} holds a {type(state).__name__}, not a dict of numpy arrays")
    if "UnpackBigParamInfor@@" in state:
        raise CheckpointError(f"{path.name} has split parameters; save it with pickle protocol 4 in Paddle")
    # Paddle may store a parameter as (its internal name, values).
    return {
        name: value[1] if isinstance(value, tuple) and len(value) == 2 else value
        for name, value in state.items()
        if name not in _PADDLE_BOOKKEEPING
    }


def _state_tensors(raw: Any, root_key: str | None) -> dict[str, Tensor]:
    """The weights of a checkpoint as tensors under their names without ``module.``."""
    if not isinstance(raw, Mapping):
        raise CheckpointError(f"checkpoint holds a {type(raw).__name__}, not a state dict")
    if root_key is not None:
        if not isinstance(raw.get(root_key), Mapping):
            roots = ", ".join(str(key) for key, value in raw.items() if isinstance(value, Mapping)) or "none"
            raise CheckpointError(f"checkpoint has no state dict under {root_key!r}; there are: {roots}")
        raw = raw[root_key]
    else:
        raw = next((raw[key] for key in ROOT_KEYS if isinstance(raw.get(key), Mapping)), raw)
    if raw and all(isinstance(name, str) and name.startswith("module.") for name in raw):
        raw = {name.removeprefix("module."): value for name, value in raw.items()}
    state = {}
    for name, value in raw.items():
        if isinstance(value, np.ndarray) and value.dtype.kind in "fiu":
            value = torch.from_numpy(np.array(value, order="C"))
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"checkpoint entry {name!r} is a {type(value).__name__}, not a tensor; this is no state dict"
            )
        state[name] = value
    return state


def _classifier_keys(model: nn.Module) -> set[str]:
    """Names of the classifier's entries, both the model's own and what a checkpoint may have there."""
    name = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or "head"
    return {f"{name}.weight", f"{name}.bias"}


def _without_classifier(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    keys = _classifier_keys(model)
    own = {name: value for name, value in model.state_dict().items() if name in keys}
    return {name: value for name, value in state.items() if name not in keys} | own


def _mismatch(state: Mapping[str, Tensor], model: nn.Module) -> str:
    """What keeps ``state`` from fitting ``model``, empty if nothing does."""
    expected = model.state_dict()
    on_meta = sum(value.is_meta for value in expected.values())
    if on_meta:
        return (
            f"{on_meta} of the model's tensors are on the meta device; call model.to_empty(device=...) first"
        )
    missing = [name for name in expected if name not in state]
    unexpected = [name for name in state if name not in expected]
    misshaped, other_kind = [], []
    for name, value in expected.items():
        if name not in state:
            continue
        given = state[name]
        if given.shape != value.shape:
            misshaped.append(f"{name} {tuple(given.shape)} instead of {tuple(value.shape)}")
        elif given.is_floating_point() != value.is_floating_point() or given.is_complex():
            other_kind.append(f"{name} {given.dtype} instead of {value.dtype}")
    lists = (
        ("missing", missing),
        ("unexpected", unexpected),
        ("mis-shaped", misshaped),
        ("of another kind of number", other_kind),
    )
    parts = [f"{len(names)} {kind} ({_first(names)})" for kind, names in lists if names]
    classifier = _classifier_keys(model)
    wrong = {text.split(" ")[0] for text in (*missing, *unexpected, *misshaped)}
    if wrong and wrong <= classifier:
        parts.append("only the classifier differs: new_classifier=True keeps the model's own")
    return "; ".join(parts)


def _first(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
