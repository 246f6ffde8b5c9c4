"""``fused-ops bench models``: whole models, training steps and inference, every provider side by side.

Data is synthetic and lies on the device, or with ``--loader`` comes through the loader, the augmentation and
the input pipeline of ``fused-ops train``; activations are bfloat16 under autocast; training uses AdamW, fused
on a GPU, for every provider. Times are of one step, so images/s is the batch over the median.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fused_ops.bench import results, timing
from fused_ops.bench.ops import (
    Machine,
    add_common_arguments,
    budget_seconds,
    check_choices,
    machine_line,
    measure_machine,
    ratios,
    release,
    report_left_out,
)
from fused_ops.bench.providers import NAMES, Provider, reason_of, select
from fused_ops.bench.results import Row, Store
from fused_ops.core import backends, library
from fused_ops.core.files import write_atomically
from fused_ops.models.named import check_named, create_named, input_size

MODES = ("train", "infer")
CPU_MODELS = ("dsnet_tiny",)
GPU_MODELS = (
    "dsnet_small",
    "dsnet_small_star",
    "dsnet_tiny",
    "hiri_vit_small",
    "timm/efficientnet_b0",
    "timm/convnext_tiny",
    "timm/pvt_v2_b2",
    "timm/focalnet_tiny_srf",
)
BATCHES = {"train": (128,), "infer": (1, 128)}
CPU_BATCHES = {"train": (2,), "infer": (1,)}
DTYPE = torch.bfloat16
CLASSES = 1000


@dataclass(frozen=True)
class Steps:
    """How many steps are run: ``warmup`` uncounted, then ``rounds`` of ``steps`` each, providers in turn."""

    warmup: int
    rounds: int
    steps: int


GPU_STEPS = Steps(50, 20, 10)
CPU_STEPS = Steps(1, 3, 1)


def create(name: str) -> nn.Module:
    """The model of a name that :func:`fused_ops.models.named.create_named` knows, the same at every call."""
    torch.manual_seed(0)
    return create_named(name)


class _Attention(TorchFunctionMode):
    """Notes whether ``scaled_dot_product_attention`` is called."""

    called = False

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.called = self.called or function is F.scaled_dot_product_attention
        return function(*args, **(kwargs or {}))


def what_is_called(model: nn.Module, shape: Sequence[int]) -> tuple[bool, set[str]]:
    """Whether the model calls ``scaled_dot_product_attention``, and which operators of this package."""
    mode = _Attention()
    device = next(model.parameters()).device
    with torch.no_grad(), backends.record() as choices, backends.backend("reference"), mode:
        copy.deepcopy(model).eval()(torch.zeros(1, *shape, device=device))
    return mode.called, {choice.operator for choice in choices}


@dataclass
class Runner:
    """One provider's model, ready to step.

    Attributes:
        step: runs one step.
        held_bytes: parameters, gradients and optimizer state.
        graph: the step is one CUDA graph.
        peak_bytes: greatest device memory of one step, ``held_bytes`` included.
    """

    provider: Provider
    step: Callable[[], Any]
    held_bytes: int
    graph: bool = False
    peak_bytes: int | None = None


def _autocast(device: timing.Device) -> torch.autocast:
    return torch.autocast("cpu" if device.is_cpu else "cuda", DTYPE)


def _to(value: Tensor, provider: Provider) -> Tensor:
    nchw = provider.layout == "nchw"
    return value.contiguous(memory_format=torch.contiguous_format if nchw else torch.channels_last)


def logits_error(
    provider: Provider, model: nn.Module, images: Tensor, device: timing.Device
) -> tuple[float, float]:
    """Relative error of the provider's logits, and of eager's, against float64, in evaluation mode.

    Raises:
        BackendUnavailableError: the provider cannot run the model.
    """
    model = copy.deepcopy(model).eval()

    def relative(out: Tensor) -> float:
        return ((out.double() - exact).norm() / exact.norm().clamp_min(1e-300)).item()

    with torch.no_grad():
        with backends.backend("reference"):
            exact = copy.deepcopy(model).double()(images.double())
            with _autocast(device):
                eager = model(images)
        with provider.active(), _autocast(device):
            mine = model(_to(images, provider))
    return relative(mine), relative(eager)


def wrong_logits(error: float, eager_error: float) -> str:
    """What is wrong with logits, or nothing: at most twice eager's error plus one bfloat16 rounding."""
    allowed = 2 * eager_error + torch.finfo(DTYPE).eps
    return "" if error <= allowed else f"logits: relative error {error:.2e} above {allowed:.2e}"


Batches = Callable[[], tuple[Tensor, Tensor]]


def loaded_batches(
    data: str, model: nn.Module, shape: Sequence[int], batch: int, device: timing.Device
) -> Batches:
    """Endless training batches as ``fused-ops train`` makes them: decoded, augmented and mixed.

    Args:
        data: ``digits``, or a folder with ``train/CLASS/`` and ``val/CLASS/``.
        model: whose mean and standard deviation the images are normalised with.
        shape: (C, H, W) of an image; square.

    Raises:
        ValueError: the data set cannot be used; the message says why.
    """
    from fused_ops.train.data import open_data, training_loader
    from fused_ops.train.distributed import World
    from fused_ops.train.engine import InputPipeline
    from fused_ops.train.settings import Settings, UsageError

    where = torch.device("cpu" if device.is_cpu else "cuda")
    settings = Settings(data=data, img_size=shape[1], batch_size=batch, device_batch=batch)
    try:
        source = open_data(settings).train
        if source is None:
            raise UsageError(f"--data {data}: there is nothing to load")
        if len(source) < batch:
            raise UsageError(f"--data {data}: {len(source)} images are fewer than the batch of {batch}")
        loader, order = training_loader(settings, source, "bicubic", World(0, 1, where))
    except UsageError as error:
        raise ValueError(str(error).replace("--data ", "--loader=", 1)) from None
    pipeline = InputPipeline(settings, model, CLASSES, where)

    def stream() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            for images, targets, _ in loader:
                yield pipeline(images, targets, training=True)
            order.epoch += 1

    iterator = stream()
    return lambda: next(iterator)


def make_runner(
    provider: Provider,
    source: nn.Module,
    mode: str,
    images: Tensor,
    labels: Tensor,
    device: timing.Device,
    graph: bool = False,
    batches: Batches | None = None,
) -> Runner:
    """The model, its optimizer and one step in the provider's layout; to be called on the device's stream.

    ``batches`` makes the training data of every step; None takes ``images`` and ``labels`` again and again.
    """
    module = copy.deepcopy(source).train(mode == "train")
    if provider.layout == "channels_last":
        module = module.to(memory_format=torch.channels_last)
    images = _to(images, provider)
    with provider.active():
        forward = provider.build(module)
    if mode == "infer":

        def infer() -> Tensor:
            with torch.no_grad(), _autocast(device):
                return forward(images)

        held = sum(entry.numel() * entry.element_size() for entry in module.parameters())
        step: Callable[[], Any] = infer
        with provider.active():
            for _ in range(3):
                step()
            with timing.peak_memory(device) as memory:
                step()
            if graph:
                step = device.graph([infer], 1)
        # A graph allocates when it is captured and not when it runs.
        peak = None if memory["bytes"] is None else held + memory["bytes"]
        return Runner(provider, step, held, graph, peak)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=not device.is_cpu)

    def train() -> None:
        mine, wanted = (images, labels) if batches is None else batches()
        optimizer.zero_grad(set_to_none=True)
        with _autocast(device):
            loss = F.cross_entropy(forward(_to(mine, provider)).float(), wanted)
        loss.backward()
        optimizer.step()

    # Parameters, gradients and AdamW's two moments.
    held = 4 * sum(entry.numel() * entry.element_size() for entry in module.parameters())
    return Runner(provider, train, held)


def _several(step: Callable[[], Any], count: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(count):
            step()

    return run


def interleaved_steps(
    runners: Sequence[Runner], device: timing.Device, steps: Steps, deadline: timing.Deadline
) -> dict[str, timing.Timing]:
    """Warm every runner up, then time rounds of a few steps per provider, providers in turn.

    A sample is the mean step of one round. Rounds stop early when the deadline passes, with at least one
    counted.
    """
    for runner in runners:
        with device.active(), runner.provider.active():
            for _ in range(steps.warmup):
                runner.step()
            with timing.peak_memory(device) as memory:
                runner.step()
        if memory["bytes"] is not None and not runner.graph:
            runner.peak_bytes = runner.held_bytes + memory["bytes"]
    turns = [(runner.provider.name, runner) for runner in runners]
    # One provider a second time, for the noise floor.
    turns.append((turns[-1][0] + timing.AGAIN, turns[-1][1]))
    samples: dict[str, list[float]] = {name: [] for name, _ in turns}
    for number in range(steps.rounds):
        for name, runner in turns:
            with device.active(), runner.provider.active():
                # One uncounted step: the first after another provider's finds other data in the caches, and
                # while it runs the host gets ahead, as in a real training loop.
                runner.step()
                samples[name].append(device.elapsed(_several(runner.step, steps.steps)) / steps.steps)
        if number + 1 < steps.rounds and deadline.left() <= 0:
            break
    return {name: timing.Timing(tuple(values)) for name, values in samples.items()}


COVERED = "fused_ops::covered"


@contextlib.contextmanager
def _ranges() -> Iterator[None]:
    """Put a profiler range around every call of every operator of this package."""
    originals = []
    for operator in library.operators().values():
        function, name = operator.function, operator.function.__name__

        def ranged(*arguments: Any, _function: Any = function, **options: Any) -> Any:
            with torch.profiler.record_function(COVERED):
                return _function(*arguments, **options)

        for module in list(sys.modules.values()):
            holder = getattr(module, "__name__", "").startswith("fused_ops") and vars(module)
            if holder and holder.get(name) is function:
                originals.append((module, name, function))
                setattr(module, name, ranged)
    try:
        yield
    finally:
        for module, name, function in originals:
            setattr(module, name, function)


@dataclass(frozen=True)
class Profile:
    """Where a step's time goes.

    Attributes:
        kernels: (name, seconds, launches) of the kernels that take longest; on a CPU, of PyTorch's operators.
        total: seconds of all of them in one step.
        covered: seconds in calls that this package has an operator for, forward and backward.
    """

    kernels: tuple[tuple[str, float, int], ...]
    total: float
    covered: float

    @property
    def share(self) -> float:
        return self.covered / self.total if self.total else 0.0

    def amdahl(self) -> str:
        """The line that says how much the whole step can gain."""
        share = self.share
        if share >= 1:
            return "all of the time is spent in covered operators"
        return (
            f"f = {share:.3f} of the time is spent in covered operators: made twice as fast they make the "
            f"step {1 / (1 - share / 2):.2f}x as fast, and no speed-up of them can make it more than "
            f"{1 / (1 - share):.2f}x"
        )


def profile(runner: Runner, device: timing.Device, top: int = 12) -> Profile:
    """Kernel times of one step through ``torch.profiler``.

    The backward of a covered call is found by the sequence numbers that autograd gives its forward. Kernels
    in a CUDA graph or compiled code cannot be told apart so, which is why this is for eager providers.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    if not device.is_cpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with device.active(), runner.provider.active(), _ranges():
        runner.step()
        device.synchronize()
        with torch.profiler.profile(activities=activities) as session:
            runner.step()
            device.synchronize()
    events = session.events()
    on_device = torch.autograd.DeviceType.CPU if device.is_cpu else torch.autograd.DeviceType.CUDA

    def spent(event: Any) -> float:
        return (event.cpu_time_total if device.is_cpu else event.device_time_total) / 1e6

    kernels: dict[str, list[float]] = {}
    for event in events:
        # Ranges appear on the device's timeline too, over the kernels that they contain.
        if event.device_type != on_device or event.name == COVERED:
            continue
        own = (event.self_cpu_time_total if device.is_cpu else event.self_device_time_total) / 1e6
        if own > 0 and not getattr(event, "is_user_annotation", False):
            kernels.setdefault(event.name, []).append(own)
    covered, numbers = 0.0, set()
    for event in events:
        if event.name == COVERED and event.device_type == torch.autograd.DeviceType.CPU:
            # Children and not the range itself: on a CPU its own time is Python's, which the total has not.
            covered += sum(spent(child) for child in event.cpu_children if child.name != COVERED)
            stack = list(event.cpu_children)
            while stack:
                child = stack.pop()
                numbers.add(child.sequence_nr)
                stack += child.cpu_children
    numbers.discard(-1)
    for event in events:
        # Only the outermost of the backward's events: those inside carry its number too.
        if not event.name.startswith("autograd::engine::evaluate_function"):
            continue
        if event.sequence_nr in numbers or "fused_ops" in event.name:
            covered += spent(event)
    ordered = sorted(kernels.items(), key=lambda item: -sum(item[1]))
    total = sum(sum(times) for times in kernels.values())
    return Profile(tuple((name, sum(times), len(times)) for name, times in ordered[:top]), total, covered)


def write_profiles(path: Path, gpu: str, commit: str, profiles: Mapping[str, Profile]) -> None:
    """Add kernel times to the JSON list at ``path``, in place of older ones of the same subject.

    Rows: gpu, commit, subject (model, mode, case and provider), total_us and covered_us of one step, amdahl
    (the line that says what can be gained), kernels (name, microseconds, launches; the longest first).
    """
    there = json.loads(path.read_text()) if path.is_file() else []
    rows = [row for row in there if row["subject"] not in profiles]
    for subject, found in profiles.items():
        rows.append(
            {
                "gpu": gpu,
                "commit": commit,
                "subject": subject,
                "total_us": found.total * 1e6,
                "covered_us": found.covered * 1e6,
                "amdahl": found.amdahl(),
                "kernels": [[name, seconds * 1e6, count] for name, seconds, count in found.kernels],
            }
        )
    text = json.dumps(sorted(rows, key=lambda row: row["subject"]), indent=1) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def print_profile(name: str, found: Profile) -> None:
    print(f"{name}: {found.total * 1e3:.2f} ms a step in kernels")
    lines = [
        (kernel[:100], f"{seconds * 1e3:.3f}", f"{seconds / found.total:.1%}", str(count))
        for kernel, seconds, count in found.kernels
    ]
    results.print_table(("kernel", "ms", "share", "launches"), lines, left=1)
    print(found.amdahl())


def measure_model(
    name: str,
    mode: str,
    batch: int,
    size: int | None,
    wanted: Sequence[str] | None,
    device: timing.Device,
    machine: Machine,
    steps: Steps,
    deadline: timing.Deadline,
    profiles: dict[str, Profile] | None = None,
    loader: str | None = None,
) -> list[Row]:
    """Rows of one model, mode and batch; a provider that cannot run has a row that says why.

    Args:
        wanted: names of providers, or None for all that apply.
        profiles: gets the kernel times of the eager and the automatic provider, or None for no profiling.
        loader: data set that training steps load their images from, see :func:`loaded_batches`.
    """
    where = "cpu" if device.is_cpu else "cuda"
    rows: list[Row] = []
    with device.active():
        source = create(name).to(where)
        shape = input_size(source, size)
        attention, used = what_is_called(source, shape)
        generator = torch.Generator().manual_seed(17)
        images = torch.randn(batch, *shape, generator=generator).to(where)
        labels = torch.randint(CLASSES, (batch,), generator=generator).to(where)
    template = Row(
        **{
            **machine.columns,
            "op": "",
            "model": name,
            "case": case_name(batch, shape, loader),
            "mode": mode,
            "provider": "",
            "dtype": str(DTYPE).removeprefix("torch."),
            "note": machine.note,
            "copy_gb_s": machine.copy_gb_s,
            "gemm_tflops": machine.gemm_tflops,
            "l2": "warm",
        }
    )
    graph = mode == "infer" and batch == 1 and not device.is_cpu
    providers = select(wanted, attention=attention)
    runners: list[Runner] = []
    for provider in providers:
        reason = provider.unavailable(device.is_cpu)
        if not reason and not provider.alternative and not used:
            reason = "the model calls no operator of this package"
        if not reason and not deadline.fits(f"{name} {mode} {template.case} {provider.name}"):
            continue
        if not reason:
            try:
                with device.active():
                    error = logits_error(provider, source, images[:2], device)
                    failure = wrong_logits(*error)
                    if failure:
                        rows.append(_without(template, provider, f"failed: {failure}"))
                        continue
                    batches = loader and loaded_batches(loader, source, shape, batch, device)
                    runner = make_runner(
                        provider, source, mode, images, labels, device, graph, batches or None
                    )
                    with provider.active():
                        runner.step()
                runners.append(runner)
            # Out of memory, a compiler or a driver: none of them ends the run of the others.
            except Exception as error:
                reason = reason_of(error)
        if reason:
            rows.append(_without(template, provider, f"not measured: {reason}"))
    if not runners:
        return rows
    timings = interleaved_steps(runners, device, steps, deadline)
    floor = timing.noise_floor(timings)
    timings = timing.without_again(timings)
    medians = {entry: timed.p50 for entry, timed in timings.items()}
    faster, best = ratios(medians, [runner.provider for runner in runners])
    clock, power = timing.clocks_and_power(device)
    for runner in runners:
        provider, timed = runner.provider, timings[runner.provider.name]
        words = [template.note, f"best alternative {best}" if provider.name in faster else ""]
        rows.append(
            replace(
                template,
                provider=provider.name,
                p20_us=timed.p20 * 1e6,
                p50_us=timed.p50 * 1e6,
                p80_us=timed.p80 * 1e6,
                ratio_to_best_alternative=faster.get(provider.name),
                peak_bytes=runner.peak_bytes,
                graph=runner.graph,
                note="; ".join(filter(None, words)),
                noise_floor=floor,
                sm_clock_mhz=clock,
                power_w=power,
                date=results.now(),
            )
        )
    if profiles is not None:
        for runner in runners:
            chosen = runner.provider.name in ("eager_channels_last", "auto") and not runner.graph
            if chosen and deadline.fits(f"{name} {mode} {template.case} {runner.provider.name} kernel times"):
                profiles[f"{name} {mode} {template.case} {runner.provider.name}"] = profile(runner, device)
    return rows


def case_name(batch: int, shape: Sequence[int], loader: str | None = None) -> str:
    """``b128_224`` or ``b8_800x1333``, and ``b128_224_digits`` where images are loaded."""
    height, width = shape[1:]
    size = str(height) if height == width else f"{height}x{width}"
    return "_".join([f"b{batch}", size, *([Path(loader).name] if loader else [])])


def _without(template: Row, provider: Provider, note: str) -> Row:
    return replace(template, provider=provider.name, note=note, date=results.now())


def print_rows(rows: Sequence[Row]) -> None:
    """The table: images/s, time of a step, memory, and each reason for not measuring."""
    columns = (
        "model",
        "mode",
        "case",
        "provider",
        "images/s",
        "p20 ms",
        "p50 ms",
        "p80 ms",
        "ratio",
        "peak GB",
    )
    lines = []
    for row in rows:
        if row.measured:
            batch = int(row.case[1:].partition("_")[0])
            lines.append(
                (
                    row.model,
                    row.mode,
                    row.case + (" graph" if row.graph else ""),
                    row.provider,
                    f"{batch / row.p50_us * 1e6:.1f}",
                    *(results.figure(value, ".2f", 1e3) for value in (row.p20_us, row.p50_us, row.p80_us)),
                    results.figure(row.ratio_to_best_alternative, ".2f"),
                    results.figure(row.peak_bytes, ".2f", 1e9),
                )
            )
    if lines:
        results.print_table(columns, lines, left=4)
    for row in rows:
        if not row.measured:
            print(f"{row.model} {row.mode} {row.case} {row.provider}: {row.note}")


def _at_least(parser: argparse.ArgumentParser, name: str, values: Sequence[int | None], least: int) -> None:
    for value in values:
        if value is not None and value < least:
            parser.error(f"--{name}={value} is not allowed; it must be at least {least}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fused-ops bench models", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model",
        nargs="+",
        help=f"names of the zoo, or timm/<name> (default: {', '.join(GPU_MODELS)}; on a CPU "
        f"{', '.join(CPU_MODELS)})",
    )
    parser.add_argument("--mode", nargs="+", default=list(MODES), help=f"of {', '.join(MODES)}")
    parser.add_argument("--batch", type=int, nargs="+", help="images per step")
    parser.add_argument("--size", type=int, help="height and width (default: the model's own)")
    parser.add_argument(
        "--loader",
        metavar="DATA",
        help="load, augment and mix the images of this data set, `digits` or a folder with train/ and val/; "
        "training only (default: random images that lie on the device)",
    )
    parser.add_argument("--no-profile", action="store_true", help="no kernel-time table")
    add_common_arguments(parser)
    options = parser.parse_args(arguments)
    check_choices(parser, "mode", options.mode, MODES)
    check_choices(parser, "provider", options.provider, NAMES)
    _at_least(parser, "batch", options.batch or (), 1)
    _at_least(parser, "size", [options.size], 1)
    if options.loader and "train" not in options.mode:
        parser.error(f"--loader={options.loader} needs --mode train")
    device = timing.default_device()
    seconds = budget_seconds(parser, options, device.is_cpu)
    try:
        names = options.model or (CPU_MODELS if device.is_cpu else GPU_MODELS)
        for name in names:
            check_named(name)
        path = results.results_path(device.name, "models", options.results)
        store = Store(path)
    except ImportError as error:
        parser.error(f"models need {error.name}: install it with pip install 'fused-ops[models]'")
    except ValueError as error:
        parser.error(f"--model={name!r}: {error}" if name in names else str(error))
    if not device.is_cpu:
        torch.backends.cudnn.benchmark = True
    deadline = timing.Deadline(seconds, device.now)
    machine = measure_machine(device, results.machine_columns(device.name, options.commit), store.rows)
    commit = machine.columns["commit"]
    steps = CPU_STEPS if device.is_cpu else GPU_STEPS
    # For scripts too, where they are kept beside the results.
    wanted = not options.no_profile and (path is not None or not options.json)
    profiles: dict[str, Profile] | None = {} if wanted else None
    rows: list[Row] = []
    skipped: list[str] = []
    # By mode: a training step takes many times as long as inference.
    last: dict[str, float] = {}
    shapes: dict[str, tuple[int, int, int]] = {}
    modes = ["train"] if options.loader else [mode for mode in MODES if mode in options.mode]
    for name, mode in ((name, mode) for name in names for mode in modes):
        if name not in shapes:
            shapes[name] = input_size(create(name), options.size)
        for batch in options.batch or (CPU_BATCHES if device.is_cpu else BATCHES)[mode]:
            case = case_name(batch, shapes[name], options.loader)
            columns = {"gpu": device.name, "model": name, "case": case, "mode": mode}
            there = store.find(commit, **columns)
            known = {row.provider for row in there}
            # Which SDPA backends apply is known only after a run of the model.
            able = select(options.provider, attention=options.provider is not None)
            if (
                not options.again
                and known
                and all(entry.name in known for entry in able if not entry.unavailable(device.is_cpu))
            ):
                skipped.append(f"{name} {mode} {case}")
                rows += there
                continue
            if not deadline.fits(f"{name} {mode} {case}", last.get(mode, 0.0) / 2):
                continue
            start = device.now()
            found = measure_model(
                name,
                mode,
                batch,
                options.size,
                options.provider,
                device,
                machine,
                steps,
                deadline,
                profiles,
                options.loader,
            )
            store.add(found)
            if path is not None and profiles:
                write_profiles(path.with_name("profiles.json"), device.name, commit, profiles)
            rows += found
            release()
            last[mode] = device.now() - start
    if options.json:
        print(results.to_json(rows))
    else:
        print(machine_line(machine))
        print_rows(rows)
        for title, found in (profiles or {}).items():
            print_profile(title, found)
        if path is not None:
            print(f"written to {path}")
    report_left_out("models", deadline, skipped)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
