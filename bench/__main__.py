"""``fused-ops bench COMMAND``: each command is the module ``fused_ops.bench.<name>`` with a ``main``."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "ops": "time operators against every alternative, check them, and weigh their memory",
    "models": "time whole models, training and inference",
    "results": "list the measurements that are there",
    "report": "tables, plots and one HTML page of the measurements",
    "traffic": "count the bytes that kernels move, without a GPU",
    "resources": "registers, spills and shared memory of every kernel, without a GPU",
    "limits": "predict times from bytes and operations per GPU, and count launches per model step",
    "dispatch": "make the table of `auto` from the measurements, or check it",
    "gate": "compare measurements with the committed ones of the same GPU",
}


def usage() -> str:
    lines = ["usage: fused-ops bench COMMAND [options]", ""]
    lines += [f"  {name:10} {description}" for name, description in COMMANDS.items()]
    lines += ["", "`fused-ops bench COMMAND --help` lists a command's options; each takes --json."]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments and arguments[0] in ("-h", "--help"):
        print(usage())
        return 0
    if not arguments or arguments[0] not in COMMANDS:
        what = f"unknown command {arguments[0]!r}" if arguments else "a command is missing"
        print(f"fused-ops bench: {what}; use one of {', '.join(COMMANDS)}\n\n{usage()}", file=sys.stderr)
        return 2
    try:
        # Imported only now: each command needs other packages.
        return importlib.import_module(f"fused_ops.bench.{arguments[0]}").main(arguments[1:])
    except KeyboardInterrupt:
        print(f"fused-ops bench {arguments[0]}: interrupted; finished cases are written", file=sys.stderr)
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
