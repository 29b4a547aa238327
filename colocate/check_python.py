"""Whether this Python can install the requirements: what `make` asks before it installs anything.

python colocate/check_python.py                         this Python's version, and its venv
.venv/bin/python colocate/check_python.py LOCK.txt      which build of torch its pip would take for a lock file

Says nothing and ends with 0 if all is well; else one line, and 1. Runs on old releases of Python, too.
"""

import importlib.util
import json
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

CPU_WHEELS = "the address that pytorch.org shows for pip and CPU under Get Started"
RELEASES = ("3.11", "3.12", "3.13")  # all wheels of requirements-cpu.txt exist for these


def check_platform(system: str, machine: str) -> None:
    """End with one line where vLLM and Ray have no wheels."""
    on_arm_gpus = (system, machine) == ("Linux", "aarch64") and shutil.which("nvidia-smi")  # not tried
    if (system, machine) != ("Linux", "x86_64") and not on_arm_gpus:
        fix = "a Linux machine, WSL2, or a container (docker run --platform linux/amd64 --shm-size=4g)"
        sys.exit(f"This is {system} on {machine}; the requirements are for Linux on x86_64. Try: {fix}")


def check_version(release: str) -> None:
    """End with one line if there are no wheels for this release of Python, like "3.10"."""
    if release in RELEASES:
        return
    found = [name for name in map("python{}".format, RELEASES) if runs(name)]
    fix = f"make PYTHON={found[-1]}" if found else "make PYTHON=/path/to/python3.12, once you have one"
    sys.exit(f"{sys.executable} is Python {release}; the requirements are for {', '.join(RELEASES)}. Try: {fix}")


def runs(command: str) -> bool:
    """Whether it is there and starts: pyenv has stand-ins on PATH for releases that are not chosen."""
    if not shutil.which(command):
        return False
    done = subprocess.run([command, "-c", ""], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return done.returncode == 0


def check_venv(release: str) -> None:
    """End with one line if this Python cannot make virtual environments: Debian packs that separately."""
    missing = [name for name in ("venv", "ensurepip") if not importlib.util.find_spec(name)]
    if missing:
        fix = f"apt install python{release}-venv, or another one with make PYTHON=..."
        sys.exit(f"{sys.executable} has no {' and no '.join(missing)}, so it cannot make .venv. Try: {fix}")


def check_torch(lock: str) -> None:
    """End with one line if pip would take a CUDA build of torch for this lock, which has none of its libraries."""
    pin = re.search(r"^torch==\S+", lock, re.MULTILINE).group()
    ask = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-deps", "--ignore-installed", "--quiet"]
    done = subprocess.run([*ask, "--report", "-", pin], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    if done.returncode:
        return  # the install will fail as well, and then pip's own words are to be seen
    (torch,) = json.loads(done.stdout)["install"]
    needs = " ".join(torch["metadata"].get("requires_dist", []))
    if "nvidia-" in needs or "triton" in needs:
        sys.exit(f"pip would install a CUDA build of {pin}. Try: PIP_EXTRA_INDEX_URL=... make run, with {CPU_WHEELS}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        check_torch(Path(sys.argv[1]).read_text())
    else:
        check_platform(platform.system(), platform.machine())
        this = "{}.{}".format(*sys.version_info)
        check_version(this)
        check_venv(this)
