"""``fused-ops bench models``: steps of providers in turn, kernel times, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from bench_helpers import FakeDevice
from torch import nn

from fused_ops.bench import __main__ as bench
from fused_ops.bench import models, ops, providers, results, timing
from fused_ops.depthwise import DepthwiseConvBNAct

MACHINE = ops.Machine(results.machine_columns("cpu", "c0ffee"), note="cpu")
STEPS = models.Steps(1, 2, 1)


class Tiny(nn.Module):
    """A stock convolution, one operator of this package and a classifier."""

    default_cfg = {"input_size": (3, 16, 16)}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.block = DepthwiseConvBNAct(8, 3, activation="relu")
        self.head = nn.Linear(8, models.CLASSES)

    def forward(self, x):
        return self.head(self.block(self.stem(x)).mean((2, 3)))


class Attention(nn.Module):
    """Calls nothing of this package."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, models.CLASSES)

    def forward(self, x):
        x = x.mean(1)
        return self.head(nn.functional.scaled_dot_product_attention(x, x, x).mean(1))


def use(monkeypatch, module: type[nn.Module]) -> None:
    def create(name):
        torch.manual_seed(0)
        return module()

    monkeypatch.setattr(models, "create", create)
    monkeypatch.setattr(models, "check_named", lambda name: None)


@pytest.fixture
def tiny(monkeypatch):
    use(monkeypatch, Tiny)


def measure(mode, wanted, profiles=None):
    device = timing.CpuDevice()
    deadline = timing.Deadline(None, device.now)
    return models.measure_model("tiny", mode, 2, 16, wanted, device, MACHINE, STEPS, deadline, profiles)


EAGER = ["eager_nchw", "eager_channels_last", "auto", "cuda"]


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("mode", models.MODES)
def test_every_mode_is_measured(mode):
    rows = {entry.provider: entry for entry in measure(mode, EAGER)}
    assert set(rows) == set(EAGER)
    assert rows["cuda"].note == "not measured: needs a GPU, and there is none"
    assert rows["cuda"].p50_us is None
    assert rows["auto"].ratio_to_best_alternative > 0
    assert rows["eager_nchw"].ratio_to_best_alternative is None
    assert (rows["auto"].op, rows["auto"].model, rows["auto"].case) == ("", "tiny", "b2_16")
    assert rows["auto"].noise_floor >= 0


@pytest.mark.usefixtures("tiny")
def test_a_wrong_provider_gets_no_figures(monkeypatch):
    error = models.logits_error

    def wrong(provider, *given):
        found = error(provider, *given)
        return (0.5, found[1]) if provider.name == "auto" else found

    monkeypatch.setattr(models, "logits_error", wrong)
    rows = {entry.provider: entry for entry in measure("infer", EAGER)}
    assert rows["auto"].note.startswith("failed: logits: relative error 5.00e-01 above")
    assert rows["auto"].p50_us is None
    assert rows["auto"].ratio_to_best_alternative is None


def test_wrong_logits():
    assert models.wrong_logits(0.01, 0.01) == ""
    assert "above" in models.wrong_logits(0.1, 0.01)
    assert "above" in models.wrong_logits(float("nan"), 0.01)


def test_a_model_without_our_operators_says_so(monkeypatch):
    use(monkeypatch, Attention)
    rows = {entry.provider: entry for entry in measure("infer", ["sdpa_math", "sdpa_cudnn", "auto"])}
    assert rows["auto"].note == "not measured: the model calls no operator of this package"
    assert rows["sdpa_math"].measured
    assert rows["sdpa_cudnn"].note == "not measured: needs a GPU, and there is none"


def test_attention_and_operators_are_found():
    assert models.what_is_called(Tiny(), (3, 16, 16)) == (False, {"depthwise"})
    assert models.what_is_called(Attention(), (3, 16, 16)) == (True, set())


def runner(device, name, seconds):
    (provider,) = providers.select([name], attention=False)
    return models.Runner(provider, device.work(name, seconds), 0, graph=True)


class Unweighed(FakeDevice):
    """A fake device that is no CPU by its clock, and has no memory to weigh."""

    def __init__(self) -> None:
        super().__init__()
        self.is_cpu = True


def test_steps_of_providers_are_interleaved():
    device = Unweighed()
    runners = [runner(device, "eager_nchw", 1.0), runner(device, "auto", 4.0)]
    steps = models.Steps(warmup=2, rounds=3, steps=5)
    timings = models.interleaved_steps(runners, device, steps, timing.Deadline(None, device.now))
    warm = ["eager_nchw"] * 3 + ["auto"] * 3
    # Per round one uncounted step and five counted ones; the last provider runs twice, for the noise floor.
    one_round = ["eager_nchw"] * 6 + ["auto"] * 12
    assert device.calls == warm + one_round * 3
    assert timings["eager_nchw"].samples == (1.0,) * 3
    assert timings["auto"].p50 == 4.0
    assert timing.noise_floor(timings) == 0.0


def test_steps_stop_at_the_deadline():
    device = Unweighed()
    steps = models.Steps(warmup=1, rounds=20, steps=1)
    deadline = timing.Deadline(0.5, device.now)
    timings = models.interleaved_steps([runner(device, "auto", 1.0)], device, steps, deadline)
    assert len(timings["auto"].samples) == 1


@pytest.mark.usefixtures("tiny")
def test_profile_finds_the_share_of_our_operators():
    profiles: dict[str, models.Profile] = {}
    measure("train", ["eager_channels_last"], profiles)
    (found,) = profiles.values()
    assert 0 < found.share < 1
    assert found.kernels
    assert found.total > 0
    assert f"f = {found.share:.3f}" in found.amdahl()
    # A range left in place would change what is measured afterwards.
    from fused_ops.depthwise import op

    assert op.depthwise_conv is op.OPERATOR.function


def test_amdahls_line():
    line = models.Profile((), 2.0, 1.0).amdahl()
    assert "f = 0.500" in line
    assert "1.33x" in line
    assert "2.00x" in line
    assert "all of the time" in models.Profile((), 1.0, 1.0).amdahl()


@pytest.mark.usefixtures("tiny")
def test_command_prints_json_and_resumes(tmp_path, capsys, monkeypatch):
    options = [
        "models",
        "--model",
        "tiny",
        "--mode",
        "infer",
        "--batch",
        "1",
        "--size",
        "16",
        "--commit",
        "c",
    ]
    options += ["--provider", "eager_nchw", "auto", "--results", str(tmp_path), "--json", "--seconds", "60"]
    monkeypatch.setattr(timing, "default_device", timing.CpuDevice)
    assert bench.main(options) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [list(entry) for entry in rows] == [list(results.COLUMNS)] * 2
    assert bench.main(options) == 0
    captured = capsys.readouterr()
    again = json.loads(captured.out)
    assert [(entry["provider"], entry["date"]) for entry in again] == [
        (entry["provider"], entry["date"]) for entry in rows
    ]
    assert "1 skipped" in captured.err


@pytest.mark.usefixtures("tiny")
def test_images_come_through_the_loader(capsys, monkeypatch, tmp_path):
    """Training on real images: read, augmented and mixed for every step, and in rows of their own."""
    monkeypatch.setattr(timing, "default_device", timing.CpuDevice)
    seen = []
    original = models.loaded_batches

    def watched(*given):
        batches = original(*given)

        def take():
            seen.append(batches())
            return seen[-1]

        return take

    monkeypatch.setattr(models, "loaded_batches", watched)
    options = ["--loader", "digits", "--batch", "4", "--size", "16", "--results", str(tmp_path), "--json"]
    options += ["--provider", "eager_channels_last", "auto", "--commit", "c"]
    assert bench.main(["models", "--model", "tiny", *options]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["mode"], row["case"]) for row in rows] == [("train", "b4_16_digits")] * 2
    assert all(row["p50_us"] > 0 for row in rows)
    assert len(seen) >= 2
    for images, targets in seen:
        assert images.shape == (4, 3, 16, 16)
        # Mixup's targets are probabilities of every class.
        torch.testing.assert_close(targets.sum(1), torch.ones(4))
    assert not torch.equal(seen[0][0], seen[1][0])


@pytest.mark.usefixtures("tiny")
def test_command_prints_images_a_second_and_kernel_times(capsys, monkeypatch):
    monkeypatch.setattr(timing, "default_device", timing.CpuDevice)
    options = ["--mode", "train", "--batch", "2", "--size", "16", "--provider", "eager_channels_last", "cuda"]
    assert bench.main(["models", "--model", "tiny", *options]) == 0
    text = capsys.readouterr().out
    assert "images/s" in text
    assert "tiny train b2_16 cuda: not measured: needs a GPU, and there is none" in text
    assert "of the time is spent in covered operators" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "dsnet_smal"], "--model='dsnet_smal': name must be a model"),
        (["--model", "timm/nothing"], "--model='timm/nothing': timm"),
        (["--mode", "both"], "--mode='both' is unknown; use one of train, infer"),
        (["--batch", "1", "0"], "--batch=0 is not allowed"),
        (["--size", "0"], "--size=0 is not allowed"),
        (["--provider", "tpu"], "--provider='tpu' is unknown"),
        (["--loader", "digits", "--mode", "infer"], "--loader=digits needs --mode train"),
    ],
)
def test_bad_options_are_named(options, message, capsys):
    with pytest.raises(SystemExit) as raised:
        bench.main(["models", *options])
    assert raised.value.code == 2
    assert message in capsys.readouterr().err


def test_default_models_exist():
    for name in (*models.CPU_MODELS, *models.GPU_MODELS):
        models.check_named(name)


@pytest.mark.gpu
@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(("mode", "batch"), [("train", 8), ("infer", 1), ("infer", 8)])
def test_a_gpu_measures_models(mode, batch):
    device = timing.CudaDevice()
    machine = ops.Machine(results.machine_columns(device.name, "c0ffee"))
    deadline = timing.Deadline(None, device.now)
    steps = models.Steps(2, 2, 2)
    wanted = ["eager_nchw", "eager_channels_last", "auto"]
    rows = models.measure_model("tiny", mode, batch, 16, wanted, device, machine, steps, deadline, {})
    assert all(entry.measured for entry in rows), [entry.note for entry in rows]
    assert all(entry.peak_bytes > 0 for entry in rows)
    assert {entry.graph for entry in rows} == {batch == 1}
