"""Names of vLLM, torch, transformers and Ray that we rely on and that are no promise of theirs, each with the reason.

The installed sources are read, not imported: a new version that renames one of them is found in seconds, without a GPU.
Where a test fails, the reason says which code of ours to look at.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

RELOAD = "model_executor/model_loader/reload"
LAYERS = "model_executor/layers"
# (package, file or folder in it, text that is a whole word there, why)
NAMES = [
    ("vllm", "v1/executor/ray_executor_v2.py", "class RayExecutorV2", "places workers on the bundles that MyLLM names"),
    ("vllm", "v1/executor/ray_executor_v2.py", "VLLM_RAY_PER_WORKER_GPUS", "MyLLM: 0.4 GPU for each worker"),
    ("vllm", "v1/executor/ray_utils.py", "VLLM_RAY_BUNDLE_INDICES", "MyLLM: which bundles"),
    ("vllm", "envs.py", "VLLM_ENABLE_V1_MULTIPROCESSING", "MyLLM: the engine's core stays in the actor"),
    ("vllm", "envs.py", "VLLM_DP_MASTER_PORT", "MyLLM: a port for each engine"),
    ("vllm", "envs.py", "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS", "cluster: vLLM's deadline lies beyond ours"),
    ("vllm", "v1/executor/ray_executor_v2.py", "ray_noset_device_env_vars", "preload_engine_process empties it"),
    (
        "vllm",
        "v1/executor/ray_executor_v2.py",
        "ray_device_key",
        "preload_engine_process: the rehearsal's logical GPUs",
    ),
    ("vllm", "v1/worker/worker_base.py", "worker_extension_cls", "mixes our extension into the worker"),
    ("vllm", "v1/worker/gpu_worker.py", "def get_model", "the extension reads the worker's model"),
    ("vllm", "entrypoints", "def collective_rpc", "call_workers"),
    ("vllm", "entrypoints", "def reset_prefix_cache", "MyLLM.reset_prefix_cache"),
    ("vllm", "entrypoints", "def wake_up", "MyLLM.wake_up, by tags"),
    ("vllm", "device_allocator/cumem.py", "pointer_to_data", "kept: the memory that a sleep drops"),
    ("vllm", "device_allocator/__init__.py", "class AllocationData", "kept: its handle and tag"),
    ("vllm", "v1/worker/gpu_worker.py", "_sleep_saved_buffers", "kept: a sleep of level 2 keeps buffers, and no other"),
    ("vllm", "v1/worker/gpu_worker.py", "named_buffers", "kept: which buffers"),
    ("vllm", "logprobs.py", "class FlatLogprobs", "sample_of reads its start_indices"),
    ("vllm", "logprobs.py", "start_indices", "sample_of"),
    ("vllm", f"{RELOAD}/layerwise.py", "def initialize_layerwise_reload", "_load_weights"),
    ("vllm", f"{RELOAD}/layerwise.py", "def finalize_layerwise_reload", "_load_weights"),
    ("vllm", f"{RELOAD}/layerwise.py", "def get_layerwise_info", "_as_loaded, and _load_weights after an error"),
    ("vllm", f"{RELOAD}/layerwise.py", "online_process_loader", "_as_loaded looks for the loader beneath it"),
    ("vllm", f"{RELOAD}/types.py", "restore_metadata", "_as_loaded: the parameters that a loader wants to find"),
    ("vllm", f"{RELOAD}/meta.py", "def to_meta_tensor", "_as_loaded"),
    ("vllm", f"{RELOAD}/sanitize.py", "def restore_layer_refs", "_as_loaded"),
    ("vllm", "model_executor/model_loader/weight_utils.py", "def default_weight_loader", "_as_loaded"),
    ("vllm", f"{LAYERS}/vocab_parallel_embedding.py", "num_org_elements", "_find_targets: the vocabulary's padding"),
    ("vllm", f"{LAYERS}/vocab_parallel_embedding.py", "shard_indices", "_find_targets"),
    ("vllm", f"{LAYERS}/fused_moe", "w13_weight", "experts are known by it"),
    ("vllm", f"{LAYERS}/fused_moe", "unquantized_backend", "_takes_weights_as_loaded"),
    ("vllm", f"{LAYERS}/fused_moe", "moe_kernel", "_load_weights: the CPU's is built anew"),
    ("vllm", f"{LAYERS}/fused_moe/config.py", "hidden_dim_unpadded", "verify: experts"),
    ("vllm", f"{LAYERS}/fused_moe/config.py", "intermediate_size_per_partition_unpadded", "verify: experts"),
    ("vllm", f"{LAYERS}/attention", "W_UV", "_keeps_derived_matrices: multi-head latent attention"),
    ("vllm", "v1/attention/backends/flashinfer.py", "_sinks_source", "_find_targets: a copy that a push would miss"),
    ("vllm", f"{LAYERS}/linear.py", "num_kv_head_replicas", "verify: KV heads on more ranks than there are"),
    ("vllm", f"{LAYERS}/linear.py", "class QKVParallelLinear", "verify"),
    ("vllm", f"{LAYERS}/utils.py", "def dispatch_cpu_unquantized_gemm", "_plain_cpu_linear takes its place"),
    ("vllm", f"{LAYERS}/linear.py", "cpu_linear", "_plain_cpu_linear sets it"),
    ("vllm", "model_executor/models/utils.py", "orig_to_new_stacked", "verify: layers that are fused"),
    ("vllm", "model_executor/models/utils.py", "def _map_name", "verify: names in the checkpoint"),
    ("vllm", "model_executor/models/registry.py", "def load_model_cls", "preload.register"),
    ("torch", "storage.py", "_share_cuda_", "_export_storage"),
    ("torch", "storage.py", "_new_shared_cuda", "_open_storage"),
    ("torch", "distributed/tensor/_utils.py", "def compute_local_shape_and_global_offset", "checkpoint_tensors"),
    ("transformers", "core_model_loading.py", "def revert_weight_conversion", "checkpoint_tensors"),
    ("ray", "core/generated/node_manager_pb2_grpc.py", "PrestartWorkers", "cluster: processes kept in reserve"),
    ("ray", "_private/grpc_utils.py", "def init_grpc_channel", "cluster: the same"),
    ("ray", "_private/runtime_env", "worker_process_setup_hook", "cluster: an engine's processes import ahead"),
]


@pytest.mark.parametrize(("package", "where", "text", "why"), NAMES, ids=[f"{n[0]}-{n[2]}" for n in NAMES])
def test_name_is_still_there(package, where, text, why):
    folder = Path(importlib.util.find_spec(package).submodule_search_locations[0])
    found = folder / where
    files = sorted(found.rglob("*.py")) if found.is_dir() else [found]
    assert found.exists(), f"{package} has no {where}: {why}"
    word = re.compile(rf"(?<!\w){re.escape(text)}(?!\w)")
    assert any(word.search(file.read_text()) for file in files), f"{package}/{where} has no {text}: {why}"
