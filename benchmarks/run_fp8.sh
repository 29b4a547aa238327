#!/usr/bin/env bash
# FP8 rollouts on one GPU: some 4 minutes on an H100.
#   1. the kernels against plain torch
#   2. Qwen2.5-0.5B's shape, an engine for each quantization: bits, times, gap
#   3. the proof and two steps of the loop with FP8 weights and KV cache, with sleep
# Usage: benchmarks/run_fp8.sh OUT_DIR     (exit code 1 if any of them ended otherwise than it must)
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: benchmarks/run_fp8.sh OUT_DIR}
common="--num-gpus 1 --tensor-parallel-size 1 --load-format dummy" limit=200
source benchmarks/go.sh
PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" timeout 120 python3 tests/fp8_kernels.py || bad=1
timeout 300 python3 benchmarks/bench_fp8.py --output "$out/fp8-1xh100.json" || bad=1
python3 benchmarks/shapes.py Qwen2.5-0.5B runs/Qwen2.5-0.5B >/dev/null
go loop-1xh100-qwen2.5-0.5b-fp8 0 --model runs/Qwen2.5-0.5B --steps 2 --max-tokens 128 --rollout-quantization fp8 \
    --kv-cache-dtype fp8 --correction token
exit $bad
