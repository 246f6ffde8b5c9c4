"""``fused-ops bench ops``: every operator against every alternative, checked, timed and weighed.

Times are of the calls alone, in microseconds. On a GPU each case is timed three ways: in a CUDA graph over
sets that are cold in L2; the same without a graph, which includes the host where that is slower; and, for
small tensors, in a graph with one set, warm in L2. On a CPU the shapes are cut to a small batch and the rows
say ``cpu``.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import fused_ops
from fused_ops.bench import results, timing
from fused_ops.bench.correctness import (
    copy_arguments,
    cotangents,
    data_bytes,
    gradients_of,
    is_parameter,
    leaves,
    named_tensors,
    outcome,
    three_way,
)
from fused_ops.bench.providers import NAMES, Provider, reason_of, select
from fused_ops.bench.results import Row, Store
from fused_ops.bench.traffic import calls_of
from fused_ops.core import library
from fused_ops.core.backends import BackendUnavailableError
from fused_ops.core.cases import Case

# In the order of measuring: a budget cuts off the end.
MODES = ("both", "eval", "backward", "forward")
DTYPES = ("bfloat16", "float16", "float32")
CPU_BATCH = 2
CPU_SECONDS = 120.0


@dataclass(frozen=True)
class Machine:
    """What every row of a run shares.

    Attributes:
        columns: GPU, commit and versions.
        copy_gb_s, gemm_tflops: measured in this run; None on a CPU.
        note: that the run is slow, or empty.
    """

    columns: dict[str, str]
    copy_gb_s: float | None = None
    gemm_tflops: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Pass:
    """What one pass, forward or backward, has to do: least bytes, operations, the checked calls behind it."""

    direction: str
    bytes: int
    flops: int
    calls: tuple[Any, ...]


def least_work(operator: library.Operator, arguments: dict[str, Any], mode: str) -> list[Pass]:
    """The passes of one call in ``mode``, by the operator's formulas."""
    calls: list[Any] = []
    mine = copy_arguments(arguments)
    counter = FlopCounterMode(display=False)
    grad = torch.enable_grad() if mode != "eval" else torch.no_grad()
    with fused_ops.backend("reference"), calls_of(operator, calls), counter, grad:
        operator.function(**mine)
    flops = counter.get_total_flops()
    passes = {
        # Gradients of the data and of the parameters each cost what the forward pass costs. PyTorch's own
        # count of a backward pass is too high for grouped convolutions: it takes each filter for a full one.
        direction: Pass(
            direction,
            sum(operator.least_bytes(call, direction) for call in calls),
            flops if direction == "forward" else 2 * flops,
            tuple(calls),
        )
        for direction in ("forward", "backward")
    }
    if mode == "both" and leaves(mine):
        return [passes["forward"], passes["backward"]]
    return [passes["backward" if mode == "backward" else "forward"]]


def fraction_of_limit(
    machine: Machine, operator: str, work: Sequence[Pass], seconds: float, l2: str
) -> float | None:
    """Least possible time over ``seconds``; None on a CPU, for an unknown GPU, or warm in L2.

    The limit takes every byte from device memory, which does not bound a call whose data is in L2.
    """
    gpu = machine.columns["gpu"]
    if gpu == "cpu" or l2 != "cold":
        return None
    from fused_ops.bench import limits

    try:
        known = limits.find_gpu(gpu)
    except ValueError:
        return None
    bandwidth = None if machine.copy_gb_s is None else machine.copy_gb_s * 1e9
    peak = None if machine.gemm_tflops is None else machine.gemm_tflops * 1e12
    # One pass after the other, so their least times add up.
    least = 0.0
    for part in work:
        slots = sum(limits.issue_slots(operator, call, part.direction) for call in part.calls)
        least += limits.least_seconds(
            known,
            part.bytes,
            part.flops,
            library.operators()[operator].matrix_products,
            slots,
            copy_bandwidth=bandwidth,
            gemm_peak=peak,
        ).seconds
    return least / seconds


def saved_bytes(call: Callable[[], Any], arguments: dict[str, Any]) -> int:
    """Bytes that one forward call keeps for its backward: distinct storages that no parameter owns.

    The input counts where it is kept: the call is why it stays alive.
    """
    tensors = named_tensors(arguments)
    owned = {tensor.untyped_storage().data_ptr() for name, tensor in tensors.items() if is_parameter(name)}
    # The storages are held, for the address of a freed one would be given to the next.
    kept: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept.setdefault(storage.data_ptr(), storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return sum(storage.nbytes() for address, storage in kept.items() if address not in owned)


def make_call(
    mode: str, function: Callable[..., Any], arguments: dict[str, Any], grads: Sequence[Tensor]
) -> timing.Work:
    """What is timed for ``mode`` on one set of arguments; gradients are returned and not accumulated.

    Args:
        grads: gradients of the outputs, for ``backward`` and ``both``.
    """
    if mode in ("eval", "forward"):
        return lambda: function(**arguments)
    wanted = list(leaves(arguments).values())
    if mode == "both":
        return lambda: gradients_of(function(**arguments), wanted, grads)
    out = function(**arguments)
    return lambda: gradients_of(out, wanted, grads, retain_graph=True)


def make_set(
    provider: Provider,
    mode: str,
    function: Callable[..., Any],
    arguments: dict[str, Any],
    grads: Sequence[Tensor],
) -> timing.Work:
    """One call of ``provider`` on copies of the arguments and of the outputs' gradients, in its layout."""
    mine = copy_arguments(arguments, layout=provider.layout)
    incoming = [copy_arguments({"grad": grad}, layout=provider.layout)["grad"] for grad in grads]
    return make_call(mode, function, mine, incoming)


@dataclass
class Prepared:
    """A provider that runs a case and returned the right result."""

    provider: Provider
    function: Callable[..., Tensor]
    peak_bytes: int | None
    saved_bytes: int | None
    note: str = ""


def _active(provider: Provider, mode: str) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    @contextlib.contextmanager
    def enter() -> Iterator[None]:
        from torch._functorch import config

        # A compiled backward may otherwise reuse what it was given, and then cannot run twice.
        keep = (
            config.patch(donated_buffer=False)
            if provider.compile_mode is not None and mode == "backward"
            else contextlib.nullcontext()
        )
        with provider.active(), torch.set_grad_enabled(mode != "eval"), keep:
            yield

    return enter


def prepare_provider(
    provider: Provider,
    operator: library.Operator,
    arguments: dict[str, Any],
    mode: str,
    expected: tuple[dict[str, Tensor], dict[str, Tensor]],
    device: timing.Device,
) -> Prepared | str:
    """Build and check one provider, and weigh its memory; or the note that says why not.

    Args:
        expected: results of eager at the same precision, and in float64.
    """
    eager, exact = expected
    dtype = next(iter(eager.values())).dtype
    with device.active(), _active(provider, mode)():
        try:
            function = provider.build(operator.function)
            mine = copy_arguments(arguments, layout=provider.layout)
            # Eager is what the others are measured by.
            if not (provider.alternative and provider.compile_mode is None):
                result = outcome(function, mine, gradients=mode != "eval")
                wrong = three_way(result, eager, exact, dtype)
                if wrong:
                    return f"failed: {wrong}"
                del result
            saved = None
            if mode != "eval":
                saved = saved_bytes(lambda: function(**mine), mine)
            call = make_set(provider, mode, function, arguments, cotangents(eager))
            call()
            with timing.peak_memory(device) as memory:
                call()
        except BackendUnavailableError as error:
            return f"not measured: {reason_of(error)}"
        # A compiler or a driver may fail in any way, which must not end the run of the others.
        except Exception as error:
            return f"not measured: {reason_of(error)}"
    return Prepared(provider, function, memory["bytes"], saved)


@dataclass(frozen=True)
class Kind:
    """One way of timing a case."""

    l2: str
    graph: bool
    turn: timing.Rotation


def kinds(device: timing.Device, set_bytes: int, plan: timing.Plan) -> list[Kind]:
    """How a case whose set of inputs and outputs is ``set_bytes`` long is timed on ``device``."""
    turn = timing.rotation(set_bytes, device.l2_bytes, plan)
    warm = timing.Rotation(1, plan.least_calls, False)
    if device.is_cpu:
        return [Kind("warm", False, warm)]
    found = [Kind("cold", True, turn), Kind("cold", False, turn)] if turn.cold else []
    if set_bytes < device.l2_bytes // 2:
        found.append(Kind("warm", True, warm))
    return found if turn.cold else [*found, Kind("warm", False, warm)]


def ratios(medians: dict[str, float], providers: Sequence[Provider]) -> tuple[dict[str, float], str]:
    """Median of the best alternative over that of each of ours, and the name of the best alternative.

    Args:
        medians: of the providers that ran and were right; the others get no ratio and are no alternative.
    """
    alternatives = [entry.name for entry in providers if entry.alternative and entry.name in medians]
    if not alternatives:
        return {}, ""
    best = min(alternatives, key=medians.__getitem__)
    ours = [entry.name for entry in providers if not entry.alternative and entry.name in medians]
    return {name: medians[best] / medians[name] for name in ours}, best


def make_arguments(
    case: Case, dtype: torch.dtype, device: timing.Device, batch: int | None
) -> dict[str, Any]:
    """The case's arguments on ``device``, with the first ``batch`` images if that is not None."""
    where = torch.device("cpu" if device.is_cpu else "cuda")
    # On the stream of the timing: another one would not wait for what is made here.
    with device.active():
        made = case.make(torch.Generator().manual_seed(17), dtype, where, case.layout)
        return made if batch is None else copy_arguments(made, batch=batch)


def case_name(case: Case, batch: int | None) -> str:
    """Name of the case in the results; a batch that is not the case's own is part of it."""
    return case.name if batch is None else f"{case.name}@b{batch}"


def measure_case(
    operator: library.Operator,
    case: Case,
    mode: str,
    dtype: torch.dtype,
    providers: Sequence[Provider],
    device: timing.Device,
    machine: Machine,
    plan: timing.Plan,
    deadline: timing.Deadline,
    batch: int | None = None,
    made: dict[str, Any] | None = None,
) -> list[Row]:
    """Rows of one case in one mode: checked, then timed side by side.

    ``made`` are the case's arguments, where the caller has made them already.

    A provider that cannot run, or that the deadline leaves no time to prepare, has a row that says so and no
    figures; so has one whose check fails.
    """
    name = f"{operator.name} {case_name(case, batch)} {mode}"
    made = make_arguments(case, dtype, device, batch) if made is None else made
    gradients = mode != "eval"
    with device.active(), fused_ops.backend("reference"):
        arguments = copy_arguments(made, evaluation=mode == "eval")
        exact = outcome(operator.function, copy_arguments(arguments, dtype=torch.float64), gradients)
        eager = outcome(operator.function, copy_arguments(arguments), gradients)
        work = least_work(operator, arguments, mode)
        grads = cotangents(eager)
    template = Row(
        **{
            **machine.columns,
            "op": operator.name,
            "model": case.model,
            "case": case_name(case, batch),
            "mode": mode,
            "provider": "",
            "dtype": str(dtype).removeprefix("torch."),
            "note": machine.note,
            "copy_gb_s": machine.copy_gb_s,
            "gemm_tflops": machine.gemm_tflops,
        }
    )
    rows: list[Row] = []
    prepared: list[Prepared] = []

    def note(provider: Provider, text: str) -> None:
        rows.append(replace(template, provider=provider.name, note=text, date=results.now()))

    implemented = [backend.name for backend in operator.backends]
    for provider in providers:
        reason = provider.unavailable(device.is_cpu, implemented)
        if case.layout == "nchw":
            # Everybody is given the map that the model has.
            if provider.name == "eager_channels_last":
                reason = "the case's maps are NCHW"
            provider = replace(provider, layout="nchw")
        if reason:
            note(provider, f"not measured: {reason}")
        elif deadline.fits(f"{name} {provider.name}"):
            found = prepare_provider(provider, operator, arguments, mode, (eager, exact), device)
            if isinstance(found, str):
                note(provider, found)
            else:
                prepared.append(found)
    set_bytes = data_bytes(arguments) + sum(grad.nbytes for grad in grads)
    del exact, eager
    clocks = None
    for number, kind in enumerate(kinds(device, set_bytes, plan)):
        if not prepared or not deadline.fits(f"{name} {kind.l2} graph={kind.graph}"):
            continue
        # Every contestant is warm after the first kind.
        effort = plan if number == 0 else replace(plan, warmup_seconds=min(plan.warmup_seconds, 0.05))
        measured = _time(prepared, arguments, grads, mode, kind, device, effort, deadline)
        # Asking takes up to half a second, and the load is the same for every kind.
        clocks = clocks or timing.clocks_and_power(device)
        rows += _rows(template, measured, kind, prepared, machine, work, clocks)
    return rows


def _time(
    prepared: Sequence[Prepared],
    arguments: dict[str, Any],
    grads: Sequence[Tensor],
    mode: str,
    kind: Kind,
    device: timing.Device,
    plan: timing.Plan,
    deadline: timing.Deadline,
) -> tuple[dict[str, timing.Timing], dict[str, str]]:
    """Timings by provider, with the one that runs twice, and why the others have none."""
    contestants, failed = [], {}
    for entry in prepared:
        active = _active(entry.provider, mode)
        try:
            with device.active(), active():
                calls = [
                    make_set(entry.provider, mode, entry.function, arguments, grads)
                    for _ in range(kind.turn.sets)
                ]
            contestant = timing.Contestant(entry.provider.name, calls, active)
            failed |= timing.prepare(device, [contestant], kind.turn, plan, graph=kind.graph)
        except torch.OutOfMemoryError as error:
            failed[entry.provider.name] = reason_of(error)
        if entry.provider.name not in failed:
            contestants.append(contestant)
    if not contestants:
        return {}, failed
    ours = [entry.provider.name for entry in prepared if not entry.provider.alternative]
    twin = next((entry.name for entry in reversed(contestants) if entry.name in ours), None)
    contestants = timing.with_again(contestants, twin)
    if timing.prepare(device, contestants[-1:], kind.turn, plan, graph=kind.graph):
        contestants.pop()
    return timing.interleave(device, contestants, kind.turn, plan, deadline), failed


def _rows(
    template: Row,
    measured: tuple[dict[str, timing.Timing], dict[str, str]],
    kind: Kind,
    prepared: Sequence[Prepared],
    machine: Machine,
    work: Sequence[Pass],
    clocks: tuple[float | None, float | None],
) -> list[Row]:
    timings, failed = measured
    floor = timing.noise_floor(timings)
    timings = timing.without_again(timings)
    faster, best = ratios(
        {name: entry.p50 for name, entry in timings.items()}, [entry.provider for entry in prepared]
    )
    clock, power = clocks
    rows = []
    for entry in prepared:
        name = entry.provider.name
        base = replace(template, provider=name, l2=kind.l2, graph=kind.graph, date=results.now())
        if name in failed:
            rows.append(replace(base, note=f"not measured: {failed[name]}"))
            continue
        timed = timings[name]
        notes = [template.note, entry.note, f"best alternative {best}" if name in faster else ""]
        rows.append(
            replace(
                base,
                p20_us=timed.p20 * 1e6,
                p50_us=timed.p50 * 1e6,
                p80_us=timed.p80 * 1e6,
                ratio_to_best_alternative=faster.get(name),
                fraction_of_limit=fraction_of_limit(machine, base.op, work, timed.p50, kind.l2),
                peak_bytes=entry.peak_bytes,
                saved_bytes=entry.saved_bytes,
                note="; ".join(filter(None, notes)),
                noise_floor=floor,
                sm_clock_mhz=clock,
                power_w=power,
            )
        )
    return rows


def measure_machine(device: timing.Device, columns: dict[str, str], earlier: Sequence[Row]) -> Machine:
    """Copy bandwidth and matrix peak of this run; nothing on a CPU."""
    if device.is_cpu:
        return Machine(columns, note="cpu")
    copy, gemm = timing.copy_gb_s(device), timing.gemm_tflops(device)
    # One figure per run that was not slow itself, whatever number of rows it has.
    before = list(
        {
            row.copy_gb_s
            for row in earlier
            if row.gpu == device.name and row.copy_gb_s and "slow run" not in row.note
        }
    )
    usual = timing.usual_copy_gb_s(device.name, before)
    return Machine(columns, copy, gemm, timing.bandwidth_note(copy, usual))


def release() -> None:
    """Give back what a case held: compiled code, graphs and their memory."""
    # Otherwise the limit of compiled versions per function is reached, and later cases run uncompiled.
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that operators and models share."""
    parser.add_argument("--provider", nargs="+", metavar="NAME", help=f"of {', '.join(NAMES)} (default: all)")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--seconds", type=float, help="budget; what does not fit is left out and named")
    budget.add_argument("--gpu-minutes", type=float, help="the same in minutes")
    parser.add_argument(
        "--results", metavar="DIR", help="folder of results (default: the checkout's; none on a CPU)"
    )
    parser.add_argument("--again", action="store_true", help="measure what this commit has rows of already")
    parser.add_argument("--commit", help="name of the commit measured, where there is no git history")
    parser.add_argument("--json", action="store_true", help="print one JSON list")


def budget_seconds(
    parser: argparse.ArgumentParser, options: argparse.Namespace, on_cpu: bool
) -> float | None:
    """The budget of the options; on a CPU there always is one."""
    for name in ("seconds", "gpu_minutes"):
        value = getattr(options, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            parser.error(f"--{name.replace('_', '-')}={value:g} is not allowed; it must be more than 0")
    if options.gpu_minutes is not None:
        return 60 * options.gpu_minutes
    if options.seconds is None and on_cpu:
        return CPU_SECONDS
    return options.seconds


def check_choices(
    parser: argparse.ArgumentParser, name: str, given: Sequence[str] | None, known: Any
) -> None:
    """End with a message that names the option, the value and what is allowed."""
    for value in given or ():
        if value not in known:
            parser.error(f"--{name}={value!r} is unknown; use one of {', '.join(known)}")


def selected_cases(
    operators: Sequence[library.Operator], patterns: Sequence[str] | None
) -> list[tuple[library.Operator, Case]]:
    """Cases of real models, or those that are named, whatever their tags."""
    found = [(operator, case) for operator in operators for case in operator.cases()]
    if patterns is None:
        return [(operator, case) for operator, case in found if "model" in case.tags]
    names = {case.name for _, case in found}
    for pattern in patterns:
        if pattern not in names:
            real = sorted(case.name for _, case in found if "model" in case.tags)
            raise ValueError(f"--case={pattern!r} is unknown; of real models there are {', '.join(real)}")
    return [(operator, case) for operator, case in found if case.name in patterns]


def already_measured(
    store: Store, commit: str, columns: dict[str, str], providers: Sequence[Provider], on_cpu: bool
) -> bool:
    """Whether ``commit`` has a row of every provider that can run here.

    Providers are compared with each other, so one that is missing has all of them measured again.
    """
    there = {row.provider for row in store.find(commit, **columns)}
    return all(entry.name in there for entry in providers if not entry.unavailable(on_cpu))


def report_left_out(command: str, deadline: timing.Deadline, skipped: Sequence[str]) -> None:
    """Say on stderr what was not measured in this run."""
    if skipped:
        what = f"{len(skipped)} skipped, measured at this commit already (--again measures them again)"
        print(f"fused-ops bench {command}: {what}: {', '.join(skipped)}", file=sys.stderr)
    if deadline.left_out:
        what = f"{len(deadline.left_out)} left out, the budget is spent"
        print(f"fused-ops bench {command}: {what}: {', '.join(deadline.left_out)}", file=sys.stderr)


def machine_line(machine: Machine) -> str:
    """One line that says what was measured on."""
    columns = machine.columns
    words = [columns["gpu"]]
    words += [f"{name} {columns[name]}" for name in ("driver", "torch", "cuda", "cudnn", "triton")]
    words += [f"commit {columns['commit'][:12]}"]
    if machine.copy_gb_s is not None:
        words.append(f"copy {machine.copy_gb_s:.0f} GB/s, bfloat16 product {machine.gemm_tflops:.0f} TFLOP/s")
    line = ", ".join(word for word in words if not word.endswith(" "))
    return f"{line}\n{machine.note}" if machine.note not in ("", "cpu") else line


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fused-ops bench ops", description=__doc__.splitlines()[0])
    parser.add_argument("--op", nargs="+", help="operator families (default: all)")
    parser.add_argument("--case", nargs="+", help="cases by name (default: those of real models)")
    parser.add_argument("--mode", nargs="+", help=f"of {', '.join(MODES)} (default: all)")
    parser.add_argument("--dtype", default="bfloat16", help=f"of {', '.join(DTYPES)} (default bfloat16)")
    parser.add_argument(
        "--batch", type=int, help=f"images per call (default: the case's; {CPU_BATCH} on a CPU)"
    )
    add_common_arguments(parser)
    options = parser.parse_args(arguments)
    known = library.operators()
    check_choices(parser, "op", options.op, known)
    check_choices(parser, "mode", options.mode, MODES)
    check_choices(parser, "dtype", [options.dtype], DTYPES)
    check_choices(parser, "provider", options.provider, NAMES)
    if options.batch is not None and options.batch < 1:
        parser.error(f"--batch={options.batch} is not allowed; it must be at least 1")
    device = timing.default_device()
    seconds = budget_seconds(parser, options, device.is_cpu)
    try:
        cases = selected_cases([known[name] for name in options.op or known], options.case)
        path = results.results_path(device.name, "ops", options.results)
        store = Store(path)
    except ValueError as error:
        parser.error(str(error))
    if not device.is_cpu:
        torch.backends.cudnn.benchmark = True
    deadline = timing.Deadline(seconds, device.now)
    machine = measure_machine(device, results.machine_columns(device.name, options.commit), store.rows)
    batch = options.batch if options.batch or not device.is_cpu else CPU_BATCH
    plan = timing.CPU_PLAN if device.is_cpu else timing.GPU_PLAN
    dtype = getattr(torch, options.dtype)
    commit = machine.columns["commit"]
    rows: list[Row] = []
    skipped: list[str] = []
    arguments_of: dict[str, dict[str, Any]] = {}
    last = 0.0
    for mode in MODES:
        if options.mode and mode not in options.mode:
            continue
        for operator, case in cases:
            providers = select(options.provider, attention="attention" in operator.name)
            name = f"{operator.name} {case_name(case, batch)} {mode}"
            columns = {"gpu": device.name, "op": operator.name, "case": case_name(case, batch), "mode": mode}
            columns["dtype"] = options.dtype
            if not options.again and already_measured(store, commit, columns, providers, device.is_cpu):
                skipped.append(name)
                rows += store.find(commit, **columns)
                continue
            # Cases of one operator take about alike; half of the last one's time is worth a try.
            if not deadline.fits(name, last / 2):
                continue
            start = device.now()
            key = f"{operator.name} {case.name}"
            if key not in arguments_of:
                arguments_of[key] = make_arguments(case, dtype, device, batch)
            found = measure_case(
                operator,
                case,
                mode,
                dtype,
                providers,
                device,
                machine,
                plan,
                deadline,
                batch,
                arguments_of[key],
            )
            store.add(found)
            rows += found
            release()
            last = device.now() - start
    if options.json:
        print(results.to_json(rows))
    else:
        print(machine_line(machine))
        print_rows(rows)
        if path is not None:
            print(f"written to {path}")
    report_left_out("ops", deadline, skipped)
    return 0


def print_rows(rows: Sequence[Row]) -> None:
    """The table, losing rows first, and each reason for not measuring once."""
    measured = [row for row in rows if row.measured]
    measured.sort(key=lambda row: (row.op, row.case, row.mode, row.l2, not row.graph))
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in measured:
        groups.setdefault((row.op, row.case, row.mode, row.l2, str(row.graph)), []).append(row)

    def worst(group: list[Row]) -> float:
        found = [row.ratio_to_best_alternative for row in group if row.ratio_to_best_alternative is not None]
        return min(found, default=math.inf)

    ordered = sorted(groups.values(), key=worst)
    if ordered:
        results.print_table(results.TABLE, [results.table_line(row) for group in ordered for row in group])
    reasons: dict[tuple[str, str], int] = {}
    for row in rows:
        if not row.measured:
            reasons[row.provider, row.note] = reasons.get((row.provider, row.note), 0) + 1
    for (provider, text), count in reasons.items():
        print(f"{provider}: {text} ({count} {'case' if count == 1 else 'cases'})")


if __name__ == "__main__":
    raise SystemExit(main())
