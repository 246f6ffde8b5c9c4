"""Additions that join the operator before them, with layer scale and drop path, and those that must not."""

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


class TokenBlock(nn.Module):
    """The tail of a transformer block: what comes between the MLP and the addition is up to ``tail``."""

    def __init__(self, *tail: nn.Module, in_place: bool = False, other_first: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(12)
        self.mlp = timm_layers.Mlp(12, 24)
        self.tail = nn.Sequential(*tail) if tail else nn.Identity()
        self.in_place, self.other_first = in_place, other_first

    def forward(self, x):
        branch = self.tail(self.mlp(self.norm(x)))
        if self.in_place:
            x = x.clone()
            x += branch
            return x
        return branch + x if self.other_first else x + branch


class PositionalConvolution(nn.Module):
    """As in Twins and DS-Net, in front of everything else."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(12, 12, 3, padding=1, groups=12)

    def forward(self, x):
        return torch.tanh(self.conv(x) + x)


class GatedBlock(nn.Module):
    """The end of a residual branch with a gate."""

    def __init__(self, gate: nn.Module) -> None:
        super().__init__()
        self.conv, self.gate, self.drop_path = nn.Conv2d(12, 12, 1), gate, nn.Identity()

    def forward(self, x):
        branch = self.drop_path(self.gate(self.conv(x)))
        branch += x
        return torch.relu(branch)


MAP, TOKENS = (3, 12, 4, 5), (3, 6, 12)
# What the last operator of the block says of itself, beside the residual.
BLOCKS = {
    "ViT": (
        lambda: Block(12, 2, mlp_ratio=2, init_values=0.1, drop_path=0.4),
        TOKENS,
        "layer scale, drop path",
    ),
    "Swin": (
        lambda: SwinTransformerBlock(12, (4, 4), num_heads=2, window_size=2, mlp_ratio=2, drop_path=0.4),
        (3, 4, 4, 12),
        "drop path",
    ),
    "ConvNeXt": (
        lambda: ConvNeXtBlock(12, kernel_size=3, ls_init_value=0.1, drop_path=0.4),
        MAP,
        "layer scale, drop path",
    ),
    "ConvNeXt of 1x1 convolutions": (
        lambda: ConvNeXtBlock(12, kernel_size=3, ls_init_value=0.1, drop_path=0.4, conv_mlp=True),
        MAP,
        "layer scale, drop path",
    ),
    "torchvision ConvNeXt": (lambda: CNBlock(12, 0.1, 0.4), MAP, "layer scale, drop path"),
    "branch first": (lambda: TokenBlock(other_first=True), TOKENS, ""),
    "factors in place": (
        lambda: TokenBlock(timm_layers.LayerScale(12, 0.1, inplace=True)),
        TOKENS,
        "layer scale",
    ),
    "depthwise": (PositionalConvolution, MAP, ""),
    "gate": (lambda: GatedBlock(timm_layers.SEModule(12, rd_channels=4)), MAP, ""),
}


def build(name: str) -> nn.Module:
    torch.manual_seed(3)
    model = BLOCKS[name][0]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


@pytest.mark.parametrize("name", BLOCKS)
def test_equals_stock(name):
    _, shape, extras = BLOCKS[name]
    stock = build(name).double()
    fused = copy.deepcopy(stock)
    assert [row.pattern for row in fused_ops.accelerate(fused).results if "+ residual" in row.pattern]
    for model in (fused, copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        with fused_ops.core.backends.record() as choices:
            got = module_step(model, shape)
        assert_same(got, module_step(stock, shape))
        # A depthwise convolution's own input is the identity.
        assert "residual" in choices[-1].call or "identity after" in choices[-1].call
        assert all(extra in choices[-1].call for extra in extras.split(", "))
    assert_same(module_step(fused.eval(), shape), module_step(stock.eval(), shape))
    fused_ops.restore(fused)
    assert [type(m) for m in fused.modules()] == [type(m) for m in stock.modules()]


@pytest.mark.parametrize("name", ["ViT", "ConvNeXt", "ConvNeXt of 1x1 convolutions", "depthwise", "gate"])
def test_on_the_kernels(name):
    """C1, in float32: no further from float64 than twice what the stock modules are."""
    _, shape, _ = BLOCKS[name]
    stock = build(name)
    exact = module_step(copy.deepcopy(stock).double(), shape)
    eager = module_step(copy.deepcopy(stock), shape)
    fused_ops.accelerate(stock)
    for key, value in module_step(stock, shape, "triton").items():
        error, eager_error = ((each.double() - exact[key]).norm() for each in (value, eager[key]))
        assert error <= 2 * eager_error + 1e-6 * exact[key].norm(), key


@pytest.mark.parametrize("name", ["ViT", "ConvNeXt", "depthwise", "gate"])
def test_compiles_whole(name):
    _, shape, _ = BLOCKS[name]
    model = build(name).eval()
    fused_ops.accelerate(model)
    x = torch.randn(shape)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), model(x))


@pytest.mark.parametrize("name", ["ViT", "ConvNeXt"])
def test_autocast(name):
    """The stream keeps its dtype, and the dtypes are those of the stock block."""
    _, shape, _ = BLOCKS[name]
    stock = build(name).eval()
    fused = copy.deepcopy(stock)
    fused_ops.accelerate(fused)
    x = torch.randn(shape)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        with fused_ops.core.backends.record() as choices:
            got = fused(x)
        assert "residual" in choices[-1].call
        want = stock(x)
        low = fused(x.bfloat16()), stock(x.bfloat16())
    assert (got.dtype, low[0].dtype) == (want.dtype, low[1].dtype)
    torch.testing.assert_close(got, want, rtol=0.05, atol=0.05)
    torch.testing.assert_close(*low, rtol=0.05, atol=0.05)


class Doubles(TokenBlock):
    """The branch has a second user."""

    def forward(self, x):
        branch = self.mlp(self.norm(x))
        return x + branch * branch.mean()


class ForwardOfItsOwn(timm_layers.DropPath):
    def forward(self, x):
        return x.abs()


STAY_OUTSIDE = {
    "another module in between": lambda: TokenBlock(nn.Tanh()),
    "a second user": Doubles,
    "a class derived from a known one": lambda: TokenBlock(ForwardOfItsOwn(0.0)),
}


@pytest.mark.parametrize("name", STAY_OUTSIDE)
def test_additions_that_stay_outside(name):
    torch.manual_seed(0)
    stock = STAY_OUTSIDE[name]().double()
    fused = copy.deepcopy(stock)
    (row,) = fused_ops.accelerate(fused).results
    assert row.exchanged
    assert "residual" not in row.pattern
    assert_same(module_step(fused, TOKENS), module_step(stock, TOKENS))


def test_dropout_after_the_layers_runs_where_it_is():
    """It is applied to the operator's result, before the addition."""
    stock = TokenBlock(nn.Dropout(0.5)).double()
    fused = copy.deepcopy(stock)
    fused_ops.accelerate(fused)
    assert_same(module_step(fused, TOKENS), module_step(stock, TOKENS))
    with fused_ops.core.backends.record() as choices:
        module_step(fused, TOKENS)
        module_step(fused.eval(), TOKENS)
    assert ["residual" in choice.call for choice in choices] == [False, True]


def test_addition_in_place_and_broadcast():
    stock = TokenBlock(in_place=True).double()
    fused = copy.deepcopy(stock)
    fused_ops.accelerate(fused)
    assert_same(module_step(fused, TOKENS), module_step(stock, TOKENS))

    class Position(TokenBlock):
        def forward(self, x):
            return x[:1] + self.mlp(self.norm(x))

    stock = Position().double()
    fused = copy.deepcopy(stock)
    fused_ops.accelerate(fused)
    with fused_ops.core.backends.record() as choices:
        assert_same(module_step(fused, TOKENS), module_step(stock, TOKENS))
    assert "residual" not in choices[0].call


def test_drop_path_of_one_image():
    """A factor per image and a factor for all have the same shape then."""
    stock = TokenBlock(timm_layers.DropPath(0.5)).double()
    fused = copy.deepcopy(stock)
    fused_ops.accelerate(fused)
    for seed in range(4):
        with fused_ops.core.backends.record() as choices:
            assert_same(module_step(fused, (1, 6, 12), seed=seed), module_step(stock, (1, 6, 12), seed=seed))
        assert "drop path" in choices[0].call


@pytest.mark.parametrize("path", ["mlp", "tail", "tail.0"])
def test_hooks_around_the_layers_see_stock_values(path):
    """On the MLP as a whole, whose norm is outside of it, and on what scales its result."""
    stock = TokenBlock(timm_layers.LayerScale(12, 0.1)).double()
    fused = copy.deepcopy(stock)
    fused_ops.accelerate(fused)
    seen = [[], []]
    for model, found in zip((stock, fused), seen, strict=True):
        model.get_submodule(path).register_forward_hook(
            lambda m, inputs, out, found=found: found.append((inputs[0].detach(), out.detach()))
        )
    assert_same(module_step(fused, TOKENS), module_step(stock, TOKENS))
    torch.testing.assert_close(seen[1], seen[0])


def test_a_scale_replaced_later():
    fused = TokenBlock(timm_layers.LayerScale(12, 0.1)).double()
    fused_ops.accelerate(fused)
    fused.tail[0] = nn.Tanh()
    stock = copy.deepcopy(fused)
    fused_ops.restore(stock)
    assert_same(module_step(fused, TOKENS), module_step(stock, TOKENS))


def test_a_copied_part_gives_tensors():
    """Outside of the block nobody adds anything."""
    block = build("gate").double()
    fused_ops.accelerate(block)
    x = torch.randn(MAP, dtype=torch.float64)
    assert type(copy.deepcopy(block.gate)(x)) is torch.Tensor


def test_anything_else_gets_the_tensor():
    """What the data flow did not promise is done to the operator's result."""
    from fused_ops.acceleration.deferred import Deferred

    x = torch.randn(2, 3, 4)
    deferred = Deferred(
        lambda residual=None: x if residual is None else x + 10 * residual, x, (x.dtype, x.dtype)
    )
    one = torch.ones(2, 3, 4)
    assert torch.equal(deferred + one, x + 10)
    assert torch.equal(one + deferred.permute(1, 0, 2).permute(1, 0, 2), x + 10)
    turned = deferred.permute(2, 0, 1)
    assert (turned.shape, turned.ndim, turned.dim(), turned.size(0)) == ((4, 2, 3), 3, 3, 4)
    assert torch.equal(turned + torch.ones(4, 2, 3), (x + 10).permute(2, 0, 1))
    assert torch.equal(torch.add(one, deferred, alpha=2), 1 + 2 * x)
    assert torch.equal(deferred.sum(1), x.sum(1))
    assert torch.equal(torch.relu(deferred), x.relu())
    assert torch.equal(deferred + 1.0, x + 1.0)
    assert torch.equal(deferred * one[0, 0], x)
    assert torch.equal(deferred + one.double(), x + one.double())
    torch.testing.assert_close(deferred + deferred, 11 * x)
