"""FishNet against the recorded numbers of kevin-ssy/FishNet, in float64."""

import pytest
import torch
from support import backbones, golden
from support.selection import only

from fused_ops.models.fishnet import FishBottleneck

BLOCKS = {
    "fish_bottleneck_norm": (64, 64, {}),
    "fish_bottleneck_up_k2_d2": (128, 64, {"reduce": True, "dilation": 2}),
    "fish_bottleneck_widen": (64, 128, {}),
}
NAMES = ["fishnet_99", "fishnet_150", "fishnet_201"]
# The larger ones are the same code.
RUN = only(NAMES[:1], NAMES)


@pytest.mark.parametrize("name", BLOCKS)
def test_bottleneck(name):
    record = golden.load(name)
    before, after, options = BLOCKS[name]
    block = FishBottleneck(before, after, **options, dtype=torch.float64)
    golden.check_layout(block.state_dict(), record)
    block.load_state_dict(golden.fill(block.state_dict(), record["state_dict"]["gain"]))
    golden.check_eval(block, record, lambda x: ([block(x)], ())).check(golden.EVAL_TOLERANCE)
    golden.check_train(block, record, lambda x: [block(x)]).check(golden.TRAIN_TOLERANCE)


@pytest.mark.parametrize("name", NAMES)
def test_layout(name):
    backbones.check_official_names(name, golden.load(name))


@pytest.mark.parametrize("name", RUN)
def test_eval(name):
    record = golden.load(name)
    model = backbones.filled(name, record)

    def run(x):
        return [model(x)], model.forward_nodes(x)

    golden.check_eval(model, record, run).check(golden.EVAL_TOLERANCE)


@pytest.mark.parametrize("name", RUN)
def test_train(name):
    record = golden.load(name)
    model = backbones.filled(name, record)
    golden.check_train(model, record, lambda x: [model(x)]).check(golden.TRAIN_TOLERANCE)
