"""MLPs exchanged, with the norm before them: equality, hooks, dropout, copies, what is declined."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from accelerate_helpers import assert_same, module_step
from torch import nn

import fused_ops

timm_layers = pytest.importorskip("timm.layers")
from timm.models.convnext import ConvNeXtBlock  # noqa: E402
from timm.models.swin_transformer import SwinTransformerBlock  # noqa: E402
from timm.models.vision_transformer import Block  # noqa: E402
from torchvision.models.convnext import CNBlock  # noqa: E402
from torchvision.ops.misc import MLP  # noqa: E402


class TokenMLP(nn.Module):
    """LayerNorm and timm's MLP, as every transformer of it has them."""

    def __init__(self, drop: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(12)
        self.mlp = timm_layers.Mlp(12, 24, drop=drop)

    def forward(self, x):
        return x + self.mlp(self.norm(x))


def map_mlp(norm: nn.Module) -> nn.Module:
    return nn.Sequential(norm, timm_layers.ConvMlp(12, 24, act_layer=nn.SiLU))


# The model, the shape of its input, and the modules that the operator computes.
MODELS = {
    "timm": (TokenMLP, (2, 5, 12), {"mlp.fc1", "norm", "mlp.act", "mlp.fc2", "mlp.drop1"}),
    "timm ViT": (
        lambda: Block(12, 2, mlp_ratio=2, init_values=0.1),
        (2, 5, 12),
        {"mlp.fc1", "norm2", "mlp.act", "mlp.fc2", "mlp.drop1"},
    ),
    "timm Swin": (
        lambda: SwinTransformerBlock(12, (4, 4), num_heads=2, window_size=2, mlp_ratio=2),
        (2, 4, 4, 12),
        {"mlp.fc1", "norm2", "mlp.act", "mlp.fc2", "mlp.drop1"},
    ),
    "timm ConvNeXt": (
        lambda: ConvNeXtBlock(12, kernel_size=3, ls_init_value=0.1),
        (2, 12, 4, 5),
        {"mlp.fc1", "norm", "mlp.act", "mlp.fc2", "mlp.drop1"},
    ),
    "torchvision ConvNeXt": (
        lambda: CNBlock(12, 0.1, 0.0),
        (2, 12, 4, 5),
        {"block.2", "block.3", "block.4", "block.5"},
    ),
    "torchvision MLP": (lambda: MLP(12, [24, 12]), (3, 12), {"0", "1", "2", "3"}),
    "maps, LayerNorm": (
        lambda: map_mlp(timm_layers.LayerNorm2d(12)),
        (2, 12, 4, 5),
        {"0", "1.fc1", "1.act", "1.fc2", "1.drop"},
    ),
    "maps, BatchNorm": (
        lambda: map_mlp(nn.BatchNorm2d(12)),
        (2, 12, 4, 5),
        {"0", "1.fc1", "1.act", "1.fc2", "1.drop"},
    ),
    # A norm with an activation of its own stays outside.
    "maps, norm outside": (
        lambda: map_mlp(timm_layers.BatchNormAct2d(12)),
        (2, 12, 4, 5),
        {"1.fc1", "1.act", "1.fc2", "1.drop"},
    ),
}


def build(name: str) -> nn.Module:
    torch.manual_seed(2)
    model = MODELS[name][0]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def mlp_row(report):
    (row,) = (row for row in report.results if row.kind == "mlp")
    return row


@pytest.mark.parametrize("name", MODELS)
def test_equals_stock_and_comes_out_again(name):
    _, shape, members = MODELS[name]
    stock = build(name).double()
    fused = copy.deepcopy(stock)
    kinds = {path: type(module) for path, module in fused.named_modules()}
    row = mlp_row(fused_ops.accelerate(fused))
    assert row.exchanged, row.reason
    assert set(row.members) == members
    with fused_ops.core.backends.record() as choices:
        got = module_step(fused, shape)
    assert [choice.operator for choice in choices].count("feed_forward") == 1
    assert_same(got, module_step(stock, shape))
    assert mlp_row(fused_ops.accelerate(fused)).reason == "exchanged before"
    for twin in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert_same(module_step(twin, shape, seed=1), module_step(copy.deepcopy(stock), shape, seed=1))
    assert_same(module_step(fused.eval(), shape), module_step(copy.deepcopy(stock).eval(), shape))
    fused_ops.restore(fused.train())
    assert {path: type(module) for path, module in fused.named_modules()} == kinds


@pytest.mark.parametrize("name", ["timm", "timm Swin", "timm ConvNeXt", "maps, BatchNorm"])
def test_on_the_kernels(name):
    """C1, in float32: no further from float64 than twice what the stock modules are."""
    _, shape, _ = MODELS[name]
    stock = build(name)
    exact = module_step(copy.deepcopy(stock).double(), shape)
    eager = module_step(copy.deepcopy(stock), shape)
    fused_ops.accelerate(stock)
    with fused_ops.core.backends.record() as choices:
        got = module_step(stock, shape, "triton")
    assert all(choice.backend == "triton" for choice in choices)
    for key, value in got.items():
        error, eager_error = ((each.double() - exact[key]).norm() for each in (value, eager[key]))
        assert error <= 2 * eager_error + 1e-6 * exact[key].norm(), key


def test_dropout_in_between_runs_the_stock_modules():
    """Between the layers it cannot be left out; in evaluation there is none."""
    shape = (2, 5, 12)
    torch.manual_seed(0)
    stock = TokenMLP(drop=0.5).double()
    fused = copy.deepcopy(stock)
    assert mlp_row(fused_ops.accelerate(fused)).exchanged
    outs = []
    for model in (stock, fused):
        outs.append(module_step(model, shape))
    assert_same(outs[1], outs[0])
    with fused_ops.core.backends.record() as choices:
        module_step(fused, shape)
        assert not choices
        module_step(fused.eval(), shape)
    assert [choice.operator for choice in choices] == ["feed_forward"]


@pytest.mark.parametrize("path", ["norm", "mlp.fc1", "mlp.act", "mlp.fc2"])
def test_a_hook_gives_the_stock_modules_back(path):
    shape = (2, 5, 12)
    stock = build("timm").double()
    fused = copy.deepcopy(stock)
    fused_ops.accelerate(fused)
    seen = [[], []]
    for model, outputs in zip((stock, fused), seen, strict=True):
        model.get_submodule(path).register_forward_hook(
            lambda m, i, o, found=outputs: found.append(o.detach())
        )
    with fused_ops.core.backends.record() as choices:
        assert_same(module_step(fused, shape), module_step(stock, shape))
    assert not choices
    torch.testing.assert_close(seen[1], seen[0])


def test_a_norm_that_others_read_stays_outside():
    """Two users of the norm's output: it runs as it is, and the MLP without it."""

    class Parallel(TokenMLP):
        def forward(self, x):
            z = self.norm(x)
            return z + self.mlp(z)

    torch.manual_seed(0)
    stock = Parallel().double()
    fused = copy.deepcopy(stock)
    assert "norm" not in mlp_row(fused_ops.accelerate(fused)).members
    assert_same(module_step(fused, (2, 5, 12)), module_step(stock, (2, 5, 12)))


def test_what_is_declined_and_what_is_no_mlp():
    wide = timm_layers.Mlp(192, 384)
    row = mlp_row(fused_ops.accelerate(wide))
    assert (row.exchanged, row.reason) == (False, "192 channels; up to 128, hidden values stay on chip")
    patched = timm_layers.Mlp(12, 24)
    patched.fc2.forward = lambda x: x[..., :12]
    row = mlp_row(fused_ops.accelerate(patched))
    assert (row.exchanged, row.reason) == (False, "a layer has a forward of its own")
    hooked = TokenMLP()
    hooked.norm.register_forward_hook(lambda *_: None)
    row = mlp_row(fused_ops.accelerate(hooked))
    assert (row.exchanged, row.reason) == (True, "its norm has hooks, and stays outside")
    hooked.mlp.act.register_forward_hook(lambda *_: None)
    fused_ops.restore(hooked)
    row = mlp_row(fused_ops.accelerate(hooked))
    assert (row.exchanged, row.reason) == (False, "has hooks, which would see the whole chain's output")
    parametrized = nn.utils.parametrizations.weight_norm(nn.Linear(12, 24))
    others = (
        nn.Sequential(parametrized, nn.ReLU(), nn.Linear(24, 12)),
        nn.Sequential(nn.Linear(12, 4), nn.ReLU(), nn.Linear(4, 12)),
        nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 6)),
        nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 12)),
        nn.Sequential(nn.Conv2d(12, 24, 3), nn.ReLU(), nn.Conv2d(24, 12, 1)),
        nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Conv2d(24, 12, 1)),
    )
    for model in others:
        assert not fused_ops.accelerate(model).results, model
    shared = nn.Linear(12, 12)
    assert not fused_ops.accelerate(nn.Sequential(shared, nn.ReLU(), shared)).results


def test_bytes_of_the_report():
    """Per token of 12 channels in float32, with 24 hidden units."""
    model = TokenMLP()
    unit = 4 * 2 * 5 * 12
    row = mlp_row(fused_ops.accelerate(model, dry_run=True, example=torch.zeros(2, 5, 12)))
    # Norm 2, layers 2 + 4 E, addition 3 forward; norm 3, layers and activation 4 + 7 E backward; fused 2 and
    # 5, the residual 1.
    assert row.stock_bytes == (7 + 4 * 2 + 7 + 7 * 2) * unit
    assert row.fused_bytes == 8 * unit
    with torch.no_grad():
        row = mlp_row(fused_ops.accelerate(model.eval(), dry_run=True, example=torch.zeros(2, 5, 12)))
    assert (row.stock_bytes, row.fused_bytes) == ((7 + 4 * 2) * unit, 3 * unit)
