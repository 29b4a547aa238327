"""`make` refuses a Python or a pip that cannot serve, in one line, before it installs anything."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
from running import ROOT, deadline

from colocate import check_python

# A Python that says it is an older one.
OLD = """#!/bin/sh
exec {python} -c "import runpy, sys; sys.version_info = (3, 10, 13); sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name='__main__')" "$@"
"""


def test_another_python_is_refused_before_anything_is_installed(tmp_path):
    (tmp_path / "colocate").mkdir()
    for name in ("Makefile", "requirements.txt", "requirements-cpu.txt", "colocate/check_python.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    old = tmp_path / "old-python"
    old.write_text(OLD.format(python=sys.executable))
    old.chmod(0o755)
    command = ["make", "-C", str(tmp_path), "--no-print-directory", "run", f"PYTHON={old}"]
    env = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKEOVERRIDES")}  # of the make that runs this
    done = subprocess.run(command, capture_output=True, text=True, timeout=deadline(120), env=env)
    assert done.returncode != 0 and not (tmp_path / ".venv").exists()
    said = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert len(said) == 1 and "Python 3.10" in said[0] and "make PYTHON=" in said[0]


@pytest.mark.parametrize("release", check_python.RELEASES)
def test_the_releases_of_the_lock_are_accepted(release):
    check_python.check_version(release)


def test_a_python_without_venv_is_refused(monkeypatch):
    check_python.check_venv("3.12")
    monkeypatch.setattr(check_python.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"apt install python3\.12-venv"):
        check_python.check_venv("3.12")


@pytest.mark.parametrize("needs, refused", [(["jinja2"], False), (["jinja2", "nvidia-nccl-cu13==2.29.7"], True)])
def test_a_cuda_build_of_torch_is_refused(monkeypatch, needs, refused):
    report = json.dumps({"install": [{"metadata": {"requires_dist": needs}}]})
    monkeypatch.setattr(check_python.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=0, stdout=report))
    lock = (ROOT / "requirements-cpu.txt").read_text()
    if refused:
        with pytest.raises(SystemExit, match=r"CUDA build of torch==.* PIP_EXTRA_INDEX_URL="):
            check_python.check_torch(lock)
    else:
        check_python.check_torch(lock)
