"""Memory traffic of the kernels, counted without a GPU, against the least that the operator has to move."""

from __future__ import annotations

import pytest
import torch
from support.contract import case_named, require

from fused_ops.bench.traffic import count_triton, operator_traffic
from fused_ops.core import library
from fused_ops.core.triton_support import jit, tl

# Counted over least: halos and re-reads do not show here, so what is above 1 is partial sums and per-channel
# vectors, which weigh more on these small maps (28x28, 16 channels) than on a model's.
BOUND = {"forward": 1.06, "backward": 1.25}


@jit
def copy_kernel(source, target, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * 32 + tl.arange(0, BLOCK)
    mask = offsets < 96
    value = tl.load(source + offsets, mask=mask) + tl.load(source + offsets, mask=mask)
    tl.store(target + offsets, value, mask=mask)


@pytest.mark.parametrize(
    ("backend", "name", "directions"),
    [
        ("triton", "identity", {"forward", "backward"}),
        ("triton", "pre_train", {"forward", "backward"}),
        ("triton", "post_train_silu", {"forward", "backward"}),
        ("triton", "post_eval_relu6", {"forward", "backward"}),
        ("triton", "conv", {"forward", "backward"}),
        ("cuda", "identity", {"forward", "backward"}),
        ("cuda", "pre_train", {"forward", "backward"}),
        ("cuda", "post_train_silu", {"forward", "backward"}),
        ("cuda", "post_eval_relu6", {"forward", "backward"}),
        ("cuda", "conv", {"forward", "backward"}),
    ],
)
def test_counted_bytes(backend, name, directions, request):
    require(backend, "cpu", request)
    operator = library.operators()["depthwise"]
    case = case_named(f"traffic_{name}")
    rows = operator_traffic(
        operator,
        backend,
        case.name,
        lambda: case.make(
            torch.Generator().manual_seed(0), torch.bfloat16, torch.device("cpu"), "channels_last"
        ),
    )
    totals = {row["direction"]: row for row in rows if row["kernel"] == "total"}
    assert set(totals) == directions
    for direction, row in totals.items():
        ratio = row["counted_bytes"] / row["least_bytes"]
        assert 1.0 <= ratio <= BOUND[direction], f"{direction}: {ratio:.3f} times the least"
        assert row["counted_bytes"] <= row["block_bytes"] <= row["requested_bytes"]


def test_counts_are_what_a_copy_moves():
    """The counter itself, on a kernel whose traffic is known: 96 of 100 values read twice, written once."""
    require("triton", "cpu")
    with count_triton() as launches:
        copy_kernel[(3,)](torch.zeros(100), torch.zeros(100), BLOCK=64)
    (launch,) = launches
    # Blocks of 64 at every 32: 64 + 64 + 32 values asked for.
    assert launch.kernel == "copy_kernel"
    assert launch.counted_bytes == 2 * 96 * 4
    assert launch.block_bytes == 2 * 160 * 4
    assert launch.requested_bytes == 3 * 160 * 4
