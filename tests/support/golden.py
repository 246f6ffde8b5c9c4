"""Filling parameters by rule and comparing a model with recorded numbers.

The rule and the file format are described in ``tests/golden/README.md``. A test fills a state dict under the
official names, loads it through the project's converter, runs the recorded inputs in float64 and compares.
"""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.layers import DropPath as TimmDropPath
from torch import Tensor, nn

from fused_ops.core.drop_path import DropPath

FOLDER = Path(__file__).parents[1] / "golden"
EVAL_TOLERANCE = 1e-10
TRAIN_TOLERANCE = 1e-7


def load(name: str) -> dict[str, Any]:
    """The record file of a model or layer."""
    return json.loads((FOLDER / f"{name}.json").read_text())


def generator(text: str) -> np.random.Generator:
    """The generator that belongs to a name or seed text."""
    return np.random.Generator(np.random.PCG64(zlib.crc32(text.encode())))


def normal(text: str, shape: Sequence[int]) -> Tensor:
    """Standard normal float64 values that belong to a text, such as ``"input"`` for inputs."""
    return torch.from_numpy(np.array(generator(text).standard_normal(tuple(shape))))


def role(name: str, shape: Sequence[int]) -> str:
    """What an entry is, judged by the last part of its official name and its official shape."""
    last = name.rpartition(".")[2]
    if last in ("running_mean", "running_var"):
        return last
    if last.endswith("bias"):
        return "bias"
    if last.endswith("weight"):
        is_norm = len(shape) < 2 or (len(shape) == 3 and shape[0] > 1 and tuple(shape[1:]) == (1, 1))
        return "norm_weight" if is_norm else "matrix"
    if "gamma" in last or "layer_scale" in last:
        return "scale"
    return "table"


def fill_value(name: str, shape: Sequence[int], gain: float = 1.0) -> Tensor:
    """Value of the entry ``name`` with official ``shape``, float64."""
    z = normal(name, shape)
    kind = role(name, shape)
    if kind in ("running_mean", "bias"):
        return 0.1 * z
    if kind == "running_var":
        return 1 + 0.1 * z.abs()
    if kind in ("norm_weight", "scale"):
        return 1 + 0.1 * z
    if kind == "matrix":
        return gain * z * math.sqrt(1 / math.prod(shape[1:]))
    return 0.02 * z


def fill(layout: Mapping[str, Tensor], gain: float = 1.0, left: Sequence[str] = ()) -> dict[str, Tensor]:
    """The filled state dict of an official layout: integer entries and those in ``left`` stay as they are."""
    return {
        name: fill_value(name, value.shape, gain)
        if value.is_floating_point() and name not in left
        else value.clone()
        for name, value in layout.items()
    }


def layout_sha256(layout: Mapping[str, Tensor]) -> str:
    """Hash of names and shapes, as in ``state_dict.layout_sha256`` of a record."""
    lines = sorted(f"{name} {'x'.join(map(str, value.shape))}" for name, value in layout.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def disable_randomness(model: nn.Module) -> None:
    """Set every dropout and drop path probability to 0, as in the train records."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(module, DropPath | TimmDropPath):
            module.drop_prob = 0.0


class Deviation:
    """Largest deviation seen, each relative to a scale; keeps the name of the worst value."""

    def __init__(self) -> None:
        self.worst = 0.0
        self.where = "nothing compared"
        self.count = 0

    def add(self, where: str, got: float, expected: float, scale: float) -> None:
        value = abs(float(got) - expected) / max(scale, 1e-300)
        self.count += 1
        if not value <= self.worst or self.count == 1:
            self.worst, self.where = value, f"{where}: {float(got)!r} instead of {expected!r}"

    def check(self, tolerance: float) -> None:
        assert self.count > 0, "no value was compared"
        assert self.worst <= tolerance, f"{self.worst:.3g} > {tolerance:g} at {self.where}"

    def compare(self, where: str, value: Tensor, record: Mapping[str, Any]) -> None:
        """A tensor with its record: shape; sum and L2 against the norm; single values against the rms."""
        if "shape" in record:
            assert list(value.shape) == record["shape"], f"{where}: shape {list(value.shape)}"
        flat = value.detach().flatten()
        norm = record["l2"]
        rms = norm / math.sqrt(flat.numel())
        # A sum of n values of random sign is about rms * sqrt(n), which is the norm.
        self.add(f"{where} sum", flat.sum(), record["sum"], norm)
        self.add(f"{where} l2", flat.norm(), norm, norm)
        for key in ("first4", "first8", "first16"):
            for i, expected in enumerate(record.get(key, ())):
                self.add(f"{where}[{i}]", flat[i], expected, rms)
        for i, expected in zip(record.get("index16", ()), record.get("at_index16", ()), strict=True):
            self.add(f"{where}[{i}]", flat[i], expected, rms)


def check_layout(official: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
    """Names, shapes and filled values of an official state dict against a record's ``state_dict`` part."""
    expected = record["state_dict"]
    assert len(official) == expected["entries"]
    assert layout_sha256(official) == expected["layout_sha256"]
    filled = fill(official, expected["gain"], expected["float_entries_left"])
    floating = {n: v for n, v in filled.items() if v.is_floating_point()}
    assert len(floating) - len(expected["float_entries_left"]) == expected["filled"]
    deviation = Deviation()
    values = torch.cat([v.flatten() for n, v in floating.items() if n not in expected["float_entries_left"]])
    deviation.add("sum of filled", values.sum(), expected["sum_of_filled"], expected["l2_of_filled"])
    deviation.add("l2 of filled", values.norm(), expected["l2_of_filled"], expected["l2_of_filled"])
    for sample in expected["samples"]:
        value = filled[sample["name"]].flatten()
        assert role(sample["name"], sample["shape"]) == sample["role"]
        for i, first in enumerate(sample["first3"]):
            deviation.add(f"{sample['name']}[{i}]", value[i], first, abs(first))
        deviation.add(f"{sample['name']} sum", value.sum(), sample["sum"], value.norm().item())
    # Fills are exact; only the order of the summation differs.
    deviation.check(1e-11)


def check_eval(
    model: nn.Module,
    record: Mapping[str, Any],
    run: Callable[[Tensor], tuple[Sequence[Tensor], Sequence[Tensor]]],
) -> Deviation:
    """All eval records. ``run(x)`` returns the outputs and the stage maps, in the order of the record."""
    deviation = Deviation()
    model.eval()
    for i, case in enumerate(record["eval"]):
        with torch.no_grad():
            outputs, stages = run(normal(case["input"]["seed"], case["input"]["shape"]))
        for expected, value in zip(case["outputs"], outputs, strict=True):
            deviation.compare(f"eval[{i}] {expected['name']}", value, expected)
        for expected, value in zip(case.get("stages", ()), stages, strict=True):
            deviation.compare(f"eval[{i}] {expected['name']}", value, expected)
    return deviation


def check_train(
    model: nn.Module,
    record: Mapping[str, Any],
    run: Callable[[Tensor], Sequence[Tensor]],
    names: Mapping[str, str] | None = None,
) -> Deviation:
    """The train record: one forward and backward pass. Parameters are looked up by their official names.

    The model must be filled; ``names`` has the official names of its state's entries where they are others.
    """
    expected = record["train"]
    deviation = Deviation()
    disable_randomness(model)
    model.train()
    x = normal(expected["input"]["seed"], expected["input"]["shape"]).requires_grad_()
    outputs = run(x)
    draw = generator(expected["cotangent_seed"])
    loss = sum((out * torch.from_numpy(draw.standard_normal(tuple(out.shape)))).sum() for out in outputs)
    loss.backward()

    # The loss is a sum of products with unit normal values, so its scale is the norm of the outputs.
    scale = math.sqrt(sum(out["l2"] ** 2 for out in expected["outputs"]))
    deviation.add("loss", loss.detach(), expected["loss"], scale)
    for out, value in zip(expected["outputs"], outputs, strict=True):
        deviation.compare(f"train {out['name']}", value, out)
    deviation.compare("gradient of the input", x.grad, expected["grad_input"])
    names = names or {}
    parameters = {names.get(name, name): value for name, value in model.named_parameters()}
    for item in expected["grad_parameters"]:
        deviation.compare(f"gradient of {item['name']}", parameters[item["name"]].grad, item)
    without = sorted(name for name, p in parameters.items() if p.grad is None)
    assert without == sorted(expected.get("parameters_without_gradient", ()))
    total = math.sqrt(sum(p.grad.square().sum().item() for p in parameters.values() if p.grad is not None))
    total_expected = expected["grad_all_parameters_l2"]
    deviation.add("norm of all gradients", total, total_expected, total_expected)

    modules = {
        names.get(f"{name}.weight", f"{name}.weight").removesuffix(".weight"): module
        for name, module in model.named_modules()
    }
    updated = sum(
        int(value) for name, value in model.state_dict().items() if name.endswith("num_batches_tracked")
    )
    assert updated == expected["batchnorm_layers_updated"]
    for item in expected.get("batchnorm", ()):
        layer = modules[item["name"]]
        assert int(layer.num_batches_tracked) == item["num_batches_tracked"]
        deviation.compare(f"{item['name']}.running_mean", layer.running_mean, item["running_mean"])
        deviation.compare(f"{item['name']}.running_var", layer.running_var, item["running_var"])
    return deviation
