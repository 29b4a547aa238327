"""A private Ray, or yours: what it needs of the machine, how it starts, and how it ends. Knows no models.

`check_environment`  what a private Ray would stumble over, found before it starts.
`Cluster`            ray.init with a deadline, which Ctrl-C can interrupt; leaves neither processes nor files.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path

from colocate.config import MISSING, Stop, refuse_unless
from colocate.watch import adopt_orphans, children, end_children, remove, shared_memory_files

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # signals that end a run, unless it was started to ignore them
SOCKET_PATH_BYTES = 107  # sockaddr_un.sun_path is 108 bytes with the final zero (man 7 unix)
ROOM_MIB = 64  # for Ray's logs and vLLM's sockets; a short run takes 1
PROCESS_MIB = 400  # of a process that has imported torch and vLLM, without what it shares with the others
RAY_MIB = 600  # of Ray's own processes, and the script's


@contextlib.contextmanager
def interrupts_deferred():
    """Let Ctrl-C wait: interrupted half-way, stopping Ray or replacing a checkpoint would leave a mess behind."""
    pending = []
    heard = [s for s in ENDING if signal.getsignal(s) is not signal.SIG_IGN]
    old = {s: signal.signal(s, lambda *_: pending.append(1)) for s in heard}
    try:
        yield
    finally:
        for s, handler in old.items():
            signal.signal(s, handler)
    if pending:
        raise KeyboardInterrupt


# ---------------------------------------------------------------------------------------------------------------------
# What the machine must offer
# ---------------------------------------------------------------------------------------------------------------------


def make_temporary_folder(prefix: str = "rlhf-") -> Path:
    """A new folder in $TMPDIR (else /tmp), for everything that a run needs while it runs.

    Raises Stop(MISSING) if it cannot be made, or is no place for Ray's sockets.
    """
    parent = Path(os.environ.get("TMPDIR") or "/tmp").absolute()
    # Ray's longest socket, as ray._private.node.Node makes it; mkdtemp adds 8 characters to the prefix.
    session = f"session_2026-01-01_00-00-00_000000_{os.getpid()}"
    length = len(os.fsencode(parent / f"{prefix}12345678" / session / "sockets" / "plasma_store"))
    refuse_unless(
        length <= SOCKET_PATH_BYTES,
        f"TMPDIR={parent} is {length - SOCKET_PATH_BYTES} bytes too long for the path of a Unix socket in it. "
        "Try: export TMPDIR=/tmp",
        MISSING,
    )
    fix = "Make room there, or try: export TMPDIR=/another/folder"
    require_writable(parent, f"The folder for temporary files, {parent}, cannot be used", fix, MISSING)
    free = shutil.disk_usage(parent).free / 2**20
    message = f"The folder for temporary files, {parent}, has {free:.0f} MiB free, and {ROOM_MIB} are needed. {fix}"
    refuse_unless(free >= ROOM_MIB, message, MISSING)
    return Path(tempfile.mkdtemp(prefix=prefix, dir=parent))


def require_writable(folder: Path, message: str, fix: str, code: int) -> None:
    """Raise Stop(code) unless a file can be written in this folder. It is tried: rights do not tell of full disks."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            file.write(bytes(4096))
    except OSError as error:
        raise Stop(f"{message} ({error.strerror}). {fix}", code) from None


def check_environment(processes: int) -> None:
    """Raise Stop(MISSING) for what a private Ray, with so many processes beside its own, would fail on."""
    home = Path(os.path.expanduser("~"))
    text = f"HOME={home} is not a folder that can be written: Ray and vLLM keep files there"
    require_writable(home, text, "Try: export HOME=/tmp", MISSING)
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname(), timeout=5).close()
    except OSError as error:
        text = f"There is no loopback network ({error.strerror or error}): all processes talk over 127.0.0.1"
        raise Stop(f"{text}. Try: ip link set lo up", MISSING) from None
    free = available_memory_mib()
    need = RAY_MIB + processes * PROCESS_MIB
    refuse_unless(
        free >= need,
        f"{free:.0f} MiB of memory are available, and {processes} processes with vLLM need {need}. "
        "End what fills it, raise the container's limit, or try: --num-gpus 1 --tensor-parallel-size 1",
        MISSING,
    )


def available_memory_mib() -> float:
    """MiB that new processes can have: of the machine, or of the container (cgroup v2 or v1) if that is less."""
    import psutil

    found = [psutil.virtual_memory().available]
    for names in (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")):
        limit, used = (Path("/sys/fs/cgroup") / name for name in names)
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
            # The page cache counts as used, but is given back when somebody needs the memory.
            stat = (used.parent / "memory.stat").read_text()
            cache = sum(int(n) for n in re.findall(r"^(?:in)?active_file (\d+)$", stat, re.MULTILINE))
            found.append(int(limit.read_text()) - int(used.read_text()) + cache)
    return min(found) / 2**20


# ---------------------------------------------------------------------------------------------------------------------
# Start and end
# ---------------------------------------------------------------------------------------------------------------------


def hear_signals_again() -> None:
    """Give Python's handlers their signals back: Ray's C++ part takes SIGTERM for itself, and would end the script."""
    for s in ENDING:
        signal.signal(s, signal.getsignal(s))


class Cluster:
    """Ray, private or at an address. `start` it once, `stop` it once; what was private is gone then, files and all."""

    def __init__(self, address: str | None = None):
        self.address = address
        self.others = set(os.listdir("/dev/shm"))  # what was there before
        self.not_ours = frozenset()  # children of this process that are nothing of Ray's
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None  # of ray.init
        self.started = threading.Event()  # ray.init has returned, or raised
        self.over = threading.Event()

    def start(self, deadline: tuple[float, float], to_wait_longer: str, **options) -> None:
        """ray.init(**options), until a deadline: (time on the monotonic clock, seconds that this gave).

        Raises Stop(FAIL) for a private Ray that does not start, or is late; Stop(MISSING) if there is none at the
        address; KeyboardInterrupt at once. Nothing is left of it then.

        ray.init runs in a thread, so that the main thread, which alone hears signals, can give up a start that hangs.
        Ray's Python part then leaves SIGTERM alone, which it takes in the main thread only; see hear_signals_again.
        """
        end, seconds = deadline
        self.not_ours = frozenset(children())
        if not self.address:
            adopt_orphans()
        self.thread = threading.Thread(target=self._hold_ray, args=(options,), name="ray", daemon=True)
        try:
            self.thread.start()
            while not self.started.wait(0.05):
                hear_signals_again()
                if time.monotonic() >= end:
                    found = f"Ray did not start within {seconds:g} s{stopped_processes()}"
                    raise Stop(f"{found}. To wait longer: {to_wait_longer}")
            hear_signals_again()
            if self.error and self.address:
                fix = "Try: ray start --head, export RAY_AUTH_MODE=token if it wants one, or leave out --ray-address"
                raise Stop(f"There is no Ray cluster at {self.address!r} ({first_line(self.error)}). {fix}", MISSING)
            if self.error:
                raise Stop(f"Ray did not start ({first_line(self.error)}){stopped_processes()}")
        except BaseException:
            with interrupts_deferred():
                self.stop()
            raise

    def _hold_ray(self, options: dict) -> None:
        try:
            import ray

            wait_for_gcs_in_python()
            ray.init(self.address or "local", **options)
        except BaseException as error:
            self.error = error
        self.started.set()
        # Linux kills Ray's processes together with the thread that started them (PR_SET_PDEATHSIG, prctl(2)).
        self.over.wait()

    def running(self) -> bool:
        return self.thread is not None and not self.over.is_set()

    def stop(self, files: set[str] = frozenset(), seconds: float = 10.0) -> None:
        """Leave the cluster; end it if it is private, and remove what its processes have in /dev/shm.

        files: names there that are known from before. seconds: that processes have to end by themselves.
        """
        import psutil

        if not self.running():
            return
        found = set(files)
        if self.started.wait(1) and not self.error:  # if ray.init needs just another moment, Ray can end as usual
            processes = children(self.not_ours)
            found.update(*(shared_memory_files(p.pid) for p in processes))
            sys.modules["ray"].shutdown()
            psutil.wait_procs(processes, timeout=seconds)
        elif not self.started.is_set():  # it raises SystemExit as soon as it is in Python code: it starts nobody else
            ident = ctypes.c_ulong(self.thread.ident)
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, ctypes.py_object(SystemExit))
        found |= end_children(seconds, self.not_ours)
        remove(found - self.others)
        if not self.started.wait(1) and hasattr(sys.modules.get("ray"), "shutdown"):
            atexit.unregister(sys.modules["ray"].shutdown)  # the thread is in C++, with a lock that this would wait for
        self.over.set()


def wait_for_gcs_in_python() -> None:
    """Let Ray's wait for gcs_server's port, 30 s in C++ with Python's lock held, leave this process to its signals.

    Before it, this waits for the same file (ray._private.node, start_gcs_server). A Ray without it needs nothing.
    """
    import ray._private.node as node

    in_cpp = getattr(node, "wait_for_persisted_port", None)
    if in_cpp is None or hasattr(in_cpp, "in_cpp"):
        return

    def wait(session_dir, node_id, port_name, timeout_ms=30_000, **rest):
        file = Path(session_dir) / node.get_port_filename(node_id, port_name)
        end = time.monotonic() + timeout_ms / 1000
        while not file.exists() and time.monotonic() < end:
            time.sleep(0.02)
        return in_cpp(session_dir, node_id, port_name, timeout_ms=min(timeout_ms, 1000), **rest)

    wait.in_cpp = in_cpp
    node.wait_for_persisted_port = wait


def stopped_processes() -> str:
    """Which of the script's children do not run, as in ": raylet (pid 12) is stopped"; else ""."""
    import psutil

    found = []
    for process in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.status() == psutil.STATUS_STOPPED:
                found.append(f"{process.name()} (pid {process.pid}) is stopped")
    return f": {', '.join(found)}" if found else ""


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"
