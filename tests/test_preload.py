"""What is imported when: nothing happens on an import of the push, everything on that of colocate.preload."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from running import ROOT, deadline

LOADED = "import sys, {module}; print('vllm' in sys.modules, 'ray' in sys.modules)"


def loaded(module: str, role: str) -> str:
    env = os.environ | {"PYTHONPATH": str(ROOT), "RLHF_COLOCATE_ROLE": role}
    command = [sys.executable, "-c", LOADED.format(module=module)]
    return subprocess.check_output(command, text=True, env=env, timeout=deadline(120)).strip()


@pytest.mark.parametrize(("module", "role"), [("rlhf_utils", "engine"), ("colocate.preload", "trainer")])
def test_an_import_brings_in_neither_vllm_nor_ray(module, role):
    assert loaded(module, role) == "False False"


ENGINE = """
import multiprocessing.shared_memory
import colocate.preload
from vllm import ModelRegistry
block = multiprocessing.shared_memory.SharedMemory(create=True, size=8)
print(block.name.startswith("r1234"), type(ModelRegistry.models["OPTForCausalLM"]).__name__)
block.unlink()
"""


@pytest.mark.e2e
def test_an_engine_s_process_is_ready_for_its_model():
    settings = {"ROLE": "engine", "SHM": "/r1234", "ARCHITECTURE": "OPTForCausalLM"}
    env = os.environ | {"PYTHONPATH": str(ROOT)} | {f"RLHF_COLOCATE_{k}": v for k, v in settings.items()}
    command = [sys.executable, "-c", ENGINE]
    output = subprocess.check_output(command, text=True, env=env, timeout=deadline(300))
    assert output.splitlines()[-1] == "True _RegisteredModel"
