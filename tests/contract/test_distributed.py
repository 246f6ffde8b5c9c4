"""Contract D8, D10: batch statistics over two processes equal one process with the whole batch."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from support.contract import require
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fused_ops

# Images of each process; one of them has none in the last two cases, and takes part all the same.
SPLITS = ((2, 3), (5, 0), (0, 4))


class MapMLP(nn.Module):
    """A feed-forward chain with a BatchNorm, on maps."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.block = fused_ops.MLPBlock(dim, 2, norm="batch")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def module(kind: str = "layers") -> nn.Module:
    torch.manual_seed(11)
    if kind == "ds_block":
        return fused_ops.DSBlock(4, 1, 2, attn_drop=0.0)
    return nn.Sequential(
        fused_ops.DepthwiseConvBNAct(4, activation="silu", residual_placement="before"),
        fused_ops.DepthwiseConvBNAct(4, bias=True, activation="none", momentum=None),
        MapMLP(4),
    )


def batch(size: int, dtype: torch.dtype) -> torch.Tensor:
    values = torch.randn(size, 4, 4, 5, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return (values + 3).to(dtype).contiguous(memory_format=torch.channels_last)


def step(model: nn.Module, x: torch.Tensor, backend: str) -> dict[str, torch.Tensor]:
    """Output, gradients (sums over images) and buffers after one forward and backward."""
    x.requires_grad_()
    with fused_ops.backend(backend):
        out = model(x)
    weights = torch.linspace(-1, 1, out.shape[1:].numel(), dtype=out.dtype).view(out.shape[1:])
    (out * weights + out.square()).sum().backward()
    found = {"out": out.detach(), "x": x.grad}
    found |= {name: parameter.grad for name, parameter in model.named_parameters()}
    return found | dict(model.named_buffers())


def worker(rank: int, folder: str, backend: str, dtype: torch.dtype, kind: str) -> None:
    sys.path[:0] = [str(Path(__file__).parents[1])]
    if backend == "triton":
        from support.interpreter import round_to_bfloat16

        round_to_bfloat16()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    results = []
    for split in SPLITS:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(module(kind)).to(dtype)
        start = sum(split[:rank])
        x = batch(sum(split), dtype)[start : start + split[rank]].detach()
        # An empty batch runs on the reference, beside kernels in the other process.
        found = step(model, x, backend if split[rank] else "reference")
        for name, _ in model.named_parameters():
            dist.all_reduce(found[name])
        results.append(found)
    # DistributedDataParallel takes synchronised norms on GPUs only, so each process has its own statistics.
    wrapped = DistributedDataParallel(module(kind).to(dtype), static_graph=True)
    found = step(wrapped, batch(4, dtype)[2 * rank : 2 * rank + 2].detach(), backend)
    results.append({name.removeprefix("module."): value for name, value in found.items()})
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("backend", "dtype", "kind"),
    [
        ("reference", torch.float64, "layers"),
        ("triton", torch.float32, "layers"),
        ("reference", torch.float64, "ds_block"),
        pytest.param("triton", torch.float32, "ds_block", marks=pytest.mark.extended),
    ],
)
def test_two_processes_equal_one(backend, dtype, kind, tmp_path):
    if backend != "reference":
        require(backend, "cpu")
    mp.start_processes(worker, (str(tmp_path), backend, dtype, kind), nprocs=2, start_method="spawn")
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    tolerance = {"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 2e-4, "atol": 2e-4}
    for split, *parts in zip(SPLITS, *(found[:-1] for found in ranks), strict=True):
        model = module(kind).double()
        want = step(model, batch(sum(split), torch.float64), "reference")
        for name, value in want.items():
            found = [part[name].double() for part in parts]
            if name in ("out", "x"):
                found = [torch.cat(found)]
            for got in found:
                torch.testing.assert_close(
                    got, value.double(), msg=lambda text, name=name: f"{name}: {text}", **tolerance
                )
    halves = [
        step(module(kind).double(), half.detach(), "reference") for half in batch(4, torch.float64).split(2)
    ]
    for name, _ in module(kind).named_parameters():
        for found in ranks:
            mean = (halves[0][name] + halves[1][name]) / 2
            torch.testing.assert_close(found[-1][name].double(), mean, **tolerance)


def test_one_process_needs_no_group():
    """A converted module in a single process, and one in evaluation, normalise as before."""
    plain, converted = module(), nn.SyncBatchNorm.convert_sync_batchnorm(module())
    x = batch(3, torch.float32)
    for training in (True, False):
        torch.testing.assert_close(converted.train(training)(x), plain.train(training)(x))


def test_converter_finds_the_norm():
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(module())
    norms = [converted[0].bn, converted[1].bn, converted[2].block.norm]
    assert all(isinstance(norm, nn.SyncBatchNorm) for norm in norms)
    assert list(converted.state_dict()) == list(module().state_dict())
