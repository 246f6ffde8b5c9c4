"""Registers and spills of the compiled kernels."""

from __future__ import annotations

import pytest

from fused_ops.bench import resources

LISTING = """
arch = sm_90
Resource usage:
 Common:
  GLOBAL:0
 Function _ZN1a6kernelIfLi4EEEvi:
  REG:63 STACK:8 SHARED:2560 LOCAL:16 CONSTANT[0]:920 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


def test_parsing():
    (row,) = resources.parse_resource_usage(LISTING, "depthwise", "cuda")
    assert (row.arch, row.registers, row.spill_bytes, row.shared_bytes) == ("sm_90", 63, 24, 2560)
    assert (row.op, row.backend) == ("depthwise", "cuda")
    assert "kernel" in row.kernel
    assert "spills" in resources.format_table([row])


@pytest.mark.extended
def test_no_kernel_spills(tools):
    """Compiled here, for one architecture; the committed report has all, and is held to the sources."""
    try:
        tools.find_toolkit()
        resources.find_cuobjdump()
    except RuntimeError as error:
        pytest.skip(str(error))
    rows = resources.native_resources(["90"])
    spilling = [row for row in rows if row.spill_bytes]
    assert not spilling, resources.format_table(spilling)
    # 255 registers are the limit of a thread; the rest leaves the compiler of another version some room.
    assert max(row.registers for row in rows) <= 240
    assert max(row.shared_bytes for row in rows) <= 48 * 1024
    assert len(rows) == len({(row.kernel, row.config) for row in rows})
