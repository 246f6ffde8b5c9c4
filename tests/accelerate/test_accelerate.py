"""What accelerate() recognises and leaves alone, and that nothing else about a model changes."""

from __future__ import annotations

import copy
import io
import json
import pickle
import sys

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn

import fused_ops
import fused_ops.cli
from fused_ops.core import backends

DTYPE = torch.float64


class Block(nn.Module):
    """Declared out of the order in which it runs: only the data flow tells what follows what."""

    def __init__(self, channels: int = 6, activation: nn.Module | None = None, **options) -> None:
        super().__init__()
        self.act = nn.SiLU(inplace=True) if activation is None else activation
        self.norm = nn.BatchNorm2d(channels)
        self.other_norm = nn.BatchNorm2d(channels)
        options = {"padding": 1, "bias": False, "groups": channels, "kernel_size": 3} | options
        self.conv = nn.Conv2d(channels, channels, **options)
        self.point = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        return x + self.other_norm(self.point(self.act(self.norm(self.conv(x)))))


class OneResidual(Block):
    def forward(self, x):
        value = self.conv(x)
        return self.act(self.norm(value)) + value


class SharedActivation(Block):
    def forward(self, x):
        return self.act(self.point(self.act(self.norm(self.conv(x)))))


class SharedNorm(Block):
    def forward(self, x):
        return self.norm(self.point(self.norm(self.conv(x))))


class CalledTwice(Block):
    """The same chain at two places is the same chain."""

    def forward(self, x):
        return self.act(self.norm(self.conv(self.act(self.norm(self.conv(x))))))


class TwoFollowers(Block):
    def forward(self, x):
        return self.act(self.norm(self.conv(self.other_norm(self.conv(x)))))


class OnlyInTraining(Block):
    def forward(self, x):
        x = self.conv(x)
        return self.act(self.norm(x)) if self.training else self.act(self.other_norm(x))


class Functional(Block):
    def forward(self, x):
        return F.relu(self.norm(self.conv(x)))


class KeepsOutput(Block):
    """What it stores may be used where no trace shows it."""

    def forward(self, x):
        self.seen = self.conv(x)
        return self.act(self.norm(self.seen))


class ReadsShape(Block):
    """Asking for a size is no use of the values."""

    def forward(self, x):
        x = self.conv(x)
        batch, channels = x.shape[0], x.size(1)
        return self.act(self.norm(x)).reshape(batch, channels, -1)


class Untraceable(nn.Module):
    """Its own forward depends on data; what it is made of can still be followed."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        self.conv = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.norm = nn.BatchNorm2d(6)
        self.row = nn.Sequential(nn.Conv2d(6, 6, 3, groups=6, bias=False), nn.BatchNorm2d(6), nn.ReLU6())
        self.taken_apart = nn.Sequential(nn.Conv2d(6, 6, 3, groups=6), nn.BatchNorm2d(6))

    def forward(self, x):
        if x.mean() > 1e9:
            return x
        x = self.row(self.norm(self.conv(self.block(x))))
        outs = []
        for layer in self.taken_apart:
            x = layer(x)
            outs.append(x.mean((2, 3)))
        return sum(outs)


class ReachesInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x):
        if x.mean() > 1e9:
            return x
        return self.block.conv(x) + self.block(x)


def randomised(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(5)
    model = model.to(DTYPE)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator, dtype=DTYPE) + 0.25)
    return model


def images(channels: int = 6, size: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(6)
    return torch.randn(3, channels, size, size, generator=generator, dtype=DTYPE)


def step(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    x = x.clone().requires_grad_()
    out = model(x)
    model.zero_grad()
    out.square().mean().backward()
    results = {"out": out.detach(), "grad x": x.grad, **{k: v.clone() for k, v in model.state_dict().items()}}
    return results | {f"grad {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same(fused: nn.Module, stock: nn.Module, x: torch.Tensor | None = None) -> None:
    """In training, then in evaluation mode, with the flags of single modules as they are."""
    x = images() if x is None else x
    got, want = step(fused, x), step(stock, x)
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-9, msg=lambda t, n=name: f"{n}: {t}")


def pair(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    model = randomised(model)
    return copy.deepcopy(model), model


def count_fused(model: nn.Module, x: torch.Tensor | None = None) -> list[str]:
    """The operator calls of one forward pass; of a copy, since it counts in running statistics."""
    with backends.record() as choices, torch.no_grad():
        copy.deepcopy(model)(images() if x is None else x)
    return [choice.call for choice in choices]


CHAIN = "depthwise 3x3 -> BatchNorm -> silu"
ALONE = "depthwise 3x3"


@pytest.mark.parametrize(
    ("make", "patterns"),
    [
        (Block, [CHAIN]),
        (OneResidual, [ALONE]),
        (SharedActivation, ["depthwise 3x3 -> BatchNorm"]),
        (SharedNorm, [ALONE]),
        (CalledTwice, [CHAIN]),
        (TwoFollowers, [ALONE]),
        (OnlyInTraining, [ALONE]),
        (Functional, ["depthwise 3x3 -> BatchNorm"]),
        (KeepsOutput, [ALONE]),
        (ReadsShape, [CHAIN]),
        (lambda: Block(activation=nn.GELU()), ["depthwise 3x3 -> BatchNorm -> gelu"]),
        (lambda: Block(activation=nn.GELU("tanh")), ["depthwise 3x3 -> BatchNorm -> gelu_tanh"]),
        (lambda: Block(activation=nn.ELU()), ["depthwise 3x3 -> BatchNorm"]),
        (lambda: Block(kernel_size=5, padding="same"), ["depthwise 5x5 -> BatchNorm -> silu"]),
        (lambda: nn.Sequential(nn.Conv2d(6, 6, 3, groups=6), nn.ReLU()), ["depthwise 3x3 + bias -> relu"]),
        (lambda: nn.Conv2d(6, 6, 3, groups=6), ["depthwise 3x3 + bias"]),
        (lambda: nn.ModuleList([Block()])[0], [CHAIN]),
        (Untraceable, [CHAIN, ALONE + " + bias", "depthwise 3x3 -> BatchNorm -> relu6", ALONE + " + bias"]),
        (ReachesInside, [ALONE]),
    ],
)
def test_recognised(make, patterns):
    fused, stock = pair(make())
    report = fused_ops.accelerate(fused)
    assert [row.pattern for row in report.results] == patterns
    assert report.exchanged == len(patterns)
    for training in (True, False):
        assert_same(fused.train(training), stock.train(training))
    # A second call changes nothing.
    before = [(type(m), dict(m.__dict__)) for m in fused.modules()]
    again = fused_ops.accelerate(fused)
    assert [(row.pattern, row.members) for row in again.results] == [
        (row.pattern, row.members) for row in report.results
    ]
    assert [(type(m), dict(m.__dict__)) for m in fused.modules()] == before


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"padding_mode": "reflect"}, "padding_mode is reflect"),
        ({"kernel_size": 2}, "kernel size (2, 2) is even"),
        ({"out_channels": 12}, "makes 12 of 6 channels"),
    ],
)
def test_left_alone(options, reason):
    channels = options.pop("out_channels", 6)
    conv = nn.Conv2d(6, channels, options.pop("kernel_size", 3), groups=6, **options)
    fused, stock = pair(nn.Sequential(conv, nn.BatchNorm2d(channels)))
    (row,) = fused_ops.accelerate(fused).results
    assert not row.exchanged
    assert reason in row.reason
    assert [type(m) for m in fused.modules()] == [type(m) for m in stock.modules()]
    assert_same(fused, stock)


def test_own_forward_is_left_alone():
    class Same(nn.Conv2d):
        def forward(self, x):
            return super().forward(F.pad(x, (0, 1, 0, 1)))

    fused, stock = pair(nn.Sequential(Same(6, 6, 3, groups=6), nn.BatchNorm2d(6)))
    (row,) = fused_ops.accelerate(fused).results
    assert row.reason == "Same has a forward of its own"
    assert_same(fused, stock)


def test_dense_and_grouped_convolutions_are_no_rows():
    model = nn.Sequential(nn.Conv2d(6, 6, 3), nn.Conv2d(6, 6, 3, groups=2))
    nothing = "no depthwise convolutions, spatial-reduction attentions, MLPs, gates or HR chains"
    assert str(fused_ops.accelerate(model)) == nothing


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("place", ["conv", "norm", "act"])
def test_hooks_see_stock_values(place, when):
    fused, stock = pair(Block(activation=nn.SiLU()))
    seen: dict[nn.Module, list] = {fused: [], stock: []}

    def watch(model):
        def hook(module, inputs, output):
            seen[model].append((inputs[0].clone(), output.clone()))

        return model.get_submodule(place).register_forward_hook(hook)

    if when == "before":
        watch(fused)
    (row,) = fused_ops.accelerate(fused).results
    handle = watch(fused) if when == "after" else None
    watch(stock)
    assert_same(fused, stock)
    assert len(seen[fused]) == 1
    for got, want in zip(seen[fused][0], seen[stock][0], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    if when == "before":
        assert (row.exchanged, "hook" in row.reason) == ({"conv": False}.get(place, True), True)
    else:
        assert count_fused(fused) == []
        handle.remove()
        assert len(count_fused(fused)) == 1


def test_restore_leaves_no_trace():
    fused, stock = pair(nn.Sequential(Block(), Block()))
    before = [(id(m), type(m), dict(m.__dict__)) for m in fused.modules()]
    ids = [id(t) for t in (*fused.parameters(), *fused.buffers())]
    fused_ops.accelerate(fused)
    assert [id(t) for t in (*fused.parameters(), *fused.buffers())] == ids
    assert list(fused.state_dict()) == list(stock.state_dict())
    assert fused_ops.restore(fused) == 6
    assert [(id(m), type(m), dict(m.__dict__)) for m in fused.modules()] == before
    assert fused_ops.restore(fused) == 0


def test_dry_run_only_reports():
    model = nn.Sequential(Block(), Block())
    before = [(type(m), dict(m.__dict__)) for m in model.modules()]
    report = fused_ops.accelerate(model, dry_run=True, example=(2, 6, 8, 8))
    assert report.exchanged == 2
    assert [(type(m), dict(m.__dict__)) for m in model.modules()] == before


def saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved])
def test_copies_are_accelerated_models_of_their_own(duplicate):
    fused, stock = pair(nn.Sequential(Block(), Block()))
    fused_ops.accelerate(fused)
    twin = duplicate(fused)
    with torch.no_grad():
        for parameter in fused.parameters():
            parameter.zero_()
    assert len(count_fused(twin)) == 2
    assert_same(twin, stock)
    assert fused_ops.restore(twin) == 6
    assert [type(m) for m in twin.modules()] == [type(m) for m in stock.modules()]


@pytest.mark.parametrize("place", ["conv", "norm", "act"])
def test_copy_of_a_part_does_that_part_only(place):
    fused, stock = pair(Block())
    fused_ops.accelerate(fused)
    x = images()
    got = copy.deepcopy(fused.get_submodule(place))(x.clone())
    torch.testing.assert_close(got, stock.get_submodule(place)(x.clone()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("place", ["norm", "act"])
def test_replaced_partner(place):
    """Somebody puts another module there: nobody may hand through what was not computed."""
    fused, stock = pair(Block())
    fused_ops.accelerate(fused)
    for model in (fused, stock):
        setattr(model, place, nn.BatchNorm2d(6).to(DTYPE) if place == "norm" else nn.Tanh())
    assert_same(fused, stock)
    assert count_fused(fused) == []
    # Accelerated anew, the chain is the one that is there now.
    pattern = CHAIN if place == "norm" else "depthwise 3x3 -> BatchNorm"
    assert [row.pattern for row in fused_ops.accelerate(fused).results] == [pattern]
    assert len(count_fused(fused)) == 1
    assert_same(fused, stock)


def test_synchronised_norm():
    fused, stock = pair(Block())
    fused_ops.accelerate(fused)
    fused = nn.SyncBatchNorm.convert_sync_batchnorm(fused)
    assert type(fused.norm) is nn.SyncBatchNorm
    assert_same(fused.eval(), stock.eval())
    assert count_fused(fused) == []
    assert [row.pattern for row in fused_ops.accelerate(fused).results] == [
        "depthwise 3x3 -> SyncBatchNorm -> silu"
    ]
    assert_same(fused, stock)
    assert len(count_fused(fused)) == 1


@pytest.mark.parametrize("options", [{"momentum": None}, {"track_running_stats": False}, {"affine": False}])
def test_norm_options(options):
    model = nn.Sequential(nn.Conv2d(6, 6, 3, groups=6), nn.BatchNorm2d(6, **options), nn.Hardswish())
    fused, stock = pair(model)
    assert fused_ops.accelerate(fused).results[0].members == ("0", "1", "2")
    for training in (True, True, False):
        assert_same(fused.train(training), stock.train(training))
    # A norm frozen by hand inside a model in training.
    fused.train()[1].eval()
    stock.train()[1].eval()
    assert_same(fused, stock)


def test_frozen_norm():
    torchvision = pytest.importorskip("torchvision")
    frozen = torchvision.ops.misc.FrozenBatchNorm2d(6)
    fused, stock = pair(nn.Sequential(nn.Conv2d(6, 6, 3, groups=6, bias=False), frozen, nn.ReLU()))
    report = fused_ops.accelerate(fused)
    assert report.results[0].pattern == "depthwise 3x3 -> FrozenBatchNorm -> relu"
    assert_same(fused, stock)
    x = images().float()
    with torch.autocast("cpu", torch.bfloat16):
        got, want = fused.float()(x), stock.float()(x)
    assert got.dtype == want.dtype
    assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_half(dtype):
    fused, stock = (model.float() for model in pair(Block()))
    fused_ops.accelerate(fused)
    x = images().float()
    with torch.autocast("cpu", dtype):
        got, want = fused(x), stock(x)
    assert got.dtype == want.dtype
    assert torch.equal(got, want)
    got, want = (
        model.to(dtype).to(memory_format=torch.channels_last)(x.to(dtype)) for model in (fused, stock)
    )
    assert got.stride() == want.stride()
    assert torch.equal(got, want)
    assert len(count_fused(fused, x.to(dtype))) == 1


def test_unbatched_input():
    fused, stock = pair(nn.Sequential(nn.Conv2d(6, 6, 3, groups=6), nn.ReLU()))
    fused_ops.accelerate(fused)
    torch.testing.assert_close(fused(images()[0]), stock(images()[0]))


def test_optimizer_and_average_made_before():
    fused, stock = pair(nn.Sequential(Block(), Block()))
    results = []
    for model in (fused, stock):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
        if model is fused:
            fused_ops.accelerate(model)
        for _ in range(3):
            optimizer.zero_grad()
            model(images()).square().mean().backward()
            optimizer.step()
            average.update_parameters(model)
        results.append((model.state_dict(), average.module.state_dict()))
    for got, want in zip(*results, strict=True):
        assert got.keys() == want.keys()
        for name, value in want.items():
            torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-9)


def test_global_hooks_see_stock_values():
    fused, stock = pair(Block(activation=nn.SiLU()))
    fused_ops.accelerate(fused)
    outputs: list[torch.Tensor] = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, i, o: outputs.append(o.clone()))
    try:
        fused(images())
        stock(images())
    finally:
        handle.remove()
    half = len(outputs) // 2
    for got, want in zip(outputs[:half], outputs[half:], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("order", ["compiled first", "accelerated first"])
def test_compiled(order):
    fused, stock = pair(nn.Sequential(Block(), Block()))
    torch._dynamo.reset()
    if order == "accelerated first":
        fused_ops.accelerate(fused)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images()), stock(images()), rtol=1e-9, atol=1e-9)
    if order == "compiled first":
        assert fused_ops.accelerate(compiled).exchanged == 2
        torch.testing.assert_close(compiled(images()), stock(images()), rtol=1e-9, atol=1e-9)
    fused_ops.restore(compiled)
    torch.testing.assert_close(compiled(images()), stock(images()), rtol=1e-9, atol=1e-9)
    for name, value in stock.state_dict().items():
        torch.testing.assert_close(fused.state_dict()[name], value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", ["triton"])
def test_kernels_in_an_accelerated_model(backend):
    """C1's rule for float32: no further from float64 than twice what the stock model is."""
    if not backends.triton_status()[0]:
        pytest.skip(backends.triton_status()[1])
    fused, stock = pair(Block())
    fused_ops.accelerate(fused)
    x = images().contiguous(memory_format=torch.channels_last)
    truth = step(copy.deepcopy(stock), x)
    want = step(stock.float(), x.float())
    with fused_ops.backend(backend):
        got = step(fused.float(), x.float())
    for name, value in truth.items():
        floor = 4 * torch.finfo(torch.float32).eps * value.abs().max()
        error, allowed = ((other[name].double() - value).abs().max() for other in (got, want))
        assert error <= 2 * allowed + floor, name


def test_distributed_model():
    fused, stock = pair(nn.Sequential(Block(), Block()))
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(fused)
        members = fused_ops.accelerate(wrapped).results[0].members
        assert members == ("0.conv", "0.norm", "0.act")
        wrapped(images()).square().mean().backward()
        stock(images()).square().mean().backward()
    finally:
        torch.distributed.destroy_process_group()
    for got, want in zip(fused.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-9, atol=1e-9)


def test_exported_checkpointed_traced():
    fused, stock = pair(nn.Sequential(Block(), Block()))
    fused_ops.accelerate(fused)
    x = images()
    for model in (fused, stock):
        torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False).square().mean().backward()
    for (name, got), want in zip(fused.named_parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-9, atol=1e-9, msg=name)
    assert_same(fused.eval(), stock.eval())
    torch.testing.assert_close(torch.export.export(fused, (x,)).module()(x), stock(x))
    torch.testing.assert_close(torch.fx.symbolic_trace(fused)(x), stock(x))


def test_parametrized_afterwards():
    """Then the class has another class on top, and cannot be set back; the module must do its stock work."""
    fused, stock = pair(Block())
    fused_ops.accelerate(fused)
    for model in (fused, stock):
        torch.manual_seed(0)
        nn.utils.parametrizations.spectral_norm(model.conv)
    assert_same(fused.eval(), stock.eval())
    fused_ops.restore(fused)
    assert_same(fused, stock)
    (row,) = fused_ops.accelerate(fused).results
    assert row.reason == "has parametrizations"


def test_tracing_harms_nothing():
    class Counts(Block):
        def forward(self, x):
            self.calls = getattr(self, "calls", 0) + 1
            self.norm.num_batches_tracked.add_(1)
            return super().forward(x) + torch.rand(())

    model = Counts()
    model.cache = {}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    fused_ops.accelerate(model)
    assert not hasattr(model, "calls")
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())


def test_bytes():
    """Against passes counted by hand: maps of 3 x 6 x 8 x 8 float64 are 9216 bytes."""
    model = randomised(Block())
    (row,) = fused_ops.accelerate(model, example=images().requires_grad_()).results
    size = 9216
    # Forward: convolution 2, norm 3, activation 2. Backward: activation 3, norm's sums 2 and gradient 3, the
    # convolution's two gradients 2 each.
    assert row.stock_bytes == (2 + 3 + 2 + 3 + 5 + 4) * size
    # Forward x, the raw map written and read, out; backward: gradient and raw map twice, x, and x's gradient.
    assert row.fused_bytes == (4 + 6) * size
    assert row.saved_bytes == row.stock_bytes - row.fused_bytes
    with torch.no_grad():
        (row,) = fused_ops.accelerate(model.eval(), example=images()).results
    assert (row.stock_bytes, row.fused_bytes) == (6 * size, 2 * size)


def test_stock_where_measured_faster(monkeypatch):
    """The decision of the dispatch table, which speaks of GPUs only."""
    module = sys.modules["fused_ops.accelerate"]
    weighed = {"0.conv": (100, 50, "stock PyTorch was measured faster for a case"), "1.conv": (100, 50, "")}
    monkeypatch.setattr(module, "_weigh", lambda *_: weighed)
    model = nn.Sequential(Block(), Block())
    report = fused_ops.accelerate(model, example=images())
    assert [(row.exchanged, row.reason) for row in report.results] == [
        (False, weighed["0.conv"][2]),
        (True, ""),
    ]
    assert report.saved_bytes == 50
    assert [type(m) for m in model[0].modules()] == [type(m) for m in Block().modules()]
    assert len(count_fused(model.to(DTYPE))) == 1


def test_example_that_cannot_run_without_data():
    report = fused_ops.accelerate(Untraceable(), example=(2, 6, 8, 8))
    assert report.exchanged == 4
    assert "The example was not used" in str(report)


def test_report_is_readable():
    model = nn.Sequential(Block(), nn.Conv2d(6, 6, 2, groups=6))
    report = fused_ops.accelerate(model, example=(2, 6, 8, 8))
    lines = str(report).splitlines()
    assert lines[0].split() == ["module", "pattern", "exchanged", "saved", "MB", "reason"]
    assert lines[1].startswith("0.conv  depthwise 3x3 -> BatchNorm -> silu  yes")
    assert lines[2].endswith("kernel size (2, 2) is even")
    assert lines[-1].startswith("1 of 2 depthwise convolutions exchanged, 0.0 MB of memory traffic saved")
    assert json.loads(json.dumps(report.rows()))[0]["members"] == ["0.conv", "0.norm", "0.act"]


def test_fused_modules_of_this_package_are_left_alone():
    fused, stock = pair(nn.Sequential(fused_ops.DepthwiseConvBNAct(6), fused_ops.DepthwiseConv2d(6)))
    report = fused_ops.accelerate(fused)
    assert report.exchanged == 0
    assert all("fused" in row.reason for row in report.results)
    assert_same(fused, stock)


def test_command(monkeypatch, capsys):
    pytest.importorskip("timm")

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fused-ops", "accelerate", *arguments])
        with pytest.raises(SystemExit) as ended:
            fused_ops.cli.main()
        return ended.value.code, *capsys.readouterr()

    status, out, _ = run("timm/lcnet_035", "--size", "64")
    assert status == 0
    assert "timm/lcnet_035, 2x3x64x64 float32 channels_last, training" in out
    assert "13 of 13 depthwise convolutions, 2 of 2 gates exchanged" in out
    assert "blocks.0.0.conv_dw" in out
    status, out, _ = run("lcnet_035", "--json")
    assert status == 0
    assert [row["exchanged"] for row in json.loads(out)] == [True] * 15
    status, _, error = run("no_such_model")
    assert status == 2
    assert "no_such_model" in error
