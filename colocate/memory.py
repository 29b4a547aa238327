"""How much memory a run takes, and whether the machine has it. Parameters are counted, not files; steps measured."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from colocate.config import LONGEST_PROMPT, MISSING, Config, Stop, refuse_unless

if TYPE_CHECKING:
    import torch

    from colocate.report import Report

MAX_NUM_SEQS = 64  # at a time in an engine, at least
MOST_NUM_SEQS = 256  # at most: from here on more at a time hardly make an engine faster
AWAKE_SHARE = 0.9  # of a GPU's memory that awake engines and a trainer's step may take together
WITHOUT_CACHE = ("linear_attention", "mamba", "mamba2", "conv", "moe", "mlp")  # layers without keys and values
GIB = 2**30
PROCESS_BYTES = GIB // 2  # measured with a tiny model: a trainer 0.3 GiB, an engine 0.4, a worker 0.5


def itemsize(config: Config) -> int:
    return 4 if config.dtype == "float32" else 2


def engine_bytes(config: Config, model_config: dict, parameters: int) -> int:
    """An engine's weights. With --rollout-quantization all have 8 bits but embeddings and head: an estimate, since it
    counts neither scales nor what else stays in 16 bits (norms, biases, routers).
    """
    if not config.engine_quantization:
        return parameters * itemsize(config)
    embeddings = (model_config.get("vocab_size") or 0) * (model_config.get("hidden_size") or 0)
    wide = min(parameters, embeddings * (1 if model_config.get("tie_word_embeddings") else 2))
    return parameters + wide * (itemsize(config) - 1)


def trained_parameters(config: Config, model_config: dict, parameters: int) -> int:
    """How many numbers the optimizer has: all, or those of adapters, as many as square matrices would need, or more."""
    width = model_config.get("hidden_size")
    return min(parameters, -(-2 * config.lora_rank * parameters // width)) if config.lora and width else parameters


def trainer_bytes(config: Config, parameters: int, trained: int | None = None) -> tuple[int, int]:
    """(between steps, at most during one): weights, masters and moments (12 bytes per parameter), gradient (4).

    trained: see `trained_parameters`; None: all. And with --kl-coef, or --lora-rank, a copy of the weights. Shards are
    that many times smaller; their masters are never offloaded. --push gather has its buffer. Activations are not
    counted, nor the layers that FSDP gathers, nor that a parameter may be larger than the buffer.
    """
    sharded = config.trainer == "fsdp"
    gathered = min(parameters * itemsize(config), config.bucket_bytes or 0)
    parameters = -(-parameters // config.replica_size)
    weights = parameters * itemsize(config)
    masters = 4 * parameters
    if not config.steps:
        kept = weights + (masters if sharded else 0) + gathered
        return kept, kept
    trained = parameters if trained is None or sharded else trained
    models = weights * copies_of_weights(config) + gathered
    aside = 0  # what the model computes with, while it computes with the starting weights
    if config.kl_coef > 0 and not config.lora:
        aside = masters if sharded else weights
    kept = models
    if sharded or not config.offload_optimizer:
        kept += 4 * trained
    if not config.offload_optimizer:
        kept += 8 * trained
    return kept, models + aside + 16 * trained


def copies_of_weights(config: Config) -> int:
    """2 if the starting weights are kept, for the KL or for adapters."""
    return 2 if config.kl_coef > 0 or config.lora else 1


def checkpoint_bytes(config: Config, parameters: int, trained: int | None = None) -> int:
    """Size of a --checkpoint: weights, float32 masters and two moments, and what KL or adapters start from."""
    return parameters * copies_of_weights(config) * itemsize(config) + 12 * (trained or parameters)


def kv_bytes(config: Config, model_config: dict, tokens: int) -> int:
    """Bytes of one rank's KV cache for a sequence of so many tokens: keys and values of attention layers alone.

    Layers with a sliding window keep the window. MLA keeps one compressed row (https://arxiv.org/abs/2405.04434).
    """
    heads = model_config.get("num_attention_heads") or 1
    kv_heads = 1 if model_config.get("multi_query") else model_config.get("num_key_value_heads") or heads
    head_dim = model_config.get("head_dim") or (model_config.get("hidden_size") or 0) // heads
    width = 2 * -(-kv_heads // config.tensor_parallel_size) * head_dim
    if rank := model_config.get("kv_lora_rank"):
        width = rank + (model_config.get("qk_rope_head_dim") or 0)
    window = min(model_config.get("sliding_window") or tokens, tokens)
    kinds = model_config.get("layer_types") or ["sliding_attention"] * (model_config.get("num_hidden_layers") or 0)
    kept = {"sliding_attention": window} | dict.fromkeys(WITHOUT_CACHE, 0)  # other kinds keep all
    size = 1 if config.kv_cache_dtype == "fp8" else itemsize(config)
    return sum(kept.get(kind, tokens) for kind in kinds) * width * size


def rehearsal_kv_bytes(config: Config, model_config: dict) -> int:
    """Per rank, for all sequences of an engine in full length, as vLLM's CPU build cannot resume a seeded request.

    In blocks of 128 tokens, one more than a sequence fills. Windows do not count: vLLM may keep whole sequences.
    """
    longest = config.max_model_len if config.rollout else config.max_tokens + config.longest_prompt
    tokens = 128 * (-(-longest // 128) + 1)
    whole = model_config | {"sliding_window": None}
    return max(64 * 2**20, max_num_seqs(config, rehearsal=True) * kv_bytes(config, whole, tokens))


def longest_that_fits(config: Config, model_config: dict, size: float) -> int:
    """Tokens of a sequence whose KV cache fits into so many bytes, in steps of 128; 0 if none does."""
    tokens = config.max_model_len // 128 * 128
    while tokens and kv_bytes(config, model_config, tokens) > size:
        tokens = tokens // 2 // 128 * 128
    return tokens


def check_engine(config: Config, model_config: dict, size: float, where: str) -> None:
    """Raise Stop(MISSING) if a KV cache of so many bytes cannot hold one sequence of --max-model-len."""
    need = kv_bytes(config, model_config, config.max_model_len)
    if need <= size:
        return
    length = longest_that_fits(config, model_config, size)
    fix = "Try a higher --gpu-memory-utilization or --tensor-parallel-size."
    if length >= config.max_tokens + LONGEST_PROMPT:
        fix = f"Try: --max-model-len {length}"
    found = f"A sequence of --max-model-len {config.max_model_len} fills {need / GIB:.1f} GiB of KV cache"
    raise Stop(f"{found}; {where} leaves {max(size, 0) / GIB:.1f} GiB. {fix}", MISSING)


def check_gpu_memory(config: Config, model_config: dict, parameters: int, gpus: list[dict]) -> None:
    """Raise Stop(MISSING) if an engine's share is too small for the model, or a GPU too full for trainer and engine.

    gpus: as preflight.find_gpus returns them; one whose memory is not known passes.
    """
    kept, peak = trainer_bytes(config, parameters, trained_parameters(config, model_config, parameters))
    weights = engine_bytes(config, model_config, parameters) / config.tensor_parallel_size
    for gpu in gpus:
        if not gpu["total"] or not gpu["free"]:
            continue
        engine = gpu["total"] * 2**20 * config.gpu_memory_utilization
        share = f"--gpu-memory-utilization {config.gpu_memory_utilization:g} of GPU {gpu['index']}"
        if weights >= engine:
            found = f"{share} is {engine / GIB:.1f} GiB, but an engine's part of the weights takes {weights / GIB:.1f}"
            raise Stop(f"{found} GiB. Try a higher --gpu-memory-utilization or --tensor-parallel-size.", MISSING)
        check_engine(config, model_config, engine - weights, f"beside the weights, {share}")
        asleep = 0 if config.sleep_level else engine
        need = max(engine + kept, asleep + peak) / GIB
        if gpu["free"] / 1024 < need:
            parts = f"an engine takes {engine / GIB:.1f} GiB, a trainer {kept / GIB:.1f}, in a step {peak / GIB:.1f}"
            fix = f"Try {' or '.join(what_helps(config, gpu['free'] / 1024, engine / GIB, kept / GIB, peak / GIB))}."
            if gpu["free"] < 0.9 * gpu["total"]:
                fix = f"End what fills it (see nvidia-smi). {fix}"
            found = f"GPU {gpu['index']} has {gpu['free'] / 1024:.1f} GiB free, but the run needs {need:.1f}: {parts}"
            raise Stop(f"{found}. {fix}", MISSING)


def choose_trainer(
    config: Config, architecture: str, can_shard: bool, check: Callable[[Config], None]
) -> tuple[Config, str]:
    """The configuration with --trainer auto and --shard-size resolved, and why: (config, note).

    can_shard: the model's layers were found. check: raises Stop for a configuration that does not fit into memory.
    Raises Stop(USAGE) for a model that cannot be sharded and is to be. With several GPUs, the smallest replica that
    fits is the best: most of what its engine needs then lies on the engine's own GPUs.
    """

    def fits(candidate: Config) -> bool:
        try:
            check(candidate)
        except Stop:
            return False
        return True

    n = config.num_gpus
    wants_shards = config.shard_size is not None or config.push == "gather"
    asked = config.trainer == "fsdp" or (config.trainer == "auto" and wants_shards)
    message = f"--trainer fsdp shards a model by its layers, and those of {architecture} were not found"
    refuse_unless(can_shard or not asked, f"{message}. Try: --trainer replicated")
    if asked and config.shard_size:
        return dataclasses.replace(config, trainer="fsdp"), ""
    replicated = dataclasses.replace(config, trainer="replicated")
    if not asked:
        if config.trainer == "replicated" or n == 1 or not can_shard or config.lora_rank:
            return replicated, ""
        if fits(replicated):
            return replicated, "--trainer auto: replicated, as a whole replica with its optimizer fits beside an engine"
    least = max(config.tensor_parallel_size, min(n, 2))
    sizes = [size for size in range(least, n + 1) if n % size == 0]
    candidates = [dataclasses.replace(config, trainer="fsdp", shard_size=size) for size in sizes]
    chosen = next(filter(fits, candidates), candidates[-1])
    why = "the smallest that fits beside an engine"
    if not asked:
        why += ", as a whole replica does not"
    return chosen, f"--trainer {config.trainer}: fsdp with --shard-size {chosen.shard_size}, {why}"


def what_helps(config: Config, free: float, engine: float, kept: float, peak: float) -> list[str]:
    """Flags with which less memory is needed, in GiB as in `check_gpu_memory`, and none that changes nothing."""
    if peak > free:  # a step alone, the engine being asleep
        helps = ["a smaller --model", "--steps 0 for the push alone"]
        if not config.lora_rank:
            helps.append("adapters (--lora-rank 16)")
        if config.replica_size < config.num_gpus and not config.lora_rank:
            helps.append(f"--trainer fsdp --shard-size {config.num_gpus}")
        return helps
    helps = ["a lower --gpu-memory-utilization"]
    if not config.sleep_level and config.steps:
        helps.append("--sleep-level 2")
    if not config.offload_optimizer and config.steps and engine + kept > free and not config.lora_rank:
        helps.append("--offload-optimizer")
    return helps


def check_host_memory(config: Config, model_config: dict, parameters: int, available: int) -> None:
    """The same for the rehearsal, where all trainers and engines share the host's memory. available: bytes."""
    n = config.num_gpus
    cache = rehearsal_kv_bytes(config, model_config)
    check_engine(config, model_config, cache, "the rehearsal's engine")
    trainers = n * trainer_bytes(config, parameters, trained_parameters(config, model_config, parameters))[1]
    engines = config.num_engines * parameters * itemsize(config) + n * cache
    processes = (2 * n + config.num_engines + config.spares(rehearsal=True)) * PROCESS_BYTES
    need = trainers + engines + processes
    if need <= available:
        return
    fix = "Try a smaller --model." if n == 1 else "Try: --num-gpus 1 --tensor-parallel-size 1"
    parts = f"{n} trainers {trainers / GIB:.1f} GiB, {config.num_engines} engines {engines / GIB:.1f}"
    found = f"{available / GIB:.1f} GiB of memory are free, but the rehearsal needs {need / GIB:.1f}: {parts}"
    raise Stop(f"{found}, {processes / GIB:.1f} for the processes. {fix}", MISSING)


# ---------------------------------------------------------------------------------------------------------------------
# What a step takes, and whether engines have to sleep for it
# ---------------------------------------------------------------------------------------------------------------------


def max_num_seqs(config: Config, rehearsal: bool) -> int:
    """Sequences at a time in an engine: all that it has in an RLHF step, within bounds.

    A rehearsal's KV cache is made for MAX_NUM_SEQS, see `rehearsal_kv_bytes`.
    """
    if config.max_num_seqs:
        return config.max_num_seqs
    if rehearsal or not config.steps:
        return MAX_NUM_SEQS
    per_engine = -(-config.prompts_per_step // config.num_engines) * config.group_size
    return min(max(per_engine, MAX_NUM_SEQS), MOST_NUM_SEQS)


@contextlib.contextmanager
def of_step(device: torch.device) -> Iterator[dict[str, int]]:
    """Measure a trainer's step. Yields a dict that gets {"total", "step"} at its end; on a CPU it stays empty.

    total: bytes of the GPU; step: bytes that torch takes of it in the step at most, beyond what it held before.
    """
    found: dict[str, int] = {}
    if device.type == "cpu":
        yield found
        return
    import torch

    torch.cuda.reset_peak_memory_stats(device)
    held = torch.cuda.memory_reserved(device)
    yield found
    found["total"] = torch.cuda.mem_get_info(device)[1]
    found["step"] = torch.cuda.max_memory_reserved(device) - held


@dataclasses.dataclass(frozen=True)
class Measured:
    """Bytes of the fullest GPU in one step: of all (`total`), in use by all before the step with the engine awake
    (`awake`), and what the trainer took beyond that (`step`), with so many tokens of prompts and completions.
    """

    total: int
    awake: int
    step: int
    tokens: int

    def needs(self, tokens: int) -> float:
        """Bytes of a step with so many tokens beside an awake engine. With more of them it grows in proportion."""
        return self.awake + self.step * max(1.0, tokens / self.tokens)

    def fits_awake(self, tokens: int) -> bool:
        return self.needs(tokens) <= AWAKE_SHARE * self.total


class SleepLevel:
    """--sleep-level. `auto` is 2 in the first step, which is measured, and then 0 for each step that fits.

    A GPU's memory is measured, not computed: what a step takes depends on the model's code, on torch's allocator and on
    the lengths of the completions.
    """

    def __init__(self, setting: int | str, report: Report):
        self.setting = setting
        self.report = report
        self.deepest = 2 if setting == "auto" else setting
        self.measured: Measured | None = None  # of the step with the most tokens
        self.awake = 0  # bytes in use after the last rollout

    def forget(self) -> None:
        """New trainers choose their micro-batches anew: their first step is measured again."""
        self.measured = None

    def choose(self, samples: list[dict]) -> int:
        """The level for a step with these samples."""
        if self.setting != "auto" or not self.measured:
            return self.deepest
        tokens = count_tokens(samples)
        level = 0 if self.measured.fits_awake(tokens) else 2
        needs, total = self.measured.needs(tokens) / GIB, self.measured.total / GIB
        found = f"a step beside an awake engine takes {needs:.1f} of {total:.1f} GiB, {AWAKE_SHARE:.0%} may be taken"
        self.report.sleeps(level, found)
        return level

    def note(self, used: list[tuple[int, int]]) -> list[float]:
        """used: what each engine's `sleep` returned. Returns GiB in use on the fullest GPU, before and after."""
        before, after = (max(of_engines) for of_engines in zip(*used, strict=True))
        self.awake = before
        return [before / GIB, after / GIB]

    def measure(self, samples: list[dict], gpus: list[dict[str, int]]) -> dict[str, float]:
        """gpus: `of_step` of all trainers, after these samples. Returns {"step_gib"} for the metrics, {} on a CPU."""
        if not all(gpus):
            return {}
        step = max(gpu["step"] for gpu in gpus)
        measured = Measured(min(gpu["total"] for gpu in gpus), self.awake, step, count_tokens(samples))
        if not self.measured or measured.tokens >= self.measured.tokens:
            self.measured = measured
        return {"step_gib": step / GIB}


def count_tokens(samples: list[dict]) -> int:
    return sum(len(sample["prompt"]) + len(sample["tokens"]) for sample in samples)
