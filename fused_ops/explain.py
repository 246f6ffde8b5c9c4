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
    parser = argparse.ArgumentParser(prog="fused-ops explain", description=__doc__)
    parser.add_argument("model", help="name of a model (see `fused-ops models`)")
    parser.add_argument("--batch", type=int, default=2, help="images per batch (default 2)")
    parser.add_argument("--size", type=int, help="height and width (default: the model's own)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        default="float32",
        help="of input and parameters",
    )
    parser.add_argument("--layout", choices=("channels_last", "nchw"), default="channels_last")
    parser.add_argument("--eval", action="store_true", help="evaluation mode without gradients")
    parser.add_argument("--backend", choices=("auto", *BACKENDS), default=None, help="as FUSED_OPS_BACKEND")
    parser.add_argument("--json", action="store_true", help="print one JSON list with a row per call")
    options = parser.parse_args(arguments)
    for name in ("batch", "size"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name}={value} is not allowed; it must be at least 1")
    from fused_ops.models import create_model

    try:
        model = create_model(options.model)
    except ValueError as error:
        parser.error(str(error))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    channels, height, width = model.default_cfg["input_size"]
    height, width = options.size or height, options.size or width
    memory_format = torch.channels_last if options.layout == "channels_last" else torch.contiguous_format
    dtype = getattr(torch, options.dtype)
    model = model.to(device=device, dtype=dtype, memory_format=memory_format).train(not options.eval)
    image = torch.empty((options.batch, channels, height, width), device=device, dtype=dtype)
    try:
        with torch.set_grad_enabled(not options.eval), backend(options.backend or "auto"):
            explanation = explain(model, image.contiguous(memory_format=memory_format))
    except (BackendUnavailableError, ValueError) as error:
        print(f"fused-ops explain: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(explanation.rows(), indent=2))
    else:
        mode = "evaluation" if options.eval else "training"
        print(f"{options.model}, {options.batch}x{channels}x{height}x{width} on {device}, {mode}")
        print(explanation)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
