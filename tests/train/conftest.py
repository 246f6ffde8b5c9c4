"""Fixtures of the training tests."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("timm")
pytest.importorskip("torchvision")

from training_helpers import write_images

from fused_ops.train import main

# For the processes that tests start; more threads than cores make them slow.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 training and 11 held-out images of three classes."""
    root = tmp_path_factory.mktemp("images")
    write_images(root / "train", 10)
    write_images(root / "val", 4, without_last=1)
    return root


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[[list[str]], str]:
    """Run the command, expect exit code 2 and one line of error, and return that line."""

    def run(command: list[str]) -> str:
        capsys.readouterr()
        assert main(command) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert error.startswith("fused-ops train: error: ")
        return error

    return run
