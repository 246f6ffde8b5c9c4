"""``python -m fused_ops.explain MODEL``: per operator call of a model, which backend runs and why."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

import torch

from fused_ops.core.backends import BACKENDS, BackendUnavailableError, backend
from fused_ops.core.explain import explain


def main(arguments: Sequence[str] | None = None) -> int:
    # Not at the top: fused_ops without its extras has no models.
    from fused_ops.models.named import add_input_options, check_input_options, prepare

    parser = argparse.ArgumentParser(prog="fused-ops explain", description=__doc__)
    parser.add_argument("model", help="of the zoo (see `fused-ops models`), timm/NAME or torchvision/NAME")
    add_input_options(parser)
    parser.add_argument("--backend", choices=("auto", *BACKENDS), default=None, help="as FUSED_OPS_BACKEND")
    parser.add_argument("--json", action="store_true", help="print one JSON list with a row per call")
    options = parser.parse_args(arguments)
    check_input_options(parser, options)
    try:
        model, image, words = prepare(options.model, options)
    except ValueError as error:
        parser.error(str(error))
    try:
        with torch.set_grad_enabled(not options.eval), backend(options.backend or "auto"):
            explanation = explain(model, image)
    except (BackendUnavailableError, ValueError) as error:
        print(f"fused-ops explain: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(explanation.rows(), indent=2))
    else:
        print(f"{words}, on {image.device.type}")
        print(explanation)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
