"""The DS-Block, module and reference, against the recorded numbers of SteveTsui/DS-Net, in float64."""

import re

import pytest
import torch
from support import golden

from fused_ops.blocks import DSBlock
from fused_ops.blocks.ds_block.reference import ds_block

NAMES = ["ds_block_64_s8", "ds_block_128_s4", "ds_block_320_s2", "ds_block_512_s2", "ds_block_256_s1"]


def filled(name):
    """Record, block with the fill, and the arguments of the official call."""
    record = golden.load(name)
    call = dict(re.findall(r"(\w+)=(\w+)", record["official"]["factory"]))
    sizes = {key: int(call[key]) for key in ("dim", "num_heads", "downsample")}
    block = DSBlock(**sizes, dtype=torch.float64)
    golden.check_layout(block.state_dict(), record)
    block.load_state_dict(golden.fill(block.state_dict(), record["state_dict"]["gain"]))
    return record, block, sizes


@pytest.mark.parametrize("name", NAMES)
def test_module(name):
    record, block, _ = filled(name)
    golden.check_eval(block, record, lambda x: ([block(x)], ())).check(golden.EVAL_TOLERANCE)
    golden.check_train(block, record, lambda x: [block(x)]).check(golden.TRAIN_TOLERANCE)


@pytest.mark.parametrize("name", NAMES)
def test_reference(name):
    record, block, sizes = filled(name)
    options = {"num_heads": sizes["num_heads"], "downsample": sizes["downsample"]}

    def run(x):
        return ds_block(x, block.state_dict(keep_vars=True), training=block.training, **options)

    golden.check_eval(block, record, lambda x: ([run(x)], ())).check(golden.EVAL_TOLERANCE)
    golden.check_train(block, record, lambda x: [run(x)]).check(golden.TRAIN_TOLERANCE)


@pytest.mark.parametrize("name", ["ds_block_64_s8", "ds_block_512_s2"])
def test_float32_is_as_close_as_the_official_code_in_float32(name):
    record, block, _ = filled(name)
    x = golden.normal("input", record["eval"][0]["input"]["shape"])
    block.eval()
    with torch.no_grad():
        expected = block(x)
        got = block.float()(x.float()).double()
    official = record["eval"][0]["float32_relative_l2_error"][0]
    assert (got - expected).norm() / expected.norm() <= 4 * official
