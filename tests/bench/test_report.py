"""The report on made-up results, in a temporary folder, and on none; no figure here is a measurement."""

from __future__ import annotations

from fused_ops.bench import limits
from fused_ops.bench.results import Row

GPU = "NVIDIA H100 80GB HBM3"
DATE = "2000-01-01T00:00:00+00:00"
TIMES = {"eager_nchw": 9.0, "eager_channels_last": 4.0, "compile_default": 3.0, "triton": 1.2, "auto": 1.25}


def made_up_rows(gpu: str = GPU, predictions: list | None = None) -> list[Row]:
    """Rows of every provider, so many times the predicted least time; one case loses, one check fails."""
    if predictions is None:
        predictions = limits.all_predictions([limits.find_gpu(gpu)])
    rows = []
    for number, found in enumerate(predictions):
        for provider, factor in TIMES.items():
            ours = provider in ("triton", "auto")
            slow = 3.5 if ours and found["case"] == "dsnet_local_256x7" and found["mode"] == "both" else 1.0
            failed = provider == "triton" and found["case"] == "dsnet_positional_512x7"
            microseconds = (
                None if failed else found["predicted_us"] * factor * slow * (1 + 0.01 * (number % 5))
            )
            rows.append(
                Row(
                    gpu=gpu,
                    op=found["op"],
                    model=found["model"],
                    case=found["case"],
                    mode=found["mode"],
                    provider=provider,
                    dtype="bfloat16",
                    p20_us=microseconds and microseconds * 0.99,
                    p50_us=microseconds,
                    p80_us=microseconds and microseconds * 1.01,
                    ratio_to_best_alternative=None,
                    fraction_of_limit=microseconds and found["predicted_us"] / microseconds,
                    peak_bytes=int(found["bytes"] * (1 if ours else 1.6)),
                    saved_bytes=int(found["bytes"] * (0.3 if ours else 0.7)),
                    commit="0000000",
                    driver="0.0",
                    torch="2.11.0",
                    cudnn="0",
                    triton="3.6.0",
                    cuda="13.0",
                    l2="cold",
                    graph=True,
                    note="failed: made-up check" if failed else "",
                    copy_gb_s=2950.0,
                    gemm_tflops=780.0,
                    noise_floor=0.004,
                    sm_clock_mhz=1755.0,
                    date=DATE,
                )
            )
    return rows


def made_up_models(gpu: str = GPU) -> list[Row]:
    return [
        Row(
            gpu=gpu,
            op="",
            model=model,
            case=f"{batch}x3x224x224",
            mode=mode,
            provider=provider,
            dtype="bfloat16",
            p50_us=batch * 100.0 * factor * (3 if mode == "train" else 1),
            peak_bytes=int(batch * 5e7 * factor),
            l2="warm",
            graph=batch == 1,
            gemm_tflops=780.0,
            date=DATE,
        )
        for model in ("dsnet_tiny", "dsnet_small")
        for batch, mode in ((1, "infer"), (128, "infer"), (128, "train"))
        for provider, factor in (("eager_channels_last", 2.0), ("compile_default", 1.3), ("auto", 1.0))
    ]
