"""The work of a run: passes, updates, evaluation."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import timm.optim
import torch
import torch.nn.functional as F
from timm.data import Mixup, resolve_model_data_config
from timm.data.random_erasing import RandomErasing
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler, PolyLRScheduler, StepLRScheduler
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fused_ops import Report, accelerate

from .data import NO_TARGET
from .distillation import (
    RatioWarmupEma,
    Teacher,
    mix_with_mask,
    soft_targets,
    teacher_target,
    teacher_weight,
)
from .distributed import World
from .seeding import Purpose, derive, seed_all
from .settings import Settings, UsageError, milestones, nearest

Batch = tuple[Tensor, Tensor, list[str]]


def build_optimizer(settings: Settings, model: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    """The optimizer, with no decay for biases, 1-D parameters and `model.no_weight_decay()`."""
    known = timm.optim.list_optimizers()
    if settings.optimizer not in known:
        raise UsageError(
            f"--optimizer {settings.optimizer}: timm has none of this name; "
            f"{nearest(settings.optimizer, known)}"
        )
    extra: dict[str, Any] = {}
    if "adam" in settings.optimizer:
        extra = {"betas": (settings.beta1, settings.beta2), "eps": settings.eps}
    if settings.optimizer in ("adam", "adamw") and device.type == "cuda":
        extra["fused"] = True
    return timm.optim.create_optimizer_v2(
        model,
        opt=settings.optimizer,
        lr=settings.peak_lr,
        weight_decay=settings.weight_decay,
        layer_decay=settings.layer_decay or None,
        **extra,
    )


def build_scheduler(
    settings: Settings, optimizer: torch.optim.Optimizer, updates_per_epoch: int
) -> Scheduler:
    """Linear warm-up, then the rate as a function of the update's number, so that resuming needs no state.

    Cosine and polynomial begin after the warm-up and end after `epochs` at `min_lr`, where cool-down stays.
    The others count from the first epoch, warm-up included, as the recipes that have them do.
    """
    s, warmup = settings, round(settings.warmup_epochs * updates_per_epoch)
    common = {"warmup_t": warmup, "warmup_lr_init": s.warmup_lr, "t_in_epochs": False}
    if s.schedule in ("cosine", "poly"):
        falling = {
            "t_initial": s.epochs * updates_per_epoch - warmup,
            "lr_min": s.min_lr,
            "warmup_prefix": True,
            **common,
        }
        if s.schedule == "cosine":
            return CosineLRScheduler(optimizer, **falling)
        return PolyLRScheduler(optimizer, power=s.poly_power, **falling)
    common["warmup_prefix"] = False
    if s.schedule == "multistep":
        # timm's scheduler takes a step one update before its milestone.
        after = [number * updates_per_epoch + 1 for number in milestones(s.decay_milestones)]
        return MultiStepLRScheduler(optimizer, decay_t=after, decay_rate=s.decay_rate, **common)
    period = s.decay_epochs * updates_per_epoch
    if s.schedule == "step":
        return StepLRScheduler(optimizer, decay_t=period, decay_rate=s.decay_rate, **common)
    return StepLRScheduler(optimizer, decay_t=1, decay_rate=s.decay_rate ** (1 / period), **common)


def autocast_dtype(amp: str, device: torch.device) -> torch.dtype | None:
    """The dtype that `--amp` means on this device; None for no autocast."""
    if amp == "auto":
        if device.type != "cuda":
            return None
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "none": None}[amp]


class InputPipeline:
    """What happens to images once they are on the device: memory format, normalisation, erasing, mixing."""

    def __init__(self, settings: Settings, model: nn.Module, num_classes: int, device: torch.device) -> None:
        config = resolve_model_data_config(model)
        # uint8 images: mean and standard deviation are those of 0..255.
        self._mean, self._std = (
            torch.tensor(config[key], device=device).mul_(255).view(1, 3, 1, 1) for key in ("mean", "std")
        )
        self._device = device
        self._format = torch.channels_last if settings.channels_last else torch.contiguous_format
        self._erase = None
        if settings.random_erasing:
            self._erase = RandomErasing(settings.random_erasing, mode="pixel", device=device.type)
        self._mix = None
        if settings.mixes:
            self._mix = Mixup(
                settings.mixup,
                settings.cutmix,
                prob=settings.mixup_prob,
                switch_prob=settings.mixup_switch,
                mode=settings.mixup_mode,
                label_smoothing=settings.label_smoothing,
                num_classes=num_classes,
            )

    def prepare(self, images: Tensor, targets: Tensor, training: bool) -> tuple[Tensor, Tensor]:
        """Images ready for the model but for mixing, and class numbers, on the device."""
        images = images.to(self._device, non_blocking=True).to(memory_format=self._format)
        targets = targets.to(self._device, non_blocking=True)
        images = images.float().sub_(self._mean).div_(self._std)
        if training and self._erase is not None:
            images = self._erase(images)
        return images, targets

    def mix(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Images mixed in place, and probabilities; as they are if nothing is to be mixed."""
        return self._mix(images, targets) if self._mix is not None else (images, targets)

    def mix_with_mask(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `mix`, and the share (B, H, W) of every pixel that is the image's own."""
        if self._mix is not None:
            return mix_with_mask(self._mix, images, targets)
        return images, targets, images.new_ones(()).expand(len(images), *images.shape[2:])

    def __call__(self, images: Tensor, targets: Tensor, training: bool) -> tuple[Tensor, Tensor]:
        """Images ready for the model, and targets: class numbers, or probabilities if images were mixed."""
        images, targets = self.prepare(images, targets, training)
        return self.mix(images, targets) if training else (images, targets)


def training_loss(logits: Tensor, targets: Tensor, label_smoothing: float) -> Tensor:
    """Cross-entropy with label smoothing; targets that are probabilities have been smoothed by mixup."""
    smoothing = 0.0 if targets.is_floating_point() else label_smoothing
    return F.cross_entropy(logits.float(), targets, label_smoothing=smoothing)


class StepClock:
    """Times from update to update, on the device's own clock, so that timing never waits for the GPU."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[Any] = []

    def mark(self) -> None:
        """An update has been given to the device."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def take(self) -> list[float]:
        """Seconds between the marks so far; the last mark stays as the beginning of the next step."""
        marks, self._marks = self._marks, self._marks[-1:]
        if self._cuda:
            if marks:
                marks[-1].synchronize()
            return [first.elapsed_time(second) / 1000 for first, second in pairwise(marks)]
        return [second - first for first, second in pairwise(marks)]

    def pause(self) -> None:
        """What follows is no update: do not count the time up to the next mark."""
        self._marks.clear()


@dataclass
class UpdateRecord:
    """What an update left behind, still on the device."""

    loss: Tensor
    correct: Tensor


class Engine:
    """Model, averaged model, optimizer, scheduler and scaler of a run; with EMA distillation the teacher."""

    def __init__(
        self, settings: Settings, model: nn.Module, num_classes: int, updates_per_epoch: int, world: World
    ) -> None:
        self.settings, self.world = settings, world
        self.updates_per_epoch = updates_per_epoch
        device = world.device
        memory_format = torch.channels_last if settings.channels_last else torch.contiguous_format
        if settings.sync_batch_norm and world.size > 1:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        self.model = model.to(device=device, memory_format=memory_format).train()
        self.amp_dtype = autocast_dtype(settings.amp, device)
        self.acceleration: Report | None = None
        if settings.accelerate:
            size = settings.img_size or resolve_model_data_config(model)["input_size"][-1]
            images = torch.empty(settings.device_batch or 2, 3, size, size, device=device)
            with self._autocast():
                # Speed depends on the shapes, the layout and the dtype that training will use.
                self.acceleration = accelerate(
                    self.model, example=images.contiguous(memory_format=memory_format)
                )
        self.ema = None
        if settings.ema_decay:
            ratio = settings.ema_warmup and settings.ema_warmup_form == "ratio"
            average = RatioWarmupEma if ratio else ModelEmaV3
            self.ema = average(self.model, settings.ema_decay, use_warmup=settings.ema_warmup)
        self._num_classes = num_classes
        self.teacher = Teacher(self.ema.module, settings) if settings.ema_distillation else None
        self.optimizer = build_optimizer(settings, self.model, device)
        self.scheduler = build_scheduler(settings, self.optimizer, updates_per_epoch)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.amp_dtype == torch.float16)
        self.pipeline = InputPipeline(settings, self.model, num_classes, device)
        self.passes = settings.batch_size // settings.device_batch // world.size
        self._k = min(5, num_classes)
        wrapped: nn.Module = torch.compile(self.model) if settings.compile else self.model
        if world.size > 1:
            # Running statistics are rank 0's, given to the others before evaluation (see share_buffers).
            wrapped = DistributedDataParallel(
                wrapped,
                device_ids=[device.index] if device.type == "cuda" else None,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
            )
        self._wrapped = wrapped

    def state(self) -> dict[str, Any]:
        """Everything that the next update depends on, but for data and position."""
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take over what `state` returned."""
        self.model.load_state_dict(state["model"])
        if self.ema:
            self.ema.module.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])

    def _autocast(self) -> Any:
        if self.amp_dtype is None:
            return nullcontext()
        return torch.autocast(self.world.device.type, dtype=self.amp_dtype)

    def _batch(self, images: Tensor, targets: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Training images, the targets that their labels give, and those to learn from.

        The two differ by the teacher's part. It is asked first, as mixing is done in place.
        """
        weight = teacher_weight(self.settings, step, self.updates_per_epoch) if self.teacher else 0.0
        if not weight:
            images, targets = self.pipeline(images, targets, training=True)
            return images, targets, targets
        images, targets = self.pipeline.prepare(images, targets, training=True)
        with self._autocast():
            logits = self.teacher(images)
        images, targets, mask = self.pipeline.mix_with_mask(images, targets)
        soft = soft_targets(targets, self._num_classes, self.settings.label_smoothing)
        return images, targets, torch.lerp(soft, teacher_target(logits, mask), weight)

    def update(self, next_batch: Callable[[], Batch], epoch: int, number: int) -> UpdateRecord:
        """One optimizer step, the `number`-th of `epoch`, over as many passes as the batch needs."""
        step = epoch * self.updates_per_epoch + number
        self.scheduler.step_update(step)
        total = torch.zeros((), device=self.world.device)
        correct = torch.zeros((), device=self.world.device, dtype=torch.long)
        for k in range(self.passes):
            images, targets, _ = next_batch()
            place = k * self.world.size + self.world.rank
            seed_all(derive(self.settings.seed, Purpose.PASS, epoch, number, place))
            images, targets, learnt = self._batch(images, targets, step)
            last = k == self.passes - 1
            with nullcontext() if last or self.world.size == 1 else self._wrapped.no_sync():
                with self._autocast():
                    logits = self._wrapped(images)
                loss = training_loss(logits, learnt, self.settings.label_smoothing)
                self.scaler.scale(loss / self.passes).backward()
            total += loss.detach() / self.passes
            labels = targets.argmax(1) if targets.is_floating_point() else targets
            correct += (logits.argmax(1) == labels).sum()
        if self.settings.clip_grad:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema:
            self.ema.update(self.model, step=step + 1)
            if self.teacher and self.world.size > 1:
                self.teacher.share_statistics()
        return UpdateRecord(total, correct)

    @property
    def lr(self) -> float:
        """Learning rate of the last update (of the last layers, with layer decay)."""
        return max(group["lr"] for group in self.optimizer.param_groups)

    @torch.no_grad()
    def evaluate(
        self,
        model: nn.Module,
        batches: Iterable[Batch],
        stop: Callable[[], bool],
        seen: Callable[[list[str]], None],
    ) -> dict[str, float] | None:
        """Loss, top-1 and top-5 of `model` over all ranks' batches; None if stopped on the way."""
        self.world.share_buffers(model)
        was_training = model.training
        model.eval()
        sums = torch.zeros(4, dtype=torch.float64, device=self.world.device)
        try:
            for images, targets, unreadable in batches:
                if stop():
                    return None
                seen(unreadable)
                images, targets = self.pipeline(images, targets, training=False)
                with self._autocast():
                    logits = model(images)
                real = targets != NO_TARGET
                loss = F.cross_entropy(logits.float(), targets, ignore_index=NO_TARGET, reduction="sum")
                hits = (logits.topk(self._k).indices == targets[:, None]) & real[:, None]
                sums += torch.stack((loss, hits[:, 0].sum(), hits.sum(), real.sum())).double()
        finally:
            model.train(was_training)
        loss, top1, top5, images = self.world.sum(sums).tolist()
        if not images:
            raise UsageError("--data: none of the held-out images can be read")
        return {
            "loss": loss / images,
            "top1": 100 * top1 / images,
            "top5": 100 * top5 / images,
            "images": int(images),
        }
