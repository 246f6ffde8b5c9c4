#!/usr/bin/env bash
# Everything that one visit to a GPU machine should bring home, most valuable first, within a time budget.
#
#   bench/gpu.sh [--seconds N] [--out DIR] [--dry-run] [--again]
#
# For a bare machine without a package index: Python 3.12, torch 2.11, Triton 3.6, CUDA 13 toolkit. Every stage
# is resumable: a finished one is skipped when the script runs again at the same commit, and the measuring
# stages write after every row. A stage that does not fit into what is left of the budget is left out, and said
# so. Being cut off at any second loses at most the row in progress. Results go to DIR (default bench/results).
set -uo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
seconds=540
out=bench/results
dry_run=
again=
while (($#)); do
    case $1 in
        --seconds) seconds=${2:?--seconds needs a number} && shift 2 ;;
        --out) out=${2:?--out needs a folder} && shift 2 ;;
        --dry-run) dry_run=1 && shift ;;
        --again) again=1 && shift ;;
        *)
            echo "gpu.sh: unknown argument '$1'; see the head of this file" >&2
            exit 2
            ;;
    esac
done
if ! [[ $seconds =~ ^[0-9]+$ ]] || ((seconds < 1)); then
    echo "gpu.sh: --seconds '$seconds' is not allowed; give a whole number of seconds, 1 or more" >&2
    exit 2
fi

commit=$(git rev-parse --short HEAD 2>/dev/null || echo unknown)
state=$out/.stages-$commit
# One result folder for every command below, and the same kernels for every process.
bench=("$PYTHON" -m fused_ops.bench)
# The library is a stage of its own, with a log.
install=(env FUSED_OPS_BUILD_CUDA=0 "$PYTHON" -m pip install --quiet --no-index --no-build-isolation --no-deps --editable .)
smoke="three_way and (identity or pre_train or post_train_silu)"

# name | least seconds | command. The first three settle whether anything else can be believed.
names=() least=() commands=()
stage() {
    names+=("$1") least+=("$2")
    shift 2
    commands+=("$(printf '%q ' "$@")")
}
stage environment 5 "$PYTHON" -m fused_ops.env
stage build 20 "$PYTHON" csrc/build.py library
stage smoke 30 "$PYTHON" -m pytest -q -m gpu -k "$smoke" tests/contract
stage bench_tests 20 "$PYTHON" -m pytest -q -m gpu tests/bench
# Each measuring stage gets a share of its own, so that a slow compilation cannot eat up the visit.
models=("${bench[@]}" models --results "$out" --seconds)
ops=("${bench[@]}" ops --results "$out" --seconds)
stage step_dsnet_small 60 "${models[@]}" 110 --model dsnet_small --mode train --batch 128
stage ops_depthwise 60 "${ops[@]}" 110 --op depthwise
stage step_loader 30 "${models[@]}" 60 --model dsnet_small --batch 128 --loader digits --provider eager_channels_last auto
stage step_dsnet_small_star 60 "${models[@]}" 110 --model dsnet_small_star --mode train --batch 128
stage tests 60 "$PYTHON" -m pytest -q -m gpu tests
stage step_batches 60 "${models[@]}" 200 --model dsnet_small --mode train --batch 64 256
stage infer_dsnet_small 60 "${models[@]}" 120 --model dsnet_small --mode infer --batch 1 128
stage ops_all 60 "${ops[@]}" 300
stage models 60 "${models[@]}" 600
stage report 10 "${bench[@]}" report --results "$out" --out "$out"

started=$SECONDS
left() { echo $((seconds - (SECONDS - started))); }

if [[ -n $dry_run ]]; then
    echo "install: ${install[*]}"
    for index in "${!names[@]}"; do
        echo "${names[index]} (needs ${least[index]} s): ${commands[index]}"
    done
    exit 0
fi

mkdir -p "$state"
if ! "${install[@]}"; then
    echo "gpu.sh: the package could not be installed" >&2
    exit 1
fi
failed=()
left_out=()
for index in "${!names[@]}"; do
    name=${names[index]}
    if [[ -z $again && -e $state/$name ]]; then
        echo "== $name: done before at $commit"
        continue
    fi
    remaining=$(left)
    if ((remaining < least[index])); then
        echo "== $name: left out, needs ${least[index]} s and $remaining s are left"
        left_out+=("$name")
        continue
    fi
    echo "== $name: $remaining s left"
    # The log is written as it comes, so that a cut-off visit still tells how far it got.
    if timeout --signal=INT --kill-after=10 "$remaining" bash -c "${commands[index]}" 2>&1 | tee "$out/$name.log"; then
        touch "$state/$name"
    else
        echo "== $name: failed, see $out/$name.log"
        failed+=("$name")
        # Figures of kernels that do not build or are wrong are worth nothing.
        [[ $name == build || $name == smoke ]] && break
    fi
done
echo "== $((SECONDS - started)) s used; failed: ${failed[*]:-none}; left out: ${left_out[*]:-none}"
((${#failed[@]} == 0))
