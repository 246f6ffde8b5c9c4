"""``fused-ops tune``: the fastest right tile is written, the rule's stays unless another clearly beats it."""

from __future__ import annotations

import json

import pytest
import torch
from bench_helpers import FakeDevice

from fused_ops.bench import timing, tune
from fused_ops.core import backends, environment, library, tuning
from fused_ops.core.backends import Backend
from fused_ops.core.cases import Case

PLAN = timing.Plan(warmup_seconds=0.0, rounds=3, least_calls=1, most_calls=1, least_sets=1)
RULE, FAST, SLOW, WRONG, BROKEN = (1,), (2,), (3,), (4,), (5,)


class FakeCpu(FakeDevice):
    """Scripted times for work on CPU tensors."""

    def __init__(self) -> None:
        super().__init__(graphs=False)
        self.is_cpu = True


def operator_on(device: FakeDevice, seconds: dict[tuple[int, ...], float]) -> library.Operator:
    """``x + 1`` on a backend with one kernel, whose tile decides its time and whether it is right."""

    def function(x: torch.Tensor) -> torch.Tensor:
        if backends.requested_backend() == "reference":
            return x + 1
        tile = tuning.tile_of("kernel", tuple(x.shape[1:]), lambda: RULE, x)
        if tile == BROKEN:
            raise RuntimeError("out of resource: shared memory\nand more")
        device.time += seconds.get(tile, 1.0)
        return x + (2 if tile == WRONG else 1)

    entry = Backend(
        "triton",
        lambda call: (True, ""),
        function,
        function,
        tiles=lambda kernel, sizes: [RULE, FAST, SLOW, WRONG, BROKEN],
    )
    return library.Operator("sample", function, (entry,), lambda: (), lambda call, direction: 0, ())


def make(generator, dtype, device, layout):
    return {"x": torch.randn(2, 3, 4, 5, generator=generator).to(dtype).requires_grad_()}


CASE = Case("sample_case", make, frozenset({"model"}))


def tuned(seconds, deadline=None):
    device = FakeCpu()
    operator = operator_on(device, seconds)
    deadline = deadline or timing.Deadline(None, device.now)
    return tune.run([(operator, CASE)], ["triton"], ["float32"], device, deadline, PLAN)


def test_the_fastest_right_tile_wins(capsys):
    rows = tuned({RULE: 2e-3, FAST: 1e-3, SLOW: 4e-3, WRONG: 1e-4})
    (row,) = rows["kernel"]
    assert (row["sizes"], row["tile"], row["heuristic_tile"]) == ([3, 4, 5], [2], [1])
    assert row["microseconds"] == pytest.approx(1000)
    assert row["heuristic_microseconds"] == pytest.approx(2000)
    assert row["case"] == "sample_case"
    printed = capsys.readouterr()
    assert "kernel (5,): RuntimeError: out of resource: shared memory" in printed.err
    assert "[2] 1000.0 us, heuristic (1,) 2000.0 us" in printed.err


def test_a_gain_within_the_margin_changes_nothing():
    (row,) = tuned({RULE: 2e-3, FAST: 1.99e-3, SLOW: 4e-3})["kernel"]
    assert row["tile"] == [1]


def test_no_time_left_writes_nothing():
    clock = FakeCpu()
    deadline = timing.Deadline(1.0, clock.now)
    clock.time = 2.0
    assert tuned({RULE: 2e-3, FAST: 1e-3}, deadline) == {}


def test_what_is_written_is_what_is_read(tmp_path):
    rows = tuned({RULE: 2e-3, FAST: 1e-3, SLOW: 4e-3})
    path = tmp_path / f"{environment.gpu_slug('A GPU')}.json"
    path.write_text(tuning.text_of("A GPU", rows, commit="c0ffee"))
    assert tuning.read(path) == {"kernel": [((3, 4, 5), FAST)]}
    assert json.loads(path.read_text())["commit"] == "c0ffee"


@pytest.mark.parametrize("json_wanted", [False, True])
def test_the_command_writes_and_prints(json_wanted, tmp_path, capsys, monkeypatch):
    rows = tuned({RULE: 2e-3, FAST: 1e-3, SLOW: 4e-3})
    device = FakeDevice(graphs=False)
    device.is_cpu, device.name = False, "A GPU"
    monkeypatch.setattr(timing, "default_device", lambda: device)
    monkeypatch.setattr(tune, "run", lambda *_: rows)
    capsys.readouterr()
    assert tune.main(["--out", str(tmp_path), *(["--json"] if json_wanted else [])]) == 0
    out = capsys.readouterr().out
    (path,) = tmp_path.iterdir()
    assert tuning.read(path) == {"kernel": [((3, 4, 5), FAST)]}
    if json_wanted:
        assert json.loads(out) == [{"kernel": "kernel", **rows["kernel"][0]}]
    else:
        assert out == f"{path}: 1 choices for 1 kernels\n"


def test_it_needs_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(timing, "default_device", timing.CpuDevice)
    assert tune.main(["--op", "depthwise"]) == 2
    assert "needs a GPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["--op", "nothing"], ["--backend", "reference"], ["--case", "nowhere"], ["--seconds", "0"]]
)
def test_bad_arguments_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        tune.main(arguments)
    assert arguments[1] in capsys.readouterr().err
