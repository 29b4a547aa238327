"""What a sleep of level 2 would drop and no push brings, ALiBi's slopes for one: it becomes buffers, which vLLM keeps.

Before such a sleep vLLM copies the model's buffers to the host, and back to where they were when the weights wake up:
https://github.com/vllm-project/vllm/blob/main/vllm/v1/worker/gpu_worker.py
Tensors that layers, or vLLM's objects directly in them, have as plain attributes it does not know of.

Stands alone, for those who copy the push.
"""

from __future__ import annotations

import math

import torch


def keep(worker) -> list[str]:
    """Let vLLM keep what `plain_tensors` finds. Once, before the engine sleeps for the first time. Returns the names.

    The attributes stay, and the memory: a layer has the same tensor as a buffer, too. It is not persistent: vLLM's
    loaders and checkpoints leave it out.
    """
    model = worker.get_model()
    names = []
    for layer, attribute, tensor in plain_tensors(model):
        buffer = "_kept_" + attribute.replace(".", "__")  # a buffer's name has no dots
        model.get_submodule(layer).register_buffer(buffer, tensor, persistent=False)
        names.append(f"{layer}.{attribute}" if layer else attribute)
    return names


def plain_tensors(model: torch.nn.Module) -> list[tuple[str, str, torch.Tensor]]:
    """(layer, its attribute, the tensor there) of what a sleep of level 2 drops and no push brings, but for buffers.

    That is what layers, and vLLM's objects directly in them, hold of the memory in which vLLM loads a model. A
    rehearsal has no such memory, and takes all that is no KV cache and no copy for the host.
    """
    device = next(model.parameters()).device
    pools = _weight_pools() if device.type == "cuda" else [(0, math.inf)]
    known = {_storage(t) for t in (*model.parameters(), *model.buffers())}
    seen = set()
    found = []
    for layer, module in model.named_modules():
        holders = {"": module}
        for name, value in vars(module).items():
            if type(value).__module__.startswith("vllm.") and not isinstance(value, torch.nn.Module):
                holders[f"{name}."] = value  # its attention's backend, for instance
        for where, holder in holders.items():
            for name, value in getattr(holder, "__dict__", {}).items():
                if not isinstance(value, torch.Tensor) or value.device != device or _storage(value) in known:
                    continue
                at = value.data_ptr()
                same = (at, value.shape, value.stride())  # layers may share it
                kept = same not in seen and name != "kv_cache" and not name.endswith("_cpu")
                if kept and value.numel() and any(a <= at < b for a, b in pools):
                    seen.add(same)
                    found.append((layer, where + name, value))
    return found


def _weight_pools() -> list[tuple[int, float]]:
    """(start, end) of the memory that vLLM has for weights, if it can sleep.
    https://github.com/vllm-project/vllm/blob/main/vllm/device_allocator/cumem.py"""
    from vllm.device_allocator.cumem import CuMemAllocator

    allocations = CuMemAllocator.instance.pointer_to_data if CuMemAllocator.instance else {}
    return [(at, at + data.handle[1]) for at, data in allocations.items() if data.tag == "weights"]


def _storage(t: torch.Tensor) -> int:
    return t.untyped_storage()._cdata
