"""The DS-Block with Triton kernels forced, in Triton's interpreter on a CPU.

Every tensor's error against the float64 reference may be at most twice the error that plain PyTorch makes in
the same precision, plus a small floor for where that one is exact.
"""

import copy

import pytest
import torch

import fused_ops
from fused_ops.blocks.ds_block.cases import CASES
from fused_ops.core import environment

# The depthwise down-sampler of the cases without star has a kernel size that Triton kernels do not cover.
NAMES = ["tiny", "convolution_only"]


def evaluate(block, x, training, seed=1):
    """Output, gradients of input and parameters, and running statistics after one call, by name."""
    block.train(training)
    x = x.detach().requires_grad_()
    out = block(x)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    out.backward(cotangent.to(out.dtype))
    values = {"output": out, "gradient of x": x.grad}
    values |= {f"gradient of {name}": p.grad for name, p in block.named_parameters()}
    values |= {name: b for name, b in block.named_buffers() if b.is_floating_point()}
    return {name: value.detach().double() for name, value in values.items()}


def error(value, exact):
    return ((value - exact).norm() / exact.norm().clamp_min(1e-30)).item()


@pytest.mark.skipif(not environment.interpreting(), reason="TRITON_INTERPRET=1 is not set")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", NAMES)
def test_kernels_are_as_exact_as_pytorch(name, training, dtype):
    case = next(case for case in CASES if case.name == name)
    sample = case.make(torch.Generator().manual_seed(0), torch.float64, torch.device("cpu"), "channels_last")
    # The same rounded numbers for all three, so that only the arithmetic differs.
    x = sample["x"].detach().to(dtype)
    rounded = copy.deepcopy(sample["block"]).to(dtype)
    eager, forced, exact = copy.deepcopy(rounded), copy.deepcopy(rounded), copy.deepcopy(rounded).double()
    with fused_ops.backend("reference"):
        reference = evaluate(exact, x.double(), training)
        plain = evaluate(eager, x, training)
    with fused_ops.backend("triton"):
        kernels = evaluate(forced, x, training)
    floor = 4 * torch.finfo(dtype).eps
    for key, value in reference.items():
        if value.norm() < 1e-9 * value.numel() ** 0.5:
            continue  # exactly zero but for rounding: a bias before BatchNorm in training
        got, allowed = error(kernels[key], value), 2 * error(plain[key], value) + floor
        assert got <= allowed, f"{key}: {got:.3g} > {allowed:.3g}"
