"""Train and serve one model on the same GPUs: RLHF with the trainers' weights pushed into vLLM by CUDA IPC handles.

    one Ray placement group, one bundle per GPU (the default layout)

    bundle / GPU            0        1        2        3
    trainers              0.4 T0   0.4 T1   0.4 T2   0.4 T3      RayTrainingActor: a full replica each
    vLLM engines         [0.4   E0   0.4] [0.4   E1   0.4]       MyLLM: tensor_parallel_size=2 each

Two processes share each GPU, where NCCL cannot connect them. CUDA IPC can: a trainer sends 64-byte handles, the vLLM
worker on the same GPU maps the very same memory and loads it as vLLM's own loaders would. No weight leaves its GPU, but
where trainers hold shards.

    python rlhf_colocate.py                                          # 4 GPUs, two engines with TP=2
    python rlhf_colocate.py --num-gpus 1 --tensor-parallel-size 1    # 1 GPU
    python rlhf_colocate.py --model Qwen/Qwen2.5-0.5B --prompts questions.jsonl --reward mine.py:reward

On a machine without a GPU, with vLLM's CPU build, the same commands rehearse the layout on Ray's logical GPUs: real
Ray, real vLLM, real processes; shared memory in place of CUDA IPC.

Read on from here: the task, the two actors, the layout, the run. rlhf_utils.py is the push itself and stands alone.
colocate/ is the rest, and imports nothing from here: GRPO's loss (grpo.py), the optimizer's step (learner.py), flags,
checks, deadlines, reports.
YOURS marks what to change first, and where your own trainer goes.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from colocate import checkpoint, checks, cluster, memory, trace
from colocate.config import FAIL, Config, Lost, Schedule, Stop, stage_timeouts
from colocate.fleet import Fleet, require_restart
from colocate.model_folder import Model, load_model
from colocate.preflight import check_nodes, check_shared_memory, preflight
from colocate.report import Report
from colocate.rewards import TaskError
from colocate.signals import interrupts_deferred
from colocate.tasks import Task
from colocate.watch import join_names

# ---- 1. The task ----------------------------------------------------------------------------------------------------

PROMPTS = [  # YOURS, or --prompts FILE
    "The capital of France is",
    "Water boils at a temperature of",
    "To make a cup of tea, first you",
    "The first president of the United States was",
]


def reward(prompt: str, completion: str) -> float:  # YOURS, or --reward FILE.py:FUNCTION
    """The share of words that begin with a capital letter. (A model without a tokenizer gets another, see Task.)"""
    words = [w for w in completion.split() if w[0].isalpha()]
    at_least_four = max(len(words), 4)  # so that one capitalised word alone does not score 1
    return sum(w[0].isupper() for w in words) / at_least_four


# ---- 2. The two kinds of actors -------------------------------------------------------------------------------------


class RayTrainingActor:
    """A trainer on its share of a GPU: all of the model and its optimizer, or its shard of them."""

    def __init__(self, model: str, load_format: str, dtype: str, seed: int, sharded: bool):
        import torch

        self.device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")  # Ray shows it its own GPU only
        self.seed = seed
        self.random_weights = load_format == "dummy"
        # YOURS: a transformers model. With shards it may be larger than the GPU: then it stays on the host.
        self.model = load_model(model, load_format, dtype, seed, self.device, on_host=sharded)
        self.model.eval()
        self.version = torch.zeros((), dtype=torch.int64, device=self.device)  # see rlhf_utils.VERSION

    def report_device_id(self) -> dict:
        import torch

        import rlhf_utils

        return {"gpu": rlhf_utils.device_uuid(self.device), "pid": os.getpid(), "torch": torch.__version__}

    def join(self, rank: int, addresses: list[str], timeout_s: float, config: Config, checkpoint: Path | None) -> None:
        """Meet the other trainers, then make shards and optimizer by the flags. checkpoint: to go on from."""
        import torch

        import rlhf_utils
        from colocate.learner import Learner, hold, join_group
        from colocate.rounds import NO_ROUND, ROUND

        join_group(rank, addresses, timeout_s, self.device, sharded=config.trainer == "fsdp")
        self.held = hold(self.model, self.device, **config.hold_options)
        self.control = {rlhf_utils.VERSION: self.version}
        if self.held.round_of:
            self.control[ROUND] = torch.tensor(NO_ROUND, device=self.device)
        if self.device.type == "cpu":
            rlhf_utils.share_memory([*self.held.blocks(), *self.control.values()])
        # By the checkpoint's names: views, or pieces of them, no copies.
        self.weights = dict(rlhf_utils.checkpoint_tensors(self.model, self.held.exported(), self.held.round_of))
        # UUIDs of the GPUs whose workers may map them; none: this one's.
        self.readers = self.held.gather_names(rlhf_utils.device_uuid(self.device))
        if not config.steps:
            return
        # YOURS: a class with Learner's step, restore, save, load, str(), `steps`, `metrics`, `interrupted`. It changes
        # weights in place, and leaves the same bits in all trainers (docs/copying.md, "Your trainer in this script").
        self.learner = Learner(self.model, self.random_weights, held=self.held, **config.learner_options)
        if checkpoint:
            self.learner.load(checkpoint, config.learning_rate)

    @contextlib.contextmanager
    def changing_weights(self, version: int):
        """The version reads -1 while weights change, and `version` once the GPU has finished: engines look at it."""
        import torch

        synchronize = torch.cuda.synchronize if self.device.type == "cuda" else lambda: None
        before = [block.data_ptr() for block in self.held.blocks()]
        self.version.fill_(-1)
        synchronize()
        yield
        if [block.data_ptr() for block in self.held.blocks()] != before:
            raise RuntimeError("the weights moved. Change them in place: engines have their memory mapped")
        synchronize()
        self.version.fill_(version)
        synchronize()

    def learn(self, samples: list[dict], total_tokens: int, *, version: int) -> dict:
        """One optimizer step of all trainers, each on its own samples (see colocate/learner.py)."""
        with memory.of_step(self.device) as gpu, self.changing_weights(version):
            self.learner.step(samples, total_tokens)
        return self.state() | {"gpu": gpu, "choices": str(self.learner)}

    def restore(self, *, version: int) -> dict:
        """Set the weights to those that the optimizer has."""
        with self.changing_weights(version):
            self.learner.restore()
        return self.state()

    def state(self) -> dict:
        """{"steps": done, "metrics": the last one's, "interrupted": in the middle of another}."""
        learner = self.learner
        return {"steps": learner.steps, "metrics": learner.metrics, "interrupted": learner.interrupted}

    def get_weight_ipc_handles(self) -> dict[str, dict]:
        """{this GPU's UUID: handles of all weights}, plain data. The weights stay where they are."""
        import rlhf_utils

        message = rlhf_utils.export_handles([*self.weights.items(), *self.control.items()], self.readers)
        return {rlhf_utils.device_uuid(self.device): message}

    def send_rounds(self) -> None:
        """--push gather: gather the weights through one buffer, while the engines' workers read them."""
        from colocate import rounds

        rounds.send(self.control[rounds.ROUND], self.held.rounds())

    def save(self, folder: str) -> None:
        """Write a Hugging Face checkpoint, and the optimizer's state beside it: all trainers of a replica together."""
        weights = self.held.gather()
        if weights is not None:  # the others have only helped
            checkpoint.write_model(self.model, folder, weights)
        self.learner.save(Path(folder))


class MyLLM:
    """A vLLM engine. This actor runs its scheduler and takes no GPU; its workers are actors on the given bundles.

    Between the beginning of a push and its end, and while it sleeps, it refuses to generate.
    """

    def __init__(self, bundle_indices: list[int], gpu_share: float, master_port: int):
        self.version: int | None = 0  # of its weights; None: incomplete, or dropped
        self.asleep: set[str] = set()
        self.cached = False  # keys and values of prompts, by the weights of now, may be in the prefix cache
        # Read by vLLM's Ray executor when the engine is built.
        os.environ["VLLM_RAY_PER_WORKER_GPUS"] = str(gpu_share)
        os.environ["VLLM_RAY_BUNDLE_INDICES"] = ",".join(map(str, bundle_indices))
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine's core stays in this process
        os.environ["VLLM_DP_MASTER_PORT"] = str(master_port)  # vLLM 0.26 gives all engines of a host the same one

    def start(self, **engine_args) -> list[dict]:
        """Build the engine. Not in __init__, so that all processes import at the same time."""
        from vllm import LLM

        self.llm = LLM(**engine_args)
        return [w | {"engine_pid": os.getpid()} for w in self.collective_rpc("report_device_id")]

    def collective_rpc(self, method: str, *args) -> list:
        """Call a method of ColocateWorkerExtension on every worker; results in rank order, errors raised."""
        import rlhf_utils

        if method in rlhf_utils.WRITES:
            if "weights" in self.asleep:
                raise RuntimeError('the engine\'s weights are asleep: wake_up("weights") before a push')
            self.version = None
        return rlhf_utils.call_workers(self.llm, method, *args)

    def push(self, version: int, handles: dict[str, dict] | None = None) -> dict:
        """All of a push: {"workers": their replies, "wake_ms", "reset_ms", "wake_kv_ms"}. Then it can generate.

        handles: of all trainers, for a simple push. Raises RuntimeError if the engine is not whole.
        """
        wake_ms = self.wake_up("weights")
        if handles:
            workers = self.collective_rpc("update_weights_from_ipc_handles", handles)
        else:
            workers = self.collective_rpc("push_weights", version)
        wrong = {w["version"] for w in workers} - {version}
        if wrong:  # push_weights has raised then; the simple push has not
            raise RuntimeError(f"the workers read weights of version {sorted(wrong)}, not {version}")
        reset_ms = self.reset_prefix_cache()
        self.version = version
        return {"workers": workers, "wake_ms": wake_ms, "reset_ms": reset_ms, "wake_kv_ms": self.wake_up("kv_cache")}

    def reset_prefix_cache(self) -> float:
        """Forget what prompts have left there, unless nothing was generated since the last time. Milliseconds.

        vLLM walks over every block, so `Colocation.train` asks for it while the trainers compute. Else `push` does it.
        """
        start = time.perf_counter()
        if self.cached and not self.llm.reset_prefix_cache():
            raise RuntimeError("the prefix cache was not reset: requests are still running")
        self.cached = False
        return 1e3 * (time.perf_counter() - start)

    def sleep(self, level: int) -> tuple[int, int]:
        """Give GPU memory up. 0: none; 1: weights go to the host, the KV cache is dropped; 2: both are dropped.

        Returns bytes in use on the fullest of its GPUs, by all processes, before and after.
        """
        before = max(self.collective_rpc("gpu_used_bytes"))
        # A part sleeps already after a loss in a push: the weights are awake, the KV cache is not. vLLM 0.26 would not
        # put the weights to sleep again. They take less than a trainer's gradient, for which there is room.
        if not level or self.asleep:
            return before, before
        self.version = None
        self.asleep = {"weights", "kv_cache"}
        self.llm.sleep(level=level)
        return before, max(self.collective_rpc("gpu_used_bytes"))

    def wake_up(self, tag: str) -> float:
        """Wake the part with this tag, if it sleeps: "weights", then a push, then "kv_cache". Returns milliseconds."""
        start = time.perf_counter()
        if tag == "kv_cache" and tag in self.asleep and self.version is None:
            raise RuntimeError("the KV cache wakes up after the push, which it would be in the way of")
        if tag in self.asleep:
            self.llm.wake_up(tags=[tag])
            self.asleep.discard(tag)
        return 1e3 * (time.perf_counter() - start)

    def generate(self, prompts: list[list[int]], version: int, seeds: list[int] | None, **sampling) -> list[list[dict]]:
        """Completions of each prompt (see `sample_of`). A seed for each prompt makes them independent of the engine."""
        from vllm import SamplingParams

        if self.asleep or self.version != version:
            found = f"asleep ({', '.join(sorted(self.asleep))})" if self.asleep else f"at version {self.version}"
            raise RuntimeError(f"the engine is {found}; it must be awake and at version {version} to generate")
        options = {"logprobs": 0, "flat_logprobs": True, "detokenize": False} | sampling
        params = [SamplingParams(**options, seed=seed) for seed in seeds or [None] * len(prompts)]
        self.cached = True
        outputs = self.llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        return [[sample_of(o, done) for done in sorted(o.outputs, key=lambda done: done.index)] for o in outputs]

    def shutdown(self) -> None:
        with contextlib.suppress(AttributeError):  # never started
            engine = self.llm.llm_engine
            if executor := getattr(engine, "model_executor", None):
                executor._monitor_thread = None  # vLLM would wait for it, and it looks every 5 s whether it may end
            engine.engine_core.shutdown()


def sample_of(output, done) -> dict:
    """{"prompt": [ids], "tokens": [ids], "logprobs": [nats, of tokens, the sampler's], "truncated": by --max-tokens
    [, "prompt_logprobs"]}.
    """
    sample = {"prompt": list(output.prompt_token_ids), "tokens": list(done.token_ids)}
    sample["truncated"] = done.finish_reason == "length"
    flat = done.logprobs  # vLLM's FlatLogprobs: of each position the token's own, then those of the likeliest
    sample["logprobs"] = [flat.logprobs[i] for i in flat.start_indices]
    if flat := output.prompt_logprobs:  # of all but the first
        sample["prompt_logprobs"] = [flat.logprobs[i] for i in flat.start_indices[1:]]
    return sample


# ---- 3. The layout --------------------------------------------------------------------------------------------------


class Colocation(contextlib.AbstractContextManager):
    """One bundle per GPU: on each of them a trainer and a worker of an engine. Leaves nothing behind.

    `fleet.ask(names, method, ...)` is `ray.get([actor.method.remote(...) for ...])` with a deadline, and an eye on the
    processes: it raises Lost for those that died or did not answer, and Stop with an actor's own error.
    """

    trainer_class = RayTrainingActor
    engine_class = MyLLM
    worker_extension = "colocate.rounds.Extension"  # rlhf_utils.ColocateWorkerExtension, and --push gather

    def __init__(self, config: Config, model: Model, report: Report, folder: Path):
        self.config = config
        self.model = model
        self.report = report
        self.folder = folder  # temporary
        self.fleet = Fleet(report, stage_timeouts(config), config.timeout, cluster.new_watch(config))
        self.stage = self.fleet.stage  # "with stage(name):" a part of the run that is timed, and has a deadline
        self.cluster = cluster.Cluster(config, folder, model.rehearsal, self.fleet.watch)
        self.trainers = [f"trainer {i}" for i in range(config.num_gpus)]
        n = config.replica_size
        self.replicas = [self.trainers[i : i + n] for i in range(0, config.num_gpus, n)]  # each has all weights
        self.engines = [f"engine {e}" for e in range(config.num_engines)]
        self.versions = itertools.count(1)  # of the weights: none is given out twice
        self.version = 0
        self.digests: dict[str, str] = {}  # of the trainers' weights
        self.compared = 0  # the version that `digests` is of
        self.sleep_level = memory.SleepLevel(config.sleep_level, report)
        self.connected = False  # the engines' workers have the trainers' memory mapped
        self.checkpoint = model.source if config.resume else None  # that new trainers start from
        self.checkpoint_everywhere: Path | None = None  # the same, at a path where all nodes see it
        self.trained = False  # a step has begun: until then, new trainers start as the first ones did
        if config.rollout_quantization != "none":
            self.worker_extension = "colocate.fp8.QuantizingExtension"
        if config.trace:
            self.trainer_class = trace.traced(self.trainer_class)
            self.engine_class = trace.traced(self.engine_class)

    def __exit__(self, kind, error, traceback) -> None:
        with interrupts_deferred(), self.report.stage("teardown"):
            self.report.failing(error)
            if self.cluster.running():
                self.fleet.close(self.engines, "shutdown")
                self.cluster.stop()

    def start_ray(self) -> None:
        self.cluster.start(self.model.environment, self.fleet.deadline())
        check = functools.partial(check_nodes, self.config, self.model, self.report)
        self.config = self.cluster.place(self.fleet.deadline(), check)  # which decides about --push auto
        self.report.placed(self.config)

    def start(self, names: list[str]) -> None:
        """Start these actors: all of them at first, later those that were lost."""
        trainers = [n for n in self.trainers if n in names]
        engines = [n for n in self.engines if n in names]
        if trainers and self.checkpoint:
            self.checkpoint_everywhere = self.cluster.everywhere(self.checkpoint)
        for name in [*engines, *trainers]:  # all at once: their imports run in parallel
            self.fleet.add(name, self.new_actor(name))
        self.report("place", f"starting {', '.join(names)}: a minute or so")
        if trainers:
            self.sleep_level.forget()
            reports = self.fleet.ask(trainers, "report_device_id")
            self.join_trainers()
            self.fleet.note(trainers, reports)  # until then a recovery counts them as lost: they have no state to save
            self.report("train", f"{len(trainers)} trainers hold their weights")
        # vLLM measures free memory and must not see another process allocate: only after the trainers have settled.
        reports = self.fleet.ask(engines, "start", **self.engine_args())
        # What no push brings is kept over a sleep from now on, and later checks compare with how it is now.
        self.report.kept(self.fleet.ask(engines, "collective_rpc", "colocate.verify:first_look"))
        self.fleet.note(engines, reports)
        reports = self.fleet.reports
        rows = cluster.match_placement([reports[t] for t in self.trainers], [reports[e] for e in self.engines])
        self.report.placement(self.cluster.locate(rows, self.trainers))
        if trouble := self.cluster.keep_spares():
            self.report("place", trouble)
        self.connected = False

    def new_actor(self, name: str):
        """Start an actor on its bundles. Here a trainer and an engine's worker come to share a GPU.

        The shares are what Ray books, so that both fit into a bundle. They bound no memory: engine_args does.
        """
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        config = self.config
        is_engine = name in self.engines
        group, bundles = self.cluster.seat(name, self.bundles_of(name))
        where = PlacementGroupSchedulingStrategy(
            placement_group=group,
            placement_group_bundle_index=bundles[0],
            placement_group_capture_child_tasks=is_engine,  # its workers go into the group, too
        )
        if is_engine:
            actor = ray.remote(self.engine_class).options(num_cpus=0, num_gpus=0, scheduling_strategy=where)
            return actor.remote(bundles, config.engine_gpu_share, cluster.free_port())
        options = {"num_cpus": 0, "num_gpus": config.trainer_gpu_share, "runtime_env": cluster.TRAINER_ENV}
        actor = ray.remote(self.trainer_class).options(**options, scheduling_strategy=where)
        load_format = "auto" if self.checkpoint_everywhere else self.model.load_format
        model = str(self.checkpoint_everywhere or self.model.folder)
        return actor.remote(model, load_format, config.dtype, config.seed, config.trainer == "fsdp")

    def bundles_of(self, name: str) -> list[int]:
        """One for a trainer, one for each worker of an engine."""
        kind, number = name.split()
        tp = self.config.tensor_parallel_size if kind == "engine" else 1
        return list(range(int(number) * tp, (int(number) + 1) * tp))

    def join_trainers(self) -> None:
        """Let them make their process group and their optimizers."""
        from colocate.sharding import rank_of

        config = self.config
        ranks = [rank_of(i, config.replica_size, config.tensor_parallel_size) for i in range(len(self.trainers))]
        addresses = self.fleet.ask(self.trainers, cluster.free_address)
        by_rank = [address for _, address in sorted(zip(ranks, addresses, strict=True))]
        # Longer than the driver waits, which can say who is late: the process group ends those that wait for it.
        timeout_s = self.fleet.timeouts.get("train", config.timeout) + 60
        options = {"timeout_s": timeout_s, "config": config, "checkpoint": self.checkpoint_everywhere}
        self.fleet.ask(self.trainers, "join", each=[(rank,) for rank in ranks], addresses=by_rank, **options)

    def engine_args(self) -> dict:
        """Arguments of vllm.LLM. YOURS: --engine-args '{"block_size": 32}' adds others. What is here has a flag, or the
        push needs it so (config.OWN_ENGINE_ARGS).
        """
        config = self.config
        return config.more_engine_args | dict(
            model=str(self.model.folder),
            skip_tokenizer_init=not config.stop,  # token ids in, token ids out: the task has the tokenizer
            load_format=self.model.load_format,
            hf_overrides={"architectures": [self.model.architecture]},  # a config.json may lack it
            dtype=config.dtype,
            quantization=config.engine_quantization,
            kv_cache_dtype=config.kv_cache_dtype,
            tensor_parallel_size=config.tensor_parallel_size,
            distributed_executor_backend="ray",
            worker_extension_cls=self.worker_extension,
            gpu_memory_utilization=config.gpu_memory_utilization,
            kv_cache_memory_bytes=self.model.kv_cache_bytes,  # None on GPUs: what utilization leaves
            max_model_len=config.max_model_len,
            max_num_seqs=memory.max_num_seqs(config, self.model.rehearsal),
            enforce_eager=config.enforce_eager,
            enable_prefix_caching=True,
            logprobs_mode="raw_logprobs" if config.temperature == 1 else "processed_logprobs",  # the trainers', too
            enable_sleep_mode=bool(config.steps and config.sleep_level) and not self.model.rehearsal,
            seed=config.seed,
        )

    def on_workers(self, method: str, *args) -> list:
        """Call a method of the worker extension, or "module:function", on all workers. Results: all workers, flat."""
        return [w for workers in self.fleet.ask(self.engines, "collective_rpc", method, *args) for w in workers]

    def handles(self) -> dict[str, dict]:
        """{GPU UUID: message} of all trainers. Fresh ones for each use: an export may be opened once only."""
        return {gpu: m for one in self.fleet.ask(self.trainers, "get_weight_ipc_handles") for gpu, m in one.items()}

    def push(self) -> dict:
        """Bring the trainers' weights into all engines. In whatever state these are, they can generate afterwards.

        The trainers may change their weights again when this returns. What it returns: see `Report.pushed`.
        """
        method = self.config.push
        if not self.connected and method != "simple":
            with self.stage("wake"):
                self.fleet.ask(self.engines, "wake_up", "weights")
            self.connect()
        with self.stage("push"):
            handles = self.handles() if method == "simple" else None  # else the memory is mapped
            with self.gathering():
                replies = self.fleet.ask(self.engines, "push", self.version, handles)
        return self.report.pushed(self.version, method, replies)

    def gathering(self) -> contextlib.AbstractContextManager:
        """Around what reads the trainers' weights: with --push gather they send them in rounds meanwhile."""
        if self.config.push != "gather":
            return contextlib.nullcontext()
        return self.fleet.meanwhile(self.trainers, "send_rounds")

    def compare(self) -> list[dict]:
        """What `verify.compare` finds on all workers."""
        handles = self.handles()  # before the trainers send, which keeps them busy
        with self.gathering():
            return self.on_workers("colocate.verify:compare", handles, self.digests)

    def connect(self) -> None:
        """Let every worker map its trainer's weights and record how vLLM's loaders bring them in."""
        with self.stage("connect"):
            workers = self.on_workers("connect_weights", self.handles())
        self.report.connected(workers)
        self.connected = True

    def generate(self, prompts: list[list[int]], seed: int | None = None, **sampling) -> list[dict]:
        """Completions of all prompts in order, group after group. The engines share the prompts out."""
        n = len(self.engines)
        # Far apart: vLLM adds 0, 1, ... for the completions of a prompt.
        seeds = None if seed is None else [seed + 1000 * i for i in range(len(prompts))]
        each = [(prompts[e::n], self.version, seeds and seeds[e::n]) for e in range(n)]
        groups = self.fleet.ask(self.engines, "generate", each=each, **sampling)
        return [sample for i in range(len(prompts)) for sample in groups[i % n][i // n]]

    def sleep(self, samples: list[dict]) -> Callable[[], list[float]]:
        """Let the engines give up memory for a step with these samples, unless it has room beside them.

        Returns at once, with a function that waits for it and returns GiB in use on the fullest GPU, before and after.
        """
        wait = self.fleet.begin(self.engines, "sleep", self.sleep_level.choose(samples))
        return lambda: self.sleep_level.note(wait())

    def train(self, samples: list[dict]) -> dict:
        """One optimizer step, the samples shared out to the trainers. Returns its metrics."""
        from colocate.grpo import learned_tokens

        n = len(self.trainers)
        tokens = max(1, learned_tokens(samples))
        self.fleet.require_alive("learn")  # an all-reduce with a missing peer hangs forever
        self.trained = True
        wait_for_reset = self.fleet.begin(self.engines, "reset_prefix_cache")
        states = self.change_weights("learn", each=[(samples[i::n], tokens) for i in range(n)])
        wait_for_reset()
        self.report.trains(states[0]["choices"])
        return states[0]["metrics"] | self.sleep_level.measure(samples, [state["gpu"] for state in states])

    def restore(self) -> tuple[int, dict]:
        """Give the trainers their optimizers' weights back. Returns (steps that these have done, metrics)."""
        self.fleet.require_alive("restore")  # shards may be gathered, all trainers together
        state = self.change_weights("restore")[0]
        return state["steps"], state["metrics"] | self.compare_replicas()

    def change_weights(self, method, **asked) -> list[dict]:
        """Let all trainers change their weights by this method, under a version that was never given out before.

        Returns what each replied. `compare_replicas` says whether they did the same.
        """
        self.version = next(self.versions)
        return self.fleet.ask(self.trainers, method, version=self.version, **asked)

    def compare_replicas(self) -> dict[str, str]:
        """Raise Stop unless the weights are bitwise the same in all replicas; each version is looked at once.

        Returns {"weights": a digest of all}, for the metrics.
        """
        if self.compared != self.version:
            digests = self.fleet.ask(self.trainers, checks.weight_digests)
            self.digests = checks.require_equal(digests, self.config.trainers_per_copy)
            self.compared = self.version
        return {"weights": checks.fingerprint(self.digests)}

    def save(self, folder: Path, by: int = 0) -> None:
        """Let a replica write a checkpoint; an older one there is replaced once the new one is complete."""
        with checkpoint.replacing(folder.resolve(), self.model.files_beside()) as new:
            self.fleet.ask(self.replicas[by], "save", str(new))
            self.cluster.gather(new, self.replicas[by])
        self.checkpoint = folder.resolve()

    def recover(self, lost: Lost) -> tuple[int, dict]:
        """Replace what is lost, so that the loop can go on with a push. Returns what `restore` does.

        An engine has no state: a push brings it all there is. Trainers are replaced together, since their process group
        cannot lose a member: from the state of a replica that is left, else from the last checkpoint.
        """
        with self.stage("recover"):
            gone = self.fleet.find_all_lost(lost)
            self.report.all_lost(gone)
        with self.stage("recover"):  # with the stage's whole time again, which the wait above may have used up
            self.fleet.end(gone)  # first, since any call to the others reports a watched process that has ended
            if gone & {*self.trainers}:
                more = self.disconnect([e for e in self.engines if e not in gone])
                survivors = {*self.trainers} - gone
                if self.trained:
                    self.save_surviving_state(survivors)
                self.fleet.end(more | survivors)
                gone |= more | survivors
            self.fleet.require_alive("recover")  # more may have gone meanwhile: all of it is replaced together
            if missing := self.cluster.move(self.fleet.deadline()):
                gone -= self.leave_out(missing)
            self.report("lost", f"replacing {', '.join(sorted(gone))}")
            if engines := gone & {*self.engines}:
                self.cluster.call(check_shared_memory, len(engines), FAIL)
            self.start(sorted(gone))
            return self.restore()

    def leave_out(self, missing: set[int]) -> set[str]:
        """Go on without these bundles, whose node is gone. Returns their actors. Raises Stop below --min-gpus."""
        out = {name for name in [*self.trainers, *self.engines] if missing & {*self.bundles_of(name)}}
        self.trainers = [name for name in self.trainers if name not in out]
        self.replicas = [replica for replica in self.replicas if not out & {*replica}]
        self.engines = [name for name in self.engines if name not in out]
        if torn := {*self.trainers}.difference(*self.replicas):
            raise Stop(f"the node that is gone had shards of {join_names(torn)}'s replica. Try: a spare node")
        self.cluster.require_enough(missing)
        self.fleet.forget(out)
        self.report("lost", f"going on without {', '.join(sorted(out))}: their node is gone, and no other has room")
        return out

    def disconnect(self, engines: list[str]) -> set[str]:
        """Let engines unmap the trainers' memory, which stays taken otherwise, and sleep. Returns those that cannot."""
        broken = set()
        for engine in engines:
            try:
                self.fleet.ask([engine], "collective_rpc", "disconnect_weights")
                self.fleet.ask([engine], "sleep", self.sleep_level.deepest)
            except Lost:
                raise
            except Stop as stop:  # a CUDA error that stays, for instance
                self.report("lost", f"{stop}: it is replaced, too")
                broken.add(engine)
        return broken

    def save_surviving_state(self, survivors: set[str]) -> None:
        """Point `checkpoint` at the newest state of a whole replica among these trainers, which is saved for that."""
        newest = -1
        for i, replica in enumerate(self.replicas):
            if not survivors.issuperset(replica):
                continue
            names = join_names(replica)
            try:
                self.fleet.ask(replica, checks.weight_digests)  # raises if its weights are not finite
                steps = checks.require_same_steps(self.fleet.ask(replica, "state"))
                if steps > newest:
                    self.save(Path(self.config.checkpoint or self.folder / "saved"), by=i)
                    newest = steps
                    self.report("lost", f"all trainers start again from {names}'s state after step {steps}")
            except Lost:
                raise
            except Stop as stop:  # its GPU is broken, or a disk is full
                self.report("lost", f"{names} cannot save the state: {stop}")
        if newest >= 0:
            return
        if not self.checkpoint:
            raise Stop("no whole replica is left, and no checkpoint. Next time: --checkpoint DIR --checkpoint-every 10")
        self.report("lost", f"all trainers start again from the checkpoint {self.checkpoint.name}")


# ---- 4. The run -----------------------------------------------------------------------------------------------------


def prove_push(colocation: Colocation, task: Task) -> list[dict]:
    """Change every weight by noise, push, and compare every element. Returns the completions from before.

    Raises Stop with all checks that failed. benchmarks/drills.py breaks it in seven ways to show that it does.
    """
    report = colocation.report
    colocation.push()
    with colocation.stage("rollout"):
        before = every_engine_answers(colocation, task)
        colocation.on_workers("record_weights")
    with colocation.stage("perturb"):
        colocation.change_weights(checks.perturb, noise=colocation.config.proof_noise)
        colocation.compare_replicas()
        report.replicas_equal(len(colocation.digests), len(colocation.replicas))
    colocation.push()
    with colocation.stage("verify"):
        report.checked(compare_elements(colocation))
        report.checked({"changed": checks.changed(colocation.on_workers("check_weights_changed"))})
        after = every_engine_answers(colocation, task)
        sequences = [s["prompt"] + s["tokens"] for s in after]
        scores = colocation.fleet.ask(colocation.trainers, checks.token_logprobs, sequences)[0]
        report.checked({"behaviour": checks.behaviour(before, after, scores, colocation.config.gap_tolerance)})
    report.proven(before, after, task.text)
    return before[:: len(colocation.engines)]  # of each prompt one


def every_engine_answers(colocation: Colocation, task: Task) -> list[dict]:
    """Greedy completions of the proof's prompts, with log-probabilities: of each prompt one by each engine."""
    n = colocation.config.max_tokens
    greedy = {"temperature": 0, "max_tokens": n, "prompt_logprobs": 0, "stop_token_ids": task.stop_token_ids}
    # At others vLLM's log-probabilities leave the end tokens out that min_tokens forbids, and the trainers' do not.
    if colocation.config.temperature == 1:
        greedy["min_tokens"] = n
    return colocation.generate([p for p in task.proof_prompts() for _ in colocation.engines], **greedy)


def compare_elements(colocation: Colocation) -> dict[str, dict]:
    """Every element of every parameter of every worker, against the trainers' weights: {check: what it found}."""
    colocation.compare_replicas()
    found = colocation.compare()
    colocation.fleet.watch.note_files()  # in /dev/shm: by now the workers have mapped all that they share
    return {kind: checks.combine(found, kind, colocation.config.strict) for kind in checks.COMPARED}


def rlhf_step(colocation: Colocation, task: Task, step: int, compare: bool) -> None:
    """Rollout, reward while engines fall asleep, train. The engines get the new weights at the next push.

    compare: whether to compare the trainers' replicas afterwards.
    """
    from colocate.grpo import credit

    report = colocation.report
    with colocation.stage("rollout"):
        prompts = task.prompts(step)
        samples = task.rollout(colocation.generate, prompts, seed=task.seed(step))
    wait_for_sleep = colocation.sleep(samples)
    with colocation.stage("reward"):
        task.score(prompts, samples)
        credit(samples, colocation.config)
    with colocation.stage("sleep"):
        report.sampled(step, samples, task.text, wait_for_sleep())
    with colocation.stage("train"):
        metrics = colocation.train(samples)
    if compare:
        with colocation.stage("verify"):
            metrics |= colocation.compare_replicas()
    report.step(colocation.version, metrics)  # raises Stop if trainers and sampler do not agree


def evaluate(colocation: Colocation, task: Task, step: int) -> None:
    """Answer --eval-prompts greedily, and reward the answers; --save-best keeps the best weights."""
    with colocation.stage("eval"):
        samples = task.rollout(colocation.generate, task.held_out, n=1, temperature=0.0)
        task.score(task.held_out, samples)
    if colocation.report.evaluated(step, samples, task.text) and colocation.config.save_best:
        with colocation.stage("checkpoint"):
            colocation.save(Path(colocation.config.save_best))


def learn(colocation: Colocation, task: Task, before: list[dict]) -> None:
    """The RLHF loop. A loss sends it back to the first step that the trainers have not done. before: for the report."""
    config = colocation.config
    report = colocation.report
    schedule = None  # this run's steps, known once the trainers have said how many they have done
    lost = None  # what is to be replaced before the next push
    for restarts in itertools.count(1):
        try:  # all of it: a loss while another is made good is survived, too
            done, metrics = colocation.recover(lost) if lost else colocation.restore()  # the proof's noise goes
            if not schedule:
                schedule = Schedule(config, done + 1, done + config.steps)
                report.loop(done, schedule.last)
            if lost:
                report.goes_on(done, colocation.version, metrics)
            for step in range(done, schedule.last + 1):  # each is done, but not pushed yet
                colocation.push()
                if lost or schedule.verifies(step):
                    with colocation.stage("verify"):
                        report.verified(step, compare_elements(colocation))
                lost = None
                if schedule.saves(step):
                    with colocation.stage("checkpoint"):
                        colocation.save(Path(config.checkpoint))
                if schedule.evaluates(step):
                    evaluate(colocation, task, step)
                if step < schedule.last:
                    rlhf_step(colocation, task, step + 1, schedule.compares(step + 1))
            with colocation.stage("rollout"):
                after = every_engine_answers(colocation, task)[:: len(colocation.engines)]
            report.learned(before, after, task.text)
            return
        except Lost as loss:
            report.lost(loss)
            require_restart(loss, restarts, config.max_restarts)
            lost = loss
        except TaskError:  # the trainers have done all steps before this one
            if config.checkpoint and step >= schedule.first:
                with colocation.stage("checkpoint"):
                    colocation.compare_replicas()
                    colocation.save(Path(config.checkpoint))
            raise


def run(colocation: Colocation, task: Task) -> None:
    """Start, prove the push, learn."""
    with colocation.stage("start"):
        colocation.start_ray()
        colocation.start([*colocation.trainers, *colocation.engines])
    before = prove_push(colocation, task)
    if colocation.config.steps:
        learn(colocation, task, before)


def main(argv: list[str] | None = None, layout: type[Colocation] = Colocation) -> int:
    config = Config.from_args(argv, __doc__)
    report = Report(config, argv)
    with report.verdict(), cluster.temporary_folder() as folder:  # PASS, or what a Stop, Ctrl-C or an error says
        config, model = preflight(config, report, folder)
        task = Task(config, model, PROMPTS, reward)
        report.notes(task.notes)
        with layout(config, model, report, folder) as colocation:
            run(colocation, task)
    return report.exit_code


if __name__ == "__main__":
    sys.exit(main())
