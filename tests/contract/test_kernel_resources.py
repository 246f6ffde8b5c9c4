"""Registers and spills of the Triton kernels, compiled without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

# The committed report, which is of these sources, has every kernel for every architecture.
DEPTHWISE = {
    "forward_kernel",
    "normalise_kernel",
    "backward_kernel",
    "general_forward_kernel",
    "general_backward_kernel",
    "post_norm_sums_kernel",
    "pre_norm_finish_kernel",
    "moments_kernel",
    "merge_moments_kernel",
    "finish_gradients_kernel",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("operators", "kernels"),
    [
        (("gate_scale", "context_pool"), {"scale_forward_kernel", "context_forward_kernel"}),
        pytest.param((), DEPTHWISE, marks=pytest.mark.extended),
    ],
)
def test_triton_kernels_do_not_spill(operators, kernels):
    """With the compiler of this machine, for one architecture."""
    # In a process of its own: where the interpreter is on, nothing can be compiled.
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    result = subprocess.run(
        [
            *(sys.executable, "-m", "fused_ops.bench.resources", "--backend", "triton"),
            *("--archs", "90", "--json"),
            *(("--op", *operators) if operators else ()),
        ],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.stdout, result.stderr
    rows = json.loads(result.stdout)
    assert {row["kernel"] for row in rows} >= kernels
    spilling = [row for row in rows if row["spill_bytes"]]
    assert not spilling, spilling
    # 255 registers are the limit of a thread; at most 240 leave the compiler of another version some room.
    assert max(row["registers"] for row in rows) <= 240
    # A failed allocation shows as few registers, not as a spill.
    assert min(row["registers"] for row in rows) >= 16
    # What a block may have on sm_86 and sm_120, the least of all architectures.
    assert max(row["shared_bytes"] for row in rows) <= 99 * 1024
