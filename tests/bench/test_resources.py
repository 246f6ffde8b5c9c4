"""The report of registers and spills: reading the compiler's output, and what changed."""

from __future__ import annotations

import dataclasses
import json

from fused_ops.bench import resources
from fused_ops.bench.resources import Resources

ROW = Resources("depthwise", "cuda", "forward", "float, 4", "sm_90", 64, 0, 1024)


def test_usage_is_read_from_the_tools_output():
    text = """
    Fatbin elf code:
    arch = sm_90
    Resource usage:
     Common:
      GLOBAL:0
     Function _Z7forwardIfLi4EEvPf:
      REG:64 STACK:16 SHARED:1024 LOCAL:8 CONSTANT[0]:560 TEXTURE:0 SURFACE:0 SAMPLER:0
    """
    (row,) = resources.parse_resource_usage(text, "depthwise", "cuda")
    assert (row.arch, row.registers, row.spill_bytes, row.shared_bytes) == ("sm_90", 64, 24, 1024)
    assert (row.kernel, row.config) == ("forward", "float, 4")


def test_changes_name_what_is_new_gone_and_different():
    more = dataclasses.replace(ROW, registers=80)
    gone, new = (dataclasses.replace(ROW, config=name) for name in ("half, 8", "half, 4"))
    found = resources.changes([ROW, gone], [more, new])
    assert [(row["config"], row["before"], row["after"]) for row in found] == [
        ("float, 4", (64, 0, 1024), (80, 0, 1024)),
        ("half, 8", (64, 0, 1024), None),
        ("half, 4", None, (64, 0, 1024)),
    ]
    assert resources.changes([ROW], [ROW]) == []
    assert "64 registers, 0 spilled, 1024 shared" in resources.format_changes(found)
    assert "no kernel uses more or less" in resources.format_changes([])


def test_changes_are_against_the_committed_report(tmp_path):
    other = dataclasses.replace(ROW, arch="sm_80", backend="triton")
    path = tmp_path / "resources.json"
    path.write_text(json.dumps([dataclasses.asdict(row) for row in (ROW, other)]))
    assert resources.committed(None, None, path) == [ROW, other]
    assert resources.committed("cuda", None, path) == [ROW]
    assert resources.committed(None, ["80"], path) == [other]
    assert resources.committed(None, None)
