"""The build: choice of compiler and architectures, installation without torch or with a failing compiler."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from fused_ops.core import native

ROOT = native.SOURCES.parent


@pytest.fixture
def fresh_tools(tools):
    tools.find_toolkit.cache_clear()
    tools.find_torch.cache_clear()
    yield tools
    tools.find_toolkit.cache_clear()
    tools.find_torch.cache_clear()


@pytest.fixture
def toolkit(tools):
    try:
        tools.find_torch()
        return tools.find_toolkit()
    except tools.BuildError as error:
        pytest.skip(str(error))


KNOWN = ["75", "80", "86", "89", "90", "90a", "100", "120"]


@pytest.mark.parametrize(
    ("requested", "present", "archs", "ptx"),
    [
        ("", ["90"], ["90"], ["90"]),
        ("", ["80", "90"], ["80", "90"], ["90"]),
        ("", [], ["80", "86", "89", "90", "100", "120"], ["120"]),
        ("", ["75"], ["80", "86", "89", "90", "100", "120"], ["120"]),
        ("", ["130"], ["80", "86", "89", "90", "100", "120"], ["120"]),
        ("all", ["90"], ["80", "86", "89", "90", "100", "120"], ["120"]),
        ("native", ["89"], ["89"], ["89"]),
        ("80;9.0", [], ["80", "90"], []),
        ("sm_80, 90a+PTX", [], ["80", "90a"], ["90a"]),
    ],
)
def test_architectures(tools, requested, present, archs, ptx):
    assert tools.choose_architectures(requested, KNOWN, present) == (archs, ptx)


@pytest.mark.parametrize("requested", ["70", "200", "75", "hopper", "native"])
def test_unknown_architectures_are_refused(tools, requested):
    with pytest.raises(tools.BuildError, match="FUSED_OPS_CUDA_ARCHS"):
        tools.choose_architectures(requested, KNOWN, [])


def test_an_older_compiler_gets_fewer(tools):
    assert tools.choose_architectures("all", ["80", "86", "90"], []) == (["80", "86", "90"], ["90"])


def test_jobs(tools, monkeypatch):
    monkeypatch.setenv("MAX_JOBS", "3")
    assert tools.job_count() == 3
    monkeypatch.delenv("MAX_JOBS")
    assert 1 <= tools.job_count() <= (os.cpu_count() or 1)


def fake_compiler(folder: Path, text: str) -> Path:
    path = folder / "nvcc"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


BROKEN = """case "$*" in
*--version*) echo "Cuda compilation tools, release 13.0, V13.0.88";;
*--list-gpu-code*) echo sm_80; echo sm_90;;
*) echo "ptxas fatal: versions do not match"; exit 1;;
esac"""


def test_a_compiler_asked_for_by_name_must_work(fresh_tools, monkeypatch, tmp_path):
    monkeypatch.setenv("FUSED_OPS_NVCC", str(fake_compiler(tmp_path, BROKEN)))
    with pytest.raises(fresh_tools.BuildError, match=r"FUSED_OPS_NVCC: .*it says: ptxas fatal"):
        fresh_tools.find_toolkit()
    monkeypatch.setenv("FUSED_OPS_NVCC", str(tmp_path / "nothing"))
    fresh_tools.find_toolkit.cache_clear()
    with pytest.raises(fresh_tools.BuildError, match="does not exist"):
        fresh_tools.find_toolkit()


def test_a_broken_compiler_on_the_path_is_passed_over(fresh_tools, toolkit, monkeypatch, tmp_path):
    candidates = fresh_tools._candidates
    broken = fake_compiler(tmp_path, BROKEN)

    def with_broken():
        yield "PATH", broken, False
        yield from candidates()

    monkeypatch.setattr(fresh_tools, "_candidates", with_broken)
    fresh_tools.find_toolkit.cache_clear()
    assert fresh_tools.find_toolkit().nvcc == toolkit.nvcc


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory):
    """A Python with setuptools and nothing else, as in pip's build isolation."""
    folder = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin/python"
    import setuptools

    packages = Path(setuptools.__file__).parents[1]
    code = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    target = Path(
        subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
    )
    for pattern in (
        "setuptools",
        "setuptools-*",
        "_distutils_hack",
        "pkg_resources",
        "wheel",
        "wheel-*",
        "packaging",
    ):
        for found in packages.glob(pattern):
            (target / found.name).symlink_to(found)
    return python


@pytest.fixture
def checkout(tmp_path):
    """A copy of what the build reads."""
    target = tmp_path / "checkout"
    target.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target)
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "results")
    for name in ("csrc", "fused_ops", "models", "train", "bench"):
        shutil.copytree(ROOT / name, target / name, ignore=ignore)
    return target


def make_wheel(python, checkout, tmp_path, **variables):
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), **variables}
    command = [str(python), "setup.py", "-q", "bdist_wheel", "--dist-dir", str(tmp_path / "dist")]
    result = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    wheels = list((tmp_path / "dist").glob("*.whl"))
    return result, (zipfile.ZipFile(wheels[0]).namelist() if wheels else None), wheels


def test_without_torch_it_installs_and_says_what_to_run(bare_python, checkout, tmp_path):
    result, names, wheels = make_wheel(bare_python, checkout, tmp_path)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    said = [line for line in result.stderr.splitlines() if line.startswith("fused_ops:")]
    assert len(said) == 1
    assert "torch is not installed here" in said[0]
    assert "python csrc/build.py library" in said[0]
    assert wheels[0].name.endswith("-py3-none-any.whl")
    assert "fused_ops/core/native.py" in names
    assert "fused_ops/_native.so" not in names


def test_required_but_impossible_is_an_error_without_a_traceback(bare_python, checkout, tmp_path):
    result, names, _ = make_wheel(bare_python, checkout, tmp_path, FUSED_OPS_BUILD_CUDA="1")
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    assert "FUSED_OPS_BUILD_CUDA=1, but the CUDA library was not built: torch is not" in result.stderr
    assert names is None


@pytest.mark.parametrize(("wanted", "code"), [("auto", 0), ("1", 1)])
def test_a_failing_compiler(checkout, tmp_path, wanted, code):
    compiler = fake_compiler(tmp_path, BROKEN)
    result, names, _ = make_wheel(
        sys.executable, checkout, tmp_path, FUSED_OPS_BUILD_CUDA=wanted, FUSED_OPS_NVCC=str(compiler)
    )
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    assert "versions do not match" in result.stderr or "built without CUDA" in result.stderr
    assert (names is None) == (code == 1)


def test_left_out_on_request(checkout, tmp_path):
    result, names, _ = make_wheel(sys.executable, checkout, tmp_path, FUSED_OPS_BUILD_CUDA="0")
    assert result.returncode == 0, result.stderr
    assert "left out, as FUSED_OPS_BUILD_CUDA=0 asks" in result.stderr
    assert "fused_ops/_native.so" not in names


def test_every_module_is_installed(checkout, tmp_path):
    """A family that is not packaged would be missed by the installed package only."""
    result, names, _ = make_wheel(sys.executable, checkout, tmp_path, FUSED_OPS_BUILD_CUDA="0")
    assert result.returncode == 0, result.stderr
    modules = {path.relative_to(checkout) for path in checkout.glob("fused_ops/**/*.py")}
    for folder in ("models", "train", "bench"):
        beside = (path.relative_to(checkout) for path in checkout.glob(f"{folder}/*.py"))
        modules |= {Path("fused_ops") / path for path in beside}
    assert len(modules) > 100
    assert {str(path) for path in modules} <= set(names)
    assert "fused_ops/configs/dispatch.json" in names


LOAD = """
import ctypes, sys, torch
torch.ops.load_library(sys.argv[1])
schema = str(torch.ops.fused_ops_native.depthwise_forward.default._schema)
assert schema.startswith("fused_ops_native::depthwise_forward(Tensor x,"), schema
empty = torch.zeros(1, 8, 4, 4)
try:
    torch.ops.fused_ops_native.depthwise_forward(
        empty, empty, *[None] * 7, empty, None, 1, 1, 1, 0, False, 1e-5, 0, 0, False, 3, 0, 0, 0)
except NotImplementedError as error:
    print("refuses CPU tensors,", torch.__version__)
"""


@pytest.fixture(scope="session")
def built_library(tools):
    """The library for one architecture, kept under build/."""
    output = tools.BUILD / "tests" / f"_native-{tools.environment_tag()}.so"
    try:
        tools.find_torch()
        tools.find_toolkit()
    except tools.BuildError as error:
        pytest.skip(str(error))
    return tools.build_library(output, archs="90+PTX")


def other_pythons():
    return [
        path
        for path in sorted(ROOT.glob(".venv*/bin/python"))
        if path.parents[1].resolve() != Path(sys.prefix).resolve()
    ]


@pytest.mark.slow
def test_one_library_for_every_torch(built_library):
    """Built here, it loads here and in every other environment of the checkout."""
    for python in [Path(sys.executable), *other_pythons()]:
        result = subprocess.run([str(python), "-c", LOAD, str(built_library)], capture_output=True, text=True)
        assert result.returncode == 0, f"{python}: {result.stderr}"
        assert "refuses CPU tensors" in result.stdout
    if not other_pythons():
        pytest.skip("loads here; there is no other environment (.venv*) in the checkout to load it in")


@pytest.mark.slow
def test_the_library_says_how_it_was_built(built_library, tools):
    # In a process of its own: torch takes the same operators from one library only.
    code = (
        "import json, pathlib, sys\n"
        "from fused_ops.core import native\n"
        "native.LIBRARY = pathlib.Path(sys.argv[1])\n"
        "print(json.dumps(native.build_info()))"
    )
    command = [sys.executable, "-c", code, str(built_library)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    info = json.loads(result.stdout)
    assert info["architectures"] == ["90"]
    assert info["ptx"] == ["90"]
    assert info["torch"] == tools.find_torch().version
    assert tools.INTERFACE == native.INTERFACE


@pytest.mark.slow
def test_nothing_is_compiled_twice(built_library, tools, monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("a command was run although nothing has changed")

    monkeypatch.setattr(tools, "_run", refuse)
    assert tools.build_library(built_library, archs="90+PTX") == built_library


@pytest.mark.slow
def test_cmake_configures(tools, tmp_path):
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    ninja = tools._ninja()
    if cmake is None or ninja is None:
        pytest.skip("cmake or ninja is not installed")
    command = [cmake, "-S", str(ROOT), "-B", str(tmp_path), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    command.append(f"-DPython3_EXECUTABLE={sys.executable}")
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    listing = subprocess.run(
        [ninja, "-C", str(tmp_path), "-t", "targets", "all"], capture_output=True, text=True
    )
    assert "depthwise_thread" in listing.stdout
    try:
        tools.find_toolkit()
    except tools.BuildError:
        assert "No CUDA compiler works here" in result.stdout
        return
    for arch in tools.SUPPORTED_ARCHITECTURES:
        assert f"compile_sm_{arch}:" in listing.stdout
