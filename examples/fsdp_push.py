"""Push out of FSDP2's shards: two trainers, each with half of every weight, and one `vllm.LLM` with TP=2 on their GPUs.

    python fsdp_push.py FOLDER        a Hugging Face checkpoint, for instance Qwen2.5-0.5B; two GPUs, or none (CPU)

Of ours only rlhf_utils.py, beside this file or one folder above. No weight is gathered: each worker reads the pieces
that it needs where they lie, the other GPU's over NVLink.
"""

import os
import re
import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))

import torch
from torch.distributed.fsdp import fully_shard

import rlhf_utils

if not torch.version.cuda:  # vLLM's CPU build. Its processes import this file, too, or are forked from this one
    os.environ |= {"RLHF_COLOCATE_ROLE": "engine", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    rlhf_utils.preload_engine_process()  # keeps vLLM's layers plain, as they are on a GPU

import transformers
import vllm

CUDA = bool(torch.version.cuda)
DTYPE = torch.bfloat16 if CUDA else torch.float32


def train(rank: int, folder: str, store: str, pipe) -> None:
    """A trainer's process: float32 masters in shards, and what engines read, a copy of these in the engine's dtype."""
    device = torch.device("cuda", rank) if CUDA else torch.device("cpu")
    torch.distributed.init_process_group("nccl" if CUDA else "gloo", f"file://{store}", rank=rank, world_size=2)
    if CUDA:
        torch.cuda.set_device(device)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
    for layer in model.base_model.layers:
        fully_shard(layer)
    fully_shard(model)
    masters = {name: p.to_local().detach() for name, p in model.named_parameters()}
    memory = {name: p.to(DTYPE, copy=True) for name, p in masters.items()}  # stays where it is
    version = torch.zeros((), dtype=torch.int64, device=device)
    if not CUDA:
        rlhf_utils.share_memory([*memory.values(), version])
    readers = [None, None]
    torch.distributed.all_gather_object(readers, rlhf_utils.device_uuid(device))
    while step := pipe.recv():
        if step == "handles":  # new ones for each use: one export may be opened once only
            pieces = [*rlhf_utils.checkpoint_tensors(model, memory), (rlhf_utils.VERSION, version)]
            message = rlhf_utils.export_handles(pieces, list(dict.fromkeys(readers)))
            pipe.send((readers[rank] if CUDA else f"trainer {rank}", message))
            continue
        version.fill_(-1)  # the weights are changing: a push now is refused
        for master in masters.values():  # your optimizer's step on the shards
            master.add_(0.1 * master.std(unbiased=False) * torch.randn_like(master))
        torch._foreach_copy_(list(memory.values()), list(masters.values()))
        version.fill_(step)
        if CUDA:
            torch.cuda.synchronize()
        pipe.send({n: rlhf_utils.digest(p.full_tensor().to(DTYPE)) for n, p in model.named_parameters()})


def compare(worker, messages: dict) -> dict:
    """On a worker: digests of the weights as it reads them, and of the engine's parameters; what it has in /dev/shm."""
    with rlhf_utils.open_pieces(messages, rlhf_utils.device_uuid(worker.device), worker.device) as weights:
        mapped = {name: rlhf_utils.digest(rlhf_utils.whole(pieces)) for name, pieces in weights.items()}
    held = {name: rlhf_utils.digest(p) for name, p in worker.get_model().named_parameters()}
    shared = re.findall(r" /dev/shm/(vllm_dist_[^/\n]+)$", Path("/proc/self/maps").read_text(), re.MULTILINE)
    return {"mapped": mapped, "held": held, "shared": shared}


def main(folder: str) -> int:
    # Before the trainers: it measures free memory. Its prompts are token ids.
    options = {"skip_tokenizer_init": True, "gpu_memory_utilization": 0.4, "max_model_len": 256, "enforce_eager": True}
    options |= {"worker_extension_cls": "rlhf_utils.ColocateWorkerExtension", "dtype": str(DTYPE)[6:]}
    llm = vllm.LLM(folder, tensor_parallel_size=2, **options)
    meeting = tempfile.TemporaryDirectory()  # the trainers'
    context = torch.multiprocessing.get_context("spawn")
    pipes, theirs = zip(*(context.Pipe() for _ in range(2)), strict=True)
    for rank in range(2):
        context.Process(target=train, args=(rank, folder, f"{meeting.name}/store", theirs[rank]), daemon=True).start()

    def ask(what) -> list:
        for pipe in pipes:
            pipe.send(what)
        return [pipe.recv() for pipe in pipes]

    # Once: each worker maps all pieces, and records what vLLM's loaders do with the weights.
    connected = rlhf_utils.call_workers(llm, "connect_weights", dict(ask("handles")))
    greedy = vllm.SamplingParams(temperature=0, max_tokens=8, detokenize=False)
    for step in range(1, 4):
        (output,) = llm.generate([{"prompt_token_ids": [5, 6, 7, 8]}], greedy, use_tqdm=False)
        print(f"version {step - 1}: {list(output.outputs[0].token_ids)}")
        sent, _ = ask(step)
        workers = rlhf_utils.call_workers(llm, "push_weights", step)
        assert llm.reset_prefix_cache(), "requests are still running"
        size, remote = sum(w["bytes"] for w in workers), sum(w["remote_bytes"] for w in connected)
        print(f"pushed {size / 1e6:.0f} MB, of which {remote / 1e6:.0f} from the other trainer's memory, in", end=" ")
        print(f"{max(w['copy_ms'] for w in workers):.2f} ms")

    # Not at each step: what arrives is the trainers', and vLLM's own loaders would have made the same of it.
    pushed = rlhf_utils.call_workers(llm, "fsdp_push:compare", dict(ask("handles")))
    rlhf_utils.call_workers(llm, "update_weights_from_ipc_handles", dict(ask("handles")))
    loaded = rlhf_utils.call_workers(llm, "fsdp_push:compare", dict(ask("handles")))
    wrong = [n for worker in pushed for n in sent if worker["mapped"].get(n) != sent[n]]
    wrong += [n for a, b in zip(pushed, loaded, strict=True) for n in a["held"] if a["held"][n] != b["held"][n]]
    print(f"{sum(len(w['held']) for w in pushed)} parameters compared, wrong: {', '.join(wrong) or 'none'}")
    for pipe in pipes:
        pipe.send(None)
    llm.llm_engine.engine_core.shutdown()
    for file in {file for worker in loaded for file in worker["shared"]}:
        Path("/dev/shm", file).unlink(missing_ok=True)  # workers on CPUs are ended before they remove these
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]) if len(sys.argv) == 2 else __doc__)
