"""The benchmarks and the soak, on a tiny shape: that they run, compare and count. Times mean nothing here.

The push's and the soak run in the shared layout (live.py), so their command lines, and what is vLLM's for CUDA, do not.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from live import Shared
from running import ROOT, deadline

from benchmarks import soak

pytestmark = pytest.mark.e2e


def report(tmp_path: Path, script: str, *options: str) -> dict:
    output = tmp_path / "report.json"
    command = [sys.executable, str(ROOT / "benchmarks" / script), *options, "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=deadline(600))
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(output.read_text())


def time_pushes(layout: Shared) -> tuple[list[dict], dict]:
    from benchmarks import bench_weight_push  # not above: it sets variables for Ray's processes

    rows = bench_weight_push.bench(layout, pushes=2, warmup=1, only=[*bench_weight_push.METHODS])
    soaked = bench_weight_push.soak(layout, 20)
    layout.disconnect(layout.engines)
    layout.restart_trainers()  # they have left their process group
    return rows, soaked


def test_push_benchmark(live):
    rows, soaked = live(time_pushes)
    rows = {row["method"]: row for row in rows}
    assert {"simple", "recorded", "bucket"} <= rows.keys()
    for row in rows.values():
        assert row["verified"] and row["elements_verified"] > 0
        assert row["wall_ms_p95"] >= row["wall_ms_p50"] > 0
    assert rows["recorded"]["noop_push_ms"] > 0
    assert rows["recorded"]["shard_bytes"] > 0 and soaked["soak_pushes"] == 20


def test_benchmark_of_sharded_trainers(tmp_path):
    """Both sides do the same work: the gradients that they begin with differ by the ratio to the sampler alone."""
    shape = {"model_type": "qwen2", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300}
    sizes = ["--sequences", "8", "--tokens", "12", "--micro-batch-size", "2", "--steps", "1"]
    rows = report(tmp_path, "bench_fsdp.py", "--shapes", json.dumps(shape), *sizes)["rows"]
    assert [row["side"] for row in rows] == ["ours", "bare"]
    assert all(row["step_s_mean"] > 0 for row in rows)
    assert rows[0]["grad_norm"] == pytest.approx(rows[1]["grad_norm"], rel=0.2)


def test_control_benchmark(tmp_path):
    found = report(tmp_path, "control_scaling.py", "2", "4")
    assert [(row["gpus"], row["engines"], row["processes"]) for row in found["rows"]] == [(2, 1, 3), (4, 2, 6)]
    assert [row["lost"] for row in found["rows"]] == [["engine 0"], ["engine 1"]]
    assert all(row["ask_ms"] > 0 and row["watch_ms"] > 0 and row["recovery_s"] > 0 for row in found["rows"])
    assert {fit["y"] for fit in found["fits"]} >= {"placement_s", "ask_ms", "beyond_ray_ms", "watch_ms", "recovery_s"}


def use(layout: Shared, pushes: int, steps: int) -> dict[str, dict]:
    layout.change(steps=steps, max_restarts=0)
    return soak.soak(layout, layout.task, pushes)


def test_nothing_is_used_up(live):
    """Not memory: its slope over so few pushes is noise. results/soak-*.json have the long runs."""
    found = live(use, 200, 10)
    for kind, count in (("calls", 200), ("pushes", 200), ("steps", 10)):
        assert found[kind]["count"] == count
        slopes = {k: s for k, s in found[kind]["slopes"].items() if "resident" not in k}
        assert len(slopes) == 2 * 4 + 2, "descriptors and threads of four kinds of processes; GPU; /dev/shm"
        if kind == "steps":  # vLLM's queues are sparse files there, which the first steps fill page by page
            del slopes["/dev/shm bytes"]
        # Pools of threads (Ray's, gRPC's) may start one or two yet; what each second step leaves behind is more.
        growing = {k: s for k, s in slopes.items() if s["low"] * count > (0 if k.endswith("bytes") else 4)}
        assert not growing, growing
