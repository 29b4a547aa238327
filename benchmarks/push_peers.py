"""The other ways to push, and what the benchmark measures inside the actors (see bench_weight_push.py).

`PeerColocation.push_by(method, step)` takes, beside our two ways,
    bucket        one flat buffer of 512 MB with a single handle: the trainer fills it, the engine loads it with vLLM's
                  loaders, and so on until all weights are through (the usual way of RL frameworks)
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
from colocate import verify

BUCKET_BYTES = 512 * 2**20
PACKED_BYTES = 2**30  # vLLM's default


def milliseconds(call, repeats: int) -> list[float]:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return times


class PeerTrainer(rc.RayTrainingActor):
    def join(self, rank: int, world: int, port: int) -> None:
        """vLLM's transfer merges the trainers' handles over their process group. Imported here, not in a push."""
        import torch

        if torch.version.cuda:
            import vllm.distributed.weight_transfer.ipc_engine  # noqa: F401
        if world > 1:
            torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)

    def send_by_vllm(self, engines: list, packed: bool) -> None:
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerSendWeightsArgs, IPCWeightTransferEngine

        weights = list(rlhf_utils.checkpoint_tensors(self.model))
        args = IPCTrainerSendWeightsArgs("ray", engines, packed=packed, packed_buffer_size_bytes=PACKED_BYTES)
        IPCWeightTransferEngine.trainer_send_weights(iter(weights), args)

    def weight_bytes(self) -> int:
        return sum(t.nbytes for _, t in rlhf_utils.checkpoint_tensors(self.model))

    def bucket_count(self) -> int:
        """Share the weights out to buckets, in order, and allocate one that the largest of them fits into."""
        import torch

        self.buckets: list[list] = [[]]
        filled = largest = 0
        for name, tensor in rlhf_utils.checkpoint_tensors(self.model):
            nbytes = -(-tensor.nbytes // 16) * 16
            if filled and filled + nbytes > BUCKET_BYTES:
                self.buckets.append([])
                filled = 0
            self.buckets[-1].append((name, tensor, filled))
            filled += nbytes
            largest = max(largest, filled)
        self.bucket = torch.empty(largest, dtype=torch.uint8, device=self.device)
        if self.device.type == "cpu":
            rlhf_utils.share_memory([self.bucket])
        return len(self.buckets)

    def fill_bucket(self, i: int) -> dict[str, dict]:
        """Copy the i-th share of the weights into the bucket. Returns {gpu: handles}: views of one storage."""
        views = []
        for name, tensor, start in self.buckets[i]:
            view = self.bucket[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            views.append((name, view.copy_(tensor)))
        return {rlhf_utils.device_uuid(self.device): rlhf_utils.export_handles(views)}

    def fill(self, value: float, step: int) -> None:
        """Give every element of every weight one value: whoever reads meanwhile sees two."""
        import torch

        self.version.fill_(-1)
        for p in self.model.parameters():
            p.data.fill_(value)
        self.version.fill_(step)
        if self.device.type == "cuda":
            torch.cuda.synchronize()


class PeerLLM(rc.MyLLM):
    def start(self, **engine_args) -> list[dict]:
        import torch

        if torch.version.cuda:  # vLLM's IPC transfer is for CUDA only
            engine_args["weight_transfer_config"] = {"backend": "ipc"}
        workers = super().start(**engine_args)
        if torch.version.cuda:
            self.llm.init_weight_transfer_engine({"init_info": {}})
        return workers

    def start_weight_update(self) -> None:
        self.llm.start_weight_update()

    def update_weights(self, request: dict) -> None:
        self.llm.update_weights(request)

    def finish_weight_update(self) -> None:
        self.llm.finish_weight_update()


class PeerWorkerExtension(rlhf_utils.ColocateWorkerExtension):
    def noop(self) -> None:
        pass

    def push_weights(self, version: int) -> dict:
        """As it is, with the moments at which it begins and ends: CLOCK_MONOTONIC, the same for all processes."""
        began = time.perf_counter()
        return super().push_weights(version) | {"began": began, "ended": time.perf_counter()}

    def needs_reload(self) -> bool:
        return verify.expected_layout(self.get_model(), []).needs_reload

    def compare(self, messages: dict) -> tuple[int, dict[str, int]]:
        """(elements compared, {parameter: wrong elements})."""
        with rlhf_utils.open_handles(messages[rlhf_utils.device_uuid(self.device)], self.device) as weights:
            model = self.get_model()
            return verify.compare_elements(model, verify.expected_layout(model, weights), weights)

    def load_bucket(self, messages: dict) -> None:
        with rlhf_utils.open_handles(messages[rlhf_utils.device_uuid(self.device)], self.device) as weights:
            self.get_model().load_weights(weights.items())

    def torn(self, value: float) -> int:
        """How many of the recorded copies' targets hold anything else than this value."""
        import torch

        return int(torch.stack([(dst != value).any() for dst, _ in self._plan.copies]).sum())

    def device_copy_ms(self, repeats: int) -> float:
        """Median time of a plain copy of up to 1 GiB, scaled to this worker's weights."""
        import torch

        shard = sum(p.nbytes for p in self.get_model().parameters())
        size = min(shard, 2**30)
        a = torch.empty(size, dtype=torch.uint8, device=self.device)
        b = torch.empty_like(a)
        median = self._median_ms(functools.partial(b.copy_, a), repeats)
        del a, b
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return median * shard / size

    def replay_ms(self, repeats: int) -> float:
        """Median time of the recorded copies alone."""
        plan = self._plan
        return self._median_ms(plan.graph.replay if plan.graph else lambda: plan._copy(plan.copies), repeats)

    def _median_ms(self, call, repeats: int) -> float:
        """On the GPU between two events, on CPU of the call."""
        import torch

        if self.device.type == "cpu":
            return statistics.median(milliseconds(call, repeats))
        times = []
        for _ in range(repeats):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        return statistics.median(times)


class PeerColocation(rc.Colocation):
    training_actor = PeerTrainer
    engine_actor = PeerLLM
    worker_extension = "push_peers.PeerWorkerExtension"

    def methods(self) -> list[str]:
        """Those that can run here. Straight load_weights needs parameters as loaded, vLLM's transfer needs CUDA.

        Packed only into one chunk: with more, vLLM 0.26 opens one export several times, torch's count of references
        never comes back to zero, and every push leaves its buffer behind (Llama-3.1-8B: 16 GB after some 15 pushes).
        """
        straight = not any(self.on_workers("needs_reload"))
        one_chunk = max(self.on_trainers("weight_bytes")) <= PACKED_BYTES
        vllm = [] if self.rehearsal else ["vllm", *["vllm-packed"] * one_chunk]
        return ["simple", "recorded", *["bucket"] * straight, *vllm]

    def prepare(self) -> None:
        self.bucket_count = self.on_trainers("bucket_count")[0]
        port = rc.free_port()
        self.ask(self.trainers, "join", each=[(i, len(self.trainers), port) for i in range(len(self.trainers))])

    def push_by(self, method: str, step: int) -> dict:
        """Push; returns {"wall_ms", ...}, what `Colocation.push` returns for our own ways."""
        if method in ("simple", "recorded"):
            self.config = dataclasses.replace(self.config, push=method)
            return self.push(step)
        start = time.perf_counter()
        if method == "bucket":
            for i in range(self.bucket_count):
                handles = {gpu: m for one in self.on_trainers("fill_bucket", i) for gpu, m in one.items()}
                self.on_workers("load_bucket", handles)
        elif method in ("vllm", "vllm-packed"):
            self.on_engines("start_weight_update")
            self.on_trainers("send_by_vllm", self.engines, method == "vllm-packed")
            self.on_engines("finish_weight_update")
        return {"wall_ms": 1e3 * (time.perf_counter() - start)}
