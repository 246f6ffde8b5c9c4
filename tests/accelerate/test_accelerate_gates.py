"""Gates exchanged: on the kernels, under hooks, when copied, where declined."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from accelerate_helpers import assert_same, module_step
from torch import nn

import fused_ops

timm_layers = pytest.importorskip("timm.layers")
from timm.layers.cbam import CbamModule, LightCbamModule  # noqa: E402
from timm.models._efficientnet_blocks import SqueezeExcite  # noqa: E402
from torchvision.ops.misc import SqueezeExcitation  # noqa: E402

MODULES = {
    "timm": lambda: SqueezeExcite(12, rd_channels=5, act_layer=nn.SiLU),
    "timm hard": lambda: SqueezeExcite(12, rd_channels=5, gate_layer="hard_sigmoid"),
    "timm SEModule": lambda: timm_layers.SEModule(12, rd_channels=5, norm_layer=nn.BatchNorm2d),
    "timm effective": lambda: timm_layers.EffectiveSEModule(12, gate_layer="sigmoid"),
    "timm mean and max": lambda: timm_layers.SEModule(12, rd_channels=5, add_maxpool=True),
    "timm ECA": lambda: timm_layers.EcaModule(12),
    "timm ECA of two layers": lambda: timm_layers.EcaModule(12, use_mlp=True, rd_channels=3),
    "timm circular ECA": lambda: timm_layers.CecaModule(12, gate_layer="hard_sigmoid"),
    "timm CBAM": lambda: CbamModule(12, rd_channels=4),
    "timm light CBAM": lambda: LightCbamModule(12, rd_channels=4),
    "timm global context": lambda: timm_layers.GlobalContext(12, rd_channels=4),
    "timm global context, added": lambda: timm_layers.GlobalContext(
        12, rd_channels=4, use_attn=False, fuse_add=True
    ),
    "torchvision": lambda: SqueezeExcitation(12, 5, scale_activation=nn.Hardsigmoid),
}
SHAPE = (3, 12, 5, 7)
# The operators of one call, where they are not a mean over the positions and the scaling.
OPERATORS = {
    "timm CBAM": ["pool_channels", "pool_positions", "gate_scale"],
    "timm light CBAM": ["pool_channels", "pool_positions", "gate_scale"],
    "timm global context": ["context_pool", "gate_scale"],
}


def build(name: str) -> nn.Module:
    torch.manual_seed(1)
    model = MODULES[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


@pytest.mark.parametrize("name", MODULES)
def test_equals_stock_and_comes_out_again(name):
    stock = build(name).double()
    fused = copy.deepcopy(stock)
    kind = type(fused)
    (row,) = fused_ops.accelerate(fused).results
    assert (row.exchanged, row.kind, row.members) == (True, "gate", ("",))
    assert_same(module_step(fused, SHAPE), module_step(stock, SHAPE))
    with fused_ops.core.backends.record() as choices:
        module_step(fused, SHAPE)
    assert [choice.operator for choice in choices] == OPERATORS.get(name, ["pool_channels", "gate_scale"])
    assert fused_ops.accelerate(fused).results[0].reason == "exchanged before"
    for twin in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert_same(module_step(twin, SHAPE), module_step(stock, SHAPE))
    assert fused_ops.restore(fused) == 1
    assert type(fused) is kind
    assert_same(module_step(fused, SHAPE), module_step(stock, SHAPE))


@pytest.mark.parametrize("name", MODULES)
def test_on_the_kernels(name):
    stock = build(name)
    exact = module_step(copy.deepcopy(stock).double(), SHAPE)
    eager = module_step(stock, SHAPE)
    fused_ops.accelerate(stock)
    for key, value in module_step(stock, SHAPE, "triton").items():
        error, eager_error = ((each.double() - exact[key]).norm() for each in (value, eager[key]))
        assert error <= 2 * eager_error + 1e-6 * exact[key].norm(), key


@pytest.mark.parametrize("path", ["", "gate"])
def test_a_hook_gives_the_stock_module_back(path):
    model = MODULES["timm"]().double()
    fused_ops.accelerate(model)
    calls = []
    handle = model.get_submodule(path).register_forward_hook(lambda *_: calls.append(1))
    with fused_ops.core.backends.record() as choices:
        module_step(model, SHAPE)
    assert (len(calls), choices) == (1, [])
    handle.remove()
    # Layers in between are called by both, so a hook on one sees what it always did.
    model.conv_reduce.register_forward_hook(lambda *_: calls.append(1))
    with fused_ops.core.backends.record() as choices:
        module_step(model, SHAPE)
    assert (len(calls), len(choices)) == (2, 2)


def mixed_gates() -> nn.Module:
    model = CbamModule(12)
    model.spatial.gate = nn.Hardsigmoid()
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: SqueezeExcite(12, gate_layer="tanh"), "its gate is a Tanh"),
        (
            mixed_gates,
            "a part of it has hooks or is of another kind",
        ),
        (lambda: CbamModule(12, gate_layer="tanh"), "its gate is a Tanh"),
    ],
)
def test_declined(make, reason):
    model = make().double()
    stock = copy.deepcopy(model)
    (row,) = fused_ops.accelerate(model).results
    assert (row.exchanged, row.reason) == (False, reason)
    assert type(model) is type(stock)
    assert_same(module_step(model, SHAPE), module_step(stock, SHAPE))


def test_a_gate_exchanged_for_another_later():
    model = MODULES["timm"]().double()
    fused_ops.accelerate(model)
    model.gate = nn.Tanh()
    stock = copy.deepcopy(model)
    fused_ops.restore(stock)
    assert_same(module_step(model, SHAPE), module_step(stock, SHAPE))


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
