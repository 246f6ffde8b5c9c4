"""``fused-ops accelerate MODEL``: what accelerate() exchanges in a model, and why not the rest.

MODEL is a name of the zoo, of timm (also as timm/NAME) or torchvision/NAME. ``--table`` makes the committed
table of many models, bench/results/accelerate.json and accelerate.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from fused_ops import Report, accelerate
from fused_ops.bench.results import print_table
from fused_ops.core.files import write_atomically

RESULTS = Path(__file__).resolve().parent / "results"
# Models of the table, whose equality with the untouched model tests/accelerate asserts.
TIMM_MODELS = (
    "convnext_atto",
    "cspnext_tiny",
    "edgenext_xx_small",
    "efficientnet_b0",
    "efficientvit_b0",
    "fastvit_t8",
    "ghostnet_050",
    "hardcorenas_a",
    "hgnetv2_b0",
    "inception_next_atto",
    "lcnet_035",
    "mixnet_s",
    "mnasnet_small",
    "mobilenetv2_035",
    "mobilenetv3_small_050",
    "mobilenetv4_conv_small_050",
    "mobilevit_xxs",
    "pvt_v2_b0",
    "regnetx_002",
    "repvit_m0_9",
    "resnet10t",
    "rexnet_100",
    "starnet_s1",
    "swiftformer_xs",
    "test_mambaout",
    "tf_efficientnet_lite0",
    "tinynet_e",
)
TORCHVISION_MODELS = (
    "torchvision/fasterrcnn_mobilenet_v3_large_320_fpn",
    "torchvision/lraspp_mobilenet_v3_large",
    "torchvision/mnasnet0_5",
    "torchvision/mobilenet_v2",
    "torchvision/mobilenet_v3_small",
    "torchvision/shufflenet_v2_x0_5",
    "torchvision/ssdlite320_mobilenet_v3_large",
)
MODELS = (*TIMM_MODELS, *TORCHVISION_MODELS)
BATCH = 64


def create(name: str) -> nn.Module:
    """A model without trained weights. Raises ValueError if there is none of the name."""
    own = name.removeprefix("torchvision/")
    if own != name:
        import torchvision

        families = (torchvision.models.detection, torchvision.models.segmentation)
        dense = any(own in torchvision.models.list_models(family) for family in families)
        # These would fetch their backbone's weights.
        arguments = {"weights_backbone": None} if dense else {}
        return torchvision.models.get_model(own, weights=None, **arguments)
    from fused_ops import models

    if not name.startswith("timm/") and name in models.list_models():
        return models.create_model(name)
    own = name.removeprefix("timm/")
    if not timm.is_model(own):
        raise ValueError(f"{name}: no such model in the zoo (`fused-ops models`) or in timm")
    return timm.create_model(own, pretrained=False)


def input_size(model: nn.Module) -> int:
    """Side of the square image that the model is made for; 224 where it does not say."""
    config = getattr(model, "default_cfg", None) or {}
    return config.get("input_size", (3, 224, 224))[-1]


def report_of(
    name: str, *, batch: int, size: int | None, dtype: torch.dtype, layout: str, training: bool, device: str
) -> tuple[Report, str]:
    """The report, and what was fed, in words."""
    model = create(name)
    size = size or input_size(model)
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    model = model.to(device=device, dtype=dtype, memory_format=memory_format).train(training)
    image = torch.empty(batch, 3, size, size, device=device, dtype=dtype)
    with torch.set_grad_enabled(training):
        report = accelerate(model, dry_run=True, example=image.contiguous(memory_format=memory_format))
    mode = "training" if training else "inference"
    return report, f"{name}, {batch}x3x{size}x{size} {str(dtype).removeprefix('torch.')} {layout}, {mode}"


def entry(name: str) -> dict[str, Any]:
    """A model's line of the committed table."""
    report, example = report_of(
        name,
        batch=BATCH,
        size=None,
        dtype=torch.bfloat16,
        layout="channels_last",
        training=True,
        device="cpu",
    )
    weighed = [row for row in report.results if row.exchanged and row.stock_bytes is not None]
    kinds = Counter((row.pattern, row.exchanged, row.reason) for row in report.results)
    return {
        "model": name,
        "example": example if weighed else "",
        "depthwise": len(report.results),
        "exchanged": report.exchanged,
        "stock_bytes": sum(row.stock_bytes for row in weighed) if weighed else None,
        "fused_bytes": sum(row.fused_bytes for row in weighed) if weighed else None,
        "note": report.note,
        "layers": [
            {"count": count, "pattern": pattern, "exchanged": exchanged, "reason": reason}
            for (pattern, exchanged, reason), count in sorted(kinds.items())
        ],
    }


def markdown(entries: Sequence[dict[str, Any]]) -> str:
    lines = [
        "# What accelerate() exchanges",
        "",
        "Made by `fused-ops accelerate --table`. Every model's outputs, gradients and running statistics in",
        "float64 equal the untouched model's (`tests/accelerate`). Bytes are expected ones, counted from",
        f"shapes: what the exchanged layers move per training step of {BATCH} images at the model's own size",
        "in bfloat16, as separate passes and as fused operators. Nothing here was timed.",
        "",
        "| model | depthwise convolutions | exchanged | stock MB | fused MB | what is left out and why |",
        "|---|--:|--:|--:|--:|---|",
    ]
    for row in entries:
        reasons: Counter[str] = Counter()
        for layer in row["layers"]:
            if layer["reason"]:
                reasons[layer["reason"]] += layer["count"]
        megabytes = [
            "-" if row[key] is None else f"{row[key] / 1e6:.0f}" for key in ("stock_bytes", "fused_bytes")
        ]
        why = "; ".join(f"{count} x {reason}" for reason, count in sorted(reasons.items()))
        if row["note"]:
            why += "; " * bool(why) + "bytes unknown: the model runs on data only"
        lines.append(
            f"| {row['model']} | {row['depthwise']} | {row['exchanged']} | {' | '.join(megabytes)} | {why} |"
        )
    return "\n".join(lines) + "\n"


def write_table(folder: Path = RESULTS) -> list[dict[str, Any]]:
    entries = []
    for name in MODELS:
        entries.append(entry(name))
        print(f"{name}: {entries[-1]['exchanged']} of {entries[-1]['depthwise']}", file=sys.stderr)
    texts = {"accelerate.json": json.dumps(entries, indent=1) + "\n", "accelerate.md": markdown(entries)}
    for name, text in texts.items():
        write_atomically(folder / name, lambda file, text=text: file.write(text.encode()))
    return entries


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fused-ops accelerate", description=__doc__)
    parser.add_argument("model", nargs="?", help="a name, for example efficientnet_b0")
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
    parser.add_argument("--json", action="store_true", help="print one JSON list with a row per convolution")
    parser.add_argument("--table", action="store_true", help="make the committed table of many models anew")
    options = parser.parse_args(arguments)
    if options.table:
        entries = write_table()
        if options.json:
            print(json.dumps(entries, indent=1))
        return 0
    if options.model is None:
        parser.error("MODEL is missing, for example efficientnet_b0")
    for name in ("batch", "size"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name}={value} is not allowed; it must be at least 1")
    try:
        report, example = report_of(
            options.model,
            batch=options.batch,
            size=options.size,
            dtype=getattr(torch, options.dtype),
            layout=options.layout,
            training=not options.eval,
            device="cuda" if torch.cuda.is_available() else "cpu",
        )
    except ValueError as error:
        parser.error(str(error))
    if options.json:
        print(json.dumps(report.rows(), indent=1))
        return 0
    print(example)
    if report.results:
        print_table(report.COLUMNS, report.lines())
    print(report.summary())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
