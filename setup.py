"""Packaging. The CUDA library is compiled along where that is possible; csrc/build.py knows how."""

import importlib.util
import os
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:
    from wheel.bdist_wheel import bdist_wheel

_spec = importlib.util.spec_from_file_location(
    "fused_ops_build", Path(__file__).resolve().parent / "csrc" / "build.py"
)
native_build = importlib.util.module_from_spec(_spec)
# Dataclasses look their module up while they are defined.
sys.modules[_spec.name] = native_build
_spec.loader.exec_module(native_build)

PACKAGE_DIRS = {"fused_ops.models": "models", "fused_ops.train": "train", "fused_ops.bench": "bench"}


class BuildLibrary(build_ext):
    """Compiles fused_ops/_native.so, or says in one line why the package goes without it."""

    def get_ext_filename(self, fullname):
        # No Python ABI in it, so no Python version in its name.
        return os.path.join(*fullname.split(".")) + ".so"

    def run(self):
        wanted = os.environ.get("FUSED_OPS_BUILD_CUDA", "auto")
        if wanted not in ("0", "1", "auto"):
            raise SystemExit(f"FUSED_OPS_BUILD_CUDA={wanted!r} is not allowed; use one of auto, 0, 1")
        if wanted == "0":
            self.say("left out, as FUSED_OPS_BUILD_CUDA=0 asks")
            return
        editable = self.inplace or getattr(self, "editable_mode", False)
        output = native_build.LIBRARY if editable else Path(self.build_lib) / "fused_ops" / "_native.so"
        try:
            native_build.build_library(output)
        except (native_build.BuildError, OSError) as error:
            if wanted == "1":
                message = f"fused_ops: FUSED_OPS_BUILD_CUDA=1, but the CUDA library was not built: {error}"
                raise SystemExit(message) from None
            self.say(f"not built: {error}. The package works without it, on Triton and plain PyTorch")
        else:
            self.say(f"built: {output}")

    def get_outputs(self):
        output = Path(self.build_lib) / "fused_ops" / "_native.so"
        return [str(output)] if output.is_file() else []

    def get_output_mapping(self):
        return {}

    def get_source_files(self):
        return []

    @staticmethod
    def say(text):
        print(f"fused_ops: the CUDA library was {text}.", file=sys.stderr, flush=True)


class Wheel(bdist_wheel):
    """One wheel for every Python, and for every platform where the library is not in it."""

    def get_tag(self):
        platform = super().get_tag()[2]
        built = (Path(self.bdist_dir or ".") / "fused_ops" / "_native.so").is_file() or bool(
            self.get_finalized_command("build_ext").get_outputs()
        )
        return "py3", "none", platform if built else "any"


setup(
    packages=[
        *find_packages(include=["fused_ops", "fused_ops.*"]),
        *PACKAGE_DIRS,
    ],
    package_dir={"fused_ops": "fused_ops", **PACKAGE_DIRS},
    package_data={"fused_ops": ["configs/*.json"], "fused_ops.bench": ["gpu.sh"]},
    ext_modules=[Extension("fused_ops._native", sources=[])],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": Wheel},
)
