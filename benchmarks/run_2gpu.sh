#!/usr/bin/env bash
# Every layout that two GPUs allow, all checks on, and an injected fault: some 5 minutes on 2 x H100.
# Usage: benchmarks/run_2gpu.sh OUT_DIR     (writes one report per run; exit code 1 if any run ended otherwise than it must)
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: benchmarks/run_2gpu.sh OUT_DIR}
bad=0
go() { # name, expected exit code, arguments
    local name=$1 expected=$2
    shift 2
    echo "== $name: rlhf_colocate.py $*"
    timeout 150 python3 rlhf_colocate.py --steps 0 --output-json "$out/$name.json" "$@" 2>&1 | tee "$out/$name.log"
    local code=${PIPESTATUS[0]}
    [ "$code" = "$expected" ] || { echo "== $name: exit code $code, expected $expected"; bad=1; }
}
for shape in opt-125m Qwen2.5-0.5B; do
    python3 benchmarks/shapes.py "$shape" "runs/$shape" >/dev/null
done
qwen="--model runs/Qwen2.5-0.5B --load-format dummy --num-gpus 2"
go run-2xh100-opt-125m-tp2 0 --num-gpus 2
go run-2xh100-qwen2.5-0.5b-tp1 0 $qwen --tensor-parallel-size 1
go run-2xh100-qwen2.5-0.5b-tp2 0 $qwen --tensor-parallel-size 2
go run-2xh100-opt-125m-tp1 0 --num-gpus 2 --tensor-parallel-size 1
go run-2xh100-opt-125m-tp2-flip-element 1 --num-gpus 2 --inject flip-element
exit $bad
