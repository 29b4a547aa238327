"""What a model learns of a task that can be checked: held-out sums before and after, once for each seed.

    python examples/arithmetic.py data sums; python examples/arithmetic.py model sums/tiny
    python benchmarks/learn.py sums results --model sums/tiny -- --num-gpus 1 --tensor-parallel-size 1 \
        --prompt-column text --max-tokens 6 --prompts-per-step 32 --group-size 16 --learning-rate 1e-4 --steps 60

Writes OUT_DIR/learn-MODEL-seedN.json: {"task", "model", "side", "seed", "heldout": {"n", "before", "after", "se"},
"steps", "seconds", ...}: shares of held-out sums that are right, the standard error of the later one, and seconds of
all steps. learn_trl.py does the same with TRL.
What stands after -- goes to rlhf_colocate.py. The seed is the sampler's; the data and the model are the same.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TASK = ROOT / "examples" / "arithmetic.py"
RIGHT = "arithmetic.py:right"  # the name of its reward in a report
EVERY = 10  # steps between evaluations


def command(data: Path, model: str, seed: int, report: Path, rest: list[str]) -> list[str]:
    prompts = ["--prompts", str(data / "train.jsonl"), "--eval-prompts", str(data / "heldout.jsonl")]
    rewards = ["--reward", f"{TASK}:right", "--reward", f"{TASK}:formatted", "--reward-weights", "1,0.1"]
    files = ["--model", model, "--seed", str(seed), "--output-json", str(report)]
    every = ["--eval-every", str(EVERY)]
    return [sys.executable, str(ROOT / "rlhf_colocate.py"), *prompts, *rewards, *every, *files, *rest]


def held_out(evals: list[dict], n: int) -> dict:
    """Shares of n sums that are right, before and after, and the standard error of the later one."""
    before, after = (evals[i][RIGHT] for i in (0, -1))
    return {"n": n, "before": before, "after": after, "se": (after * (1 - after) / n) ** 0.5}


def learned(report: dict, model: str, seed: int) -> dict:
    """What is kept of a run's report."""
    evals = [{"step": e["step"], **e["rewards"]} for e in report["evals"]]
    steps = report["steps"]
    return {
        "task": TASK.stem,
        "model": model,
        "side": "ours",
        "seed": seed,
        "heldout": held_out(evals, report["evals"][0]["n"]),
        "steps": len(steps),
        "seconds": round(sum(sum(step["seconds"].values()) for step in steps), 1),
        "evals": evals,
        "rewards": [step["reward"] for step in steps],
        "clipped": [step["clipped"] for step in steps],
        **{key: report[key] for key in ("config", "hardware", "versions", "verdict", "date")},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder that examples/arithmetic.py has written")
    parser.add_argument("out", type=Path, help="folder for the results")
    parser.add_argument("--model", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    own = sys.argv[1:]
    rest = []  # flags of rlhf_colocate.py
    if "--" in own:
        at = own.index("--")
        rest = own[at + 1 :]
        own = own[:at]
    given = parser.parse_args(own)
    name = Path(given.model).name.lower()
    failed = 0
    for seed in given.seeds:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "report.json"
            asked = command(given.data, given.model, seed, file, rest)
            done = subprocess.run(asked, env=os.environ | {"PYTHONUNBUFFERED": "1"})
            if done.returncode:
                failed = done.returncode
                continue
            row = learned(json.loads(file.read_text()), name, seed)
        out = given.out / f"learn-{name}-seed{seed}.json"
        out.write_text(json.dumps(row, indent=1) + "\n")
        heldout = row["heldout"]
        print(f"{out.name}: right {heldout['before']:.3f} -> {heldout['after']:.3f} ± {heldout['se']:.3f}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
