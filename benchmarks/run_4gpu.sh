#!/usr/bin/env bash
# The flagship layout and its neighbours, all checks on, and the push benchmark: under 8 minutes on 4 GPUs with 80 GB.
# Usage: benchmarks/run_4gpu.sh OUT_DIR      GPUS=2 halves all counts. PARTS="runs bench loop" (default: the first two)
# Writes a report and a log per run; exit code 1 if any run ended otherwise than it must.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: benchmarks/run_4gpu.sh OUT_DIR}
gpus=${GPUS:-4}
parts=" ${PARTS:-runs bench} "
kind=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -1 | grep -o '[A-Z][0-9]\{3\}' | tr A-Z a-z)
on="${gpus}x$kind"
common="--num-gpus $gpus" limit=150
source benchmarks/go.sh
if [[ $parts = *" runs "* ]]; then
    # The defaults: TP=2, the proof of the push and a learning run of 12 steps. The same GPUs in another order. One GPU
    # per engine, and one engine over all GPUs.
    go "loop-$on-opt-125m" 0
    CUDA_VISIBLE_DEVICES=$([ "$gpus" = 4 ] && echo 3,1,2,0 || echo 1,0) go "run-$on-opt-125m-reordered" 0 --steps 0
    go "run-$on-opt-125m-tp1" 0 --steps 0 --tensor-parallel-size 1
    go "run-$on-opt-125m-tp$gpus" 0 --steps 0 --tensor-parallel-size "$gpus"
fi
if [[ $parts = *" bench "* ]]; then
    for shape in opt-125m Qwen2.5-7B; do
        timeout --foreground 170 python3 benchmarks/bench_weight_push.py --shape "$shape" --num-gpus "$gpus" \
            --output "$out/bench-$on-$(date -u +%F).json" || bad=1
    done
fi
if [[ $parts = *" loop "* ]]; then # of a model that is worth sharing out, on engines with CUDA graphs
    python3 benchmarks/shapes.py Qwen2.5-0.5B runs/Qwen2.5-0.5B >/dev/null
    go "loop-$on-qwen2.5-0.5b" 0 --model runs/Qwen2.5-0.5B --load-format dummy --max-tokens 256 --no-enforce-eager \
        --trace "$out/trace-$on-qwen2.5-0.5b.json"
fi
exit $bad
