"""HIRI-ViT's HR chain in modules of stock parts: equality however it is written, and what is left alone."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm.layers as timm_layers
import torch
import torch.nn.functional as F
from accelerate_helpers import assert_same, module_step
from torch import nn
from torchvision.ops import StochasticDepth
from torchvision.ops.misc import Permute

import fused_ops

DIM, HIDDEN = 6, 15
EVEN, ODD = (3, DIM, 6, 8), (3, DIM, 7, 5)


def depthwise(stride: int = 1, **options) -> nn.Conv2d:
    options = {"padding": 1, "bias": stride == 1} | options
    return nn.Conv2d(DIM, DIM, options.pop("kernel_size", 3), stride, groups=DIM, **options)


class Block(nn.Module):
    """The chain as its description reads: parts can be exchanged for others, steps overridden."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        stock = {
            "high": depthwise(),
            "low": depthwise(2),
            "norm": nn.BatchNorm2d(DIM),
            "fc1": nn.Conv2d(DIM, HIDDEN, 1),
            "act": nn.GELU(),
            "fc2": nn.Conv2d(HIDDEN, DIM, 1),
            "up": nn.Upsample(scale_factor=2, mode="nearest"),
            "drop_path": timm_layers.DropPath(0.4),
        }
        for name, part in (stock | parts).items():
            self.add_module(name, part)

    def lower(self, x):
        return self.fc2(self.act(self.fc1(self.norm(self.low(x)))))

    def grow(self, low, x):
        return self.up(low)

    def forward(self, x):
        return x + self.drop_path(self.high(x) + self.grow(self.lower(x), x))


class Cut(Block):
    def grow(self, low, x):
        return self.up(low)[:, :, : x.shape[2], : x.shape[3]]


class CutWhereNeeded(Block):
    """Odd sizes take the stock way: which branch is taken there is not known."""

    def grow(self, low, x):
        _, _, height, width = x.shape
        if height % 2 or width % 2:
            return self.up(low)[..., :height, :width]
        return self.up(low)


class Resized(Block):
    def grow(self, low, x):
        return F.interpolate(low, size=x.shape[-2:])


class RepeatedInterleaved(Block):
    """Other names, another order, in place, no drop path and no identity; a ReLU without a module."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.squeeze = nn.Conv2d(HIDDEN, DIM, 1, bias=False)
        self.bn = nn.BatchNorm2d(DIM, momentum=None)
        self.grow_channels = nn.Conv2d(DIM, HIDDEN, 1, bias=False)
        self.coarse = depthwise(2)
        self.fine = depthwise(padding="same", bias=False)

    def forward(self, inputs):
        hidden = F.relu(self.grow_channels(self.bn(self.coarse(inputs))))
        low = self.squeeze(hidden).repeat_interleave(2, dim=-1)
        low = torch.repeat_interleave(low, 2, 2)
        low += self.fine(inputs)
        return low


class Tokens(nn.Module):
    """Linear layers between permutations, branches in modules of their own, a dropout that does nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleDict({"a": depthwise(), "b": depthwise(2)})
        self.norm = nn.BatchNorm2d(DIM, affine=False)
        self.mlp = nn.Sequential(
            nn.Linear(DIM, HIDDEN), nn.SiLU(), nn.Dropout(0.0), nn.Linear(HIDDEN, DIM), nn.Identity()
        )
        self.depth = StochasticDepth(0.4, "row")

    def forward(self, x):
        low = self.mlp(self.norm(self.branches["b"](x)).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        low = F.interpolate(low, scale_factor=(2.0, 2.0), mode="nearest-exact")
        return self.depth(low[..., : x.size(2), : x.size()[3]] + self.branches["a"](x)) + x


class TokensInSequence(Block):
    """Permutations as modules; the sum of three without drop path; the tanh form of GELU."""

    def __init__(self) -> None:
        super().__init__(drop_path=nn.Identity(), act=nn.GELU(approximate="tanh"))
        del self.fc1, self.fc2, self.act
        self.mix = nn.Sequential(
            self.low,
            self.norm,
            Permute([0, 2, 3, 1]),
            nn.Linear(DIM, HIDDEN),
            nn.GELU("tanh"),
            nn.Linear(HIDDEN, DIM),
            Permute([0, -1, 1, 2]),
            nn.UpsamplingNearest2d(scale_factor=2),
        )
        del self.low, self.norm, self.up

    def forward(self, x):
        return self.mix(x) + x + self.high(x)


# What makes the block, its input, the parts of it that the operator computes, and what the report says of it.
BLOCKS = {
    "as described": (Block, EVEN, 8, "gelu -> drop path -> + input"),
    "cut to an even size": (Cut, EVEN, 8, "gelu -> drop path -> + input"),
    "cut to an odd size": (Cut, ODD, 8, "gelu -> drop path -> + input"),
    "cut where needed": (CutWhereNeeded, EVEN, 8, "gelu -> drop path -> + input"),
    "resized to an odd size": (Resized, ODD, 7, "gelu -> drop path -> + input"),
    "repeated": (RepeatedInterleaved, EVEN, 5, "relu"),
    "tokens": (Tokens, ODD, 9, "silu -> drop path -> + input"),
    "tokens in sequence": (TokensInSequence, EVEN, 9, "gelu_tanh -> + input"),
}


def randomised(model: nn.Module, seed: int = 2) -> nn.Module:
    """In float64, with parameters and running statistics that all matter."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor), alpha=0.4)
    return model.double()


def row_of(report):
    (row,) = (row for row in report.results if row.kind == "hr_chain")
    return row


def operators(model: nn.Module, shape: tuple[int, ...]) -> list[str]:
    with fused_ops.core.backends.record() as choices:
        module_step(model, shape)
    return [choice.operator for choice in choices]


@pytest.mark.parametrize("name", BLOCKS)
def test_equals_stock_and_comes_out_again(name):
    """Against the modules themselves: output, all gradients and running statistics, in both modes."""
    make, shape, parts, words = BLOCKS[name]
    stock = randomised(make())
    fused = copy.deepcopy(stock)
    kinds = {path: type(module) for path, module in fused.named_modules()}
    attributes = {path: set(module.__dict__) for path, module in fused.named_modules()}
    row = row_of(fused_ops.accelerate(fused))
    assert row.exchanged, row.reason
    assert row.pattern == f"HR chain {DIM}-{HIDDEN}-{DIM} {words}"
    assert row.module == ""
    assert len(row.members) == 1 + parts
    assert operators(fused, shape) == ["hr_chain"]
    for twin in (fused, copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert_same(module_step(twin, shape), module_step(stock, shape))
    assert_same(module_step(fused.eval(), shape, seed=1), module_step(stock.eval(), shape, seed=1))
    assert fused.state_dict().keys() == stock.state_dict().keys()
    for key, value in stock.state_dict().items():
        assert torch.equal(fused.state_dict()[key], value), key
    classes = [type(module) for module in fused.modules()]
    again = row_of(fused_ops.accelerate(fused))
    assert (again.reason, again.pattern, again.members) == ("exchanged before", row.pattern, row.members)
    assert [type(module) for module in fused.modules()] == classes
    assert fused_ops.restore(fused) == 1 + parts
    assert {path: type(module) for path, module in fused.named_modules()} == kinds
    assert {path: set(module.__dict__) for path, module in fused.named_modules()} == attributes
    assert operators(fused, shape) == []


def test_counts_batches_and_steps_like_stock():
    """Three steps of SGD, in a model around it: weights, statistics and counts of batches."""
    models = [nn.Sequential(nn.Conv2d(3, DIM, 3, padding=1), Block(), nn.Sequential(Cut()))]
    models[0] = randomised(models[0])
    models.append(copy.deepcopy(models[0]))
    report = fused_ops.accelerate(models[1])
    chains = [row for row in report.results if row.kind == "hr_chain"]
    # A module that only holds the block computes the same.
    assert [row.module for row in chains] == ["1", "2"]
    assert "2 of 2 HR chains" in report.summary()
    for model in models:
        torch.manual_seed(5)
        optimizer = torch.optim.SGD(model.parameters(), 0.05, 0.9)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(2, 3, 8, 8, dtype=torch.float64)).square().mean().backward()
            optimizer.step()
    assert models[1][1].norm.num_batches_tracked == 3
    assert_same(models[1].state_dict(), models[0].state_dict())


@pytest.mark.parametrize("name", ["cut to an odd size", "repeated"])
def test_on_the_kernels(name):
    """C1, in float32: no further from float64 than twice what the stock modules are."""
    make, shape, _, _ = BLOCKS[name]
    exact_model = randomised(make()).to(memory_format=torch.channels_last)
    stock = copy.deepcopy(exact_model).float()

    def on_channels_last(model, x):
        return model(x.contiguous(memory_format=torch.channels_last))

    exact = module_step(exact_model, shape, call=on_channels_last)
    eager = module_step(copy.deepcopy(stock), shape, call=on_channels_last)
    fused_ops.accelerate(stock)
    with fused_ops.core.backends.record() as choices:
        got = module_step(stock, shape, "triton", call=on_channels_last)
    assert [(choice.operator, choice.backend) for choice in choices] == [("hr_chain", "triton")]
    for key, value in got.items():
        error, eager_error = ((each.double() - exact[key]).norm() for each in (value, eager[key]))
        assert error <= 2 * eager_error + 1e-6 * exact[key].norm(), key


@pytest.mark.parametrize("name", ["as described", "tokens"])
def test_compiles_whole(name):
    make, shape, _, _ = BLOCKS[name]
    model = randomised(make()).eval()
    fused_ops.accelerate(model)
    x = torch.randn(shape, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), model(x))


def test_autocast():
    """The dtypes are those of the stock block, whose identity stays what it was."""
    stock = randomised(Block()).float().eval()
    fused = copy.deepcopy(stock)
    fused_ops.accelerate(fused)
    x = torch.randn(EVEN)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        with fused_ops.core.backends.record() as choices:
            got, low = fused(x), fused(x.bfloat16())
        assert ["identity" in choice.call for choice in choices] == [False, True]
        want = stock(x)
    assert (got.dtype, want.dtype, low.dtype) == (torch.float32, torch.float32, torch.bfloat16)
    torch.testing.assert_close(got, want, rtol=0.05, atol=0.05)
    torch.testing.assert_close(low.float(), want, rtol=0.05, atol=0.1)


@pytest.mark.parametrize("make", [Block, CutWhereNeeded])
def test_odd_sizes_that_are_not_surely_cut_run_stock(make):
    """As an error, where the stock modules make one."""
    stock = randomised(make())
    fused = copy.deepcopy(stock)
    assert row_of(fused_ops.accelerate(fused)).exchanged
    if make is Block:
        with pytest.raises(RuntimeError, match="must match the size"):
            fused(torch.randn(ODD, dtype=torch.float64))
    else:
        assert operators(fused, ODD) == []
        assert_same(module_step(fused, ODD), module_step(stock, ODD))


# Submodules and attributes that may get a hook or be replaced later, and the block itself.
@pytest.mark.parametrize("path", ["", "high", "low", "norm", "fc1", "act", "fc2", "up", "drop_path"])
def test_a_hook_gives_the_stock_modules_back(path):
    stock = randomised(Block())
    fused = copy.deepcopy(stock)
    fused_ops.accelerate(fused)
    seen = [[], []]
    for model, found in zip((stock, fused), seen, strict=True):
        model.get_submodule(path).register_forward_hook(
            lambda m, inputs, out, found=found: found.append((inputs[0].detach(), out.detach()))
        )
    assert operators(fused, EVEN) == []
    assert_same(module_step(fused, EVEN), module_step(stock, EVEN))
    assert len(seen[1]) == 2
    torch.testing.assert_close(seen[1][1], seen[0][0])


def test_a_part_replaced_later():
    fused = randomised(Block())
    fused_ops.accelerate(fused)
    fused.act = nn.Tanh()
    stock = copy.deepcopy(fused)
    fused_ops.restore(stock)
    assert operators(fused, EVEN) == []
    assert_same(module_step(fused, EVEN), module_step(stock, EVEN))


def test_active_dropout_runs_stock():
    stock = randomised(Tokens())
    stock.mlp[2].p = 0.5
    fused = copy.deepcopy(stock)
    assert row_of(fused_ops.accelerate(fused)).exchanged
    assert operators(fused, EVEN) == []
    assert_same(module_step(fused, EVEN), module_step(stock, EVEN))
    assert operators(fused.eval(), EVEN) == ["hr_chain"]


class Shuffled(Block):
    def __init__(self) -> None:
        super().__init__(fc2=nn.Conv2d(HIDDEN, 4 * DIM, 1), up=nn.PixelShuffle(2))


class ConvolvedLow(Block):
    """The high branch starts from what the low one makes."""

    def forward(self, x):
        low = self.grow(self.lower(x), x)
        return x + self.drop_path(self.high(low) + low)


class Weighted(Block):
    def forward(self, x):
        return x + self.drop_path(self.high(x) + 0.5 * self.grow(self.lower(x), x))


class Activated(Block):
    def forward(self, x):
        return F.relu(super().forward(x))


class Counted(Block):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class CountedTwice(Block):
    """The norm sees every batch twice."""

    def forward(self, x):
        self.norm(self.low(x))
        return super().forward(x)


class Remembered(Block):
    def forward(self, x):
        self.seen = []
        self.seen.append(self.high(x))
        return super().forward(x)


class TrainedOtherwise(Block):
    def forward(self, x):
        return super().forward(x) if self.training else self.high(x) + self.grow(self.lower(x), x)


class OtherOnSmallMaps(Block):
    def forward(self, x):
        return super().forward(x) if x.shape[2] > 4 else x + self.drop_path(self.high(x))


class DroppedIdentity(Block):
    def forward(self, x):
        return self.drop_path(x + self.high(x) + self.grow(self.lower(x), x))


class IntoItsInput(Block):
    def forward(self, x):
        x += self.drop_path(self.high(x) + self.grow(self.lower(x), x))
        return x


class NamedArguments(Block):
    """Nothing wrong with it; just not how it is looked for."""

    def grow(self, low, x):
        low = torch.permute(torch.permute(low, dims=(0, 2, 3, 1)), dims=(0, 3, 1, 2))
        return self.up(low)


class CutAskew(Block):
    def grow(self, low, x):
        return self.up(low)[:, :, : x.shape[3], : x.shape[2]]


class Repeated3(Block):
    def grow(self, low, x):
        return low.repeat_interleave(2, 2).repeat_interleave(2, 2)


class AsPair(Block):
    def forward(self, x):
        return (super().forward(x),)


def hooked() -> nn.Module:
    block = Block()
    block.fc1.register_forward_hook(lambda *_: None)
    return block


def patched() -> nn.Module:
    block = Block()
    block.act.forward = torch.tanh
    return block


class Padded(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) + 1


DECLINED = {
    "low-resolution convolution without stride": (
        lambda: Block(low=depthwise(1, bias=False), up=nn.Identity()),
        "its low-resolution map is not repeated 2x2 times",
    ),
    "another stride": (
        lambda: Block(low=depthwise(4), up=nn.Upsample(scale_factor=4)),
        "its low-resolution map is enlarged by 4.0",
    ),
    "strides that do not fit": (
        lambda: Block(low=depthwise(1, bias=False)),
        "its low-resolution convolution has stride=(1, 1), not (2, 2)",
    ),
    "stride at full resolution": (
        lambda: Block(high=depthwise(2, bias=True)),
        "its high-resolution convolution has stride=(2, 2), not (1, 1)",
    ),
    "bilinear": (
        lambda: Block(up=nn.Upsample(scale_factor=2, mode="bilinear")),
        "its low-resolution map is enlarged by bilinear interpolation",
    ),
    "fixed size": (
        lambda: Block(up=nn.Upsample(size=(6, 8))),
        "its low-resolution map is enlarged to another size",
    ),
    "pixel shuffle": (Shuffled, "its low-resolution map is not repeated 2x2 times"),
    "repeated along one dimension": (Repeated3, "its low-resolution map is not repeated 2x2 times"),
    "cut to another size": (CutAskew, "its low-resolution map is cut to another size"),
    "dilation": (
        lambda: Block(low=depthwise(2, dilation=2, padding=2)),
        "its low-resolution convolution has padding=(2, 2), not (1, 1)",
    ),
    "dilation at full resolution": (
        lambda: Block(high=depthwise(dilation=2, padding="same")),
        "its high-resolution convolution has dilation=(2, 2), not (1, 1)",
    ),
    "5x5": (
        lambda: Block(high=depthwise(kernel_size=5, padding=2)),
        "its high-resolution convolution has kernel_size=(5, 5), not (3, 3)",
    ),
    "reflected": (
        lambda: Block(high=depthwise(padding_mode="reflect")),
        "its high-resolution convolution has padding_mode='reflect', not 'zeros'",
    ),
    "bias before the norm": (
        lambda: Block(low=depthwise(2, bias=True)),
        "its low-resolution convolution has a bias, for which the operator has no place",
    ),
    "activation": (lambda: Block(act=nn.Tanh()), "the operator has no activation Tanh"),
    "hooks": (hooked, "a part of it has hooks"),
    "a patched part": (patched, "the operator has no activation GELU"),
    "a class of its own": (
        lambda: Block(high=Padded(DIM, DIM, 3, padding=1, groups=DIM)),
        "a part of it has a forward of its own",
    ),
    "branches in series": (ConvolvedLow, "no branch is one depthwise convolution of its input"),
    "a weighted branch": (Weighted, "its low-resolution map is not repeated 2x2 times"),
    "something after it": (
        Activated,
        "it does not return the sum of two branches, with or without its input",
    ),
    "counted calls": (Counted, "its forward cannot be traced"),
    "a result that is not used": (CountedTwice, "it computes something else, too"),
    "a map left in an attribute": (Remembered, "its forward cannot be traced"),
    "other in evaluation": (TrainedOtherwise, "what it computes depends on its mode or on its input"),
    "other on small maps": (
        OtherOnSmallMaps,
        "it does not return the sum of two branches, with or without its input",
    ),
    "drop path of the identity": (
        DroppedIdentity,
        "it does not return the sum of two branches, with or without its input",
    ),
    "in place": (IntoItsInput, "it changes its input in place"),
    "arguments by name": (NamedArguments, "its data flow is another"),
    "more than a tensor": (AsPair, "it returns something else than a map"),
}


# Their parts do not fit together, or would change a leaf that wants gradients.
CANNOT_RUN = {
    "strides that do not fit",
    "stride at full resolution",
    "repeated along one dimension",
    "cut to another size",
    "in place",
}


@pytest.mark.parametrize("name", DECLINED)
def test_declined(name):
    """With the reason; whatever other operators take over, nothing changes."""
    make, reason = DECLINED[name]
    stock = randomised(make())
    fused = copy.deepcopy(stock)
    row = row_of(fused_ops.accelerate(fused))
    assert (row.exchanged, row.reason, row.members) == (False, reason, ())
    if name in ("low-resolution convolution without stride", "another stride"):
        shape = (3, DIM, 8, 8)
    elif name in CANNOT_RUN:
        return
    else:
        shape = EVEN

    def tensor(model, x):
        out = model(x)
        return out[0] if isinstance(out, tuple) else out

    with fused_ops.core.backends.record() as choices:
        module_step(fused, shape, call=tensor)
    assert not any(choice.operator == "hr_chain" for choice in choices)
    assert_same(module_step(fused, shape, call=tensor), module_step(stock, shape, call=tensor))


class SharedLayer(nn.Module):
    """A layer of the block is called by somebody else, too."""

    def __init__(self, part: str) -> None:
        super().__init__()
        self.block = Block()
        self.also = self.block.get_submodule(part)

    def forward(self, x):
        return self.block(x) + self.also(x)


@pytest.mark.parametrize("part", ["high", "act"])
def test_a_part_used_elsewhere_is_left_alone(part):
    stock = randomised(SharedLayer(part))
    fused = copy.deepcopy(stock)
    row = row_of(fused_ops.accelerate(fused))
    assert (row.module, row.exchanged) == ("block", False)
    assert row.reason == "a part of it belongs to other modules too"
    assert_same(module_step(fused, EVEN), module_step(stock, EVEN))


def test_two_blocks_that_share_a_layer():
    first, second = Block(), Block()
    second.fc1 = first.fc1
    stock = randomised(nn.Sequential(first, second))
    fused = copy.deepcopy(stock)
    assert not any(row.exchanged for row in fused_ops.accelerate(fused).results if row.kind == "hr_chain")
    assert_same(module_step(fused, EVEN), module_step(stock, EVEN))


def test_a_block_called_twice():
    block = Block(drop_path=nn.Identity())
    stock = randomised(nn.Sequential(block, block))
    fused = copy.deepcopy(stock)
    assert row_of(fused_ops.accelerate(fused)).exchanged
    assert operators(fused, EVEN) == ["hr_chain"] * 2
    assert_same(module_step(fused, EVEN), module_step(stock, EVEN))


def test_other_modules_are_no_rows():
    """Two grouped convolutions, two fully connected ones and a norm alone are no reason to mention it."""
    model = nn.Sequential(
        nn.Conv2d(DIM, DIM, 1),
        depthwise(),
        nn.Conv2d(DIM, DIM, 1, groups=2),
        nn.Conv2d(DIM, DIM, 1),
        nn.BatchNorm2d(DIM),
    )
    assert not any(row.kind == "hr_chain" for row in fused_ops.accelerate(model).results)


def test_own_blocks_are_left_alone():
    """The zoo's run the operator already."""
    report = fused_ops.accelerate(nn.Sequential(fused_ops.HRBlock(DIM)))
    assert not any(row.kind == "hr_chain" for row in report.results)


def test_bytes_of_the_report():
    """In maps of float32; the low-resolution map has a quarter of one, its hidden units 5/8."""
    stock = Block(drop_path=nn.Identity())
    size = 4 * 3 * DIM * 6 * 8
    row = row_of(fused_ops.accelerate(stock, dry_run=True, example=torch.zeros(EVEN, requires_grad=True)))
    # Forward: convolutions 2 + 1.25, norm 3/4, layers 2 x 7/8, activation 10/8, repetition 1.25, sums 6.
    forward = 2 + 1.25 + 0.75 + 2 * 0.875 + 1.25 + 1.25 + 6
    # Backward: convolutions 4 + 2.5, norm 5/4, layers 4 x 7/8, activation 15/8, repetition 1.25, sums 6.
    backward = 4 + 2.5 + 1.25 + 4 * 0.875 + 1.875 + 1.25 + 6
    assert row.stock_bytes == (forward + backward) * size
    # 3.25 and 5 maps, as the operator's own account has it.
    assert row.fused_bytes == 8.25 * size
    with torch.no_grad():
        row = row_of(fused_ops.accelerate(stock.eval(), dry_run=True, example=torch.zeros(EVEN)))
    assert (row.stock_bytes, row.fused_bytes) == ((forward - 0.25) * size, 2 * size)
    assert fused_ops.restore(stock) == 0
