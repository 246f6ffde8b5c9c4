"""FCViT and its parts against the recorded numbers of ma-xu/FCViT, in float64.

11x11 depthwise convolutions in float64 take long on a CPU, so that only the parts run in little time.
"""

import pytest
import torch
from support import golden, staged_backbones

from fused_ops.models.fcvit import GlobalContext, TokenMixer

NAMES = ["fcvit_tiny", "fcvit_b12", "fcvit_b24", "fcvit_b48"]
# The deeper ones take half a minute each and more, and are the same code.
RUN = [NAMES[0], *(pytest.param(name, marks=pytest.mark.extended) for name in NAMES[1:])]
PARTS = {"fcvit_global_context_64": GlobalContext, "fcvit_token_mixer_64": TokenMixer}


@pytest.mark.parametrize("name", NAMES)
def test_layout(name):
    staged_backbones.check_golden_layout(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUN)
def test_eval(name):
    record, model = staged_backbones.filled(name)

    def run(x):
        features, stages = model.forward_intermediates(x)
        return [model.forward_head(features)], stages

    golden.check_eval(model, record, run).check(golden.EVAL_TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUN)
def test_train(name):
    record, model = staged_backbones.filled(name)
    golden.check_train(model, record, lambda x: [model(x)]).check(golden.TRAIN_TOLERANCE)


# The norms of the maps are code that all backbones of stages share, tested with ViP and HLG.
@pytest.mark.extended
def test_dense():
    record, model = staged_backbones.filled("fcvit_b12_dense", features_only=True, output_norm=True)
    golden.check_eval(
        model, record, lambda x: (model.forward_intermediates(x, intermediates_only=True), ())
    ).check(golden.EVAL_TOLERANCE)


@pytest.mark.parametrize("name", PARTS)
def test_part(name):
    record = golden.load(name)
    module = PARTS[name](64, dtype=torch.float64)
    golden.check_layout(module.state_dict(), record)
    module.load_state_dict(golden.fill(module.state_dict(), record["state_dict"]["gain"]))
    golden.check_eval(module, record, lambda x: ([module(x)], ())).check(golden.EVAL_TOLERANCE)
    golden.check_train(module, record, lambda x: [module(x)]).check(golden.TRAIN_TOLERANCE)
