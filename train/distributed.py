"""The ranks of a run: one process, or many under torchrun."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .settings import LocalUsageError, UsageError, launched_ranks


@dataclass(frozen=True)
class World:
    """This process's place among the ranks, and its device."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this rank prints and writes."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum over ranks."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def largest(self, value: int) -> int:
        """Largest value on any rank. A tensor on the CPU goes through gloo: the GPU's queue is left alone."""
        if self.size == 1:
            return value
        tensor = torch.tensor(value)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return int(tensor)

    def gather(self, value: Any) -> list[Any]:
        """The objects of all ranks, on every rank."""
        if self.size == 1:
            return [value]
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, value)
        return gathered

    def from_main(self, value: Any) -> Any:
        """Rank 0's object, on every rank."""
        if self.size == 1:
            return value
        holder = [value]
        dist.broadcast_object_list(holder, src=0)
        return holder[0]

    def share_buffers(self, module: nn.Module) -> None:
        """Give every rank rank 0's buffers, as DistributedDataParallel does.

        Called before evaluation only: in training mode running statistics are written, never read.
        """
        if self.size > 1:
            for buffer in module.buffers():
                dist.broadcast(buffer, src=0)

    def close(self) -> None:
        """Leave the process group."""
        if self.size > 1:
            dist.destroy_process_group()


def join(device: str) -> World:
    """Choose this rank's device and join the other ranks."""
    rank, size = launched_ranks()
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: PyTorch sees no GPU; allowed here: cpu, auto")
    if device == "cpu" or not torch.cuda.is_available():
        chosen = torch.device("cpu")
    else:
        local = int(os.environ.get("LOCAL_RANK", 0))
        count = torch.cuda.device_count()
        if local >= count:
            raise LocalUsageError(
                f"--nproc-per-node: rank {local} of this machine has no GPU of its own ({count} here)"
            )
        chosen = torch.device("cuda", local)
        torch.cuda.set_device(chosen)
    if size > 1:
        # Both back ends: tensors on the GPU go through NCCL, flags and objects on the CPU through gloo.
        dist.init_process_group("gloo" if chosen.type == "cpu" else "cpu:gloo,cuda:nccl")
    return World(rank, size, chosen)
