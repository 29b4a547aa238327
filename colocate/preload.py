"""What Ray's processes import first: everything that is slow in an engine's start, in all of them at once.

Ray starts processes ahead and imports this module there (`preload_python_modules`). On a cluster of yours it is the
jobs' `worker_process_setup_hook`. Only an engine's processes do something: RLHF_COLOCATE_ROLE is "engine" there.
"""

from __future__ import annotations

import contextlib
import multiprocessing.shared_memory
import os


def prepare() -> None:
    """Make this process ready for vLLM. To do it twice changes nothing."""
    if os.environ.get("RLHF_COLOCATE_ROLE") != "engine":
        return
    if prefix := os.environ.get("RLHF_COLOCATE_SHM"):
        # So begin the names of vLLM's queues in /dev/shm: what a killed process leaves there can be found.
        multiprocessing.shared_memory._SHM_NAME_PREFIX = prefix
    if os.environ.get("RLHF_COLOCATE_AVX2"):
        import torch

        # vLLM picks its AVX2 kernels then. Its AVX-512 attention (0.32) returns NaN where a score is some 50 times its
        # softcap: tanh by exponentials that overflow, as in https://github.com/vllm-project/vllm/pull/56579.
        torch.cpu._is_avx512_supported = lambda: False
        torch.cpu._is_amx_tile_supported = lambda: False
    import rlhf_utils

    rlhf_utils.preload_engine_process()
    if architecture := os.environ.get("RLHF_COLOCATE_ARCHITECTURE"):
        register(architecture)


def register(architecture: str) -> None:
    """Give vLLM the model's class itself.

    vLLM inspects an architecture in a subprocess that imports vLLM once more, to keep CUDA away from a process that may
    fork; an engine's does not. https://github.com/vllm-project/vllm/blob/main/vllm/model_executor/models/registry.py
    """
    from vllm import ModelRegistry

    lazy = ModelRegistry.models.get(architecture)
    if hasattr(lazy, "load_model_cls"):
        with contextlib.suppress(Exception):  # the engine says what is wrong with it
            ModelRegistry.register_model(architecture, lazy.load_model_cls())


prepare()
