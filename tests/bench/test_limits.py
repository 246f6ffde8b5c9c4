"""Limits against numbers worked out by hand; launches against the interpreter's."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from fused_ops.bench import limits
from fused_ops.bench.limits import tensors
from fused_ops.bench.traffic import count_triton
from fused_ops.blocks import DSBlock
from fused_ops.core import backends, environment, library

DEPTHWISE = library.operators()["depthwise"]


def case_named(name):
    return next(case for case in DEPTHWISE.cases() if case.name == name)


@pytest.mark.parametrize(
    ("name", "gpu"),
    [
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("nvidia-h200", "H200"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA L40S", "L40S"),
        ("b200", "B200"),
    ],
)
def test_find_gpu(name, gpu):
    assert limits.find_gpu(name).name == gpu


@pytest.mark.parametrize("name", ["cpu", "NVIDIA H100 PCIe", "NVIDIA A100-SXM4-40GB", "NVIDIA L4", ""])
def test_find_gpu_refuses_what_it_has_no_datasheet_for(name):
    with pytest.raises(ValueError, match="has no datasheet here; known are A100 80GB"):
        limits.find_gpu(name)


def test_peaks_follow_from_multiprocessors_and_clock():
    # 128 float32 lanes per multiprocessor (64 on A100), two operations each per clock.
    for gpu in limits.GPUS:
        lanes = 64 if gpu.architecture == "sm_80" else 128
        assert gpu.fma_peak == pytest.approx(gpu.multiprocessors * lanes * 2 * gpu.clock, rel=0.02), gpu.name


def test_the_largest_term_is_the_limit():
    h100 = limits.find_gpu("h100")
    memory = limits.least_seconds(h100, 3e9, 1e9, False)
    assert (memory.seconds, memory.term) == (pytest.approx(1e-3), "memory")
    assert limits.least_seconds(h100, 3e9, 1e9, False, copy_bandwidth=1.5e12).seconds == pytest.approx(2e-3)
    tensor = limits.least_seconds(h100, 0, 798e9, True)
    assert (tensor.seconds, tensor.term) == (pytest.approx(1e-3), "tensor")
    assert limits.least_seconds(h100, 0, 798e9, True, gemm_peak=399e12).seconds == pytest.approx(2e-3)
    fma = limits.least_seconds(h100, 0, 66.9e9, False)
    assert (fma.seconds, fma.term) == (pytest.approx(1e-3), "fma")
    # 132 multiprocessors, 4 warps of 32 per clock, 1.98e9 clocks.
    issue = limits.least_seconds(h100, 3e9, 0, False, issue_slots=2 * 132 * 128 * 1.98e6)
    assert (issue.seconds, issue.term) == (pytest.approx(2e-3), "issue")
    # Where nothing was measured elsewhere, the datasheet's bandwidth.
    assert limits.least_seconds(limits.find_gpu("l40s"), 864e9, 0, False).seconds == pytest.approx(1.0)


@pytest.mark.parametrize(
    "keywords", [{"bytes": -1}, {"flops": -1}, {"issue_slots": -1}, {"copy_bandwidth": 0}, {"gemm_peak": -1}]
)
def test_bad_work_is_refused(keywords):
    with pytest.raises(ValueError, match=next(iter(keywords))):
        limits.least_seconds(limits.GPUS[0], **{"bytes": 1, "flops": 1, "tensor": False, **keywords})


def test_work_of_a_model_case():
    work = limits.operator_work(DEPTHWISE, case_named("dsnet_local_32x56"), torch.bfloat16)
    outputs = 128 * 32 * 56 * 56
    # Pre-norm, identity: evaluation reads x and writes y; training reads x once more for the statistics;
    # backward reads g and x, writes t, then reads and writes t and reads x once more.
    assert work["eval"].bytes == 2 * outputs * 2
    assert work["forward"].bytes == 3 * outputs * 2
    assert work["backward"].bytes == 6 * outputs * 2
    assert [work[mode].flops for mode in ("eval", "forward", "backward")] == [
        18 * outputs,
        18 * outputs,
        36 * outputs,
    ]
    assert (work["forward"].issue_slots, work["backward"].issue_slots) == (31 * outputs, 69 * outputs)
    assert {entry.backend for entry in work.values()} == {"triton"}


def test_work_of_what_no_kernel_runs():
    work = limits.operator_work(DEPTHWISE, case_named("empty"), torch.bfloat16)
    outputs = 0
    assert work["forward"].backend == "reference"
    assert (work["forward"].flops, work["backward"].flops) == (18 * outputs, 36 * outputs)
    assert work["forward"].issue_slots == 0


def test_predictions():
    h100 = limits.find_gpu("h100")
    rows = limits.predictions(DEPTHWISE, h100)
    assert {row["case"] for row in rows} == {c.name for c in DEPTHWISE.cases() if "model" in c.tags}
    found = {row["mode"]: row for row in rows if row["case"] == "dsnet_positional_64x56"}
    unit = 128 * 64 * 56 * 56
    assert found["forward"]["predicted_us"] == pytest.approx(2 * 2 * unit / 3e12 * 1e6)
    assert found["forward"]["term"] == "memory"
    # Backward: 3 passes are 51 us of memory, and 69 instructions per output 53 us of issue.
    assert found["backward"]["predicted_us"] == pytest.approx(69 * unit / (132 * 128 * 1.98e9) * 1e6)
    assert found["backward"]["term"] == "issue"
    both = found["forward"]["predicted_us"] + found["backward"]["predicted_us"]
    assert found["both"]["predicted_us"] == pytest.approx(both)
    assert found["forward"]["assumption"] == "assumed copy bandwidth"


def test_matrix_products_are_held_against_tensor_cores():
    h100 = limits.find_gpu("h100")
    for name in ("attention", "hr_chain"):
        rows = limits.predictions(library.operators()[name], h100)
        assert all(row["fma_us"] == 0 < row["tensor_us"] for row in rows)
        assert all(row["tensor_us"] == pytest.approx(row["flops"] / 798e12 * 1e6) for row in rows)


@pytest.mark.skipif(not environment.interpreting(), reason="records launches in Triton's interpreter")
@pytest.mark.parametrize("name", ["conv", "post_eval_relu6", "no_affine", "pre_train", "kernel5"])
def test_launches_are_those_of_the_kernels(name):
    arguments = case_named(name).make(
        torch.Generator().manual_seed(0), torch.float32, torch.device("cpu"), "channels_last"
    )
    chosen = []
    with limits.kernels_chosen(chosen), backends.backend("triton"):
        with count_triton() as forward:
            out = DEPTHWISE.function(**arguments)
        leaves = [leaf for leaf in tensors(arguments) if leaf.requires_grad]
        with count_triton() as backward:
            torch.autograd.grad(out, leaves, torch.randn_like(out))
    (_, call, _) = chosen[0]
    # The filter is transposed by PyTorch, whose kernels the interpreter does not see.
    transposed = name == "kernel5"
    assert DEPTHWISE.launch_count(call, "forward") == len(forward) + transposed
    assert DEPTHWISE.launch_count(call, "backward") == len(backward) + transposed


class _Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1, bias=False)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.conv(x)).relu()


def test_count_of_plain_operations():
    module = _Plain().to(torch.bfloat16)
    step = limits.count_step("block", "plain", module, (2, 4, 8, 8), "infer", "eager")
    unit, vector = 2 * 4 * 8 * 8 * 2, 4 * 2
    # Convolution, BatchNorm and activation each read and write the map once, and their parameters.
    assert (step.launches, step.bytes) == (3, 6 * unit + 16 * 2 + 4 * vector)
    train = limits.count_step("block", "plain", module, (2, 4, 8, 8), "train", "eager")
    # Forward: the statistics read the map once more, mean and deviation are written in bfloat16 or float32;
    # counting the batch is one more. Backward: relu 3, BatchNorm 2 reads twice and a write, convolution reads
    # its gradient twice.
    assert train.launches == 4 + 3
    assert train.bytes >= (7 + 3 + 5 + 4) * unit
    assert train.bytes < (7 + 3 + 5 + 4) * unit + 600
    assert int(module.norm.num_batches_tracked) == 0


def test_fused_calls_cost_their_least_bytes():
    case = next(case for case in _blocks() if case.name == "stage4_224")
    made = case.make(torch.Generator().manual_seed(0), torch.bfloat16, torch.device("cpu"), "channels_last")
    eager, fused = (
        limits.count_step("block", case.name, made["block"], (8, 512, 7, 7), "infer", provider)
        for provider in ("eager", "operators")
    )
    unit = 8 * 512 * 7 * 7 * 2
    # Eager: convolution and addition, 5 units, on all channels; BatchNorm too, 7, on half of them. Ours: 2.
    # Co-attention is one launch in place of two, over the same bytes. The MLP of wide tokens is two products
    # in place of those and a norm, an activation and an addition: 2, 8 and 3 units, of which one, the
    # residual, is still read. Resampling 7 pixels to 3 reads 6 of them, of half the channels. Parameters of
    # the others are left out of their formulas.
    assert (eager.fused_calls, fused.fused_calls) == (0, 6)
    assert eager.launches - fused.launches == 7
    unread = (1 - 36 / 49) * unit / 2
    assert eager.bytes - fused.bytes == pytest.approx(17.5 * unit + unread, rel=0.05)


def test_a_block_as_one_operator_is_counted_launch_by_launch():
    """Inference of the first stage, in units of its map, by what each launch reads and writes."""
    case = next(case for case in _blocks() if case.name == "stage1_224")
    made = case.make(torch.Generator().manual_seed(0), torch.bfloat16, torch.device("cpu"), "channels_last")
    step = limits.count_step("block", case.name, made["block"], (8, 64, 56, 56), "infer", "fused")
    unit = 8 * 64 * 56 * 56 * 2
    maps = (
        3  # positional convolution: read, written raw and normalised
        + 1.5  # first product, its local half
        + 1  # local convolution
        + 1  # norm before the queries
        + 2  # queries, keys and values
        + 2  # co-attention
        + 2  # second product
        + 3  # resampled, added to that and to the residual
        + 2  # MLP
    )
    # Global tokens are a 64th of the local ones, in 14 tensors or so, up to three times as wide, and take
    # four pixels each of the normalised map; parameters are small.
    assert step.fused_calls == 1
    assert maps < step.bytes / unit < maps + 1


@pytest.mark.parametrize("mode", ["infer", "train"])
def test_a_block_as_one_operator_moves_less(mode):
    for case in _blocks():
        if "model" not in case.tags:
            continue
        made = case.make(
            torch.Generator().manual_seed(0), torch.bfloat16, torch.device("cpu"), "channels_last"
        )
        eager, operators, fused = (
            limits.count_step(
                "block", case.name, made["block"], (32, *made["x"].shape[1:]), mode, provider
            ).bytes
            for provider in limits.PROVIDERS
        )
        assert fused < operators < eager, case.name


@pytest.mark.parametrize("align", [True, False])
@pytest.mark.parametrize(
    ("dim", "heads", "step", "size"), [(64, 1, 8, 56), (128, 2, 4, 28), (320, 5, 2, 14), (512, 8, 2, 7)]
)
def test_a_block_as_one_operator_keeps_half_for_backward(dim, heads, step, size, align):
    block = DSBlock(dim, heads, step, align=align, dtype=torch.bfloat16)
    eager, fused = (
        limits.saved_bytes(block, (128, dim, size, size), provider) for provider in ("eager", "fused")
    )
    assert 0 < fused <= eager / 2


def _blocks():
    from fused_ops.blocks.ds_block.cases import CASES

    return CASES


def test_command(capsys):
    assert limits.main(["--gpu", "h100", "--json"]) == 0
    assert {row["gpu"] for row in json.loads(capsys.readouterr().out)} == {"H100 SXM"}
    assert limits.main(["--gpu", "abacus"]) == 2
    assert "abacus" in capsys.readouterr().err
