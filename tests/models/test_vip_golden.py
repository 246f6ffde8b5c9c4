"""ViP against the recorded numbers of kevin-ssy/ViP and (dense) yuexy/ViP-Object-Detection, in float64."""

import pytest
from support import golden, staged_backbones
from support.selection import only

NAMES = ["vip_mobile", "vip_tiny", "vip_small", "vip_medium", "vip_base"]
# The larger ones are the same code.
RUN = only(NAMES[:2], NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_layout(name):
    staged_backbones.check_golden_layout(name)


@pytest.mark.parametrize("name", RUN)
def test_classifier(name):
    record, model = staged_backbones.filled(name)
    streams, parts_of_blocks = [], []
    for i in range(4):
        layer = model.get_submodule(f"layer_{i}")
        layer.register_forward_hook(lambda module, inputs, output: streams.extend(output))
    model.layer_3.blocks.register_forward_hook(
        lambda module, inputs, output: parts_of_blocks.append(output[1])
    )

    def run(x):
        streams.clear()
        output = model(x)
        if model.head_type == "encoder":
            # The record has the parts after the last encoder in the map's place.
            streams[6:] = [streams[7], parts_of_blocks[-1]]
        return [output], streams

    golden.check_eval(model, record, run).check(golden.EVAL_TOLERANCE)
    golden.check_train(model, record, lambda x: [model(x)]).check(golden.TRAIN_TOLERANCE)


def test_dense():
    record, model = staged_backbones.filled("vip_tiny_dense", features_only=True, output_norm=True)

    def run(x):
        height, width = x.shape[-2:]
        # The second image of a batch is valid in its upper left part alone.
        sizes = [(height, width), (height - 32, width - 64)]
        return model.forward_intermediates(x, intermediates_only=True, image_sizes=sizes)

    golden.check_eval(model, record, lambda x: (run(x), ())).check(golden.EVAL_TOLERANCE)
    golden.check_train(model, record, run).check(golden.TRAIN_TOLERANCE)
