"""The push and nothing else: one trainer, one `vllm.LLM`, one GPU; no Ray, nothing of rlhf_colocate.py.

    python examples/minimal_push.py FOLDER        a Hugging Face checkpoint, for instance Qwen2.5-0.5B

vLLM must be able to import rlhf_utils in its worker: copy that file beside yours, or put its folder into PYTHONPATH.
"""

import os
import sys
from pathlib import Path

ROOT = str(Path(__file__).resolve().parent.parent)
sys.path.insert(0, ROOT)
os.environ["PYTHONPATH"] = os.pathsep.join([ROOT, os.environ.get("PYTHONPATH", "")])

import torch  # noqa: E402

if not torch.version.cuda:  # vLLM's CPU build: rlhf_utils then keeps its layers plain, as they are on a GPU
    os.environ["RLHF_COLOCATE_ROLE"] = "engine"

import transformers  # noqa: E402
import vllm  # noqa: E402

from rlhf_utils import (  # noqa: E402
    VERSION,
    call_workers,
    checkpoint_tensors,
    device_uuid,
    digest,
    export_handles,
    share_memory,
)


def main(folder: str) -> None:
    cuda = torch.cuda.is_available()
    device, dtype = torch.device("cuda" if cuda else "cpu"), "bfloat16" if cuda else "float32"

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
        share_memory([*model.parameters(), version])

    # Once: the worker maps the weights, and records what vLLM's loaders do with them.
    def handles() -> dict:
        return {device_uuid(device): export_handles([*checkpoint_tensors(model), (VERSION, version)])}

    call_workers(llm, "connect_weights", handles())

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
        (worker,) = call_workers(llm, "push_weights", step)
        assert llm.reset_prefix_cache(), "requests are still running"
        print(f"pushed {worker['bytes'] / 1e6:.0f} MB in {worker['copy_ms']:.2f} ms")

    # Not at each step: is every element where it belongs?
    digests = {name: digest(tensor) for name, tensor in checkpoint_tensors(model)}
    (worker,) = call_workers(llm, "verify_weights", handles(), digests)
    wrong = [*worker["transport"]["wrong"], *worker["placement"]["wrong"]]
    print(f"{worker['placement']['checked']} elements compared, wrong: {', '.join(wrong) or 'none'}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
