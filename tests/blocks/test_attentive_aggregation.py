"""Attentive feature aggregation against compositions of stock layers, written from the paper's formulas."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from support.contract import require
from torch import Tensor, nn

import fused_ops
from fused_ops.blocks.aggregation import (
    AttentiveFusion,
    ChannelAttention,
    MultiLevelFusion,
    ScaleSpaceRendering,
    SpatialAttention,
)
from fused_ops.core import backends

C = 32
BN = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def norm(name: str) -> list[str]:
    return [f"{name}.{entry}" for entry in BN]


# Keys of the public code's checkpoints.
SPATIAL = [
    "conv.0.weight",
    *norm("conv.1.0"),
    "conv_inner.0.weight",
    *norm("conv_inner.1.0"),
    "final.0.weight",
]
CHANNEL = ["conv1.0.weight", *norm("conv1.1.0"), "conv2.0.weight"]


def stock_layer(in_channels: int, out_channels: int, size: int) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, size, 1, size // 2, bias=False)
    return nn.Sequential(conv, nn.Sequential(nn.BatchNorm2d(out_channels), nn.ReLU()))


class StockSpatial(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.conv_inner = stock_layer(C, C, 3), stock_layer(C, C, 3)
        self.final = nn.Sequential(nn.Conv2d(C, 1, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.final(self.conv_inner(self.conv(x)))


class StockChannel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = stock_layer(C, C // 16, 1)
        self.conv2 = nn.Sequential(nn.Conv2d(C // 16, C, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        pooled = F.adaptive_max_pool2d(x, 1), F.adaptive_avg_pool2d(x, 1)
        return sum(self.conv2(self.conv1(one)) for one in pooled).sigmoid()


class StockFusion(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.sa, self.ca = StockSpatial(), StockChannel()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        s, c = self.sa(x).sigmoid(), self.ca(y)
        return s * (1 - c) * x + (1 - s) * c * y


class StockLevels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.level_sa, self.level_ca = StockSpatial(), StockChannel()
        self.proj_1, self.proj_2 = stock_layer(24, C, 1), stock_layer(20, C, 1)

    def forward(self, maps: list[Tensor]) -> Tensor:
        levels = [self.proj_1(maps[0]), self.proj_2(maps[1])]
        levels = [F.interpolate(x, maps[2].shape[2:], mode="bilinear") for x in levels]
        levels.append(maps[2])
        s, c = [], []
        for x in levels:
            s.append(self.level_sa(x).sigmoid())
            c.append(self.level_ca(x))
        w = s[0] * (1 - s[1]) * (1 - s[2]), s[1] * (1 - s[2]), s[2]
        v = c[0] * (1 - c[1]) * (1 - c[2]), c[1] * (1 - c[2]), c[2]
        return sum(w[k] * v[k] * levels[k] for k in range(3))


class StockRendering(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale_space_attn = StockSpatial()

    def forward(self, features: list[Tensor], predictions: list[Tensor]) -> Tensor:
        """Two scales, of which the larger one has the size wanted."""

        def resized(x: Tensor, like: Tensor) -> Tensor:
            return F.interpolate(x, like.shape[2:], mode="bilinear")

        phi = [self.scale_space_attn(resized(x, features[1])).abs() for x in features]
        weights = 1 - (-phi[0]).exp(), (1 - (-phi[1]).exp()) * (-phi[0]).exp()
        return sum(
            resized(weight, predictions[1]) * resized(x, predictions[1])
            for weight, x in zip(weights, predictions, strict=True)
        )


def image(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


# Ours, the composition, and arguments.
MODULES = {
    "fusion": (
        lambda: AttentiveFusion(C),
        StockFusion,
        lambda: (image(2, C, 4, 3), image(2, C, 4, 3)),
    ),
    "levels": (
        lambda: MultiLevelFusion((24, 20, C)),
        StockLevels,
        lambda: ([image(2, 24, 1, 2), image(2, 20, 2, 2), image(2, C, 3, 4)],),
    ),
    "rendering": (
        lambda: ScaleSpaceRendering(C),
        StockRendering,
        lambda: ([image(2, C, 2, 2), image(2, C, 3, 4)], [image(2, 5, 2, 2), image(2, 5, 3, 4)]),
    ),
    "rendering_resized": (
        lambda: ScaleSpaceRendering(C),
        StockRendering,
        lambda: ([image(2, C, 2, 2), image(2, C, 3, 4)], [image(2, 5, 3, 4), image(2, 5, 6, 8)]),
    ),
}


def pair(name: str) -> tuple[nn.Module, nn.Module, tuple]:
    """Ours and the composition with the same state, every parameter away from its start, and arguments."""
    ours, stock, inputs = MODULES[name]
    ours, stock = ours().double(), stock().double()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    stock.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(stock.state_dict(), strict=True)
    return ours, stock, inputs()


def leaves(arguments: tuple) -> list[Tensor]:
    return [leaf.requires_grad_() for leaf in torch.utils._pytree.tree_leaves(arguments)]


def outcome(module: nn.Module, arguments: tuple) -> tuple[Tensor, ...]:
    """Output, gradients of inputs and parameters, state."""
    out = module(*arguments)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    gradients = torch.autograd.grad(out, [*leaves(arguments), *module.parameters()], weights)
    return (out, *gradients, *module.state_dict().values())


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", MODULES)
def test_stock_composition(name, training):
    """Output, every gradient and the running statistics, in float64; state dicts load both ways."""
    ours, stock, arguments = pair(name)
    leaves(arguments)
    for got, want in zip(
        outcome(ours.train(training), arguments), outcome(stock.train(training), arguments), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    "name", ["fusion", *(pytest.param(n, marks=pytest.mark.extended) for n in list(MODULES)[1:])]
)
def test_kernels(name):
    """On the kernels in float32, as by the composition in float64."""
    require("triton", "cpu")
    ours, stock, arguments = pair(name)
    ours, single = ours.float(), torch.utils._pytree.tree_map(lambda x: x.float(), arguments)
    leaves(arguments), leaves(single)
    with fused_ops.backend("triton"):
        found = outcome(ours, single)
    for got, want in zip(found, outcome(stock, arguments), strict=True):
        if want.is_floating_point():
            scale = max(1.0, want.abs().max().item())
            torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-4 * scale)


def test_names_and_counts():
    """The public code's keys, and its parameters of the final fusion of AFA-DLA-34 and of AFA-DLA-X-102."""
    assert list(SpatialAttention(C).state_dict()) == SPATIAL
    assert list(ChannelAttention(C).state_dict()) == CHANNEL
    keys = [f"level_sa.{key}" for key in SPATIAL] + [f"level_ca.{key}" for key in CHANNEL]
    keys += [key for k in (1, 2) for key in (f"proj_{k}.0.weight", *norm(f"proj_{k}.1.0"))]
    assert list(MultiLevelFusion((128, 64, 32)).state_dict()) == keys
    assert list(ScaleSpaceRendering(C).state_dict()) == [f"scale_space_attn.{key}" for key in SPATIAL]
    for channels, count in (((128, 64, 32), 24_996), ((256, 128, 32), 31_140)):
        module = MultiLevelFusion(channels, device="meta")
        assert sum(parameter.numel() for parameter in module.parameters()) == count
    assert sum(parameter.numel() for parameter in ScaleSpaceRendering(32).parameters()) == 18_592


def test_channel_attention_pools_in_one_pass():
    """One pooling for both, and its running statistics have seen the maxima before the means."""
    module = ChannelAttention(C).double()
    x = image(3, C, 4, 5)
    with backends.record() as choices:
        module(x)
    assert [choice.operator for choice in choices] == ["pool_channels"]
    inner, want = module.conv1[0], nn.BatchNorm2d(C // 16).double()
    for pooled in (x.amax((2, 3), keepdim=True), x.mean((2, 3), keepdim=True)):
        want(inner(pooled))
    torch.testing.assert_close(module.conv1[1][0].running_mean, want.running_mean)
    assert module.conv1[1][0].num_batches_tracked == 2


def test_order_of_scales():
    """A dense layer hides those behind it, not those before it."""
    module = ScaleSpaceRendering(C)
    module.scale_space_attn = nn.Identity()
    front, back = torch.zeros(1, 3, 2, 2), torch.ones(1, 3, 2, 2)
    dense, thin = torch.full((1, 1, 2, 2), 50.0), torch.full((1, 1, 2, 2), 0.1)
    assert module([dense, thin], [front, back]).abs().max() < 1e-6
    half = torch.full((1, 1, 2, 2), -0.5)
    torch.testing.assert_close(module([half, dense], [front, back]), back * torch.tensor(-0.5).exp())


@pytest.mark.parametrize("name", ["fusion", "levels", "rendering"])
def test_life_of_a_module(name):
    """Copies, pickles, half precision, the meta device, channels_last, SyncBatchNorm."""
    make, _, inputs = MODULES[name]
    module = make().eval()
    arguments = torch.utils._pytree.tree_map(lambda x: x.float(), inputs())
    want = module(*arguments)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        torch.testing.assert_close(other(*arguments), want)
    turned = torch.utils._pytree.tree_map(
        lambda x: x.contiguous(memory_format=torch.channels_last), arguments
    )
    torch.testing.assert_close(module(*turned), want)
    halves = torch.utils._pytree.tree_map(lambda x: x.bfloat16(), arguments)
    assert copy.deepcopy(module).bfloat16()(*halves).dtype == torch.bfloat16
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(module))
    assert not any(type(part) is nn.BatchNorm2d for part in synced.modules())
    assert module.state_dict().keys() == synced.state_dict().keys()
    assert SpatialAttention(C, device="meta", dtype=torch.float16).final[0].weight.is_meta


def test_initialisation():
    fusion = MultiLevelFusion((128, 64, 32))
    norms = [part for part in fusion.level_sa.modules() if isinstance(part, nn.BatchNorm2d)]
    for part in norms:
        assert 0 <= part.weight.min() <= 0.3 < 0.7 <= part.weight.max() <= 1
        assert part.bias.abs().max() == 0
    conv = fusion.level_sa.conv[0].weight
    assert conv.std().item() == pytest.approx((2 / (9 * 32)) ** 0.5, rel=0.1)
    assert fusion.proj_1[0].weight.std().item() == pytest.approx((2 / 32) ** 0.5, rel=0.1)
    assert (fusion.proj_1[1][0].weight == 1).all()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ChannelAttention(8), "channels must be at least 16 for this reduction, got 8"),
        (lambda: MultiLevelFusion((32,)), r"channels must be of two to five levels, got \(32,\)"),
        (
            lambda: MultiLevelFusion((16, 16))([torch.zeros(2, 16, 2, 2)]),
            "maps has 1 tensors; it must have 2, one for each level",
        ),
        (
            lambda: ScaleSpaceRendering(4)([torch.zeros(2, 4, 2, 2)], []),
            "predictions has 0 tensors; it must have 1, one per scale",
        ),
        # As stock PyTorch says of statistics of one value.
        (lambda: ChannelAttention(16)(torch.zeros(1, 16, 4, 4)), "Expected more than 1 value per channel"),
    ],
)
def test_errors(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.extended
def test_compiles_whole():
    """One graph without a break, forward and backward, with eager's results."""
    require("triton", "cpu")
    torch._dynamo.reset()
    for name in ("fusion", "levels", "rendering_resized"):
        module, _, arguments = pair(name)
        module, arguments = module.float(), torch.utils._pytree.tree_map(lambda x: x.float(), arguments)
        leaves(arguments)
        with fused_ops.backend("triton"):
            want = outcome(copy.deepcopy(module), arguments)
            compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
            out = compiled(*arguments)
        torch.testing.assert_close(out, want[0], rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()
