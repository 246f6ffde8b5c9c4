"""``fused-ops bench ops``: which figures it prints, and which it refuses to."""

from __future__ import annotations

import json

import pytest
import torch
from bench_helpers import FakeDevice

import fused_ops
from fused_ops.bench import __main__ as bench
from fused_ops.bench import correctness, limits, ops, providers, results, timing
from fused_ops.core import library

CPU = timing.CpuDevice()
MACHINE = ops.Machine({**results.machine_columns("cpu", "c0ffee")}, note="cpu")
DEPTHWISE = library.operators()["depthwise"]
PLAN = timing.Plan(warmup_seconds=0.0, rounds=2, least_calls=1, most_calls=1, least_sets=1)


def case(name: str):
    return next(entry for entry in DEPTHWISE.cases() if entry.name == name)


def measure(
    mode: str, chosen, name: str = "pre_train", dtype=torch.float32, deadline=None, operator=DEPTHWISE
):
    deadline = deadline or timing.Deadline(None, CPU.now)
    return ops.measure_case(operator, case(name), mode, dtype, chosen, CPU, MACHINE, PLAN, deadline)


EAGER = providers.select(["eager_nchw", "eager_channels_last", "auto"], attention=False)


@pytest.mark.parametrize("mode", ops.MODES)
@pytest.mark.parametrize("name", ["pre_train", "post_train_identity_before", "conv"])
def test_every_mode_is_measured(mode, name):
    rows = measure(mode, EAGER, name)
    assert [entry.provider for entry in rows] == ["eager_nchw", "eager_channels_last", "auto"]
    for entry in rows:
        assert entry.p20_us <= entry.p50_us <= entry.p80_us
        assert (entry.gpu, entry.mode, entry.dtype, entry.l2) == ("cpu", mode, "float32", "warm")
        assert (entry.saved_bytes is None) == (mode == "eval")
        assert entry.fraction_of_limit is None
        assert entry.noise_floor >= 0
        assert "cpu" in entry.note
    assert [entry.ratio_to_best_alternative is None for entry in rows] == [True, True, False]


class Wrong(providers.Provider):
    def build(self, function):
        return lambda **arguments: 1.1 * function(**arguments)


def test_a_wrong_provider_gets_no_figures_and_is_no_alternative():
    wrong = [Wrong("cuda_wrong", False), Wrong("compile_wrong", True, compile_mode="default")]
    rows = {entry.provider: entry for entry in measure("both", [*EAGER, *wrong])}
    for name in ("cuda_wrong", "compile_wrong"):
        assert rows[name].note.startswith("failed: out: error")
        assert rows[name].p50_us is None
        assert rows[name].ratio_to_best_alternative is None
    assert "compile_wrong" not in rows["auto"].note


def test_a_wrong_gradient_fails_too():
    class Half(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad / 2

    class WrongGradient(providers.Provider):
        def build(self, function):
            return lambda **arguments: Half.apply(function(**arguments))

    (row,) = measure("backward", [WrongGradient("cuda", False)])
    assert row.note.startswith("failed: grad")
    assert row.p50_us is None


def test_not_a_number_fails():
    value = {"out": torch.full((2,), float("nan"))}
    fine = {"out": torch.ones(2)}
    assert "out: error nan" in correctness.three_way(value, fine, fine, torch.float32)
    assert correctness.three_way(fine, fine, fine, torch.float32) == ""
    assert correctness.three_way({}, fine, fine, torch.float32) == "out: no value"


def test_a_provider_that_raises_says_why_and_the_rest_goes_on():
    class Broken(providers.Provider):
        def build(self, function):
            raise OSError("no compiler\nat all")

    rows = measure("eval", [Broken("compile_default", True), *EAGER])
    assert rows[0].note == "not measured: OSError: no compiler"
    assert all(entry.measured for entry in rows[1:])


def test_kernels_are_not_measured_without_a_gpu():
    chosen = providers.select(["triton", "cuda"], attention=False)
    assert {entry.note for entry in measure("eval", chosen)} == {
        "not measured: needs a GPU, and there is none"
    }


def test_an_operator_without_a_backend_says_so():
    (provider,) = providers.select(["cuda"], attention=False)
    assert provider.unavailable(False, ["reference"]) == "the operator has no cuda backend"


def test_providers_are_chosen_by_name():
    assert {entry.name for entry in providers.select(None, attention=False)} == {
        "eager_nchw",
        "eager_channels_last",
        "compile_default",
        "compile_max_autotune",
        "reference",
        "triton",
        "cuda",
        "auto",
    }
    named = {entry.name for entry in providers.select(None, attention=True)}
    assert {"sdpa_math", "sdpa_flash", "sdpa_efficient", "sdpa_cudnn"} < named
    with pytest.raises(ValueError, match="provider='tpu' is unknown; use one of eager_nchw"):
        providers.select(["tpu"], attention=False)


def test_a_spent_budget_leaves_out_providers_by_name():
    device = FakeDevice()
    deadline = timing.Deadline(1.0, device.now)
    device.time = 2.0
    assert measure("eval", EAGER, deadline=deadline) == []
    assert deadline.left_out == [f"depthwise pre_train eval {entry.name}" for entry in EAGER]


def test_ratio_is_to_the_fastest_alternative():
    chosen = providers.select(["eager_nchw", "compile_default", "cuda", "reference"], attention=False)
    medians = {"eager_nchw": 4.0, "compile_default": 2.0, "cuda": 1.0}
    assert ops.ratios(medians, chosen) == ({"cuda": 2.0}, "compile_default")
    assert ops.ratios({"cuda": 1.0}, chosen) == ({}, "")


def test_kinds_of_timing():
    device = FakeDevice(l2_bytes=1000)
    plan = timing.Plan(most_calls=64)

    def names(size):
        return [(kind.l2, kind.graph) for kind in ops.kinds(device, size, plan)]

    assert names(5000) == [("cold", True), ("cold", False)]
    assert names(100) == [("cold", True), ("cold", False), ("warm", True)]
    # Too small to rotate out of the cache with the calls allowed.
    assert names(10) == [("warm", True), ("warm", False)]
    assert [(kind.l2, kind.graph) for kind in ops.kinds(CPU, 100, timing.CPU_PLAN)] == [("warm", False)]


def arguments(name: str, dtype=torch.float32):
    return case(name).make(torch.Generator().manual_seed(1), dtype, torch.device("cpu"), "channels_last")


def test_copies_keep_identity_layout_and_values():
    made = arguments("post_train_identity_before")
    copy = correctness.copy_arguments(made, layout="nchw", batch=1)
    assert copy["residual"] is copy["x"]
    assert copy["x"].is_contiguous()
    assert copy["x"].shape[0] == 1
    assert copy["weight"].shape == made["weight"].shape
    assert copy["x"].requires_grad
    torch.testing.assert_close(copy["x"], made["x"][:1])
    evaluation = correctness.copy_arguments(made, evaluation=True)
    assert made["norm"].batch_stats
    assert not evaluation["norm"].batch_stats
    assert evaluation["norm"].running_mean is not made["norm"].running_mean


def test_saved_bytes_are_counted_by_hand():
    made = arguments("conv_bias_gelu_residual")
    found = ops.saved_bytes(lambda: fused_ops.depthwise_conv(**made), made)
    # The input and the convolution's output, which the activation needs; the filter is a parameter.
    assert found == 2 * made["x"].numel() * 4


@pytest.mark.parametrize(("mode", "directions"), [("eval", "f"), ("backward", "b"), ("both", "fb")])
def test_least_work_follows_the_operators_formulas(mode, directions):
    made = arguments("conv", torch.bfloat16)
    passes = ops.least_work(DEPTHWISE, made, mode)
    assert "".join(entry.direction[0] for entry in passes) == directions
    size, macs = made["x"].numel(), 9 * made["x"].numel()
    forward = ops.Pass("forward", 2 * 2 * size, 2 * macs, passes[0].calls)
    backward = ops.Pass("backward", 3 * 2 * size, 4 * macs, passes[0].calls)
    assert passes == [{"f": forward, "b": backward}[letter] for letter in directions]


def test_fraction_of_limit_is_the_least_time_over_the_measured_one():
    machine = ops.Machine({"gpu": "NVIDIA H100 80GB HBM3"}, copy_gb_s=3000.0, gemm_tflops=600.0)
    passes = [ops.Pass("forward", 3 * 10**9, 10, ()), ops.Pass("backward", 6 * 10**9, 10, ())]
    assert ops.fraction_of_limit(machine, "depthwise", passes, 6e-3, "cold") == pytest.approx(0.5)
    assert ops.fraction_of_limit(machine, "depthwise", passes, 6e-3, "warm") is None
    assert ops.fraction_of_limit(MACHINE, "depthwise", passes, 6e-3, "cold") is None
    unknown = ops.Machine({"gpu": "Some GPU"})
    assert ops.fraction_of_limit(unknown, "depthwise", passes, 6e-3, "cold") is None
    assert limits.find_gpu("NVIDIA H100 80GB HBM3")


def command(*options: str) -> int:
    return bench.main(["ops", "--commit", "c0ffee", "--case", "pre_train", "--dtype", "float32", *options])


def test_command_prints_json_with_the_documented_keys(capsys):
    chosen = ("--provider", "eager_channels_last", "auto", "cuda")
    assert command("--mode", "eval", "--json", "--seconds", "60", *chosen) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [list(entry) for entry in rows] == [list(results.COLUMNS)] * 3
    by_name = {entry["provider"]: entry for entry in rows}
    if by_name["auto"]["gpu"] == "cpu":
        assert by_name["cuda"]["p50_us"] is None
        assert by_name["cuda"]["note"] == "not measured: needs a GPU, and there is none"
        assert by_name["auto"]["case"] == "pre_train@b2"
    assert by_name["auto"]["p50_us"] > 0


def test_a_second_run_goes_on_where_the_first_stopped(tmp_path, capsys, monkeypatch):
    options = ("--provider", "eager_nchw", "auto", "--results", str(tmp_path), "--json")
    assert command("--mode", "eval", *options) == 0
    first = json.loads(capsys.readouterr().out)
    measured = []
    original = ops.measure_case
    monkeypatch.setattr(ops, "measure_case", lambda *given: measured.append(given[2]) or original(*given))
    assert command("--mode", "eval", "forward", *options) == 0
    captured = capsys.readouterr()
    assert measured == ["forward"]
    assert "1 skipped, measured at this commit already" in captured.err
    again = json.loads(captured.out)
    assert [entry["mode"] for entry in again] == ["eval", "eval", "forward", "forward"]
    assert [entry["date"] for entry in again[:2]] == [entry["date"] for entry in first]
    assert command("--mode", "eval", "--again", *options) == 0
    assert measured == ["forward", "eval"]
    assert len(results.all_rows(tmp_path)) == 4


def test_a_spent_budget_leaves_out_cases_by_name(capsys, monkeypatch):
    monkeypatch.setattr(timing.Deadline, "left", lambda self: 0.0)
    assert command("--mode", "eval", "--json", "--seconds", "1") == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == []
    assert "1 left out, the budget is spent: depthwise pre_train" in captured.err


def test_command_prints_a_table_with_reasons(capsys):
    assert command("--mode", "eval", "--provider", "eager_nchw", "auto", "triton") == 0
    text = capsys.readouterr().out
    assert "commit c0ffee" in text
    if not torch.cuda.is_available():
        assert "triton: not measured: needs a GPU, and there is none (1 case)" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--op", "conv3d"], "--op='conv3d' is unknown; use one of"),
        (["--mode", "train"], "--mode='train' is unknown; use one of both"),
        (["--dtype", "int8"], "--dtype='int8' is unknown; use one of bfloat16"),
        (["--provider", "tpu"], "--provider='tpu' is unknown; use one of eager_nchw"),
        (["--case", "nothing"], "--case='nothing' is unknown; of real models there are "),
        (["--batch", "0"], "--batch=0 is not allowed; it must be at least 1"),
        (["--seconds", "0"], "--seconds=0 is not allowed; it must be more than 0"),
        (["--gpu-minutes", "nan"], "--gpu-minutes=nan is not allowed"),
    ],
)
def test_bad_options_are_named(options, message, capsys):
    with pytest.raises(SystemExit) as raised:
        bench.main(["ops", *options])
    assert raised.value.code == 2
    assert message in capsys.readouterr().err


def test_without_cases_named_those_of_real_models_are_measured():
    chosen = ops.selected_cases([DEPTHWISE], None)
    assert chosen
    assert all("model" in entry.tags for _, entry in chosen)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ops.MODES)
def test_a_gpu_measures_every_kind(mode):
    device = timing.CudaDevice()
    machine = ops.Machine(results.machine_columns(device.name, "c0ffee"), 2000.0, 500.0)
    plan = timing.Plan(warmup_seconds=0.01, rounds=3)
    chosen = providers.select(["eager_nchw", "eager_channels_last", "triton", "auto"], attention=False)
    rows = ops.measure_case(
        DEPTHWISE,
        case("dsnet_local_160x14"),
        mode,
        torch.bfloat16,
        chosen,
        device,
        machine,
        plan,
        timing.Deadline(None, device.now),
    )
    assert all(entry.measured for entry in rows), [entry.note for entry in rows]
    assert {(entry.l2, entry.graph) for entry in rows} >= {("cold", True), ("cold", False)}
