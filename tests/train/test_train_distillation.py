"""EMA distillation against plain loops; what it must not change; resuming; several ranks; refusals."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from timm.data import Mixup
from torch import Tensor, nn
from torch._dynamo.backends.registry import lookup_backend
from training_helpers import CONVNEXT, arguments, epochs, losses

from fused_ops.train import main
from fused_ops.train.checkpoint import LAST, load_state, save_state
from fused_ops.train.distillation import (
    RatioWarmupEma,
    Teacher,
    mix_with_mask,
    soft_targets,
    teacher_target,
    teacher_weight,
)
from fused_ops.train.distributed import World
from fused_ops.train.engine import Engine
from fused_ops.train.settings import Settings, UsageError

CPU = World(0, 1, torch.device("cpu"))
# A linear layer on the mean over positions, and BatchNorm.
MODEL = "dsnet_test"


class Small(nn.Module):
    """A classifier under timm's conventions whose map is 4x4 for images of 16x16."""

    def __init__(self, norm: type[nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.num_classes = 3
        self.conv = nn.Conv2d(3, 4, 3, stride=4, padding=1)
        self.norm = norm(4) if norm is nn.BatchNorm2d else norm(2, 4)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4, 3)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.drop(torch.relu(self.norm(self.conv(x))))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = x.mean((2, 3))
        return x if pre_logits else self.head(x)

    def get_classifier(self) -> nn.Module:
        return self.head

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def settings(**changes) -> Settings:
    values = {
        "model": "small",
        "data": "x",
        "img_size": 16,
        "batch_size": 8,
        "device_batch": 8,
        "repeats": 1,
        "epochs": 1,
        "warmup_epochs": 0,
        "lr": 0.64,
        "ema_decay": 0.75,
        "ema_distillation": 0.4,
        **changes,
    }
    return Settings(**values)


def random_batch(size: int, seed: int = 0) -> tuple[Tensor, Tensor, list[str]]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (size, 3, 16, 16), dtype=torch.uint8, generator=generator)
    return images, torch.randint(3, (size,), generator=generator), []


def boxes(batch: int, height: int, width: int) -> Tensor:
    """A mask of one box per image; some reach over the border and are clipped there."""
    rng = np.random.default_rng(0)
    mask = torch.ones(batch, height, width)
    for image in mask:
        top, left = rng.integers(-height // 4, height - 2), rng.integers(-width // 4, width - 2)
        bottom, right = top + rng.integers(2, height), left + rng.integers(2, width)
        image[max(top, 0) : bottom, max(left, 0) : right] = 0
    return mask


def target_by_loops(logits: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Steps 2 and 3 of section 4.5, position by position, in float64."""
    batch, height, width, classes = logits.shape
    target = np.zeros((batch, classes))
    for b in range(batch):
        for i in range(height):
            for j in range(width):
                rows = mask[b, i * mask.shape[1] // height : -(-(i + 1) * mask.shape[1] // height)]
                area = rows[:, j * mask.shape[2] // width : -(-(j + 1) * mask.shape[2] // width)]
                share = sum(map(float, area.flatten())) / area.size
                for image, weight in ((b, share), (batch - 1 - b, 1 - share)):
                    p = [math.exp(value) for value in logits[image, i, j]]
                    target[b] += weight * np.array(p) / sum(p) / (height * width)
    return target


@pytest.mark.parametrize(
    ("batch", "positions", "size"),
    [(4, (3, 2), (12, 12)), (5, (2, 2), (16, 10)), (2, (3, 4), (10, 13)), (1, (1, 1), (7, 5))],
    ids=["even", "odd", "areas that overlap", "one image"],
)
def test_target_is_the_formula(batch, positions, size):
    torch.manual_seed(0)
    logits, mask = 2 * torch.randn(batch, *positions, 6), boxes(batch, *size)
    target = teacher_target(logits, mask)
    expected = target_by_loops(logits.numpy(), mask.numpy())
    torch.testing.assert_close(target.double(), torch.from_numpy(expected), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(target.sum(1), torch.ones(batch), rtol=0, atol=1e-6)


def test_target_of_a_constant_mask_and_of_half_precision():
    """Mixup: the two means in the ratio of the mask. After the logits all is float32, under autocast too."""
    torch.manual_seed(0)
    logits = 3 * torch.randn(4, 7, 7, 10)
    means = logits.softmax(-1).mean((1, 2))
    target = teacher_target(logits, torch.full((4, 28, 28), 0.3))
    torch.testing.assert_close(target, 0.3 * means + 0.7 * means.flip(0))
    target = teacher_target(logits.bfloat16(), torch.ones(4, 28, 28))
    assert target.dtype == torch.float32
    torch.testing.assert_close(target, logits.bfloat16().float().softmax(-1).mean((1, 2)))


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("alphas", [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)], ids=["mixup", "cutmix", "both"])
def test_the_mask_is_what_mixed_the_images(alphas, mode):
    """Images, targets and random numbers are those of timm's mixing, and the mask explains both."""
    mix = Mixup(*alphas, prob=0.8, mode=mode, label_smoothing=0.1, num_classes=3)
    torch.manual_seed(0)
    fractional = clipped = 0
    for seed in range(20):
        clean, targets = torch.rand(6, 2, 12, 14), torch.tensor([0, 1, 2, 2, 0, 1])
        np.random.seed(seed)
        expected = mix(clean.clone(), targets)
        after = np.random.rand()
        np.random.seed(seed)
        images, soft, mask = mix_with_mask(mix, clean.clone(), targets)
        assert np.random.rand() == after
        assert torch.equal(images, expected[0])
        assert torch.equal(soft, expected[1])
        shares = mask[:, None]
        torch.testing.assert_close(images, shares * clean + (1 - shares) * clean.flip(0))
        labels = soft_targets(targets, 3, 0.1)
        shares = mask.mean((1, 2))[:, None]
        torch.testing.assert_close(soft, shares * labels + (1 - shares) * labels.flip(0))
        fractional += ((mask > 0) & (mask < 1)).any().item()
        clipped += (((mask[:, 0] == 0).any() or (mask[:, -1] == 0).any()) and (mask == 1).any()).item()
    assert (fractional > 5) == (alphas[0] > 0)
    assert (clipped > 2) == (alphas[1] > 0)


def test_weight_of_the_teacher():
    constant, rising = settings(), settings(ema_distillation_warmup=2.5)
    assert [teacher_weight(constant, step, 4) for step in (0, 7)] == [0.4, 0.4]
    assert [teacher_weight(rising, step, 4) for step in (0, 5, 10, 30)] == pytest.approx([0.0, 0.2, 0.4, 0.4])


def test_decay_grows_to_its_setting():
    model = Small()
    ema = RatioWarmupEma(model, 0.3)
    average = model.head.weight.detach().clone()
    for update in range(5):
        with torch.no_grad():
            model.head.weight.add_(1.0)
        decay = min(0.3, (1 + update) / (10 + update))
        average = decay * average + (1 - decay) * model.head.weight.detach()
        ema.update(model, step=update + 1)
        torch.testing.assert_close(ema.module.head.weight, average)
    assert isinstance(
        Engine(settings(ema_warmup=True, ema_warmup_form="ratio"), model, 3, 4, CPU).ema, RatioWarmupEma
    )


@pytest.mark.parametrize("mixing", [{}, {"mixup": 0.0, "cutmix": 0.0}], ids=["mixed", "not mixed"])
def test_what_the_student_learns(mixing):
    """The teacher is the average in evaluation mode on the unmixed images; labels are smoothed, it is not."""
    torch.manual_seed(0)
    engine = Engine(settings(random_erasing=0.0, **mixing), Small(), 3, 4, CPU)
    for number in range(3):
        engine.update(lambda number=number: random_batch(8, number), 0, number)
    images, targets, _ = random_batch(8, 9)
    teacher = engine.ema.module
    with torch.no_grad():
        clean, _ = engine.pipeline.prepare(images, targets, training=False)
        maps = teacher.norm(teacher.conv(clean)).relu()
        logits = torch.einsum("bchw,kc->bhwk", maps, teacher.head.weight) + teacher.head.bias
    np.random.seed(1)
    mixed, soft, learnt = engine._batch(images, targets, 3)
    np.random.seed(1)
    expected_images, expected_soft = engine.pipeline(images, targets, training=True)
    assert torch.equal(mixed, expected_images)
    assert torch.equal(soft, expected_soft)
    np.random.seed(1)
    mask = engine.pipeline.mix_with_mask(clean, targets)[2]
    labels = torch.full((8, 3), 0.1 / 3)
    labels[range(8), targets] += 0.9
    share = mask.mean((1, 2))[:, None]
    expected = 0.6 * (share * labels + (1 - share) * labels.flip(0))
    expected += 0.4 * torch.from_numpy(target_by_loops(logits.numpy(), mask.numpy())).float()
    torch.testing.assert_close(learnt, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(learnt.sum(1), torch.ones(8), rtol=0, atol=1e-6)
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not any(module.training for module in teacher.modules())


def test_the_teacher_moves_once_per_update():
    """With accumulation too: once, after the optimiser's step, buffers included."""
    torch.manual_seed(0)
    engine = Engine(settings(device_batch=2), Small(), 3, 4, CPU)
    parts = [random_batch(2, seed) for seed in range(12)]
    batches = iter(parts)
    engine.update(lambda: next(batches), 0, 0)
    before = {name: value.clone() for name, value in engine.ema.module.state_dict().items()}
    seen = []
    original = engine.teacher.__class__.__call__

    class Watched(Teacher):
        def __call__(self, images: Tensor) -> Tensor:
            seen.append(engine.ema.module.head.weight.clone())
            return original(self, images)

    engine.teacher.__class__ = Watched
    engine.update(lambda: next(batches), 0, 1)
    assert len(seen) == 4
    assert all(torch.equal(weight, before["head.weight"]) for weight in seen)
    for name, value in engine.model.state_dict().items():
        average = value if name.endswith("tracked") else 0.75 * before[name] + 0.25 * value
        torch.testing.assert_close(engine.ema.module.state_dict()[name], average)


def same_weights(run: Path, reference: Path) -> bool:
    ours, theirs = load_state(run / LAST), load_state(reference / LAST)
    return all(
        torch.equal(ours[part][name], value)
        for part in ("model", "ema")
        for name, value in theirs[part].items()
    )


@pytest.fixture(scope="module")
def distilled_run(image_folder, tmp_path_factory):
    run = tmp_path_factory.mktemp("distilled") / "run"
    assert main(command(image_folder, run)) == 0
    return run


class PowerCutError(Exception):
    pass


def command(folder: Path, run: Path, **changes) -> list[str]:
    return arguments(
        folder, run, **{"model": MODEL, "img_size": 64, "epochs": 2, "ema_distillation": 0.5, **changes}
    )


def test_weight_0_is_ordinary_training(distilled_run, image_folder, tmp_path):
    """Exactly, even where the teacher runs: its weight is then too small to change a float32 target."""
    ordinary, negligible = tmp_path / "ordinary", tmp_path / "negligible"
    assert main(command(image_folder, ordinary, ema_distillation=0)) == 0
    assert main(command(image_folder, negligible, ema_distillation=1e-30)) == 0
    assert losses(negligible) == losses(ordinary)
    assert epochs(negligible) == epochs(ordinary)
    assert same_weights(negligible, ordinary)
    assert losses(distilled_run) != losses(ordinary)


def test_resume_keeps_the_teacher(distilled_run, image_folder, tmp_path, monkeypatch):
    run, forgetful = tmp_path / "run", tmp_path / "forgetful"
    original = Engine.update

    def update(self, next_batch, epoch, number):
        if (epoch, number) == (1, 1):
            raise PowerCutError
        return original(self, next_batch, epoch, number)

    for folder in (run, forgetful):
        with monkeypatch.context() as patch:
            patch.setattr(Engine, "update", update)
            with pytest.raises(PowerCutError):
                main(command(image_folder, folder, checkpoint_every=1))
        random.seed(1), np.random.seed(2), torch.manual_seed(3)
        if folder == forgetful:
            state = load_state(folder / LAST)
            save_state(folder / LAST, {**state, "ema": state["model"]})
        assert main([f"--resume={folder}"]) == 0
    assert losses(run) == losses(distilled_run)
    assert epochs(run) == epochs(distilled_run)
    assert same_weights(run, distilled_run)
    # A teacher that is not kept would have been noticed.
    assert losses(forgetful) != losses(distilled_run)


class GraphCounter:
    """Stands for torch.compile's compiler, which it leaves out: what was traced runs as PyTorch's calls."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Tensor]:
        self.graphs += 1
        return lookup_backend("aot_eager")(graph, inputs)


@pytest.fixture
def graphs(monkeypatch) -> GraphCounter:
    counter = GraphCounter()
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter, fullgraph=True))
    return counter


def assert_averaged(engine: Engine, before: dict[str, Tensor], decay: float) -> None:
    """The teacher is what it was before the update and what the student is now, in the ratio of the decay."""
    average = engine.ema.module.state_dict()
    for name, value in engine.model.state_dict().items():
        expected = decay * before[name] + (1 - decay) * value if value.is_floating_point() else value
        torch.testing.assert_close(average[name], expected, rtol=1e-5, atol=1e-6)
    assert not any(module.training for module in engine.ema.module.modules())


def weights_of_the_teacher(engine: Engine) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in engine.ema.module.state_dict().items()}


def watch_the_average(monkeypatch, decay: float) -> list[float]:
    """Check at every update of every run that the teacher becomes the average; losses of the updates."""
    seen = []
    original = Engine.update

    def update(self, next_batch, epoch, number):
        before = weights_of_the_teacher(self)
        record = original(self, next_batch, epoch, number)
        seen.append(record.loss.item())
        # The first update makes it the student.
        assert_averaged(self, before, decay if epoch or number else 0.0)
        return record

    monkeypatch.setattr(Engine, "update", update)
    return seen


# As small as a model can be that has such a head; tracing takes longer than training.
QUICK = "timm/test_resnet"
# Flags, and how far the losses of a few updates may be from those of plain float32. bfloat16 has 8 bits.
FORMS = {
    "compiled": (["--compile"], 1e-4),
    "bfloat16": (["--amp=bf16"], 0.03),
    "compiled bfloat16": (["--compile", "--amp=bf16"], 0.03),
}


@pytest.fixture(scope="module")
def plain_run(image_folder, tmp_path_factory):
    run = tmp_path_factory.mktemp("plain") / "run"
    assert main(command(image_folder, run, model=QUICK)) == 0
    return run


@pytest.mark.parametrize(
    "form", ["compiled", "bfloat16", pytest.param("compiled bfloat16", marks=pytest.mark.extended)]
)
def test_compiled_and_in_low_precision(form, plain_run, image_folder, tmp_path, monkeypatch, graphs):
    """The same training; the teacher is the student's average, and an interrupted run goes on with it."""
    flags, tolerance = FORMS[form]
    run, resumed = tmp_path / "run", tmp_path / "resumed"
    seen = watch_the_average(monkeypatch, 0.8)
    assert main([*command(image_folder, run, model=QUICK), *flags]) == 0
    assert seen == losses(run)
    np.testing.assert_allclose(losses(run), losses(plain_run), rtol=tolerance)
    assert "--amp=bf16" not in flags or losses(run) != losses(plain_run)
    # The student in training, the teacher in evaluation; no third for the last batch or the second epoch.
    assert graphs.graphs == (2 if "--compile" in flags else 0)

    checked = Engine.update

    def cut(self, next_batch, epoch, number):
        if (epoch, number) == (1, 1):
            raise PowerCutError
        return checked(self, next_batch, epoch, number)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "update", cut)
        with pytest.raises(PowerCutError):
            main([*command(image_folder, resumed, model=QUICK, checkpoint_every=1), *flags])
    assert main([f"--resume={resumed}"]) == 0
    assert losses(resumed) == losses(run)
    assert epochs(resumed) == epochs(run)
    assert same_weights(resumed, run)


@pytest.mark.extended
def test_compiled_by_inductor(image_folder, tmp_path):
    """As users have it; without drop path, for which that compiler draws other numbers."""
    eager, compiled = tmp_path / "eager", tmp_path / "compiled"
    assert main(command(image_folder, eager, model=QUICK, drop_path=0)) == 0
    assert main([*command(image_folder, compiled, model=QUICK, drop_path=0), "--compile"]) == 0
    np.testing.assert_allclose(losses(compiled), losses(eager), rtol=1e-3)


@pytest.mark.parametrize(
    "compiled", [False, pytest.param(True, marks=pytest.mark.extended)], ids=["eager", "compiled"]
)
def test_float16(compiled, graphs, monkeypatch):
    """The engine alone, as the command leaves float16 to GPUs; the loss is scaled, resuming included."""

    def engine(amp: str) -> Engine:
        torch.manual_seed(0)
        model = Small()
        # Its random numbers would be others in float16.
        model.drop.p = 0.0
        return Engine(settings(amp=amp, lr=0.05, compile=compiled), model, 3, 4, CPU)

    def update(engine: Engine, number: int) -> float:
        return engine.update(lambda: random_batch(8, number), 0, number).loss.item()

    plain, half, resumed = engine("none"), engine("fp16"), engine("fp16")
    assert half.scaler.is_enabled()
    dtypes = []

    def target(logits: Tensor, mask: Tensor) -> Tensor:
        dtypes.append(logits.dtype)
        return teacher_target(logits, mask)

    monkeypatch.setattr("fused_ops.train.engine.teacher_target", target)
    for number in range(3):
        before = weights_of_the_teacher(half)
        got, want = update(half, number), update(plain, number)
        assert got == pytest.approx(want, rel=0.005)
        assert got != want
        assert_averaged(half, before, 0.75 if number else 0.0)
    assert dtypes == [torch.float16, torch.float32] * 3
    assert graphs.graphs == 4 * compiled
    for name, value in plain.ema.module.state_dict().items():
        torch.testing.assert_close(half.ema.module.state_dict()[name], value, rtol=0.02, atol=2e-3)

    # Gradients that overflow: the step is left out and the loss scaled by half.
    scale = 2.0**60
    half.scaler.load_state_dict({**half.scaler.state_dict(), "scale": scale})
    weights = [parameter.clone() for parameter in half.model.parameters()]
    assert math.isfinite(update(half, 3))
    assert all(map(torch.equal, half.model.parameters(), weights))
    assert half.scaler.get_scale() == scale / 2
    half.scaler.load_state_dict({**half.scaler.state_dict(), "scale": 1024.0})

    resumed.load(copy.deepcopy(half.state()))
    assert resumed.scaler.get_scale() == 1024.0
    for number in (4, 5):
        assert update(resumed, number) == update(half, number)
    assert all(
        map(torch.equal, resumed.ema.module.state_dict().values(), half.ema.module.state_dict().values())
    )


def test_odd_batches(image_folder, tmp_path, fails):
    error = fails(command(image_folder, tmp_path / "run", batch_size=9, device_batch=3))
    assert "--device-batch 3: must be even for mixup and CutMix" in error
    unmixed = {"batch_size": 9, "device_batch": 3, "mixup": 0, "cutmix": 0, "epochs": 1, "warmup_epochs": 0}
    assert main(command(image_folder, tmp_path / "odd", **unmixed)) == 0
    assert all(map(math.isfinite, losses(tmp_path / "odd")))


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"ema_decay": 0}, ["needs averaged weights", "--ema-decay 0"]),
        ({"ema_distillation": 1}, ["--ema-distillation 1.0", "at most"]),
        (
            {"model": CONVNEXT},
            [f"--ema-distillation 0.5: {CONVNEXT} has another head", "a linear layer on the mean"],
        ),
        ({"model": "timm/test_vit", "img_size": 160}, ["timm/test_vit returns no map"]),
        (
            {"model": "timm/deit_tiny_distilled_patch16_224", "img_size": 224},
            ["timm/deit_tiny_distilled_patch16_224 has a classifier of class tuple"],
        ),
        ({"model": "timm/test_efficientnet", "ema_warmup_form": "step"}, ["--ema-warmup-form", "ratio"]),
    ],
    ids=[
        "no average",
        "no labels",
        "norm behind the pooling",
        "class token",
        "two heads",
        "form of the warm-up",
    ],
)
def test_refusals(changes, parts, image_folder, tmp_path, fails):
    error = fails(command(image_folder, tmp_path / "run", **changes))
    for part in parts:
        assert part in error
    assert not (tmp_path / "run").exists()


def test_another_pooling_is_refused_whatever_the_weights():
    """A classifier of zeros hides what is pooled before it."""
    model = Small()
    nn.init.zeros_(model.head.weight)
    Teacher(model, settings())
    model.forward_head = lambda x, pre_logits=False: (
        x.amax((2, 3)) if pre_logits else model.head(x.amax((2, 3)))
    )
    with pytest.raises(UsageError, match=r"--ema-distillation 0\.4: small has another head"):
        Teacher(model, settings())


@pytest.mark.parametrize(
    "model", ["timm/test_resnet", "timm/test_efficientnet", "timm/swin_tiny_patch4_window7_224"]
)
def test_positions_of_timms_models(model):
    """Their mean is the model's own logits, whichever way the map lies."""
    import timm

    torch.manual_seed(0)
    options = {"depths": (1, 1, 1, 1), "embed_dim": 24, "img_size": 64} if "swin" in model else {}
    net = timm.create_model(model.removeprefix("timm/"), num_classes=5, **options).eval()
    images = torch.randn(2, 3, 64, 64)
    maps = Teacher(net, settings(model=model, img_size=64))(images)
    assert maps.shape == (2, 2, 2, 5)
    torch.testing.assert_close(maps.mean((1, 2)), net(images), rtol=1e-4, atol=1e-5)


def train_one_rank(rank: int, size: int, norm: type[nn.Module], store: Path, answers) -> None:
    """Three updates of 8 images in passes of 2, as one of `size` ranks."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    torch.manual_seed(0)
    engine = Engine(settings(device_batch=2), Small(norm), 3, 4, World(rank, size, torch.device("cpu")))
    for number in range(3):
        parts = iter([random_batch(2, 4 * number + k) for k in range(rank, 4, size)])
        engine.update(lambda parts=parts: next(parts), 0, number)
    # Lists, since tensors would lie in memory that ends with the process.
    states = [{n: v.tolist() for n, v in m.state_dict().items()} for m in (engine.ema.module, engine.model)]
    answers.put((rank, *states))
    dist.destroy_process_group()


def teachers(size: int, norm: type[nn.Module], folder: Path) -> list[tuple[dict, dict]]:
    """Teacher and student of every rank."""
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    ranks = [
        context.Process(
            target=train_one_rank, args=(rank, size, norm, folder / f"{size}{norm.__name__}", answers)
        )
        for rank in range(size)
    ]
    for process in ranks:
        process.start()
    found = sorted((answers.get() for _ in ranks), key=lambda answer: answer[0])
    for process in ranks:
        process.join(60)
        assert process.exitcode == 0
    return [answer[1:] for answer in found]


def test_two_processes_have_one_teacher(tmp_path):
    """Without BatchNorm it is the one that a single process has; with it, all have rank 0's statistics."""
    (alone, _), *_ = teachers(1, nn.GroupNorm, tmp_path)
    for teacher, _ in teachers(2, nn.GroupNorm, tmp_path):
        for name, value in alone.items():
            np.testing.assert_allclose(teacher[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
    (first, student), (second, other) = teachers(2, nn.BatchNorm2d, tmp_path)
    assert first == second
    assert student["norm.running_mean"] != other["norm.running_mean"]
    assert student["conv.weight"] == other["conv.weight"]
