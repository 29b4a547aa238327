"""The other ways to push, and what the benchmark measures inside the actors (see bench_weight_push.py).

`PeerColocation.push_by(method)` takes, beside our two ways,
    bucket        one flat buffer of 512 MB with a single handle: the trainer fills it, the engine loads it with vLLM's
                  loaders, and so on until all weights are through (as slime, verl and others do it)
    vllm          vLLM's own IPC weight transfer, unpacked: start_weight_update, update_weights, finish_weight_update
    vllm-packed   the same, packed into one buffer of 1 GiB
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time

import rlhf_colocate as rc
import rlhf_utils
from colocate import cluster

BUCKET_BYTES = 512 * 2**20
PACKED_BYTES = 2**30  # vLLM's default


def milliseconds(call, repeats: int) -> list[float]:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return times


# ---------------------------------------------------------------------------------------------------------------------
# In a trainer: for `fleet.ask(trainers, function, ...)`
# ---------------------------------------------------------------------------------------------------------------------


def join_peers(trainer, rank: int, world: int, port: int) -> None:
    """vLLM's transfer merges the trainers' handles over their process group: on the host, as its example does it.

    Imported here, not in a push.
    """
    import torch

    if torch.version.cuda:
        import vllm.distributed.weight_transfer.ipc_engine  # noqa: F401
    if world > 1:
        torch.distributed.destroy_process_group()  # NCCL's, on GPUs; without an RLHF step nobody needs it
        torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)


def gather(trainer) -> None:
    """All weights into a buffer that holds them all at once."""
    import torch

    for _ in trainer.held.rounds():
        pass
    if trainer.device.type == "cuda":
        torch.cuda.synchronize()


def count_rounds(trainer) -> int:
    return 1 + max(trainer.held.round_of.values(), default=0)


def weights_of(trainer) -> dict:
    """{name: tensor}, of all there is."""
    return {name: rlhf_utils.Piece.of(weight).tensor for name, weight in trainer.weights.items()}


def send_by_vllm(trainer, engines: list, packed: bool) -> None:
    from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerSendWeightsArgs, IPCWeightTransferEngine

    args = IPCTrainerSendWeightsArgs("ray", engines, packed=packed, packed_buffer_size_bytes=PACKED_BYTES)
    IPCWeightTransferEngine.trainer_send_weights(iter(list(weights_of(trainer).items())), args)


def weight_bytes(trainer) -> int:
    return sum(t.nbytes for t in weights_of(trainer).values())


def make_buckets(trainer) -> int:
    """Share the weights out to buckets, in order, and allocate one that the largest of them fits into.

    Returns how many buckets there are.
    """
    import torch

    trainer.buckets = [[]]
    filled = 0
    largest = 0
    for name, tensor in weights_of(trainer).items():
        nbytes = -(-tensor.nbytes // 16) * 16
        if filled and filled + nbytes > BUCKET_BYTES:
            trainer.buckets.append([])
            filled = 0
        trainer.buckets[-1].append((name, tensor, filled))
        filled += nbytes
        largest = max(largest, filled)
    trainer.bucket = torch.empty(largest, dtype=torch.uint8, device=trainer.device)
    if trainer.device.type == "cpu":
        rlhf_utils.share_memory([trainer.bucket])
    return len(trainer.buckets)


def fill_bucket(trainer, i: int) -> dict[str, dict]:
    """Copy the i-th share of the weights into the bucket. Returns {gpu: handles}: views of one storage."""
    views = []
    for name, tensor, start in trainer.buckets[i]:
        view = trainer.bucket[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        views.append((name, view.copy_(tensor)))
    return {rlhf_utils.device_uuid(trainer.device): rlhf_utils.export_handles(views)}


def fill(trainer, value: float, version: int) -> None:
    """Give every element of every weight one value: a reader that comes too late, or too early, sees two."""
    with trainer.changing_weights(version):
        for p in trainer.model.parameters():
            p.data.fill_(value)


# ---------------------------------------------------------------------------------------------------------------------
# In an engine: for `fleet.ask(engines, function, ...)`
# ---------------------------------------------------------------------------------------------------------------------


def start_weight_update(engine) -> None:
    engine.llm.start_weight_update()


def finish_weight_update(engine) -> None:
    engine.llm.finish_weight_update()


def push_nothing(engine, version: int) -> dict:
    """The messages of a push, to workers that only reply."""
    plain = engine.collective_rpc
    engine.collective_rpc = lambda method, *args: plain("push_peers:reply", *args)
    try:
        return engine.push(version)
    finally:
        del engine.collective_rpc


class PeerLLM(rc.MyLLM):
    def start(self, **engine_args) -> list[dict]:
        import torch

        if torch.version.cuda:  # vLLM's IPC transfer is for CUDA only
            engine_args["weight_transfer_config"] = {"backend": "ipc"}
        workers = super().start(**engine_args)
        if torch.version.cuda:
            self.llm.init_weight_transfer_engine({"init_info": {}})
        return workers

    def push(self, *args) -> dict:
        self.cached = True  # as after a rollout: each push is to reset the prefix cache
        return super().push(*args)

    def update_weights(self, request: dict) -> None:
        """vLLM's `trainer_send_weights` calls a method of this name."""
        self.llm.update_weights(request)


# ---------------------------------------------------------------------------------------------------------------------
# In a worker: for `on_workers("push_peers:function", ...)`
# ---------------------------------------------------------------------------------------------------------------------


def noop(worker) -> None:
    pass


def reply(worker, version: int) -> dict:
    """What a push replies, without one."""
    return {"version": version, "bytes": 0}


def load_bucket(worker, messages: dict) -> None:
    message = messages[rlhf_utils.device_uuid(worker.device)]
    with rlhf_utils.open_handles(message, worker.device) as weights:
        worker.get_model().load_weights(weights.items())


def torn(worker, value: float) -> int:
    """How many of the recorded copies' targets hold anything else than this value."""
    import torch

    return int(torch.stack([(dst != value).any() for dst, _ in worker._plan.rounds[0].local]).sum())


def device_copy_ms(worker, repeats: int) -> float:
    """Median time of a plain copy of up to 1 GiB, scaled to this worker's weights."""
    import torch

    shard = sum(p.nbytes for p in worker.get_model().parameters())
    size = min(shard, 2**30)
    a = torch.empty(size, dtype=torch.uint8, device=worker.device)
    b = torch.empty_like(a)
    median = median_ms(worker.device, functools.partial(b.copy_, a), repeats)
    del a, b
    if worker.device.type == "cuda":
        torch.cuda.empty_cache()
    return median * shard / size


def replay_ms(worker, repeats: int) -> float:
    """Median time of the recorded copies alone."""
    rounds = worker._plan.rounds.values()

    def replay() -> None:
        for copies in rounds:
            copies.replay()

    return median_ms(worker.device, replay, repeats)


def peer_copy_ms(worker, repeats: int) -> float:
    """Median time of a plain copy out of another GPU, of up to 256 MiB, scaled to all that this worker reads there."""
    import torch

    plan = worker._plan
    if not plan.remote_bytes:
        return 0.0
    storage = max((src.untyped_storage() for _, src in plan.rounds[0].remote), key=lambda storage: storage.nbytes())
    piece = torch.empty(0, dtype=torch.uint8, device=worker.device).set_(storage)[: 2**28]
    b = torch.empty_like(piece)
    median = median_ms(worker.device, functools.partial(b.copy_, piece), repeats)
    return median * plan.remote_bytes / piece.nbytes


def median_ms(device, call, repeats: int) -> float:
    """On the GPU between two events, on CPU of the call."""
    import torch

    if device.type == "cpu":
        return statistics.median(milliseconds(call, repeats))
    times = []
    for _ in range(repeats):
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


# ---------------------------------------------------------------------------------------------------------------------
# The layout
# ---------------------------------------------------------------------------------------------------------------------


class PeerColocation(rc.Colocation):
    engine_class = PeerLLM

    def prepare(self) -> list[str]:
        """Connect, and make ready what the peers need. Returns the methods that can run here.

        A bucket goes straight through load_weights, which needs parameters as they were loaded; vLLM's transfer needs
        CUDA. Packed only into one chunk: with more, vLLM 0.26 opens one export several times, torch's count of
        references never comes back to zero, and every push leaves its buffer behind (Llama-3.1-8B: 16 GB after some 15
        pushes).
        """
        ask = self.fleet.ask
        n = len(self.trainers)
        port = cluster.free_port()
        whole = self.config.trainers_per_copy == 1 and ask(self.trainers, count_rounds)[0] == 1
        if self.config.trainer == "replicated":  # shards need their process group
            ask(self.trainers, join_peers, each=[(rank, n, port) for rank in range(n)])
        if whole:
            self.bucket_count = ask(self.trainers, make_buckets)[0]
        used = max(self.on_workers("gpu_used_bytes"))
        self.connect()
        self.extra_gpu_bytes = max(self.on_workers("gpu_used_bytes")) - used
        methods = ["recorded"] if self.config.push == "gather" else ["simple", "recorded"]
        if not whole:
            return methods
        if not any(w["loaders"] for w in self.report.data["connect"]["workers"]):
            methods.append("bucket")
        if not self.model.rehearsal:
            methods.append("vllm")
            if max(ask(self.trainers, weight_bytes)) <= PACKED_BYTES:
                methods.append("vllm-packed")
        return methods

    def push_by(self, method: str) -> dict:
        """Push; returns {"wall_ms", ...}, what `Colocation.push` returns for our own ways.

        wall_ms without the reset of the prefix cache, which the others leave to their callers, and with the gather of
        --push gather.
        """
        ask = self.fleet.ask
        gathers = self.config.push == "gather"
        if method in ("simple", "recorded"):
            before = self.config
            if not gathers:
                self.config = dataclasses.replace(self.config, push=method)
            push = self.push()
            self.config = before
            return push | {"wall_ms": push["wall_ms"] - push["reset_ms"]}
        start = time.perf_counter()
        if gathers:
            ask(self.trainers, gather)
        if method == "bucket":
            for i in range(self.bucket_count):
                handles = {gpu: m for one in ask(self.trainers, fill_bucket, i) for gpu, m in one.items()}
                self.on_workers("push_peers:load_bucket", handles)
        else:
            ask(self.engines, start_weight_update)
            ask(self.trainers, send_by_vllm, [self.fleet.actors[e] for e in self.engines], method == "vllm-packed")
            ask(self.engines, finish_weight_update)
        return {"wall_ms": 1e3 * (time.perf_counter() - start)}

    def push_nothing_ms(self) -> float:
        """A push's message to all engines and their workers, and back, without a push: milliseconds."""
        start = time.perf_counter()
        replies = self.fleet.ask(self.engines, push_nothing, self.version)
        return 1e3 * (time.perf_counter() - start) - max(reply["reset_ms"] for reply in replies)
