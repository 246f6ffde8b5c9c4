"""PVT against the recorded numbers of whai362/PVT, in float64."""

import pytest
from support import golden, staged_backbones
from support.selection import only

NAMES = ["pvt_tiny", "pvt_small", "pvt_medium", "pvt_large"]
# The larger ones are the same code.
RUN = only(NAMES[:1], NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_layout(name):
    staged_backbones.check_golden_layout(name)


@pytest.mark.parametrize("name", RUN)
def test_classifier(name):
    record, model = staged_backbones.filled(name)
    tokens = []
    for layer in (model.block4, model.norm):
        layer.register_forward_hook(lambda module, inputs, output: tokens.append(output))

    def run(x):
        tokens.clear()
        features, stages = model.forward_intermediates(x, indices=[0, 1, 2])
        return [model.forward_head(features)], [*stages, *tokens]

    golden.check_eval(model, record, run).check(golden.EVAL_TOLERANCE)
    golden.check_train(model, record, lambda x: [model(x)]).check(golden.TRAIN_TOLERANCE)


@pytest.mark.parametrize("name", only(["pvt_tiny_dense"], ["pvt_tiny_dense", "pvt_small_dense"]))
def test_dense(name):
    record, model = staged_backbones.filled(name, features_only=True)

    def run(x):
        return model.forward_intermediates(x, intermediates_only=True)

    golden.check_eval(model, record, lambda x: (run(x), ())).check(golden.EVAL_TOLERANCE)
    golden.check_train(model, record, run).check(golden.TRAIN_TOLERANCE)
