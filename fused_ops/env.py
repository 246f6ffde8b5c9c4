"""``python -m fused_ops.env``: versions, devices, and which backends run here, for bug reports."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from fused_ops.core.environment import VARIABLES, environment_report


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fused-ops env", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON list with the report")
    options = parser.parse_args(arguments)
    report = environment_report()
    if options.json:
        print(json.dumps([report], indent=2))
        return 0
    for package, version in report["packages"].items():
        print(f"{package:12} {version or 'not installed'}")
    for key in ("commit", "python", "platform", "cpu_count", "cuda", "cudnn", "driver"):
        value = report[key]
        print(f"{key:12} {'-' if value is None else value}")
    for index, gpu in enumerate(report["gpus"]):
        memory = gpu["memory_bytes"] / 2**30
        print(
            f"GPU {index:<8} {gpu['name']}, compute capability {gpu['compute_capability']}, {memory:.0f} GiB"
        )
    if not report["gpus"]:
        print("GPU          none")
    print("\nbackend      runs  why")
    for name, state in report["backends"].items():
        print(f"{name:12} {'yes' if state['runs'] else 'no':5} {state['reason']}")
    print("\nvariable                  value      meaning")
    for name, value in report["variables"].items():
        print(f"{name:25} {value or '(unset)':10} {VARIABLES[name].description}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
