"""The house: which file may import which, what a room must not know, and that importing does nothing. No Ray, no vLLM.

Every import counts: inside functions, and under TYPE_CHECKING.
"""

from __future__ import annotations

import ast
import functools
import graphlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from running import ROOT, deadline

FOLDERS = ("", "colocate", "benchmarks", "examples", "tests")
FILES = sorted(file for folder in FOLDERS for file in (ROOT / folder).glob("*.py"))
# What a room must not import: another package, or a room of ours.
MUST_NOT_KNOW = {
    "config": {"torch", "ray", "vllm", "transformers", "psutil", "os", "colocate"},
    "watch": {"torch", "ray", "vllm"},
    "grpo": {"ray", "vllm", "colocate.learner"},
    "learner": {"ray", "vllm", "rlhf_utils"},
    "kept": {"ray", "transformers", "rlhf_utils", "colocate"},
    "rounds": {"ray", "vllm", "transformers", "colocate.fleet"},
    "sharding": {"ray", "vllm", "rlhf_utils", "colocate.learner"},
    "trainer_state": {"ray", "vllm", "rlhf_utils", "colocate.sharding"},
    "report": {"torch", "ray", "vllm", "colocate.fleet", "colocate.cluster"},
    "cluster": {"torch", "vllm", "transformers", "colocate.model_folder"},
    "fleet": {"torch", "vllm", "transformers", "rlhf_utils"},
    "checkpoint": {"torch", "ray", "vllm"},
    "tasks": {"torch", "ray", "vllm", "rlhf_utils"},
    "prompts": {"torch", "ray", "vllm", "transformers"},
    "rewards": {"torch", "ray", "vllm", "transformers", "colocate.tasks"},
    "verify": {"ray", "colocate.fleet"},
    "preload": {"ray", "colocate.fleet"},
    "preflight": {"ray", "vllm", "colocate.fleet"},
}


def module_of(file: Path) -> str:
    """The name under which others import it: tests and benchmarks import their neighbours without the folder, too."""
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@functools.cache
def imports_of(file: Path) -> set[str]:
    """All modules that a file imports anywhere in it; of ours by `module_of`, of others by their full name."""
    ours = {module_of(other) for other in FILES}
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file.name}:{node.lineno} is a relative import"
            parts = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [part if part in ours else node.module for part in parts]
        else:
            continue
        neighbours = {name: f"{file.parent.name}.{name}" for name in names}
        found |= {neighbours[name] if neighbours[name] in ours else name for name in names}
    return found - {module_of(file)}


def known_by(file: Path) -> set[str]:
    """The same, with the packages that these are in."""
    return {".".join(name.split(".")[:n]) for name in imports_of(file) for n in range(1, name.count(".") + 2)}


def test_the_rooms():
    assert {file.name for file in ROOT.glob("*.py")} == {"rlhf_colocate.py", "rlhf_utils.py"}
    rooms = {file.stem for file in (ROOT / "colocate").glob("*.py")}
    assert rooms >= MUST_NOT_KNOW.keys(), MUST_NOT_KNOW.keys() - rooms


@pytest.mark.parametrize("file", sorted((ROOT / "colocate").glob("*.py")), ids=lambda file: file.stem)
def test_nothing_in_the_folder_knows_the_script(file):
    above = {"rlhf_colocate", "benchmarks", "tests", "examples"}
    assert not known_by(file) & above
    assert not known_by(file) & MUST_NOT_KNOW.get(file.stem, set())


def test_the_push_stands_alone():
    ours = {module_of(file) for file in FILES} | set(FOLDERS)
    assert not known_by(ROOT / "rlhf_utils.py") & ours
    for example in (ROOT / "examples").glob("*.py"):
        assert known_by(example) & ours <= {"rlhf_utils"}, example.name


def test_no_file_imports_its_importer():
    graph = {module_of(file): imports_of(file) for file in FILES}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"import one another: {' -> '.join(reversed(error.args[1]))}")


def test_the_task_alone_uses_the_tokenizer():
    product = [file for file in FILES if file.parent in (ROOT, ROOT / "colocate")]
    knowing = {file.name for file in product if "AutoTokenizer" in file.read_text()}
    assert knowing <= {"tasks.py", "model_folder.py"}, "the latter sees whether it can be loaded"


IMPORT = """
import json, os, signal, sys, threading

def state():
    handlers = [str(signal.getsignal(number)) for number in sorted(signal.valid_signals())]
    threads = [thread.name for thread in threading.enumerate()]
    return {"environment": dict(os.environ), "signals": handlers, "path": [*sys.path], "threads": threads}

name, *imported_before = sys.argv[1:]
for other in imported_before:
    __import__(other)
before = state()
modules = set(sys.modules)
__import__(name)
after = state()
for key, value in after.items():
    assert value == before[key], f"{key}: {sorted(set(value) ^ set(before[key])) or 'other values'}"
print(json.dumps(sorted(module.split(".")[0] for module in set(sys.modules) - modules)))
"""


@pytest.mark.parametrize("role", ["", "engine", "trainer"])
@pytest.mark.parametrize("name, imported_before", [("rlhf_colocate", []), ("rlhf_utils", ["torch"])])
def test_an_import_has_no_side_effect(name, imported_before, role):
    """Neither in a process that the script has started for an engine or a trainer."""
    command = [sys.executable, "-c", IMPORT, name, *imported_before]
    env = os.environ | {"PYTHONPATH": str(ROOT), "RLHF_COLOCATE_ROLE": role}
    done = subprocess.run(command, capture_output=True, text=True, timeout=deadline(120), env=env)
    assert done.returncode == 0, done.stderr
    assert not {"torch", "ray", "vllm", "transformers", "psutil"} & set(json.loads(done.stdout))
