"""Squeeze-and-excitation modules exchanged: on the kernels, under hooks, when copied, where declined."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from accelerate_helpers import assert_same
from torch import nn

import fused_ops

timm_layers = pytest.importorskip("timm.layers")
from timm.models._efficientnet_blocks import SqueezeExcite  # noqa: E402
from torchvision.ops.misc import SqueezeExcitation  # noqa: E402

MODULES = {
    "timm": lambda: SqueezeExcite(12, rd_channels=5, act_layer=nn.SiLU),
    "timm hard": lambda: SqueezeExcite(12, rd_channels=5, gate_layer="hard_sigmoid"),
    "timm SEModule": lambda: timm_layers.SEModule(12, rd_channels=5, norm_layer=nn.BatchNorm2d),
    "timm effective": lambda: timm_layers.EffectiveSEModule(12, gate_layer="sigmoid"),
    "torchvision": lambda: SqueezeExcitation(12, 5, scale_activation=nn.Hardsigmoid),
}


def step(model: nn.Module, backend: str = "reference", seed: int = 0) -> dict[str, torch.Tensor]:
    dtype = next(model.parameters()).dtype
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 12, 5, 7, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    model.zero_grad()
    with fused_ops.backend(backend):
        out = model(x)
        (out * torch.randn(out.shape, generator=generator, dtype=torch.float64).to(dtype)).sum().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    return {"out": out.detach(), "x": x.grad, **gradients}


@pytest.mark.parametrize("name", MODULES)
def test_equals_stock_and_comes_out_again(name):
    stock = MODULES[name]().double()
    fused = copy.deepcopy(stock)
    kind = type(fused)
    (row,) = fused_ops.accelerate(fused).results
    assert (row.exchanged, row.kind, row.members) == (True, "squeeze_excite", ("",))
    assert_same(step(fused), step(stock))
    with fused_ops.core.backends.record() as choices:
        step(fused)
    assert [choice.operator for choice in choices] == ["pool_channels", "gate_scale"]
    assert fused_ops.accelerate(fused).results[0].reason == "exchanged before"
    for twin in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert_same(step(twin), step(stock))
    assert fused_ops.restore(fused) == 1
    assert type(fused) is kind
    assert_same(step(fused), step(stock))


@pytest.mark.parametrize("name", MODULES)
def test_on_the_kernels(name):
    stock = MODULES[name]()
    exact = step(copy.deepcopy(stock).double())
    eager = step(stock)
    fused_ops.accelerate(stock)
    for key, value in step(stock, "triton").items():
        error, eager_error = ((each.double() - exact[key]).norm() for each in (value, eager[key]))
        assert error <= 2 * eager_error + 1e-6 * exact[key].norm(), key


@pytest.mark.parametrize("path", ["", "gate"])
def test_a_hook_gives_the_stock_module_back(path):
    model = MODULES["timm"]().double()
    fused_ops.accelerate(model)
    calls = []
    handle = model.get_submodule(path).register_forward_hook(lambda *_: calls.append(1))
    with fused_ops.core.backends.record() as choices:
        step(model)
    assert (len(calls), choices) == (1, [])
    handle.remove()
    # Layers in between are called by both, so a hook on one sees what it always did.
    model.conv_reduce.register_forward_hook(lambda *_: calls.append(1))
    with fused_ops.core.backends.record() as choices:
        step(model)
    assert (len(calls), len(choices)) == (2, 2)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: SqueezeExcite(12, gate_layer="tanh"), "its gate is a Tanh"),
        (lambda: timm_layers.SEModule(12, add_maxpool=True), "pools the maximum too"),
    ],
)
def test_declined(make, reason):
    model = make().double()
    stock = copy.deepcopy(model)
    (row,) = fused_ops.accelerate(model).results
    assert (row.exchanged, row.reason) == (False, reason)
    assert type(model) is type(stock)
    assert_same(step(model), step(stock))


def test_a_gate_exchanged_for_another_later():
    model = MODULES["timm"]().double()
    fused_ops.accelerate(model)
    model.gate = nn.Tanh()
    stock = copy.deepcopy(model)
    fused_ops.restore(stock)
    assert_same(step(model), step(stock))


def test_tracers_see_the_stock_module():
    model = nn.Sequential(MODULES["timm"]()).double()
    fused_ops.accelerate(model)
    traced = torch.fx.symbolic_trace(model)
    x = torch.randn(2, 12, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(traced(x), model(x))


def test_compiles_whole():
    model = MODULES["timm"]().eval()
    fused_ops.accelerate(model)
    x = torch.randn(2, 12, 4, 4)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), model(x))
