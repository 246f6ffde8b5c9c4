"""Modules against the recorded numbers with Triton's kernels forced, at float32.

What stays here for a GPU alone takes minutes in Triton's interpreter.
"""

import pytest
import test_ds_block_golden
import test_gates_golden
import test_pvt_attention
import torch
from support import forced, golden
from test_spatial_reduction_attention import OfficialMlp
from timm.models import nextvit

from fused_ops.attention import SpatialReductionAttention
from fused_ops.core import environment

ON_CPU = pytest.mark.skipif(not environment.interpreting(), reason="TRITON_INTERPRET=1 is not set")
DEVICES = [pytest.param("cpu", marks=ON_CPU), pytest.param("cuda", id="gpu", marks=pytest.mark.gpu)]
# The smallest DS-Block; the others are the same code.
SMALL_DS_BLOCK = "ds_block_256_s1"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", test_pvt_attention.NAMES)
def test_spatial_reduction(name, device):
    record, module, sizes = test_pvt_attention.filled(name)
    forced.check_golden(module, record, "triton", lambda m, x: [m(x, sizes[x.shape[1]])], device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", test_gates_golden.GATES)
def test_gate(name, device):
    record = golden.load(name)
    gate = test_gates_golden.GATES[name]()
    gate.load_state_dict(golden.fill(gate.state_dict(), record["state_dict"]["gain"]))
    forced.check_golden(gate, record, "triton", device=device)


@pytest.mark.parametrize("device", DEVICES)
def test_next_vit_block(device):
    record = golden.load("next_vit_ntb_192_256_s4")
    block = nextvit.NextTransformerBlock(192, 256, 0.0, sr_ratio=4, dtype=torch.float64)
    block.e_mhsa = SpatialReductionAttention(192, 6, 4, reduction="token_pool", dtype=torch.float64)
    block.mlp = OfficialMlp(256, 512).double()
    block.load_state_dict(golden.fill(block.state_dict(), record["state_dict"]["gain"]))
    forced.check_golden(block, record, "triton", device=device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "name",
    [
        name if name == SMALL_DS_BLOCK else pytest.param(name, marks=pytest.mark.extended)
        for name in test_ds_block_golden.NAMES
    ],
)
def test_ds_block(name, device):
    record, block, _ = test_ds_block_golden.filled(name)
    forced.check_golden(block, record, "triton", device=device)
