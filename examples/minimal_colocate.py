"""The layout and the push, and nothing else: trainers and vLLM engines on the same GPUs, in 200 lines.

    python minimal_colocate.py MODEL                                        # 4 GPUs: 4 trainers, 2 engines with TP=2
    python minimal_colocate.py MODEL --num-gpus 1 --tensor-parallel-size 1  # 1 GPU; without any, on logical GPUs (CPU)

MODEL is a Hugging Face checkpoint. Beside this file, or one folder above, lies rlhf_utils.py.

    1. One placement group, one bundle per GPU. A trainer takes 0.4 of each GPU, an engine's worker another 0.4.
    2. GPU UUIDs show that each trainer shares its GPU with one worker.
    3. Each worker maps its trainer's weights by CUDA IPC handles, and records how vLLM's loaders bring them in.
    4. The trainers change every weight, and a push replays the record. What the workers received must be the
       trainers' weights, and every parameter what vLLM's own loaders make of them, bit for bit. Exit code 0, or 1.

rlhf_colocate.py adds GRPO, sleep while training, more checks, deadlines, recovery, checkpoints, clear messages.
"""

import argparse
import os
import re
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))  # where rlhf_utils.py is not beside this file

import ray
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

import rlhf_utils

TIMEOUT_S = 600


class Trainer:
    """A full replica of the model, on its share of a GPU. Put your optimizer here: it must change weights in place."""

    def __init__(self, model: str):
        import torch
        from transformers import AutoModelForCausalLM

        cuda = torch.cuda.is_available()
        self.device = torch.device("cuda" if cuda else "cpu")
        dtype = torch.bfloat16 if cuda else torch.float32
        self.model, info = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, output_loading_info=True)
        if info["missing_keys"]:  # transformers fills them with random numbers
            raise ValueError(f"{model} has no {', '.join(sorted(info['missing_keys']))}")
        self.model.to(self.device)
        self.version = torch.zeros((), dtype=torch.int64, device=self.device)
        if not cuda:
            rlhf_utils.share_memory([*self.model.parameters(), self.version])
        self.weights = [*rlhf_utils.checkpoint_tensors(self.model), (rlhf_utils.VERSION, self.version)]  # views

    def gpu(self) -> str:
        return rlhf_utils.device_uuid(self.device)

    def change_weights(self, version: int) -> None:
        """Stands for an optimizer step: seeded noise, the same in all replicas. The version is -1 meanwhile."""
        import torch

        self.version.fill_(-1)
        generator = torch.Generator(self.device).manual_seed(version)
        with torch.no_grad():
            for p in self.model.parameters():
                noise = torch.empty(p.shape, device=self.device).normal_(generator=generator)
                p.add_((0.02 * noise).to(p.dtype))
        self.version.fill_(version)
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def get_weight_ipc_handles(self) -> dict:
        return {self.gpu(): rlhf_utils.export_handles(self.weights)}

    def digests(self) -> dict:
        return {name: rlhf_utils.digest(weight) for name, weight in self.weights}


def compare(worker, messages: dict) -> tuple[dict, dict, list[str]]:
    """On a worker: digests of the weights that it has mapped, and of its parameters; its files in /dev/shm."""
    with rlhf_utils.open_handles(messages[rlhf_utils.device_uuid(worker.device)], worker.device) as weights:
        mapped = {name: rlhf_utils.digest(weight) for name, weight in weights.items()}
    held = {name: rlhf_utils.digest(p) for name, p in worker.get_model().named_parameters()}
    return mapped, held, re.findall(r" /dev/shm/([^/\n]+)$", Path("/proc/self/maps").read_text(), re.MULTILINE)


class Engine:
    """A vLLM engine. This actor runs the scheduler and takes no GPU; vLLM starts its workers on the bundles."""

    def __init__(self, bundles: list[int], port: int, **engine_args):
        os.environ["VLLM_RAY_PER_WORKER_GPUS"] = "0.4"
        os.environ["VLLM_RAY_BUNDLE_INDICES"] = ",".join(map(str, bundles))
        os.environ["VLLM_DP_MASTER_PORT"] = str(port)  # vLLM 0.26 gives all engines of a host the same one
        from vllm import LLM

        self.llm = LLM(**engine_args)

    def call(self, method: str, *args) -> list:
        """A method of rlhf_utils.ColocateWorkerExtension, or a function, on all workers; results in rank order."""
        return rlhf_utils.call_workers(self.llm, method, *args)

    def forget(self) -> bool:
        return self.llm.reset_prefix_cache()

    def generate(self, prompt: list[int]) -> list[int]:
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0, max_tokens=8)
        (output,) = self.llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
        return list(output.outputs[0].token_ids)

    def shutdown(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--num-gpus", type=int, default=4)
    parser.add_argument("--tensor-parallel-size", type=int, default=2)
    args = parser.parse_args()
    n = args.num_gpus
    tp = args.tensor_parallel_size
    if n % tp:
        parser.error(f"--tensor-parallel-size {tp} does not divide {n} GPUs")
    cuda = bool(rlhf_utils.torch.version.cuda)
    folders = [str(Path(file).resolve().parent) for file in (__file__, rlhf_utils.__file__)]
    # vLLM's workers import both, from any folder. Ray must not hide GPUs from them: vLLM chooses by itself.
    engine_env = {
        "PYTHONPATH": os.pathsep.join([*folders, os.environ.get("PYTHONPATH", "")]),
        "RLHF_COLOCATE_ROLE": "engine",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine's core stays in its actor
        "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1",
    }
    trainer_env = {"RLHF_COLOCATE_ROLE": "trainer", "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "0"}
    if not cuda:
        engine_env |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "TORCH_COMPILE_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    environment = {"env_vars": engine_env, "worker_process_setup_hook": "rlhf_utils.preload_engine_process"}
    options = {"num_gpus": None if cuda else n, "num_cpus": 2 * n, "include_dashboard": False, "log_to_driver": False}
    ray.init(address="local", runtime_env=environment, **options)
    group = placement_group([{"GPU": 1}] * n, strategy="PACK")
    if not group.wait(TIMEOUT_S):
        sys.exit(f"no {n} free GPUs: Ray has {ray.cluster_resources()}")

    def ask(actors: list, method: str, *each) -> list:
        return ray.get([getattr(a, method).remote(*each) for a in actors], timeout=TIMEOUT_S)

    trainer = ray.remote(num_cpus=0, num_gpus=0.4, runtime_env={"env_vars": trainer_env})(Trainer)
    bundles = [PlacementGroupSchedulingStrategy(group, i, placement_group_capture_child_tasks=True) for i in range(n)]
    trainers = [trainer.options(scheduling_strategy=bundle).remote(args.model) for bundle in bundles]
    trainer_gpus = ask(trainers, "gpu")  # and they have settled: vLLM measures free memory when it starts

    engine_args = {"model": args.model, "tensor_parallel_size": tp, "distributed_executor_backend": "ray"}
    engine_args |= {"worker_extension_cls": "rlhf_utils.ColocateWorkerExtension", "skip_tokenizer_init": True}
    engine_args |= {"dtype": "bfloat16" if cuda else "float32", "max_model_len": 256, "enforce_eager": True}
    engine_args |= {"gpu_memory_utilization": 0.4, "kv_cache_memory_bytes": None if cuda else 2**26}
    engines = []
    for first in range(0, n, tp):  # its workers go into the placement group, too
        actor = ray.remote(num_cpus=0, num_gpus=0)(Engine).options(scheduling_strategy=bundles[first])
        engines.append(actor.remote([*range(first, first + tp)], 20_000 + 200 * first, **engine_args))

    def on_workers(method: str, *each) -> list:
        return [worker for workers in ask(engines, "call", method, *each) for worker in workers]

    engine_gpus = [worker["gpu"] for worker in on_workers("report_device_id")]
    # Compared as sets: the order of ranks is not that of bundles.
    if len({*trainer_gpus}) != n or {*trainer_gpus} != {*engine_gpus}:
        sys.exit(f"trainers are on {trainer_gpus}, workers on {engine_gpus}")
    print(f"{n} GPUs, each with a trainer and an engine's worker: {', '.join(trainer_gpus)}")

    def handles() -> dict:
        return {gpu: m for one in ask(trainers, "get_weight_ipc_handles") for gpu, m in one.items()}

    on_workers("connect_weights", handles())
    before = ask(engines, "generate", [1, 2, 3, 4])
    ask(trainers, "change_weights", 1)
    pushed = on_workers("push_weights", 1)
    if not all(ask(engines, "forget")):
        sys.exit("a prefix cache keeps keys and values of the old weights: requests are still running")
    print(f"{sum(w['bytes'] for w in pushed) / 1e6:.1f} MB in {max(w['copy_ms'] for w in pushed):.2f} ms")
    print(f"greedy tokens before {before[0]}, after {ask(engines, 'generate', [1, 2, 3, 4])[0]}")

    after_push = on_workers("minimal_colocate:compare", handles())
    on_workers("update_weights_from_ipc_handles", handles())  # through vLLM's own loaders
    after_load = on_workers("minimal_colocate:compare", handles())
    sent = ask(trainers, "digests")[0]
    wrong = {name for mapped, _, _ in after_push for name in sent if mapped[name] != sent[name]}
    for (_, pushed, _), (_, loaded, _) in zip(after_push, after_load, strict=True):
        wrong |= {name for name in loaded if pushed[name] != loaded[name]}
    ask(engines, "shutdown")
    ray.shutdown()
    for file in {file for *_, files in after_load for file in files}:
        Path("/dev/shm", file).unlink(missing_ok=True)  # Ray kills vLLM's workers before they remove their queues
    print(f"{sum(len(w[1]) for w in after_push)} parameters compared, wrong: {', '.join(sorted(wrong)) or 'none'}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
