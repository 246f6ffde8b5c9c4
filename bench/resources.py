"""What compiled kernels use of a multiprocessor: registers, spills, shared memory. Needs a compiler, no GPU.

python -m fused_ops.bench.resources                                   # every kernel, every architecture
python -m fused_ops.bench.resources --backend triton --archs 80 90
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fused_ops.core import library, native
from fused_ops.core.files import write_atomically


@dataclass(frozen=True)
class Resources:
    """One compiled kernel on one architecture.

    Attributes:
        op: operator family.
        backend: ``cuda`` or ``triton``.
        kernel: name of the kernel function.
        config: template or compile-time arguments.
        arch: architecture, as in ``sm_90``.
        registers: per thread.
        spill_bytes: stack and local memory per thread; registers that did not fit, or an array indexed at run
            time.
        shared_bytes: shared memory per block, with what the system reserves (1024 from sm_90 on); of
            CUDA kernels the static part.
        threads: of a block, at most; 0 where the compiler did not say.
        occupancy: share of a multiprocessor's warps that fit at once, by registers, shared memory and blocks.
    """

    op: str
    backend: str
    kernel: str
    config: str
    arch: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    threads: int = 0
    occupancy: float | None = None


class Multiprocessor(NamedTuple):
    """What one multiprocessor holds at once: warps, blocks, bytes of shared memory."""

    warps: int
    blocks: int
    shared_bytes: int


# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
MULTIPROCESSORS = {
    "sm_80": Multiprocessor(64, 32, 164 * 1024),
    "sm_86": Multiprocessor(48, 16, 100 * 1024),
    "sm_89": Multiprocessor(48, 24, 100 * 1024),
    "sm_90": Multiprocessor(64, 32, 228 * 1024),
    "sm_100": Multiprocessor(64, 32, 228 * 1024),
    "sm_120": Multiprocessor(48, 24, 100 * 1024),
}
REGISTERS = 64 * 1024


def occupancy(arch: str, threads: int, registers: int, shared_bytes: int) -> float | None:
    """Share of the warps of a multiprocessor that fit at once; None for an unknown one or unknown threads."""
    limits = MULTIPROCESSORS.get(arch)
    if limits is None or threads < 1:
        return None
    warps = -(-threads // 32)
    # Registers are given out per warp in units of 256, from four equal parts of the file.
    per_warp = -(-registers * 32 // 256) * 256
    by_registers = (REGISTERS // 4 // per_warp) * 4 // warps if registers else limits.blocks
    by_shared = limits.shared_bytes // shared_bytes if shared_bytes else limits.blocks
    blocks = min(limits.warps // warps, by_registers, by_shared, limits.blocks)
    return blocks * warps / limits.warps


def parse_threads(text: str) -> dict[tuple[str, str], int]:
    """Threads of a block, at most, by architecture and mangled function name.

    Args:
        text: output of ``cuobjdump --dump-elf``.
    """
    found: dict[tuple[str, str], int] = {}
    arch = function = ""
    wanted = False
    for line in text.splitlines():
        if match := re.match(r"\s*arch = (sm_\w+)", line):
            arch = match.group(1)
        elif match := re.match(r"\.nv\.info\.(\S+)", line):
            function = match.group(1)
        elif match := re.match(r"\s*Attribute:\s*EIATTR_(\w+)", line):
            wanted = match.group(1) in ("MAX_THREADS", "REQNTID")
        elif wanted and (match := re.match(r"\s*Value:\s*0x(\w+) 0x(\w+) 0x(\w+)", line)):
            x, y, z = (int(number, 16) for number in match.groups())
            found[arch, function] = x * y * z
            wanted = False
    return found


def find_cuobjdump() -> Path:
    """The program that reads resource usage out of compiled kernels: Triton's wheel carries one.

    Raises:
        RuntimeError: there is none.
    """
    spec = find_spec("triton")
    if spec is not None and spec.origin is not None:
        bundled = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump"
        if bundled.is_file():
            return bundled
    found = shutil.which("cuobjdump")
    if found is None:
        raise RuntimeError("cuobjdump was found neither in Triton's package nor on PATH")
    return Path(found)


def _demangle(names: list[str]) -> list[str]:
    if shutil.which("c++filt") is None:
        return names
    result = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return result.stdout.splitlines()


def _kernel_and_config(function: str) -> tuple[str, str]:
    """``depthwise_forward`` and its template arguments from a demangled function name."""
    match = re.search(r"(\w+)(?:<(.*)>)?\(", function.replace("(anonymous namespace)::", ""))
    if match is None:
        return function, ""
    return match.group(1), (match.group(2) or "").replace("fused_ops::", "")


def parse_resource_usage(
    text: str, op: str, backend: str, threads: Mapping[tuple[str, str], int] | None = None
) -> list[Resources]:
    """Rows from the output of ``cuobjdump --dump-resource-usage``.

    Args:
        threads: by architecture and function, from :func:`parse_threads`.
    """
    found = []
    arch = ""
    name = ""
    for line in text.splitlines():
        if match := re.match(r"\s*arch = (sm_\w+)", line):
            arch = match.group(1)
        elif match := re.match(r"\s*Function (\S+?):", line):
            name = match.group(1)
        elif "REG:" in line:
            numbers = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
            found.append((name, arch, numbers))
    rows = []
    for (mangled, arch, numbers), name in zip(found, _demangle([entry[0] for entry in found]), strict=True):
        kernel, config = _kernel_and_config(name)
        spill = numbers["STACK"] + numbers["LOCAL"]
        block = (threads or {}).get((arch, mangled), 0)
        registers, shared = numbers["REG"], numbers["SHARED"]
        share = occupancy(arch, block, registers, shared)
        rows.append(Resources(op, backend, kernel, config, arch, registers, spill, shared, block, share))
    return rows


def _usage(cuobjdump: Path, path: str | Path, op: str, backend: str) -> list[Resources]:
    """Rows of every kernel in an object file or cubin."""
    texts = []
    for flag in ("--dump-resource-usage", "--dump-elf"):
        result = subprocess.run([str(cuobjdump), flag, str(path)], capture_output=True, text=True)
        if result.returncode != 0 and "does not contain device code" not in result.stdout + result.stderr:
            raise RuntimeError(f"cuobjdump failed on {path}: {result.stderr.strip()}")
        texts.append(result.stdout)
    return parse_resource_usage(texts[0], op, backend, parse_threads(texts[1]))


def native_resources(
    archs: Sequence[str] | None = None, families: Sequence[str] | None = None
) -> list[Resources]:
    """Compiles every CUDA kernel, all template instances, and reads what each uses.

    Args:
        archs: e.g. ``["80", "90"]``; None for all that the project supports.
        families: operators whose kernels are read; None for all.

    Raises:
        RuntimeError: there is no compiler or no cuobjdump; the message says which.
    """
    tools = native.build_tools()
    objects = tools.compile_kernels(tuple(archs or tools.SUPPORTED_ARCHITECTURES))
    cuobjdump = find_cuobjdump()
    rows = []
    for unit in tools.UNITS:
        family = Path(unit.source).parts[0]
        if families is None or family in families:
            rows += _usage(cuobjdump, objects[unit.name], family, "cuda")
    return rows


def triton_resources(
    archs: Sequence[str] | None = None, families: Sequence[str] | None = None
) -> list[Resources]:
    """Compiles the Triton kernels that the operators' sample calls launch, and reads what each uses.

    Args:
        archs: e.g. ``["80", "90"]``; None for all that the project supports.
        families: operators whose kernels are compiled; None for all.

    Raises:
        RuntimeError: Triton is interpreting in this process, or there is no cuobjdump.
    """
    cuobjdump = find_cuobjdump()
    rows = []
    for name in (*library.operators(), *library.blocks()):
        if families is not None and name not in families:
            continue
        for kernel in _kernels_of(name):
            for arch in archs or native.build_tools().SUPPORTED_ARCHITECTURES:
                cubin, shared = kernel.compile(int(arch))
                with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                    file.write(cubin)
                    file.flush()
                    (row,) = _usage(cuobjdump, file.name, name, "triton")
                # Triton's shared memory is dynamic, which the compiled kernel does not show.
                shared += row.shared_bytes
                threads = 32 * dict(kernel.options).get("num_warps", 4)
                share = occupancy(f"sm_{arch}", threads, row.registers, shared)
                row = replace(row, kernel=kernel.name, config=kernel.config, arch=f"sm_{arch}")
                row = replace(row, shared_bytes=shared)
                rows.append(replace(row, threads=threads, occupancy=share))
    return rows


def _kernels_of(name: str) -> list[Any]:
    """The kernels of an operator's sample calls; of a block, those that its families' calls do not launch."""
    from fused_ops.bench.triton_compile import specialisations

    operators = library.operators()
    if name in operators:
        return specialisations(operators[name], torch.bfloat16)
    block = library.blocks()[name]
    known = {
        (kernel.name, kernel.config)
        for family in block.families
        for kernel in specialisations(operators[family], torch.bfloat16)
    }
    found = {(kernel.name, kernel.config): kernel for kernel in specialisations(block, torch.bfloat16)}
    return [kernel for key, kernel in found.items() if key not in known]


def format_table(rows: Sequence[Resources]) -> str:
    """The rows as aligned text, spills marked."""
    header = list(Resources.__dataclass_fields__)
    lines: list[list[Any]] = [header, *(list(asdict(row).values()) for row in rows)]
    for line in lines[1:]:
        line[-1] = "" if line[-1] is None else f"{line[-1]:.0%}"
    widths = [max(len(str(line[column])) for line in lines) for column in range(len(header))]
    text = []
    for index, line in enumerate(lines):
        cells = "  ".join(str(cell).ljust(width) for cell, width in zip(line, widths, strict=True))
        text.append(cells.rstrip() + ("  spills" if index and rows[index - 1].spill_bytes else ""))
    return "\n".join(text)


def changes(before: Sequence[Resources], after: Sequence[Resources]) -> list[dict[str, Any]]:
    """What differs between two reports: rows with op, backend, kernel, config, arch, before and after.

    ``before`` or ``after`` is None where the kernel, or this choice of its compile-time arguments, is only in
    the other report; otherwise (registers, spill_bytes, shared_bytes).
    """
    keys = ("op", "backend", "kernel", "config", "arch")
    figures = ("registers", "spill_bytes", "shared_bytes")
    tables = [
        {
            tuple(getattr(row, key) for key in keys): tuple(getattr(row, name) for name in figures)
            for row in rows
        }
        for rows in (before, after)
    ]
    found = []
    for key in dict.fromkeys((*tables[0], *tables[1])):
        old, new = (table.get(key) for table in tables)
        if old != new:
            found.append({**dict(zip(keys, key, strict=True)), "before": old, "after": new})
    return found


def format_changes(rows: Sequence[dict[str, Any]]) -> str:
    """The changes as aligned text: registers/spills/shared before and after."""
    if not rows:
        return "no kernel uses more or less than in the committed report"
    header = list(rows[0])

    def cell(value: Any) -> str:
        if isinstance(value, tuple):
            return "{} registers, {} spilled, {} shared".format(*value)
        return "-" if value is None else str(value)

    lines = [header, *([cell(row[key]) for key in header] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


PACKAGE = Path(library.__file__).resolve().parents[1]


def _with_shared(files: list[Path]) -> list[Path]:
    """``files`` and those of the core with Triton code that they import, directly or through one another."""
    found = set(files)
    waiting = list(files)
    while waiting:
        imported = re.findall(r"^from fused_ops\.core\.(\w+) import", waiting.pop().read_text(), re.MULTILINE)
        for name in imported:
            path = PACKAGE / "core" / f"{name}.py"
            if path not in found and "triton_support" in path.read_text() + name:
                found.add(path)
                waiting.append(path)
    return sorted(found)


def _with_headers(source: Path) -> set[Path]:
    """A CUDA source and the headers beside it that it includes, directly or through one another."""
    found = {source}
    waiting = [source]
    while waiting:
        path = waiting.pop()
        for name in re.findall(r'^ *# *include "(.+)"', path.read_text(), re.MULTILINE):
            header = (path.parent / name).resolve()
            # The emulator is for other compilers.
            if header not in found and header.parent.name != "emulator":
                found.add(header)
                waiting.append(header)
    return found


def source_digests() -> dict[str, str]:
    """``"<family> <backend>"`` -> digest of the files from which that family's kernels are compiled."""
    of_cuda: dict[str, set[Path]] = {}
    for unit in native.build_tools().UNITS:
        source = native.SOURCES / unit.source
        # Others than these hold launch sequences, and no kernel.
        if "__global__" in source.read_text():
            of_cuda.setdefault(f"{source.parent.name} cuda", set()).update(_with_headers(source))
    found = {family: sorted(files) for family, files in of_cuda.items()}
    for name, operator in library.operators().items():
        folder = Path(sys.modules[operator.function.__module__].__file__).parent
        if files := list(folder.glob("triton*.py")):
            found[f"{name} triton"] = _with_shared(files)
    for name, block in library.blocks().items():
        found[f"{name} triton"] = sorted({path for of in block.families for path in found[f"{of} triton"]})
    return {
        family: hashlib.sha256(b"".join(path.read_bytes() for path in sorted(files))).hexdigest()
        for family, files in found.items()
    }


def report_path() -> Path:
    from fused_ops.bench.results import results_root

    return results_root() / "resources.json"


def read_report(path: Path) -> tuple[dict[str, str], list[Resources]]:
    """Digests and rows of a report that :func:`write_report` wrote; nothing where there is none."""
    if not path.is_file():
        return {}, []
    content = json.loads(path.read_text())
    return content["sources"], [Resources(**row) for row in content["rows"]]


def committed(backend: str | None, archs: Sequence[str] | None, path: Path | None = None) -> list[Resources]:
    """The rows of the committed report, ``bench/results/resources.json``, for these kernels."""
    _, rows = read_report(path or report_path())
    wanted = {f"sm_{arch}" for arch in archs or ()}
    return [row for row in rows if backend in (None, row.backend) and (not wanted or row.arch in wanted)]


def write_report(path: Path) -> list[str]:
    """Bring a report up to date: families whose sources changed are compiled, for every architecture.

    Returns:
        The families that were compiled, as in :func:`source_digests`.
    """
    digests = source_digests()
    known, rows = read_report(path)
    stale = [family for family, digest in digests.items() if known.get(family) != digest]
    kept = [row for row in rows if f"{row.op} {row.backend}" in digests.keys() - set(stale)]
    for backend, compiled in (("cuda", native_resources), ("triton", triton_resources)):
        families = [name for name, _, of in (family.partition(" ") for family in stale) if of == backend]
        if families:
            kept += compiled(None, families)
    kept.sort(key=lambda row: (row.op, row.backend, row.kernel, row.config, row.arch))
    # One row to a line: a file that can be compared and is not ten times as long.
    lines = ",\n".join(json.dumps(asdict(row)) for row in kept)
    text = f'{{"sources": {json.dumps(digests, sort_keys=True)},\n"rows": [\n{lines}\n]}}\n'
    write_atomically(path, lambda file: file.write(text.encode()))
    return stale


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fused-ops bench resources", description=__doc__.splitlines()[0])
    names = sorted((*library.operators(), *library.blocks()))
    parser.add_argument("--archs", nargs="*", help="architectures, e.g. 80 90; all supported ones by default")
    parser.add_argument("--backend", choices=("cuda", "triton"), help="only the kernels of one backend")
    parser.add_argument("--op", nargs="+", choices=names, help="only these operators")
    parser.add_argument("--json", action="store_true", help="print one JSON list")
    parser.add_argument(
        "--changes", action="store_true", help="print only what differs from the committed report"
    )
    parser.add_argument(
        "--write", action="store_true", help="bring the committed report up to date, for every architecture"
    )
    options = parser.parse_args(arguments)
    rows = []
    try:
        if options.write:
            stale = write_report(report_path())
            print(f"{report_path()}: compiled {', '.join(stale) or 'nothing, it is up to date'}")
            return 1 if any(row.spill_bytes for row in committed(None, None)) else 0
        if options.backend != "triton":
            rows += native_resources(options.archs, options.op)
        if options.backend != "cuda":
            rows += triton_resources(options.archs, options.op)
    except RuntimeError as error:
        print(f"fused-ops bench resources: {error}", file=sys.stderr)
        return 2
    if options.changes:
        known = committed(options.backend, options.archs)
        found = changes([row for row in known if row.op in (options.op or [row.op])], rows)
        print(json.dumps(found, indent=2) if options.json else format_changes(found))
    else:
        print(json.dumps([asdict(row) for row in rows], indent=2) if options.json else format_table(rows))
    return 1 if any(row.spill_bytes for row in rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
