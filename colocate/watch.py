"""Processes of this host, and what they have in /dev/shm. Knows neither Ray nor vLLM."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import psutil


def adopt_orphans() -> None:
    """Make processes whose parent ends children of this one, not of init: so none gets out of sight.

    PR_SET_CHILD_SUBREAPER of prctl(2); Linux only.
    """
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)


def children(besides: frozenset = frozenset()) -> list[psutil.Process]:
    """All processes below this one that have not ended, but these children of it, and what is below them."""
    import psutil

    found = []
    for child in set(psutil.Process().children()) - besides:
        with contextlib.suppress(psutil.NoSuchProcess):
            if child.status() == psutil.STATUS_ZOMBIE:
                psutil.wait_procs([child], timeout=0)  # reaps it
            else:
                found += [child, *child.children(recursive=True)]
    return found


def kill(processes: list[psutil.Process]) -> None:
    """SIGKILL, for which nothing is too stuck."""
    import psutil

    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def end_children(seconds: float, besides: frozenset = frozenset()) -> set[str]:
    """Kill `children(besides)` until there are no more, for so many seconds at most.

    Returns the names of what they had in /dev/shm: the dead cannot tell any more.
    """
    import psutil

    files = set()
    end = time.monotonic() + seconds
    while (found := children(besides)) and time.monotonic() < end:
        for process in found:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.suspend()  # whoever is stopped starts no others, and makes no more files
        for process in found:
            files |= shared_memory_files(process.pid)
        kill(found)
        psutil.wait_procs(found, timeout=0.1)
    return files


def shared_memory_files(pid: int) -> set[str]:
    """Names in /dev/shm that a process has mapped. Not what is in folders: models and packages may be kept there."""
    try:
        mapped = Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return set()
    return set(re.findall(r" /dev/shm/([^/\s]+)$", mapped, re.MULTILINE))


def remove(files: set[str]) -> None:
    """Unlink these names in /dev/shm."""
    for file in files:
        with contextlib.suppress(OSError):  # gone already, or another user's
            os.unlink(f"/dev/shm/{file}")
