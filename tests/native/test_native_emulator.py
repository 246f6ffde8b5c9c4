"""Kernels on CPU threads under sanitizers; programs of csrc/emulator/tests."""

from __future__ import annotations

import os
import subprocess

import pytest

SANITIZERS = [
    None,
    pytest.param("address", marks=pytest.mark.slow),
    pytest.param("thread", marks=pytest.mark.slow),
]


def run(program, *arguments):
    # Every launch has its shared memory in the same place, so one address stands for races of many kernels.
    environment = {**os.environ, "TSAN_OPTIONS": "suppress_equal_addresses=0"}
    command = [str(program), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    if "unexpected memory mapping" in result.stderr:
        pytest.skip("ThreadSanitizer does not run under this kernel's address layout")
    return result


@pytest.mark.parametrize("sanitizer", SANITIZERS)
@pytest.mark.parametrize("program", ["block_reduction", "depthwise", "hr_chain"])
def test_clean(tools, sanitizer, program):
    result = run(tools.build_emulator_tests(sanitizer)[program])
    assert result.returncode == 0, result.stdout + result.stderr
    assert "right" in result.stdout


@pytest.mark.slow
def test_a_missing_barrier_is_reported(tools):
    result = run(tools.build_emulator_tests("thread")["block_reduction_without_barrier"])
    assert result.returncode != 0
    assert "WARNING: ThreadSanitizer: data race" in result.stderr
    assert "sum_rows" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "barrier", "kernels"),
    [
        ("depthwise", 0, ("depthwise_backward", "planes_backward", "planes_forward")),
        pytest.param("depthwise", 1, ("planes_backward", "planes_forward"), marks=pytest.mark.extended),
        ("depthwise", 2, ("planes_backward",)),
        pytest.param("depthwise", 3, ("depthwise_backward",), marks=pytest.mark.extended),
        ("depthwise", 6, ("depthwise_backward",)),
        *(
            pytest.param("hr_chain", barrier, kernels, marks=marks)
            for barrier, kernels, marks in [
                (0, ("hr_chain_forward", "hr_chain_low_backward", "hr_chain_maps_backward"), ()),
                (1, ("hr_chain_forward", "hr_chain_low_backward"), pytest.mark.extended),
                (2, ("hr_chain_forward", "hr_chain_low_backward"), pytest.mark.extended),
                (3, ("hr_chain_forward", "hr_chain_low_backward"), pytest.mark.extended),
                (4, ("hr_chain_forward", "hr_chain_low_backward"), pytest.mark.extended),
                (9, ("hr_chain_forward", "hr_chain_low_backward"), pytest.mark.extended),
            ]
        ),
    ],
)
def test_a_barrier_that_a_kernel_needs_is_missed(tools, program, barrier, kernels):
    """Depthwise: on planes every barrier, of the channels_last backward the first, a middle and the last.

    HR chain: of a chunk of hidden units or a tile, the exchange in a cluster among them, and of the end.
    """
    result = run(tools.build_emulator_tests("thread")[program], str(barrier))
    assert result.returncode != 0
    assert "WARNING: ThreadSanitizer: data race" in result.stderr
    for kernel in kernels:
        assert f"::{kernel}<" in result.stderr, kernel
