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

import torch

from fused_ops import Report, accelerate
from fused_ops.acceleration.report import KINDS
from fused_ops.bench.results import print_table
from fused_ops.core.files import write_atomically
from fused_ops.models.named import add_input_options, check_input_options, prepare

RESULTS = Path(__file__).resolve().parent / "results"
# Models of the table, whose equality with the untouched model tests/accelerate asserts.
TIMM_MODELS = (
    "convnext_atto",
    "cspnext_tiny",
    "ecaresnet26t",
    "edgenext_xx_small",
    "efficientnet_b0",
    "efficientvit_b0",
    "fastvit_t8",
    "focalnet_tiny_srf",
    "gcresnet33ts",
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
    "nextvit_small",
    "pvt_v2_b0",
    "regnetx_002",
    "repvit_m0_9",
    "resnet10t",
    "rexnet_100",
    "starnet_s1",
    "swiftformer_xs",
    "test_convnext",
    "test_mambaout",
    "test_vit",
    "tf_efficientnet_lite0",
    "tinynet_e",
    "twins_pcpvt_small",
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


def report_of(name: str, options: argparse.Namespace, device: str | None = None) -> tuple[Report, str]:
    """The report, and what was fed, in words; ``options`` of :func:`fused_ops.models.named.prepare`."""
    model, image, words = prepare(name, options, device)
    with torch.set_grad_enabled(not options.eval):
        return accelerate(model, dry_run=True, example=image), words


def entry(name: str) -> dict[str, Any]:
    """A model's line of the committed table."""
    training = argparse.Namespace(
        batch=BATCH, size=None, dtype="bfloat16", layout="channels_last", eval=False
    )
    # The zoo's models of the same names are exchanged already.
    report, example = report_of(f"timm/{name}" if name in TIMM_MODELS else name, training, "cpu")
    weighed = [row for row in report.results if row.exchanged and row.stock_bytes is not None]
    kinds = Counter((row.pattern, row.exchanged, row.reason) for row in report.results)
    return {
        "model": name,
        "example": example if weighed else "",
        **{kind: sum(row.kind == kind for row in report.results) for kind in KINDS},
        "exchanged": {
            kind: sum(row.kind == kind and row.exchanged for row in report.results) for kind in KINDS
        },
        "stock_bytes": sum(row.stock_bytes for row in weighed) if weighed else None,
        "fused_bytes": sum(row.fused_bytes for row in weighed) if weighed else None,
        "note": report.note,
        "layers": [
            {"count": count, "pattern": pattern, "exchanged": exchanged, "reason": reason}
            for (pattern, exchanged, reason), count in sorted(kinds.items())
        ],
    }


def _counts(row: dict[str, Any], kinds: Sequence[str] = tuple(KINDS)) -> list[str]:
    return [f"{row['exchanged'][kind]} of {row[kind]}" if row[kind] else "-" for kind in kinds]


def markdown(entries: Sequence[dict[str, Any]]) -> str:
    # Not those that no model has.
    kinds = [kind for kind in KINDS if any(row[kind] for row in entries)]
    lines = [
        "# What accelerate() exchanges",
        "",
        "Made by `fused-ops accelerate --table`. Every model's outputs, gradients and running statistics in",
        "float64 equal the untouched model's (`tests/accelerate`). Bytes are expected ones, counted from",
        f"shapes: what the exchanged layers move per training step of {BATCH} images at the model's own size",
        "in bfloat16, as separate passes and as fused operators. Nothing here was timed.",
        "",
        f"| model | {' | '.join(map(KINDS.get, kinds))} | stock MB | fused MB | what is left out and why |",
        f"|---|{'--:|' * (len(kinds) + 2)}---|",
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
            f"| {row['model']} | {' | '.join(_counts(row, kinds))} | {' | '.join(megabytes)} | {why} |"
        )
    return "\n".join(lines) + "\n"


def write_table(folder: Path = RESULTS) -> list[dict[str, Any]]:
    entries = []
    for name in MODELS:
        entries.append(entry(name))
        print(f"{name}: {', '.join(_counts(entries[-1]))}", file=sys.stderr)
    texts = {"accelerate.json": json.dumps(entries, indent=1) + "\n", "accelerate.md": markdown(entries)}
    for name, text in texts.items():
        write_atomically(folder / name, lambda file, text=text: file.write(text.encode()))
    return entries


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fused-ops accelerate", description=__doc__)
    parser.add_argument("model", nargs="?", help="a name, for example efficientnet_b0")
    add_input_options(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON list with a row per module")
    parser.add_argument("--table", action="store_true", help="make the committed table of many models anew")
    options = parser.parse_args(arguments)
    if options.table:
        entries = write_table()
        if options.json:
            print(json.dumps(entries, indent=1))
        return 0
    if options.model is None:
        parser.error("MODEL is missing, for example efficientnet_b0")
    check_input_options(parser, options)
    try:
        report, example = report_of(options.model, options)
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
