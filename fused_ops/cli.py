"""The ``fused-ops`` command: each subcommand is the module ``fused_ops.<name>`` (some are the bench's)."""

from __future__ import annotations

import importlib.util
import runpy
import sys

SUBCOMMANDS = {
    "train": "train a model, on real data, on the CPU if there is no GPU",
    "models": "list the models with parameters, MACs and published figures",
    "explain": "say which backend runs each operator of a model, and why",
    "accelerate": "say what accelerate() exchanges in a model of the zoo, of timm or of torchvision, and why",
    "tune": "measure the tile choices of the kernels on this GPU",
    "bench": "measure operators and models, count traffic, report",
    "env": "print versions, devices and which backends run here",
}
# What each subcommand needs beyond the core, to name the extra that installs it.
_NEEDS = {"train": ("train", "torchvision"), "models": ("models", "timm"), "explain": ("models", "timm")}
_NEEDS["accelerate"] = ("models", "timm")
_IN_BENCH = ("tune", "accelerate")


def usage() -> str:
    lines = ["usage: fused-ops COMMAND [options]", ""]
    lines += [f"  {name:10} {description}" for name, description in SUBCOMMANDS.items()]
    lines += ["", "`fused-ops COMMAND --help` lists a command's options."]
    return "\n".join(lines)


def main() -> int:
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0
    command = arguments[0]
    if command not in SUBCOMMANDS:
        print(f"fused-ops: unknown command {command!r}\n\n{usage()}", file=sys.stderr)
        return 2
    extra, package = _NEEDS.get(command, ("", ""))
    if package and importlib.util.find_spec(package) is None:
        print(
            f"fused-ops {command} needs {package}: install it with pip install 'fused-ops[{extra}]'",
            file=sys.stderr,
        )
        return 2
    sys.argv = [f"fused-ops {command}", *arguments[1:]]
    module = f"bench.{command}" if command in _IN_BENCH else command
    runpy.run_module(f"fused_ops.{module}", run_name="__main__", alter_sys=False)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
