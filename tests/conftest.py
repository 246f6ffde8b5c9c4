"""Settings of every test run: Triton's interpreter where there is no GPU, quiet threads, the gpu marker."""

from __future__ import annotations

import os
import subprocess


def _has_gpu() -> bool:
    # Asked without torch: Triton reads TRITON_INTERPRET when it is first imported.
    try:
        result = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return False
    return result.returncode == 0 and "GPU" in result.stdout


HAS_GPU = _has_gpu()
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")
# A requested backend would change what every test runs.
os.environ.pop("FUSED_OPS_BACKEND", None)

import pytest  # noqa: E402
import torch  # noqa: E402

from fused_ops.core import native  # noqa: E402


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        from support.interpreter import round_to_bfloat16, save_time

        round_to_bfloat16()
        save_time()
    # TensorFloat-32 would hide errors of a thousand float32 roundings in the results compared with.
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    skip = pytest.mark.skip(reason="needs a CUDA device, and there is none")
    left_out = pytest.mark.skip(reason="runs with `make test-extended`")
    extended = "extended" in config.option.markexpr
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(skip)
        if "extended" in item.keywords and not extended:
            item.add_marker(left_out)


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tools():
    return native.build_tools()


@pytest.fixture(scope="session")
def built_emulator(tools):
    try:
        return native.build_emulator()
    except tools.BuildError as error:
        if "the compiler failed" in str(error):
            raise
        pytest.skip(str(error))


@pytest.fixture
def emulator(built_emulator):
    """The CUDA kernels on CPU tensors: the emulator, built once and put in the CUDA library's place."""
    native.set_emulator(built_emulator)
    built_emulator.set_mode("sequential")
    built_emulator.set_multiprocessors(4)
    built_emulator.reset_traffic()
    yield built_emulator
    native.set_emulator(None)
    built_emulator.set_mode("sequential")
