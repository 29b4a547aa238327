"""The push benchmark, on a tiny shape: that it runs, compares and counts. Its times mean nothing here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.e2e
def test_push_benchmark(tmp_path):
    output = tmp_path / "bench.json"
    counts = ["--pushes", "2", "--warmup", "1", "--soak", "20"]
    command = [sys.executable, str(ROOT / "benchmarks/bench_weight_push.py"), *counts, "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["method"]: row for row in json.loads(output.read_text())["rows"]}
    assert {"simple", "recorded", "bucket"} <= rows.keys()
    for row in rows.values():
        assert row["verified"] and row["elements_verified"] > 0
        assert row["wall_ms_p95"] >= row["wall_ms_p50"] > 0
    recorded = rows["recorded"]
    assert recorded["shard_bytes"] > 0 and recorded["soak_pushes"] == 20
    growth = recorded["soak_growth"]
    assert not any(n for what, n in growth.items() if what.endswith((" fds", " threads", "gpu_bytes"))), growth
