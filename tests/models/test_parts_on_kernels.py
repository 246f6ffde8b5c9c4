"""Parts of models that call operators without being blocks of their own, on Triton's kernels.

Values and gradients at float32 against those of the reference path in float64.
"""

from __future__ import annotations

import copy

import pytest
import torch
from support.contract import DEVICES, require
from support.forced import kernels_of

from fused_ops.models import create_model

# Model, arguments that make it small, the part, its input, and the operators that it calls.
PARTS = {
    "bridge of FishNet": (
        "fishnet_99",
        {"depths": (1,) * 10, "tail_dims": (16, 16, 16, 32), "body_dims": (32, 16, 16)},
        "fish.fish.3",
        (2, 32, 4, 3),
        {"gate_scale", "pool_channels"},
    ),
    "up-sampling of FishNet": (
        "fishnet_99",
        {"depths": (1,) * 10, "tail_dims": (16, 16, 16, 32), "body_dims": (32, 16, 16)},
        "fish.fish.4.2",
        (2, 32, 4, 3),
        {"resample"},
    ),
    "stage of SDA-SENet": (
        "sda_senet_86",
        {"depths": (3, 1, 1, 1), "planes": (16, 16, 16, 16), "least": 8},
        "stage1",
        (2, 16, 4, 3),
        {"gate_scale", "pool_channels"},
    ),
}


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("device", DEVICES)
def test_part(part, memory_format, device):
    require("triton", device)
    name, arguments, path, shape, operators = PARTS[part]
    torch.manual_seed(0)
    exact = create_model(name, num_classes=3, **arguments).get_submodule(path).double().eval()
    single = copy.deepcopy(exact).to(device, torch.float32)
    x = torch.randn(shape, dtype=torch.float64).contiguous(memory_format=memory_format).requires_grad_()
    y = x.detach().to(device, torch.float32).requires_grad_()
    expected = exact(x)
    weight = torch.randn_like(expected)
    (expected * weight).sum().backward()
    with kernels_of("triton") as choices:
        found = single(y)
        (found * weight.to(device, torch.float32)).sum().backward()
    assert {choice.operator for choice in choices if choice.backend == "triton"} == operators
    torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(y.grad.cpu().double(), x.grad, rtol=1e-4, atol=1e-5)
    for (key, want), got in zip(exact.named_parameters(), single.parameters(), strict=True):
        scale = float(want.grad.norm()) + 1e-6
        assert float((got.grad.cpu().double() - want.grad).norm()) <= 1e-5 * scale, key
