"""Contract D8, D10: batch statistics over two processes equal one process with the whole batch."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fused_ops
from fused_ops.core import environment

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


def worker(rank: int, folder: str, cases: list[tuple[str, torch.dtype, str]]) -> None:
    sys.path[:0] = [str(Path(__file__).parents[1])]
    if any(backend == "triton" for backend, *_ in cases):
        from support.interpreter import round_to_bfloat16, save_time

        round_to_bfloat16()
        save_time()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save([steps(rank, *case) for case in cases], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def steps(rank: int, backend: str, dtype: torch.dtype, kind: str) -> list[dict[str, torch.Tensor]]:
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
    return results


# Starting two processes takes longer than a case, so that one pair runs several.
CASES = [
    ("reference", torch.float64, "layers"),
    ("reference", torch.float64, "ds_block"),
    ("triton", torch.float32, "layers"),
]
MORE_CASES = [("triton", torch.float32, "ds_block")]


@pytest.mark.parametrize(
    "cases", [CASES, pytest.param(MORE_CASES, marks=pytest.mark.extended)], ids=["some", "more"]
)
def test_two_processes_equal_one(cases, tmp_path):
    cases = [case for case in cases if case[0] == "reference" or environment.interpreting()]
    if not cases:
        pytest.skip("Triton compiles for the GPU in this run; its interpreter is off")
    mp.start_processes(worker, (str(tmp_path), cases), nprocs=2, start_method="spawn")
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for case, *found in zip(cases, *ranks, strict=True):
        check(*case, found)


def check(backend, dtype, kind, ranks):
    """What two processes found in :func:`steps` against one process in float64."""
    context = f"{backend} {kind}: "
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
                    got, value.double(), msg=lambda text, name=name: f"{context}{name}: {text}", **tolerance
                )
    halves = [
        step(module(kind).double(), half.detach(), "reference") for half in batch(4, torch.float64).split(2)
    ]
    for name, _ in module(kind).named_parameters():
        for found in ranks:
            mean = (halves[0][name] + halves[1][name]) / 2
            torch.testing.assert_close(
                found[-1][name].double(),
                mean,
                msg=lambda text, name=name: f"{context}halves, {name}: {text}",
                **tolerance,
            )


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
