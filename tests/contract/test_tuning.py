"""Contract P3: tile choices come from a file or a heuristic, never from a measurement inside a call."""

from __future__ import annotations

import types
import warnings

import pytest
import torch

from fused_ops.core import environment, tuning

GPU = "Made-up GPU 80GB"
CUDA = types.SimpleNamespace(is_cuda=True, device=types.SimpleNamespace(index=0))
CPU = torch.zeros(1)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch, tmp_path):
    monkeypatch.setenv("FUSED_OPS_CONFIGS", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: GPU)
    tuning._choices.cache_clear()
    tuning._measured.cache_clear()
    yield
    tuning._choices.cache_clear()
    tuning._measured.cache_clear()


def write(tmp_path, text):
    (tmp_path / f"{environment.gpu_slug(GPU)}.json").write_text(text)


def heuristic():
    return (1, 2, 3)


def test_the_nearest_measured_tile_is_taken(tmp_path):
    rows = [
        {"sizes": [64, 56, 56], "tile": [4, 8, 64], "microseconds": 1.0},
        {"sizes": [64, 14, 14], "tile": [2, 8, 64], "microseconds": 1.0},
    ]
    write(tmp_path, tuning.text_of(GPU, {"kernel": rows}, commit="c0ffee"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuning.tile_of("kernel", (64, 56, 56), heuristic, CUDA) == (4, 8, 64)
        assert tuning.tile_of("kernel", (96, 16, 20), heuristic, CUDA) == (2, 8, 64)
        # Farther than a factor of two in any size, another kernel, or the CPU: the heuristic.
        assert tuning.tile_of("kernel", (64, 224, 224), heuristic, CUDA) == (1, 2, 3)
        assert tuning.tile_of("another", (64, 56, 56), heuristic, CUDA) == (1, 2, 3)
        assert tuning.tile_of("kernel", (64, 56, 56), heuristic, CPU) == (1, 2, 3)


def test_an_unknown_gpu_warns_once(tmp_path):
    with pytest.warns(RuntimeWarning, match=f"no measured tiles for {GPU}; .* `fused-ops tune`"):
        assert tuning.tile_of("kernel", (64, 56, 56), heuristic, CUDA) == (1, 2, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuning.tile_of("kernel", (64, 28, 28), heuristic, CUDA) == (1, 2, 3)


@pytest.mark.parametrize("text", ["{", "[]", '{"kernels": {"k": [{"sizes": [1]}]}}', '{"kernels": {"k": 3}}'])
def test_a_broken_file_is_named_and_not_used(text, tmp_path):
    write(tmp_path, text)
    with pytest.warns(RuntimeWarning, match="made-up-gpu-80gb.json is not a file of tile choices"):
        assert tuning.tile_of("kernel", (64, 56, 56), heuristic, CUDA) == (1, 2, 3)


def test_forcing_and_recording():
    with tuning.force("kernel", (9, 9, 9)):
        assert tuning.tile_of("kernel", (8, 4, 4), heuristic, CPU) == (9, 9, 9)
        with tuning.force("kernel", (7, 7, 7)):
            assert tuning.tile_of("kernel", (8, 4, 4), heuristic, CPU) == (7, 7, 7)
    with tuning.record() as used:
        assert tuning.tile_of("kernel", (8, 4, 4), heuristic, CPU) == (1, 2, 3)
    assert used == {"kernel": ((8, 4, 4), (1, 2, 3))}
