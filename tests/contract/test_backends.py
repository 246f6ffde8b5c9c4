"""The choice of a backend: order, force, reasons, environment variable, explain; imports without parts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import types
import warnings

import pytest
import torch

import fused_ops
from fused_ops import cli, env
from fused_ops.core import backends, dispatch
from fused_ops.core.backends import Backend, BackendUnavailableError


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Run ``code`` in a fresh interpreter, in which nothing of the project is imported."""
    variables = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=variables | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


class Call:
    x = types.SimpleNamespace(is_cuda=True, device="cuda:0")

    def __str__(self):
        return "a call"


class CallOnCpu(Call):
    x = torch.zeros(1)


def backend(name: str, ok: bool) -> Backend:
    return Backend(name, lambda call: (ok, "" if ok else f"{name} is out of order"))


@pytest.fixture
def unmeasured_gpu(monkeypatch):
    """The GPU of :class:`Call`, of which nothing was measured."""
    monkeypatch.setattr(dispatch, "is_measured", lambda operator, device: False)


def test_auto_takes_the_first_that_can_run(unmeasured_gpu):
    listed = (backend("cuda", False), backend("triton", True), backend("reference", True))
    with backends.record() as choices:
        assert backends.choose("sample", listed, Call()).name == "triton"
    assert choices[0].rejected == {"cuda": "cuda is out of order"}
    assert choices[0].requested == "auto"


def test_auto_leaves_the_interpreter_to_tests():
    listed = (backend("triton", True), backend("reference", True))
    with backends.record() as choices:
        assert backends.choose("sample", listed, CallOnCpu()).name == "reference"
    assert choices[0].rejected == {
        "triton": "x is on cpu, where kernels run for tests only, asked for by name"
    }


def test_request_that_cannot_be_met_raises_with_the_reason():
    listed = (backend("cuda", False), backend("reference", True))
    with fused_ops.backend("cuda"), pytest.raises(BackendUnavailableError, match="cuda is out of order"):
        backends.choose("sample", listed, Call())
    with (
        fused_ops.backend("triton"),
        pytest.raises(BackendUnavailableError, match="sample has no triton backend"),
    ):
        backends.choose("sample", listed, Call())


def test_requests_nest_and_end():
    assert backends.requested_backend() == "auto"
    with fused_ops.backend("reference"):
        with fused_ops.backend("auto"):
            assert backends.requested_backend() == "auto"
        assert backends.requested_backend() == "reference"
    with pytest.raises(RuntimeError, match="inside"), fused_ops.backend("triton"):
        raise RuntimeError("inside")
    assert backends.requested_backend() == "auto"


def test_unknown_backend_is_named():
    with pytest.raises(ValueError, match="backend='tritton' is unknown; use one of auto, reference"):
        fused_ops.backend("tritton").__enter__()


def test_fallback_on_a_gpu_is_said_once(unmeasured_gpu, monkeypatch):
    monkeypatch.setattr(backends, "_warned", set())
    listed = (backend("triton", False), backend("reference", True))
    with pytest.warns(RuntimeWarning, match="runs on the reference path .*triton is out of order"):
        backends.choose("sample", listed, Call())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backends.choose("sample", listed, Call())


def test_environment_variable():
    code = """
        import torch, fused_ops
        fused_ops.depthwise_conv(torch.randn(1, 4, 5, 5), torch.randn(4, 1, 3, 3))
    """
    forced = python(code, FUSED_OPS_BACKEND="triton", CUDA_VISIBLE_DEVICES="")
    assert forced.returncode == 1
    assert (
        "BackendUnavailableError: depthwise: backend 'triton' was requested and cannot run" in forced.stderr
    )
    wrong = python(code, FUSED_OPS_BACKEND="fast")
    assert "ValueError: FUSED_OPS_BACKEND='fast' is unknown; use one of auto, reference" in wrong.stderr


def test_import_without_triton():
    """I2: the package imports and runs where Triton is missing, and says why its kernels do not."""
    result = python("""
        import sys
        sys.modules["triton"] = None
        import torch, fused_ops
        from fused_ops.core import backends, dispatch
        out = fused_ops.depthwise_conv(torch.randn(1, 4, 5, 5), torch.randn(4, 1, 3, 3))
        assert out.shape == (1, 4, 3, 3)
        ok, reason = backends.status()["triton"]
        assert not ok and "Triton cannot be imported" in reason, reason
    """)
    assert result.returncode == 0, result.stderr


def test_import_needs_no_extra_and_no_gpu():
    """The core imports nothing of the extras and starts nothing on a GPU; the variable's backend runs."""
    code = """
        import sys
        for name in ("timm", "torchvision", "numpy", "rich", "safetensors", "sklearn", "matplotlib", "PIL"):
            sys.modules[name] = None
        import torch, fused_ops
        assert not {"fused_ops.models", "fused_ops.train", "fused_ops.bench"} & set(sys.modules)
        assert not torch.cuda.is_initialized()
        with fused_ops.core.backends.record() as choices:
            fused_ops.depthwise_conv(torch.randn(1, 4, 5, 5), torch.randn(4, 1, 3, 3))
        assert (choices[0].requested, choices[0].backend) == ("reference", "reference")
    """
    result = python(code, FUSED_OPS_BACKEND="reference")
    assert result.returncode == 0, result.stderr


def test_env_command(capsys):
    """I7: versions, and for each backend whether it runs and why."""
    result = subprocess.run(
        [sys.executable, "-m", "fused_ops.env", "--json"], capture_output=True, text=True, timeout=300
    )
    (report,) = json.loads(result.stdout)
    assert report["packages"]["torch"] == torch.__version__.split("+")[0]
    assert set(report["backends"]) == {"reference", "triton", "cuda"}
    for state in report["backends"].values():
        assert state["reason"]
    assert env.main([]) == 0
    assert "FUSED_OPS_BACKEND" in capsys.readouterr().out


def test_command_line(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["fused-ops"])
    assert cli.main() == 0
    assert "explain" in capsys.readouterr().out
    unknown = subprocess.run(
        [sys.executable, "-m", "fused_ops", "trian"], capture_output=True, text=True, timeout=300
    )
    assert unknown.returncode == 2
    assert "unknown command 'trian'" in unknown.stderr


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 8, 1)
        self.block = torch.nn.Sequential(fused_ops.DepthwiseConvBNAct(8), fused_ops.DepthwiseConvBNAct(8, 17))

    def forward(self, x):
        return self.block(self.stem(x))


def test_explain_names_every_call_and_reason():
    net = Net()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    explanation = fused_ops.explain(net, torch.randn(2, 3, 9, 9))
    rows = explanation.rows()
    assert [row["module"] for row in rows] == ["block.0", "block.1"]
    assert [row["backend"] for row in rows] == ["reference", "reference"]
    assert rows[1]["call"].startswith("17x17 stride 1 on (2, 8, 9, 9) float32")
    assert all(set(row["rejected"]) == {"triton", "cuda"} for row in rows)
    text = str(explanation)
    assert "block.1  reference  depthwise 17x17" in text
    assert "2 x reference: first in the order" in text
    assert "1 x not triton: the kernel is 17x17" in text
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), f"explain changed {name}"


def test_explain_a_module_without_operators():
    assert str(fused_ops.explain(torch.nn.ReLU(), torch.randn(2))) == "no fused operator is called"
