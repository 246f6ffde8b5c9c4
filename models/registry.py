"""The systems of the zoo, their models, and how to build, list and count them.

A model file describes its system once, in a :class:`System`: what was published, what is counted, and which
public code bases its checkpoints may come from. Everything here and in ``checkpoint.py`` reads that.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import timm
import torch
from timm.models._features import FeatureGetterNet
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fused_ops.accelerate import accelerate
from fused_ops.models.arguments import check_image
from fused_ops.models.layouts import OfficialLayout


@dataclass(frozen=True)
class ModelInfo:
    """What is known about one model.

    Attributes:
        params: counted parameters with the default classifier.
        macs: counted multiply-accumulates of convolutions, linear layers and attention products for one image
            of ``input_size`` (no norms, softmax or resizing).
        input_size: (C, H, W) of that image.
        published_params: parameters as published, or None.
        published_macs: multiply-accumulates ("FLOPs") as published, or None.
        published_top1: ImageNet-1k top-1 accuracy in percent as published, or None.
        source: where the published numbers are from.
        note: what a reader of the numbers must know.
        preset: its recipe, where that is not its system's.
    """

    params: int
    macs: int
    input_size: tuple[int, int, int] = (3, 224, 224)
    published_params: float | None = None
    published_macs: float | None = None
    published_top1: float | None = None
    source: str = ""
    note: str = ""
    preset: str = ""


@dataclass(frozen=True)
class System:
    """One published system.

    Attributes:
        name: the paper's name for it.
        paper: title, venue and identifier.
        model_class: class of all its models, or None where they are timm's, accelerated.
        models: by registered name.
        layouts: the public state-dict layouts, the first one being the default of ``official_state_dict``.
        defaults: arguments by model name, where they are not those of the model's own constructor.
        preset: the preset of ``fused-ops train`` with its recipe.
        fused: operators that its models call, those in some of its models only too.
        side_multiple: height and width of images must be multiples of it, where timm's model does not say so.
        card: what is the paper's, the released code's and inferred, where the docstring of the model's module
            does not say that of this system alone.
    """

    name: str
    paper: str
    model_class: type[nn.Module] | None
    models: Mapping[str, ModelInfo]
    layouts: tuple[OfficialLayout, ...] = field(default=())
    defaults: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    preset: str = ""
    fused: tuple[str, ...] = ()
    side_multiple: int = 1
    card: str = ""


_systems: dict[str, System] = {}


def register_system(system: System) -> System:
    """Add a system; its models must be registered with timm under the same names.

    Raises:
        ValueError: for a name that is taken or a model that timm does not know.
    """
    if system.name in _systems:
        raise ValueError(f"a system named {system.name!r} is already registered")
    for name in system.models:
        if not timm.is_model(name):
            raise ValueError(f"model {name!r} of {system.name} is not registered with timm")
        if any(name in other.models for other in _systems.values()):
            raise ValueError(f"model {name!r} of {system.name} is already registered")
    _systems[system.name] = system
    return system


def systems() -> tuple[System, ...]:
    """All systems, by name."""
    return tuple(_systems[name] for name in sorted(_systems))


def find_system(name: str) -> System:
    """The system of a model name.

    Raises:
        ValueError: for an unknown name, with the nearest known ones.
    """
    for system in _systems.values():
        if name in system.models:
            return system
    known = list_models()
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    hint = f"nearest: {', '.join(near)}" if near else "fused_ops.models.list_models() names all"
    raise ValueError(f"name must be a model of fused_ops.models, got {name!r}; {hint}")


def system_of(model: nn.Module) -> System:
    """The system of a model.

    Raises:
        ValueError: if it belongs to none.
    """
    # timm's classes serve several systems; the name that the model was built under says which.
    name = (getattr(model, "pretrained_cfg", None) or {}).get("architecture", "")
    for system in _systems.values():
        if system.model_class is None and name in system.models:
            return system
        if system.model_class is not None and isinstance(model, system.model_class):
            return system
    raise ValueError(f"model must be one of fused_ops.models, got {type(model).__name__}")


def preset_of(name: str) -> str:
    """The preset of ``fused-ops train`` with the recipe of a model.

    Raises:
        ValueError: for an unknown name, with the nearest known ones.
    """
    system = find_system(name)
    return system.models[name].preset or system.preset


def list_models(filter: str = "") -> list[str]:
    """Names of the zoo's models in natural order.

    Args:
        filter: a pattern such as ``dsnet_*star``; a part of a name without wildcards; empty for all.
    """
    names = [name for system in _systems.values() for name in system.models]
    if filter:
        pattern = filter if any(c in filter for c in "*?[") else f"*{filter}*"
        names = fnmatch.filter(names, pattern)
    return sorted(names, key=lambda name: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", name)])


def create_model(name: str, pretrained: bool = False, checkpoint: Any = None, **kwargs: Any) -> nn.Module:
    """Build a model of the zoo.

    Args:
        name: one of :func:`list_models`.
        pretrained: no weights are published under our names, so this raises; use ``checkpoint``.
        checkpoint: a path or state dict for :func:`fused_ops.models.load_checkpoint`.
        **kwargs: for the model: ``num_classes``, ``in_chans``, ``drop_path_rate``, ``device``, ``dtype``
            and others, and timm's ``features_only`` and ``out_indices``. Every model takes
            ``drop_path_rate=0``; those without stochastic depth take no other rate.

    Raises:
        ValueError: for an unknown name, with the nearest known ones, for ``pretrained=True``, and for a
            checkpoint that does not fit.
    """
    system = find_system(name)
    if pretrained:
        raise ValueError(
            f"pretrained=True: no weights of {name} are hosted; pass those of the public code as checkpoint="
        )
    kwargs = {**system.defaults.get(name, {}), **kwargs}
    try:
        model = timm.create_model(name, **kwargs)
    except TypeError as error:
        if kwargs.get("drop_path_rate") != 0 or "drop_path_rate" not in str(error):
            raise
        del kwargs["drop_path_rate"]
        model = timm.create_model(name, **kwargs)
    if checkpoint is not None:
        _load(model, checkpoint, name, kwargs)
    if system.model_class is None:
        accelerate(model)
    if system.side_multiple > 1:
        model.register_forward_pre_hook(
            partial(_check_input, kwargs.get("in_chans", 3), system.side_multiple)
        )
    return model


def _check_input(in_chans: int, side_multiple: int, model: nn.Module, inputs: tuple[Any, ...]) -> None:
    check_image(inputs[0], in_chans, side_multiple, multiple=True)


def _load(model: nn.Module, checkpoint: Any, name: str, kwargs: Mapping[str, Any]) -> None:
    from fused_ops.models.checkpoint import load_checkpoint

    if not kwargs.get("features_only"):
        load_checkpoint(model, checkpoint)
        return
    # A feature extractor has lost the last layers; the checkpoint is checked against the whole model.
    whole_kwargs = {k: v for k, v in kwargs.items() if k not in ("features_only", "out_indices")}
    whole = timm.create_model(name, **whole_kwargs)
    load_checkpoint(whole, checkpoint)
    # Some have the model inside, others its layers, with underscores where names had dots.
    state = {key.replace(".", "_"): value for key, value in whole.state_dict().items()}
    inner = model.model if isinstance(model, FeatureGetterNet) else model
    inner.load_state_dict({key: state[key.replace(".", "_")] for key in inner.state_dict()})


def count_params(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, input_size: tuple[int, ...]) -> int:
    """Multiply-accumulates of convolutions, linear layers and attention products for one image.

    Nothing is computed: the model runs on stand-ins without data, so it may be on any device, meta too. The
    plain form of attention is forced since PyTorch 2.11 does not count the fused one of a CPU.

    Args:
        model: any model of one image tensor.
        input_size: (C, H, W).
    """
    training = model.training
    model.eval()
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    try:
        with torch.no_grad(), FakeTensorMode(), sdpa_kernel(SDPBackend.MATH):
            state = {n: torch.empty(t.shape, dtype=t.dtype, device="cpu") for n, t in tensors.items()}
            image = torch.empty(1, *input_size, dtype=next(model.parameters()).dtype, device="cpu")
            with FlopCounterMode(display=False) as counter:
                torch.func.functional_call(model, state, (image,))
    finally:
        model.train(training)
    return counter.get_total_flops() // 2


def model_table(filter: str = "") -> list[dict[str, Any]]:
    """One row per model: name, system, what is counted, what is published."""
    rows = []
    for name in list_models(filter):
        system = find_system(name)
        info = system.models[name]
        rows.append(
            {
                "name": name,
                "system": system.name,
                "params": info.params,
                "macs": info.macs,
                "input_size": list(info.input_size),
                "published_params": info.published_params,
                "published_macs": info.published_macs,
                "published_top1": info.published_top1,
                "source": info.source,
                "note": info.note,
                "inferred": "inferred" in info.note,
                "checkpoints": [f"{layout.framework}: {layout.source}" for layout in system.layouts],
                "fused": list(system.fused),
                "preset": preset_of(name),
                "paper": system.paper,
            }
        )
    return rows
