"""Builds the CUDA library, the emulator and its tests with ninja. The one place that knows how.

Used by setup.py, by CMakeLists.txt, by the tests and by the resource report. Needs the standard library only
and never imports torch: it reads where torch lies, so it also runs under build isolation.

    python csrc/build.py library     # compile the kernels and link fused_ops/_native.so
    python csrc/build.py emulator    # the kernels on CPU threads, as a Python module
    python csrc/build.py info        # compiler, torch and architectures that would be used
    python csrc/build.py units       # kernel units, one "name;source;definitions" per line
    python csrc/build.py compiler    # for CMake, as the next two: the CUDA compiler
    python csrc/build.py architectures
    python csrc/build.py supported
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fcntl
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "csrc"
BUILD = ROOT / "build"
LIBRARY = ROOT / "fused_ops" / "_native.so"

# Oldest first; the newest gets PTX too, for GPUs that come after it.
SUPPORTED_ARCHITECTURES = ("80", "86", "89", "90", "100", "120")

# Version of what fused_ops/core/native.py and the op files expect of the library; raise both together.
INTERFACE = 4

# The oldest torch whose stable ABI the library is written for: 2.11.
TORCH_MINIMUM = (2, 11)
TORCH_TARGET_VERSION = "0x020b000000000000"

# Least free memory per compile job.
BYTES_PER_JOB = 1536 * 1024**2


class BuildError(RuntimeError):
    """Something needed for the build is missing or failed; the message is for the user."""


@dataclass(frozen=True)
class Unit:
    """One object file made from a kernel source."""

    name: str
    source: str
    definitions: tuple[str, ...] = ()


_TYPES = ("float32", "float16", "bfloat16")
# The convolutions are compiled per element type and kernel size, side by side.
UNITS = (
    Unit("depthwise_sequence", "depthwise/sequence.cu"),
    Unit("depthwise_merge", "depthwise/merge.cu"),
    *(
        Unit(f"depthwise_pointwise_{name}", "depthwise/pointwise.cu", (f"FUSED_OPS_SCALAR={code}",))
        for code, name in enumerate(_TYPES)
    ),
    *(
        Unit(
            f"depthwise_{direction}{size}_{name}",
            f"depthwise/{direction}.cu",
            (f"FUSED_OPS_SCALAR={code}", f"FUSED_OPS_KERNEL={size}"),
        )
        for direction in ("planes_backward", "planes_forward", "backward", "forward")
        for size in (7, 5, 3)
        for code, name in enumerate(_TYPES)
    ),
    Unit("hr_chain_sequence", "hr_chain/sequence.cu"),
    Unit("hr_chain_finish", "hr_chain/finish.cu"),
    *(
        Unit(f"hr_chain_{part}_{name}", f"hr_chain/{part}.cu", (f"FUSED_OPS_SCALAR={code}",))
        for part in ("forward", "low_backward", "maps_backward")
        for code, name in enumerate(_TYPES)
        if name != "float32"
    ),
)


@dataclass(frozen=True)
class Torch:
    """Where torch is installed, read from its files."""

    folder: Path
    version: str
    cuda: str | None

    @property
    def release(self) -> tuple[int, int]:
        major, minor = re.match(r"(\d+)\.(\d+)", self.version).groups()
        return int(major), int(minor)


@dataclass(frozen=True)
class Toolkit:
    """A CUDA compiler that has been seen to compile."""

    nvcc: Path
    root: Path
    version: tuple[int, int]
    architectures: tuple[str, ...]


@dataclass
class Edge:
    """One command of a build: its inputs and its output."""

    output: Path
    command: list[str]
    inputs: list[Path]
    description: str
    depfile: Path | None = None


@dataclass
class Plan:
    """Edges of one build folder, in an order in which they can run."""

    folder: Path
    edges: list[Edge] = field(default_factory=list)

    def add(self, *arguments, **options) -> Path:
        edge = Edge(*arguments, **options)
        self.edges.append(edge)
        return edge.output


def _site_folders() -> list[Path]:
    """Folders in which packages are looked for: the import path, then the environment's own.

    Under pip's build isolation the second still names the environment that the package is installed into.
    """
    folders = [Path(entry or ".") for entry in sys.path]
    folders += [Path(sysconfig.get_paths()[key]) for key in ("platlib", "purelib")]
    return list(dict.fromkeys(folders))


@cache
def find_torch() -> Torch:
    """The torch to build against.

    Raises:
        BuildError: there is none, or it cannot carry the library.
    """
    folder = next(
        (entry / "torch" for entry in _site_folders() if (entry / "torch/version.py").is_file()), None
    )
    if folder is None:
        raise BuildError(
            "torch is not installed here. If it is outside pip's build isolation, run "
            "`python csrc/build.py library` in the checkout after the installation, or install "
            "with `pip install --no-build-isolation`"
        )
    text = (folder / "version.py").read_text()
    version = re.search(r"__version__\s*=\s*'([^']+)'", text).group(1)
    cuda = re.search(r"^cuda[^=]*=\s*'([^']+)'", text, re.MULTILINE)
    torch = Torch(folder, version, cuda.group(1) if cuda else None)
    if torch.release < TORCH_MINIMUM:
        raise BuildError(f"torch is {version}; the CUDA library needs {'.'.join(map(str, TORCH_MINIMUM))}")
    if torch.cuda is None:
        raise BuildError(f"torch {version} is built without CUDA")
    return torch


def _candidates() -> Iterator[tuple[str, Path, bool]]:
    """Compilers in order of preference: (where it was named, path, whether it was asked for by name)."""
    if os.environ.get("FUSED_OPS_NVCC"):
        yield "FUSED_OPS_NVCC", Path(os.environ["FUSED_OPS_NVCC"]), True
        return
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            yield variable, Path(os.environ[variable]) / "bin/nvcc", True
            return
    with contextlib.suppress(BuildError):
        major = find_torch().cuda.split(".")[0]
        for folder in _site_folders():
            nvcc = folder / f"nvidia/cu{major}/bin/nvcc"
            if nvcc.is_file():
                yield "the compiler installed by pip", nvcc, False
    found = shutil.which("nvcc")
    if found:
        yield "PATH", Path(found), False
    default = Path("/usr/local/cuda/bin/nvcc")
    if default.is_file():
        yield "the default folder", default, False


def _run(command: Sequence[str | os.PathLike], **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )


def _host_compiler() -> str:
    compiler = os.environ.get("CXX") or "g++"
    if shutil.which(shlex.split(compiler)[0]) is None:
        raise BuildError(f"there is no C++ compiler ({compiler})")
    return compiler


def _examine(nvcc: Path) -> Toolkit:
    """Compiles a kernel with ``nvcc``: an installation can be incomplete or mix versions.

    Raises:
        BuildError: it cannot compile; the message has its first words about it.
    """
    if not nvcc.is_file():
        raise BuildError(f"{nvcc} does not exist")
    # The result is kept: it costs seconds. Parts of a pip installation change one by one, so all count.
    parts = [nvcc, *(nvcc.parent / name for name in ("ptxas", "../nvvm/bin/cicc", "cudafe++"))]
    stamps = [(str(part), part.stat().st_mtime_ns, part.stat().st_size) for part in parts if part.exists()]
    key = hashlib.sha256(repr((stamps, os.environ.get("CXX"))).encode()).hexdigest()[:16]
    record = BUILD / "toolkits" / f"{key}.json"
    if record.is_file():
        saved = json.loads(record.read_text())
        return Toolkit(nvcc, Path(saved["root"]), tuple(saved["version"]), tuple(saved["architectures"]))
    folder = record.parent / key
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / "probe.cu"
    probe.write_text("#include <cuda_runtime.h>\n__global__ void probe(int* p) { *p = threadIdx.x; }\n")
    version = re.search(r"release (\d+)\.(\d+)", _run([nvcc, "--version"]).stdout)
    if version is None:
        raise BuildError(f"{nvcc} does not say its version")
    listed = re.findall(r"sm_(\d+a?)", _run([nvcc, "--list-gpu-code"]).stdout)
    newest = next((arch for arch in reversed(SUPPORTED_ARCHITECTURES) if arch in listed), None)
    if newest is None:
        raise BuildError(f"{nvcc} supports none of the architectures {', '.join(SUPPORTED_ARCHITECTURES)}")
    host = ["-ccbin", shlex.split(_host_compiler())[0]]
    command = [nvcc, *host, "-std=c++20", f"-arch=sm_{newest}", "-c", probe, "-o", folder / "probe.o"]
    result = _run(command)
    if result.returncode != 0:
        said = next((line for line in result.stdout.splitlines() if line.strip()), "nothing")
        raise BuildError(f"{nvcc} cannot compile a kernel; it says: {said.strip()}")
    top = re.search(r"^#\$ TOP=(.+)$", _run([*command, "--dryrun"]).stdout, re.MULTILINE)
    root = Path(top.group(1).strip()).resolve() if top else nvcc.resolve().parents[1]
    numbers = tuple(map(int, version.groups()))
    toolkit = Toolkit(nvcc, root, numbers, tuple(dict.fromkeys(listed)))
    record.write_text(
        json.dumps({"root": str(root), "version": numbers, "architectures": toolkit.architectures})
    )
    return toolkit


@cache
def find_toolkit() -> Toolkit:
    """The CUDA compiler to use: FUSED_OPS_NVCC, CUDA_HOME, pip's, then PATH's; the first that compiles.

    Raises:
        BuildError: none compiles, or the one asked for by name does not.
    """
    problems = []
    for origin, nvcc, named in _candidates():
        try:
            toolkit = _examine(nvcc)
        except BuildError as error:
            if named:
                raise BuildError(f"{origin}: {error}") from None
            problems.append(str(error))
            continue
        except OSError as error:
            problems.append(f"{nvcc}: {error}")
            continue
        cuda = None
        with contextlib.suppress(BuildError):
            cuda = find_torch().cuda
        if cuda is not None and int(cuda.split(".")[0]) != toolkit.version[0]:
            problem = f"{nvcc} is of CUDA {toolkit.version[0]}.{toolkit.version[1]} and torch of CUDA {cuda}"
            if named:
                raise BuildError(f"{origin}: {problem}")
            problems.append(problem)
            continue
        return toolkit
    if problems:
        raise BuildError("no CUDA compiler works: " + "; ".join(problems))
    raise BuildError(
        'there is no CUDA compiler (nvcc). `pip install "cuda-toolkit[nvcc]"` installs the one that matches '
        "torch"
    )


def present_architectures() -> list[str]:
    """Architectures of the GPUs in this machine, from the driver; empty without a GPU or a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return []
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return []
    found = set()
    for index in range(count.value):
        # 75 and 76 are the driver's names for the compute capability's major and minor number.
        numbers = [ctypes.c_int(0), ctypes.c_int(0)]
        for attribute, number in zip((75, 76), numbers, strict=True):
            driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, index)
        found.add((numbers[0].value, numbers[1].value))
    return [f"{major}{minor}" for major, minor in sorted(found)]


def choose_architectures(
    requested: str, supported: Sequence[str], present: Sequence[str]
) -> tuple[list[str], list[str]]:
    """Architectures to compile machine code for, and those to add PTX of.

    Args:
        requested: text of FUSED_OPS_CUDA_ARCHS, e.g. ``80;9.0;120+PTX``, ``native`` or ``all``; may be empty.
        supported: what the compiler supports.
        present: those of the GPUs in this machine.

    Raises:
        BuildError: an architecture that was asked for is unknown to the compiler or too old for the kernels.
    """
    text = requested.strip().lower()
    if text in ("", "native"):
        usable = [arch for arch in present if int(arch) >= int(SUPPORTED_ARCHITECTURES[0])]
        if usable and all(arch in supported for arch in usable):
            return usable, [usable[-1]]
        if text == "native":
            raise BuildError(
                "FUSED_OPS_CUDA_ARCHS=native, and there is no GPU here that the compiler supports"
            )
    if text in ("", "all"):
        archs = [arch for arch in SUPPORTED_ARCHITECTURES if arch in supported]
        return archs, archs[-1:]
    archs, ptx = [], []
    for entry in re.split(r"[;,\s]+", text):
        if not entry:
            continue
        name, plus, _ = entry.partition("+ptx")
        name = name.removeprefix("sm_").replace(".", "")
        if not re.fullmatch(r"\d+a?", name) or name not in supported:
            raise BuildError(
                f"FUSED_OPS_CUDA_ARCHS: the compiler does not know {entry!r}; it knows {supported}"
            )
        if int(name.rstrip("a")) < int(SUPPORTED_ARCHITECTURES[0]):
            raise BuildError(
                f"FUSED_OPS_CUDA_ARCHS: {entry!r} is older than 80, the oldest that the kernels support"
            )
        archs.append(name)
        if plus:
            ptx.append(name)
    return list(dict.fromkeys(archs)), ptx


def _chosen_architectures(toolkit: Toolkit, archs: str | None = None) -> tuple[list[str], list[str]]:
    requested = os.environ.get("FUSED_OPS_CUDA_ARCHS", "") if archs is None else archs
    return choose_architectures(requested, toolkit.architectures, present_architectures())


def job_count() -> int:
    """Compile jobs at once: MAX_JOBS, or as many as cores and free memory allow."""
    if os.environ.get("MAX_JOBS"):
        return max(1, int(os.environ["MAX_JOBS"]))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        free = int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text()).group(1)) * 1024
    except (OSError, AttributeError):
        return cores
    return max(1, min(cores, free // BYTES_PER_JOB))


def _ninja() -> str | None:
    scripts = Path(sysconfig.get_path("scripts")) / "ninja"
    return str(scripts) if scripts.is_file() else shutil.which("ninja")


def _escape(text: str) -> str:
    return text.replace("$", "$$").replace(":", "$:").replace(" ", "$ ")


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One build at a time in a folder, so that test workers can ask for the same thing side by side."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _content(edges: Sequence[Edge]) -> str:
    """Hash of everything that decides the outputs: commands and the text of every source."""
    digest = hashlib.sha256()
    for edge in edges:
        digest.update(repr((str(edge.output), edge.command)).encode())
    for path in sorted(SOURCES.rglob("*")):
        if path.suffix in (".cu", ".cpp", ".h"):
            digest.update(str(path.relative_to(SOURCES)).encode() + path.read_bytes())
    return digest.hexdigest()


def execute(plan: Plan, *, verbose: bool = False) -> None:
    """Runs what is out of date, with ninja where there is one.

    Raises:
        BuildError: a command failed; the message has its output.
    """
    with _locked(plan.folder):
        stamp = plan.folder / "content.sha256"
        content = _content(plan.edges)
        complete = all(edge.output.is_file() for edge in plan.edges)
        if complete and stamp.is_file() and stamp.read_text() == content:
            return
        for edge in plan.edges:
            edge.output.parent.mkdir(parents=True, exist_ok=True)
        ninja = _ninja()
        if ninja is None:
            _execute_without_ninja(plan)
        else:
            _write_ninja(plan)
            result = _run([ninja, "-C", plan.folder, f"-j{job_count()}", *(["-v"] if verbose else [])])
            if verbose:
                print(result.stdout)
            if result.returncode != 0:
                raise BuildError(f"the compiler failed:\n{result.stdout[-4000:]}")
        stamp.write_text(content)


def _write_ninja(plan: Plan) -> None:
    lines = ["ninja_required_version = 1.5", ""]
    for index, edge in enumerate(plan.edges):
        command = " ".join(shlex.quote(part) for part in edge.command).replace("$", "$$")
        lines += [f"rule r{index}", f"  command = {command}", f"  description = {edge.description}"]
        if edge.depfile is not None:
            lines += [f"  depfile = {_escape(str(edge.depfile))}", "  deps = gcc"]
        inputs = " ".join(_escape(str(path)) for path in edge.inputs)
        lines += [f"build {_escape(str(edge.output))}: r{index} {inputs}", ""]
    text = "\n".join(lines)
    path = plan.folder / "build.ninja"
    if not path.is_file() or path.read_text() != text:
        path.write_text(text)


def _execute_without_ninja(plan: Plan) -> None:
    """Everything, in waves of edges whose inputs are ready."""
    pending = list(plan.edges)
    outputs = {edge.output for edge in pending}
    with ThreadPoolExecutor(job_count()) as pool:
        while pending:
            ready = [edge for edge in pending if not outputs.intersection(edge.inputs)]
            for edge, result in zip(ready, pool.map(lambda edge: _run(edge.command), ready), strict=True):
                if result.returncode != 0:
                    raise BuildError(f"the compiler failed:\n{result.stdout[-4000:]}")
                outputs.discard(edge.output)
            pending = [edge for edge in pending if edge not in ready]


def _nvcc_object(plan: Plan, toolkit: Toolkit, unit: Unit, targets: Sequence[str], suffix: str = "") -> Path:
    output = plan.folder / f"{unit.name}{suffix}.o"
    depfile = output.with_suffix(".d")
    source = SOURCES / unit.source
    command = [
        str(toolkit.nvcc),
        *("-ccbin", shlex.split(_host_compiler())[0]),
        *("-std=c++20", "-O3", "-lineinfo", "-Xfatbin", "-compress-all"),
        *("-Xcompiler", "-fPIC,-Wall,-Wextra,-fvisibility=hidden"),
        *targets,
        *(f"-D{definition}" for definition in unit.definitions),
        *("-MD", "-MF", str(depfile), "-c", str(source), "-o", str(output)),
    ]
    return plan.add(output, command, [source], f"nvcc {unit.name}{suffix}", depfile=depfile)


def _targets(archs: Sequence[str], ptx: Sequence[str]) -> list[str]:
    targets: list[str] = []
    for arch in archs:
        code = f"[sm_{arch},compute_{arch}]" if arch in ptx else f"sm_{arch}"
        targets += ["-gencode", f"arch=compute_{arch},code={code}"]
    return targets


def _runtime_library(torch: Torch, toolkit: Toolkit) -> Path:
    """The shared CUDA runtime to link with: that of torch, which is loaded before the library."""
    name = f"libcudart.so.{toolkit.version[0]}"
    folders = [torch.folder.parent / f"nvidia/cu{toolkit.version[0]}/lib"]
    folders += [toolkit.root / part for part in ("lib", "lib64", "targets/x86_64-linux/lib")]
    for folder in folders:
        if (folder / name).exists():
            return folder / name
    raise BuildError(f"{name} was not found beside torch or the CUDA compiler")


def _kernel_objects(toolkit: Toolkit, archs: Sequence[str], ptx: Sequence[str]) -> dict[str, Path]:
    version = f"{toolkit.version[0]}.{toolkit.version[1]}"
    targets = "-".join([*archs, *(f"ptx{entry}" for entry in ptx)])
    plan = Plan(BUILD / "kernels" / f"cuda{version}-{targets}")
    objects = {unit.name: _nvcc_object(plan, toolkit, unit, _targets(archs, ptx)) for unit in UNITS}
    execute(plan)
    return objects


def compile_kernels(archs: Sequence[str] = SUPPORTED_ARCHITECTURES) -> dict[str, Path]:
    """Every kernel unit compiled for ``archs``, without torch: unit name to object file.

    Raises:
        BuildError: there is no compiler, it does not support an architecture, or it failed.
    """
    toolkit = find_toolkit()
    missing = [arch for arch in archs if arch not in toolkit.architectures]
    if missing:
        raise BuildError(f"{toolkit.nvcc} does not support the architectures {', '.join(missing)}")
    # With the PTX that a library for the same architectures has, the two share their object files.
    return _kernel_objects(toolkit, archs, archs[-1:])


def build_library(output: Path = LIBRARY, *, archs: str | None = None, verbose: bool = False) -> Path:
    """Compiles the kernels and links the torch library.

    Args:
        output: where to put it.
        archs: as FUSED_OPS_CUDA_ARCHS, which is used when this is None.

    Raises:
        BuildError: something is missing, or the compiler failed.
    """
    torch = find_torch()
    toolkit = find_toolkit()
    chosen, ptx = _chosen_architectures(toolkit, archs)
    runtime = _runtime_library(torch, toolkit)
    version = f"{toolkit.version[0]}.{toolkit.version[1]}"
    key = hashlib.sha256(repr((torch, toolkit, chosen, ptx)).encode()).hexdigest()[:8]
    plan = Plan(BUILD / "native" / f"torch{torch.version}-cuda{version}-{key}")
    objects = list(_kernel_objects(toolkit, chosen, ptx).values())
    compiler = shlex.split(_host_compiler())
    bindings = plan.folder / "bindings.o"
    depfile = bindings.with_suffix(".d")
    include = torch.folder / "include"
    definitions = {
        "TORCH_TARGET_VERSION": TORCH_TARGET_VERSION,
        "USE_CUDA": "1",
        "FUSED_OPS_INTERFACE": str(INTERFACE),
        "FUSED_OPS_CUDA_VERSION": f'"{version}"',
        "FUSED_OPS_TORCH_VERSION": f'"{torch.version}"',
        "FUSED_OPS_ARCHITECTURES": f'"{" ".join(chosen)}"',
        "FUSED_OPS_PTX": f'"{" ".join(ptx)}"',
    }
    objects.append(
        plan.add(
            bindings,
            [
                *compiler,
                *("-std=c++20", "-O2", "-fPIC", "-Wall", "-Wextra", "-fvisibility=hidden"),
                *("-isystem", str(include)),
                *(f"-D{name}={value}" for name, value in definitions.items()),
                *("-MD", "-MF", str(depfile), "-c", str(SOURCES / "bindings.cpp"), "-o", str(bindings)),
            ],
            [SOURCES / "bindings.cpp"],
            "g++ bindings",
            depfile=depfile,
        )
    )
    linked = plan.add(
        plan.folder / "_native.so",
        [
            *compiler,
            *("-shared", "-o", str(plan.folder / "_native.so")),
            *map(str, objects),
            *(f"-L{torch.folder / 'lib'}", "-ltorch_cpu", "-ltorch_cuda", "-lc10"),
            *(f"-L{runtime.parent}", f"-l:{runtime.name}"),
        ],
        objects,
        "link _native.so",
    )
    execute(plan, verbose=verbose)
    output.parent.mkdir(parents=True, exist_ok=True)
    if not output.is_file() or output.read_bytes() != linked.read_bytes():
        # Never written in place: a process may have the old file mapped.
        temporary = output.with_suffix(f".{os.getpid()}.tmp.so")
        shutil.copyfile(linked, temporary)
        temporary.replace(output)
    return output


SANITIZERS = {
    None: (),
    "address": ("-fsanitize=address", "-fno-omit-frame-pointer"),
    "thread": ("-fsanitize=thread",),
}

# Programs under csrc/emulator/tests: name, source, definitions, whether they use the operators' kernels.
EMULATOR_TESTS = {
    "block_reduction": ("emulator/tests/block_reduction.cpp", (), False),
    "block_reduction_without_barrier": ("emulator/tests/block_reduction.cpp", ("WITHOUT_BARRIER",), False),
    "depthwise": ("emulator/tests/depthwise.cpp", (), True),
    "hr_chain": ("emulator/tests/hr_chain.cpp", (), True),
}


def _emulated(plan: Plan, unit: Unit, flags: Sequence[str], prefix: str = "") -> Path:
    compiler = shlex.split(_host_compiler())
    output = plan.folder / f"{prefix}{unit.name}.o"
    depfile = output.with_suffix(".d")
    source = SOURCES / unit.source
    command = [
        *compiler,
        *("-x", "c++", "-std=c++20", "-O1", "-fPIC", "-Wall", "-Wextra", "-DFUSED_OPS_EMULATOR"),
        *flags,
        *(f"-D{definition}" for definition in unit.definitions),
        *("-MD", "-MF", str(depfile), "-c", str(source), "-o", str(output)),
    ]
    return plan.add(output, command, [source], f"g++ {unit.name}", depfile=depfile)


def _emulated_kernels(sanitizer: str | None) -> list[Path]:
    """Every kernel unit for CPU threads; with a sanitizer in one element type, with "thread" for 3x3 only."""
    plan = Plan(BUILD / "emulator" / f"kernels-{sanitizer or 'plain'}")
    flags = ["-fvisibility=hidden", *SANITIZERS[sanitizer]]
    units = UNITS
    if sanitizer is not None:
        flags.append("-DFUSED_OPS_FLOAT16_ONLY")
        others = {f"FUSED_OPS_SCALAR={code}" for code, name in enumerate(_TYPES) if name != "float16"}
        if sanitizer == "thread":
            flags.append("-DFUSED_OPS_3X3_ONLY")
            others |= {"FUSED_OPS_KERNEL=5", "FUSED_OPS_KERNEL=7"}
        units = tuple(unit for unit in UNITS if others.isdisjoint(unit.definitions))
    objects = [_emulated(plan, unit, flags) for unit in units]
    execute(plan)
    return objects


def environment_tag() -> str:
    """Name of the interpreter and environment that a Python module is built for."""
    prefix = hashlib.sha256(sys.prefix.encode()).hexdigest()[:8]
    return f"{sys.implementation.cache_tag}-{prefix}"


def build_emulator(out_dir: Path | None = None) -> Path:
    """The Python module ``fused_ops_emulator``: the kernels on CPU threads. Returns its path.

    Raises:
        BuildError: pybind11 or a C++ compiler is missing, or the compiler failed.
    """
    spec = find_spec("pybind11")
    if spec is None or spec.origin is None:
        raise BuildError("the emulator needs pybind11: pip install pybind11")
    plan = Plan(Path(out_dir) if out_dir else BUILD / "emulator" / environment_tag())
    objects = _emulated_kernels(None)
    includes = (Path(spec.origin).parent / "include", Path(sysconfig.get_paths()["include"]))
    module = Unit("module", "emulator/module.cpp")
    flags = ["-fvisibility=hidden", *(f"-isystem{path}" for path in includes)]
    objects.append(_emulated(plan, module, flags))
    output = plan.folder / f"fused_ops_emulator{sysconfig.get_config_var('EXT_SUFFIX')}"
    plan.add(
        output,
        [*shlex.split(_host_compiler()), "-shared", "-o", str(output), *map(str, objects), "-pthread"],
        objects,
        "link fused_ops_emulator",
    )
    execute(plan)
    return output


def build_emulator_tests(sanitizer: str | None = None, out_dir: Path | None = None) -> dict[str, Path]:
    """Programs that run kernels on CPU threads, built with ``sanitizer``: None, "address" or "thread".

    Raises:
        BuildError: there is no C++ compiler, or it failed.
    """
    flags = SANITIZERS[sanitizer]
    plan = Plan(Path(out_dir) if out_dir else BUILD / "emulator" / f"tests-{sanitizer or 'plain'}")
    kernels = _emulated_kernels(sanitizer)
    programs = {}
    for name, (source, definitions, uses_kernels) in EMULATOR_TESTS.items():
        objects = [_emulated(plan, Unit(name, source, definitions), flags, prefix="test_")]
        objects += kernels if uses_kernels else []
        programs[name] = plan.folder / name
        command = [
            *shlex.split(_host_compiler()),
            *flags,
            "-o",
            str(programs[name]),
            *map(str, objects),
            "-pthread",
        ]
        plan.add(programs[name], command, objects, f"link {name}")
    execute(plan)
    return programs


def information() -> dict[str, object]:
    """What a build would use, or why it cannot be done."""
    found: dict[str, object] = {"jobs": job_count(), "ninja": _ninja()}
    try:
        torch, toolkit = find_torch(), find_toolkit()
        archs, ptx = _chosen_architectures(toolkit)
        found |= {"torch": torch.version, "nvcc": str(toolkit.nvcc), "cuda": toolkit.version}
        found |= {"architectures": archs, "ptx": ptx}
    except BuildError as error:
        found["problem"] = str(error)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "what",
        choices=("library", "emulator", "info", "units", "compiler", "architectures", "supported"),
    )
    parser.add_argument("--archs", help="as FUSED_OPS_CUDA_ARCHS")
    parser.add_argument("--verbose", action="store_true")
    options = parser.parse_args(arguments)
    try:
        if options.what == "library":
            print(build_library(archs=options.archs, verbose=options.verbose))
        elif options.what == "emulator":
            print(build_emulator())
        elif options.what == "units":
            for unit in UNITS:
                print(f"{unit.name};{unit.source};{','.join(unit.definitions)}")
        elif options.what == "compiler":
            print(find_toolkit().nvcc)
        elif options.what == "architectures":
            print(
                ";".join(f"{arch}-real" for arch in _chosen_architectures(find_toolkit(), options.archs)[0])
            )
        elif options.what == "supported":
            known = find_toolkit().architectures
            print(";".join(arch for arch in SUPPORTED_ARCHITECTURES if arch in known))
        else:
            print(json.dumps(information(), indent=2))
    except BuildError as error:
        print(f"fused_ops: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
