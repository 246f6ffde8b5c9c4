"""Contract D1 to D7 for the modules that stand where a stock depthwise Conv2d and BatchNorm2d stood."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from support.contract import require
from torch import nn

import fused_ops

ACTIVATIONS = {
    "none": nn.Identity,
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "hardswish": nn.Hardswish,
}
BACKENDS = ("reference", "triton")


class Stock(nn.Module):
    """The composition of stock modules that DepthwiseConvBNAct replaces."""

    def __init__(self, channels, kernel_size=3, stride=1, bias=False, activation="relu", **norm):
        super().__init__()
        self.conv = nn.Conv2d(
            channels, channels, kernel_size, stride, kernel_size // 2, groups=channels, bias=bias
        )
        self.bn = nn.BatchNorm2d(channels, **norm)
        self.act = ACTIVATIONS[activation]()

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))


def pair(activation="relu", dtype=torch.float64, bias=False, **norm):
    torch.manual_seed(3)
    stock = Stock(8, bias=bias, activation=activation, **norm).to(dtype)
    torch.manual_seed(3)
    fused = fused_ops.DepthwiseConvBNAct(8, activation=activation, bias=bias, **norm).to(dtype)
    return stock, fused


def image(dtype=torch.float64, batch=3):
    values = torch.randn(batch, 8, 4, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return values.to(dtype).contiguous(memory_format=torch.channels_last)


def backends_and_dtype(backend):
    require(backend, "cpu") if backend != "reference" else None
    return torch.float64 if backend == "reference" else torch.float32


def test_state_dict_equals_stock_both_ways():
    """D1, D2: same keys, shapes, order and initial values, loaded strictly in both directions."""
    stock, fused = pair(bias=True)
    assert list(stock.state_dict()) == list(fused.state_dict())
    for key, value in stock.state_dict().items():
        torch.testing.assert_close(fused.state_dict()[key], value, rtol=0, atol=0)
    fused.load_state_dict(stock.state_dict(), strict=True)
    stock.load_state_dict(fused.state_dict(), strict=True)


def test_state_dict_equals_timm():
    """D1: the names of timm's ConvNormAct."""
    layers = pytest.importorskip("timm.layers")
    stock = layers.ConvNormAct(8, 8, 3, groups=8, apply_act=False)
    fused = fused_ops.DepthwiseConvBNAct(8)
    fused.load_state_dict(stock.state_dict(), strict=True)
    stock.load_state_dict(fused.state_dict(), strict=True)
    x = image(torch.float32)
    torch.testing.assert_close(fused.eval()(x), stock.eval()(x))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_forward_equals_stock(activation, backend):
    dtype = backends_and_dtype(backend)
    stock, fused = pair(activation, dtype)
    tolerance = {"rtol": 0, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    for training in (True, False):
        with fused_ops.backend(backend), torch.no_grad():
            out = fused.train(training)(image(dtype))
        with torch.no_grad():
            torch.testing.assert_close(out, stock.train(training)(image(dtype)), **tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "norm",
    [
        {},
        {"momentum": None},
        {"momentum": 0.3, "eps": 1e-3},
        {"track_running_stats": False},
        {"affine": False},
        {"affine": False, "track_running_stats": False},
    ],
    ids=str,
)
def test_training_like_stock(norm, backend):
    """D2: training with SGD, evaluation, training again; parameters and buffers stay equal."""
    dtype = backends_and_dtype(backend)
    stock, fused = pair("silu", dtype, **norm)
    tolerance = {"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 2e-4, "atol": 2e-5}
    results = []
    for module, name in ((stock, "reference"), (fused, backend)):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        outputs = []
        for step, training in enumerate((True, False, True)):
            with fused_ops.backend(name):
                out = module.train(training)(image(dtype) + step)
            outputs.append(out.detach())
            if training:
                optimizer.zero_grad()
                (out * image(dtype)).sum().backward()
                optimizer.step()
        results.append((outputs, module.state_dict()))
    (stock_outputs, stock_state), (outputs, state) = results
    for out, want in zip(outputs, stock_outputs, strict=True):
        torch.testing.assert_close(out, want, **tolerance)
    assert list(state) == list(stock_state)
    for key, want in stock_state.items():
        torch.testing.assert_close(state[key], want, **tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend):
    """D6: float32 parameters, bfloat16 activations; the backward runs outside of the autocast region."""
    backends_and_dtype(backend)
    stock, fused = pair("silu", torch.float32)
    x = image(torch.float32).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        want = stock(x)
        with fused_ops.backend(backend):
            out = fused(x)
    assert out.dtype == want.dtype == torch.bfloat16
    weights = image(torch.float32)
    got_grads = torch.autograd.grad((out.float() * weights).sum(), [x, *fused.parameters()])
    want_grads = torch.autograd.grad((want.float() * weights).sum(), [x, *stock.parameters()])
    for got, expected in zip(got_grads, want_grads, strict=True):
        assert got.dtype == torch.float32
        assert (got - expected).norm() <= 0.03 * expected.norm() + 1e-3


def test_autocast_casts_the_residual_with_x():
    fused = fused_ops.DepthwiseConvBNAct(8)
    x = image(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert fused(x, residual=x).dtype == torch.bfloat16
        assert fused(x, residual=x.clone()).dtype == torch.bfloat16


def test_copies_and_pickles():
    """D7."""
    _, fused = pair("gelu")
    fused(image())
    x = image()
    buffer = io.BytesIO()
    torch.save(fused, buffer)
    buffer.seek(0)
    restored = torch.load(buffer, weights_only=False)
    for twin in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), restored):
        torch.testing.assert_close(twin.eval()(x), fused.eval()(x), rtol=0, atol=0)
        assert twin.conv.weight is not fused.conv.weight


def test_meta_construction():
    """D7: no memory until to_empty, no output but a shape."""
    fused = fused_ops.DepthwiseConvBNAct(8, bias=True, device="meta")
    assert all(parameter.is_meta for parameter in fused.parameters())
    assert fused(torch.empty(2, 8, 6, 5, device="meta")).shape == (2, 8, 6, 5)
    real = fused.to_empty(device="cpu")
    real.load_state_dict(pair("none", torch.float32, bias=True)[1].state_dict())
    assert real(image(torch.float32)).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_module(dtype):
    """D7: `.half()` and `.bfloat16()`, parameters and statistics included."""
    stock, fused = pair("relu", dtype)
    epsilon = torch.finfo(dtype).eps
    torch.testing.assert_close(fused(image(dtype)), stock(image(dtype)), rtol=epsilon, atol=epsilon)


def test_hooks_and_repr():
    """D7."""
    _, fused = pair("hardswish")
    seen = []
    fused.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    fused.conv.weight.register_hook(lambda grad: seen.append(grad.shape))
    fused(image()).sum().backward()
    assert seen == [(3, 8, 4, 3), (8, 1, 3, 3)]
    assert "activation=hardswish" in repr(fused)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": 0}, "channels=0"),
        ({"channels": 8, "kernel_size": 4}, "kernel_size=4"),
        ({"channels": 8, "activation": "swish"}, "activation='swish' is unknown; use one of none, relu"),
        ({"channels": 8, "residual_placement": "late"}, "residual_placement='late'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        fused_ops.DepthwiseConvBNAct(**arguments)


def test_other_norms_are_refused():
    fused = fused_ops.DepthwiseConvBNAct(8)
    fused.bn = nn.GroupNorm(2, 8)
    with pytest.raises(TypeError, match="norm is a GroupNorm; it must be"):
        fused(image(torch.float32))


def test_activation_checkpointing():
    """D9: running statistics and gradients are those of one forward... and of its recomputation."""
    from torch.utils.checkpoint import checkpoint

    stock, fused = pair("silu")
    x = image().requires_grad_()
    for module in (stock, fused):
        checkpoint(module, x, use_reentrant=False).sum().backward()
    for (name, want), got in zip(stock.state_dict().items(), fused.state_dict().values(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize(
    "options", [{}, {"stride": 2}, {"kernel_size": 5, "dilation": 2, "bias": False}], ids=str
)
def test_convolution_alone_equals_stock(options):
    """D1, D2: DepthwiseConv2d has the parameters of the stock convolution, initial values included."""
    kernel, dilation = options.get("kernel_size", 3), options.get("dilation", 1)
    stock_options = {**options, "kernel_size": kernel, "padding": dilation * (kernel // 2)}
    torch.manual_seed(3)
    stock = nn.Conv2d(8, 8, groups=8, **stock_options).double()
    torch.manual_seed(3)
    fused = fused_ops.DepthwiseConv2d(8, **options).double()
    assert isinstance(fused, nn.Conv2d)
    assert list(fused.state_dict()) == list(stock.state_dict())
    for twin in (fused, fused_ops.DepthwiseConv2d.from_stock(stock)):
        torch.testing.assert_close(twin(image()), stock(image()), rtol=0, atol=1e-12)


def test_positional_convolution():
    fused = fused_ops.DepthwiseConv2d(8, identity=True).double()
    x = image()
    want = x + nn.functional.conv2d(x, fused.weight, fused.bias, padding=1, groups=8)
    torch.testing.assert_close(fused(x), want, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="residual is given, and identity=True"):
        fused(x, residual=x)


def test_norm_before_the_convolution():
    fused = fused_ops.DepthwiseConvBNAct(8, norm_placement="pre", identity=True).double()
    x = image()
    bn = copy.deepcopy(fused.bn)
    want = x + nn.functional.conv2d(bn(x), fused.conv.weight, padding=1, groups=8)
    torch.testing.assert_close(fused(x), want, rtol=0, atol=1e-12)
    torch.testing.assert_close(fused.bn.running_var, bn.running_var)
    with pytest.raises(ValueError, match="norm_placement='middle'"):
        fused_ops.DepthwiseConvBNAct(8, norm_placement="middle")


def test_from_stock_shares_the_modules():
    stock, _ = pair("relu")
    fused = fused_ops.DepthwiseConvBNAct.from_stock(stock.conv, stock.bn, "relu")
    assert fused.conv is stock.conv
    assert fused.bn is stock.bn
    torch.testing.assert_close(fused.eval()(image()), stock.eval()(image()), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("conv", "message"),
    [
        (nn.Linear(4, 4), "conv is a Linear"),
        (nn.Conv2d(8, 8, 3), "8 input and 8 output channels in 1 groups"),
        (nn.Conv2d(8, 16, 3, groups=8), "8 input and 16 output channels"),
        (nn.Conv2d(8, 8, 2, groups=8), r"kernel_size=\(2, 2\); sizes must be odd"),
        (nn.Conv2d(8, 8, 3, padding=1, groups=8, padding_mode="reflect"), "padding_mode='reflect'"),
    ],
)
def test_other_convolutions_are_refused(conv, message):
    for make in (fused_ops.DepthwiseConv2d.from_stock, fused_ops.DepthwiseConvBNAct.from_stock):
        with pytest.raises(ValueError, match=message):
            make(conv, *(() if make.__self__ is fused_ops.DepthwiseConv2d else (nn.BatchNorm2d(8),)))


@pytest.mark.parametrize(
    "options",
    [
        {"activation": "silu", "bias": True},
        {"stride": 2, "kernel_size": 5},
        {"affine": False, "activation": "relu", "residual_placement": "before", "identity": True},
        {"norm_placement": "pre", "padding": 0},
        {"norm_placement": "pre", "identity": True},
        {"track_running_stats": False},
    ],
    ids=str,
)
def test_folding_makes_a_new_module(options):
    """D3: the same outputs in evaluation, no norm where it can go, and the live model trains on."""
    torch.manual_seed(1)
    live = nn.Sequential(fused_ops.DepthwiseConvBNAct(8, **options), nn.Conv2d(8, 4, 1)).double()
    for _ in range(3):
        live(image() * 2 + 1)
    before = copy.deepcopy(live.state_dict())
    folded = fused_ops.fold(live)
    foldable = options.get("track_running_stats", True) and not (
        options.get("norm_placement") == "pre" and options.get("padding") != 0
    )
    assert isinstance(folded[0], fused_ops.DepthwiseConv2d) is foldable
    assert not folded.training
    assert live.training
    with torch.no_grad():
        torch.testing.assert_close(folded(image()), live.eval()(image()), rtol=1e-10, atol=1e-10)
        for parameter in folded.parameters():
            parameter.zero_()
    live.train()(image()).sum().backward()
    assert live[0].conv.weight.grad is not None
    for name, value in before.items():
        if "running" not in name and "num_batches" not in name:
            torch.testing.assert_close(live.state_dict()[name], value, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("placement", ["post", "pre"])
def test_recomputing_saves_memory_and_changes_nothing(placement, backend):
    """P4: nothing of the output's size is kept but the input, and the gradients are the same."""
    dtype = backends_and_dtype(backend)
    results, kept = [], []
    for recompute in (False, True):
        torch.manual_seed(2)
        fused = fused_ops.DepthwiseConvBNAct(
            8, activation="silu", norm_placement=placement, recompute=recompute
        ).to(dtype)
        x = image(dtype).requires_grad_()
        saved = []

        def pack(tensor, saved=saved):
            saved.append(tensor)
            return tensor

        with fused_ops.backend(backend), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = fused(x)
        out.square().sum().backward()
        results.append([out.detach(), x.grad, *(parameter.grad for parameter in fused.parameters())])
        kept.append(len({tensor.data_ptr() for tensor in saved if tensor.numel() == x.numel()}))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    if backend != "reference":
        assert kept == [2, 1]
