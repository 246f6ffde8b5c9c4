"""HIRI-ViT's HR-block as a module, against a composition of stock modules."""

from __future__ import annotations

import copy
import pickle
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from support.contract import require
from torch import nn

import fused_ops
from fused_ops.core import environment, native
from fused_ops.core.drop_path import drop_path

BACKENDS = ("reference", "triton")
KEYS = [
    "hr.weight",
    "hr.bias",
    "lr_dw.weight",
    "lr_bn.weight",
    "lr_bn.bias",
    "lr_bn.running_mean",
    "lr_bn.running_var",
    "lr_bn.num_batches_tracked",
    "fc1.weight",
    "fc1.bias",
    "fc2.weight",
    "fc2.bias",
]


class Stock(nn.Module):
    """The block of torch.nn modules alone, with the same names."""

    def __init__(self, dim, expansion=4, drop_path=0.0, high_bias=True, fc_bias=True, shortcut=True, **norm):
        super().__init__()
        self.hr = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=high_bias)
        self.lr_dw = nn.Conv2d(dim, dim, 3, stride=2, padding=1, groups=dim, bias=False)
        self.lr_bn = nn.BatchNorm2d(dim, **norm)
        self.fc1 = nn.Linear(dim, int(dim * expansion), bias=fc_bias)
        self.fc2 = nn.Linear(int(dim * expansion), dim, bias=fc_bias)
        self.drop, self.shortcut = drop_path, shortcut

    def forward(self, x):
        low = self.lr_bn(self.lr_dw(x)).movedim(1, -1)
        low = self.fc2(nn.functional.gelu(self.fc1(low))).movedim(-1, 1)
        low = nn.functional.interpolate(low, scale_factor=2, mode="nearest")
        branch = self.hr(x) + low[:, :, : x.shape[2], : x.shape[3]]
        branch = drop_path(branch, self.drop, self.training)
        return x + branch if self.shortcut else branch


def pair(dim=8, dtype=torch.float64, **options):
    """The stock block in float64 and ours with the same initial values in ``dtype``."""
    torch.manual_seed(3)
    stock = Stock(dim, **options).double()
    torch.manual_seed(3)
    fused = fused_ops.HRBlock(dim, **options).to(dtype)
    with torch.no_grad():
        for module in (stock, fused):
            torch.manual_seed(4)
            for buffer in (module.lr_bn.running_mean, module.lr_bn.running_var):
                if buffer is not None:
                    buffer.copy_(torch.rand(dim, dtype=torch.float64) + 0.5)
    return stock, fused


def image(size=(5, 6), batch=3, dim=8):
    values = torch.randn(batch, dim, *size, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return (values + 0.5).contiguous(memory_format=torch.channels_last)


def step(module, x, backend="auto", seed=7):
    """Output, gradients and buffers of one forward and backward; the same random numbers each time."""
    torch.manual_seed(seed)
    x = x.detach().clone().requires_grad_()
    with fused_ops.backend(backend):
        out = module(x)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    (out * weights).sum().backward()
    found = {"out": out.detach(), "x": x.grad}
    found |= {name: parameter.grad for name, parameter in module.named_parameters()}
    return found | {name: value.clone() for name, value in module.named_buffers()}


def assert_equal(got, want, tolerance):
    assert list(got) == list(want)
    for name, value in want.items():
        if value is None:
            assert got[name] is None, name
            continue
        scale = max(1.0, value.abs().max().item())
        message = f"{name}: {(got[name].double() - value.double()).abs().max()}"
        torch.testing.assert_close(
            got[name].double(), value.double(), rtol=0, atol=tolerance * scale, msg=message
        )


def test_state_dict_equals_stock_both_ways():
    """D1, D2: keys, order, shapes and initial values; loaded strictly in both directions."""
    stock, fused = pair()
    assert list(fused.state_dict()) == list(stock.state_dict()) == KEYS
    for key, value in stock.state_dict().items():
        torch.testing.assert_close(fused.state_dict()[key], value, rtol=0, atol=0)
    fused.load_state_dict(stock.state_dict(), strict=True)
    stock.load_state_dict(fused.state_dict(), strict=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("mode", "size", "options"),
    [
        ("train", (5, 6), {"drop_path": 0.4}),
        ("eval", (7, 4), {}),
        ("frozen", (4, 5), {"shortcut": False}),
        ("train", (4, 4), {"fc_bias": False, "high_bias": False, "expansion": 2, "affine": False}),
    ],
)
def test_equals_stock(mode, size, options, backend):
    """Outputs, gradients and running statistics with BatchNorm in its three modes; odd sizes; drop path."""
    if backend == "triton":
        require(backend, "cpu")
    dtype = torch.float64 if backend == "reference" else torch.float32
    stock, fused = pair(dtype=dtype, **options)
    for module in (stock, fused):
        module.train(mode != "eval")
        if mode == "frozen":
            module.lr_bn.eval()
    x = image(size)
    want, got = step(stock, x), step(fused, x.to(dtype), backend)
    assert_equal(got, want, 1e-10 if backend == "reference" else 2e-5)
    moved = not torch.equal(want["lr_bn.running_mean"], pair()[0].lr_bn.running_mean)
    assert moved is (mode == "train")


def test_drop_path_drops_whole_images_forward_and_backward():
    """The images that keep their branch are those of the stock module; the others pass x and its gradient."""
    require("triton", "cpu")
    _, fused = pair(dtype=torch.float32, drop_path=0.5, expansion=2)
    x = image((3, 4), batch=6).float()
    found = step(fused, x, "triton")
    dropped = [bool(torch.equal(found["out"][n], x[n])) for n in range(6)]
    assert 0 < sum(dropped) < 6
    torch.manual_seed(7)
    mask = drop_path(torch.ones(6, 1, 1, 1), 0.5, True).flatten()
    assert dropped == [bool(factor == 0) for factor in mask]
    weights = torch.linspace(-1, 1, x.numel()).view(x.shape)
    for n in range(6):
        # BatchNorm's statistics join all images, so that the gradient of a dropped one is not the incoming.
        assert not torch.equal(found["x"][n], weights[n])
    assert torch.equal(step(fused.eval(), x, "triton")["out"], step(fused, x, "triton", seed=8)["out"])


def test_momentum_none_and_no_running_statistics():
    """D2."""
    for options in ({"momentum": None}, {"track_running_stats": False}):
        stock, fused = pair(**options)
        for batch in (3, 2):
            assert_equal(step(fused, image(batch=batch)), step(stock, image(batch=batch)), 1e-10)
        torch.testing.assert_close(fused.eval()(image()), stock.eval()(image()))


def test_other_norms_run_the_stock_way():
    """What a converter puts in the norm's place, drop path included."""
    for norm in (nn.GroupNorm(2, 8), nn.Identity()):
        stock, fused = pair(drop_path=0.5)
        stock.lr_bn, fused.lr_bn = norm.double(), copy.deepcopy(norm).double()
        assert_equal(step(fused, image((5, 7))), step(stock, image((5, 7))), 1e-10)


def test_autocast():
    """D6: float32 parameters, bfloat16 activations; the backward runs outside of the autocast region."""
    stock, fused = pair(dtype=torch.float32)
    stock = stock.float()
    results = []
    for module in (stock, fused):
        x = image().float().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            out = module(x)
        results.append([out, *torch.autograd.grad(out.float().square().sum(), [x, *module.parameters()])])
    assert results[1][0].dtype == torch.bfloat16
    for want, got in zip(*results, strict=True):
        assert (got.float() - want.float()).norm() <= 0.03 * want.float().norm() + 1e-3


def test_copies_pickles_and_meta():
    """D7."""
    _, fused = pair()
    for twin in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        torch.testing.assert_close(twin.eval()(image()), fused.eval()(image()), rtol=0, atol=0)
    meta = fused_ops.HRBlock(8, device="meta")
    assert meta(torch.empty(2, 8, 6, 5, device="meta")).shape == (2, 8, 6, 5)
    meta.to_empty(device="cpu").load_state_dict(fused.state_dict(), strict=True)
    assert "activation=gelu, shortcut=True" in repr(fused)


def test_explain():
    explanation = fused_ops.explain(nn.Sequential(fused_ops.HRBlock(8)), torch.randn(2, 8, 6, 5))
    (row,) = explanation.rows()
    assert (row["module"], row["op"], row["backend"]) == ("0", "hr_chain", "reference")
    assert row["call"].startswith("on (2, 8, 6, 5) float32 NCHW, hidden width 32, norm with batch statistics")
    assert set(row["rejected"]) == {"triton", "cuda"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 0}, "dim=0 is not allowed"),
        ({"dim": 8, "expansion": 0.1}, "expansion=0.1 leaves no hidden unit of 8 channels"),
        ({"dim": 8, "activation": "mish"}, "activation='mish' is unknown; use one of none, relu"),
        ({"dim": 8, "drop_path": 2.0}, r"drop_path must be in \[0, 1\], got 2.0"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        fused_ops.HRBlock(**options)


# Synchronised statistics


def synchronised(dtype):
    torch.manual_seed(11)
    return nn.SyncBatchNorm.convert_sync_batchnorm(fused_ops.HRBlock(4, 2).to(dtype))


def sync_step(module, x, backend):
    x = x.detach().requires_grad_()
    with fused_ops.backend(backend):
        out = module(x)
    weights = torch.linspace(-1, 1, out.shape[1:].numel(), dtype=out.dtype).view(out.shape[1:])
    (out * weights + out.square()).sum().backward()
    found = {"out": out.detach(), "x": x.grad}
    found |= {name: parameter.grad for name, parameter in module.named_parameters()}
    return found | dict(module.named_buffers())


def worker(rank, folder, cases):
    sys.path[:0] = [str(Path(__file__).parents[1])]
    if any(backend == "triton" for backend, _ in cases):
        from support.interpreter import save_time

        save_time()
    if any(backend == "cuda" for backend, _ in cases):
        native.set_emulator(native.build_emulator())
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save([sync_steps(rank, *case) for case in cases], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def sync_steps(rank, backend, dtype):
    results = []
    for split in ((2, 1), (0, 3)):
        module = synchronised(torch.float32 if dtype == torch.float16 else dtype)
        assert isinstance(module.lr_bn, nn.SyncBatchNorm)
        start = sum(split[:rank])
        x = image((3, 4), sum(split), 4)[start : start + split[rank]].to(dtype)
        # An empty batch runs on the reference, beside kernels in the other process.
        found = sync_step(module, x, backend if split[rank] else "reference")
        for name, _ in module.named_parameters():
            dist.all_reduce(found[name])
        results.append(found)
    return results


def test_two_processes_equal_one(tmp_path, built_emulator):
    """D8: also where one process has no image."""
    # Starting two processes takes longer than a case, so that one pair runs all.
    cases = [("reference", torch.float64), ("cuda", torch.float16)]
    if environment.interpreting():
        cases.append(("triton", torch.float32))
    mp.start_processes(worker, (str(tmp_path), cases), nprocs=2, start_method="spawn")
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    torch.manual_seed(11)
    module = fused_ops.HRBlock(4, 2).double()
    want = sync_step(module, image((3, 4), 3, 4), "reference")
    for (backend, dtype), *results in zip(cases, *ranks, strict=True):
        tolerance = {torch.float64: 1e-10, torch.float32: 2e-4, torch.float16: 3e-2}[dtype]
        for parts in zip(*results, strict=True):
            for name, value in want.items():
                found = [part[name].double() for part in parts]
                if name in ("out", "x"):
                    found = [torch.cat(found)]
                for got in found:
                    torch.testing.assert_close(
                        got, value.double(), rtol=tolerance, atol=tolerance, msg=f"{backend} {name}"
                    )
