"""The flags, what can be wrong with them, and how a run ends before its time: `Config`, `Stop`, exit codes.

Knows neither torch, nor Ray, nor the machine.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math

PASS, FAIL, USAGE, MISSING, INTERRUPTED = 0, 1, 2, 3, 130  # exit codes
# Stages that wait for actors.
STAGES = ("start", "connect", "rollout", "perturb", "push", "verify", "sleep", "train", "wake", "checkpoint", "recover")
LONGEST_PROMPT = 48  # tokens, of those that the script brings along
DEFAULT_MODEL = "facebook/opt-125m"
# fault -> (what is done, the check that must fail)
FAULTS = {
    "drop-tensor": ("one weight is not sent", "push"),
    "swap-tensors": ("two weights of one shape are sent under each other's name", "transport"),
    "flip-element": ("one bit of one loaded parameter is flipped", "placement"),
    "wrong-tp-slice": ("rank 0 loads rank 1's slice of one weight", "placement"),
    "drift-replica": ("the last trainer's weights differ from the others'", "replicas"),
    "skip-push": ("nothing is pushed", "changed"),
}


class Stop(Exception):
    """Ends the run with one message and an exit code."""

    def __init__(self, message: str, code: int = FAIL):
        super().__init__(message)
        self.code = code


def require(ok: bool, found: str, needed: str, fix: str, code: int = USAGE) -> None:
    """Raise Stop unless ok. Every message has the same three parts, the last one ready to type."""
    if not ok:
        raise Stop(f"found {found}; needed {needed}; {fix}", code)


def flag(default, text: str, **extra):
    return dataclasses.field(default=default, metadata={"help": text, **extra})


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that can be set; the command line's flags are made from it."""

    model: str | None = flag(None, f"hub id, or folder of a Hugging Face checkpoint (default: {DEFAULT_MODEL})")
    num_gpus: int = flag(4, "GPUs, which is bundles, which is training actors")
    tensor_parallel_size: int = flag(2, "GPUs per vLLM engine; num-gpus / this many engines are started")
    trainer_gpu_share: float = flag(0.4, "share of a GPU that Ray books for a training actor")
    engine_gpu_share: float = flag(0.4, "share of a GPU that Ray books for an engine's worker")
    gpu_memory_utilization: float = flag(0.4, "share of each GPU's memory that a vLLM engine may fill")
    dtype: str = flag(
        "auto",
        "dtype of trainer and engine; 'auto': bfloat16 on GPUs and on CPUs that multiply it fast, float32 on others",
        choices=("auto", "bfloat16", "float16", "float32"),
    )
    load_format: str = flag(
        "auto", "'dummy': read no weights, start from seeded random ones", choices=("auto", "dummy")
    )
    max_model_len: int = flag(512, "context length, tokens")
    enforce_eager: bool = flag(True, "run vLLM without CUDA graphs: starts sooner, generates slower")
    push: str = flag(
        "recorded",
        "'recorded': map the weights once, replay vLLM's copies; 'simple': handles and vLLM's loaders at each push",
        choices=("recorded", "simple"),
    )
    max_tokens: int = flag(16, "tokens to generate per completion, at most")
    steps: int = flag(12, "RLHF steps after the proof of the push; 0: the proof alone")
    prompts_per_step: int = flag(8, "prompts of an RLHF step, shared out to the engines")
    group_size: int = flag(8, "completions per prompt")
    learning_rate: float | None = flag(
        None, "of AdamW (default: 1e-5; for random weights 2.56 / hidden size, at most 0.01)", type=float
    )
    clip_range: float = flag(0.2, "GRPO's clip of the ratio of new to sampler's probability")
    kl_coef: float = flag(0.0, "weight of the KL to the starting weights, of which it keeps a copy")
    micro_batch_size: int = flag(8, "sequences per forward and backward pass of a training actor")
    sleep_level: int = flag(
        2,
        "what engines give up while training, on GPUs: 2 weights and KV cache, 1 weights to the host, 0 nothing",
        choices=(0, 1, 2),
    )
    offload_optimizer: bool = flag(False, "keep the optimizer's 12 bytes per parameter in host memory between steps")
    logprob_tolerance: float = flag(0.08, "largest mean gap between engine and trainer log-probabilities, nats")
    seed: int = flag(0, "seed of the weights' changes, the random weights and the token-id prompts")
    strict: bool = flag(False, "an element of the weights that cannot be compared is an error")
    inject: str | None = flag(None, "break the run on purpose; it must end with FAIL", choices=tuple(FAULTS))
    output_json: str | None = flag(None, "write the report to this file")
    metrics: str | None = flag(
        None, "append one JSON line per RLHF step to this file, and one per loss: what follows replaces later steps"
    )
    plot: str | None = flag(None, "draw reward and time per phase into this PNG (needs matplotlib)")
    trace: str | None = flag(None, "write a timeline of all actors to this file, for Perfetto or chrome://tracing")
    checkpoint: str | None = flag(None, "write a Hugging Face checkpoint to this folder at the end")
    checkpoint_every: int = flag(0, "write it after every so many RLHF steps, too (0: only at the end)")
    resume: str | None = flag(None, "go on from this --checkpoint folder, for --steps more; the other flags as before")
    ray_address: str | None = flag(None, "use this running Ray cluster; default: $RAY_ADDRESS, else a private one")
    timeout: float = flag(600.0, "seconds that actors have for one turn of a stage; the late count as lost")
    stage_timeout: str | None = flag(None, f"the same for single ones, as in push=5,rollout=60, of {', '.join(STAGES)}")
    max_restarts: int = flag(1, "how often a run that is in its RLHF loop rebuilds what died or hangs; 0: it ends")
    verbose: bool = flag(False, "show the output of vLLM and the actors")

    @property
    def num_engines(self) -> int:
        return self.num_gpus // self.tensor_parallel_size

    @staticmethod
    def from_args(argv: list[str] | None = None, description: str = "") -> Config:
        formatter = argparse.RawDescriptionHelpFormatter
        usage = "python rlhf_colocate.py [flags]   (--help lists them)"
        parser = argparse.ArgumentParser(usage=usage, description=description, formatter_class=formatter)
        for f in dataclasses.fields(Config):
            name, text = "--" + f.name.replace("_", "-"), f.metadata["help"]
            if isinstance(f.default, bool):
                parser.add_argument(name, action=argparse.BooleanOptionalAction, default=f.default, help=text)
                continue
            kind = f.metadata.get("type") or (str if f.default is None else type(f.default))
            text += "" if f.default is None else f" (default: {f.default})"
            parser.add_argument(name, type=kind, default=f.default, choices=f.metadata.get("choices"), help=text)
        return Config(**vars(parser.parse_args(argv)))


def check_layout(config: Config) -> None:
    """Raise Stop(USAGE) for counts and shares that cannot be laid out."""
    n, tp = config.num_gpus, config.tensor_parallel_size
    found, fix = f"--num-gpus {n} --tensor-parallel-size {tp}", "type --num-gpus 1 --tensor-parallel-size 1"
    require(min(n, tp) > 0, found, "1 or more of each", fix)
    best = max(t for t in range(1, min(n, tp) + 1) if n % t == 0)
    fix = f"type --tensor-parallel-size {best}"
    require(n % tp == 0, f"{n} GPUs and --tensor-parallel-size {tp}", f"a divisor of {n}", fix)
    trainer, engine = config.trainer_gpu_share, config.engine_gpu_share
    fits = min(trainer, engine) > 0 and trainer + engine <= 1 + 1e-9
    found = f"GPU shares {trainer:g} (trainer) + {engine:g} (engine) = {trainer + engine:g}"
    needed, fix = "two positive shares whose sum is at most 1", "type --trainer-gpu-share 0.4 --engine-gpu-share 0.4"
    require(fits, found, needed, fix)
    share = config.gpu_memory_utilization
    needed, fix = "a share between 0 and 1 that leaves room for the trainer", "type --gpu-memory-utilization 0.4"
    require(0 < share < 1, f"--gpu-memory-utilization {share:g}", needed, fix)
    stage_timeouts(config)
    found, fix = f"--timeout {config.timeout:g}", "leave out --timeout"
    require(0 < config.timeout < math.inf, found, "seconds, more than 0", fix)
    found, fix = f"--max-restarts {config.max_restarts}", "type --max-restarts 0"
    require(config.max_restarts >= 0, found, "0 or more", fix)
    if config.inject == "wrong-tp-slice":
        require(tp > 1, "--inject wrong-tp-slice with one rank", "two", "type --tensor-parallel-size 2")
    if config.inject == "drift-replica":
        require(n > 1, "--inject drift-replica with one trainer", "two", "type --num-gpus 2")


def stage_timeouts(config: Config) -> dict[str, float]:
    """{stage: seconds} of --stage-timeout. Raises Stop(USAGE) for what is not of the form push=5,rollout=60."""
    limits, needed = {}, f"STAGE=SECONDS[,...] with a stage of {', '.join(STAGES)}"
    for part in filter(None, (config.stage_timeout or "").split(",")):
        stage, _, text = part.partition("=")
        stage, seconds = stage.strip(), 0.0
        with contextlib.suppress(ValueError):
            seconds = float(text)
        ok = stage in STAGES and 0 < seconds < math.inf
        require(ok, f"--stage-timeout {part}", needed, "type --stage-timeout push=5,rollout=60")
        limits[stage] = seconds
    return limits


def check_loop(config: Config) -> None:
    """Raise Stop(USAGE) or Stop(MISSING) for an RLHF loop that cannot run."""
    prompts, sequences = config.prompts_per_step, config.prompts_per_step * config.group_size
    negative = [n for n in ("steps", "checkpoint_every") if getattr(config, n) < 0]
    negative += [n for n in ("max_tokens", "micro_batch_size", "clip_range") if getattr(config, n) <= 0]
    negative += [n for n in ("learning_rate", "kl_coef") if (getattr(config, n) or 0) < 0]
    for name in negative:
        what = "--" + name.replace("_", "-")
        require(False, f"{what} {getattr(config, name)}", "a positive number", f"leave out {what}")
    needed = f"{LONGEST_PROMPT} less than --max-model-len {config.max_model_len}, for the prompt"
    fix = f"type --max-model-len {config.max_tokens + LONGEST_PROMPT}"
    fits = config.max_tokens + LONGEST_PROMPT <= config.max_model_len
    require(fits, f"--max-tokens {config.max_tokens}", needed, fix)
    if not config.steps:
        return
    found, needed = f"--group-size {config.group_size}", "2 or more: a completion is judged by its group"
    require(config.group_size > 1, found, needed, "type --group-size 8")
    needed, fix = f"one for each of {config.num_engines} engines", f"type --prompts-per-step {config.num_engines}"
    require(prompts >= config.num_engines, f"--prompts-per-step {prompts}", needed, fix)
    needed, fix = f"one for each of {config.num_gpus} training actors", f"type --prompts-per-step {config.num_gpus}"
    require(sequences >= config.num_gpus, f"{sequences} completions per step", needed, fix)
    needed, fix = "bfloat16 or float32: float16's small gradients vanish", "type --dtype bfloat16"
    require(config.dtype != "float16", "--dtype float16 with --steps", needed, fix)
    found, fix = f"--checkpoint-every {config.checkpoint_every} alone", "type --checkpoint DIR"
    require(bool(config.checkpoint) or not config.checkpoint_every, found, "a folder for it", fix)
