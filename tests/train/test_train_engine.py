"""Groups, schedule, loss, averaging, accumulation and evaluation against formulas written out here."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn
from training_helpers import arguments, losses

from fused_ops import restore
from fused_ops.train import main
from fused_ops.train.checkpoint import WEIGHTS
from fused_ops.train.distributed import World
from fused_ops.train.engine import Engine, build_optimizer, build_scheduler, training_loss
from fused_ops.train.settings import Settings, validate

CPU = World(0, 1, torch.device("cpu"))
PLAIN = {
    "mixup": 0.0,
    "cutmix": 0.0,
    "random_erasing": 0.0,
    "label_smoothing": 0.0,
    "drop_path": 0.0,
    "repeats": 1,
}


class Small(nn.Module):
    """A classifier with one parameter of every kind that matters to weight decay."""

    def __init__(self) -> None:
        super().__init__()
        self.num_classes = 3
        self.position = nn.Parameter(torch.ones(1, 4, 1, 1))
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.scale = nn.Parameter(torch.ones(4))
        self.head = nn.Linear(4, 3)

    def no_weight_decay(self) -> set[str]:
        return {"position"}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.conv(x)) + self.position
        return self.head(x.mean((2, 3)) * self.scale)


def test_no_decay_groups():
    model = Small()
    optimizer = build_optimizer(Settings(data="x", weight_decay=0.05), model, CPU.device)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decay = {
        names[id(parameter)]: group["weight_decay"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert {name for name, value in decay.items() if value == 0.05} == {"conv.weight", "head.weight"}
    assert {name for name, value in decay.items() if value == 0.0} == {
        *("position", "scale", "conv.bias", "norm.weight", "norm.bias", "head.bias")
    }
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.defaults["betas"] == (0.9, 0.999)


def test_learning_rate_is_the_closed_form():
    settings = Settings(data="x", epochs=10, cooldown_epochs=2, warmup_epochs=2.5, batch_size=256, lr=4e-3)
    updates, peak, low, first = 8, 4e-3 * 256 / 512, 1e-5, 1e-6
    optimizer = build_optimizer(settings, Small(), CPU.device)
    scheduler = build_scheduler(settings, optimizer, updates)
    warmup, total = 20, 80
    for step in range(96):
        scheduler.step_update(step)
        if step < warmup:
            expected = first + step / warmup * (peak - first)
        elif step < total:
            progress = (step - warmup) / (total - warmup)
            expected = low + (peak - low) * (1 + math.cos(math.pi * progress)) / 2
        else:
            expected = low
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(expected, rel=1e-12)


# Arguments of a schedule, and the factor of the peak at a time in epochs (of 8 updates) from the beginning.
DECAYS = {
    "step": ({"decay_epochs": 2.5, "decay_rate": 0.3}, lambda t: 0.3 ** math.floor(t / 2.5)),
    "multistep": (
        {"decay_milestones": "1,4,7", "decay_rate": 0.2},
        lambda t: 0.2 ** sum(t >= after for after in (1, 4, 7)),
    ),
    "exponential": ({"decay_epochs": 2.5, "decay_rate": 0.3}, lambda t: 0.3 ** (t / 2.5)),
}


@pytest.mark.parametrize("warmup", [0.0, 2.5])
@pytest.mark.parametrize("schedule", DECAYS)
def test_decays_are_the_closed_form(schedule, warmup):
    changes, factor = DECAYS[schedule]
    settings = Settings(
        data="x", epochs=10, warmup_epochs=warmup, batch_size=256, lr=4e-3, schedule=schedule, **changes
    )
    validate(settings)
    peak, first = 2e-3, 1e-6
    optimizer = build_optimizer(settings, Small(), CPU.device)
    scheduler = build_scheduler(settings, optimizer, 8)
    for step in range(80):
        scheduler.step_update(step)
        epoch = step / 8
        expected = peak * factor(epoch)
        if epoch < warmup:
            expected = first + epoch / warmup * (peak - first)
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("warmup", [0.0, 2.5])
def test_polynomial_is_the_closed_form(warmup):
    settings = Settings(
        data="x",
        epochs=10,
        cooldown_epochs=1,
        warmup_epochs=warmup,
        batch_size=256,
        lr=4e-3,
        schedule="poly",
        poly_power=2.0,
    )
    validate(settings)
    peak, low, first = 2e-3, 1e-5, 1e-6
    optimizer = build_optimizer(settings, Small(), CPU.device)
    scheduler = build_scheduler(settings, optimizer, 8)
    for step in range(88):
        scheduler.step_update(step)
        epoch = step / 8
        left = max(0.0, (10 - epoch) / (10 - warmup))
        expected = low + (peak - low) * left**2
        if epoch < warmup:
            expected = first + epoch / warmup * (peak - first)
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(expected, rel=1e-9)


def test_learning_rates_of_a_run(image_folder, tmp_path):
    run = tmp_path / "run"
    assert main(arguments(image_folder, run, epochs=2, lr=0.064)) == 0
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lrs = [row["lr"] for row in rows if row["kind"] == "update"]
    ramp = [1e-6 + k / 3 * (1e-3 - 1e-6) for k in range(3)]
    fall = [1e-5 + (1e-3 - 1e-5) * (1 + math.cos(math.pi * k / 3)) / 2 for k in range(3)]
    assert lrs == pytest.approx(ramp + fall, rel=1e-9)


def test_label_smoothing_loss():
    logits, targets = torch.randn(5, 3, dtype=torch.float64), torch.tensor([0, 2, 1, 1, 0])
    log_p = logits - logits.exp().sum(1, keepdim=True).log()
    expected = 0.0
    for row, target in zip(log_p, targets, strict=True):
        expected -= (0.9 * row[target] + 0.1 / 3 * row.sum()) / 5
    torch.testing.assert_close(training_loss(logits, targets, 0.1), expected.float())


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixing(kind):
    """Image i is mixed with image n-1-i in one ratio, which the mixed images themselves show."""
    settings = Settings(
        data="x",
        batch_size=6,
        device_batch=6,
        img_size=16,
        **{**PLAIN, "label_smoothing": 0.1, kind: 1.0},
    )
    engine = Engine(settings, Small(), 3, 1, CPU)
    images = (40 * torch.arange(6, dtype=torch.uint8))[:, None, None, None].expand(6, 3, 16, 16)
    targets = torch.tensor([0, 1, 2, 2, 0, 1])
    plain, _ = engine.pipeline(images, targets, training=False)
    np.random.seed(3)
    mixed, soft = engine.pipeline(images, targets, training=True)
    if kind == "mixup":
        share = ((mixed - plain.flip(0)) / (plain - plain.flip(0)))[0].mean()
    else:
        share = (mixed == plain)[0, 0].double().mean()
    assert 0.05 < share < 0.95
    on, off = 0.9 + 0.1 / 3, 0.1 / 3
    for k in range(6):
        expected = torch.full((3,), off)
        for target, weight in ((targets[k], share), (targets[5 - k], 1 - share)):
            expected[target] += weight * (on - off)
        torch.testing.assert_close(soft[k], expected, rtol=1e-4, atol=1e-5)
    logits = torch.randn(6, 3)
    expected = -(soft * (logits - logits.exp().sum(1, keepdim=True).log())).sum(1).mean()
    torch.testing.assert_close(training_loss(logits, soft, 0.1), expected)


def random_batches(count: int, size: int) -> list[tuple]:
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randint(256, (size, 3, 16, 16), dtype=torch.uint8, generator=generator),
            torch.randint(3, (size,), generator=generator),
            [],
        )
        for _ in range(count)
    ]


def test_averaged_weights_and_one_adamw_step():
    settings = Settings(
        data="x",
        batch_size=8,
        device_batch=8,
        img_size=16,
        epochs=1,
        warmup_epochs=0,
        ema_decay=0.75,
        lr=0.64,
        **PLAIN,
    )
    torch.manual_seed(0)
    model = Small()
    engine = Engine(settings, model, 3, 4, CPU)
    batches = iter(random_batches(4, 8))
    average, before = None, model.head.weight.detach().clone()
    for number in range(4):
        lr = 1e-5 + (0.01 - 1e-5) * (1 + math.cos(math.pi * number / 4)) / 2
        engine.update(lambda: next(batches), 0, number)
        weight = model.head.weight.detach()
        if number == 0:
            # The first Adam step is lr in the gradient's direction, after the decay.
            step = (before * (1 - lr * 0.05) - weight).abs()
            torch.testing.assert_close(step, torch.full_like(step, lr), rtol=1e-3, atol=1e-6)
        average = weight.clone() if average is None else 0.75 * average + 0.25 * weight
        torch.testing.assert_close(engine.ema.module.head.weight, average)


def test_accumulation_equals_one_pass():
    model, states = Small(), []
    model.norm = nn.GroupNorm(2, 4)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    images, targets, _ = random_batches(1, 8)[0]
    for part in (8, 2):
        model.load_state_dict(start)
        settings = Settings(
            data="x", batch_size=8, device_batch=part, warmup_epochs=0, clip_grad=0.1, lr=0.6, **PLAIN
        )
        engine = Engine(settings, model, 3, 4, CPU)
        parts = iter([(images[k : k + part], targets[k : k + part], []) for k in range(0, 8, part)])
        record = engine.update(lambda parts=parts: next(parts), 0, 0)
        states.append({"loss": record.loss, **{n: v.clone() for n, v in model.state_dict().items()}})
    torch.testing.assert_close(states[0], states[1], rtol=1e-3, atol=1e-5)


def test_clipping():
    settings = Settings(
        data="x", batch_size=8, device_batch=8, warmup_epochs=0, clip_grad=1e-3, optimizer="sgd", **PLAIN
    )
    engine = Engine(settings, Small(), 3, 4, CPU)
    norms = []
    original = engine.optimizer.step
    engine.optimizer.step = lambda *a: (
        norms.append(math.sqrt(sum(p.grad.square().sum().item() for p in engine.model.parameters()))),
        original(*a),
    )
    engine.update(lambda: random_batches(1, 8)[0], 0, 0)
    assert norms == [pytest.approx(1e-3, rel=1e-3)]


def test_evaluation_leaves_out_blanks():
    settings = Settings(data="x", batch_size=8, device_batch=8, **PLAIN)
    engine = Engine(settings, Small(), 3, 4, CPU)
    batches = random_batches(2, 8)
    batches[1][1][3:] = -1
    result = engine.evaluate(engine.model, batches, lambda: False, lambda names: None)
    engine.model.eval()
    mean, std = (
        torch.tensor(value).view(1, 3, 1, 1) for value in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    images = torch.cat([batch[0] for batch in batches])[:11]
    targets = torch.cat([batch[1] for batch in batches])[:11]
    with torch.no_grad():
        p = engine.model((images / 255 - mean) / std).softmax(1).double()
    assert result["images"] == 11
    assert result["loss"] == pytest.approx(-p[range(11), targets].log().mean().item(), rel=1e-5)
    assert result["top1"] == pytest.approx(100 * (p.argmax(1) == targets).double().mean().item())
    assert result["top5"] == 100.0


def test_bf16_autocast(image_folder, tmp_path):
    """bf16 autocast follows fp32 within its precision."""
    runs = {amp: tmp_path / amp for amp in ("none", "bf16")}
    for amp, run in runs.items():
        assert main(arguments(image_folder, run, amp=amp, epochs=2, lr=0.005)) == 0
    np.testing.assert_allclose(losses(runs["bf16"]), losses(runs["none"]), rtol=0.03)
    assert losses(runs["bf16"]) != losses(runs["none"])


def test_loss_that_is_not_finite_ends_the_run(image_folder, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(arguments(image_folder, run, lr=1e30, min_lr=0, warmup_epochs=0)) == 1
    error = capsys.readouterr().err
    assert "the loss is" in error
    assert "try a lower --lr" in error


def test_accelerated_model_of_timm(image_folder, tmp_path):
    """The same run with fused operators: same losses, and weights under the same names."""
    runs = [tmp_path / "stock", tmp_path / "fused"]
    for run, flags in zip(runs, ([], ["--accelerate"]), strict=True):
        command = arguments(image_folder, run, model="timm/test_efficientnet", epochs=1, warmup_epochs=0)
        assert main([*command, *flags]) == 0
    stock, fused = (losses(run) for run in runs)
    assert fused == pytest.approx(stock, rel=1e-4)
    states = [load_file(run / WEIGHTS) for run in runs]
    assert states[0].keys() == states[1].keys()


def test_accelerate_exchanges_before_averaging():
    """The averaged model is a copy of the accelerated one, with chains of its own."""
    model = timm.create_model("test_efficientnet", num_classes=3)
    settings = Settings(data="x", accelerate=True, device_batch=2, batch_size=2, img_size=64, ema_decay=0.9)
    engine = Engine(settings, model, 3, 1, CPU)
    assert engine.acceleration.exchanged == len(engine.acceleration.results) == 4
    assert restore(engine.model) == restore(engine.ema.module) > 0
