"""Spatial-reduced attention against the recorded numbers of whai362/PVT, in float64."""

import re

import pytest
import torch
from support import golden

from fused_ops.attention import SpatialReductionAttention

# The grids of the two recorded inputs are in the notes of each record.
NAMES = ["pvt_sra_64_r8", "pvt_sra_128_r4", "pvt_sra_320_r2", "pvt_sra_512_r1"]


def filled(name):
    record = golden.load(name)
    call = {k: int(v) for k, v in re.findall(r"(\w+)=(\d+)", record["official"]["factory"])}
    module = SpatialReductionAttention(
        call["dim"], call["num_heads"], call["sr_ratio"], norm_eps=1e-5, dtype=torch.float64
    )
    golden.check_layout(module.state_dict(), record)
    module.load_state_dict(golden.fill(module.state_dict(), record["state_dict"]["gain"]))
    grids = [tuple(map(int, grid)) for grid in re.findall(r"(\d+)x(\d+)", " ".join(record["notes"]))]
    sizes = {height * width: (height, width) for height, width in grids}
    return record, module, sizes


@pytest.mark.parametrize("name", NAMES)
def test_golden(name):
    record, module, sizes = filled(name)

    def run(x):
        return module(x, sizes[x.shape[1]])

    golden.check_eval(module, record, lambda x: ([run(x)], ())).check(golden.EVAL_TOLERANCE)
    golden.check_train(module, record, lambda x: [run(x)]).check(golden.TRAIN_TOLERANCE)


def test_argument_errors():
    with pytest.raises(ValueError, match="num_heads must divide the 64 channels, got 3"):
        SpatialReductionAttention(64, 3)
    with pytest.raises(ValueError, match="reduction_ratio must be at least 1, got 0"):
        SpatialReductionAttention(64, 1, 0)
