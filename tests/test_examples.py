"""The layout alone runs in a folder that holds nothing of ours but rlhf_utils.py."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from running import deadline

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.e2e

MAKE = """
import sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
torch.manual_seed(0)
sizes = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=320)).save_pretrained(sys.argv[1])
"""


def test_the_layout_alone(tmp_path):
    for file in (ROOT / "rlhf_utils.py", ROOT / "examples/minimal_colocate.py"):
        shutil.copy(file, tmp_path)
    subprocess.run([sys.executable, "-c", MAKE, "model"], cwd=tmp_path, check=True, timeout=deadline(300))
    command = [sys.executable, "minimal_colocate.py", "model", "--num-gpus", "2", "--tensor-parallel-size", "2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=deadline(600))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 GPUs, each with a trainer and an engine's worker" in done.stdout
    before, after = re.search(r"before (\[.*?\]), after (\[.*?\])", done.stdout).groups()
    assert before != after
    checked, wrong = re.search(
        r"^(\d+) elements compared, 0 not comparable, wrong: (.*)$", done.stdout, re.MULTILINE
    ).groups()
    assert int(checked) == 328_960 and wrong == "none"
