"""What may be copied runs where nothing else of ours is, and needs only what docs/copying.md names."""

from __future__ import annotations

import ast
import builtins
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from running import NOT_NICE, deadline

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = (ROOT / "rlhf_colocate.py").read_text()
ROW = re.compile(r"^\| ([^|]+) \| ([^|]*`[^|]+) \| ([^|]+) \|$", re.MULTILINE)
PARTS = {
    part: (re.findall("`(.+?)`", code), set(re.findall("`(.+?)`", needs)))
    for part, code, needs in ROW.findall((ROOT / "docs/copying.md").read_text())
}


def node_of(name: str) -> ast.AST:
    """The definition of `Class`, `function` or `Class.method` in the script; a file's tree for its name."""
    if name.endswith(".py"):
        return ast.parse((ROOT / name).read_text())
    node: ast.AST = ast.parse(SCRIPT)
    for part in name.split("."):
        node = next(n for n in node.body if getattr(n, "name", "") == part)
    return node


def source_of(name: str) -> str:
    return textwrap.dedent(ast.get_source_segment(SCRIPT, node_of(name), padded=True))


def needed(nodes: list[ast.AST]) -> set[str]:
    """What these definitions take from outside: packages, names of the file, and attributes of `self`.

    Of a module of ours each attribute; of Python's own modules the name.
    """
    found: set[str] = set()
    bound: set[str] = set()
    free: list[tuple[str, str]] = []  # (name, "" or its attribute)
    own: set[str] = set()  # attributes of self that are set or defined here
    for node in (inner for outer in nodes for inner in ast.walk(outer)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            bound.add(node.name)
            own.add(node.name)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
            node.annotation = None
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            found |= {module.split(".")[0] for module in modules}
            bound |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ExceptHandler):
            bound.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            bound.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id == "self" and isinstance(node.ctx, ast.Store):
                own.add(node.attr)
            free.append((node.value.id, node.attr))
        elif isinstance(node, ast.Name):
            free.append((node.id, ""))
    for name, attribute in free:
        if name == "self" and attribute and attribute not in own:
            found.add(f"self.{attribute}")
        elif name in sys.stdlib_module_names and name not in bound:
            found.add(name)
        elif name not in bound and not hasattr(builtins, name):
            found.add(f"{name}.{attribute}" if attribute else name)
    whole = {name.split(".")[0] for name in found if "." in name}  # `cluster` is there as `cluster.free_port`
    return found - whole - {"__future__"}


@pytest.mark.parametrize("part", PARTS)
def test_a_part_needs_only_what_its_row_names(part):
    code, named = PARTS[part]
    found = needed([node_of(name) for name in code])
    if code == ["rlhf_utils.py"]:
        found -= sys.stdlib_module_names
        found = {name for name in found if "." not in name}
    assert found == named


def test_all_parts_that_people_copy_are_named():
    code = {name for names, _ in PARTS.values() for name in names}
    assert code >= {"rlhf_utils.py", "MyLLM.__init__", "Colocation.new_actor", "Colocation.engine_args"}
    assert "RayTrainingActor.get_weight_ipc_handles" in code


def run_alone(folder: Path, *arguments: str) -> str:
    """Run Python in a folder from which nothing else of ours can be imported; what it prints."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    options = {
        "cwd": folder,
        "env": env | {"VLLM_CPU_KVCACHE_SPACE": "1", **NOT_NICE},
        "capture_output": True,
        "text": True,
    }
    done = subprocess.run([sys.executable, *arguments], timeout=deadline(600), **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """It holds rlhf_utils.py alone."""
    shutil.copy(ROOT / "rlhf_utils.py", tmp_path)
    (tmp_path / "alone.py").write_text("import importlib.util\nassert not importlib.util.find_spec('colocate')\n")
    run_alone(tmp_path, "alone.py")
    return tmp_path


ENGINE = """
class LLM:
    def collective_rpc(self, method, args):
        return [{"result": {"version": 7, "bytes": 1}}] * 2
    def reset_prefix_cache(self):
        return True

engine = MyLLM([2, 3], 0.4, 1234)
names = ("RAY_PER_WORKER_GPUS", "RAY_BUNDLE_INDICES", "ENABLE_V1_MULTIPROCESSING", "DP_MASTER_PORT")
print(*(os.environ["VLLM_" + name] for name in names))
engine.llm = LLM()
reply = engine.push(7)
print(engine.version, reply["workers"])
"""


def test_the_engine_alone(folder):
    code = "\n".join(["import contextlib", "import os", "import time", *map(source_of, ("MyLLM", "sample_of")), ENGINE])
    (folder / "engine.py").write_text(code)
    lines = run_alone(folder, "engine.py").splitlines()
    assert lines == ["0.4 2,3 0 1234", "7 [{'version': 7, 'bytes': 1}, {'version': 7, 'bytes': 1}]"]


HANDLES = """
import types
import torch
import rlhf_utils

weights = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(5, dtype=torch.bfloat16)}
control = {rlhf_utils.VERSION: torch.tensor(3)}
rlhf_utils.share_memory([*weights.values(), *control.values()])
trainer = types.SimpleNamespace(device=torch.device("cpu"), weights=weights, readers=[], control=control)
((gpu, message),) = get_weight_ipc_handles(trainer).items()
with rlhf_utils.open_handles(message, trainer.device) as found:
    assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())
    print(gpu, int(found.pop(rlhf_utils.VERSION)), sorted(found))
"""


def test_the_handles_alone(folder):
    (folder / "handles.py").write_text(source_of("RayTrainingActor.get_weight_ipc_handles") + HANDLES)
    assert run_alone(folder, "handles.py") == "cpu 3 ['a', 'b']\n"


BUNDLES = """
import types
import ray
from ray.util.placement_group import placement_group

class Trainer:
    def __init__(self, *arguments):
        self.arguments = arguments
    def where(self):
        return [*self.arguments, ray.get_gpu_ids()]

class Engine(Trainer):
    def workers(self):
        group = ray.util.get_current_placement_group()
        return [len(group.bundle_specs), ray.util.placement_group_table(group)["state"]]

cluster = types.SimpleNamespace(free_port=lambda: 1234, TRAINER_ENV={"env_vars": {"TRAINER": "1"}})
ray.init("local", num_gpus=2, num_cpus=4, include_dashboard=False, log_to_driver=False)
group = placement_group([{"GPU": 1}] * 2)
shares = {"trainer_gpu_share": 0.4, "engine_gpu_share": 0.4}
config = types.SimpleNamespace(tensor_parallel_size=2, dtype="float32", seed=0, trainer="replicated", **shares)
model = types.SimpleNamespace(folder="model", load_format="dummy")
mine = types.SimpleNamespace(config=config, model=model, checkpoint_everywhere=None, engines=["engine 0"])
mine.engine_class = Engine
mine.trainer_class = Trainer
mine.bundles_of = lambda name: [0, 1] if name in mine.engines else [int(name[-1])]
mine.cluster = types.SimpleNamespace(seat=lambda name, bundles: (group, bundles))
trainers = [new_actor(mine, f"trainer {i}") for i in (0, 1)]
engine = new_actor(mine, "engine 0")
trainer_ids = [where[-1] for where in ray.get([t.where.remote() for t in trainers], timeout=300)]
print(len({*map(str, trainer_ids)}), ray.get(engine.where.remote()), ray.get(engine.workers.remote()))
"""


@pytest.mark.e2e
def test_an_actor_on_its_bundles_alone(folder):
    (folder / "bundles.py").write_text(source_of("Colocation.new_actor") + BUNDLES)
    assert run_alone(folder, "bundles.py") == "2 [[0, 1], 0.4, 1234, []] [2, 'CREATED']\n"
