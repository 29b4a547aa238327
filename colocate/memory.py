"""How much memory a run takes, and whether the machine has it. Parameters are counted, not files."""

from __future__ import annotations

from colocate.config import LONGEST_PROMPT, MISSING, Config, Stop

MAX_NUM_SEQS = 64  # at a time in an engine
WITHOUT_CACHE = ("linear_attention", "mamba", "mamba2", "conv", "moe", "mlp")  # layers without keys and values
GIB = 2**30
PROCESS_BYTES = GIB // 2  # measured with a tiny model: a trainer 0.3 GiB, an engine 0.4, a worker 0.5


def itemsize(config: Config) -> int:
    return 4 if config.dtype == "float32" else 2


def trainer_bytes(config: Config, parameters: int) -> tuple[int, int]:
    """(between steps, at most during one): weights, masters and moments (12 bytes per parameter), gradient (4).

    And with --kl-coef a copy of the weights. Activations are not counted.
    """
    weights = parameters * itemsize(config)
    if not config.steps:
        return weights, weights
    models = weights * (1 + (config.kl_coef > 0))
    kept = models + (0 if config.offload_optimizer else 12 * parameters)
    return kept, models + 16 * parameters


def checkpoint_bytes(config: Config, parameters: int) -> int:
    """Size of a --checkpoint: weights, float32 masters and two moments, and what --kl-coef starts from."""
    copies = 2 if config.kl_coef > 0 else 1
    return parameters * (copies * itemsize(config) + 12)


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
    return sum(kept.get(kind, tokens) for kind in kinds) * width * itemsize(config)


def rehearsal_kv_bytes(config: Config, model_config: dict) -> int:
    """Per rank, for MAX_NUM_SEQS sequences of full length, as vLLM's CPU build cannot resume a seeded request.

    In blocks of 128 tokens, one more than a sequence fills. Windows do not count: vLLM may keep whole sequences.
    """
    tokens = 128 * (-(-(config.max_tokens + config.longest_prompt) // 128) + 1)
    whole = model_config | {"sliding_window": None}
    return max(64 * 2**20, MAX_NUM_SEQS * kv_bytes(config, whole, tokens))


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
    kept, peak = trainer_bytes(config, parameters)
    weights = parameters * itemsize(config) / config.tensor_parallel_size
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


def what_helps(config: Config, free: float, engine: float, kept: float, peak: float) -> list[str]:
    """Flags with which less memory is needed, in GiB as in `check_gpu_memory`, and none that changes nothing."""
    if peak > free:  # a step alone, the engine being asleep
        return ["a smaller --model", "--steps 0 for the push alone"]
    helps = ["a lower --gpu-memory-utilization"]
    if not config.sleep_level and config.steps:
        helps.append("--sleep-level 2")
    if not config.offload_optimizer and config.steps and engine + kept > free:
        helps.append("--offload-optimizer")
    return helps


def check_host_memory(config: Config, model_config: dict, parameters: int, available: int) -> None:
    """The same for the rehearsal, where all trainers and engines share the host's memory. available: bytes."""
    n = config.num_gpus
    cache = rehearsal_kv_bytes(config, model_config)
    check_engine(config, model_config, cache, "the rehearsal's engine")
    trainers = n * trainer_bytes(config, parameters)[1]
    engines = config.num_engines * parameters * itemsize(config) + n * cache
    processes = (2 * n + config.num_engines) * PROCESS_BYTES
    need = trainers + engines + processes
    if need <= available:
        return
    fix = "Try a smaller --model." if n == 1 else "Try: --num-gpus 1 --tensor-parallel-size 1"
    parts = f"{n} trainers {trainers / GIB:.1f} GiB, {config.num_engines} engines {engines / GIB:.1f}"
    found = f"{available / GIB:.1f} GiB of memory are free, but the rehearsal needs {need / GIB:.1f}: {parts}"
    raise Stop(f"{found}, {processes / GIB:.1f} for the processes. {fix}", MISSING)
