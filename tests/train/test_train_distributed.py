"""Any number of ranks computes what one process computes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from training_helpers import CONVNEXT, arguments, epochs, losses

from fused_ops.train import main
from fused_ops.train.checkpoint import LAST, load_state
from fused_ops.train.data import NO_TARGET, EvaluationBatches, TrainingBatches
from fused_ops.train.distributed import World
from fused_ops.train.settings import Settings

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def world(rank: int, size: int) -> World:
    return World(rank, size, torch.device("cpu"))


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_share_the_passes_of_one(ranks, repeats):
    settings = Settings(data="x", batch_size=32, device_batch=4, repeats=repeats)
    alone = TrainingBatches(settings, 101, world(0, 1))
    together = [TrainingBatches(settings, 101, world(rank, ranks)) for rank in range(ranks)]
    assert sum(map(len, together)) == len(alone) == 3 * 8
    dealt = [list(batches) for batches in together]
    assert [draws for turn in zip(*dealt, strict=True) for draws in turn] == list(alone)


def test_epoch_is_a_permutation_and_resumes_in_the_middle():
    settings = Settings(data="x", batch_size=10, device_batch=5, repeats=1)
    batches = TrainingBatches(settings, 50, world(0, 1))
    whole = list(batches)
    assert sorted(draw.index for part in whole for draw in part) == list(range(50))
    assert sorted(draw.position for part in whole for draw in part) == list(range(50))
    batches.first_update = 3
    assert list(batches) == whole[6:]
    batches.epoch, batches.first_update = 1, 0
    assert list(batches) != whole


def test_repeats_lie_in_different_passes():
    settings = Settings(data="x", batch_size=12, device_batch=4, repeats=3)
    for part in TrainingBatches(settings, 36, world(0, 1)):
        assert len({draw.index for draw in part}) == 4


@pytest.mark.parametrize(("images", "ranks"), [(11, 1), (11, 2), (1, 3), (16, 2)])
def test_evaluation_sees_every_image_once(images, ranks):
    batches = [list(EvaluationBatches(images, 4, world(rank, ranks))) for rank in range(ranks)]
    assert len({len(part) for part in batches}) == 1
    indices = [draw.index for part in batches for batch in part for draw in batch]
    assert sorted(index for index in indices if index != NO_TARGET) == list(range(images))


def torchrun(command: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *("-m", "fused_ops.train", *command),
        ],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.parametrize("model", [pytest.param(CONVNEXT, marks=pytest.mark.extended), "dsnet_test"])
def test_two_processes_equal_one(model, image_folder, tmp_path):
    """With everything random on. Parameters agree with BatchNorm too, since its statistics belong to passes.

    Only its running statistics are those of rank 0's passes, so accuracies are compared without BatchNorm.
    """
    one, two = tmp_path / "one", tmp_path / "two"
    changes = {"model": model, "epochs": 2, "batch_size": 16, "device_batch": 4, "lr": 0.01}
    assert main(arguments(image_folder, one, **changes)) == 0
    done = torchrun([*arguments(image_folder, two, **changes), "--json"])
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)[0]["ranks"] == 2

    np.testing.assert_allclose(losses(two), losses(one), rtol=2e-4)
    ours, theirs = load_state(two / LAST), load_state(one / LAST)
    for part in ("model", "ema"):
        for name, value in theirs[part].items():
            if not name.endswith(STATISTICS):
                torch.testing.assert_close(
                    ours[part][name], value, rtol=2e-3, atol=2e-4, msg=f"{part}: {name}"
                )
    if model == CONVNEXT:
        for row, expected in zip(epochs(two), epochs(one), strict=True):
            assert row == pytest.approx(expected, rel=1e-3)


def test_error_is_printed_once(image_folder, tmp_path):
    done = torchrun(
        arguments(image_folder, tmp_path / "run", batch_size=9, device_batch=0, mixup=0, cutmix=0)
    )
    assert done.returncode != 0
    assert done.stderr.count("fused-ops train: error: --batch-size 9: must be a multiple of the 2 ranks") == 1
