"""Gates against the recorded numbers of the public code, in float64."""

import pytest
import torch
from support import golden

from fused_ops.blocks.gates import CBAM, ECA, GlobalContext

DOUBLE = {"dtype": torch.float64}
GATES = {
    "cbam_256": lambda: CBAM(256, **DOUBLE),
    "eca_64_k5": lambda: ECA(64, kernel_size=5, **DOUBLE),
    "gc_block_att_add": lambda: GlobalContext(64, ratio=1 / 16, **DOUBLE),
    "gc_block_att_mul_add": lambda: GlobalContext(64, ratio=1 / 4, fusions=("add", "mul"), **DOUBLE),
    "gc_block_avg_mul": lambda: GlobalContext(64, ratio=1 / 4, pooling="avg", fusions=("mul",), **DOUBLE),
}


@pytest.mark.parametrize("name", GATES)
def test_gate(name):
    record = golden.load(name)
    gate = GATES[name]()
    golden.check_layout(gate.state_dict(), record)
    gate.load_state_dict(golden.fill(gate.state_dict(), record["state_dict"]["gain"]))
    golden.check_eval(gate, record, lambda x: ([gate(x)], ())).check(golden.EVAL_TOLERANCE)
    record["train"].setdefault("batchnorm", [])
    golden.check_train(gate, record, lambda x: [gate(x)]).check(golden.TRAIN_TOLERANCE)
