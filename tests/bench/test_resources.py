"""The report of registers and spills: reading the compiler's output, and what changed."""

from __future__ import annotations

import dataclasses
import json

import pytest

from fused_ops.bench import resources
from fused_ops.bench.resources import Resources
from fused_ops.core import native

ROW = Resources("depthwise", "cuda", "forward", "float, 4", "sm_90", 64, 0, 1024)


def test_threads_are_read_from_the_object_file():
    lines = (
        "arch = sm_90",
        ".nv.info._Z7forwardIfLi4EEvPf",
        "\t<0x12>",
        "\tAttribute:\tEIATTR_MAX_THREADS",
        "\tFormat:\tEIFMT_SVAL",
        "\tValue:\t0x80 0x1 0x1 ",
    )
    assert resources.parse_threads("\n".join(lines)) == {("sm_90", "_Z7forwardIfLi4EEvPf"): 128}


@pytest.mark.parametrize(
    ("arch", "threads", "registers", "shared", "expected"),
    [
        # 128 registers: 4 warps in each of four parts, so 16 of 64.
        ("sm_90", 128, 128, 0, 16 / 64),
        # 32 registers: all 64 warps, in 16 blocks of 4; on sm_86 48 warps are all there is.
        ("sm_90", 128, 32, 1024, 1.0),
        ("sm_86", 128, 32, 1024, 1.0),
        # 100 KB of shared memory: two blocks on sm_90, one on sm_86 (reserved kilobyte left out).
        ("sm_90", 256, 32, 100 * 1024, 16 / 64),
        ("sm_86", 256, 32, 100 * 1024, 8 / 48),
        # One warp a block: the number of blocks decides.
        ("sm_80", 32, 16, 0, 32 / 64),
        ("sm_90", 0, 32, 0, None),
        ("sm_12", 128, 32, 0, None),
    ],
)
def test_occupancy(arch, threads, registers, shared, expected):
    assert resources.occupancy(arch, threads, registers, shared) == expected


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
    rows = [dataclasses.asdict(row) for row in (ROW, other)]
    path.write_text(json.dumps({"sources": {}, "rows": rows}))
    assert resources.committed(None, None, path) == [ROW, other]
    assert resources.committed("cuda", None, path) == [ROW]
    assert resources.committed(None, ["80"], path) == [other]
    assert resources.committed(None, None)


def test_the_report_is_brought_up_to_date_family_by_family(tmp_path, monkeypatch):
    compiled = []

    def compile_all(backend):
        def rows(archs, families):
            compiled.append((backend, families))
            return [dataclasses.replace(ROW, op=family, backend=backend) for family in families]

        return rows

    monkeypatch.setattr(resources, "native_resources", compile_all("cuda"))
    monkeypatch.setattr(resources, "triton_resources", compile_all("triton"))
    digests = {"sample cuda": "1", "sample triton": "1", "other triton": "1"}
    monkeypatch.setattr(resources, "source_digests", lambda: digests)
    path = tmp_path / "resources.json"
    assert resources.write_report(path) == list(digests)
    assert compiled == [("cuda", ["sample"]), ("triton", ["sample", "other"])]
    compiled.clear()
    assert resources.write_report(path) == []
    digests = {"sample cuda": "1", "sample triton": "2"}
    assert resources.write_report(path) == ["sample triton"]
    assert compiled == [("triton", ["sample"])]
    known, rows = resources.read_report(path)
    assert known == digests
    assert [(row.op, row.backend) for row in rows] == [("sample", "cuda"), ("sample", "triton")]


def test_the_committed_report_is_of_these_kernels():
    """For every architecture, without spills. `fused-ops bench resources --write` brings it up to date."""
    known, rows = resources.read_report(resources.report_path())
    assert known == resources.source_digests()
    assert {(row.op, row.backend, row.arch) for row in rows} == {
        (*family.split(), f"sm_{arch}")
        for family in known
        for arch in native.build_tools().SUPPORTED_ARCHITECTURES
    }
    assert not [row for row in rows if row.spill_bytes]
    # 255 registers are the limit of a thread; what is left is room for the compiler of another version.
    assert max(row.registers for row in rows) <= 240
    # What a block may have on sm_86, sm_89 and sm_120.
    assert max(row.shared_bytes for row in rows) <= 100 * 1024
