"""The push and nothing else: one trainer, one `vllm.LLM`, one GPU; no Ray, and of ours only rlhf_utils.py.

    python minimal_push.py FOLDER        a Hugging Face checkpoint, for instance Qwen2.5-0.5B

rlhf_utils.py lies beside this file, or one folder above.
"""

import os
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))

import torch

import rlhf_utils

if not torch.version.cuda:  # vLLM's CPU build. Its processes import this file, too, or are forked from this one
    os.environ["RLHF_COLOCATE_ROLE"] = "engine"
    rlhf_utils.preload_engine_process()  # keeps vLLM's layers plain, as they are on a GPU

import transformers
import vllm


def compare(worker, messages: dict) -> dict:
    """On the worker: digests of the weights that it has mapped, and of the engine's parameters."""
    with rlhf_utils.open_handles(messages[rlhf_utils.device_uuid(worker.device)], worker.device) as weights:
        mapped = {name: rlhf_utils.digest(weight) for name, weight in weights.items()}
    return {"mapped": mapped, "held": {n: rlhf_utils.digest(p) for n, p in worker.get_model().named_parameters()}}


def main(folder: str) -> int:
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    dtype = "bfloat16" if cuda else "float32"

    # The engine lives in a process of its own, as CUDA IPC wants it. Before the trainer: it measures free memory.
    llm = vllm.LLM(
        folder,
        dtype=dtype,
        max_model_len=256,
        gpu_memory_utilization=0.4,
        enforce_eager=True,
        worker_extension_cls="rlhf_utils.ColocateWorkerExtension",
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).to(device)
    version = torch.zeros((), dtype=torch.int64, device=device)
    if not cuda:
        rlhf_utils.share_memory([*model.parameters(), version])

    def weights() -> list[tuple[str, torch.Tensor]]:
        return [*rlhf_utils.checkpoint_tensors(model), (rlhf_utils.VERSION, version)]

    def handles() -> dict:
        return {rlhf_utils.device_uuid(device): rlhf_utils.export_handles(weights())}

    # Once: the worker maps the weights, and records what vLLM's loaders do with them.
    rlhf_utils.call_workers(llm, "connect_weights", handles())

    sampling = vllm.SamplingParams(temperature=0, max_tokens=12)
    for step in range(1, 4):
        (output,) = llm.generate("The capital of France is", sampling, use_tqdm=False)
        print(f"version {step - 1}: {output.outputs[0].text!r}")
        version.fill_(-1)  # the weights are changing: a push now is refused
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * p.float().std() * torch.randn_like(p))  # your optimizer's step, in place
        version.fill_(step)
        if cuda:
            torch.cuda.synchronize()
        # At each step: "go". When it returns, the trainer may change its weights again.
        (worker,) = rlhf_utils.call_workers(llm, "push_weights", step)
        assert llm.reset_prefix_cache(), "requests are still running"
        print(f"pushed {worker['bytes'] / 1e6:.0f} MB in {worker['copy_ms']:.2f} ms")

    # Not at each step: the weights that arrive are the trainer's, and vLLM's own loaders would have made the same of
    # them.
    (pushed,) = rlhf_utils.call_workers(llm, "minimal_push:compare", handles())
    rlhf_utils.call_workers(llm, "update_weights_from_ipc_handles", handles())
    (loaded,) = rlhf_utils.call_workers(llm, "minimal_push:compare", handles())
    wrong = [name for name, weight in weights() if pushed["mapped"][name] != rlhf_utils.digest(weight)]
    wrong += [name for name in loaded["held"] if pushed["held"][name] != loaded["held"][name]]
    print(f"{len(pushed['held'])} parameters compared, wrong: {', '.join(wrong) or 'none'}")
    return 1 if wrong else 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1]))
