"""The HR chain's CUDA kernels in the emulator: clusters, several rounds and slices, launches, memory traffic.

What every backend has to do is tested in tests/contract.
"""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from support.contract import assert_three_way, case_named, convert, make, run
from torch._subclasses.fake_tensor import FakeTensorMode

import fused_ops
from fused_ops.bench.limits import kernels_chosen
from fused_ops.bench.traffic import operator_traffic
from fused_ops.core import library, native
from fused_ops.hr_chain import cuda
from fused_ops.hr_chain.op import allocate_backward, allocate_forward

OPERATOR = library.operators()["hr_chain"]


def arguments_of(shape, hidden, dtype=torch.float16, **options):
    """Random arguments for a map of some shape, with gradients of everything."""
    generator = torch.Generator().manual_seed(5)
    channels = shape[1]

    def random(size, spread, centre=0.0):
        return (centre + spread * torch.randn(size, generator=generator)).requires_grad_()

    x = torch.randn(shape, generator=generator).to(dtype, memory_format=torch.channels_last)
    norm = fused_ops.BatchNormState(
        random((channels,), 0.2, 1.0), random((channels,), 0.2), None, None, True, 0.1, 1e-5
    )
    return {
        "x": x.requires_grad_(),
        "high_weight": random((channels, 1, 3, 3), 1 / 3),
        "low_weight": random((channels, 1, 3, 3), 1 / 3),
        "fc1_weight": random((hidden, channels), channels**-0.5),
        "fc2_weight": random((channels, hidden), hidden**-0.5),
        "norm": norm,
        "high_bias": random((channels,), 0.5),
        "fc1_bias": random((hidden,), 0.5),
        "fc2_bias": random((channels,), 0.5),
        **options,
    }


def assert_right(arguments):
    eager, exact = convert(arguments), convert(arguments, torch.float64)
    got = run(OPERATOR, arguments, "cuda")
    dtype = arguments["x"].dtype
    assert_three_way(got, run(OPERATOR, eager, "reference"), run(OPERATOR, exact, "reference"), dtype)
    return got


@pytest.mark.parametrize("clusters", [True, False])
def test_many_tiles_per_block(emulator, clusters):
    """Three images of 13 x 14 low-resolution pixels are 18 tiles of 32 for 1 to 4 blocks."""
    emulator.set_clusters(clusters)
    emulator.set_multiprocessors(2)
    try:
        assert_right(arguments_of((3, 8, 26, 28), 16, drop_path=torch.tensor([0.0, 1.25, 1.25])))
    finally:
        emulator.set_clusters(True)


@pytest.mark.parametrize(
    ("shape", "hidden", "dtype"),
    [
        # Padded to 96 and 128 channels; two slices of hidden units, the last not full.
        ((1, 72, 5, 4), 140, torch.bfloat16),
        ((1, 100, 4, 3), 132, torch.float16),
        # One whole slice of 256 units at 64 channels, in every warp a block has.
        ((1, 64, 6, 6), 256, torch.float16),
        # Two slices of 16 warps each.
        ((1, 16, 3, 4), 280, torch.bfloat16),
    ],
)
def test_wide_layers(emulator, shape, hidden, dtype):
    assert_right(arguments_of(shape, hidden, dtype))


def test_clusters_change_nothing_but_the_order_of_sums(emulator):
    results = []
    for clusters in (True, False):
        emulator.set_clusters(clusters)
        results.append(run(OPERATOR, arguments_of((2, 8, 18, 16), 32), "cuda"))
    emulator.set_clusters(True)
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], rtol=1e-3, atol=1e-3)


def test_without_clusters_wide_layers_are_declined(emulator):
    """As on GPUs of compute capability 8: the sequence refuses what can_run does not let through."""
    emulator.set_clusters(False)
    try:
        with pytest.raises(RuntimeError, match="too many hidden units for this GPU"):
            run(OPERATOR, arguments_of((1, 16, 3, 4), 280), "cuda")
    finally:
        emulator.set_clusters(True)
    with (
        fused_ops.backend("cuda"),
        pytest.raises(
            fused_ops.BackendUnavailableError,
            match="the hidden width is 2064; the CUDA kernels are for up to 2048",
        ),
    ):
        fused_ops.hr_block(**arguments_of((1, 16, 3, 4), 2064))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"x": torch.randn(2, 8, 6, 8)},
            "x is torch.float32; the CUDA kernels multiply in float16 and bfloat16",
        ),
        ({"x": torch.randn(2, 8, 6, 8).half()}, "x is in NCHW order; the CUDA kernels read and write"),
        ({"x": torch.randn(0, 8, 6, 8).half()}, r"x is empty, \(0, 8, 6, 8\)"),
    ],
)
def test_declined_calls_say_why(emulator, change, message):
    arguments = {**arguments_of((2, 8, 6, 8), 16), **change}
    arguments["norm"] = arguments["norm"]._replace(
        batch_stats=False, running_mean=torch.zeros(8), running_var=torch.ones(8)
    )
    with fused_ops.backend("cuda"), pytest.raises(fused_ops.BackendUnavailableError, match=message):
        fused_ops.hr_block(**arguments)


@pytest.mark.parametrize("name", ["train", "eval"])
def test_launches(emulator, name):
    """One pass forward after the statistics' two launches, two backward, and what merges their parts."""
    with fused_ops.backend("cuda"):
        out = fused_ops.hr_block(**make(case_named(name, "hr_chain"), torch.float16))
    out.sum().backward()
    statistics = ["depthwise_forward_statistics", "merge_moments"] if name == "train" else []
    assert [launch[0] for launch in emulator.launches()] == [
        *statistics,
        "hr_chain_forward",
        *("hr_chain_low_backward", "hr_chain_sums", "hr_chain_layers"),
        *("hr_chain_maps_backward", "merge_sums", "merge_sums"),
    ]


def test_counted_bytes(emulator):
    """At most 1.1 times the least bytes, and backward is two passes over the maps."""
    rows = operator_traffic(OPERATOR, "cuda", "", lambda: arguments_of((2, 16, 48, 48), 32, torch.bfloat16))
    for row in rows:
        if row["kernel"] == "total":
            assert 1.0 <= row["counted_bytes"] / row["least_bytes"] <= 1.10, row
    maps = 2 * 2 * 16 * 48 * 48
    counted = {row["kernel"]: row["counted_bytes"] for row in rows}
    assert counted["hr_chain_forward"] == pytest.approx(2 * maps, rel=0.05)
    # The gradient and two quarters; then the gradient, x, its gradient and two quarters.
    assert counted["hr_chain_low_backward"] == pytest.approx(1.5 * maps, rel=0.1)
    assert counted["hr_chain_maps_backward"] == pytest.approx(3.5 * maps, rel=0.05)


def view(tensor):
    """An address with the alignment of PyTorch's allocator in place of memory."""
    if tensor is None:
        return None
    return 1 << 20, native.SCALAR_TYPES[tensor.dtype], tuple(tensor.shape), tensor.stride()


@pytest.mark.parametrize("case", [c for c in OPERATOR.cases() if "model" in c.tags], ids=lambda c: c.name)
def test_partial_sums_of_real_models_weigh_less_than_a_tenth(emulator, case):
    """On a GPU with 132 multiprocessors. They are written and read; the maps move once per pass."""
    with kernels_chosen(chosen := []), FakeTensorMode(), fused_ops.backend("reference"):
        fused_ops.hr_block(**case.make(torch.Generator(), torch.bfloat16, torch.device("cpu"), case.layout))
    ((_, call, *_),) = chosen
    sizes = {}
    emulator.set_plan_only(True)
    emulator.set_multiprocessors(132)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode, mock.patch.object(native, "_view", view):
            call.__dict__.update(
                {
                    name: mode.from_tensor(value)
                    for name, value in vars(call).items()
                    if torch.is_tensor(value)
                }
            )
            outputs = allocate_forward(call)
            cuda.forward(call, *outputs)
            sizes["forward"] = emulator.workspace_floats()
            if call.needs_grad and call.batch_stats:
                call.mean, call.var = outputs[2:4]
                needs = [tensor is not None for tensor in call.tensors()[:10]]
                cuda.backward(call, outputs[0], outputs[1], needs, *allocate_backward(call, needs))
                sizes["backward"] = emulator.workspace_floats()
    finally:
        emulator.set_plan_only(False)
    for direction, floats in sizes.items():
        assert 2 * 4 * floats < 0.1 * OPERATOR.least_bytes(call, direction), (direction, floats)


def test_hidden_units_that_are_not_there_meet_no_infinity(emulator):
    """Warps have 16 units; zeros stand for the last ones, which infinity must not turn into not-a-number."""
    norm = fused_ops.BatchNormState(None, None, torch.zeros(8), torch.ones(8), False, 0.1, 1e-5)
    arguments = arguments_of((1, 8, 6, 6), 20, norm=norm, activation="hardswish")
    with torch.no_grad():
        arguments["x"][0, 3, 2, 2] = float("inf")
    want = run(OPERATOR, convert(arguments), "reference")
    got = run(OPERATOR, arguments, "cuda")
    assert want["out"].isnan().any()
    for name in ("out", "grad x"):
        assert torch.equal(got[name].isnan(), want[name].isnan()), name
    assert torch.isfinite(got["grad x"]).any()
