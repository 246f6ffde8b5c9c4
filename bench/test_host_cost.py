"""Cost of one call on the host: ``pytest bench/ --benchmark-only``.

On tensors so small that the work itself takes next to nothing, what is left is checks, choice of backend and
dispatch. Measurements for a reader, with no bound: a shared machine would break any.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fused_ops import BackendUnavailableError, BatchNormState, backend, depthwise_conv
from fused_ops.core import backends
from fused_ops.depthwise import op

pytest.importorskip("pytest_benchmark")

CHANNELS = 8


def tensors(device: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device)

    return {
        "x": normal(1, CHANNELS, 4, 4).contiguous(memory_format=torch.channels_last),
        "weight": normal(CHANNELS, 1, 3, 3),
        "gain": normal(CHANNELS),
        "shift": normal(CHANNELS),
        "mean": torch.zeros(CHANNELS, device=device),
        "var": torch.ones(CHANNELS, device=device),
    }


def chain(x, weight, gain, shift, mean, var, training=False):
    """What a model without this package calls."""
    value = F.conv2d(x, weight, None, 1, 1, 1, CHANNELS)
    return F.silu(F.batch_norm(value, mean, var, gain, shift, training))


def fused(x, weight, gain, shift, mean, var, training=False):
    norm = BatchNormState(gain, shift, mean, var, training, 0.1, 1e-5)
    return depthwise_conv(x, weight, padding="same", norm=norm, activation="silu")


@pytest.fixture(autouse=True)
def _one_thread():
    # Waking a second thread would cost more than the call.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.benchmark(group="one call on the CPU")
@pytest.mark.parametrize("name", ["stock_chain", "reference"])
def test_call_on_the_cpu(benchmark, name):
    given = tensors("cpu")
    with torch.no_grad(), backend("reference"):
        benchmark(chain if name == "stock_chain" else fused, **given)


class Idle:
    """A backend whose launchers launch nothing: what is left of a call is its cost on the host."""

    name = "triton"

    @staticmethod
    def forward(call, *outputs):
        return outputs

    @staticmethod
    def backward(call, grad, raw, needs, *gradients):
        return gradients


@pytest.fixture
def idle(monkeypatch):
    # A registered backend cannot be asked on a CPU, so the choice is left out here and timed by itself.
    monkeypatch.setattr(op, "choose", lambda *_: Idle)
    monkeypatch.setitem(op._BY_NAME, "triton", Idle)


def training_step(function, given, training):
    """One forward and backward call with batch statistics, or one forward call with running ones."""
    if not training:
        return lambda: function(**given)
    given = {name: value.clone() for name, value in given.items()}
    leaves = [given[name].requires_grad_() for name in ("x", "weight", "gain", "shift")]
    grad = torch.ones_like(given["x"])

    def step():
        return torch.autograd.grad(function(**given, training=True), leaves, grad)

    return step


@pytest.mark.benchmark(group="host cost of one call, kernels of the fused one left out")
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "forward_and_backward"])
@pytest.mark.parametrize("name", ["stock_chain", "fused"])
@pytest.mark.usefixtures("idle")
def test_host_cost(benchmark, name, training):
    step = training_step(chain if name == "stock_chain" else fused, tensors("cpu"), training)
    with torch.set_grad_enabled(training):
        benchmark(step)


@pytest.mark.benchmark(group="parts of a call")
def test_checks_and_choice(benchmark):
    given = tensors("cpu")
    norm = BatchNormState(given["gain"], given["shift"], given["mean"], given["var"], False, 0.1, 1e-5)

    def check_and_choose():
        call = op.checked_call(
            given["x"], given["weight"], None, 1, "same", 1, norm, "post", "silu", None, "after", False
        )
        return backends.choose("depthwise", op.BACKENDS, call)

    with torch.no_grad(), backend("reference"):
        benchmark(check_and_choose)


@pytest.mark.benchmark(group="parts of a call")
def test_choice_of_a_backend_by_a_context(benchmark):
    def enter():
        with backend("reference"):
            pass

    benchmark(enter)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and there is none")
@pytest.mark.benchmark(group="one call on a GPU, until it is done")
@pytest.mark.parametrize("name", ["stock_chain", "reference", "triton", "cuda"])
def test_call_on_a_gpu(benchmark, name):
    given = tensors("cuda")

    def run():
        result = chain(**given) if name == "stock_chain" else fused(**given)
        # Without it the benchmark would end before the kernel does.
        torch.cuda.synchronize()
        return result

    with torch.no_grad(), backend("reference" if name == "stock_chain" else name):
        try:
            run()
        except BackendUnavailableError as error:
            pytest.skip(str(error))
        benchmark(run)
