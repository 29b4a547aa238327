# Sourced by the scripts beside it: go NAME EXPECTED_EXIT_CODE ARGUMENTS... runs rlhf_colocate.py with $common and these, at
# most $limit seconds long, and writes $out/NAME.json and $out/NAME.log; $bad is 1 once a run has ended otherwise.
bad=0
go() {
    local name=$1 expected=$2
    shift 2
    echo "== $name: rlhf_colocate.py $*"
    timeout --foreground "$limit" python3 rlhf_colocate.py $common --output-json "$out/$name.json" "$@" 2>&1 |
        tee "$out/$name.log"
    local code=${PIPESTATUS[0]}
    [ "$code" = "$expected" ] || { echo "== $name: exit code $code, expected $expected"; bad=1; }
}
