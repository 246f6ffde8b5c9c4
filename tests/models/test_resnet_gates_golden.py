"""ResNets with gates against the recorded numbers of the public code, in float64."""

import pytest
import torch
from support import backbones, golden
from support.selection import only

GCNET_16, GCNET_4 = "gcnet_resnet_50_r16", "gcnet_resnet_50_r4"
NAMES = [
    "cbam_resnet_18",
    "cbam_resnet_50",
    "eca_resnet_18",
    "eca_resnet_50",
    "sem_resnet_164_cifar",
]
# Every gate and both kinds of block; the others differ in depth, or in one ratio.
RUN = only(["cbam_resnet_18", "cbam_resnet_50", "eca_resnet_18", "sem_resnet_164_cifar"], NAMES)
RUN_GCNET = only([GCNET_16], [GCNET_16, GCNET_4])


def outputs(model, case, features, stages):
    """What the record has: logits, or features where the public head has a fixed window."""
    named = case["outputs"][0]["name"]
    return [features if "features only" in named else model.forward_head(features)], stages


@pytest.mark.parametrize("name", NAMES)
def test_layout(name):
    backbones.check_official_names(name, golden.load(name))


@pytest.mark.parametrize("name", RUN)
def test_model(name):
    record = golden.load(name)
    model = backbones.filled(name, record)
    cases = iter(record["eval"])
    golden.check_eval(
        model, record, lambda x: outputs(model, next(cases), *model.forward_intermediates(x))
    ).check(golden.EVAL_TOLERANCE)

    def official(ours):
        return ours.replace(".sem.", ".")

    def run(x):
        return outputs(model, record["train"], model.forward_features(x), ())[0]

    view = backbones.OfficialNames(model, official)
    golden.check_train(view, record, run).check(golden.TRAIN_TOLERANCE)


@pytest.mark.parametrize("name", RUN_GCNET)
def test_backbone(name):
    """GCNet's public code is a detector's backbone."""
    record = golden.load(f"{name}_backbone")
    backbones.check_official_names(name, record, num_classes=0)
    model = backbones.filled(name, record, num_classes=0)

    def run(x):
        return model.forward_intermediates(x, intermediates_only=True)

    golden.check_eval(model, record, lambda x: (run(x), ())).check(golden.EVAL_TOLERANCE)
    golden.check_train(model, record, run).check(golden.TRAIN_TOLERANCE)


@pytest.mark.parametrize("name", ["cbam_resnet_18"])
def test_float32_is_as_close_as_the_official_code_in_float32(name):
    record = golden.load(name)
    model = backbones.filled(name, record).eval()
    case = record["eval"][0]
    x = golden.normal("input", case["input"]["shape"])
    with torch.no_grad():
        expected = model(x)
        got = model.float()(x.float()).double()
    assert (got - expected).norm() / expected.norm() <= 4 * case["float32_relative_l2_error"][0]
