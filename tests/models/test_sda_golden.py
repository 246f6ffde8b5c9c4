"""SDA-xNet against the recorded numbers of QingbeiGuo/SDA-xNet, in float64."""

import pytest
from support import backbones, golden

NAMES = ["sda_resnet_86", "sda_senet_86", "sda_res2net_86", "sda_pyconv_86"]
LONG = ("sda_senet_86", "sda_pyconv_86")
RUN = [pytest.param(name, marks=pytest.mark.extended) if name in LONG else name for name in NAMES]


@pytest.mark.parametrize("name", NAMES)
def test_layout(name):
    backbones.check_official_names(name, golden.load(name))


@pytest.mark.parametrize("name", RUN)
def test_eval(name):
    record = golden.load(name)
    model = backbones.filled(name, record)
    cases = iter(record["eval"])

    def run(x):
        features, stages = model.forward_intermediates(x)
        # The public head has a fixed window, so other sizes have features alone.
        only_features = "features only" in next(cases)["outputs"][0]["name"]
        return [features if only_features else model.forward_head(features)], stages

    golden.check_eval(model, record, run).check(golden.EVAL_TOLERANCE)


@pytest.mark.parametrize("name", RUN)
def test_train(name):
    record = golden.load(name)
    model = backbones.filled(name, record)
    golden.check_train(model, record, lambda x: [model(x)]).check(golden.TRAIN_TOLERANCE)
