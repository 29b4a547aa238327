#!/usr/bin/env bash
# The RLHF loop on one GPU with 80 GB: some 5 minutes on an H100.
#   1. Qwen2.5-0.5B's shape, 64 completions of 256 tokens: what the hand-over costs
#   2. Qwen2.5-3B's shape, where training fits only while the engine sleeps
#   3. the same without sleep: it must be refused, since it would not fit
# Usage: benchmarks/run_loop.sh OUT_DIR     (exit code 1 if any run ended otherwise than it must)
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: benchmarks/run_loop.sh OUT_DIR}
common="--num-gpus 1 --tensor-parallel-size 1 --load-format dummy" limit=200
source benchmarks/go.sh
for shape in Qwen2.5-0.5B Qwen2.5-3B; do
    python3 benchmarks/shapes.py "$shape" "runs/$shape" >/dev/null
done
go loop-1xh100-qwen2.5-0.5b 0 --model runs/Qwen2.5-0.5B --steps 12 --max-tokens 256 \
    --no-enforce-eager
three="--model runs/Qwen2.5-3B --steps 3 --max-tokens 64 --learning-rate 1e-5 --gpu-memory-utilization 0.35"
go loop-1xh100-qwen2.5-3b 0 $three
go loop-1xh100-qwen2.5-3b-awake 3 $three --sleep-level 0
exit $bad
