"""What ``native.status`` says about a library that is missing, broken, foreign or built for other GPUs."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from fused_ops.core import native


@pytest.fixture
def at(monkeypatch, fresh_status, tmp_path):
    """Puts the library elsewhere."""

    def put(content: bytes | None):
        path = tmp_path / "_native.so"
        if content is not None:
            path.write_bytes(content)
        monkeypatch.setattr(native, "LIBRARY", path)
        return path

    return put


def test_missing(at):
    at(None)
    ok, reason = native.status()
    assert not ok
    assert reason == f"the CUDA library is not built; {native.REMEDY}"
    assert native.build_info() == {}
    with pytest.raises(RuntimeError, match="is not built"):
        native.library()


def test_broken(at):
    at(b"not a library")
    ok, reason = native.status()
    assert not ok
    assert reason.startswith("the CUDA library cannot be loaded (")
    assert "invalid ELF header" in reason or "file too short" in reason
    assert native.REMEDY in reason


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("int something;", "fused_ops_"),
        (
            'extern "C" int fused_ops_interface() { return 0; }'
            'extern "C" const char* fused_ops_build_info() { return "{}"; }',
            "has interface 0 and this fused_ops needs",
        ),
        ("extern int from_a_newer_torch(); int something = from_a_newer_torch();", "undefined symbol"),
    ],
    ids=["foreign", "other interface", "other torch"],
)
def test_wrong_library(at, tmp_path, source, says):
    path = at(None)
    (tmp_path / "wrong.cpp").write_text(source)
    command = ["g++", "-shared", "-fPIC", str(tmp_path / "wrong.cpp"), "-o", str(path)]
    subprocess.run(command, check=True, capture_output=True)
    ok, reason = native.status()
    assert not ok
    assert says in reason


def test_import_survives_a_broken_library(at, tmp_path):
    path = at(b"not a library")
    code = (
        "import pathlib, fused_ops.core.native as native;"
        f"native.LIBRARY = pathlib.Path({str(path)!r});"
        "import fused_ops; print(native.status())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "cannot be loaded" in result.stdout


class FakeLibrary:
    reason = ""
    info = {"cuda": "13.0", "torch": "2.11.0"}  # noqa: RUF012
    architectures = ["80", "90"]  # noqa: RUF012
    ptx: list[str] = []  # noqa: RUF012


@pytest.mark.parametrize(
    ("capability", "ok"),
    [((8, 0), True), ((8, 6), True), ((9, 0), True), ((7, 5), False), ((10, 0), False), ((12, 0), False)],
)
def test_fake_capability(fresh_status, monkeypatch, capability, ok):
    monkeypatch.setattr(native, "_load", lambda path: FakeLibrary)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    native._status.cache_clear()
    found, reason = native.status()
    monkeypatch.undo()
    native._status.cache_clear()
    assert found == ok
    if not ok:
        name = f"sm_{capability[0]}{capability[1]}"
        assert reason == (
            f"the GPU's architecture is {name} and the CUDA library is built for sm_80, sm_90; "
            f"{native.REMEDY}"
        )


@pytest.mark.parametrize(
    ("capability", "architectures", "ptx", "covered"),
    [
        ((12, 0), ["80"], ["90"], True),
        ((8, 9), [], ["90"], False),
        ((9, 0), ["90a"], [], True),
        ((9, 1), ["90a"], ["90a"], False),
        ((10, 3), ["100"], [], True),
        ((8, 0), ["86"], [], False),
    ],
)
def test_coverage(capability, architectures, ptx, covered):
    assert native.architecture_is_covered(capability, architectures, ptx) is covered


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_no_gpu(fresh_status):
    if not native.LIBRARY.is_file():
        pytest.skip(f"{native.LIBRARY.name} is not built")
    assert native.status() == (False, "no CUDA device is available")
    assert native.build_info()["architectures"]
