"""What the hardware allows: the least possible time of an operator on a GPU, known without the GPU.

    python -m fused_ops.bench.limits                 # predicted least times of every model case on every GPU
    python -m fused_ops.bench.limits --gpu h100
    python -m fused_ops.bench.limits --steps         # launches and bytes per block and per model step

The least time is the largest of three: bytes over memory bandwidth, operations over the peak of the unit that
does them, instructions over the rate at which they can be issued. None of it is a measurement: bandwidths and
peaks are from datasheets, instruction counts are estimates. A kernel takes longer.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import fused_ops  # noqa: F401 (fills the registry)
from fused_ops.bench.correctness import outputs
from fused_ops.blocks.ds_block import DSBlock
from fused_ops.blocks.ds_block import module as ds_block_module
from fused_ops.blocks.ds_block import op as ds_block_op
from fused_ops.blocks.ds_block import triton as ds_block_triton
from fused_ops.core import backends, environment, library


def tensors(values: Any) -> list[Tensor]:
    """Every tensor in nested containers, each once."""
    return list({id(leaf): leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)}.values())


@dataclass(frozen=True)
class Gpu:
    """Published figures of one GPU.

    Attributes:
        name: short name, used in tables.
        aliases: parts of the names that drivers give it, in lower case.
        architecture: e.g. ``sm_90``.
        memory_bandwidth: device memory, bytes per second.
        tensor_peak: dense bfloat16 matrix products with float32 sums, operations per second, no sparsity.
        fma_peak: float32 multiply-adds outside the matrix units, operations per second (two per
            multiply-add).
        multiprocessors: how many are enabled.
        clock: boost clock, in hertz.
        l2_bytes: L2 cache.
        source: where these figures are published.
        assumed_copy: bandwidth that a copy reaches (bytes read + written per second) where one was measured
            elsewhere; an assumption until a run of this bench replaces it. None: the datasheet's is used.
        assumed_gemm: the same for a large bfloat16 matrix product, operations per second.
    """

    name: str
    aliases: tuple[str, ...]
    architecture: str
    memory_bandwidth: float
    tensor_peak: float
    fma_peak: float
    multiprocessors: int
    clock: float
    l2_bytes: int
    source: str
    assumed_copy: float | None = None
    assumed_gemm: float | None = None

    @property
    def issue_rate(self) -> float:
        """Instructions of single threads per second: 4 schedulers per multiprocessor, 32 lanes each."""
        return self.multiprocessors * 4 * 32 * self.clock


_MB = 2**20
GPUS = (
    Gpu(
        "A100 80GB",
        ("a100",),
        "sm_80",
        2.039e12,
        312e12,
        19.5e12,
        108,
        1.410e9,
        40 * _MB,
        "NVIDIA A100 80GB datasheet (SXM); NVIDIA A100 Tensor Core GPU Architecture white paper",
    ),
    Gpu(
        "L40S",
        ("l40s",),
        "sm_89",
        0.864e12,
        362.05e12,
        91.6e12,
        142,
        2.520e9,
        96 * _MB,
        "NVIDIA L40S datasheet; NVIDIA Ada GPU Architecture white paper (L2 of AD102)",
    ),
    Gpu(
        "H100 SXM",
        ("h100",),
        "sm_90",
        3.35e12,
        989.4e12,
        66.9e12,
        132,
        1.980e9,
        50 * _MB,
        "NVIDIA H100 datasheet (SXM5); NVIDIA H100 Tensor Core GPU Architecture white paper",
        assumed_copy=3.0e12,
        assumed_gemm=798e12,
    ),
    Gpu(
        "H200",
        ("h200",),
        "sm_90",
        4.8e12,
        989.4e12,
        66.9e12,
        132,
        1.980e9,
        50 * _MB,
        "NVIDIA H200 datasheet (SXM); multiprocessors, clock and L2 as the H100's",
    ),
    Gpu(
        "B200",
        ("b200",),
        "sm_100",
        8.0e12,
        2250e12,
        75e12,
        148,
        1.965e9,
        126 * _MB,
        "NVIDIA HGX B200 datasheet, an eighth of its 8 GPUs', dense; clock and L2 as the driver reports",
    ),
    Gpu(
        "RTX 4090",
        ("rtx 4090", "4090"),
        "sm_89",
        1.008e12,
        165.2e12,
        82.6e12,
        128,
        2.520e9,
        72 * _MB,
        "NVIDIA Ada GPU Architecture white paper",
    ),
)


def find_gpu(name: str) -> Gpu:
    """The GPU whose datasheet fits ``name``, as a driver, a user or a folder of results writes it.

    Raises:
        ValueError: none fits, or more than one.
    """
    plain = re.sub(r"[^a-z0-9]+", " ", name.lower()).strip()
    found = [gpu for gpu in GPUS if any(re.search(rf"\b{alias}\b", plain) for alias in gpu.aliases)]
    # Other memory, clocks and power under the same product name.
    if re.search(r"\b(pcie|nvl|40gb|laptop|4090 d|mig)\b", plain):
        found = []
    if len(found) != 1:
        known = ", ".join(gpu.name for gpu in GPUS)
        raise ValueError(f"GPU {name!r} has no datasheet here; known are {known}")
    return found[0]


@dataclass(frozen=True)
class Limit:
    """Least possible time.

    Attributes:
        seconds: the largest of ``terms``.
        term: which one that is: ``memory``, ``tensor``, ``fma`` or ``issue``.
        terms: seconds of each term; ``tensor`` or ``fma``, not both.
    """

    seconds: float
    term: str
    terms: dict[str, float] = field(default_factory=dict)


def least_seconds(
    gpu: Gpu,
    bytes: float,
    flops: float,
    tensor: bool,
    issue_slots: float = 0,
    copy_bandwidth: float | None = None,
    gemm_peak: float | None = None,
) -> Limit:
    """Least possible time of work on ``gpu``.

    Args:
        gpu: from :func:`find_gpu`.
        bytes: read plus written in device memory.
        flops: operations, two per multiply-add.
        tensor: done by the matrix units in bfloat16; else by float32 multiply-adds.
        issue_slots: instructions of single threads, summed over threads; 0 where nobody has estimated them.
        copy_bandwidth: measured, in bytes per second; else the GPU's assumed one, else the datasheet's.
        gemm_peak: measured bfloat16 matrix peak, operations per second; else as above.
    """
    for name, value in (("bytes", bytes), ("flops", flops), ("issue_slots", issue_slots)):
        if value < 0:
            raise ValueError(f"{name}={value} is not allowed; give 0 or more")
    for name, value in (("copy_bandwidth", copy_bandwidth), ("gemm_peak", gemm_peak)):
        if value is not None and value <= 0:
            raise ValueError(f"{name}={value} is not allowed; give more than 0, or None")
    bandwidth = copy_bandwidth or gpu.assumed_copy or gpu.memory_bandwidth
    peak = (gemm_peak or gpu.assumed_gemm or gpu.tensor_peak) if tensor else gpu.fma_peak
    terms = {
        "memory": bytes / bandwidth,
        "tensor" if tensor else "fma": flops / peak,
        "issue": issue_slots / gpu.issue_rate,
    }
    term = max(terms, key=lambda name: terms[name])
    return Limit(terms[term], term, terms)


# Instructions of one thread per output element, forward and backward, of CUDA kernels that walk down the rows
# and keep a ring of accumulators (4 channels x 4 columns per thread forward; 4 x 2, 2 x 4, 2 x 2 backward):
# counted in their sm_90 machine code, prologue included. An estimate of what a good kernel of this design
# issues; a cleverer one may issue less, and no shipped kernel was counted.
DEPTHWISE_ISSUE_SLOTS = {3: (31, 69), 5: (52, 118), 7: (85, 234)}


def issue_slots(operator: str, call: Any, direction: str) -> float:
    """Estimated instructions of one call, summed over its threads; 0 where there is no estimate.

    Args:
        operator: name of the family.
        call: its checked call.
        direction: ``forward`` or ``backward``.
    """
    if operator != "depthwise" or call.stride != (1, 1):
        return 0
    height, width = call.kernel_size
    if height != width or height not in DEPTHWISE_ISSUE_SLOTS:
        return 0
    batch, channels, rows, columns = call.output_shape
    return DEPTHWISE_ISSUE_SLOTS[height][direction == "backward"] * batch * channels * rows * columns


@contextlib.contextmanager
def kernels_chosen(
    chosen: list[tuple[str, Any, str]] | None = None, whole_blocks: bool = True
) -> Iterator[None]:
    """On fake tensors: operators take the backend that ``auto`` would take on a GPU that runs Triton.

    Args:
        chosen: collects operator, checked call and backend of every call, in order.
        whole_blocks: blocks run as one operator where they can.
    """

    def choose(name: str, candidates: Sequence[backends.Backend], call: Any) -> backends.Backend:
        picked = candidates[-1]
        for candidate in candidates:
            if candidate.forward is None or (call.needs_grad and candidate.backward is None):
                continue
            if candidate.can_run(call)[0]:
                picked = candidate
                break
        if chosen is not None:
            chosen.append((name, call, picked.name))
        return picked

    def choose_whole(name: str, candidates: Sequence[backends.Backend], call: Any) -> str | None:
        if not whole_blocks or not candidates[0].can_run(call)[0]:
            return None
        if chosen is not None:
            chosen.append((name, call, candidates[0].name))
        return candidates[0].name

    with contextlib.ExitStack() as stack:
        # Nothing is launched on fake tensors, so any device will do.
        stack.enter_context(mock.patch.object(environment, "interpreting", return_value=True))
        stack.enter_context(mock.patch.object(backends, "triton_status", return_value=(True, "not launched")))
        for operator in library.operators().values():
            module = sys.modules[operator.function.__module__]
            stack.enter_context(mock.patch.object(module, "choose", choose))
        stack.enter_context(mock.patch.object(ds_block_module, "choose_whole", choose_whole))
        yield


@dataclass(frozen=True)
class Work:
    """What one call has to do in one mode.

    Attributes:
        bytes: least bytes through device memory, of the schedule in use.
        flops: operations, two per multiply-add.
        issue_slots: estimated instructions of single threads; 0 where there is no estimate.
        backend: whose schedule it is.
    """

    bytes: int
    flops: int
    issue_slots: float
    backend: str


def without_batch_statistics(arguments: dict[str, Any]) -> dict[str, Any]:
    """The call's arguments as in evaluation: norms use their running statistics."""
    return {
        key: value._replace(batch_stats=False) if hasattr(value, "batch_stats") else value
        for key, value in arguments.items()
    }


def operator_work(operator: library.Operator, case: Any, dtype: torch.dtype) -> dict[str, Work]:
    """Work of a case per mode (eval, forward, backward), from fake tensors: nothing is computed."""
    work = {}
    with FakeTensorMode(), contextlib.ExitStack() as stack:
        chosen: list[tuple[str, Any, str]] = []
        stack.enter_context(kernels_chosen(chosen))
        # Attention as two products: torch 2.11 counts no operations of its kernel for CPUs.
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        arguments = case.make(torch.Generator(), dtype, torch.device("cpu"), case.layout)
        for mode in ("eval", "forward"):
            chosen.clear()
            grad = mode == "forward"
            given = arguments if grad else without_batch_statistics(arguments)
            with torch.set_grad_enabled(grad), FlopCounterMode(display=False) as counter:
                out = operator.function(**given)
            (_, call, backend) = chosen[0]
            forward_flops = counter.get_total_flops()
            work[mode] = _work(operator, call, "forward", forward_flops, backend)
        leaves = [leaf for leaf in tensors(arguments) if leaf.requires_grad]
        if leaves and any(value.requires_grad for value in outputs(out)):
            # Gradients of the input and of the filter each cost what the forward pass costs.
            flops = forward_flops * 2
            work["backward"] = _work(operator, call, "backward", flops, backend)
    return work


def _work(operator: library.Operator, call: Any, direction: str, flops: int, backend: str) -> Work:
    return Work(
        operator.least_bytes(call, direction),
        flops,
        issue_slots(operator.name, call, direction),
        backend,
    )


DTYPE = torch.bfloat16


def predictions(operator: library.Operator, gpu: Gpu, dtype: torch.dtype = DTYPE) -> list[dict[str, Any]]:
    """Least possible times of the operator's model cases on ``gpu``: predicted, not measured.

    Returns:
        Rows with gpu, op, model, case, calls, mode (eval, forward, backward, both), dtype, predicted_us
        (least possible microseconds), term (what sets it; of ``both``, what sets the longer pass), memory_us,
        tensor_us, fma_us, issue_us, bytes, flops, issue_slots, backend, and assumption (whether the bandwidth
        is the datasheet's or an assumed copy bandwidth).
    """
    rows = []
    for case in operator.cases():
        if "model" in case.tags:
            rows += _case_predictions(operator, case, operator_work(operator, case, dtype), gpu, dtype)
    return rows


def all_predictions(gpus: Sequence[Gpu] = GPUS, dtype: torch.dtype = DTYPE) -> list[dict[str, Any]]:
    """:func:`predictions` of every operator on every GPU; the work of a case is worked out once."""
    rows = []
    for operator in library.operators().values():
        for case in operator.cases():
            if "model" in case.tags:
                work = operator_work(operator, case, dtype)
                for gpu in gpus:
                    rows += _case_predictions(operator, case, work, gpu, dtype)
    return rows


# What can bound a call; tensor and fma exclude each other.
TERMS = ("memory", "tensor", "fma", "issue")


def _case_predictions(
    operator: library.Operator, case: Any, work: dict[str, Work], gpu: Gpu, dtype: torch.dtype
) -> list[dict[str, Any]]:
    rows = []
    limits = {
        mode: least_seconds(gpu, entry.bytes, entry.flops, operator.matrix_products, entry.issue_slots)
        for mode, entry in work.items()
    }
    common = {
        "gpu": gpu.name,
        "op": operator.name,
        "model": case.model,
        "case": case.name,
        "calls": case.calls,
        "dtype": str(dtype).removeprefix("torch."),
        "assumption": "assumed copy bandwidth" if gpu.assumed_copy else "datasheet bandwidth",
    }
    for mode, limit in limits.items():
        rows.append(
            {
                **common,
                "mode": mode,
                "predicted_us": limit.seconds * 1e6,
                "term": limit.term,
                **{f"{name}_us": limit.terms.get(name, 0.0) * 1e6 for name in TERMS},
                **asdict(work[mode]),
            }
        )
    if "backward" in limits:
        parts = [rows[-2], rows[-1]]
        # One pass after the other: the terms of the two do not overlap.
        summed = ("predicted_us", *(f"{name}_us" for name in TERMS), "bytes", "flops", "issue_slots")
        longest = max(parts, key=lambda row: row["predicted_us"])
        rows.append({**longest, "mode": "both", **{key: sum(row[key] for row in parts) for key in summed}})
    return rows


# Operations that only describe memory, or reserve it.
_NO_LAUNCH = {
    "aten.detach", "aten.empty", "aten.empty_like", "aten.empty_strided", "aten.new_empty",
    "aten.new_empty_strided", "aten.lift_fresh", "aten._unsafe_view", "aten.alias", "prim.device",
}  # fmt: skip


def _size(tensor: Tensor) -> int:
    """Bytes of a tensor in memory; what is expanded lies there once."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= 1 if stride == 0 and size else size
    return count * tensor.element_size()


def _repeated_reads(name: str, arguments: Sequence[Any]) -> int:
    """Bytes that an operation's kernels read a second time."""
    if name == "aten.native_batch_norm" and arguments[5]:
        # Statistics first, then the normalisation.
        return _size(arguments[0])
    if name == "aten.native_batch_norm_backward" and arguments[7]:
        # The two sums first, then the gradient.
        return _size(arguments[0]) + _size(arguments[1])
    if name == "aten.convolution_backward" and arguments[-1][0] and arguments[-1][1]:
        # Input and filter gradients are kernels of their own.
        return _size(arguments[0])
    return 0


class Counter(TorchDispatchMode):
    """Counts the PyTorch operations that write memory, and the bytes of what they read and write.

    A count of operations, so a lower bound of launches: some operations launch several kernels.

    Attributes:
        launches: operations that write memory.
        bytes: inputs read plus outputs written, each once, and what is known to be read twice.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches = 0
        self.bytes = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Sequence[Any] = (), keywords: dict[str, Any] | None = None
    ) -> Any:
        keywords = keywords or {}
        result = function(*arguments, **keywords)
        name = str(function.overloadpacket)
        if function.namespace == "fused_ops" or name in _NO_LAUNCH or function.is_view:
            return result
        read = {key: value for key, value in keywords.items() if key != "out"}
        inputs = tensors([list(arguments), read])
        outputs = tensors(list(result) if isinstance(result, (tuple, list)) else [result])
        storages = {tensor.untyped_storage()._cdata for tensor in inputs}
        writes_input = function._schema.is_mutable
        fresh = [tensor for tensor in outputs if tensor.untyped_storage()._cdata not in storages]
        written = outputs if writes_input else fresh
        written = [tensor for tensor in written if tensor.numel()]
        if not written:
            return result
        self.launches += 1
        self.bytes += sum(map(_size, inputs)) + sum(map(_size, written))
        self.bytes += _repeated_reads(name, arguments)
        return result


class _Kernels:
    """Stands for a backend of a family: counts what its launches move instead of launching them."""

    def __init__(self, counter: Counter, family: Any) -> None:
        self._counter, self._family = counter, family

    def forward(self, call: Any, *_: Any) -> None:
        self._count(call, "forward")

    def backward(self, call: Any, *_: Any) -> None:
        self._count(call, "backward")

    def _count(self, call: Any, direction: str) -> None:
        self._counter.launches += self._family.launch_count(call, direction)
        self._counter.bytes += self._family.least_bytes(call, direction)


@contextlib.contextmanager
def _kernels_counted(counter: Counter) -> Iterator[None]:
    """Let the DS-Block's launches count instead of launching: each tensor that one is given, once."""
    families = library.operators()

    def given(launches: int = 1, returns: int | None = None) -> Any:
        def count(*arguments: Any) -> Any:
            counter.launches += launches
            counter.bytes += sum(map(_size, tensors(list(arguments))))
            return None if returns is None else arguments[returns]

        return count

    def resampled(call: Any, out: Tensor, base: Tensor | None = None) -> Tensor:
        resample.forward(call)
        counter.bytes += 0 if base is None else _size(base)
        return out

    def folded(weight: Tensor, bias: Tensor, *vectors: Tensor | None) -> tuple[Tensor, Tensor]:
        out = vectors[-1].new_empty(weight.shape), vectors[-1].new_empty(bias.shape)
        given()(weight, bias, *out)
        return out

    resample = _Kernels(counter, families["resample"])
    depthwise = _Kernels(counter, families["depthwise"])
    attention = _Kernels(counter, families["attention"])

    def attended(call: Any, out: Tensor) -> Tensor:
        attention.forward(call)
        return out

    launches = ds_block_triton
    patches = [
        (launches, "_depthwise_kernels", lambda call, backend: depthwise if _takes(call) else None),
        (launches.attention.triton, "forward", attended),
        (launches.attention.triton, "backward", attention.backward),
        (launches.resample, "forward", resampled),
        (launches.resample, "backward", given()),
        (launches.triton_wide, "scale_and_add", given()),
        (launches.triton_norm, "batch_statistics", given(2)),
        (launches.triton_norm, "normalised", given(returns=-1)),
        (launches.triton_norm, "input_gradient", given(returns=-1)),
        (launches.triton_norm, "fold", folded),
        (launches.triton_norm, "folded_gradients", given()),
    ]
    for module, family in (
        (launches.co_attention_triton, "co_attention"),
        (launches.feed_forward_triton, "feed_forward"),
    ):
        kernels = _Kernels(counter, families[family])
        patches += [(module, name, getattr(kernels, name)) for name in ("forward", "backward")]
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(mock.patch.object(*patch))
        yield


def _takes(call: Any) -> bool:
    return any(
        one.forward is not None and one.can_run(call)[0] for one in library.operators()["depthwise"].backends
    )


def whole_block(call: Any) -> tuple[int, int]:
    """Launches and bytes of a DS-Block as one operator: its launches on fake tensors, PyTorch's included.

    Of both directions, with every gradient, where the call is kept for backward; else of forward.
    """
    counter = Counter()
    with torch.no_grad(), _kernels_counted(counter), counter:
        made = ds_block_op.allocate_forward(call)
        ds_block_triton.forward(call, made, "auto")
        if call.keep:
            for name in ds_block_op.BATCH_NORMS:
                call.running.setdefault(name, tuple(made[name][:2]))
            needs = dict.fromkeys(("x", *ds_block_op.PARAMETERS), True)
            ds_block_triton.backward(call, torch.empty_like(call.x), made, needs, "auto")
    return counter.launches, counter.bytes


@dataclass(frozen=True)
class Step:
    """Launches and bytes of one pass through a block or a model: counted on fake tensors, not measured.

    Attributes:
        kind: ``block`` or ``model``.
        name: of the block's case or of the model.
        batch: images.
        mode: ``infer`` (one forward) or ``train`` (forward and backward, without the optimizer).
        provider: ``eager``: plain PyTorch; ``operators``: with our kernels where they run, one by one;
            ``fused``: and with blocks as one operator.
        launches: lower bound, see :class:`Counter`.
        bytes: least traffic of that many separate operations.
        fused_calls: calls that our kernels run.
    """

    kind: str
    name: str
    batch: int
    mode: str
    provider: str
    launches: int
    bytes: int
    fused_calls: int


def count_step(
    kind: str, name: str, module: nn.Module, shape: Sequence[int], mode: str, provider: str
) -> Step:
    """Count one pass of ``module`` on a channels_last map of ``shape`` in bfloat16.

    Attention counts as one operation that writes no probabilities (a flash kernel), which needs dropout off:
    every dropout is set to 0, in a copy of ``module``.

    Args:
        kind, name, mode, provider: see :class:`Step`.
        module: in bfloat16.
        shape: (B, C, H, W).
    """
    if mode not in ("infer", "train") or provider not in PROVIDERS:
        raise ValueError(
            f"mode={mode!r}, provider={provider!r}: use infer or train, and one of {', '.join(PROVIDERS)}"
        )
    # Counters of batches are real numbers even among fake tensors, and would be written.
    module = copy.deepcopy(module)
    for layer in module.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    module.train(mode == "train")
    chosen: list[tuple[str, Any, str]] = []
    counter = Counter()
    choice = backends.backend("reference")
    if provider != "eager":
        choice = kernels_chosen(chosen, whole_blocks=provider == "fused")
    with FakeTensorMode(allow_non_fake_inputs=True), choice:
        x = torch.empty(tuple(shape), dtype=DTYPE).contiguous(memory_format=torch.channels_last)
        # A block sits inside a network and hands a gradient on; a network's input gets none.
        leaves = [x.requires_grad_()] if kind == "block" and mode == "train" else []
        with torch.set_grad_enabled(mode == "train"), counter:
            out = module(x)
            if mode == "train":
                leaves += [parameter for parameter in module.parameters() if parameter.requires_grad]
                torch.autograd.grad(out, leaves, torch.empty_like(out), allow_unused=True)
        launches, size, fused = counter.launches, counter.bytes, 0
        for operator, call, _ in chosen:
            if operator == "ds_block":
                counted = whole_block(call)
                launches, size, fused = launches + counted[0], size + counted[1], fused + 1
    for operator, call, backend in chosen:
        if backend == "reference" or operator == "ds_block":
            continue
        fused += 1
        family = library.operators()[operator]
        for direction in ("forward", "backward")[: 1 + (mode == "train")]:
            launches += family.launch_count(call, direction) if family.launch_count else 1
            size += family.least_bytes(call, direction)
    return Step(kind, name, shape[0], mode, provider, launches, size, fused)


BATCH = 128
PROVIDERS = ("eager", "operators", "fused")


def _steps(kind: str, name: str, module: nn.Module, shape: Sequence[int]) -> list[Step]:
    return [
        count_step(kind, name, module, shape, mode, provider)
        for mode in ("infer", "train")
        for provider in (PROVIDERS if isinstance(module, DSBlock) else ("eager", "fused"))
    ]


def saved_bytes(module: nn.Module, shape: Sequence[int], provider: str) -> int:
    """Bytes that a training step of ``module`` keeps from forward for backward, parameters left out.

    Counted on fake tensors, on a channels_last map of ``shape`` in bfloat16 that gets a gradient; the input
    counts where it is kept. Dropout stays on: attention with dropout has no fused form in eager PyTorch.

    Args:
        module: in bfloat16.
        provider: see :class:`Step`.
    """
    module = copy.deepcopy(module).train()
    kept: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        # Storages are held, for a freed one's place would be given to the next.
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    choice = backends.backend("reference")
    if provider != "eager":
        choice = kernels_chosen(whole_blocks=provider == "fused")
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, choice:
        x = torch.empty(tuple(shape), dtype=DTYPE).contiguous(memory_format=torch.channels_last)
        real = [*module.parameters(), *module.buffers()]
        fake = [mode.from_tensor(tensor) for tensor in real]
        owned = {tensor.untyped_storage()._cdata for tensor in (*real, *fake)}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            # Held, for what a freed graph kept would be counted no more.
            out = module(x.requires_grad_())
        found = sum(storage.nbytes() for key, storage in kept.items() if key not in owned)
        del out, fake
    return found


def block_steps(batch: int = BATCH) -> list[Step]:
    """Every DS-Block of the published models, at ``batch`` images."""
    from fused_ops.blocks.ds_block.cases import CASES

    rows = []
    for case in CASES:
        if "model" in case.tags:
            made = case.make(torch.Generator().manual_seed(0), DTYPE, torch.device("cpu"), "channels_last")
            rows += _steps("block", case.name, made["block"], (batch, *made["x"].shape[1:]))
    return rows


def model_steps(names: Sequence[str], batch: int = BATCH) -> list[Step]:
    """One pass of every named model, at its own input size.

    Raises:
        ValueError: an unknown model.
    """
    from fused_ops.models import create_model, list_models

    rows = []
    for name in names:
        if name not in list_models():
            raise ValueError(f"model {name!r} is unknown; use one of {', '.join(list_models())}")
        model = create_model(name).to(DTYPE).to(memory_format=torch.channels_last)
        rows += _steps("model", name, model, (batch, *model.pretrained_cfg["input_size"]))
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    from fused_ops.bench import results

    parser = argparse.ArgumentParser(
        prog="python -m fused_ops.bench.limits", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--gpu", help="one GPU, e.g. h100; all known ones by default")
    parser.add_argument("--steps", action="store_true", help="launches and bytes per block and model step")
    parser.add_argument("--models", nargs="*", default=["dsnet_small"], help="models whose step is counted")
    parser.add_argument("--json", action="store_true", help="print one JSON list")
    options = parser.parse_args(arguments)
    try:
        if options.steps:
            rows = [asdict(step) for step in [*block_steps(), *model_steps(options.models)]]
        else:
            rows = all_predictions([find_gpu(options.gpu)] if options.gpu else GPUS)
    except ValueError as error:
        print(f"fused-ops bench limits: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(rows, indent=1))
    elif options.steps:
        print("counted, not measured")
        results.print_table(list(rows[0]), [[str(value) for value in row.values()] for row in rows])
    else:
        print("predicted least times, not measured")
        shown = ("gpu", "op", "case", "mode", "predicted_us", "term", *(f"{name}_us" for name in TERMS))
        lines = [[f"{row[key]:.1f}" if key.endswith("_us") else row[key] for key in shown] for row in rows]
        results.print_table(shown, lines, left=4)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
