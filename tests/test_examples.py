"""The examples run in a folder that holds nothing else of ours but rlhf_utils.py."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from running import NOT_NICE, deadline

from benchmarks.traces import Traces

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.e2e

MAKE = """
import sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
torch.manual_seed(0)
sizes = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=320)).save_pretrained(sys.argv[1])
"""


def run(folder: Path, example: str, *arguments: str) -> str:
    """The output of an example that runs alone and leaves nothing. arguments: the first is the model's folder."""
    for file in (ROOT / "rlhf_utils.py", ROOT / "examples" / example):
        shutil.copy(file, folder)
    traces = Traces()
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | traces.env
    env |= {"VLLM_CPU_KVCACHE_SPACE": "1", **NOT_NICE}
    command = [sys.executable, example, *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=deadline(600), env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    left = traces.left(deadline(30))
    assert not left["processes"] and not left["/dev/shm"], left
    return done.stdout


def test_the_push_alone(tmp_path, smollm2):
    output = run(tmp_path, "minimal_push.py", str(smollm2))
    texts = re.findall(r"^version \d: (.*)$", output, re.MULTILINE)
    assert "Paris" in texts[0] and len(texts) == len(set(texts)) == 3, texts
    assert re.search(r"^\d\d+ parameters compared, wrong: none$", output, re.MULTILINE)


def test_the_layout_alone(tmp_path):
    subprocess.run([sys.executable, "-c", MAKE, "model"], cwd=tmp_path, check=True, timeout=deadline(300))
    output = run(tmp_path, "minimal_colocate.py", "model", "--num-gpus", "2", "--tensor-parallel-size", "2")
    assert "2 GPUs, each with a trainer and an engine's worker" in output
    before, after = re.search(r"before (\[.*?\]), after (\[.*?\])", output).groups()
    assert before != after
    assert re.search("^30 parameters compared, wrong: none$", output, re.MULTILINE)


def test_the_push_out_of_shards_alone(tmp_path):
    subprocess.run([sys.executable, "-c", MAKE, "model"], cwd=tmp_path, check=True, timeout=deadline(300))
    output = run(tmp_path, "fsdp_push.py", "model")
    tokens = re.findall(r"^version \d: (\[.*\])$", output, re.MULTILINE)
    assert len(tokens) == len(set(tokens)) == 3, tokens
    assert len(re.findall(r"^pushed \d MB, of which \d from the other trainer's memory", output, re.MULTILINE)) == 3
    assert re.search("^30 parameters compared, wrong: none$", output, re.MULTILINE)


@pytest.mark.parametrize(("example", "lines"), [("minimal_colocate.py", 200), ("fsdp_push.py", 120)])
def test_an_example_is_short(example, lines):
    assert len((ROOT / "examples" / example).read_text().splitlines()) <= lines
