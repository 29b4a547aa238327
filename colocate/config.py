"""The flags, what can be wrong with them, and how a run ends before its time: `Config`, `Stop`, `Lost`, exit codes.

Knows neither torch, nor Ray, nor the machine.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import json
import math
import re

PASS, FAIL, USAGE, MISSING, INTERRUPTED = 0, 1, 2, 3, 130  # exit codes
# Stages that wait for other processes.
STAGES = ("start", "connect", "rollout", "perturb", "push", "verify", "sleep", "reward", "train", "wake", "checkpoint")
STAGES += ("recover", "eval")
LONGEST_PROMPT = 48  # tokens, of those that stand in the script
# Arguments of vllm.LLM that --engine-args must leave alone, and the flags that set them; "": the layout and the push.
OWN_ENGINE_ARGS = {
    "model": "--model",
    "skip_tokenizer_init": "",
    "load_format": "--load-format",
    "hf_overrides": "",
    "dtype": "--dtype",
    "tensor_parallel_size": "--tensor-parallel-size",
    "distributed_executor_backend": "",
    "worker_extension_cls": "",
    "gpu_memory_utilization": "--gpu-memory-utilization",
    "kv_cache_memory_bytes": "",
    "max_model_len": "--max-model-len",
    "max_num_seqs": "--max-num-seqs",
    "enforce_eager": "--enforce-eager",
    "enable_prefix_caching": "",
    "logprobs_mode": "--temperature",
    "enable_sleep_mode": "--sleep-level",
    "seed": "--seed",
    "quantization": "--rollout-quantization",
    "kv_cache_dtype": "--kv-cache-dtype",
}
# Those with which workers have other weights than the push knows: what to do instead.
UNFIT_ENGINE_ARGS = dict.fromkeys(
    ("pipeline_parallel_size", "data_parallel_size", "enable_expert_parallel", "quantization_config"), "Leave it out"
)
UNFIT_ENGINE_ARGS["enable_lora"] = "Try: --lora-rank 16"
# vLLM would compute them once, by the weights of then.
UNFIT_ENGINE_ARGS["calculate_kv_scales"] = "Try: --kv-cache-dtype fp8, whose scales are 1"
QUANTIZATIONS = {"none": None, "fp8": "fp8_per_tensor", "fp8_per_channel": "fp8_per_channel"}  # ours: vLLM's
QUANTIZATIONS |= {"fp8_per_block": "fp8_per_block"}
DEFAULT_MODEL = "facebook/opt-125m"


class Stop(Exception):
    """Ends the run with one message and an exit code."""

    def __init__(self, message: str, code: int = FAIL):
        super().__init__(message)
        self.code = code


class Lost(Stop):
    """Actors that have died, or did not answer in time. The run can go on without them.

    during: the stage; in an optimizer step ("train") the others may never answer again.
    """

    def __init__(self, names: set[str], message: str, during: str):
        super().__init__(message)
        self.names = names
        self.during = during


def refuse_unless(ok: bool, message: str, code: int = USAGE) -> None:
    """Raise Stop(message, code) unless ok. The message says what was found, what is needed, and what to type."""
    if not ok:
        raise Stop(message, code)


def flag(default, text: str, **extra):
    """A field of Config. extra: argparse's `choices` and `type`; `at_least`, `above`, `at_most`, `below`: its range."""
    return dataclasses.field(default=default, metadata={"help": text, **extra})


def level(text: str) -> int | str:
    """A value of --sleep-level."""
    return int(text) if text.isdecimal() else text


class OneLine(argparse.ArgumentParser):
    """A user's mistake is one line, without the usage above it."""

    def error(self, message: str):
        unknown = re.match(r"unrecognized arguments: (--[\w-]+)", message)
        near = difflib.get_close_matches(unknown[1], self._option_string_actions, 1, 0.75) if unknown else []
        fix = f"Did you mean {near[0]}?" if near else "--help lists the flags"
        self.exit(USAGE, f"rlhf_colocate.py: error: {message}. {fix}\n")


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that can be set; the command line's flags are made from it."""

    model: str | None = flag(None, f"hub id, or folder of a Hugging Face checkpoint (default: {DEFAULT_MODEL})")
    num_gpus: int = flag(4, "GPUs; each is a bundle, with one trainer", at_least=1)
    trainer: str = flag(
        "auto",
        "'replicated': each trainer has all of the model and its optimizer; 'fsdp': several share them in shards "
        "(FSDP2); 'auto': replicated where that fits into memory, else fsdp",
        choices=("auto", "replicated", "fsdp"),
    )
    shard_size: int | None = flag(
        None,
        "fsdp: neighbours that share one replica (default: the fewest whose memory it fits into, but not fewer than "
        "--tensor-parallel-size)",
        type=int,
        at_least=1,
    )
    lora_rank: int = flag(
        0, "train adapters of this rank (LoRA) on all linear layers but the head; 0: train all weights", at_least=0
    )
    lora_alpha: float = flag(32.0, "adapters are scaled by this over --lora-rank", above=0)
    tensor_parallel_size: int = flag(2, "GPUs per vLLM engine; num-gpus / this many engines are started", at_least=1)
    trainer_gpu_share: float = flag(
        0.4, "share of a GPU that Ray books for a trainer; it bounds no memory", above=0, below=1
    )
    engine_gpu_share: float = flag(0.4, "share of a GPU that Ray books for an engine's worker", above=0, below=1)
    gpu_memory_utilization: float = flag(
        0.4, "share of each GPU's memory that a vLLM engine may fill", above=0, below=1
    )
    dtype: str = flag(
        "auto",
        "dtype of trainer and engine; 'auto': bfloat16 on GPUs and CPUs that multiply it fast, float32 on others",
        choices=("auto", "bfloat16", "float16", "float32"),
    )
    load_format: str = flag(
        "auto", "'dummy': read no weights, start from seeded random ones", choices=("auto", "dummy")
    )
    max_model_len: int = flag(512, "context length, tokens", at_least=1)
    max_num_seqs: int | None = flag(
        None, "sequences at a time in an engine (default: a step's, from 64 to 256)", type=int, at_least=1
    )
    rollout_quantization: str = flag(
        "none",
        "engines compute in 8 bits, and each push quantizes the trainers' weights as vLLM would: one scale per tensor "
        "('fp8'), per row ('fp8_per_channel') or per 128 x 128 block ('fp8_per_block'); needs a --correction, and GPUs "
        "of compute capability 8.9",
        choices=tuple(QUANTIZATIONS),
    )
    kv_cache_dtype: str = flag(
        "auto", "'fp8': engines keep keys and values in 8 bits, scale 1; needs a --correction", choices=("auto", "fp8")
    )
    engine_args: str = flag("{}", "any other arguments of vllm.LLM, as a JSON object")
    enforce_eager: bool = flag(True, "run vLLM without CUDA graphs: starts sooner, generates several times slower")
    push: str = flag(
        "auto",
        "'recorded': map the weights once, replay vLLM's copies; 'simple': handles and vLLM's loaders at each push; "
        "'gather': recorded, out of shards that each push gathers on every GPU; 'auto': recorded, but gather for "
        "shards on GPUs that cannot read one another's memory",
        choices=("auto", "recorded", "simple", "gather"),
    )
    bucket_mb: int = flag(
        256,
        "--push gather: MB of the buffer on each GPU through which it goes (but at least the largest parameter's)",
        at_least=1,
    )
    max_tokens: int = flag(16, "tokens to generate per completion, at most", at_least=1)
    steps: int = flag(
        12,
        "RLHF steps after the proof of the push; 0: the proof alone, without --checkpoint, --metrics, --reward, ...",
        at_least=0,
    )
    prompts: str | None = flag(
        None,
        "prompts in place of the script's: a file of JSON lines; or .json, .csv, .parquet or a dataset's folder, which "
        "the library datasets reads",
    )
    prompt_column: str = flag("prompt", "column of --prompts with the prompt: text, or a list of chat messages")
    split: str = flag("train", "split of --prompts, as datasets.load_dataset takes it: train[:90%%], for instance")
    reward: tuple[str, ...] = flag(
        (),
        "FILE.py:FUNCTION in place of the script's: of (prompt, completion), and row=, if it takes it; or TRL's, of "
        "(completions, **columns). May be given several times: the rewards add up",
        action="append",
    )
    reward_weights: str | None = flag(None, "of several --reward, in their order: 1,0.5, for instance (default: all 1)")
    reward_workers: int = flag(
        1, "processes that --reward runs in; 0: in the driver, where one that hangs is never cut off", at_least=0
    )
    max_prompt_length: int | None = flag(
        None, "tokens of a prompt of --prompts, at most (default: what --max-tokens leaves)", type=int, at_least=1
    )
    overlong: str = flag(
        "error", "what becomes of longer prompts: 'error': the run ends; 'drop': left out", choices=("error", "drop")
    )
    system: str | None = flag(None, "system message of chats; a prompt that is text becomes a chat's first message")
    stop: tuple[str, ...] = flag(
        (), "string that ends a completion, which keeps it; may be given several times", action="append"
    )
    rollout: str | None = flag(
        None,
        "FILE.py:FUNCTION that makes the samples of a step, for several turns or tools: of (generate, prompts, task); "
        "see docs/task.md",
    )
    eval_prompts: str | None = flag(
        None, "prompts to be answered greedily and rewarded, before, during and after the loop; a file as of --prompts"
    )
    eval_split: str = flag("train", "the same as --split, of --eval-prompts")
    eval_every: int = flag(0, "evaluate after every so many RLHF steps, too (0: only before and after)", at_least=0)
    save_best: str | None = flag(None, "write a checkpoint of the best evaluation to this folder")
    prompts_per_step: int = flag(8, "prompts of an RLHF step, shared out to the engines", at_least=1)
    group_size: int = flag(8, "completions per prompt", at_least=1)
    learning_rate: float | None = flag(
        None, "of AdamW (default: 1e-5; for random weights 2.56 / hidden size, at most 0.01)", type=float, at_least=0
    )
    temperature: float = flag(1.0, "of the sampler; the trainers divide their logits by it, too", above=0)
    top_p: float = flag(
        1.0, "the sampler takes the likeliest tokens up to this probability (1: all)", above=0, at_most=1
    )
    top_k: int = flag(0, "the sampler takes so many of the likeliest tokens (0: all)", at_least=0)
    num_iterations: int = flag(1, "optimizer steps on the same rollout", at_least=1)
    loss_type: str = flag(
        "dapo",
        "mean over 'dapo': all tokens; 'grpo': completions, of their means; 'dr_grpo': completions, of their sums / "
        "--max-tokens",
        choices=("dapo", "grpo", "dr_grpo"),
    )
    scale_rewards: str = flag(
        "group",
        "advantages are divided by the rewards' deviation in the group, in the batch, or by 1",
        choices=("group", "batch", "none"),
    )
    epsilon: float = flag(0.2, "clip of the ratio of new to sampler's probability, downwards", above=0)
    epsilon_high: float | None = flag(None, "the same, upwards (default: --epsilon)", type=float, above=0)
    correction: str = flag(
        "none",
        "weigh by the trainer's probability before the step over the sampler's, which takes a forward pass: each "
        "'token' or each 'sequence', by --correction-cap at most, or 'sequence_mask', TRL's default: sequences above "
        "it count nothing; 'none': the loss has its ratio to the sampler",
        choices=("none", "token", "sequence", "sequence_mask"),
    )
    correction_cap: float = flag(3.0, "largest factor of --correction", above=0)
    mask_truncated_completions: bool = flag(False, "do not learn from completions that --max-tokens has cut off")
    weight_decay: float = flag(0.0, "of AdamW, on all weights", at_least=0)
    max_grad_norm: float = flag(1.0, "the gradient is scaled down to this norm (0: never)", at_least=0)
    lr_scheduler: str = flag(
        "constant", "how the learning rate goes on after the warm-up", choices=("constant", "linear", "cosine")
    )
    warmup_steps: int = flag(0, "RLHF steps in which the learning rate rises to its full value", at_least=0)
    scheduled_steps: int | None = flag(
        None,
        "after so many RLHF steps, of all runs, a linear or cosine rate is 0 (default: --steps)",
        type=int,
        at_least=1,
    )
    kl_coef: float = flag(
        0.0, "weight of the KL to the starting weights, of which each trainer keeps a copy", at_least=0
    )
    tokens_per_micro_batch: int | None = flag(
        None,
        "tokens per forward and backward pass of a trainer, at most (default: found from free GPU memory)",
        type=int,
        at_least=1,
    )
    micro_batch_size: int | None = flag(
        None, "sequences per forward and backward pass, at most (default: no bound)", type=int, at_least=1
    )
    gradient_checkpointing: bool = flag(
        False, "keep only the inputs of layers for the backward pass: a third more arithmetic, much less memory"
    )
    compile: bool = flag(
        True,
        "on GPUs, let torch fuse the trainers' small kernels, which takes 7 to 70 s in a first step",
    )
    sleep_level: int | str = flag(
        "auto",
        "what engines give up while training, on GPUs: 2 weights and KV cache, 1 weights to the host, 0 nothing; "
        "'auto': 2, and 0 once a step was measured that has room beside them",
        choices=("auto", 0, 1, 2),
        type=level,
    )
    offload_optimizer: bool = flag(False, "keep the optimizer's 12 bytes per parameter in host memory between steps")
    check_replicas_every: int = flag(
        10,
        "compare all trainers' weights bitwise after so many RLHF steps, if there are several trainers; in any case in "
        "the proof, after the first step and the last, before a save, and after a loss (0: only then)",
        at_least=0,
    )
    logprob_tolerance: float | None = flag(
        None,
        "largest mean gap between engine and trainer log-probabilities, nats; above it the run fails "
        "(default: 0.08; with fp8 0.4)",
        type=float,
        above=0,
    )
    seed: int = flag(
        0, "seed of the weights' changes, the random weights and the token-id prompts", at_least=0, at_most=2**32 - 1
    )
    strict: bool = flag(False, "an element of the weights that cannot be compared is an error")
    output_json: str | None = flag(None, "write the report to this file")
    metrics: str | None = flag(
        None, "append a JSON line per RLHF step to this file, and one per loss: steps after it replace older lines"
    )
    plot: str | None = flag(None, "draw reward and time per stage into this PNG, by step (needs matplotlib)")
    report_to: str | None = flag(
        None, "send the metrics to these, too, each by its own library, offline as well: tensorboard,wandb,trackio"
    )
    trace: str | None = flag(None, "write a timeline of all actors to this file, for Perfetto or chrome://tracing")
    checkpoint: str | None = flag(None, "write a Hugging Face checkpoint to this folder at the end")
    checkpoint_every: int = flag(0, "write it after every so many RLHF steps, too (0: only at the end)", at_least=0)
    resume: str | None = flag(
        None, "go on from this --checkpoint folder, for --steps more; other flags as before, without --model"
    )
    ray_address: str | None = flag(None, "use this running Ray cluster; default: $RAY_ADDRESS, else a private one")
    gpus_per_node: int | None = flag(
        None, "GPUs of a cluster's node, at most (default: all that are free)", type=int, at_least=1
    )
    min_gpus: int | None = flag(
        None,
        "go on with so many, at least, when a cluster's node is gone and no other has room (default: --num-gpus)",
        type=int,
        at_least=1,
    )
    master_interface: str | None = flag(
        None, "network interface over which trainers of several nodes meet (default: that of the node's Ray address)"
    )
    timeout: float = flag(600.0, "seconds that actors have for one turn of a stage; the late count as lost", above=0)
    stage_timeout: str | None = flag(None, f"the same for single ones, as in push=5,rollout=60, of {', '.join(STAGES)}")
    max_restarts: int = flag(
        1, "how often a run that is in its RLHF loop replaces what died or hangs; 0: it ends", at_least=0
    )
    spare_processes: int | None = flag(
        None,
        "processes on each node that have imported vLLM and wait to take the place of an engine's "
        "(default: as many as one engine has; in a rehearsal none)",
        type=int,
        at_least=0,
    )
    verbose: bool = flag(False, "show the output of vLLM and the actors")

    @property
    def replica_size(self) -> int:
        """Trainers that make up a replica. --trainer auto must be resolved."""
        return (self.shard_size or self.num_gpus) if self.trainer == "fsdp" else 1

    @property
    def trainers_per_copy(self) -> int:
        """Trainers whose exports together are the model once. --push auto must be resolved."""
        return 1 if self.push == "gather" else self.replica_size

    @property
    def bucket_bytes(self) -> int | None:
        """Of the buffer of --push gather, which must be resolved; None with another push."""
        return self.bucket_mb * 10**6 if self.push == "gather" else None

    @property
    def gpus_of_one_node(self) -> int:
        """So many bundles in a row must be on one node: an engine's, and those of shards that it reads."""
        return math.lcm(self.tensor_parallel_size, self.trainers_per_copy)

    @property
    def engine_quantization(self) -> str | None:
        """vLLM's name for --rollout-quantization."""
        return QUANTIZATIONS[self.rollout_quantization]

    @property
    def in_8_bits(self) -> list[str]:
        """The flags with which engines compute less exactly than trainers."""
        given = {"rollout_quantization": self.rollout_quantization, "kv_cache_dtype": self.kv_cache_dtype}
        return [f"--{name.replace('_', '-')} {value}" for name, value in given.items() if "fp8" in value]

    @property
    def gap_tolerance(self) -> float:
        """--logprob-tolerance, or its default. In FP8 an H100 had up to 0.12 nats with random weights of Qwen2.5-0.5B's
        shape: 0.4 leaves room for models whose gap is larger."""
        return self.logprob_tolerance or (0.4 if self.in_8_bits else 0.08)

    @property
    def proof_noise(self) -> float:
        """By how much of its root mean square the proof changes a weight: by more than 8 bits make of it."""
        return 0.1 if self.in_8_bits else 0.02

    @property
    def num_engines(self) -> int:
        return self.num_gpus // self.tensor_parallel_size

    def spares(self, rehearsal: bool) -> int:
        """--spare-processes, or its default; none if nothing would be replaced."""
        if not self.steps or not self.max_restarts:
            return 0
        default = 0 if rehearsal else self.tensor_parallel_size + 1
        return default if self.spare_processes is None else self.spare_processes

    @property
    def longest_prompt(self) -> int:
        """Tokens that a prompt may have: those of a file may fill what --max-tokens leaves."""
        room = self.max_model_len - self.max_tokens
        return min(room, self.max_prompt_length or room) if self.prompts or self.eval_prompts else LONGEST_PROMPT

    @property
    def more_engine_args(self) -> dict:
        """Of --engine-args. Raises ValueError for what is no JSON."""
        return json.loads(self.engine_args)

    @property
    def weights_of_rewards(self) -> list[float]:
        """One for each --reward. Raises ValueError for what is no number."""
        if self.reward_weights is None:
            return [1.0] * max(1, len(self.reward))
        return [float(text) for text in self.reward_weights.split(",")]

    @property
    def lora(self) -> dict | None:
        """Keywords of colocate.adapters.Adapted, if adapters are trained."""
        if not self.lora_rank or not self.steps:
            return None
        base = self.model or DEFAULT_MODEL  # with --resume the checkpoint knows it
        return {"rank": self.lora_rank, "alpha": self.lora_alpha, "seed": self.seed, "base": base}

    @property
    def hold_options(self) -> dict:
        """Keywords of colocate.learner.hold. --trainer auto must be resolved."""
        shards = self.replica_size if self.trainer == "fsdp" else 0
        return {"shards": shards, "bucket_bytes": self.bucket_bytes, "lora": self.lora}

    @property
    def learner_options(self) -> dict:
        """Keywords of colocate.learner.Learner."""
        names = ["learning_rate", "weight_decay", "max_grad_norm", "lr_scheduler", "warmup_steps", "num_iterations"]
        names += ["epsilon", "epsilon_high", "temperature", "kl_coef", "correction", "correction_cap"]
        names += ["micro_batch_size", "tokens_per_micro_batch", "gradient_checkpointing", "compile"]
        options = {name: getattr(self, name) for name in names}
        return options | {"offload": self.offload_optimizer, "scheduled_steps": self.scheduled_steps or self.steps}

    @staticmethod
    def from_args(argv: list[str] | None = None, description: str = "") -> Config:
        formatter = argparse.RawDescriptionHelpFormatter
        usage = "python rlhf_colocate.py [flags]   (--help lists them)"
        parser = OneLine(usage=usage, description=description, formatter_class=formatter, allow_abbrev=False)
        for f in dataclasses.fields(Config):
            name = "--" + f.name.replace("_", "-")
            text = f.metadata["help"]
            if isinstance(f.default, bool):
                text += f" (default: {'on' if f.default else 'off'})"
                parser.add_argument(name, action=argparse.BooleanOptionalAction, default=f.default, help=text)
                continue
            if action := f.metadata.get("action"):
                parser.add_argument(name, action=action, default=[*f.default], help=text)
                continue
            kind = f.metadata.get("type") or (str if f.default is None else type(f.default))
            text += "" if f.default is None else f" (default: {f.default})"
            parser.add_argument(name, type=kind, default=f.default, choices=f.metadata.get("choices"), help=text)
        given = vars(parser.parse_args(argv))
        return Config(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What is done after which RLHF step of a run; `first` and `last` are the run's own."""

    config: Config
    first: int
    last: int

    def saves(self, step: int) -> bool:
        """Whether --checkpoint is written."""
        every = self.config.checkpoint_every or self.last
        return bool(self.config.checkpoint) and step >= self.first and (step == self.last or step % every == 0)

    def evaluates(self, step: int) -> bool:
        """Whether --eval-prompts are asked."""
        every = bool(self.config.eval_every) and step % self.config.eval_every == 0
        return bool(self.config.eval_prompts) and (step in (self.first - 1, self.last) or every)

    def verifies(self, step: int) -> bool:
        """Whether every element of the engines' weights is compared: of the first push after a sleep, and the last."""
        return step in (self.first, self.last)

    def compares(self, step: int) -> bool:
        """Whether the trainers' replicas are compared."""
        saves_best = bool(self.config.save_best) and self.evaluates(step)
        if step in (self.first, self.last) or self.saves(step) or saves_best:
            return True
        every = self.config.check_replicas_every
        return self.config.num_gpus > 1 and bool(every) and step % every == 0


def check_range(config: Config) -> None:
    """Raise Stop(USAGE) for a flag whose value is outside its range, is not a finite number, or is empty."""
    for f in dataclasses.fields(config):
        name = "--" + f.name.replace("_", "-")
        value = getattr(config, f.name)
        for text in value if isinstance(value, tuple) else [value]:
            empty = isinstance(text, str) and not (text if f.name == "stop" else text.strip())  # which may be a newline
            refuse_unless(not empty, f"{name} has an empty value. Give it one, or leave {name} out")
        if value is None or isinstance(value, (str, bool, tuple)):
            continue
        limits = {
            f"at least {f.metadata.get('at_least')}": value >= f.metadata.get("at_least", value),
            f"more than {f.metadata.get('above')}": value > f.metadata.get("above", -math.inf),
            f"at most {f.metadata.get('at_most')}": value <= f.metadata.get("at_most", value),
            f"less than {f.metadata.get('below')}": value < f.metadata.get("below", math.inf),
            "a finite number": math.isfinite(value),
        }
        hint = f"Leave {name} out" if f.default is None else f"Try: {name} {f.default}"
        for limit, holds in reversed(limits.items()):
            refuse_unless(holds, f"{name} {value} must be {limit}. {hint}")


def check_layout(config: Config) -> None:
    """Raise Stop(USAGE) for values out of range, and for counts and shares that cannot be laid out."""
    check_range(config)
    n = config.num_gpus
    tp = config.tensor_parallel_size
    best = max(t for t in range(1, min(n, tp) + 1) if n % t == 0)
    gpus = f"{n} GPU{'s' if n > 1 else ''}"
    message = f"--tensor-parallel-size {tp} does not divide {gpus}. Try: --tensor-parallel-size {best}"
    refuse_unless(n % tp == 0, message)
    trainer = config.trainer_gpu_share
    engine = config.engine_gpu_share
    shares = f"--trainer-gpu-share {trainer:g} and --engine-gpu-share {engine:g} add up to {trainer + engine:g}"
    fix = "Try: --trainer-gpu-share 0.4 --engine-gpu-share 0.4"
    refuse_unless(trainer + engine <= 1 + 1e-9, f"{shares}, but a GPU has 1 to give. {fix}")
    check_shards(config)
    check_adapters(config)
    least = config.min_gpus or n
    message = f"--min-gpus {least} must be a number of GPUs from {tp} (--tensor-parallel-size) to {n} (--num-gpus)"
    refuse_unless(tp <= least <= n, f"{message}. Try: --min-gpus {tp}")
    per_node = config.gpus_per_node or tp
    message = f"--gpus-per-node {per_node} holds no engine, which takes {tp} GPUs of one node"
    refuse_unless(per_node >= tp, f"{message}. Try: --gpus-per-node {tp}")
    stage_timeouts(config)


def check_shards(config: Config) -> None:
    """Raise Stop(USAGE) for shards that the trainers cannot make up."""
    size = config.shard_size
    if size is None:
        return
    n = config.num_gpus
    best = max(s for s in range(1, min(n, size) + 1) if n % s == 0)
    gpus = f"{n} GPU{'s' if n > 1 else ''}"
    refuse_unless(n % size == 0, f"--shard-size {size} does not divide {gpus}. Try: --shard-size {best}")
    message = f"--trainer replicated has no shards, and --shard-size is {size}. Try: --trainer fsdp, or leave one out"
    refuse_unless(config.trainer != "replicated" or size == 1, message)


def check_adapters(config: Config) -> None:
    """Raise Stop(USAGE) for adapters on shards, and for a scale without adapters."""
    flags = [("--trainer fsdp", config.trainer == "fsdp"), ("--push gather", config.push == "gather")]
    flags += [(f"--shard-size {config.shard_size}", (config.shard_size or 1) > 1)]
    asked = [flag for flag, given in flags if given]
    message = f"--lora-rank {config.lora_rank} does not work with shards. Leave out: {' and '.join(asked)}"
    refuse_unless(not config.lora_rank or not asked, message)
    message = f"--lora-alpha {config.lora_alpha:g} scales adapters, and none are trained. Try: --lora-rank 16"
    message += ", or leave it out"
    refuse_unless(bool(config.lora_rank) or config.lora_alpha == Config.lora_alpha, message)


def stage_timeouts(config: Config) -> dict[str, float]:
    """{stage: seconds} of --stage-timeout. Raises Stop(USAGE) for what is not of the form push=5,rollout=60."""
    limits = {}
    for part in config.stage_timeout.split(",") if config.stage_timeout is not None else []:
        stage, _, text = part.partition("=")
        stage = stage.strip()
        seconds = 0.0
        with contextlib.suppress(ValueError):
            seconds = float(text)
        message = f"--stage-timeout {part} names no stage. It takes STAGE=SECONDS, with a stage of {', '.join(STAGES)}"
        refuse_unless(stage in STAGES, message)
        refuse_unless(stage not in limits, f"--stage-timeout has {stage} twice. Leave one out")
        message = f"--stage-timeout {part} is not of the form STAGE=SECONDS. Try: --stage-timeout {stage}=60"
        refuse_unless(0 < seconds < math.inf, message)
        limits[stage] = seconds
    return limits


def check_rewards(config: Config) -> None:
    """Raise Stop(USAGE) for --reward-weights that are not one finite number for each --reward."""
    if config.reward_weights is None:
        return
    count = len(config.reward)
    weights = []
    with contextlib.suppress(ValueError):
        weights = [weight for weight in config.weights_of_rewards if math.isfinite(weight)]
    found = f"--reward-weights {config.reward_weights} is not a number for each of {count} --reward"
    fix = f"Try: --reward-weights {','.join(['1'] * count)}" if count else "Leave it out"
    refuse_unless(0 < len(weights) == count, f"{found}. {fix}")


def check_engine_args(config: Config, known: set[str]) -> None:
    """Raise Stop(USAGE) for --engine-args that are no JSON object, or have names that vllm.LLM does not know, or ours.

    known: names of vLLM's arguments.
    """
    given = None
    with contextlib.suppress(ValueError):
        given = config.more_engine_args
    example = """Try: --engine-args '{"block_size": 32}'"""
    refuse_unless(isinstance(given, dict), f"--engine-args {config.engine_args} is no JSON object. {example}")
    for name in given:
        flag = OWN_ENGINE_ARGS.get(name)
        if flag == "--enforce-eager" and given[name] is False:
            flag = "--no-enforce-eager"
        fix = f"Try: {flag}" if flag else "Leave it out: the layout and the push need it as it is"
        refuse_unless(name not in OWN_ENGINE_ARGS, f"--engine-args sets {name}, which this script sets. {fix}")
        message = f"--engine-args sets {name}, with which engines hold what no push can write"
        refuse_unless(name not in UNFIT_ENGINE_ARGS, f"{message}. {UNFIT_ENGINE_ARGS.get(name)}")
        near = difflib.get_close_matches(name, known, 1, 0)
        fix = f"Did you mean {near[0]}?" if near else "Leave it out"
        refuse_unless(name in known, f"--engine-args has {name}, which vLLM does not know. {fix}")


def check_loop(config: Config) -> None:
    """Raise Stop(USAGE) for an RLHF loop that cannot run, and for flags that do not go together."""
    # Those of --prompts are measured later, with the tokenizer.
    shortest = 1 if config.prompts else LONGEST_PROMPT
    what = "a prompt" if config.prompts else f"prompts of {LONGEST_PROMPT} tokens"
    message = f"--max-model-len {config.max_model_len} is too short for {what} and --max-tokens {config.max_tokens}"
    fix = f"Try: --max-model-len {config.max_tokens + LONGEST_PROMPT}"
    refuse_unless(config.max_tokens + shortest <= config.max_model_len, f"{message}. {fix}")
    if config.resume:
        refuse_unless(config.model is None, "--resume brings its own model. Leave --model out")
        refuse_unless(config.load_format != "dummy", "--resume reads its weights from files. Leave --load-format out")
        decays = config.lr_scheduler != "constant" and config.scheduled_steps is None
        message = f"--resume with --lr-scheduler {config.lr_scheduler} must know where it ends, of all runs' steps"
        refuse_unless(not decays, f"{message}. Try: --scheduled-steps with their sum")
    every = config.checkpoint_every
    message = f"--checkpoint-every {every} needs a folder to write to. Try: --checkpoint DIR"
    refuse_unless(bool(config.checkpoint) or not every, message)
    for name in ("eval_every", "save_best"):
        flag = "--" + name.replace("_", "-")
        message = f"{flag} needs prompts to evaluate with. Try: --eval-prompts FILE.jsonl"
        refuse_unless(bool(config.eval_prompts) or not getattr(config, name), message)
    check_rewards(config)
    if not config.steps:
        # What only sets how a step is done may stay. These would be asked for in vain.
        names = ("checkpoint", "metrics", "plot", "reward", "rollout", "eval_prompts", "report_to")
        flags = ["--" + name.replace("_", "-") for name in names if getattr(config, name)]
        message = f"{' and '.join(flags)}: there is no RLHF step, since --steps is 0. Try: --steps 1, or leave it out"
        refuse_unless(not flags, message)
        return
    engines = config.num_engines
    prompts = config.prompts_per_step
    sequences = prompts * config.group_size
    message = f"--group-size {config.group_size} leaves a completion nothing to be compared with. Try: --group-size 8"
    refuse_unless(config.group_size > 1, message)
    message = f"--prompts-per-step {prompts} is fewer than the {engines} engines. Try: --prompts-per-step {engines}"
    refuse_unless(prompts >= engines, message)
    refuse_unless(
        sequences >= config.num_gpus,
        f"--prompts-per-step {prompts} with --group-size {config.group_size} gives {sequences} completions, fewer than "
        f"the {config.num_gpus} trainers. Try: --prompts-per-step {config.num_gpus}",
    )
    flags = " and ".join(config.in_8_bits)
    message = f"{flags}: engines in 8 bits give other probabilities than the trainers, and --correction is none"
    refuse_unless(not flags or config.correction != "none", f"{message}. Try: --correction token")
    cap = config.correction_cap
    message = f"--correction-cap {cap:g} bounds what --correction weighs by, and that is none. Try: --correction token"
    refuse_unless(config.correction != "none" or cap == Config.correction_cap, message)
    message = "--dtype float16 loses small gradients, which vanish in it. Try: --dtype bfloat16, or --steps 0"
    refuse_unless(config.dtype != "float16", message)
