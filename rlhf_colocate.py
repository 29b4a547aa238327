"""Train and serve one model on the same GPUs: RLHF with the trainers' weights pushed into vLLM by CUDA IPC handles.

    one Ray placement group, one bundle per GPU (the default layout)

    bundle / GPU            0        1        2        3
    training actors       0.4 T0   0.4 T1   0.4 T2   0.4 T3      RayTrainingActor: a full replica each
    vLLM engines         [0.4   E0   0.4] [0.4   E1   0.4]       MyLLM: tensor_parallel_size=2 each

Two processes share each GPU, where NCCL cannot connect them. CUDA IPC can: a trainer sends 64-byte handles, the vLLM
worker on the same GPU maps the very same memory and loads it as vLLM's own loaders would. No weight leaves its GPU.

What happens, and what each part must show:
    1. preflight   found what is needed, or one line that says what is not, and what to type
    2. place       every GPU (by UUID) holds one trainer and one engine's worker
    3. proof       all weights change by noise, are pushed, and are verified: transport, placement, behaviour, change,
                   each a check that can fail (try --inject); then the noise is taken back
    4. loop        --steps times rollout, sleep, reward, train (GRPO), wake up, push; at each step the replicas must be
                   bitwise equal, and the trainers' log-probabilities of the rollout must be the sampler's
    5. report      PASS, or FAIL: why

Run:
    python rlhf_colocate.py                                          # 4 GPUs, two engines with TP=2
    python rlhf_colocate.py --num-gpus 1 --tensor-parallel-size 1    # 1 GPU
    python rlhf_colocate.py --model Qwen/Qwen2.5-0.5B --num-gpus 2 --steps 50
On a machine without a GPU, with vLLM's CPU build, the same commands rehearse the layout on Ray's logical GPUs: real
Ray, real vLLM, real processes; shared memory in place of CUDA IPC.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

from colocate.cluster import ENDING, Cluster, interrupts_deferred, make_temporary_folder
from colocate.config import (
    FAIL,
    INTERRUPTED,
    MISSING,
    PASS,
    USAGE,
    Config,
    Stop,
    refuse_unless,
    stage_timeouts,
)
from colocate.fleet import (
    Lost,
    Watch,
    bury,
    part_name,
    recover,
    require_alive,
    wait_for,
)
from colocate.memory import MAX_NUM_SEQS, rehearsal_kv_bytes
from colocate.model_folder import BESIDE, Model, describe_loading
from colocate.preflight import describe_failed_save, preflight
from colocate.report import (
    Log,
    brief,
    describe,
    describe_connect,
    describe_step,
    plot_steps,
    print_table,
    summary,
    write_trace,
)
from colocate.tasks import Task
from colocate.watch import kill

HERE = Path(__file__).resolve().parent

PROMPTS = [
    "The capital of France is",
    "Water boils at a temperature of",
    "To make a cup of tea, first you",
    "The first president of the United States was",
]


def reward(prompt: str, completion: str) -> float:
    """Share of the completion's words that begin with a capital letter: Title Case, checked without any model."""
    words = [w for w in completion.split() if w[0].isalpha()]
    return sum(w[0].isupper() for w in words) / max(len(words), 4)  # a short answer does not get around it


# ---------------------------------------------------------------------------------------------------------------------
# 1. The two kinds of actors
# ---------------------------------------------------------------------------------------------------------------------


def traced(method):
    """Let an actor's method note when it ran, where --trace asks for it: (name, seconds since the epoch, seconds)."""

    @functools.wraps(method)
    def timed(self, *args):
        start = time.time()
        try:
            return method(self, *args)
        finally:
            if os.environ.get("RLHF_COLOCATE_TRACE"):
                name = args[0] if method.__name__ == "collective_rpc" else method.__name__
                spans = self.__dict__.setdefault("spans", collections.deque(maxlen=10_000))  # the last of a long run
                spans.append((name, start, time.time() - start))

    return timed


class RayTrainingActor:
    """A trainer: one full replica of the model on its share of a GPU. `Learner` is its optimizer."""

    def __init__(self, model: str, load_format: str, dtype: str, seed: int, device: str):
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        import rlhf_utils

        self.device = torch.device(device)
        self.seed = seed
        self.random_weights = load_format == "dummy"
        config = AutoConfig.from_pretrained(model)
        options = {"dtype": getattr(torch, dtype)}
        if getattr(config, "attn_logit_softcapping", None):
            options["attn_implementation"] = "eager"  # transformers' default, sdpa, leaves Gemma-2's caps out
        if load_format == "dummy":
            torch.manual_seed(seed)
            with self.device:
                self.model = AutoModelForCausalLM.from_config(config, **options)
        else:
            options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
            self.model, info = AutoModelForCausalLM.from_pretrained(model, **options)
            if wrong := describe_loading(info):  # transformers fills what is missing with random numbers
                raise ValueError(f"the checkpoint in {model} does not fit the model: {wrong}")
            embedding, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
            if config.tie_word_embeddings and embedding.weight is not head.weight:
                raise ValueError(f"{model}/config.json ties the head to the embedding, but the checkpoint's differ")
            self.model.to(self.device)
        self.model.eval()
        self.version = torch.zeros((), dtype=torch.int64, device=self.device)  # see rlhf_utils.VERSION
        if self.device.type == "cpu":
            rlhf_utils.share_memory([*self.model.parameters(), self.version])
        self.addresses = [p.data_ptr() for p in self.model.parameters()]
        self.weights = dict(rlhf_utils.checkpoint_tensors(self.model))  # views: they stay where they are

    def report_device_id(self) -> dict:
        import torch

        import rlhf_utils

        return {"gpu": rlhf_utils.device_uuid(self.device), "pid": os.getpid(), "torch": torch.__version__}

    def build_learner(
        self, rank: int, addresses: list[str], timeout_s: float, resume: str | None, options: dict
    ) -> int:
        """Meet the other trainers, and make the optimizer. Returns how many steps it has done before."""
        from colocate.learner import Learner, join_group

        join_group(rank, addresses, timeout_s, self.device)
        self.learner = Learner(self.model, self.random_weights, **options)
        if resume:
            self.learner.load(Path(resume), options["learning_rate"])
        return self.learner.steps

    def free_address(self) -> str:
        """host:port on this actor's node."""
        import ray

        return f"{ray.util.get_node_ip_address()}:{free_port()}"

    @contextlib.contextmanager
    def _weights_change(self, version: int):
        """`version` reads -1 within; when this is left, the change is over, on the GPU too, and `version` is set."""
        import torch

        settle = torch.cuda.synchronize if self.device.type == "cuda" else lambda: None
        self.version.fill_(-1)
        settle()
        yield
        if [p.data_ptr() for p in self.model.parameters()] != self.addresses:
            raise RuntimeError(
                "found weights that moved, needed them changed in place: engines have their memory mapped"
            )
        settle()
        self.version.fill_(version)
        settle()

    @traced
    def perturb(self, version: int) -> None:
        """Change every weight, by seeded noise of 2 % of its root mean square: different for each tensor and version.

        For the proof of the push, which an optimizer step does not suit: it leaves some weights as they are.
        """
        import torch

        generator = torch.Generator(self.device).manual_seed(self.seed * 1_000_003 + version)
        with torch.no_grad(), self._weights_change(version):
            for p in self.model.parameters():
                scale = 0.02 * p.float().square().mean().sqrt().clamp_min(0.02)
                noise = torch.empty(p.shape, dtype=torch.float32, device=self.device).normal_(generator=generator)
                p.add_((noise * scale).to(p.dtype))

    @traced
    def restore(self, version: int) -> None:
        """Take the noise back."""
        with self._weights_change(version):
            self.learner.restore()

    @traced
    def learn(self, samples: list[dict], total_tokens: int, version: int) -> dict[str, float]:
        """One optimizer step of all trainers, each on its samples. Returns the step's metrics."""
        import torch

        try:
            with self._weights_change(version):
                return self.learner.step(samples, total_tokens)
        except torch.OutOfMemoryError:
            free, total = (x / 2**30 for x in torch.cuda.mem_get_info(self.device))
            mine = torch.cuda.max_memory_reserved(self.device) / 2**30
            raise RuntimeError(
                f"out of GPU memory in the optimizer step: found {free:.1f} GiB free of {total:.0f}, {mine:.1f} held "
                "by this training actor; needed more; type --sleep-level 2 (if it was lower), --micro-batch-size 1, "
                "a lower --gpu-memory-utilization, or --offload-optimizer"
            ) from None

    @traced
    def save(self, folder: str) -> None:
        """Write an HF checkpoint, and the optimizer's state beside it."""
        from transformers import GenerationConfig

        # Some published ones are invalid, and then refuse to be saved; the original file is copied instead.
        self.model.generation_config = GenerationConfig.from_model_config(self.model.config)
        self.model.save_pretrained(folder)
        self.learner.save(Path(folder))

    def trace(self) -> list[tuple]:
        return list(self.__dict__.get("spans", []))

    def progress(self) -> tuple[int, dict[str, float]]:
        """How many optimizer steps are done, and the last one's metrics."""
        return self.learner.steps, self.learner.metrics

    @traced
    def weight_digests(self) -> dict[str, str]:
        """{weight name: 64-bit digest of its bits}. Raises ValueError if a weight holds NaN or Inf."""
        import torch

        import rlhf_utils

        weights = self.weights
        # A sum is finite only if all it adds up is, and takes no memory beside the weights.
        finite = torch.stack([t.sum(dtype=torch.float32).isfinite() for t in weights.values()]).tolist()
        if bad := [name for name, ok in zip(weights, finite, strict=True) if not ok]:
            raise ValueError(f"found NaN or Inf in {summary(bad)}; needed finite weights: push refused")
        return {name: rlhf_utils.digest(t) for name, t in weights.items()}

    def get_weight_ipc_handles(self) -> dict[str, dict]:
        """{this GPU's UUID: handles of all weights}, plain data. The weights stay where they are."""
        import rlhf_utils

        version = (rlhf_utils.VERSION, self.version)
        message = rlhf_utils.export_handles([*self.weights.items(), version])
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
        self.version: int | None = 0  # of the last whole push. None: poisoned, it does not generate before the next one
        self.asleep: set[str] = set()
        # Read by vLLM's Ray executor when the engine is built.
        os.environ["VLLM_RAY_PER_WORKER_GPUS"] = str(gpu_share)
        os.environ["VLLM_RAY_BUNDLE_INDICES"] = ",".join(map(str, bundle_indices))
        # The engine's core stays in this process: one import of vLLM and one hop less.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        # vLLM 0.26 gives all engines of a host one TCPStore port unless this differs (EADDRINUSE).
        os.environ["VLLM_DP_MASTER_PORT"] = str(master_port)

    def start(self, **engine_args) -> list[dict]:
        """Build the engine; returns its workers' reports and its pid. Not in __init__, so that imports overlap."""
        from vllm import LLM

        self.llm = LLM(**engine_args)
        return [w | {"engine_pid": os.getpid()} for w in self.collective_rpc("report_device_id")]

    @traced
    def collective_rpc(self, method: str, *args) -> list:
        """Call a method of ColocateWorkerExtension on every worker; results in rank order, errors raised.

        One that writes weights poisons the engine until `finish_push`.
        """
        import rlhf_utils

        if method in rlhf_utils.WRITES:
            if "weights" in self.asleep:
                raise RuntimeError('found the engine\'s weights asleep, needed wake_up("weights") before a push')
            self.version = None
        return rlhf_utils.call_workers(self.llm, method, *args)

    @traced
    def finish_push(self, version: int) -> bool:
        """After a push that succeeded in all workers of all engines: forget the keys and values of the old weights, and
        remember the version. False if it cannot."""
        done = self.llm.reset_prefix_cache()
        self.version = version if done else None
        return done

    def weights_version(self) -> int | None:
        """Of the last whole push; None if the engine must not be used before another."""
        return self.version

    @traced
    def sleep(self, level: int) -> None:
        """Give GPU memory up: 1 weights (to the host) and KV cache, 2 both dropped. vLLM ignores it on CPU."""
        self.version = None  # until the next push
        self.asleep = {"weights", "kv_cache"}
        self.llm.sleep(level=level)

    @traced
    def wake_up(self, tag: str) -> None:
        """Take memory again: "weights" (after level 2 their content is undefined until a push), then "kv_cache"."""
        if tag in self.asleep:
            self.llm.wake_up(tags=[tag])
            self.asleep.discard(tag)

    def stand_by(self, level: int) -> None:
        """Where a recovery starts: disconnect, refuse to generate until a push, sleep at `level` (0: stay awake)."""
        self.version = None
        self.collective_rpc("disconnect_weights")
        if level and not self.asleep:
            self.sleep(level)

    def _require_whole_weights(self) -> None:
        found = ["no whole push in it"] * (self.version is None) + [f"its {tag} asleep" for tag in sorted(self.asleep)]
        if found:
            raise RuntimeError(f"found the engine with {', '.join(found)}; needed both before it generates")

    @traced
    def rollout(self, prompts: list, group_size: int, max_tokens: int, seeds: list[int]) -> list[list[dict]]:
        """Sample group_size completions of each prompt at temperature 1, reproducibly by one seed per prompt.

        Returns for each prompt [{"prompt", "tokens", "text", "logprobs"}]; logprobs are the sampler's, in nats, one per
        token. Raises RuntimeError, as `generate` does, while there are no whole weights to sample from.
        """
        from vllm import SamplingParams

        self._require_whole_weights()
        common = {"n": group_size, "temperature": 1.0, "max_tokens": max_tokens, "logprobs": 0}
        params = [SamplingParams(**common, seed=seed) for seed in seeds]
        inputs = [p if isinstance(p, str) else {"prompt_token_ids": p} for p in prompts]
        groups = []
        for out in self.llm.generate(inputs, params, use_tqdm=False):
            groups.append([])
            for done in sorted(out.outputs, key=lambda o: o.index):
                tokens = list(done.token_ids)
                logprobs = [row[t].logprob for t, row in zip(tokens, done.logprobs, strict=True)]
                sample = {"prompt": list(out.prompt_token_ids), "tokens": tokens, "text": done.text}
                groups[-1].append(sample | {"logprobs": logprobs})
        return groups

    @traced
    def generate(self, prompts: list, max_tokens: int) -> list[dict]:
        """Greedy completions, with the log-probabilities (nats) of prompt and completion tokens."""
        from vllm import SamplingParams

        self._require_whole_weights()
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

    def trace(self) -> list[tuple]:
        return list(self.__dict__.get("spans", []))

    def shutdown(self) -> None:
        """End the workers and give their shared memory back."""
        with contextlib.suppress(AttributeError):  # not started
            self.llm.llm_engine.engine_core.shutdown()


# ---------------------------------------------------------------------------------------------------------------------
# 2. Placement
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
# 3. The whole layout
# ---------------------------------------------------------------------------------------------------------------------


# What may follow what: {(state of the engines, action): state after it}. Out of order, vLLM would crash, or sample from
# weights that are not there.
TRANSITIONS = {
    ("ready", "connect"): "ready",
    ("ready", "generate"): "ready",
    ("ready", "push"): "ready",
    ("ready", "sleep"): "asleep",
    ("asleep", "learn"): "asleep",
    ("asleep", "wake weights"): "weights awake",
    ("weights awake", "connect"): "weights awake",
    ("weights awake", "push"): "weights pushed",
    ("weights pushed", "wake kv_cache"): "ready",
}


class Colocation:
    """The whole layout, alive: a placement group, its trainers and its engines. `close` leaves nothing behind."""

    training_actor, engine_actor = RayTrainingActor, MyLLM
    worker_extension = "rlhf_utils.ColocateWorkerExtension"

    def __init__(self, config: Config, rehearsal: bool, model: Model, log: Log | None = None):
        self.config, self.rehearsal = config, rehearsal
        self.model, self.load_format, self.architecture = model.folder, model.load_format, model.architecture
        self.model_config, self.has_tokenizer = model.config, model.has_tokenizer
        self.task = Task(config, model, PROMPTS, reward)
        self.group = None
        self.trainers: list = []
        self.engines: list = []
        self.engine_gpus: list[list[str]] = []  # set once the engines are up
        self.state = "ready"  # of the engines, see TRANSITIONS
        self.log, self.watch, self.limits = log or Log(), Watch(), stage_timeouts(config)
        self.base_port = free_port()
        self.cluster = Cluster(config.ray_address or os.environ.get("RAY_ADDRESS"))
        self.stage_now: tuple[str, float] | None = None  # its name, and when it began
        self.saved = model.source if config.resume else None  # the last checkpoint of this run
        self.folder = make_temporary_folder()  # of Ray, and for vLLM's sockets

    def start_ray(self) -> None:
        """Start a private Ray, or join the one at --ray-address. Its processes are an engine's unless told otherwise.

        Ray starts num_cpus processes ahead, at once and in parallel, and each imports colocate.preload, and so vLLM.
        An actor gets one of them if its runtime_env is empty, like theirs: hence the settings in os.environ, which
        Ray's processes inherit. Without this, vLLM's workers would start to import it only when the engine has.
        """
        config = self.config
        env = {
            "PYTHONPATH": os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "RLHF_COLOCATE_ROLE": "engine",
            "RLHF_COLOCATE_SHM": f"/{self.watch.prefix}",
            "RLHF_COLOCATE_ARCHITECTURE": self.architecture,
            "RLHF_COLOCATE_TRACE": "1" if config.trace else "",
            "VLLM_RPC_BASE_PATH": str(self.folder),
            # vLLM's own deadline for a forward pass, else 300 s: the driver's come first, and say which rank is late.
            "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": str(int(max([config.timeout, *self.limits.values()])) + 60),
            "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1",  # as vLLM wants it for its workers
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",  # else 15: beside a busy program, actors would get a twentieth of a core
            "RAY_IGNORE_UNHANDLED_ERRORS": "1",  # those of actors that are given up are nobody's business
            "HF_HUB_OFFLINE": "1",  # the model is a folder by now
        }
        if self.rehearsal:  # trainers and engines take turns, and share few cores
            os.environ.pop("CUDA_VISIBLE_DEVICES", None)  # Ray would count its entries; the GPUs here are logical ones
            threads = max(1, (os.cpu_count() or 1) // config.num_gpus)
            env |= {"OMP_NUM_THREADS": str(threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
            env["TORCH_COMPILE_DISABLE"] = "1"  # else the first request compiles C++ for half a minute
            if self.model_config.get("attn_logit_softcapping"):
                env["RLHF_COLOCATE_AVX2"] = "1"  # see colocate/preload.py
        options = {"log_to_driver": config.verbose, "logging_level": "error"}
        if self.cluster.address:
            options["runtime_env"] = {
                "env_vars": env,
                "worker_process_setup_hook": "colocate.preload.prepare",
            }
        else:
            # Ray listens on all interfaces, and takes 127.0.0.1 as _node_ip_address for the host's own address, unless
            # this is said, on Linux too, before it is imported (ray._private.services.get_node_ip_address).
            os.environ.update(env | {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"})
            options |= {
                "num_gpus": config.num_gpus if self.rehearsal else None,
                "num_cpus": config.num_engines + config.num_gpus,  # an engine's own process and its workers'
                "include_dashboard": False,
                "object_store_memory": 128 * 2**20,  # bytes; only small messages pass through it
                "_temp_dir": str(self.folder),
                # No record of every call, which only the dashboard and `ray list` read: each process would grow by 40
                # to 80 bytes per call (20,000 calls of a bare actor; with this they do not).
                "_system_config": {"preload_python_modules": ["colocate.preload"], "task_events_report_interval_ms": 0},
            }
        end, seconds, stage = self.deadline()
        longer = f"--stage-timeout start={2 * seconds:g}" if stage == "start" else f"--timeout {2 * seconds:g}"
        self.cluster.start((end, seconds), longer, **options)
        if not self.cluster.address:
            self.watch.add_ray()
            return
        import ray

        free = ray.available_resources().get("GPU", 0)
        message = (
            f"The Ray cluster at {self.cluster.address!r} has {free:g} free GPUs, and {config.num_gpus} are needed"
        )
        fix = "Wait for its other jobs, try a smaller --num-gpus, or leave out --ray-address"
        refuse_unless(free >= config.num_gpus, f"{message}. {fix}", MISSING)

    def start_actors(self) -> None:
        """Ask for everything at once: the actors' imports run in parallel."""
        import ray
        from ray.util.placement_group import placement_group

        config = self.config
        self.group = placement_group([{"GPU": 1}] * config.num_gpus, strategy="PACK")
        end, seconds, _ = self.deadline()
        while not self.group.wait(1):  # in steps: Ctrl-C is heard only between them
            if time.monotonic() < end:
                continue
            have, free = (
                {k: v for k, v in r().items() if k in ("CPU", "GPU")}
                for r in (ray.cluster_resources, ray.available_resources)
            )
            found = f"{config.num_gpus} GPUs did not come free within {seconds:g} s"
            raise Stop(f"placement group: {found}; the cluster has {have}, of which free are {free}", MISSING)
        self.engines = [self.new_engine(e) for e in range(config.num_engines)]
        self.trainers = [self.new_trainer(i, self.model, self.load_format) for i in range(config.num_gpus)]

    def on_bundle(self, index: int, capture: bool = False):
        """Where an actor goes; capture: the actors that it starts go into the placement group, too."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        return PlacementGroupSchedulingStrategy(
            placement_group=self.group,
            placement_group_bundle_index=index,
            placement_group_capture_child_tasks=capture,
        )

    def new_engine(self, e: int):
        import ray

        tp = self.config.tensor_parallel_size
        options = {"num_cpus": 0, "num_gpus": 0, "scheduling_strategy": self.on_bundle(e * tp, capture=True)}
        actor, port = ray.remote(self.engine_actor).options(**options), self.base_port + 200 * e
        return actor.remote(list(range(e * tp, (e + 1) * tp)), self.config.engine_gpu_share, port)

    def new_trainer(self, i: int, model: Path, load_format: str):
        import ray

        config, device = self.config, "cpu" if self.rehearsal else "cuda:0"  # Ray shows a trainer its own GPU only
        env = {"RLHF_COLOCATE_ROLE": "trainer", "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "0"}
        options = {"num_cpus": 0, "num_gpus": config.trainer_gpu_share, "scheduling_strategy": self.on_bundle(i)}
        actor = ray.remote(self.training_actor).options(**options, runtime_env={"env_vars": env})
        return actor.remote(str(model), load_format, config.dtype, config.seed, device)

    def start_engines(self, trainers: list[dict]) -> list[dict]:
        """Build the engines and match them with the trainers' reports. Returns the placement's rows.

        Only once the trainers have settled: vLLM measures free memory, and must not see another process allocate.
        """
        self.watch_trainers(trainers)
        workers = self.build_engines(self.engines)
        rows = match_placement(trainers, workers)
        self.engine_gpus = [[w["gpu"] for w in ranks] for ranks in workers]
        return rows

    def build_engines(self, engines: list) -> list[list[dict]]:
        """Let these engines load their models; returns their workers' reports."""
        config = self.config
        limit = {"kv_cache_memory_bytes": rehearsal_kv_bytes(config, self.model_config)} if self.rehearsal else {}
        arguments = dict(
            model=str(self.model),
            skip_tokenizer_init=not self.has_tokenizer,
            load_format=self.load_format,
            # vLLM takes a config.json without architectures for a base model.
            hf_overrides={"architectures": [self.architecture]},
            dtype=config.dtype,
            tensor_parallel_size=config.tensor_parallel_size,
            distributed_executor_backend="ray",
            worker_extension_cls=self.worker_extension,
            gpu_memory_utilization=config.gpu_memory_utilization,
            max_model_len=config.max_model_len,
            max_num_seqs=MAX_NUM_SEQS,
            enforce_eager=config.enforce_eager,
            enable_prefix_caching=True,
            enable_sleep_mode=bool(config.steps and config.sleep_level) and not self.rehearsal,
            seed=config.seed,
            **limit,
        )
        refs = [e.start.remote(**arguments) for e in engines]
        parts = [self.part(e) for e in engines]
        reports = wait_for(self, refs, parts, "start")
        found = []
        for part, workers in zip(parts, reports, strict=True):
            found.append((part, part_name(part), workers[0]["engine_pid"], ""))
            found += [(part, f"{part_name(part)} rank {w['tp_rank']}", w["pid"], w["gpu"]) for w in workers]
        self.watch.add(found)
        return reports

    def watch_trainers(self, reports: list[dict]) -> None:
        parts = [self.part(t) for t in self.trainers]
        self.watch.add([(p, part_name(p), r["pid"], r["gpu"]) for p, r in zip(parts, reports, strict=True)])

    def rebuild_trainers(self, folder: Path) -> None:
        """Replace all training actors, on the same bundles, by ones with the state in a checkpoint's folder."""
        bury(self, {p for p in self.parts() if p[0] == "training actor"})
        self.trainers = [self.new_trainer(i, folder, "auto") for i in range(self.config.num_gpus)]
        self.watch_trainers(self.on_trainers("report_device_id"))
        self.build_learners(folder)
        self.watch.replacing -= {p for p in self.parts() if p[0] == "training actor"}

    def rebuild_engines(self, indices: list[int]) -> None:
        """Replace these engines, which are gone, on the same bundles. Raises Stop if the new ones land elsewhere."""
        self.base_port = free_port()
        for e in indices:
            self.engines[e] = self.new_engine(e)
        for e, workers in zip(indices, self.build_engines([self.engines[e] for e in indices]), strict=True):
            if (found := [w["gpu"] for w in workers]) != self.engine_gpus[e]:
                raise Stop(f"placement: engine {e} came back on {found}, needed {self.engine_gpus[e]}")
        self.watch.replacing -= {("engine", e) for e in indices}

    def parts(self) -> dict:
        """{("training actor", i) or ("engine", e): the Ray actor}."""
        kinds = (("training actor", self.trainers), ("engine", self.engines))
        return {(kind, i): actor for kind, actors in kinds for i, actor in enumerate(actors)}

    def part(self, actor) -> tuple[str, int]:
        return next(part for part, other in self.parts().items() if other is actor)

    @contextlib.contextmanager
    def stage(self, name: str, seconds: dict | None = None):
        """Time a stage (see `Log.stage`), and let all waits within it end by its deadline."""
        before, self.stage_now = self.stage_now, (name.split()[0], time.monotonic())
        try:
            with self.log.stage(name, seconds):
                yield
        finally:
            self.stage_now = before

    def deadline(self) -> tuple[float, float, str]:
        """(the present stage's end on the monotonic clock, seconds that it may take, its name)."""
        name, began = self.stage_now or ("", time.monotonic())
        seconds = self.limits.get(name, self.config.timeout)
        return began + seconds, seconds, name

    def ask(self, actors: list, method: str, *args, each: list[tuple] | None = None) -> list:
        """Call a method of these actors, all at once; results in order. each: arguments that differ between them.

        Raises Lost if one has died or the stage's deadline has passed, Stop with the actor's own error.
        """
        refs = [getattr(a, method).remote(*own) for a, own in zip(actors, each or [args] * len(actors), strict=True)]
        what = args[0] if method == "collective_rpc" else method
        return wait_for(self, refs, [self.part(a) for a in actors], what)

    def on_trainers(self, method: str, *args) -> list:
        return self.ask(self.trainers, method, *args)

    def on_engines(self, method: str, *args) -> list:
        return self.ask(self.engines, method, *args)

    def on_workers(self, method: str, *args) -> list:
        """Call a method of the worker extension. Results: all workers, flat."""
        return flatten(self.on_engines("collective_rpc", method, *args))

    def handles(self) -> dict[str, dict]:
        """{GPU UUID: message} of all trainers. Fresh ones for each use: an export may be opened once only."""
        return {gpu: m for one in self.on_trainers("get_weight_ipc_handles") for gpu, m in one.items()}

    @contextlib.contextmanager
    def transition(self, action: str):
        """Do `action` only where TRANSITIONS allows it. If it fails, nothing more is, until `recover`."""
        if (self.state, action) not in TRANSITIONS:
            allowed = ", ".join(a for state, a in TRANSITIONS if state == self.state) or "nothing"
            raise RuntimeError(f"found the engines {self.state}, which allows {allowed}; was asked for {action}")
        state, self.state = self.state, f"broken: {action} failed"
        yield  # no try: this is what it stays if an error comes through
        self.state = TRANSITIONS[state, action]

    def perturb(self, version: int) -> dict[str, str]:
        """Change all weights for the proof of the push. Returns their digests; raises Stop as `check_replicas`."""
        self.on_trainers("perturb", version)
        return self.check_replicas()

    def check_replicas(self) -> dict[str, str]:
        """{weight: digest}. Raises Stop unless the weights are bitwise the same in all trainers."""
        from colocate import verify

        digests = self.on_trainers("weight_digests")
        if wrong := verify.replicas(digests)["wrong"]:
            raise Stop(f"replicas: the trainers' weights differ, push refused: {summary(wrong)}")
        return digests[0]

    def build_learners(self, resume: Path | None = None) -> int:
        """Make the trainers' optimizers, and their process group. Returns the steps done before.

        resume: the folder of the checkpoint to go on from.
        """
        config = self.config
        options = {"learning_rate": config.learning_rate, "clip_range": config.clip_range, "kl_coef": config.kl_coef}
        options |= {"micro_batch_size": config.micro_batch_size, "offload": config.offload_optimizer}
        addresses = self.on_trainers("free_address")
        # The driver is to say who is late, before the process group ends those who wait for them.
        timeout_s = self.limits.get("train", config.timeout) + 60
        rest = (addresses, timeout_s, resume and str(resume), options)
        return self.ask(self.trainers, "build_learner", each=[(rank, *rest) for rank in range(len(addresses))])[0]

    def generate(self, prompts: list) -> list[list[dict]]:
        """Greedy completions of all prompts by each engine (see `MyLLM.generate`)."""
        with self.transition("generate"):
            return self.on_engines("generate", prompts, self.config.max_tokens)

    def rollout(self, prompts: list, seed: int, version: int) -> list[dict]:
        """Samples of all prompts, group after group, by all engines in parallel.

        Raises Stop, before any of them starts, unless all hold that version of the weights.
        """
        n, config = len(self.engines), self.config
        seeds = [seed + 1000 * i for i in range(len(prompts))]  # vLLM counts up from it within a group
        if wrong := [f"engine {e}: {v}" for e, v in enumerate(self.on_engines("weights_version")) if v != version]:
            raise Stop(
                f"found weights of version {', '.join(wrong)} (None: no whole push), needed {version} for a rollout"
            )
        each = [(prompts[i::n], config.group_size, config.max_tokens, seeds[i::n]) for i in range(n)]
        with self.transition("generate"):
            groups = self.ask(self.engines, "rollout", each=each)
        return flatten([groups[i % n][i // n] for i in range(len(prompts))])

    def sleep(self) -> None:
        """All engines give up their memory (--sleep-level; the order of things is the same where that is 0)."""
        with self.transition("sleep"):
            if self.config.sleep_level:
                self.on_engines("sleep", self.config.sleep_level)

    def wake_up(self, tag: str) -> None:
        """ "weights", then push, then "kv_cache"."""
        with self.transition(f"wake {tag}"):
            if not self.config.sleep_level:
                return
            try:
                self.on_engines("wake_up", tag)
            except Stop as stop:
                if "out of memory" not in str(stop):
                    raise
                fix = "type a lower --gpu-memory-utilization, or --offload-optimizer"
                raise Stop(
                    f"{stop}: out of GPU memory at wake-up: found too little free; needed what it slept with; {fix}"
                ) from None

    def learn(self, samples: list[dict], version: int) -> dict[str, float]:
        """One optimizer step, the samples shared out to the trainers. Returns its metrics."""
        n, total_tokens = len(self.trainers), sum(len(s["tokens"]) for s in samples)
        require_alive(self, "learn")  # whoever enters NCCL's all-reduce without its peers never comes out
        with self.transition("learn"):
            each = [(samples[i::n], total_tokens, version) for i in range(n)]
            return self.ask(self.trainers, "learn", each=each)[0]

    def save(self, folder: Path, by: int = 0) -> None:
        """Let a training actor write a checkpoint; an older one there is replaced once the new one is complete."""
        folder = folder.resolve()
        new, old = (folder.with_name(f".{folder.name}.{kind}-{os.getpid()}") for kind in ("new", "old"))
        try:
            shutil.rmtree(new, ignore_errors=True)  # of a trainer that was lost while it wrote
            new.mkdir()
            self.ask([self.trainers[by]], "save", str(new))
            for file in {f for name in BESIDE for f in self.model.glob(name) if f.is_file()}:
                shutil.copy(file, new)
            with interrupts_deferred():
                if folder.exists():
                    folder.rename(old)
                new.rename(folder)
                self.saved = folder
        except Lost:
            raise
        except (Stop, OSError) as error:
            raise Stop(describe_failed_save(folder, new, error)) from None
        finally:
            shutil.rmtree(new, ignore_errors=True)
            if folder.exists():
                shutil.rmtree(old, ignore_errors=True)

    def gpu_used_gib(self) -> float:
        """Memory in use on the fullest GPU, by all its processes; 0 in the rehearsal."""
        return max(self.on_workers("gpu_used_bytes")) / 2**30

    def connect(self) -> dict:
        """Let every worker map its trainer's weights and record the copies; again after either was replaced.

        Returns {"wall_ms", "workers"}. A first push goes with it.
        """
        start = time.perf_counter()
        with self.transition("connect"):
            workers = self.on_workers("connect_weights", self.handles())
            if len(found := {w["version"] for w in workers}) > 1:
                raise Stop(f"found training actors at different versions: {sorted(found)}; needed one")
            self.on_workers("push_weights", *found)
            self.finish_push(*found)
        return {"wall_ms": 1e3 * (time.perf_counter() - start), "workers": workers}

    def push(self, version: int) -> dict:
        """Load the trainers' weights into all engines. Returns {"version", "method", "wall_ms", "reset_ms", ...}.

        wall_ms: from the call to the last worker's reply; reset_ms: of the prefix caches, block by block in vLLM.
        bytes: over all workers; read (simple) or written (recorded). workers: what each of them returned.
        The trainers must have finished that version, and may change their weights again when this returns.
        """
        with self.transition("push"):
            start = time.perf_counter()
            if self.config.push == "simple":
                loaded = self.on_workers("update_weights_from_ipc_handles", self.handles())
            else:
                # One round trip. An actor does one thing after the other, so no engine generates meanwhile.
                loaded = self.on_workers("push_weights", version)
            pushed = time.perf_counter()
            if stale := [w["version"] for w in loaded if w["version"] != version]:
                found = f"an engine found weights of version {stale[0]}, needed {version}"
                raise Stop(f"{found}: the trainer changed them meanwhile")
            self.finish_push(version)
            reset_ms = 1e3 * (time.perf_counter() - pushed)
        return {
            "version": version,
            "method": self.config.push,
            "wall_ms": 1e3 * (pushed - start),
            "reset_ms": reset_ms,
            "bytes": sum(w["bytes"] for w in loaded),
            "workers": loaded,
        }

    def finish_push(self, version: int) -> None:
        """Let the engines take a push for whole. Cached keys and values came from the old weights."""
        if not all(self.on_engines("finish_push", version)):
            raise Stop("an engine did not reset its prefix cache: requests are still running")

    def verify_elements(self, digests: dict[str, str]) -> dict:
        """Compare every weight that arrived, and every parameter element. {"transport": {...}, "placement": {...}}."""
        from colocate import verify

        results = self.on_workers("colocate.verify:compare", self.handles(), digests)
        self.watch.note_files()  # by now all have mapped what they share
        return verify.elements(results, self.config.strict)

    def require_elements(self, digests: dict[str, str], when: str) -> int:
        """How many parameter elements `verify_elements` found right. Raises Stop if there is a wrong one."""
        checks = self.verify_elements(digests)
        for name, check in checks.items():
            if not check["ok"]:
                raise Stop(f"{name}: {when}: {summary(check['wrong'])}")
        return checks["placement"]["checked"]

    def verify(self, digests: dict[str, str], prompts: list, before: list) -> tuple[dict, list]:
        """All checks of a push. Returns {check: {"ok", "checked", "wrong", ...}} and the engines' new outputs.

        digests: the trainers', from `perturb`. before: the engines' outputs for the prompts with the old weights.
        """
        from colocate import verify

        elements = self.verify_elements(digests)
        changed = self.on_workers("check_weights_changed")
        after = self.generate(prompts)
        sequences = [[o["prompt"] + o["tokens"] for o in outputs] for outputs in after]
        scorers = self.trainers[:: self.config.tensor_parallel_size]  # one trainer beside each engine
        trainer = self.ask(scorers, "token_logprobs", each=[(s,) for s in sequences])
        checks = {
            **elements,
            "changed": verify.changed(changed),
            "behaviour": verify.behaviour(before, after, trainer, self.config.logprob_tolerance),
        }
        return checks, after

    @interrupts_deferred()
    def close(self) -> None:
        """Stop the engines, then everything else, and remove what killed processes leave in /dev/shm.

        A private Ray ends with all its actors. It is asked for nothing: it may be what has failed.
        """
        if self.cluster.running():
            import ray

            broken = {m.part for m in self.watch.members if m.state()}
            if any(m.state() for m in self.watch.ray):
                broken = set(self.parts())
            asked = [e.shutdown.remote() for e in self.engines if self.engine_gpus and self.part(e) not in broken]
            if asked:
                ray.wait(asked, num_returns=len(asked), timeout=10)
            kill([m.process for m in self.watch.of(broken) if m.process])  # a stopped one hears nothing else
            if self.group and self.cluster.address:  # the next user of this cluster wants the GPUs
                ray.util.remove_placement_group(self.group)
            self.watch.note_files()
            self.cluster.stop(self.watch.all_files())
        shutil.rmtree(self.folder, ignore_errors=True)


class SabotagedColocation(Colocation):
    """The negative controls (--inject): the same run, broken in one place, to show that the right check fails."""

    def handles(self) -> dict[str, dict]:
        messages = super().handles()
        if self.config.inject not in ("drop-tensor", "swap-tensors"):
            return messages
        import rlhf_utils

        message = next(iter(messages.values()))
        weights = message["weights"]
        if self.config.inject == "drop-tensor":
            weights.pop(len(weights) // 2)
        else:
            twins = {}
            for w in weights:
                if len(w["shape"]) == 2 and (twin := twins.setdefault(tuple(w["shape"]), w)) is not w:
                    w["name"], twin["name"] = twin["name"], w["name"]
                    break
        message["checksum"] = rlhf_utils.checksum(message)
        return messages

    def perturb(self, version: int) -> dict[str, str]:
        if self.config.inject == "drift-replica":
            self.ask(self.trainers[-1:], "perturb", version + 1)
        return super().perturb(version)

    def push(self, version: int) -> dict:
        if self.config.inject == "skip-push":
            return {"version": version, "method": "none", "wall_ms": 0.0, "bytes": 0, "workers": []}
        push = super().push(version)
        if self.config.inject in ("flip-element", "wrong-tp-slice"):
            self.on_workers("benchmarks.corrupt:corrupt", self.handles(), self.config.inject)
        return push


def flatten(nested: list[list]) -> list:
    return [item for items in nested for item in items]


def free_port() -> int:
    """A port below the ephemeral range whose neighbours (one block of 200 per engine) are probed by vLLM itself."""
    while True:
        port = random.randrange(15_000, 28_000)
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port


# ---------------------------------------------------------------------------------------------------------------------
# 4. The run
# ---------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def blame(check: str, config: Config):
    """Let the message of a Stop begin with the check that it fails.

    A model that is not handled is no failed check, unless that was provoked (--inject).
    """
    try:
        yield
    except Stop as error:
        if "is not handled, nothing was loaded" in str(error) and not config.inject:
            raise Stop(str(error), MISSING) from None
        raise Stop(f"{check}: {error}", error.code) from None


def run(config: Config, log: Log, report: dict, colocation: Colocation) -> None:
    """Place, prove, learn. Fills the report as it goes; raises Stop on the first thing that makes that pointless."""
    n, engines, tp = config.num_gpus, config.num_engines, config.tensor_parallel_size
    with colocation.stage("start"):
        colocation.start_ray()
        colocation.start_actors()
        log("place", f"{n} bundles with {n} training actors and {engines} x TP={tp} engines: starting, a minute or so")
        trainers = colocation.on_trainers("report_device_id")
        done = colocation.build_learners(colocation.saved) if config.steps else 0
        log("train", f"{n} training actors hold their weights; building the engines")
        report["placement"] = rows = colocation.start_engines(trainers)
    log("place", "verified by GPU UUID, both ways:")
    print_table(["bundle", "trainer pid", "engine", "TP rank", "worker pid", "GPU"], [list(r.values()) for r in rows])

    if config.push == "recorded":
        with colocation.stage("connect"), blame("push", config):
            report["connect"] = connect = colocation.connect()
        log("push", describe_connect(connect))

    prompts = colocation.task.proof_prompts()
    with colocation.stage("rollout"):
        before = colocation.generate(prompts)
        colocation.on_workers("record_weights")
    log("rollout", f"{len(prompts)} prompts per engine with the old weights")

    with colocation.stage("perturb"):
        digests = colocation.perturb(version=1)
    report["verify"] = {"replicas": {"ok": True, "checked": n * len(digests), "wrong": []}}
    log("train", f"version 1: {len(digests)} weights changed by noise, {n} replicas bitwise identical")

    with colocation.stage("push"), blame("push", config):
        push = colocation.push(version=1)
    report["pushes"].append(push)
    log("push", f"{push['bytes'] / 1e6:.1f} MB into {len(push['workers'])} workers in {push['wall_ms']:.1f} ms")

    with colocation.stage("verify"):
        verify, after = colocation.verify(digests, prompts, before)
    report["verify"] |= verify
    report["first_verified_push_s"] = round(log.elapsed(), 3)
    for name, line in describe(verify).items():
        log("verify", f"{name}: {line if verify[name]['ok'] else 'FAILED: ' + summary(verify[name]['wrong'])}")
    for old, new in list(zip(before[0], after[0], strict=True))[:2]:
        report.setdefault("samples", []).append({k: o["text"] or o["tokens"] for k, o in (("old", old), ("new", new))})
        log("rollout", f"old weights {brief(old['text'] or old['tokens'])}")
        log("rollout", f"new weights {brief(new['text'] or new['tokens'])}")
    if failed := [name for name, check in verify.items() if not check["ok"]]:
        raise Stop("; ".join(f"{name}: {summary(verify[name]['wrong'])}" for name in failed))
    if config.inject:
        raise Stop(f"--inject {config.inject} was not detected")
    if not config.steps:
        return
    learn(config, log, report, colocation, done)
    after = colocation.generate(prompts)
    for i, (old, new) in enumerate(zip(before[0], after[0], strict=True)):
        samples = {k: o["text"] or o["tokens"] for k, o in (("before", old), ("after", new))}
        report.setdefault("learned", []).append({"prompt": colocation.task.text(prompts[i]), **samples})
    first, last = report["steps"][0], report["steps"][-1]
    log("step", f"reward {first['reward']:.3f} in step {first['step']}, {last['reward']:.3f} in step {last['step']}")
    if losses := report["losses"]:
        log("lost", f"{len(losses)} of --max-restarts {config.max_restarts} were needed")
    for sample in report["learned"][:2]:
        log("rollout", f"before {brief(sample['before'])}")
        log("rollout", f"after  {brief(sample['after'])}")


def learn(config: Config, log: Log, report: dict, colocation: Colocation, done: int) -> None:
    """The RLHF loop: config.steps times rollout, sleep, reward, train, wake up and push. `done`: steps before these.

    Raises Stop when the trainers' log-probabilities of what was sampled are far from the sampler's, and when an element
    of the engines' weights is wrong after the first step (its push is the first after a sleep) or after the last.
    A loss of actors ends in the same state as a step's push (see rlhf_faults.recover): a step that the trainers had
    done goes on from there, one that they had not is done again.
    """
    from colocate import grpo

    last, version, seconds, task = done + config.steps, 2, {}, colocation.task
    report["steps"], report["losses"] = rows, losses = [], []

    @contextlib.contextmanager
    def phase(name: str):
        log.progress(len(rows), config.steps, name)
        with colocation.stage(name, seconds):
            yield

    def note(line: dict) -> None:
        if config.metrics:
            with open(config.metrics, "a") as file:
                file.write(json.dumps(line) + "\n")

    def save_if_due(step: int) -> None:
        if config.checkpoint and (step == last or (config.checkpoint_every and step % config.checkpoint_every == 0)):
            with phase("checkpoint"):
                colocation.save(Path(config.checkpoint))

    colocation.on_trainers("restore", version)  # take the proof's noise back
    colocation.push(version)
    step, trained = done + 1, done
    while step <= last:
        try:
            if trained < step:
                seconds.clear()
                memory: list[float] = []
                prompts = task.prompts(step)
                with phase("rollout"):
                    samples = colocation.rollout([p.token_ids for p in prompts], task.seed(step), version)
                    memory.append(colocation.gpu_used_gib())
                with phase("sleep"):
                    colocation.sleep()
                    memory.append(colocation.gpu_used_gib())
                with phase("reward"):
                    for i, sample in enumerate(samples):
                        sample["completion"] = task.text(sample["tokens"])
                        sample["reward"] = task.reward(prompts[i // config.group_size], sample["tokens"])
                    rewards = [s["reward"] for s in samples]
                    shares = grpo.advantages(rewards, config.group_size)
                    samples = [s | {"advantage": a} for s, a in zip(samples, shares, strict=True)]
                with phase("train"):
                    version += 1
                    metrics = colocation.learn(samples, version)
                    digests = colocation.check_replicas()
                with phase("wake"):
                    colocation.wake_up("weights")
                with phase("push"):
                    push = colocation.push(version)
                with phase("wake KV"):
                    colocation.wake_up("kv_cache")
                trained = step  # a loss from here on leaves this step's samples, rewards and metrics as they are
            if not metrics["logprob_gap"] <= config.logprob_tolerance:  # before it replaces a better checkpoint
                gap = f"{metrics['logprob_gap']:.4f} nats from the sampler's, tolerance {config.logprob_tolerance:g}"
                raise Stop(f"logprobs: step {step}: the trainers' log-probabilities are {gap}")
            if step in (done + 1, last):
                with colocation.stage("verify"):
                    elements = colocation.require_elements(digests, f"step {step}")
                log("verify", f"step {step}: {elements} parameter elements equal the trainers' bit for bit")
            save_if_due(step)
        except Lost as lost:
            version, push, digests, trained, metrics = recover(colocation, lost, version, losses, log)
            if trained < step:  # not trained yet, or the trainers went back to a checkpoint
                rows[:] = [row for row in rows if row["step"] <= trained]
                step = trained + 1
            note({"lost": losses[-1]["lost"], "back_to_step": step})
            continue
        tokens, best = sum(len(s["tokens"]) for s in samples), max(samples, key=lambda s: s["reward"])
        row = {"step": step, "version": version, "reward": sum(rewards) / len(rewards), **metrics, "tokens": tokens}
        row |= {"tokens_per_s": tokens / seconds["rollout"], "push_ms": push["wall_ms"], "gpu_used_gib": memory}
        row |= {"seconds": dict(seconds), "best": best["completion"]}
        rows.append(row | {"weights": hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()[:16]})
        log("step", describe_step(row, last))
        note(rows[-1])
        step += 1


def main(argv: list[str] | None = None) -> int:
    config = Config.from_args(argv, __doc__)
    log = Log()
    settings = dataclasses.asdict(config)
    settings |= {
        k: Path(v).name for k, v in settings.items() if isinstance(v, str) and "/" in v and Path(v).is_absolute()
    }
    report: dict = {"verdict": "FAIL", "config": settings, "versions": {}, "hardware": {}}
    report |= {"placement": [], "pushes": [], "verify": {}, "stages_s": log.stages_s}
    arguments = sys.argv[1:] if argv is None else argv
    report["command"] = " ".join(["python rlhf_colocate.py", *(Path(a).name if "/" in a else a for a in arguments)])
    report["date"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    for s in ENDING:
        if signal.getsignal(s) is not signal.SIG_IGN:
            signal.signal(s, signal.default_int_handler)
    code, verdict, colocation, scratch = PASS, "PASS", None, None
    try:
        scratch = make_temporary_folder()
        kind = SabotagedColocation if config.inject else Colocation
        colocation = kind(*preflight(config, log, report, scratch), log)
        config = colocation.config
        report["config"]["dtype"] = config.dtype
        run(config, log, report, colocation)
        if config.plot and config.steps:
            plot_steps(report["steps"], config.plot)
        if config.trace:
            write_trace(config.trace, log, colocation)
    except Stop as stop:
        code, verdict = stop.code, f"FAIL: {stop}"
    except KeyboardInterrupt:
        code, verdict = INTERRUPTED, "FAIL: interrupted"
    except Exception as error:  # a reward of the user's, a full disk: the report is written all the same
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).name}:{last.lineno}"
        code, verdict = FAIL, f"FAIL: {type(error).__name__}: {error} ({where}; --verbose shows the traceback)"
        if config.verbose:
            traceback.print_exc()
    finally:
        if code == FAIL:  # now, since ending everything may take a while
            with contextlib.suppress(OSError):  # nobody reads it, as after `| head`
                log("fail", verdict)
        try:
            if colocation:
                with log.stage("teardown"):
                    colocation.close()
        except KeyboardInterrupt:
            code, verdict = INTERRUPTED, "FAIL: interrupted"
        except Exception as error:
            code, verdict = FAIL, f"FAIL: teardown: {type(error).__name__}: {error}; without that: {verdict}"
        finally:
            if scratch:
                shutil.rmtree(scratch, ignore_errors=True)
    if code in (USAGE, MISSING):
        print(f"rlhf_colocate.py: error: {verdict.removeprefix('FAIL: ')}", file=sys.stderr)
        return code
    report["verdict"] = verdict
    try:
        if config.output_json:
            Path(config.output_json).write_text(json.dumps(report, indent=1) + "\n")
    except OSError as error:
        code, verdict = FAIL, f"FAIL: the report was not written ({error}); without that: {verdict}"
    mb = {"push": f"{sum(p['bytes'] for p in report['pushes']) / 1e6:.1f}"}
    print_table(["stage", "seconds", "MB"], [[k, f"{v:.2f}", mb.get(k, "")] for k, v in log.stages_s.items()])
    print(verdict, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
