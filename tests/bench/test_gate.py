"""The regression gate on made-up rows."""

from __future__ import annotations

import dataclasses
import json

import pytest

from fused_ops.bench import gate, results
from fused_ops.bench.results import Row

OLD = Row(
    gpu="Made-up GPU",
    op="depthwise",
    model="dsnet_small",
    case="stage1",
    mode="forward",
    provider="triton",
    dtype="bfloat16",
    p20_us=98.0,
    p50_us=100.0,
    p80_us=102.0,
    fraction_of_limit=0.80,
    commit="aaaaaaa",
    l2="cold",
    graph=True,
    date="2000-01-01T00:00:00+00:00",
)


def slowed(factor, **changes):
    return dataclasses.replace(
        OLD,
        p20_us=OLD.p20_us * factor,
        p50_us=OLD.p50_us * factor,
        p80_us=OLD.p80_us * factor,
        fraction_of_limit=OLD.fraction_of_limit / factor,
        commit="bbbbbbb",
        date="2000-01-02T00:00:00+00:00",
        **changes,
    )


@pytest.mark.parametrize(
    ("new", "status", "fails"),
    [
        (slowed(1.0), "same", False),
        (slowed(1.5), "slower", True),
        (slowed(0.5), "faster", False),
        # Over 3 %, but inside the old band; the limit is what it was.
        (dataclasses.replace(slowed(1.0), p20_us=101.0, p50_us=104.0, p80_us=107.0), "same", False),
        # 2.9 %, outside the band.
        (dataclasses.replace(slowed(1.0), p20_us=102.5, p50_us=102.9, p80_us=103.0), "same", False),
        (dataclasses.replace(slowed(1.0), p20_us=102.5, p50_us=103.1, p80_us=104.0), "slower", True),
        (dataclasses.replace(slowed(1.0), fraction_of_limit=0.785), "same", False),
        (dataclasses.replace(slowed(1.0), fraction_of_limit=0.775), "below the limit", True),
        (dataclasses.replace(slowed(1.0), p50_us=None, note="failed: wrong"), "not measured", True),
    ],
)
def test_status(new, status, fails):
    (found,) = gate.compare([new], [OLD])
    assert (found.status, found.fails) == (status, fails)


def test_only_what_is_ours_fails():
    old = dataclasses.replace(OLD, provider="eager_nchw")
    (found,) = gate.compare([slowed(2.0, provider="eager_nchw")], [old])
    assert (found.status, found.fails) == ("slower", False)


def test_it_compares_with_the_last_committed_one_and_never_with_itself():
    older = dataclasses.replace(OLD, p50_us=500.0, date="1999-01-01T00:00:00+00:00")
    new = slowed(1.5)
    (found,) = gate.compare([older, OLD, new], [older, OLD, new])
    assert (found.old_us, found.new_us, found.fails) == (100.0, 150.0, True)


def test_missing_rows_are_named_within_what_was_run():
    other_case = dataclasses.replace(OLD, case="stage2")
    other_op = dataclasses.replace(OLD, op="attention")
    other_gpu = dataclasses.replace(OLD, gpu="Other GPU")
    found = gate.compare([slowed(1.0)], [OLD, other_case, other_op, other_gpu])
    assert [(row.case, row.status, row.fails) for row in found] == [
        ("stage2", "missing", False),
        ("stage1", "same", False),
    ]
    assert "committed at aaaaaaa" in found[0].reason


def write(folder, row):
    path = folder / "made-up-gpu" / "ops.csv"
    results.write_rows(path, [row])
    return path


def test_a_slowed_kernel_trips_the_command(tmp_path, capsys):
    write(tmp_path / "old", OLD)
    against = ["--against", str(tmp_path / "old")]
    assert gate.main([str(write(tmp_path / "same", slowed(1.01))), *against]) == 0
    assert "1 compared, 0 failed" in capsys.readouterr().out
    slow = str(write(tmp_path / "slow", slowed(1.2)))
    assert gate.main([slow, *against]) == 1
    out = capsys.readouterr().out
    assert "FAIL slower" in out
    assert "+20.0%" in out
    assert gate.main([slow, *against, "--json"]) == 1
    (row,) = json.loads(capsys.readouterr().out)
    assert row["change"] == pytest.approx(0.2)


def test_nothing_committed(tmp_path, capsys):
    (tmp_path / "none").mkdir()
    new = write(tmp_path / "new", OLD)
    assert gate.main([str(new), "--against", str(tmp_path / "none")]) == 0
    assert "nothing could be compared" in capsys.readouterr().out


def test_bad_input(tmp_path, capsys):
    broken = tmp_path / "broken.csv"
    broken.write_text("a,b\n1,2\n")
    for arguments in (
        [str(tmp_path / "nothing.csv")],
        [str(broken)],
        [str(write(tmp_path, OLD)), "--against", str(tmp_path / "no")],
    ):
        assert gate.main(arguments) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
