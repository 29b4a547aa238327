"""What a run leaves behind: processes, files in /dev/shm, temporary files. For the drills and the tests."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
import threading
import time
import uuid
from pathlib import Path

import psutil

MARK = "RLHF_COLOCATE_MARK"
KEPT = re.compile("torchinductor_")  # torch keeps its compiled kernels on purpose


class Traces:
    """Start a run with `env` in its environment, and look at what is `left` when it has ended.

    Other programs use /dev/shm, too. Hence a thread notes, twice a second, which new files the run's processes map.
    """

    def __init__(self):
        self.mark = uuid.uuid4().hex
        # Short, since Ray's sockets are in there: their paths may have 107 characters.
        self.folder = Path(tempfile.mkdtemp(prefix="t-", dir="/tmp"))
        self.env = {MARK: self.mark, "TMPDIR": str(self.folder)}
        self.before = set(os.listdir("/dev/shm"))
        self.mapped: set[str] = set()
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._sample, daemon=True)
        self.thread.start()

    def processes(self) -> list[psutil.Process]:
        """Living processes that inherited the mark."""
        found = []
        for process in psutil.process_iter():
            # Ray writes its processes' titles over a part of their environment: the mark itself is looked for.
            with contextlib.suppress(psutil.Error, OSError):
                if self.mark.encode() in Path(f"/proc/{process.pid}/environ").read_bytes():
                    found.append(process)
        return found

    def end(self) -> None:
        """Kill them."""
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def left(self, seconds: float = 10) -> dict[str, list[str]]:
        """{"processes", "/dev/shm", "temporary files"} that are still there after so many seconds at most.

        All of it is removed then, so that nothing else finds it.
        """
        end = time.monotonic() + seconds
        while self.processes() and time.monotonic() < end:
            time.sleep(0.05)
        self.ended.set()
        self.thread.join()
        left = {"processes": []}
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                left["processes"].append(" ".join(process.cmdline()))
        self.end()
        left["/dev/shm"] = sorted(self.mapped & set(os.listdir("/dev/shm")))
        left["temporary files"] = [name for name in os.listdir(self.folder) if not KEPT.match(name)]
        for name in left["/dev/shm"]:
            Path("/dev/shm", name).unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)
        return left

    def _sample(self) -> None:
        while not self.ended.wait(0.5):
            for process in self.processes():
                with contextlib.suppress(OSError):
                    maps = Path(f"/proc/{process.pid}/maps").read_text()
                    found = set(re.findall(r" /dev/shm/([^/\n]+)$", maps, re.MULTILINE))
                    self.mapped |= found - self.before
