"""Every setting of a training run: its flag, default, help, limits, and the rules between settings."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import os
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from .presets import PRESETS, data_preset

PROGRAM = "fused-ops train"
SETTINGS_FILE = "settings.json"
SCHEDULES = ("cosine", "step", "multistep", "exponential", "poly")
# Settings that mean something with these schedules alone.
SCHEDULES_WITH = {
    "cooldown_epochs": ("cosine", "poly"),
    "decay_epochs": ("step", "exponential"),
    "decay_milestones": ("multistep",),
    "decay_rate": ("step", "multistep", "exponential"),
    "poly_power": ("poly",),
}


class UsageError(Exception):
    """Bad input, found before training starts: one line for the user and exit code 2."""


class LocalUsageError(UsageError):
    """Bad input that this rank may be the only one to see."""


def _flag(
    default: Any,
    group: str,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    at_least: float | None = None,
    at_most: float | None = None,
    above: float | None = None,
    may_change: bool = False,
    kept: bool = True,
) -> Any:
    """A setting. `may_change`: may differ on resuming. `kept`: belongs to the run, not to the call."""
    metadata = {
        "group": group,
        "help": help,
        "choices": choices,
        "at_least": at_least,
        "at_most": at_most,
        "above": above,
        "may_change": may_change or not kept,
        "kept": kept,
    }
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Settings:
    """Settings of one run. The defaults are the ImageNet recipe of DS-Net; see PRESETS for the others."""

    model: str = _flag("dsnet_small", "what", "model of the zoo, or timm/NAME for a model of timm")
    data: str = _flag(
        "",
        "what",
        "digits (scikit-learn's handwritten digits), synthetic (random tensors on the device), "
        "or a folder with train/CLASS/*.jpg and val/CLASS/*.jpg",
        may_change=True,
    )
    preset: str = _flag(
        "auto",
        "what",
        "set of defaults, as listed below; auto takes the one of --data",
        choices=("auto", *PRESETS),
    )
    finetune: str = _flag("", "what", "start from these weights (.safetensors); another class count is fine")
    evaluate: bool = _flag(
        False, "what", "evaluate --checkpoint on the held-out images, no training", kept=False
    )
    checkpoint: str = _flag("", "what", "weights (.safetensors) for --evaluate", kept=False)
    resume: str = _flag("", "what", "continue the run in this folder, with its settings", kept=False)
    output: str = _flag(
        "", "what", "folder of the run; default runs/MODEL-DATA-TIME", may_change=True, kept=False
    )

    img_size: int = _flag(0, "data", "side of the square input; 0 takes the model's own", at_least=0)
    crop_scale: float = _flag(
        0.08, "data", "smallest area of the random crop, as a share of the image", above=0, at_most=1
    )
    crop_pct: float = _flag(
        0.875, "data", "share of the resized image that evaluation crops", above=0, at_most=1
    )
    hflip: float = _flag(0.5, "data", "probability of a horizontal flip", at_least=0, at_most=1)
    rand_augment: str = _flag("rand-m9-mstd0.5-inc1", "data", "timm's RandAugment string, or none")
    random_erasing: float = _flag(
        0.25, "data", "probability of erasing a rectangle (pixel noise)", at_least=0, at_most=1
    )
    repeats: int = _flag(
        3, "data", "repeated augmentation: copies of an image in neighbouring batches; 1 is off", at_least=1
    )
    mixup: float = _flag(0.8, "data", "alpha of mixup; 0 is off", at_least=0)
    cutmix: float = _flag(1.0, "data", "alpha of CutMix; 0 is off", at_least=0)
    mixup_prob: float = _flag(
        1.0, "data", "probability of mixing a batch by either of the two", at_least=0, at_most=1
    )
    mixup_switch: float = _flag(
        0.5, "data", "probability of CutMix in place of mixup when both are on", at_least=0, at_most=1
    )
    mixup_mode: str = _flag(
        "batch", "data", "what one mixing ratio covers", choices=("batch", "pair", "elem")
    )
    workers: int = _flag(
        -1, "data", "loader processes per rank; -1 takes up to 8 from the cores", at_least=-1, may_change=True
    )
    max_unreadable: int = _flag(
        10,
        "data",
        "unreadable images to put up with: each is named and counted; in training the next readable one "
        "takes its place, in evaluation it is left out",
        at_least=0,
        may_change=True,
    )
    synthetic_updates: int = _flag(50, "data", "updates per epoch of --data synthetic", at_least=1)

    epochs: int = _flag(300, "optimisation", "epochs, cool-down not counted", at_least=1)
    cooldown_epochs: int = _flag(0, "optimisation", "further epochs at --min-lr", at_least=0)
    batch_size: int = _flag(1024, "optimisation", "images per update, over all ranks together", at_least=1)
    device_batch: int = _flag(
        0,
        "optimisation",
        "images per forward pass on one device; gradients are accumulated up to --batch-size. Mixing ratios, "
        "BatchNorm statistics and DropPath belong to these passes, so that for a given value any number of "
        "ranks computes the same updates. 0 takes up to 128",
        at_least=0,
    )
    optimizer: str = _flag("adamw", "optimisation", "optimizer by timm's name")
    lr: float = _flag(
        5e-4, "optimisation", "learning rate for 512 images, scaled linearly with --batch-size", above=0
    )
    schedule: str = _flag(
        "cosine",
        "optimisation",
        "how the rate falls after the warm-up. cosine, poly: to --min-lr at the end of --epochs; step: times "
        "--decay-rate every --decay-epochs; multistep: times --decay-rate after each of --decay-milestones; "
        "exponential: smoothly, by --decay-rate in --decay-epochs. The last three count from the first epoch "
        "on, warm-up included, and take no notice of --min-lr",
        choices=SCHEDULES,
    )
    min_lr: float = _flag(
        1e-5, "optimisation", "last learning rate of cosine and poly (not scaled)", at_least=0
    )
    decay_epochs: float = _flag(
        0.0, "optimisation", "epochs between decays, for --schedule step and exponential", at_least=0
    )
    decay_milestones: str = _flag(
        "", "optimisation", "epochs after which the rate decays, for --schedule multistep, such as 30,60,90"
    )
    decay_rate: float = _flag(
        0.1,
        "optimisation",
        "factor of a decay, for --schedule step, multistep and exponential",
        above=0,
        at_most=1,
    )
    poly_power: float = _flag(
        0.9, "optimisation", "power of the share that is left to do, for --schedule poly", above=0
    )
    warmup_lr: float = _flag(
        1e-6, "optimisation", "first learning rate of the warm-up (not scaled)", at_least=0
    )
    warmup_epochs: float = _flag(5.0, "optimisation", "epochs of linear warm-up", at_least=0)
    weight_decay: float = _flag(
        0.05, "optimisation", "not applied to biases, 1-D parameters and model.no_weight_decay()", at_least=0
    )
    beta1: float = _flag(0.9, "optimisation", "first AdamW beta", at_least=0, at_most=0.9999999)
    beta2: float = _flag(0.999, "optimisation", "second AdamW beta", at_least=0, at_most=0.9999999)
    eps: float = _flag(1e-8, "optimisation", "AdamW epsilon", above=0)
    clip_grad: float = _flag(0.0, "optimisation", "largest norm of the gradient; 0 does not clip", at_least=0)
    layer_decay: float = _flag(
        0.0, "optimisation", "learning rate factor from layer to layer, for fine-tuning; 0 is off", at_least=0
    )
    label_smoothing: float = _flag(0.1, "optimisation", "label smoothing", at_least=0, at_most=0.9999999)
    drop_path: float = _flag(
        0.1, "optimisation", "stochastic depth of the last block", at_least=0, at_most=0.9999999
    )
    ema_decay: float = _flag(
        0.99996, "optimisation", "decay of the averaged weights; 0 is off", at_least=0, at_most=0.9999999
    )
    ema_warmup: bool = _flag(False, "optimisation", "let the decay grow from 0, see --ema-warmup-form")
    ema_warmup_form: str = _flag(
        "power",
        "optimisation",
        "power: 1 - (1 + update)^(-2/3); ratio: (1 + update) / (10 + update)",
        choices=("power", "ratio"),
    )
    ema_distillation: float = _flag(
        0.0,
        "optimisation",
        "weight in the target of what the averaged weights say about every position of the unmixed images "
        "(1 - alpha of HIRI-ViT, section 4.5); 0 is off",
        at_least=0,
        at_most=0.9999999,
    )
    ema_distillation_warmup: float = _flag(
        0.0, "optimisation", "epochs in which that weight rises linearly from 0", at_least=0
    )

    device: str = _flag(
        "auto", "device", "auto takes a GPU if there is one", choices=("auto", "cpu", "cuda"), may_change=True
    )
    threads: int = _flag(0, "device", "PyTorch threads per rank; 0 leaves it to PyTorch", at_least=0)
    amp: str = _flag(
        "auto",
        "device",
        "autocast; auto is bf16 on a GPU that has it, fp16 on another, none on the CPU",
        choices=("auto", "bf16", "fp16", "none"),
    )
    channels_last: bool = _flag(True, "device", "channels_last memory format")
    compile: bool = _flag(False, "device", "torch.compile the model")
    accelerate: bool = _flag(
        False,
        "device",
        "exchange layers for fused operators where these are as fast or faster (fused_ops.accelerate)",
        may_change=True,
    )
    sync_batch_norm: bool = _flag(
        False, "device", "BatchNorm statistics over all ranks (CUDA only: PyTorch has none for the CPU)"
    )

    seed: int = _flag(0, "run", "all randomness follows from it", at_least=0)
    eval_every: int = _flag(1, "run", "epochs between evaluations", at_least=1)
    checkpoint_every: int = _flag(
        0,
        "run",
        "updates between checkpoints, beside the one at the end of every epoch; 0 for none",
        at_least=0,
        may_change=True,
    )
    log_every: int = _flag(20, "run", "updates between looks at the loss", at_least=1, may_change=True)
    plain: bool = _flag(
        False, "run", "lines in place of a progress bar, as when output is no terminal", kept=False
    )
    json: bool = _flag(False, "run", "print the summary as JSON on stdout, all else on stderr", kept=False)

    @property
    def peak_lr(self) -> float:
        """Learning rate after the warm-up."""
        return self.lr * self.batch_size / 512

    @property
    def total_epochs(self) -> int:
        """Epochs including the cool-down."""
        return self.epochs + self.cooldown_epochs

    @property
    def mixes(self) -> bool:
        """Whether images of a batch are mixed."""
        return self.mixup_prob > 0 and (self.mixup > 0 or self.cutmix > 0)


FIELDS = {f.name: f for f in dataclasses.fields(Settings)}
MAY_CHANGE = tuple(name for name, f in FIELDS.items() if f.metadata["may_change"] and f.metadata["kept"])


def flag_of(name: str) -> str:
    """The command line flag of a setting."""
    return "--" + name.replace("_", "-")


def nearest(word: str, known: Sequence[str]) -> str:
    """The names like `word`, as the end of an error message."""
    found = difflib.get_close_matches(word, known, n=3, cutoff=0.4)
    return f"nearest: {', '.join(found)}" if found else f"known: {', '.join(sorted(known)[:20])}"


class _Lines(argparse.HelpFormatter):
    """Keeps the lines of the epilogue apart, each wrapped with a hanging indent."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(
            textwrap.fill(line, width, initial_indent=indent, subsequent_indent=f"{indent}    ")
            for line in text.splitlines()
        )


def _describe_presets() -> str:
    """One line per preset: whose numbers, and what to know of them."""
    lines = []
    for name, preset in PRESETS.items():
        notes = f" Note: {'; '.join(preset.notes)}." if preset.notes else ""
        lines.append(f"  {name}: {preset.source}.{notes}")
    return "\n".join(lines)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def build_parser() -> argparse.ArgumentParser:
    """The command line, from the fields of `Settings`. Only flags that were given end up in the namespace."""
    parser = _Parser(
        prog=PROGRAM,
        description="Train or evaluate an image classifier, on one device or under torchrun.",
        epilog="Resuming keeps the settings of the run; these may be given anew: "
        + ", ".join(map(flag_of, MAY_CHANGE))
        + ".\n\nPresets, each with its own model unless --model is given. INFERRED marks what nobody "
        "published; all leave the number format to --amp:\n"
        f"{_describe_presets()}",
        formatter_class=_Lines,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    groups: dict[str, Any] = {}
    for name, f in FIELDS.items():
        title = f.metadata["group"]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        default = "" if f.default in ("", False) else f" (default {f.default})"
        text = (f.metadata["help"] + default).replace("%", "%%")
        if f.type == "bool":
            groups[title].add_argument(flag_of(name), action=argparse.BooleanOptionalAction, help=text)
        else:
            kind = {"int": int, "float": float, "str": str}[f.type]
            choices = f.metadata["choices"] or None
            groups[title].add_argument(
                flag_of(name), type=kind, choices=choices, metavar=name.upper(), help=text
            )
    return parser


def parse(arguments: Sequence[str]) -> dict[str, Any]:
    """The settings given on the command line, by name."""
    given, unknown = build_parser().parse_known_args(arguments)
    if unknown:
        flags = [flag_of(name) for name in FIELDS]
        raise UsageError(f"{unknown[0]}: no such argument; {nearest(unknown[0].split('=')[0], flags)}")
    return vars(given)


def settings_from(given: dict[str, Any]) -> Settings:
    """Complete settings: those given, over those of the preset, over the defaults. Raises `UsageError`."""
    preset = given.get("preset", "auto")
    if preset == "auto":
        preset = data_preset(given.get("data", ""))
    if preset not in PRESETS:
        raise UsageError(f"--preset {preset}: no such preset; {nearest(preset, list(PRESETS))}")
    recipe = PRESETS[preset]
    model = given.get("model", recipe.settings.get("model", Settings.model))
    defaults = recipe.settings_of(model)
    if given.get("schedule", defaults.get("schedule")) != defaults.get("schedule"):
        # What the preset says of its own schedule says nothing of another.
        schedule = given["schedule"]
        defaults = {
            name: value
            for name, value in defaults.items()
            if schedule in SCHEDULES_WITH.get(name, SCHEDULES) and name != "decay_rate"
        }
    settings = Settings(**{**defaults, **given, "preset": preset})
    validate(settings)
    return settings


def check_unchanged(settings: Settings, stored: dict[str, Any]) -> None:
    """Raise `UsageError` if a resumed run would go on with other settings than those that may change."""
    differing = [
        f"{flag_of(name)} {value} (the run has {stored[name]})"
        for name, value in kept(settings).items()
        if value != stored[name] and not FIELDS[name].metadata["may_change"]
    ]
    if differing:
        raise UsageError(
            f"--resume {settings.resume}: other settings than the run's: {'; '.join(differing)}. "
            f"May change: {', '.join(map(flag_of, MAY_CHANGE))}"
        )


def validate(settings: Settings) -> None:
    """Raise `UsageError` for a value out of range, and for settings that do not go together."""
    for name, f in FIELDS.items():
        value, limits = getattr(settings, name), f.metadata
        what = f"{flag_of(name)} {value}"
        if limits["choices"] and value not in limits["choices"]:
            raise UsageError(f"{what}: must be one of {', '.join(limits['choices'])}")
        # Written so that NaN fails as well.
        if limits["above"] is not None and not value > limits["above"]:
            raise UsageError(f"{what}: must be above {limits['above']}")
        if limits["at_least"] is not None and not value >= limits["at_least"]:
            raise UsageError(f"{what}: must be at least {limits['at_least']}")
        if limits["at_most"] is not None and not value <= limits["at_most"]:
            raise UsageError(f"{what}: must be at most {limits['at_most']}")
        if f.type == "float" and value == float("inf"):
            raise UsageError(f"{what}: must be finite")

    if not settings.data:
        raise UsageError("--data is missing: digits, synthetic, or a folder with train/ and val/")
    if settings.evaluate and not settings.checkpoint:
        raise UsageError("--evaluate needs --checkpoint FILE.safetensors")
    if settings.checkpoint and not settings.evaluate:
        raise UsageError(
            f"--checkpoint {settings.checkpoint}: belongs to --evaluate; to start training from weights "
            "use --finetune, to continue a run --resume"
        )
    if settings.warmup_epochs >= settings.epochs and settings.warmup_epochs > 0:
        raise UsageError(
            f"--warmup-epochs {settings.warmup_epochs}: must be less than --epochs {settings.epochs}"
        )
    _validate_schedule(settings)
    if (
        settings.schedule in ("cosine", "poly")
        and settings.min_lr > settings.peak_lr
        and not settings.evaluate
    ):
        raise UsageError(
            f"--min-lr {settings.min_lr}: must be at most the peak learning rate {settings.peak_lr:g} "
            "(--lr x --batch-size / 512)"
        )
    if settings.ema_distillation and not settings.ema_decay:
        raise UsageError(
            f"--ema-distillation {settings.ema_distillation}: needs averaged weights, which --ema-decay 0 "
            "switches off"
        )


def _validate_schedule(settings: Settings) -> None:
    """Raise `UsageError` for settings of another schedule than `--schedule`, and for those that it lacks."""
    for name, schedules in SCHEDULES_WITH.items():
        value = getattr(settings, name)
        if value != FIELDS[name].default and settings.schedule not in schedules:
            raise UsageError(
                f"{flag_of(name)} {value}: goes with --schedule {' or '.join(schedules)}; this run has "
                f"--schedule {settings.schedule}"
            )
    if settings.schedule in SCHEDULES_WITH["decay_epochs"] and not settings.decay_epochs:
        raise UsageError(f"--schedule {settings.schedule}: needs --decay-epochs above 0, such as 30")
    if settings.schedule == "multistep":
        milestones(settings.decay_milestones)


def milestones(text: str) -> list[int]:
    """The epochs of `--decay-milestones`. Raises `UsageError` unless whole, above 0 and ascending."""
    parts = [part.strip() for part in text.split(",")]
    numbers = [int(part) for part in parts if part.isdecimal()]
    if len(numbers) < len(parts) or numbers[0] < 1 or sorted(set(numbers)) != numbers:
        raise UsageError(
            f"--decay-milestones {text or 'is missing'}: --schedule multistep needs whole epochs above 0 in "
            "ascending order, such as 30,60,90"
        )
    return numbers


def split_batch(settings: Settings, world_size: int) -> Settings:
    """Settle `device_batch`. Raises `UsageError` if the batch does not divide among ranks and passes."""
    batch, part = settings.batch_size, settings.device_batch
    if batch % world_size:
        raise UsageError(f"--batch-size {batch}: must be a multiple of the {world_size} ranks")
    if not part:
        share = batch // world_size
        part = next(n for n in range(min(share, 128), 0, -1) if share % n == 0)
    if batch % (part * world_size):
        raise UsageError(f"--device-batch {part}: times {world_size} ranks must divide --batch-size {batch}")
    if settings.mixes and part % 2:
        raise UsageError(f"--device-batch {part}: must be even for mixup and CutMix, which work on pairs")
    return dataclasses.replace(settings, device_batch=part)


def kept(settings: Settings) -> dict[str, Any]:
    """The settings that belong to the run, sorted by name."""
    return {name: getattr(settings, name) for name in sorted(FIELDS) if FIELDS[name].metadata["kept"]}


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings of the run in `folder`. Raises `UsageError` if there is none.

    A run from before a setting existed did what the setting's default does, whatever its preset says today.
    """
    path = folder / SETTINGS_FILE
    if not folder.is_dir():
        raise UsageError(f"--resume {folder}: no such folder")
    try:
        stored = json.loads(path.read_text())
    except FileNotFoundError:
        raise UsageError(f"--resume {folder}: holds no run ({SETTINGS_FILE} is missing)") from None
    except ValueError as error:
        raise UsageError(f"--resume {folder}: {SETTINGS_FILE} is no JSON: {error}") from None
    unknown = sorted(set(stored) - set(FIELDS))
    if unknown:
        raise UsageError(f"--resume {folder}: {SETTINGS_FILE} is of another version: {', '.join(unknown)}")
    return {name: f.default for name, f in FIELDS.items() if f.metadata["kept"]} | stored


def launched_ranks() -> tuple[int, int]:
    """Rank and number of ranks as torchrun set them."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
