"""Spatial-reduction attention of timm exchanged: equality, kernels, hooks, what is declined."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from accelerate_helpers import assert_same, module_step
from torch import nn

import fused_ops

pytest.importorskip("timm")
from timm.models.nextvit import EfficientAttention
from timm.models.pvt_v2 import Attention, Block
from timm.models.twins import GlobalSubSampleAttn

SIZE = (6, 9)
SHAPE = (2, SIZE[0] * SIZE[1], 12)
# And the columns of a report.
MODULES = {
    "PVTv2": (lambda: Attention(12, 2, sr_ratio=2), "attention of 2 heads, conv 2"),
    "PVTv2 last stage": (lambda: Attention(12, 3, qkv_bias=False), "attention of 3 heads, conv 1"),
    "PVTv2 linear": (lambda: Attention(12, 2, linear_attn=True), "attention of 2 heads, pool 1"),
    "Twins": (lambda: GlobalSubSampleAttn(12, 2, sr_ratio=3), "attention of 2 heads, conv 3"),
    "Twins last stage": (lambda: GlobalSubSampleAttn(12, 2), "attention of 2 heads, conv 1"),
    "Next-ViT": (
        lambda: EfficientAttention(12, head_dim=4, sr_ratio=2),
        "attention of 3 heads, token pool 2",
    ),
    "Next-ViT last stage": (
        lambda: EfficientAttention(12, out_dim=8, head_dim=4),
        "attention of 3 heads, token pool 1",
    ),
}


def build(name: str) -> nn.Module:
    torch.manual_seed(1)
    model = MODULES[name][0]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def step(model: nn.Module, backend: str = "reference", seed: int = 0) -> dict[str, torch.Tensor]:
    with_size = not hasattr(model, "k")
    return module_step(
        model, SHAPE, backend, seed, call=lambda model, x: model(x, SIZE) if with_size else model(x)
    )


@pytest.mark.parametrize("name", MODULES)
def test_equals_stock_and_comes_out_again(name):
    stock = build(name).double()
    fused = copy.deepcopy(stock)
    kind = type(fused)
    (row,) = fused_ops.accelerate(fused).results
    assert (row.exchanged, row.kind, row.pattern) == (True, "attention", MODULES[name][1])
    with fused_ops.core.backends.record() as choices:
        assert_same(step(fused), step(stock))
    # With as many channels out as in, projections join it.
    operator = "attention" if name == "Next-ViT last stage" else "attention_block"
    assert [choice.operator for choice in choices] == [operator]
    assert fused_ops.accelerate(fused).results[0].reason == "exchanged before"
    for twin in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert_same(step(twin, seed=1), step(copy.deepcopy(stock), seed=1))
    assert_same(step(fused.eval()), step(copy.deepcopy(stock).eval()))
    assert fused_ops.restore(fused) == 1
    assert type(fused) is kind


@pytest.mark.parametrize("name", MODULES)
def test_on_the_kernels(name):
    """C1, in float32: no further from float64 than twice what the stock module is."""
    stock = build(name)
    exact = step(copy.deepcopy(stock).double())
    eager = step(copy.deepcopy(stock))
    fused_ops.accelerate(stock)
    with fused_ops.core.backends.record() as choices:
        got = step(stock, "triton")
    assert [choice.backend for choice in choices] == ["triton"]
    # A key's bias adds the same to all of a query's scores: its gradient is zero but for rounding.
    floor = max(value.norm() for name, value in exact.items() if name.endswith("bias")).item()
    for key, value in got.items():
        error, eager_error = ((each.double() - exact[key]).norm() for each in (value, eager[key]))
        assert error <= 2 * eager_error + 1e-6 * max(exact[key].norm().item(), floor), key


@pytest.mark.parametrize("name", ["PVTv2", "Next-ViT"])
def test_compiles_whole(name):
    model = build(name).eval()
    fused_ops.accelerate(model)
    arguments = (torch.randn(SHAPE), SIZE)[: 1 + (not hasattr(model, "k"))]
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(*arguments), model(*arguments))


@pytest.mark.parametrize(
    ("name", "path", "fused"),
    [
        ("PVTv2", "", False),
        ("PVTv2", "sr", True),
        ("PVTv2", "kv", True),
        ("PVTv2 linear", "pool", False),
        ("PVTv2 linear", "act", False),
        ("Next-ViT", "sr", False),
        ("Next-ViT", "norm", False),
    ],
)
def test_hooks_see_stock_values(name, path, fused):
    """Layers that are called run their hooks; for the others the stock module comes back."""
    stock = build(name).double()
    exchanged = copy.deepcopy(stock)
    fused_ops.accelerate(exchanged)
    seen = [[], []]
    for model, found in zip((stock, exchanged), seen, strict=True):
        model.get_submodule(path).register_forward_hook(
            lambda m, inputs, out, found=found: found.append((inputs[0].detach(), out.detach()))
        )
    with fused_ops.core.backends.record() as choices:
        assert_same(step(exchanged), step(stock))
    assert bool(choices) == fused
    torch.testing.assert_close(seen[1], seen[0])


def test_dropout_of_attention_weights():
    """Its mask is the operator's own: other draws, of the same distribution."""
    torch.manual_seed(0)
    stock = Attention(12, 2, attn_drop=0.5).double()
    fused = copy.deepcopy(stock)
    fused_ops.accelerate(fused)
    x = torch.randn(SHAPE, dtype=torch.float64)
    with torch.no_grad():
        means = [torch.stack([model(x, SIZE) for _ in range(100)]).mean(0) for model in (fused, stock)]
        spread = torch.stack([stock(x, SIZE) for _ in range(50)]).std(0)
    assert ((means[0] - means[1]).abs() / spread).mean() < 3 / 100**0.5
    assert_same(step(fused.eval()), step(stock.eval()))


def test_declined():
    patched = build("PVTv2")
    patched.forward = lambda x, size: x
    hooked = build("Twins")
    hooked.register_forward_hook(lambda *_: None)
    other = build("Next-ViT")
    other.norm = nn.GroupNorm(2, 12)
    tanh = build("PVTv2 linear")
    tanh.act = nn.Tanh()
    reasons = {
        "has a forward of its own": patched,
        "has hooks": hooked,
        "its reduction has hooks or parts of another kind": other,
    }
    for reason, model in reasons.items():
        (row,) = fused_ops.accelerate(model).results
        assert (row.exchanged, row.reason) == (False, reason)
    assert not fused_ops.accelerate(tanh).exchanged


def test_folded_norm_of_next_vit():
    """timm folds the norms into the projections and leaves an Identity."""
    model = build("Next-ViT").double().eval()
    model.norm = nn.Identity()
    stock = copy.deepcopy(model)
    assert fused_ops.accelerate(model).exchanged == 1
    x = torch.randn(SHAPE, dtype=torch.float64)
    torch.testing.assert_close(model(x), stock(x))


BLOCK_SHAPE = (2, 48, 16)


def block(**options) -> nn.Module:
    torch.manual_seed(1)
    model = Block(16, 2, sr_ratio=2, qkv_bias=True, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def block_step(model: nn.Module, backend: str = "reference") -> dict[str, torch.Tensor]:
    return module_step(model, BLOCK_SHAPE, backend, call=lambda model, x: model(x, (6, 8)))


@pytest.mark.parametrize("options", [{"drop_path": 0.4}, {"linear_attn": True}, {}])
def test_whole_block(options):
    """Norms, drop path and additions join both branches of a block; the MLP has a convolution inside."""
    stock = block(**options).double()
    fused = copy.deepcopy(stock)
    rows = fused_ops.accelerate(fused).results
    reduction = "pool 1" if "linear_attn" in options else "conv 2"
    assert [row.pattern for row in rows] == [
        "LayerNorm -> MLP 16-64-16 depthwise gelu -> + residual",
        f"LayerNorm -> attention of 2 heads, {reduction} -> + residual",
    ]
    for model in (fused, pickle.loads(pickle.dumps(fused))):
        with fused_ops.core.backends.record() as choices:
            assert_same(block_step(model), block_step(stock))
        assert [choice.operator for choice in choices] == ["attention_block", "feed_forward_conv"]
        assert all("residual" in choice.call for choice in choices)
        assert all(("drop path" in choice.call) == ("drop_path" in options) for choice in choices)
    assert_same(block_step(fused.eval()), block_step(stock.eval()))
    fused_ops.restore(fused)
    assert [type(m) for m in fused.modules()] == [type(m) for m in stock.modules()]


def test_whole_block_on_the_kernels():
    stock = block()
    exact = block_step(copy.deepcopy(stock).double())
    eager = block_step(copy.deepcopy(stock))
    fused_ops.accelerate(stock)
    for key, value in block_step(stock, "triton").items():
        error, eager_error = ((each.double() - exact[key]).norm() for each in (value, eager[key]))
        # Gradients of the keys' biases are zero but for rounding.
        assert error <= 2 * eager_error + 1e-5 * max(exact[key].norm().item(), 1.0), key


def test_whole_block_compiles():
    model = block().eval()
    fused_ops.accelerate(model)
    x = torch.randn(BLOCK_SHAPE)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x, (6, 8)), model(x, (6, 8)))


@pytest.mark.parametrize(
    "path", ["norm1", "norm2", "mlp", "mlp.fc1", "mlp.dwconv", "mlp.act", "mlp.drop", "attn", "drop_path1"]
)
def test_hooks_in_a_block_see_stock_values(path):
    stock = block(drop_path=0.4).double()
    fused = copy.deepcopy(stock)
    fused_ops.accelerate(fused)
    seen = [[], []]
    for model, found in zip((stock, fused), seen, strict=True):
        model.get_submodule(path).register_forward_hook(
            lambda m, inputs, out, found=found: found.append((inputs[0].detach(), out.detach()))
        )
    assert_same(block_step(fused), block_step(stock))
    assert len(seen[0]) == len(seen[1])
    for got, want in zip(seen[1], seen[0], strict=True):
        torch.testing.assert_close(got, want)


def test_dropout_in_a_block_runs_the_stock_modules():
    stock = block(proj_drop=0.5).double()
    fused = copy.deepcopy(stock)
    fused_ops.accelerate(fused)
    assert_same(block_step(fused), block_step(stock))
    assert_same(block_step(fused.eval()), block_step(stock.eval()))


def test_declined_mlps():
    other = block()
    other.mlp.dwconv = nn.Conv2d(64, 64, 5, padding=2, groups=64)
    other.mlp.act = nn.Tanh()
    row = next(row for row in fused_ops.accelerate(other).results if row.kind == "mlp")
    assert (row.exchanged, row.reason) == (False, "a part of it has hooks or is of another kind")
    other.mlp.act = nn.GELU()
    fused_ops.restore(other)
    rows = fused_ops.accelerate(other).results
    (row,) = (row for row in rows if row.kind == "mlp")
    assert "kernel_size=(5, 5)" in row.reason
    # The convolution is exchanged by itself then.
    assert [row.exchanged for row in rows if row.kind == "depthwise"] == [True]


def test_bytes_of_an_mlp_with_a_convolution():
    """16 channels, 64 hidden units, 48 tokens of two images in float32."""
    rows = fused_ops.accelerate(block(), dry_run=True, example=(torch.zeros(BLOCK_SHAPE), (6, 8))).results
    (row,) = (row for row in rows if row.kind == "mlp")
    tokens, hidden, matrix = 4 * 96 * 16, 4 * 96 * 64, 4 * 16 * 64
    # Forward: norm 2, layers 2, addition 3; layers 2, convolution 2, activation 2; a matrix each.
    # Backward: norm 3, layers 4; layers 4, convolution 4, activation 3; each matrix twice.
    assert row.stock_bytes == (7 + 7) * tokens + (6 + 11) * hidden + 6 * matrix
    # The activation's pass forward, layer by layer what the operator says it moves.
    assert row.stock_bytes > row.fused_bytes


def test_bytes_of_the_report():
    """54 queries and 6 keys of 12 channels in float32, of two heads; without a norm and an addition."""
    unit = 4 * 2 * 12
    (row,) = fused_ops.accelerate(build("Twins"), dry_run=True, example=(torch.zeros(SHAPE), SIZE)).results
    # Projections 4 forward and 8 backward, attention 2 of each and 5 and 4.
    assert row.stock_bytes == (19 * 54 + 6 * 6) * unit
    # Keys as wide as the map of each head: read and written by 2 forward, and twice 2 and 3 backward.
    assert row.fused_bytes == (2 * 66 + 4 * 66 + 54 + 2 * 12) * unit
