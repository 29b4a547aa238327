#!/usr/bin/env bash
# The default learning run in rehearsal, for five seeds: some 12 minutes on two cores.
# Usage: benchmarks/run_seeds.sh OUT_DIR     (exit code 1 if any run failed)
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: benchmarks/run_seeds.sh OUT_DIR}
bad=0
for seed in 0 1 2 3 4; do
    name=loop-rehearsal-seed$seed
    echo "== $name"
    timeout --foreground 300 python3 rlhf_colocate.py --seed "$seed" --output-json "$out/$name.json" >"$out/$name.log" 2>&1 || bad=1
    tail -n 1 "$out/$name.log"
done
exit $bad
