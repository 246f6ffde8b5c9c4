"""Models by name, their input, and starting weights."""

from __future__ import annotations

import timm
import torch
from timm.data import resolve_model_data_config
from torch import nn

from .checkpoint import weights_metadata
from .settings import UsageError, nearest

TIMM = "timm/"


def create_model(name: str, num_classes: int, drop_path: float = 0.0, img_size: int = 0) -> nn.Module:
    """A model of the zoo, or of timm if the name begins with `timm/`. Raises `UsageError` if unknown."""
    own = name.removeprefix(TIMM)
    if own != name:
        create, known = timm.create_model, [TIMM + other for other in timm.list_models()]
    else:
        from fused_ops import models

        create, known = models.create_model, list(models.list_models())
    if name.split(".")[0] not in known:
        raise UsageError(f"--model {name}: no such model; {nearest(name, known)}")
    arguments: dict[str, object] = {"num_classes": num_classes}
    # Every model of the zoo has it, not every one of timm; left out, the model's own default would apply.
    if drop_path or own == name:
        arguments["drop_path_rate"] = drop_path
    config = timm.get_pretrained_cfg(own) if timm.is_model(own) else None
    if img_size and config is not None and config.fixed_input_size:
        arguments["img_size"] = img_size
    try:
        return create(own, **arguments)
    except TypeError as error:
        if "drop_path_rate" not in str(error):
            raise
        raise UsageError(f"--drop-path {drop_path}: {name} has no stochastic depth; use 0") from None


def notes_on(name: str, preset: str) -> list[str]:
    """What to say of a model of the zoo before it is trained: what is inferred, and its own recipe."""
    if name.startswith(TIMM):
        return []
    from fused_ops.models.registry import find_system, preset_of

    about = find_system(name).models[name].note
    notes = [f"{name}: {about}"] if "inferred" in about else []
    # The presets of built-in data are for a first try, whatever the model.
    if preset == "imagenet" and preset_of(name) != preset:
        notes.append(f"the recipe of {name} is --preset {preset_of(name)}")
    return notes


def input_size(model: nn.Module) -> int:
    """Side of the square input that the model is made for."""
    return resolve_model_data_config(model)["input_size"][-1]


@torch.no_grad()
def _try_size(model: nn.Module, size: int) -> str:
    """Why the model does not take a square of this size; empty if it does."""
    try:
        output = model(torch.zeros(2, 3, size, size))
    except (RuntimeError, ValueError, AssertionError, ZeroDivisionError) as error:
        return (str(error).splitlines() or ["it fails"])[0]
    if not isinstance(output, torch.Tensor) or output.ndim != 2:
        return "it returns no (images, classes) tensor"
    return "" if torch.isfinite(output).all() else "its output is not finite"


def check_input(model: nn.Module, name: str, size: int) -> None:
    """Run the model once in evaluation mode. Raises `UsageError` if the image is too small for it."""
    was_training = model.training
    model.eval()
    try:
        stride = max(
            stage["reduction"] for stage in getattr(model, "feature_info", None) or [{"reduction": 1}]
        )
        reason = (
            _try_size(model, size) if size >= stride else f"its last feature map is {stride} times smaller"
        )
        if not reason:
            return
        own = input_size(model)
        working = (s for s in range(stride, own + 1, max(stride, 8)) if s != size and not _try_size(model, s))
        smallest = next(working, own)
        relation = "too small" if size < smallest else "not accepted"
        raise UsageError(
            f"--img-size {size}: {relation} for {name} ({reason}); smallest that works: {smallest}, "
            f"its own: {own}"
        )
    finally:
        model.train(was_training)


def load_weights(flag: str, path: str, model: nn.Module, name: str, new_classifier: bool = False) -> None:
    """Load a weights file into a model; `new_classifier` allows for another class count.

    Raises `UsageError` if the file is another model's or does not fit.
    """
    about = weights_metadata(flag, path)
    own = name.removeprefix(TIMM).split(".")[0]
    if about.get("model", own) != own:
        raise UsageError(f"{flag} {path}: holds weights of {about['model']}, not of --model {name}")
    try:
        _load(model, path, name, new_classifier and _differs(about, model))
    except (ValueError, RuntimeError, KeyError) as error:
        raise UsageError(f"{flag} {path}: does not fit {name}: {' '.join(str(error).split())}") from None


def _differs(about: dict[str, str], model: nn.Module) -> bool:
    """Whether the class count is another one; files that do not tell are published ones, of ImageNet."""
    return int(about.get("num_classes", 1000)) != model.num_classes


def _load(model: nn.Module, path: str, name: str, new_classifier: bool) -> None:
    if not name.startswith(TIMM):
        from fused_ops.models import load_checkpoint

        load_checkpoint(model, path, new_classifier=new_classifier)
        return
    state, own = timm.models.load_state_dict(path), model.state_dict()
    if new_classifier:
        classifier = f"{model.pretrained_cfg['classifier']}."
        state |= {key: value for key, value in own.items() if key.startswith(classifier)}
    model.load_state_dict(state)
