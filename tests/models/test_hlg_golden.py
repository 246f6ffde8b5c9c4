"""HLG's dense form against the recorded numbers of fudan-zvg/SETR with four repairs, in float64.

The released code does not run; the repairs are in the notes of each record. Nobody can say that this is
what the authors trained.
"""

import pytest
from support import golden, staged_backbones


@pytest.mark.parametrize(
    "name",
    ["hlg_tiny_dense_repaired", pytest.param("hlg_small_dense_repaired", marks=pytest.mark.extended)],
)
def test_dense(name):
    record, model = staged_backbones.filled(name, features_only=True, output_norm=True)

    def run(x):
        return model.forward_intermediates(x, intermediates_only=True)

    golden.check_eval(model, record, lambda x: (run(x), ())).check(golden.EVAL_TOLERANCE)
    golden.check_train(model, record, run).check(golden.TRAIN_TOLERANCE)
