"""What of each architecture the placement check compares: real vLLM models, filled by vLLM's own loaders.

    python benchmarks/architectures.py --output results/architectures.json    # some three minutes, vLLM's CPU build

No engine and no Ray: as many processes as tensor-parallel ranks, joined by gloo, build tiny models one after the other,
load them from a transformers model with other weights, and compare. tests/test_layout.py says what must be found.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

TINY = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY |= {"num_key_value_heads": 2, "vocab_size": 1000, "max_position_embeddings": 128, "dtype": "float32"}
TINY |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False}
GPT = {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 128, "vocab_size": 1000, "dtype": "float32"}
GPT |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def of(architecture: str, kind: str, base: dict = TINY, **more) -> dict:
    return base | {"architectures": [architecture], "model_type": kind} | more


FALCON = of("FalconForCausalLM", "falcon", num_key_value_heads=None, tie_word_embeddings=True, alibi=False)
MODELS = {
    # First, since vLLM makes the groups that experts need for the model that it meets first.
    "qwen3-moe": of(
        "Qwen3MoeForCausalLM", "qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, head_dim=32
    ),
    "mixtral": of("MixtralForCausalLM", "mixtral", num_local_experts=4, num_experts_per_tok=2),
    "granitemoe": of("GraniteMoeForCausalLM", "granitemoe", num_local_experts=4, num_experts_per_tok=2),
    "deepseek-v2": of(
        "DeepseekV2ForCausalLM",
        "deepseek_v2",
        num_key_value_heads=4,
        q_lora_rank=None,
        kv_lora_rank=32,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        first_k_dense_replace=2,
        n_routed_experts=4,
    ),
    "gpt-oss": of(
        "GptOssForCausalLM", "gpt_oss", num_local_experts=4, num_experts_per_tok=2, head_dim=32, layer_types=None
    ),
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
    "falcon-new-decoder": FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": False},
    "falcon-multi-query": FALCON | {"multi_query": True, "bias": True},
    "falcon-multi-head": FALCON | {"multi_query": False, "bias": True, "parallel_attn": False},
    "bloom": of("BloomForCausalLM", "bloom", n_layer=2, n_head=4, tie_word_embeddings=True),
    "gpt-neox": of("GPTNeoXForCausalLM", "gpt_neox"),
    "gpt-bigcode-multi-query": of("GPTBigCodeForCausalLM", "gpt_bigcode", GPT, multi_query=True),
    "gpt-bigcode-multi-head": of("GPTBigCodeForCausalLM", "gpt_bigcode", GPT, multi_query=False),
    "gpt2": of("GPT2LMHeadModel", "gpt2", GPT),
    "gptj": of("GPTJForCausalLM", "gptj", GPT, rotary_dim=16, tie_word_embeddings=False),
    "glm4": of("Glm4ForCausalLM", "glm4", head_dim=32),
    "stablelm": of("StableLmForCausalLM", "stablelm"),
    "cohere-qk-norm": of("CohereForCausalLM", "cohere", use_qk_norm=True, tie_word_embeddings=True),
    "phi": of("PhiForCausalLM", "phi", num_key_value_heads=4),
    "mamba": of("MambaForCausalLM", "mamba", state_size=16, tie_word_embeddings=True),
    "mistral": of("MistralForCausalLM", "mistral", sliding_window=32),
    "ministral3": of("Ministral3ForCausalLM", "ministral3", head_dim=32),
    "gemma": of("GemmaForCausalLM", "gemma", head_dim=32, tie_word_embeddings=True),
    "gemma3": of("Gemma3ForCausalLM", "gemma3_text", head_dim=32, query_pre_attn_scalar=32, tie_word_embeddings=True),
    "granite": of("GraniteForCausalLM", "granite", logits_scaling=8.0, residual_multiplier=0.5),
    "olmo2": of("Olmo2ForCausalLM", "olmo2"),
    "olmoe": of("OlmoeForCausalLM", "olmoe", num_experts=4, num_experts_per_tok=2),
    "qwen2-moe": of(
        *("Qwen2MoeForCausalLM", "qwen2_moe"),
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=128,
    ),
    "granitemoeshared": of(
        *("GraniteMoeSharedForCausalLM", "granitemoeshared"),
        num_local_experts=4,
        num_experts_per_tok=2,
        shared_intermediate_size=64,
    ),
    "starcoder2": of("Starcoder2ForCausalLM", "starcoder2"),
    "cohere2": of("Cohere2ForCausalLM", "cohere2", tie_word_embeddings=True, sliding_window=32, head_dim=32),
    "nemotron": of("NemotronForCausalLM", "nemotron", head_dim=32),
    "smollm3": of("SmolLM3ForCausalLM", "smollm3"),
    "exaone4": of("Exaone4ForCausalLM", "exaone4", sliding_window=32, sliding_window_pattern=2),
    "apertus": of("ApertusForCausalLM", "apertus"),
    "ernie4-5": of("Ernie4_5ForCausalLM", "ernie4_5", head_dim=32),
    "ernie4-5-moe": of(
        *("Ernie4_5_MoeForCausalLM", "ernie4_5_moe"), moe_num_experts=4, moe_k=2, moe_intermediate_size=64
    ),
    "glm4-moe": of(
        *("Glm4MoeForCausalLM", "glm4_moe"),
        head_dim=32,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        first_k_dense_replace=1,
    ),
    "minicpm3": of("MiniCPM3ForCausalLM", "minicpm3", num_key_value_heads=4, q_lora_rank=32, kv_lora_rank=32),
    "mamba2": of(
        *("Mamba2ForCausalLM", "mamba2"), intermediate_size=256, state_size=16, num_heads=8, head_dim=32, n_groups=1
    ),
    "deepseek-v3": of(
        *("DeepseekV3ForCausalLM", "deepseek_v3"),
        num_key_value_heads=4,
        q_lora_rank=32,
        kv_lora_rank=32,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        first_k_dense_replace=1,
        n_routed_experts=8,
        topk_method="noaux_tc",
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        moe_intermediate_size=64,
    ),
    "hyperclovax": of("HyperCLOVAXForCausalLM", "hyperclovax", head_dim=32),
    "falcon-h1": of(
        *("FalconH1ForCausalLM", "falcon_h1"),
        mamba_d_ssm=256,
        mamba_n_heads=8,
        mamba_d_head=32,
        mamba_d_state=32,
        mamba_n_groups=1,
    ),
}


def build(folder: str, rank: int, world: int, port: int, **more):
    """One rank's vLLM model with dummy weights, and its configuration. more: arguments of vLLM's engine."""
    import torch
    from vllm import ModelRegistry
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model

    architecture = json.loads((Path(folder) / "config.json").read_text())["architectures"][0]
    lazy = ModelRegistry.models[architecture]
    if hasattr(lazy, "load_model_cls"):  # else vLLM inspects the class in a process of its own, which takes 7 s
        ModelRegistry.register_model(architecture, lazy.load_model_cls())
    options = dict(
        model=folder,
        skip_tokenizer_init=True,
        load_format="dummy",
        dtype="float32",
        max_model_len=64,
        tensor_parallel_size=world,
        enforce_eager=True,
        distributed_executor_backend="mp",
        kv_cache_memory_bytes=2**24,
        attention_backend="CPU_MLA" if "deepseek" in architecture.lower() else None,  # AMX's has no float32
    )
    args = EngineArgs(**options | more)
    config = args.create_engine_config()
    config.parallel_config.rank = rank
    with set_current_vllm_config(config):
        if not torch.distributed.is_initialized():
            init_distributed_environment(world, rank, f"tcp://127.0.0.1:{port}", rank, "gloo")
            initialize_model_parallel(world)
        return get_model(vllm_config=config), config


def examine(folder: str, rank: int, world: int, port: int) -> dict:
    """Load one model through vLLM's loaders and by a recorded plan; what the layout says of both."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from vllm.config import set_current_vllm_config

    import rlhf_utils as u
    from colocate import verify
    from colocate.kept import keep
    from colocate.model_folder import make_parameters

    u.preload_engine_process()
    model, config = build(folder, rank, world, port)
    torch.manual_seed(1)
    with set_current_vllm_config(config):  # vLLM decorates the classes of transformers that it builds on
        trainer = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    make_parameters(trainer)
    version = torch.zeros((), dtype=torch.int64)
    u.share_memory([*trainer.parameters(), version])

    def change(step: int) -> None:
        version.fill_(step)
        torch.manual_seed(1 + step)
        with torch.no_grad():
            for p in trainer.parameters():
                p.normal_()  # also norms and biases: equal values would hide a wrong place

    def load() -> None:
        needs_reload = any(hasattr(m, "w13_weight") for m in model.modules())
        u._load_weights(model, config, weights.items(), needs_reload)

    def digests() -> dict[str, str]:
        return {n: u.digest(p) for n, p in model.named_parameters()}

    def differing(layout) -> set[str]:
        wrong = set()
        parameters = dict(model.named_parameters())
        for r in layout.regions:
            if r.dst is not None and verify.differing(parameters[r.parameter].data[r.dst], r.source(weights[r.weight])):
                wrong.add(r.parameter)
        return wrong

    weights = dict(u.checkpoint_tensors(trainer))
    if "lm_head.bias" in weights:
        change(3)
        with set_current_vllm_config(config):
            load()  # vLLM makes some parameters only when it loads their weights, as an engine has by now
    change(0)
    layout = verify.expected_layout(model, weights)
    parameters = dict(model.named_parameters())
    comparable = {r.parameter for r in layout.regions if r.dst is not None}
    shapes = {n: (tuple(w.shape), w.dtype) for n, w in weights.items()}
    found = {"architecture": layout.architecture, "padding": layout.padding, "processed": layout.processed}
    found["unknown"] = layout.unknown
    found["kept"] = sorted(keep(SimpleNamespace(get_model=lambda: model)))
    found["compared"] = sum(parameters[r.parameter].data[r.dst].numel() for r in layout.regions if r.dst is not None)
    with set_current_vllm_config(config):
        before = digests()
        if refused := refusal(model, config.model_config, weights, world):
            return found | {"refused": refused, "touched": digests() != before}
        name = list(weights)[len(weights) // 2]
        dropped = {n: w for n, w in weights.items() if n != name}
        found["dropped"] = refusal(model, config.model_config, dropped, world)
        found["renamed"] = refusal(model, config.model_config, dropped | {name + "x": weights[name]}, world)
        assert digests() == before, "no check may touch a parameter"
        assert differing(layout) == comparable, "before loading, every parameter must differ"
        load()
        found["wrong"] = sorted(differing(layout))
        found["uncovered"] = uncovered(layout, parameters)
        # The recorded plan must bring in new values exactly as the loaders bring them.
        recording = u.record_loaders(model, config.model_config, shapes, world)
        named = weights | {u.VERSION: version}
        pieces = {n: [u.Piece.of(t)] for n, t in named.items()}
        plan = u.CopyPlan(model, config, recording, pieces)
        found["copies"], found["loaders"] = len(plan.rounds[0].local), len(recording.loaders)
        change(1)
        load()
        by_loaders = digests()
        change(2)
        plan.push(2)
        assert not set(by_loaders.items()) & set(digests().items()), "a parameter still holds the first values"
        fail_half_way(model, load)
        change(1)
        plan.push(1)
        found["plan_differs"] = [n for n, d in digests().items() if d != by_loaders[n]]
        try:
            plan.push(3)
            found["stale"] = "accepted"
        except u.HandleError as error:
            found["stale"] = str(error)
        # The other rank's layout must not fit: cut layers hold other slices there.
        other = verify.expected_layout(model, weights, tp_rank=1 - rank) if world == 2 else None
        found["other_rank"] = len(differing(other)) if other else None
    return found


def fail_half_way(model, load: Callable[[], None]) -> None:
    """Let vLLM's layerwise reload end in an error in the midst of its last layer, if the model needs one."""
    experts = [m for m in model.modules() if hasattr(m, "w13_weight")]
    if not experts:
        return

    def fail(_layer) -> None:
        raise MemoryError

    experts[-1].quant_method.process_weights_after_loading = fail
    with contextlib.suppress(MemoryError):
        load()
    del experts[-1].quant_method.process_weights_after_loading


def refusal(model, model_config, weights: dict, world: int) -> str:
    """What a worker would say of these weights before it loads any; "" if it would load them."""
    import rlhf_utils as u

    try:
        u.record_loaders(model, model_config, {n: (tuple(w.shape), w.dtype) for n, w in weights.items()}, world)
    except u.HandleError as error:
        return str(error)
    return ""


def uncovered(layout, parameters: dict) -> dict[str, int]:
    """{parameter: elements in no region}; raises AssertionError for one that is in two."""
    import torch

    missed = {}
    once = {p.untyped_storage().data_ptr(): name for name, p in reversed(parameters.items())}
    for name, p in parameters.items():
        if once[p.untyped_storage().data_ptr()] != name or name in layout.processed or name in layout.unknown:
            continue
        seen = torch.zeros(p.shape, dtype=torch.int8)
        for r in layout.regions:
            if r.parameter == name:
                seen[r.dst] += 1
        assert int(seen.max()) == 1, name
        if count := int((seen == 0).sum()):
            missed[name] = count
    return missed


def run_ranks(
    world: int, folder: Path, names: list[str], timeout_s: float = 300, program: Sequence[str] = (__file__, "--rank")
) -> list[dict[str, dict]]:
    """Examine these models with `world` ranks. Returns per rank {model: what `examine` found}.

    program: that does it, given rank, ranks, port and the models' folders.
    Raises RuntimeError, with the end of its output, if a rank fails.
    """
    for name in names:
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "config.json").write_text(json.dumps(MODELS[name]))
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT}/benchmarks", "RLHF_COLOCATE_ROLE": "engine"}
    env["HF_HUB_OFFLINE"] = "1"
    env |= {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "TORCH_COMPILE_DISABLE": "1"}
    env["VLLM_DIST_IDENT"] = uuid.uuid4().hex  # names the ranks' shared memory
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    folders = [str(folder / name) for name in names]
    ranks: list[subprocess.Popen] = []
    try:
        for rank in range(world):
            command = [sys.executable, *program, str(rank), str(world), port, *folders]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            ranks.append(subprocess.Popen(command, env=env, **pipes))
        texts = [r.communicate(timeout=timeout_s)[0] for r in ranks]
    finally:
        for r in ranks:
            r.kill()
            r.wait()
    found = [dict(json.loads(x[7:]) for x in t.splitlines() if x.startswith("RESULT ")) for t in texts]
    for r, text, f in zip(ranks, texts, found, strict=True):
        if r.returncode:
            raise RuntimeError(f"a rank failed after {list(f)}: {text[-3000:]}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the report to this file")
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS), help="default: all")
    parser.add_argument("--rank", nargs="+", help=argparse.SUPPRESS)  # rank, ranks, port, folders: one of the processes
    args = parser.parse_args()
    if args.rank:
        import torch

        torch.accelerator.empty_cache = lambda: None  # as vLLM's CPU worker does
        rank, world, port = map(int, args.rank[:3])
        for folder in args.rank[3:]:
            print("RESULT " + json.dumps([Path(folder).name, examine(folder, rank, world, port)]), flush=True)
        return 0
    from colocate.preflight import find_packages

    report: dict = {"architectures": {}}
    with tempfile.TemporaryDirectory() as folder:
        for world in (1, 2):
            ranks = run_ranks(world, Path(folder), args.models)
            for name in args.models:
                report["architectures"].setdefault(name, {})[f"tp{world}"] = summed([r[name] for r in ranks])
    report["versions"], _ = find_packages()
    report["hardware"] = {"gpus": [], "cpu_cores": os.cpu_count()}
    report["date"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    report["command"] = " ".join(["python benchmarks/architectures.py", *sys.argv[1:]])
    text = json.dumps(report, indent=1) + "\n"
    if args.output:
        args.output.write_text(text)
    print(text, end="")
    return 0


def summed(ranks: list[dict]) -> dict:
    """Elements of all ranks of one model."""
    counts = {kind: sum(sum(r[kind].values()) for r in ranks) for kind in ("processed", "unknown", "padding")}
    out = {"architecture": ranks[0]["architecture"], "compared": sum(r["compared"] for r in ranks)} | counts
    out["unknown_parameters"] = sorted({n for r in ranks for n in r["unknown"]})
    if "refused" in ranks[0]:
        return out | {"refused": ranks[0]["refused"]}
    return out | {"copies": sum(r["copies"] for r in ranks), "loaders": sum(r["loaders"] for r in ranks)}


if __name__ == "__main__":
    sys.exit(main())
