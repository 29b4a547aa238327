"""Processes of test_fp8.py: real vLLM models that are quantized as they are loaded, on each tensor-parallel rank.

vLLM's CPU build has no kernel that makes FP8: plain torch takes its place, in vLLM's code around it.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import architectures
import torch

import rlhf_utils as u
from colocate import fp8, rounds, verify


def replace_kernels() -> None:
    """Of vLLM's, those that a GPU must have. The layer keeps what is made for CUTLASS."""
    import vllm._custom_ops as ops
    import vllm.model_executor.layers.fused_moe.oracle.fp8 as oracle
    import vllm.model_executor.layers.quantization.online.fp8 as online

    def scaled_fp8_quant(weight, scale=None, use_per_token_if_dynamic=False):
        if scale is None:
            return fp8.quantize(weight, use_per_token_if_dynamic)
        return (weight.float() * (1 / scale)).clamp(-448, 448).to(torch.float8_e4m3fn), scale

    ops.scaled_fp8_quant = scaled_fp8_quant

    def multiply(layer, x, bias=None):
        return (x.float() @ (layer.weight.float() * layer.weight_scale.view(1, -1))).to(x.dtype)

    nothing = {"process_weights_after_loading": lambda layer: None, "input_quant_key": lambda: None}
    kernel = SimpleNamespace(apply_weights=multiply, **nothing)
    online.init_fp8_linear_kernel = lambda **_: kernel

    def as_it_is(fp8_backend, layer, w13, w2, w13_scale, w2_scale, **_):
        return w13, w2, w13_scale, w2_scale

    online.select_fp8_moe_backend = lambda **_: (oracle.Fp8MoeBackend.TRITON, object)
    oracle.convert_to_fp8_moe_kernel_format = as_it_is
    oracle.make_fp8_moe_kernel = lambda **made: SimpleNamespace(**made)


def examine(folder: str, rank: int, world: int, port: int, quantization: str) -> dict:
    """Push into one model by each way; what `verify` says of it."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from vllm.config import set_current_vllm_config

    from colocate.model_folder import make_parameters

    u.preload_engine_process()
    replace_kernels()
    model, config = architectures.build(folder, rank, world, port, quantization=quantization, dtype="bfloat16")
    with set_current_vllm_config(config):
        trainer = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
    make_parameters(trainer)
    version = torch.zeros((), dtype=torch.int64)
    u.share_memory([*trainer.parameters(), version])
    weights = dict(u.checkpoint_tensors(trainer))
    pieces = {n: [u.Piece.of(t)] for n, t in (weights | {u.VERSION: version}).items()}

    def change(step: int) -> None:
        version.fill_(step)
        torch.manual_seed(step)
        with torch.no_grad():
            for p in trainer.parameters():
                p.normal_(0, 0.02)

    def digests() -> dict[str, str]:
        return {n: u.digest(p) for n, p in model.named_parameters()}

    def wrong() -> list[str]:
        return verify.compare_weights(model, layout, pieces, {})[2]

    worker = fp8.QuantizingExtension()
    worker.get_model, worker.vllm_config = lambda: model, config

    def push_in_other_ways(recording: u.Recording) -> dict[str, list[str]]:
        """{way: parameters that then are not what they must be}, by the plans of the worker extension."""
        control = torch.tensor(rounds.NO_ROUND)
        in_rounds = {n: [u.Piece.of(t, round=i % 2)] for i, (n, t) in enumerate(weights.items())}
        in_rounds |= {u.VERSION: pieces[u.VERSION], rounds.ROUND: [u.Piece.of(control)]}
        by_loaders = dataclasses.replace(recording, copies=[], loaders=list(weights), unprocessed={})
        found = {}
        for step, (way, asked, held) in enumerate(
            [("simple", by_loaders, pieces), ("gather", recording, in_rounds)], 3
        ):
            plan = worker.new_plan(asked, held)
            assert isinstance(plan, rounds.Rounds) == (way == "gather") and not plan.rounds[0].launches
            change(step)
            trainer = threading.Thread(target=rounds.send, args=(control, range(2)))
            if way == "gather":
                trainer.start()
            plan.push(step)
            if way == "gather":
                trainer.join()
            found[way] = list(wrong())
        return found

    layout = verify.expected_layout(model, weights)
    shapes = {n: (tuple(w.shape), w.dtype) for n, w in weights.items()}
    with set_current_vllm_config(config):
        before = digests()
        recording = u.record_loaders(model, config.model_config, shapes, world)
        dropped = {n: s for n, s in shapes.items() if n != next(n for n in shapes if "down_proj" in n)}
        found = {"dropped": architectures.refusal(model, config.model_config, {n: weights[n] for n in dropped}, world)}
        assert digests() == before, "a recording writes nothing"
        if experts := [m for m in model.modules() if "w13_weight" in m._parameters]:
            change(1)
            u.CopyPlan(model, config, recording, pieces).push(1)
            scale = experts[0].quant_method.moe_quant_config.w1_scale
            found["another"] = scale.data_ptr() != experts[0].w13_weight_scale.data_ptr()
            try:
                worker.new_plan(recording, pieces)
            except u.NotHandled as error:
                found["refused"] = str(error)
            return found
        layers, rest = fp8.find_layers(model, recording, pieces)
        reloading = u.CopyPlan(model, config, recording, pieces)
        quantizing = u.CopyPlan(model, config, rest, pieces, fp8.quantizers(layers))
        change(1)
        found["before"] = len(wrong())
        reloading.push(1)
        found["reloaded"] = wrong()
        loaded = digests()
        change(2)
        quantizing.push(2)
        found["quantized"] = wrong()
        found["alike"] = [n for n, d in digests().items() if d == loaded[n]]
        change(1)
        quantizing.push(1)
        found["differs"] = [n for n, d in digests().items() if d != loaded[n]]
        found["in_other_ways"] = push_in_other_ways(recording)
        parameter = next(p for n, p in model.named_parameters() if p.dtype == torch.float8_e4m3fn)
        parameter.data.view(torch.uint8)[3, 5] ^= 128
        found["flipped"] = wrong()
    checked = verify.compare_weights(model, layout, pieces, {})[1]
    found |= {"layers": len(layers), "loaders": [len(recording.loaders), len(rest.loaders)], "checked": checked}
    found |= {"unknown": layout.unknown, "processed": layout.processed, "padding": layout.padding}
    return found | {"elements": sum({p.data_ptr(): p.numel() for p in model.parameters()}.values())}


if __name__ == "__main__":
    torch.accelerator.empty_cache = lambda: None  # as vLLM's CPU worker does
    quantization = sys.argv[1]
    rank, world, port = map(int, sys.argv[2:5])
    for folder in sys.argv[5:]:
        print("RESULT " + json.dumps([Path(folder).name, examine(folder, rank, world, port, quantization)]), flush=True)
