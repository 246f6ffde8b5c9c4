"""The timing harness, on a clock that only moves when told to."""

from __future__ import annotations

import numpy as np
import pytest
from bench_helpers import FakeDevice

from fused_ops.bench import timing
from fused_ops.bench.timing import Contestant, Deadline, Plan, Rotation, Timing

PLAN = Plan(warmup_seconds=0.0, rounds=3, least_calls=2, most_calls=64)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 16, 101])
@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.8, 1.0])
def test_quantile_is_numpys(count, share):
    values = np.random.default_rng(count).normal(size=count)
    assert timing.quantile(values.tolist(), share) == pytest.approx(np.quantile(values, share), rel=1e-12)


def test_quantiles_by_hand():
    timed = Timing((5.0, 1.0, 4.0, 2.0, 3.0, 6.0))
    assert (timed.p20, timed.p50, timed.p80) == pytest.approx((2.0, 3.5, 5.0))


@pytest.mark.parametrize(("values", "share"), [([], 0.5), ([1.0], 1.5), ([1.0], -0.1)])
def test_quantile_refuses(values, share):
    with pytest.raises(ValueError, match=r"values is empty|share="):
        timing.quantile(values, share)


@pytest.mark.parametrize("l2", [1000, 50 << 20])
@pytest.mark.parametrize("divisor", [0.5, 1, 3, 10, 17.3, 200])
def test_rotation_is_larger_than_three_times_l2(l2, divisor):
    size = int(l2 / divisor)
    turn = timing.rotation(size, l2, Plan())
    if turn.cold:
        assert turn.sets * size > 3 * l2
        # Every set is used by every run, so the next run finds it cold.
        assert turn.calls >= max(turn.sets, Plan().least_calls)
        assert turn.sets >= 2
    else:
        assert divisor == 200
        assert turn.sets == 1


def test_rotation_uses_no_more_sets_than_needed():
    turn = timing.rotation(100, 1000, Plan())
    assert turn == Rotation(31, 31, True)
    assert timing.rotation(4000, 1000, Plan()) == Rotation(2, 10, True)


def test_rotation_on_a_cpu_is_one_set():
    assert timing.rotation(100, 0, timing.CPU_PLAN) == Rotation(1, 1, False)


def test_rotation_refuses_an_empty_set():
    with pytest.raises(ValueError, match="set_bytes=0"):
        timing.rotation(0, 1000, PLAN)


def test_the_gpu_plan_keeps_to_the_protocol():
    assert timing.GPU_PLAN.warmup_seconds >= 0.2
    assert timing.GPU_PLAN.rounds >= 15
    assert timing.GPU_PLAN.least_calls >= 10


def test_warm_up_runs_for_the_time_given():
    device = FakeDevice()
    assert timing.warm_up(device, device.work("a", 0.03), 0.2) == 7
    assert device.time >= 0.2


def test_warm_up_runs_at_least_once():
    device = FakeDevice()
    assert timing.warm_up(device, device.work("a", 0.03), 0.0) == 1


def prepared(device, contestants, turn, plan=PLAN, graph=False):
    assert timing.prepare(device, contestants, turn, plan, graph=graph) == {}
    device.calls.clear()


@pytest.mark.parametrize("graph", [False, True])
def test_rounds_are_interleaved_and_sets_rotate(graph):
    device = FakeDevice()
    turn = Rotation(2, 3, True)
    contestants = [Contestant(name, [device.work((name, i), 1.0) for i in range(2)]) for name in "AB"]
    prepared(device, contestants, turn, graph=graph)
    timings = timing.interleave(device, contestants, turn, PLAN)
    one_round = [(name, index) for name in "AB" for index in (0, 1, 0)]
    # One round more than counted: the first is thrown away.
    assert device.calls == one_round * 4
    assert device.captured == ([(3, 2)] * 2 if graph else [])
    assert {name: len(entry.samples) for name, entry in timings.items()} == {"A": 3, "B": 3}


def test_times_are_per_call():
    device = FakeDevice()
    turn = Rotation(2, 4, True)
    contestants = [Contestant("A", [device.work("A", 0.5)] * 2), Contestant("B", [device.work("B", 2.0)] * 2)]
    prepared(device, contestants, turn)
    timings = timing.interleave(device, contestants, turn, PLAN)
    assert timings["A"].samples == (0.5,) * 3
    assert timings["B"].p50 == 2.0


def test_the_first_round_is_not_counted():
    device = FakeDevice()
    turn = Rotation(1, 1, False)
    contestant = Contestant("A", [device.work("A", [9.0, 8.0, 1.0, 2.0, 3.0])])
    prepared(device, [contestant], turn)
    assert timing.interleave(device, [contestant], turn, PLAN)["A"].samples == (1.0, 2.0, 3.0)


def test_results_of_one_rotation_are_kept_apart():
    alive: list[int] = []
    most = 0

    class Result:
        def __init__(self) -> None:
            nonlocal most
            alive.append(1)
            most = max(most, len(alive))

        def __del__(self) -> None:
            alive.pop()

    turn = Rotation(3, 9, True)
    timing.one_run(Contestant("A", [Result] * 3), turn)()
    # While the fourth is made, the three before it are still there: it cannot take their memory.
    assert most == 4
    assert not alive


def test_a_contestants_context_is_entered_once_per_run():
    device = FakeDevice()
    entered = []

    class Context:
        def __enter__(self):
            entered.append("in")

        def __exit__(self, *_):
            entered.append("out")

    turn = Rotation(1, 5, False)
    timing.one_run(Contestant("A", [device.work("A", 1.0)], Context), turn)()
    assert entered == ["in", "out"]
    assert len(device.calls) == 5


def test_what_cannot_be_captured_says_why():
    device = FakeDevice(graphs=False)
    contestant = Contestant("A", [device.work("A", 1.0)])
    failed = timing.prepare(device, [contestant], Rotation(1, 2, False), PLAN, graph=True)
    assert failed == {"A": "operation not permitted when stream is capturing"}


def test_two_contestants_of_one_name_are_refused():
    device = FakeDevice()
    contestants = [Contestant("A", [device.work("A", 1.0)]) for _ in range(2)]
    with pytest.raises(ValueError, match="same name"):
        timing.interleave(device, contestants, Rotation(1, 1, False), PLAN)


def test_noise_floor_is_the_difference_of_one_provider_run_twice():
    device = FakeDevice()
    contestants = timing.with_again(
        [Contestant("A", [device.work("A", 1.0)]), Contestant("B", [device.work("B", 4.0)])], "B"
    )
    assert [entry.name for entry in contestants] == ["A", "B", "B (again)"]
    assert contestants[2].calls is contestants[1].calls
    timings = {"A": Timing((1.0,)), "B": Timing((4.0,)), "B (again)": Timing((5.0,))}
    assert timing.noise_floor(timings) == pytest.approx(0.25)
    assert set(timing.without_again(timings)) == {"A", "B"}
    assert timing.noise_floor(timing.without_again(timings)) is None


def test_the_first_is_run_twice_where_none_is_named():
    contestants = timing.with_again([Contestant("A", []), Contestant("B", [])])
    assert contestants[-1].name == "A (again)"


def test_a_deadline_names_what_it_leaves_out():
    device = FakeDevice()
    deadline = Deadline(10.0, device.now)
    assert deadline.fits("first")
    assert deadline.fits("second", estimate=9.0)
    assert not deadline.fits("third", estimate=10.0)
    device.time = 11.0
    assert not deadline.fits("fourth")
    assert deadline.left_out == ["third", "fourth"]


def test_no_deadline_fits_everything():
    assert Deadline(None, FakeDevice().now).fits("all", estimate=1e9)


@pytest.mark.parametrize("seconds", [0.0, -1.0])
def test_a_deadline_needs_time(seconds):
    with pytest.raises(ValueError, match="seconds="):
        Deadline(seconds, FakeDevice().now)


def test_rounds_stop_at_the_deadline_with_one_counted():
    device = FakeDevice()
    turn = Rotation(1, 1, False)
    contestants = [Contestant(name, [device.work(name, 10.0)]) for name in "AB"]
    prepared(device, contestants, turn)
    deadline = Deadline(1.0, device.now)
    timings = timing.interleave(device, contestants, turn, Plan(rounds=15), deadline)
    assert [len(entry.samples) for entry in timings.values()] == [1, 1]


def test_a_slow_run_is_marked():
    assert timing.bandwidth_note(None, 2900.0) == ""
    assert timing.bandwidth_note(1000.0, None) == ""
    assert timing.bandwidth_note(2900.0 * 0.97, 2900.0) == ""
    assert "2000 GB/s is 69% of the usual 2900" in timing.bandwidth_note(2000.0, 2900.0)


def test_usual_bandwidth_prefers_what_was_measured():
    assert timing.usual_copy_gb_s("NVIDIA H100 80GB HBM3", []) == 2900.0
    assert timing.usual_copy_gb_s("NVIDIA H100 80GB HBM3", [2950.0, 3000.0, 2960.0]) == 2960.0
    assert timing.usual_copy_gb_s("NVIDIA L4", []) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1980, 312.5\n", (1980.0, 312.5)), ("1980, [N/A]\n", (1980.0, None)), ("", (None, None))],
)
def test_clocks_are_read_from_nvidia_smi(text, expected):
    assert timing.parse_clocks(text) == expected


def test_copy_and_matrix_figures_count_reads_and_writes():
    class OneSecond(timing.CpuDevice):
        def elapsed(self, work):
            work()
            return 1.0

    assert timing.copy_gb_s(OneSecond(), bytes_=4000) == pytest.approx(8000 / 1e9)
    assert timing.gemm_tflops(OneSecond(), size=16) == pytest.approx(2 * 16**3 / 1e12)


@pytest.mark.gpu
def test_a_gpus_graph_computes_and_keeps_results_apart():
    import torch

    device = timing.CudaDevice()
    assert device.l2_bytes > 0
    results = []
    with device.active():
        inputs = [torch.full((1000,), float(i), device="cuda") for i in range(3)]

        def call(value):
            def run():
                out = value + 1
                results.append(out)
                return out

            return run

        replay = device.graph([call(value) for value in inputs], 3)
        for result in results:
            result.zero_()
        seconds = device.elapsed(replay)
    device.synchronize()
    assert seconds > 0
    assert [result[0].item() for result in results] == [1.0, 2.0, 3.0]
    assert len({result.data_ptr() for result in results}) == 3
