"""DS-Net against the recorded numbers of SteveTsui/DS-Net, in float64."""

import pytest
import torch
from support import golden
from support.selection import only

from fused_ops.models import create_model, load_checkpoint, official_state_dict

NAMES = ["dsnet_tiny_star", "dsnet_small_star", "dsnet_base_star"]
# The larger ones are the same code.
RUN = only(NAMES[:1], NAMES)


def filled(name, record):
    """The model with the fill loaded under the official names, through the checkpoint reader."""
    model = create_model(name, dtype=torch.float64)
    load_checkpoint(model, {"model": golden.fill(official_state_dict(model), record["state_dict"]["gain"])})
    return model


@pytest.mark.parametrize("name", NAMES)
def test_layout(name):
    official = official_state_dict(create_model(name, device="meta"))
    concrete = {
        key: torch.zeros(value.shape, dtype=torch.float64 if value.is_floating_point() else value.dtype)
        for key, value in official.items()
    }
    golden.check_layout(concrete, golden.load(name))


@pytest.mark.parametrize("name", RUN)
def test_eval(name):
    record = golden.load(name)
    model = filled(name, record)

    def run(x):
        features, stages = model.forward_intermediates(x)
        return [model.forward_head(features)], stages

    golden.check_eval(model, record, run).check(golden.EVAL_TOLERANCE)


@pytest.mark.parametrize("name", RUN)
def test_train(name):
    record = golden.load(name)
    model = filled(name, record)
    golden.check_train(model, record, lambda x: [model(x)]).check(golden.TRAIN_TOLERANCE)
