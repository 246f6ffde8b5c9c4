"""A run from settings to summary: set-up with all checks, the loop over epochs, resuming."""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from .checkpoint import (
    BEST,
    EMA_WEIGHTS,
    LAST,
    WEIGHTS,
    load_state,
    remove_leftovers,
    save_state,
    save_weights,
    weights_metadata,
    write_json,
)
from .data import Data, Synthetic, evaluation_loader, open_data, training_loader, updates_per_epoch
from .distributed import World, join
from .engine import Batch, Engine, StepClock, UpdateRecord, autocast_dtype
from .interrupt import StopRequest
from .model import check_input, create_model, input_size, load_weights, notes_on
from .presets import PRESETS
from .report import (
    CURVES,
    METRICS,
    Metrics,
    Progress,
    make_console,
    peak_memory,
    plot_curves,
    read_metrics,
    step_quantiles,
    summary_table,
)
from .seeding import Purpose, derive, seed_all
from .settings import (
    PROGRAM,
    SETTINGS_FILE,
    Settings,
    UsageError,
    check_unchanged,
    kept,
    read_settings,
    settings_from,
    split_batch,
)

ENVIRONMENT = "environment.json"
CLASSES = "classes.json"
WARM_UP_STEPS = 3


class StoppedError(Exception):
    """A signal ended the run after it had saved its state."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


class TrainingError(Exception):
    """Training cannot go on; the last checkpoint is good."""


def train(given: dict[str, Any]) -> dict[str, Any]:
    """Do what the settings say (see `Settings`; those not given come from the preset), and summarise it.

    Raises `UsageError` for bad input, `StoppedError` after a signal, `TrainingError` for a loss that is not
    finite.
    """
    resume = Path(given["resume"]) if given.get("resume") else None
    stored = read_settings(resume) if resume else {}
    settings = settings_from({**stored, **given})
    world = join(settings.device)
    try:
        console = make_console(to_stderr=settings.json)
        console.quiet = not world.is_main
        settings = _settle(settings, world)
        data = open_data(settings)
        settings, model = _build_model(settings, data)
        if settings.evaluate:
            return _evaluate(settings, data, model, world, console)
        if resume:
            check_unchanged(settings, stored)
        state = load_state(resume / LAST) if resume else None
        run = Run(settings, data, model, world, console, state)
        return run.to_the_end()
    finally:
        world.close()


def _settle(settings: Settings, world: World) -> Settings:
    """Replace `auto` by what it means here. Raises `UsageError` for what this device cannot do."""
    device = world.device
    if settings.threads:
        torch.set_num_threads(settings.threads)
    settings = split_batch(settings, world.size)
    if settings.sync_batch_norm and device.type != "cuda":
        raise UsageError("--sync-batch-norm: PyTorch's SyncBatchNorm needs CUDA; this run is on the CPU")
    if settings.amp == "fp16" and device.type == "cpu":
        raise UsageError("--amp fp16: needs a GPU; allowed on the CPU: bf16, none")
    if (
        settings.amp == "bf16"
        and device.type == "cuda"
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        raise UsageError("--amp bf16: this GPU has none; allowed: fp16, none")
    if settings.amp == "auto":
        names = {None: "none", torch.bfloat16: "bf16", torch.float16: "fp16"}
        settings = dataclasses.replace(settings, amp=names[autocast_dtype("auto", device)])
    return settings


def _build_model(settings: Settings, data: Data) -> tuple[Settings, torch.nn.Module]:
    """The model with its starting weights, and settings with the size and data set settled."""
    if settings.data not in ("digits", "synthetic"):
        settings = dataclasses.replace(settings, data=str(Path(settings.data).resolve()))
    if settings.evaluate:
        about = weights_metadata("--checkpoint", settings.checkpoint)
        classes = int(about.get("num_classes", len(data.classes)))
        if classes != len(data.classes):
            raise UsageError(
                f"--checkpoint {settings.checkpoint}: has {classes} classes, --data {settings.data} has "
                f"{len(data.classes)}"
            )
    seed_all(derive(settings.seed, Purpose.INIT))
    model = create_model(settings.model, len(data.classes), settings.drop_path, settings.img_size)
    if settings.finetune and not settings.resume:
        load_weights("--finetune", settings.finetune, model, settings.model, new_classifier=True)
    if not settings.img_size:
        settings = dataclasses.replace(settings, img_size=input_size(model))
    check_input(model, settings.model, settings.img_size)
    if settings.evaluate:
        load_weights("--checkpoint", settings.checkpoint, model, settings.model)
    return settings, model


def _data_name(settings: Settings) -> str:
    return Path(settings.data).name


def _interpolation(model: torch.nn.Module) -> str:
    from timm.data import resolve_model_data_config

    return resolve_model_data_config(model)["interpolation"]


def _evaluate(
    settings: Settings, data: Data, model: torch.nn.Module, world: World, console: Console
) -> dict[str, Any]:
    """Evaluate a checkpoint on the held-out images."""
    if data.val is None:
        raise UsageError("--evaluate: --data synthetic has no held-out images")
    no_average = dataclasses.replace(settings, ema_decay=0.0, ema_distillation=0.0)
    engine = Engine(no_average, model, len(data.classes), 1, world)
    loader = evaluation_loader(settings, data.val, _interpolation(model), world)
    ledger = UnreadableImages(settings.max_unreadable, world, console)
    start = time.perf_counter()
    with StopRequest() as request:
        result = engine.evaluate(
            engine.model, loader, lambda: bool(world.largest(request.number)), ledger.see
        )
        if result is None:
            raise StoppedError(world.largest(request.number), "Stopped during evaluation.")
    ledger.settle()
    seconds = time.perf_counter() - start
    row = {
        "model": settings.model,
        "data": _data_name(settings),
        "checkpoint": settings.checkpoint,
        "images": result["images"],
        "val_loss": result["loss"],
        "val_top1": result["top1"],
        "val_top5": result["top5"],
        "images_per_second": round(result["images"] / seconds, 1),
        **peak_memory(world.device),
        "unreadable": len(ledger.names),
        "seconds": round(seconds, 2),
        "device": world.device.type,
        "amp": settings.amp,
        "ranks": world.size,
    }
    console.print(summary_table(row))
    return row


class UnreadableImages:
    """Counts the unreadable images of all ranks, names each once, and keeps to the limit."""

    def __init__(self, limit: int, world: World, console: Console, known: tuple[str, ...] = ()) -> None:
        self._limit, self._world, self._console = limit, world, console
        self.names = set(known)
        self._new: set[str] = set()

    def see(self, names: list[str]) -> None:
        """Take note of a batch's unreadable images."""
        self._new.update(names)

    def settle(self) -> None:
        """Bring the ranks together. Raises `UsageError` beyond the limit."""
        new = set().union(*self._world.gather(self._new)) - self.names
        self._new = set()
        for name in sorted(new):
            self._console.print(f"unreadable image left out: {name}")
        self.names |= new
        if len(self.names) > self._limit:
            raise UsageError(
                f"--max-unreadable {self._limit}: {len(self.names)} images cannot be read, "
                f"the last of them {max(new)}"
            )


class Run:
    """The training of one model, from where `state` stands."""

    def __init__(
        self,
        settings: Settings,
        data: Data,
        model: torch.nn.Module,
        world: World,
        console: Console,
        state: dict[str, Any] | None,
    ) -> None:
        self.settings, self.data, self.world, self.console = settings, data, world, console
        self.updates = updates_per_epoch(settings, data)
        self._check_state(state)
        self.engine = Engine(settings, model, len(data.classes), self.updates, world)
        interpolation = _interpolation(model)
        self._train_loader, self._val_loader = None, None
        if data.train is not None and data.val is not None:
            self._train_loader, self._batches = training_loader(settings, data.train, interpolation, world)
            self._val_loader = evaluation_loader(settings, data.val, interpolation, world)
        else:
            passes = self.updates * self.engine.passes
            self._synthetic = Synthetic(settings, len(data.classes), passes, world)
        self.folder = self._open_folder()
        self.epoch, self.update = 0, 0
        self.sums = {"loss": 0.0, "correct": 0, "images": 0}
        self.best: dict[str, Any] = {"top1": None, "epoch": None, "ema_top1": None}
        self.last: dict[str, Any] = {}
        self.seconds_before = 0.0
        if state:
            self.engine.load(state)
            for name in ("epoch", "update", "sums", "best", "last"):
                setattr(self, name, state[name])
            self.seconds_before = state["seconds"]
        self.unreadable = UnreadableImages(
            settings.max_unreadable, world, console, tuple(state["unreadable"]) if state else ()
        )
        self._start = time.perf_counter()
        self._clock = StepClock(world.device)
        self._steps: list[float] = []
        self._records: list[UpdateRecord] = []
        self._lrs: list[float] = []
        self._rate = 0.0

    def _check_state(self, state: dict[str, Any] | None) -> None:
        if not state:
            return
        for name, value in self.data.fingerprint().items():
            if state["data"][name] != value:
                raise UsageError(
                    f"--data {self.settings.data}: not what {self.settings.resume} was trained on: "
                    f"{name} were {state['data'][name]}, are {value}"
                )
        if state["epoch"] >= self.settings.total_epochs:
            raise UsageError(
                f"--resume {self.settings.resume}: has finished its {self.settings.total_epochs} epochs"
            )

    def _open_folder(self) -> Path:
        """The run's folder, made by rank 0. Raises `UsageError` if it holds another run."""
        if self.settings.resume:
            folder = Path(self.settings.resume)
            if self.settings.output:
                raise UsageError(
                    f"--output {self.settings.output}: not with --resume, which goes on in its folder"
                )
        else:
            stamp = self.world.from_main(datetime.now().strftime("%Y%m%d-%H%M%S"))
            model = self.settings.model.replace("/", "_")
            folder = Path(self.settings.output or f"runs/{model}-{_data_name(self.settings)}-{stamp}")
        problem = ""
        if self.world.is_main:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                if not self.settings.resume and (folder / SETTINGS_FILE).exists():
                    problem = f"--output {folder}: already holds a run; take another folder, or --resume it"
                else:
                    remove_leftovers(folder)
                    self._describe(folder)
            except OSError as error:
                problem = f"--output {folder}: cannot be written ({error.strerror})"
        problem = self.world.from_main(problem)
        if problem:
            raise UsageError(problem)
        return folder

    def _describe(self, folder: Path) -> None:
        from fused_ops.core.environment import environment_report

        path = folder / ENVIRONMENT
        starts = json.loads(path.read_text()) if path.exists() else []
        starts.append({"command": sys.argv, "ranks": self.world.size, **environment_report()})
        write_json(path, starts)
        write_json(folder / SETTINGS_FILE, kept(self.settings))
        write_json(folder / CLASSES, self.data.classes)

    @property
    def done(self) -> int:
        """Updates made so far."""
        return self.epoch * self.updates + self.update

    def to_the_end(self) -> dict[str, Any]:
        """Train the remaining epochs and report."""
        s = self.settings
        size = sum(p.numel() for p in self.engine.model.parameters())
        self.console.print(
            f"{s.model} ({size / 1e6:.2f} M parameters) on {_data_name(s)}: "
            f"{len(self.data.classes)} classes, "
            + (f"{len(self.data.train)} + {len(self.data.val)} images, " if self.data.train else "")
            + f"{s.img_size}x{s.img_size}; {s.total_epochs} epochs of {self.updates} updates of "
            f"{s.batch_size} images; {self.world.device.type} x {self.world.size}, autocast {s.amp}; "
            f"folder {self.folder}"
        )
        if not s.resume:
            self._print_recipe()
        if self.engine.acceleration is not None:
            self.console.print(self.engine.acceleration.summary())
        if s.resume:
            self.console.print(f"continuing after update {self.update} of epoch {self.epoch + 1}")
        self._metrics = Metrics(self.folder, self.epoch, self.done) if self.world.is_main else None
        self._progress = Progress(
            self.console, self.done, s.total_epochs * self.updates, s.plain or not self.world.is_main
        )
        try:
            with StopRequest() as self._request:
                while self.epoch < s.total_epochs:
                    self._train_epoch()
                    self._finish_epoch()
        finally:
            self._progress.close()
            if self._metrics:
                self._metrics.close()
        return self._summarise()

    def _print_recipe(self) -> None:
        """Whose recipe it is and what is done otherwise; of a reconstructed model, that it is one."""
        s = self.settings
        recipe = PRESETS[s.preset]
        own = f"{s.optimizer}, rate {s.peak_lr:.4g} at its peak, {s.schedule}"
        self.console.print(f"preset {s.preset}: {recipe.source} ({own})", markup=False)
        for note in (*recipe.notes, *notes_on(s.model, s.preset)):
            self.console.print(f"  note: {note}", markup=False)

    def _stop_number(self) -> int:
        """The signal that any rank has received; all ranks get the same answer."""
        return self.world.largest(self._request.number)

    def _passes(self) -> Iterator[Batch]:
        if self._train_loader is None:
            yield from self._synthetic
            return
        self._batches.epoch, self._batches.first_update = self.epoch, self.update
        yield from self._train_loader

    def _train_epoch(self) -> None:
        if self.update == self.updates:
            return
        batches = self._passes()

        def next_batch() -> Batch:
            batch = next(batches)
            self.unreadable.see(batch[2])
            return batch

        self._clock.pause()
        self._clock.mark()
        while self.update < self.updates:
            self._records.append(self.engine.update(next_batch, self.epoch, self.update))
            self._lrs.append(self.engine.lr)
            self._clock.mark()
            self.update += 1
            self._progress.advance()
            if len(self._records) >= self.settings.log_every or self.update == self.updates:
                self._look()
            every = self.settings.checkpoint_every
            stop = self._stop_number()
            if stop or (every and self.update % every == 0):
                self._look()
                self._save(LAST)
            if stop:
                self._leave(stop)

    def _look(self) -> None:
        """Read the losses off the device: the only place in training where the CPU waits for it."""
        if not self._records:
            return
        loss = torch.stack([record.loss for record in self._records]).double()
        correct = torch.stack([record.correct for record in self._records]).double()
        losses, hits = self.world.sum(torch.stack((loss / self.world.size, correct))).tolist()
        first = self.done - len(losses) + 1
        rows = [
            {"kind": "update", "epoch": self.epoch + 1, "update": first + n, "loss": loss, "lr": lr}
            for n, (loss, lr) in enumerate(zip(losses, self._lrs, strict=True))
        ]
        self._records.clear()
        self._lrs.clear()
        if self._metrics:
            self._metrics.add(rows)
        for row in rows:
            if not math.isfinite(row["loss"]):
                raise TrainingError(
                    f"the loss is {row['loss']} at update {row['update']} of epoch {row['epoch']}; "
                    f"try a lower --lr, --clip-grad 1 or --amp none. {self.folder / LAST} is from before"
                )
            self.sums["loss"] += row["loss"]
        self.sums["correct"] += int(sum(hits))
        self.sums["images"] += len(rows) * self.settings.batch_size
        steps = self._clock.take()
        self._steps += steps
        self._rate = self.settings.batch_size * len(steps) / max(sum(steps), 1e-9)
        self._progress.show(
            f"epoch {self.epoch + 1}/{self.settings.total_epochs}",
            rows[-1]["loss"],
            self._train_top1,
            self._rate,
        )
        self._settle_unreadable()

    def _settle_unreadable(self) -> None:
        try:
            self.unreadable.settle()
        except UsageError as error:
            self._save(LAST)
            raise UsageError(f"{error}. {self._how_to_go_on()} --max-unreadable N") from None

    @property
    def _train_top1(self) -> float:
        return 100 * self.sums["correct"] / max(1, self.sums["images"])

    def _finish_epoch(self) -> None:
        """Evaluate, keep the best weights, save, and step on to the next epoch."""
        s, number = self.settings, self.epoch + 1
        row: dict[str, Any] = {
            "kind": "epoch",
            "epoch": number,
            "update": self.done,
            "train_loss": self.sums["loss"] * s.batch_size / self.sums["images"],
            "train_top1": self._train_top1,
            "images_per_second": self._rate,
        }
        improved = False
        if self._val_loader is not None and (number % s.eval_every == 0 or number == s.total_epochs):
            models = {"val": self.engine.model} | ({"ema": self.engine.ema.module} if self.engine.ema else {})
            for prefix, model in models.items():
                result = self.engine.evaluate(
                    model, self._val_loader, lambda: bool(self._stop_number()), self.unreadable.see
                )
                if result is None:
                    self._save(LAST)
                    self._leave(self._stop_number())
                row |= {f"{prefix}_{name}": result[name] for name in ("loss", "top1", "top5")}
            self._settle_unreadable()
            self.last = {name: value for name, value in row.items() if name.startswith(("val_", "ema_"))}
            improved = self._keep_best(row)
        elif self._val_loader is None and number == s.total_epochs:
            self._save_weights(WEIGHTS, self.engine.model)
        if self._metrics:
            self._metrics.add([row])
        self._print_epoch(row, improved)
        self.epoch, self.update = number, 0
        self.sums = dict.fromkeys(self.sums, 0)
        self._save(LAST)
        if improved:
            self._save(BEST)

    def _keep_best(self, row: dict[str, Any]) -> bool:
        improved = self.best["top1"] is None or row["val_top1"] > self.best["top1"]
        if improved:
            self.best |= {"top1": row["val_top1"], "epoch": row["epoch"]}
            self._save_weights(WEIGHTS, self.engine.model)
        ema_top1 = row.get("ema_top1")
        if ema_top1 is not None and (self.best["ema_top1"] is None or ema_top1 > self.best["ema_top1"]):
            self.best["ema_top1"] = ema_top1
            self._save_weights(EMA_WEIGHTS, self.engine.ema.module)
        return improved

    def _print_epoch(self, row: dict[str, Any], improved: bool) -> None:
        parts = [
            f"epoch {row['epoch']}/{self.settings.total_epochs}",
            f"loss {row['train_loss']:.4f}  top-1 {row['train_top1']:.2f} %",
        ]
        if "val_top1" in row:
            parts.append(
                f"held out: loss {row['val_loss']:.4f}  top-1 {row['val_top1']:.2f} %{' (best)' * improved}"
            )
        if "ema_top1" in row:
            parts.append(f"averaged: top-1 {row['ema_top1']:.2f} %")
        parts.append(f"{row['images_per_second']:,.0f} images/s")
        self.console.print("  |  ".join(parts))

    def _save_weights(self, name: str, model: torch.nn.Module) -> None:
        if self.world.is_main:
            save_weights(self.folder / name, model)

    def _save(self, name: str) -> None:
        if not self.world.is_main:
            return
        state = {
            **self.engine.state(),
            "epoch": self.epoch,
            "update": self.update,
            "sums": self.sums,
            "best": self.best,
            "last": self.last,
            "unreadable": sorted(self.unreadable.names),
            "data": self.data.fingerprint(),
            "seconds": self._seconds(),
        }
        save_state(self.folder / name, state)

    def _seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self._start

    def _how_to_go_on(self) -> str:
        return f"Continue with: {PROGRAM} --resume {self.folder}"

    def _leave(self, number: int) -> None:
        raise StoppedError(
            number,
            f"Stopped by {signal.Signals(number).name} after update {self.update} of epoch {self.epoch + 1}; "
            "saved. " + self._how_to_go_on(),
        )

    def _summarise(self) -> dict[str, Any]:
        s = self.settings
        # Nothing but an evaluation may have been left to do: then there are no steps.
        steps = self._steps[max(0, min(WARM_UP_STEPS, len(self._steps) - 1)) :]
        row = {
            "model": s.model,
            "data": _data_name(s),
            "epochs": s.total_epochs,
            "updates": self.done,
            "batch_size": s.batch_size,
            "best_top1": self.best["top1"],
            "best_epoch": self.best["epoch"],
            "best_ema_top1": self.best["ema_top1"],
            "last_top1": self.last.get("val_top1"),
            "last_top5": self.last.get("val_top5"),
            "last_ema_top1": self.last.get("ema_top1"),
            "images_per_second": round(s.batch_size * len(steps) / sum(steps), 1) if steps else None,
            **step_quantiles(steps),
            **peak_memory(self.world.device),
            "unreadable": len(self.unreadable.names),
            "seconds": round(self._seconds(), 2),
            "device": self.world.device.type,
            "amp": s.amp,
            "ranks": self.world.size,
            "run": str(self.folder),
        }
        if self.world.is_main:
            plot_curves(
                read_metrics(self.folder / METRICS), f"{s.model} on {_data_name(s)}", self.folder / CURVES
            )
        self.console.print(summary_table(row))
        self.console.print(f"curves: {self.folder / CURVES}   weights: {self.folder / WEIGHTS}")
        self.console.print(
            "your own images, in DIR/train/CLASS/ and DIR/val/CLASS/: "
            f"{PROGRAM} --model dsnet_small --data DIR"
        )
        return row
