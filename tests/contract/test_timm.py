"""timm's models with their depthwise layers exchanged by hand: outputs, gradients, running statistics."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from support.contract import assert_three_way, require
from torch import nn

import fused_ops
from fused_ops.depthwise.module import check_depthwise

ACTIVATIONS = {nn.SiLU: "silu", nn.ReLU: "relu", nn.Hardswish: "hardswish", nn.Identity: "none"}
# Image sizes at which the deepest map still has more than one value per channel.
MODELS = {
    "efficientnet_b0": 64,
    "mobilenetv3_large_100": 64,
    "convnext_tiny": 64,
    "pvt_v2_b0": 64,
}


def is_depthwise(module: nn.Module) -> bool:
    try:
        check_depthwise(module)
    except ValueError:
        return False
    return True


def exchange(model: nn.Module) -> int:
    """Put fused modules where depthwise convolutions stand, with the norm and activation after them."""
    exchanged = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if not is_depthwise(child) or isinstance(child, fused_ops.DepthwiseConv2d):
                continue
            # The norm that follows: `conv_dw` and `bn1` or `bn2` in timm's inverted residuals.
            following = {"InvertedResidual": "bn2", "DepthwiseSeparableConv": "bn1"}
            norm = following.get(type(parent).__name__)
            if norm is None:
                setattr(parent, name, fused_ops.DepthwiseConv2d.from_stock(child))
            else:
                stock = getattr(parent, norm)
                activation = ACTIVATIONS[type(stock.act)]
                fused = fused_ops.DepthwiseConvBNAct.from_stock(child, stock, activation)
                setattr(parent, name, fused)
                setattr(parent, norm, nn.Identity())
            exchanged += 1
    return exchanged


def outcome(model: nn.Module, x: torch.Tensor, backend: str) -> dict[str, torch.Tensor]:
    """Output, gradients and running statistics, under names that an exchange does not change."""
    x = x.clone().requires_grad_()
    with fused_ops.backend(backend):
        out = model(x)
    out.square().sum().backward()
    results = {"out": out.detach(), "grad x": x.grad}
    # Modules are exchanged in place, so the order of all parameters stays.
    for index, parameter in enumerate(model.parameters()):
        results[f"grad {index}"] = parameter.grad
    running = [value for name, value in model.named_buffers() if "running" in name]
    return results | {f"running {index}": value for index, value in enumerate(running)}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, drop_rate=0.0, drop_path_rate=0.0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.8, 1.2)
                module.bias.uniform_(-0.2, 0.2)
    return model.to(memory_format=torch.channels_last)


def images(size: int, dtype: torch.dtype) -> torch.Tensor:
    values = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return values.to(dtype).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("name", "size"), MODELS.items())
def test_whole_model_in_float64(name, size):
    stock = build(name).double()
    fused = copy.deepcopy(stock)
    assert exchange(fused) >= 8
    x = images(size, torch.float64)
    want, got = outcome(stock, x, "reference"), outcome(fused, x, "auto")
    assert want.keys() == got.keys()
    for key, value in want.items():
        torch.testing.assert_close(got[key], value, rtol=1e-9, atol=1e-9, msg=lambda t, k=key: f"{k}: {t}")
    with torch.no_grad():
        torch.testing.assert_close(fused.eval()(x), stock.eval()(x), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(fused_ops.fold(fused)(x), stock(x), rtol=1e-8, atol=1e-8)


class Recorder:
    """The first input of every distinct kind of depthwise layer of a model, and the layer."""

    def __init__(self, model: nn.Module) -> None:
        self.layers: dict[tuple, tuple[nn.Module, torch.Tensor]] = {}
        for module in model.modules():
            if isinstance(module, (fused_ops.DepthwiseConv2d, fused_ops.DepthwiseConvBNAct)):
                module.register_forward_pre_hook(self.record)

    def record(self, module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        conv = getattr(module, "conv", module)
        key = (conv.kernel_size, conv.stride, module.activation)
        x = arguments[0].detach()
        # The deepest layer of a kind has the smallest map.
        if key not in self.layers or x.numel() < self.layers[key][1].numel():
            self.layers[key] = (module, x.clone(memory_format=torch.preserve_format))


# Triton's interpreter takes half a minute and more for each of the other two.
QUICK = ("convnext_tiny", "pvt_v2_b0")


@pytest.mark.parametrize(
    ("name", "size", "backend"),
    [
        pytest.param(
            name,
            size,
            backend,
            marks=[pytest.mark.extended] if backend == "triton" and name not in QUICK else [],
        )
        for name, size in MODELS.items()
        for backend in ("triton", "cuda")
    ],
)
def test_layers_on_kernels(name, size, backend, request):
    """Every kind of layer of the model, forced onto kernels with an input of the model's own (C1)."""
    require(backend, "cpu", request)
    model = build(name)
    exchange(model)
    recorder = Recorder(model)
    with torch.no_grad():
        model(images(size, torch.float32))
    assert recorder.layers
    # One activation per kernel size in Triton's interpreter, which takes a second per row of a 5x5 layer.
    layers = {key if backend == "cuda" else key[:2]: layer for key, layer in recorder.layers.items()}
    for (kernel, stride, *_), (module, x) in layers.items():
        results = []
        channels = slice(0, 40)
        x = x[:, channels, :8, :8]
        for dtype, chosen in (
            (torch.float32, backend),
            (torch.float32, "reference"),
            (torch.float64, "reference"),
        ):
            layer = narrowed(module, channels).to(dtype)
            try:
                results.append(outcome(layer, x.to(dtype), chosen))
            except fused_ops.BackendUnavailableError as error:
                raise AssertionError(f"kernel {kernel} stride {stride}: {error}") from error
        assert_three_way(*results, torch.float32)


def narrowed(module: nn.Module, channels: slice) -> nn.Module:
    """A copy of a fused layer with the first of its channels: the interpreter is slow."""
    module = copy.deepcopy(module)
    module._forward_pre_hooks.clear()
    conv = getattr(module, "conv", module)
    conv.weight = nn.Parameter(conv.weight[channels].detach())
    conv.bias = None if conv.bias is None else nn.Parameter(conv.bias[channels].detach())
    norm = getattr(module, "bn", None)
    if norm is not None:
        norm.weight, norm.bias = (nn.Parameter(v[channels].detach()) for v in (norm.weight, norm.bias))
        norm.running_mean, norm.running_var = norm.running_mean[channels], norm.running_var[channels]
    return module
