"""Processes of one host, and what they have in /dev/shm. Knows neither Ray nor vLLM."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import os
import re
import secrets
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from colocate.config import Stop

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
                process.suspend()  # a stopped process starts no others, and makes no more files
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


# ---------------------------------------------------------------------------------------------------------------------
# The processes behind the actors
# ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Member:
    """A process of an actor. process: None if it is none of those that this watch looks at."""

    name: str  # of the actor
    role: str
    pid: int
    gpu: str
    process: psutil.Process | None

    def __str__(self) -> str:
        return f"{self.role} (pid {self.pid}{f' on {self.gpu}' if self.gpu else ''})"

    def state(self) -> str:
        """ "has ended", "is stopped" (by a signal or a debugger), or "": running, or not looked at."""
        import psutil

        if self.process is None:
            return ""
        try:
            status = self.process.status()
        except psutil.NoSuchProcess:
            return "has ended"
        reused = not self.process.is_running()  # the pid is another process's by now
        if reused or status in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
            return "has ended"
        return "is stopped" if status in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP) else ""


class Watch:
    """The processes of this run on one host, by the pids that they reported, and their files in /dev/shm.

    Here they are those below this process. On a cluster there is one of these on each node (see colocate/nodes.py).
    """

    def __init__(self):
        self.members: list[Member] = []
        self.ray: list[Member] = []  # a private Ray's own
        self.files: dict[str, set[str]] = {}  # by actor; noted early: the dead cannot name theirs any more
        self.early_files: set[str] = set()  # of processes that had not reported yet
        self.chosen: list[psutil.Process] = []  # to be ended
        self.prefix = f"r{secrets.token_hex(4)}"  # of the names of engines' queues; Python allows 9 characters
        self.others = set(os.listdir("/dev/shm"))  # what was there before

    def processes(self) -> list[psutil.Process]:
        """All that may be the run's."""
        import psutil

        return psutil.Process().children(recursive=True)

    def add(self, found: list[tuple[str, str, int, str]]) -> None:
        """found: (actor's name, role, pid, GPU or "")."""
        ours = {p.pid: p for p in self.processes()}
        self.members += [Member(name, role, pid, gpu, ours.get(pid)) for name, role, pid, gpu in found]
        self.note_files()

    def add_ray(self) -> None:
        """Watch a private Ray's own processes, too."""
        import psutil

        found = [(p.name(), p) for p in psutil.Process().children()]
        self.ray = [Member("Ray", f"Ray's {n}", p.pid, "", p) for n, p in found if n in ("gcs_server", "raylet")]

    def choose(self, names: set[str], unreported: bool) -> None:
        """These actors' processes are to be ended; unreported: those that have not reported yet, too."""
        self.note_files()
        self.chosen = [m.process for m in self.of(names) if m.process]
        if unreported:
            self.chosen += self.unreported()

    def end(self, names: set[str], seconds: float) -> list[int]:
        """Kill what was chosen, and forget these actors. Returns the pids of what is still there after so long."""
        import psutil

        kill(self.chosen)
        if alive := psutil.wait_procs(self.chosen, timeout=seconds)[1]:
            return [p.pid for p in alive]
        for name in names:
            self.drop(name)
        return []

    def kill(self, names: set[str]) -> None:
        """Kill the processes of these actors, and wait for nothing."""
        kill([m.process for m in self.of(names) if m.process])
        self.note_files()

    def drop(self, name: str) -> None:
        """Forget an actor's processes, which have ended, and remove what they alone had in /dev/shm."""
        self.members = [m for m in self.members if m.name != name]
        kept = {file for m in self.members for file in self.files_of(m.pid)}
        remove(self.files.pop(name, set()) - kept)

    def of(self, names: Iterable[str]) -> list[Member]:
        return [m for m in self.members if m.name in names]

    def settle(self) -> list[str]:
        """Wait until it is known which hosts are gone. Returns a line for each: this one is there."""
        return []

    def ended(self) -> set[str]:
        """Actors of which a process has ended."""
        return {m.name for m in self.members if m.state() == "has ended"}

    def troubled(self, names: Iterable[str]) -> set[str]:
        """Those of these actors of which a process has ended or is stopped."""
        return {m.name for m in self.of(names) if m.state()}

    def troubled_ray(self) -> list[Member]:
        return [m for m in self.ray if m.state()]

    def require_ray(self) -> None:
        """Raise Stop if Ray has lost one of its own: a call may hang then, and after a minute Ray ends the driver."""
        if gone := [f"{m} {m.state()}" for m in self.troubled_ray()]:
            raise Stop(f"lost Ray: {', '.join(gone)}; nothing can be replaced without it")

    def describe(self, names: Iterable[str]) -> str:
        """The processes whose state says why; all of them if none does."""
        members = self.of(names)
        telling = [f"{m} {m.state()}" for m in members if m.state()]
        return ", ".join(telling or map(str, members)) or join_names(names)

    def unreported(self) -> list[psutil.Process]:
        """Processes of Ray actors that have not reported yet, by the title that Ray gives them: ray::CLASS.METHOD."""
        import psutil

        known = {m.pid for m in self.members}
        found = []
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                title = " ".join(process.cmdline())
                if process.pid not in known and re.match(r"ray::(?!IDLE\b|\w*Agent\b)", title):
                    found.append(process)
        return found

    def idle(self) -> set[int]:
        """The pids that Ray has ready here for actors to come."""
        import psutil

        found = set()
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.cmdline()[:1] == ["ray::IDLE"]:
                    found.add(process.pid)
        return found

    def note_files(self) -> None:
        """Remember what the processes have in /dev/shm by now: vLLM's queues, and what torch keeps for CUDA IPC."""
        for member in self.members:
            if member.process:
                self.files.setdefault(member.name, set()).update(self.files_of(member.pid))

    def note_early_files(self) -> None:
        """The same for all processes, while they start and have not reported."""
        for process in self.processes():
            self.early_files.update(self.files_of(process.pid))

    def files_of(self, pid: int) -> set[str]:
        """Names in /dev/shm that a process of this run has mapped: queues of vLLM, buffers of NCCL.

        Neither what was there before nor what is in folders: models, checkpoints and packages may be kept there.
        """
        return shared_memory_files(pid) - self.others

    def all_files(self) -> set[str]:
        queues = {name for name in os.listdir("/dev/shm") if name.startswith(self.prefix)}
        return queues.union(self.early_files, *self.files.values())


def join_names(names: Iterable[str]) -> str:
    return " and ".join(sorted(names))
