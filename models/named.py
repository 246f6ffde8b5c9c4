"""Models by name, from the zoo, timm or torchvision, and an input for them, as command lines ask for."""

from __future__ import annotations

import argparse
from typing import Any

import timm
import torch
from torch import Tensor, nn

from fused_ops.models import registry

TIMM, TORCHVISION = "timm/", "torchvision/"


def create_named(name: str, **arguments: Any) -> nn.Module:
    """A model with random weights.

    Args:
        name: a model of the zoo, of timm (as ``timm/NAME`` where the zoo has the name too), or
            ``torchvision/NAME``.
        **arguments: for the model.

    Raises:
        ValueError: if there is none of the name.
    """
    check_named(name)
    if name.startswith(TORCHVISION):
        import torchvision

        own = name.removeprefix(TORCHVISION)
        families = (torchvision.models.detection, torchvision.models.segmentation)
        if any(own in torchvision.models.list_models(family) for family in families):
            # These would fetch their backbone's weights.
            arguments["weights_backbone"] = None
        return torchvision.models.get_model(own, weights=None, **arguments)
    if name in registry.list_models():
        return registry.create_model(name, **arguments)
    return timm.create_model(name.removeprefix(TIMM), **arguments)


def check_named(name: str) -> None:
    """Raise ValueError unless :func:`create_named` knows the name."""
    if name.startswith(TORCHVISION):
        import torchvision

        if name.removeprefix(TORCHVISION) not in torchvision.models.list_models():
            raise ValueError(f"torchvision {torchvision.__version__} has no model {name!r}")
    elif name.startswith(TIMM):
        if not timm.is_model(name.removeprefix(TIMM)):
            raise ValueError(f"timm {timm.__version__} has no model {name!r}; timm.list_models() names all")
    elif not timm.is_model(name):
        # Says which names of the zoo are near.
        registry.find_system(name)


def input_size(model: nn.Module, size: int | None = None) -> tuple[int, int, int]:
    """(C, H, W) of the model's own input (224 where it does not say), or with height and width ``size``."""
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    channels, height, width = config.get("input_size", (3, 224, 224))
    return channels, size or height, size or width


def add_input_options(parser: argparse.ArgumentParser) -> None:
    """Options of commands that feed a model one batch, for :func:`prepare`."""
    parser.add_argument("--batch", type=int, default=2, help="images per batch (default 2)")
    parser.add_argument("--size", type=int, help="height and width (default: the model's own)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        default="float32",
        help="of input and parameters",
    )
    parser.add_argument("--layout", choices=("channels_last", "nchw"), default="channels_last")
    parser.add_argument("--eval", action="store_true", help="evaluation mode without gradients")


def check_input_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """End the command with a message where a number is out of range."""
    for name in ("batch", "size"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name}={value} is not allowed; it must be at least 1")


def prepare(
    name: str, options: argparse.Namespace, device: str | None = None
) -> tuple[nn.Module, Tensor, str]:
    """The model in its mode, an uninitialised batch for it, and both in words; on the GPU if there is one.

    Raises:
        ValueError: if there is no model of the name.
    """
    model = create_named(name)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    shape = (options.batch, *input_size(model, options.size))
    dtype = getattr(torch, options.dtype)
    memory_format = torch.channels_last if options.layout == "channels_last" else torch.contiguous_format
    model = model.to(device=device, dtype=dtype, memory_format=memory_format).train(not options.eval)
    image = torch.empty(shape, device=device, dtype=dtype).contiguous(memory_format=memory_format)
    mode = "evaluation" if options.eval else "training"
    sizes = "x".join(map(str, shape))
    return model, image, f"{name}, {sizes} {options.dtype} {options.layout}, {mode}"
