"""How the bench times: warm-up by time, rotating sets, interleaved rounds, quantiles, deadlines.

The logic knows nothing of CUDA: it speaks to a :class:`Device`, which has the only clock. Times are seconds.

A timing is cold or warm in the L2 cache. Cold: calls go through enough sets of inputs and outputs that a set
has left the cache before its turn comes again. Warm: one set is used again and again, as where a network's
previous layer has just written the input.
"""

from __future__ import annotations

import contextlib
import math
import re
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from fused_ops.core import environment

Work = Callable[[], Any]


class Device(Protocol):
    """What is timed on, and the clock."""

    name: str
    is_cpu: bool
    l2_bytes: int

    def now(self) -> float:
        """Host clock."""

    def synchronize(self) -> None:
        """Wait for all work."""

    def elapsed(self, work: Work) -> float:
        """Seconds that one run of ``work`` takes on the device."""

    def graph(self, calls: Sequence[Work], keep: int) -> Work:
        """One callable for ``calls``, without the host; ``keep`` results in a row lie apart in memory."""

    def active(self) -> contextlib.AbstractContextManager[Any]:
        """Everything that is prepared for timing runs inside this context."""


class CpuDevice:
    """The CPU: the host clock times, there are no graphs, and caches are left as they are (warm)."""

    name = "cpu"
    is_cpu = True
    l2_bytes = 0

    def now(self) -> float:
        return time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed(self, work: Work) -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    def graph(self, calls: Sequence[Work], keep: int) -> Work:
        raise RuntimeError("CUDA graphs need a GPU")

    def active(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()


class CudaDevice:
    """A GPU: CUDA events time, on a stream of its own, since graphs cannot be captured on the default one."""

    is_cpu = False

    def __init__(self, index: int = 0) -> None:
        properties = torch.cuda.get_device_properties(index)
        self.name = properties.name
        self.l2_bytes = properties.L2_cache_size
        self.uuid = str(getattr(properties, "uuid", ""))
        self.index = index
        self.stream = torch.cuda.Stream(index)

    def now(self) -> float:
        return time.perf_counter()

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.index)

    def elapsed(self, work: Work) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(self.stream):
            start.record()
            work()
            end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def graph(self, calls: Sequence[Work], keep: int) -> Work:
        captured = torch.cuda.CUDAGraph()
        # A result that is freed during the capture gives its memory to the next call, which would then write
        # to a place that is still in the cache.
        held: deque[Any] = deque(maxlen=keep)
        with torch.cuda.graph(captured, stream=self.stream):
            for call in calls:
                held.append(call())
        held.clear()
        return captured.replay

    def active(self) -> contextlib.AbstractContextManager[Any]:
        return torch.cuda.stream(self.stream)


def default_device() -> Device:
    """The first GPU, or the CPU where there is none."""
    return CudaDevice(torch.cuda.current_device()) if torch.cuda.is_available() else CpuDevice()


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        warmup_seconds: each contestant runs at least this long before anything is timed.
        rounds: timed rounds; in each, every contestant runs once.
        least_calls, most_calls: bounds of the calls in one run.
        least_sets: bound of the rotating sets of inputs and outputs.
    """

    warmup_seconds: float = 0.2
    rounds: int = 15
    least_calls: int = 10
    most_calls: int = 512
    least_sets: int = 2


GPU_PLAN = Plan()
CPU_PLAN = Plan(warmup_seconds=0.01, rounds=5, least_calls=1, most_calls=1, least_sets=1)


def quantile(values: Sequence[float], share: float) -> float:
    """The ``share`` quantile: linear between the order statistics around place ``share * (n - 1)`` from 0.

    Numpy's and pandas' default definition (type 7 of Hyndman and Fan).
    """
    if not values:
        raise ValueError("values is empty; a quantile needs at least one")
    if not 0 <= share <= 1:
        raise ValueError(f"share={share!r} is not allowed; it must be from 0 to 1")
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


@dataclass(frozen=True)
class Timing:
    """Seconds per call, one sample per round."""

    samples: tuple[float, ...]

    @property
    def p20(self) -> float:
        return quantile(self.samples, 0.2)

    @property
    def p50(self) -> float:
        return quantile(self.samples, 0.5)

    @property
    def p80(self) -> float:
        return quantile(self.samples, 0.8)


@dataclass(frozen=True)
class Rotation:
    """How many sets of inputs and outputs rotate, and how many calls one run makes over them."""

    sets: int
    calls: int
    cold: bool


def rotation(set_bytes: int, l2_bytes: int, plan: Plan) -> Rotation:
    """Sets that total more than three times L2, and enough calls to use each at least once per run.

    Where the tensors are so small that ``plan.most_calls`` sets do not reach that, the rotation is not cold
    and says so, with one set.
    """
    if set_bytes < 1:
        raise ValueError(f"set_bytes={set_bytes} is not allowed; it must be at least 1")
    sets = max(plan.least_sets, 3 * l2_bytes // set_bytes + 1)
    if l2_bytes == 0 or sets > plan.most_calls:
        return Rotation(1, plan.least_calls, False)
    return Rotation(sets, max(plan.least_calls, sets), True)


class Deadline:
    """A budget in seconds. What did not fit is collected by name in ``left_out``."""

    def __init__(self, seconds: float | None, now: Callable[[], float]) -> None:
        if seconds is not None and seconds <= 0:
            raise ValueError(f"seconds={seconds:g} is not allowed; it must be more than 0")
        self._now = now
        self._end = math.inf if seconds is None else now() + seconds
        self.left_out: list[str] = []

    def left(self) -> float:
        """Seconds until the budget is spent; infinite without one."""
        return self._end - self._now()

    def fits(self, name: str, estimate: float = 0.0) -> bool:
        """Whether work that takes ``estimate`` seconds fits; if not, ``name`` is noted as left out."""
        if self.left() > estimate:
            return True
        self.left_out.append(name)
        return False


@dataclass
class Contestant:
    """One of the things timed side by side.

    Attributes:
        name: unique among those timed together.
        calls: one callable per rotating set.
        active: context that its calls need, entered once per run and not once per call.
    """

    name: str
    calls: Sequence[Work]
    active: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    _run: Work | None = field(default=None, repr=False)


def warm_up(device: Device, work: Work, seconds: float) -> int:
    """Run ``work`` until ``seconds`` have passed, at least once; how often it ran."""
    start, count = device.now(), 0
    while True:
        work()
        device.synchronize()
        count += 1
        if device.now() - start >= seconds:
            return count


def one_run(contestant: Contestant, turn: Rotation) -> Work:
    """A callable that goes through the rotation once and keeps as many results alive as there are sets."""
    calls = [contestant.calls[index % turn.sets] for index in range(turn.calls)]

    def run() -> None:
        held: deque[Any] = deque(maxlen=turn.sets)
        with contestant.active():
            for call in calls:
                held.append(call())

    return run


def prepare(
    device: Device, contestants: Sequence[Contestant], turn: Rotation, plan: Plan, *, graph: bool
) -> dict[str, str]:
    """Warm every contestant up and, with ``graph``, capture it.

    Returns:
        Why, for each contestant that could not be captured; such a one is not ready to be timed.
    """
    failed = {}
    for contestant in contestants:
        run = one_run(contestant, turn)
        with device.active():
            warm_up(device, run, plan.warmup_seconds)
            contestant._run = run
            if graph:
                calls = [contestant.calls[index % turn.sets] for index in range(turn.calls)]
                try:
                    with contestant.active():
                        contestant._run = device.graph(calls, turn.sets)
                except RuntimeError as error:
                    failed[contestant.name] = str(error).splitlines()[0]
                    contestant._run = None
                    device.synchronize()
    return failed


def interleave(
    device: Device,
    contestants: Sequence[Contestant],
    turn: Rotation,
    plan: Plan,
    deadline: Deadline | None = None,
) -> dict[str, Timing]:
    """Time prepared contestants in rounds A, B, A, B, ...: what drifts then drifts for all alike.

    The first round is not counted. Rounds stop early when the deadline passes, with at least one counted.
    """
    samples: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
    if len(samples) != len(contestants):
        raise ValueError("two contestants have the same name")
    with device.active():
        for number in range(plan.rounds + 1):
            for contestant in contestants:
                seconds = device.elapsed(contestant._run) / turn.calls
                if number > 0:
                    samples[contestant.name].append(seconds)
            if number > 0 and deadline is not None and deadline.left() <= 0:
                break
    return {name: Timing(tuple(values)) for name, values in samples.items()}


AGAIN = " (again)"


def with_again(contestants: Sequence[Contestant], name: str | None = None) -> list[Contestant]:
    """The contestants and, last, the one called ``name`` (or the first) once more, for the noise floor."""
    twin = next((entry for entry in contestants if entry.name == name), contestants[0])
    return [*contestants, Contestant(twin.name + AGAIN, twin.calls, twin.active)]


def noise_floor(timings: dict[str, Timing]) -> float | None:
    """Relative difference of the medians of the contestant that ran twice; None if none did.

    A difference between two providers that is smaller than this is noise.
    """
    for name, timing in timings.items():
        if name.endswith(AGAIN):
            first, second = timings[name.removesuffix(AGAIN)].p50, timing.p50
            return abs(first - second) / min(first, second)
    return None


def without_again(timings: dict[str, Timing]) -> dict[str, Timing]:
    return {name: timing for name, timing in timings.items() if not name.endswith(AGAIN)}


# Bytes read and written per second by a large device-to-device copy, for GPUs measured so far (GB/s).
# Figures in the results of the same GPU go before these.
USUAL_COPY_GB_S = {"H100": 2900.0}
LEAST_SHARE_OF_USUAL = 0.97


def copy_gb_s(device: Device, bytes_: int = 1 << 30, repeats: int = 10) -> float:
    """Copy bandwidth in GB/s (1e9), bytes read plus bytes written, on values that are not zero."""
    where = "cpu" if device.is_cpu else "cuda"
    with device.active():
        source = torch.randn(bytes_ // 4, device=where)
        target = torch.empty_like(source)
        warm_up(device, lambda: target.copy_(source), 0.0 if device.is_cpu else 0.2)
        seconds = statistics.median(device.elapsed(lambda: target.copy_(source)) for _ in range(repeats))
    return 2 * source.numel() * 4 / seconds / 1e9


def gemm_tflops(device: Device, size: int = 8192, repeats: int = 10) -> float:
    """Peak of a square bfloat16 matrix product through PyTorch, in 1e12 operations a second."""
    where = "cpu" if device.is_cpu else "cuda"
    with device.active():
        left, right = (torch.randn(size, size, device=where, dtype=torch.bfloat16) for _ in range(2))
        out = torch.empty_like(left)

        def product() -> None:
            torch.mm(left, right, out=out)

        warm_up(device, product, 0.0 if device.is_cpu else 0.2)
        seconds = statistics.median(device.elapsed(product) for _ in range(repeats))
    return 2 * size**3 / seconds / 1e12


def bandwidth_note(measured: float | None, usual: float | None) -> str:
    """What to say of a run whose copy bandwidth (GB/s) is below its usual; empty if it is not."""
    if measured is None or usual is None or measured >= LEAST_SHARE_OF_USUAL * usual:
        return ""
    return f"slow run: copy bandwidth {measured:.0f} GB/s is {measured / usual:.0%} of the usual {usual:.0f}"


def usual_copy_gb_s(gpu: str, measured_before: Sequence[float]) -> float | None:
    """The median of earlier measurements of the same GPU, else the known constant, else None (GB/s)."""
    if measured_before:
        return statistics.median(measured_before)
    words = re.split(r"[^A-Za-z0-9]+", gpu)
    return next((value for name, value in USUAL_COPY_GB_S.items() if name in words), None)


def clocks_and_power(device: Device) -> tuple[float | None, float | None]:
    """SM clock (MHz) and power draw (W) as ``nvidia-smi`` reports them now; None where it does not.

    They are logged and never set: a locked clock is not what a user runs at.
    """
    if device.is_cpu:
        return None, None
    uuid = getattr(device, "uuid", "")
    which = (uuid if uuid.startswith("GPU-") else f"GPU-{uuid}") if uuid else str(getattr(device, "index", 0))
    command = ["nvidia-smi", f"--id={which}", "--query-gpu=clocks.sm,power.draw"]
    text = environment.command_output([*command, "--format=csv,noheader,nounits"])
    return (None, None) if text is None else parse_clocks(text)


def parse_clocks(text: str) -> tuple[float | None, float | None]:
    """The two numbers of ``nvidia-smi``'s answer; None for each that it does not know (``[N/A]``)."""
    values: list[float | None] = []
    for word in (text.strip().splitlines() or [""])[0].split(","):
        try:
            values.append(float(word))
        except ValueError:
            values.append(None)
    values += [None, None]
    return values[0], values[1]


@contextlib.contextmanager
def peak_memory(device: Device) -> Iterator[Mapping[str, int | None]]:
    """Greatest device memory allocated inside the block above what was before, as ``["bytes"]`` after it.

    None on a CPU, where PyTorch does not count.
    """
    found: dict[str, int | None] = {"bytes": None}
    if device.is_cpu:
        yield found
        return
    device.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    yield found
    device.synchronize()
    found["bytes"] = torch.cuda.max_memory_allocated() - before
