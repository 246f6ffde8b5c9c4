"""Models of timm and torchvision, small enough for a step in float64, and everything a step leaves behind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, nn

import fused_ops

SIZE = 64


def build(name: str) -> nn.Module:
    """A model in float64 by timm's name, or torchvision's after ``torchvision/``; its norms do something."""
    torch.manual_seed(0)
    own = name.removeprefix("torchvision/")
    if own == name:
        size = timm.get_pretrained_cfg(name)
        arguments: dict[str, Any] = {"img_size": SIZE} if size is not None and size.fixed_input_size else {}
        model = timm.create_model(name, num_classes=3, **arguments)
    else:
        dense = any(word in own for word in ("rcnn", "ssd", "deeplab", "lraspp", "retina"))
        arguments = {"weights_backbone": None} if dense else {}
        if "rcnn" in own:
            arguments |= {"min_size": SIZE, "max_size": SIZE, "box_detections_per_img": 5}
        model = torchvision.models.get_model(own, weights=None, num_classes=3, **arguments)
        if "ssd" in own:
            # Its own 320x320 would only take longer.
            model.transform.fixed_size = (SIZE, SIZE)
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "running_mean") and module.running_mean is not None:
                module.running_mean.uniform_(-0.1, 0.1)
                module.running_var.uniform_(0.8, 1.2)
                if module.weight is not None:
                    module.weight.uniform_(0.8, 1.2)
                    module.bias.uniform_(-0.2, 0.2)
    return model.double()


def is_detector(model: nn.Module) -> bool:
    return hasattr(model, "roi_heads") or type(model).__name__ == "SSD"


def arguments_for(model: nn.Module) -> tuple[list[Tensor], tuple[Any, ...]]:
    """The images (leaves that want gradients), and what the model is called with."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, SIZE, SIZE, generator=generator, dtype=torch.float64)
    if not is_detector(model):
        images.requires_grad_()
        return [images], (images,)
    leaves = [image.clone().requires_grad_() for image in images.sigmoid()]
    box = torch.tensor([[8.0, 8.0, 40.0, 48.0]], dtype=torch.float64)
    targets = [{"boxes": box, "labels": torch.tensor([1])} for _ in leaves]
    return leaves, (leaves, targets)


def tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def training_step(model: nn.Module) -> dict[str, Tensor]:
    """Outputs, gradients and state after one forward and backward pass in training mode."""
    model.train()
    leaves, arguments = arguments_for(model)
    # Dropout, stochastic depth and the detectors' sampling draw the same numbers in every model.
    torch.manual_seed(2)
    outputs = tensors(model(*arguments))
    loss = sum(out.square().mean() for out in outputs if out.requires_grad)
    loss.backward()
    results = {f"out {index}": out.detach() for index, out in enumerate(outputs)}
    results |= {f"grad of image {index}": leaf.grad for index, leaf in enumerate(leaves)}
    results |= {f"grad of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return results | {f"state {name}": value.clone() for name, value in model.state_dict().items()}


def module_step(
    model: nn.Module,
    shape: Sequence[int],
    backend: str = "reference",
    seed: int = 0,
    call: Callable[[nn.Module, Tensor], Tensor] = lambda model, x: model(x),
) -> dict[str, Tensor]:
    """Output, gradients and buffers of a forward and backward pass of a module, which stays as it was."""
    before = [buffer.clone() for buffer in model.buffers()]
    dtype = next(model.parameters()).dtype
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    model.zero_grad()
    torch.manual_seed(seed)
    with fused_ops.backend(backend):
        out = call(model, x)
        (out * torch.randn(out.shape, generator=generator, dtype=torch.float64).to(dtype)).sum().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    buffers = {name: b.clone() for name, b in model.named_buffers() if b.is_floating_point()}
    for buffer, value in zip(model.buffers(), before, strict=True):
        buffer.copy_(value)
    return {"out": out.detach(), "x": x.grad, **gradients, **buffers}


def inference(model: nn.Module) -> dict[str, Tensor]:
    model.eval()
    _, arguments = arguments_for(model)
    with torch.no_grad():
        return {f"out {index}": out for index, out in enumerate(tensors(model(*arguments[:1])))}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(
            got[name], value, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
        )
