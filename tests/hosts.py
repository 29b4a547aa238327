"""Hosts for a Ray cluster on one machine: Linux namespaces, joined by a bridge. For tests and benchmarks; needs root.

Each has its own network (10.77.0.N on eth0), process ids, hostname, /tmp and /dev/shm; they share disk and clock.
Nothing has a name outside: networks, mounts and processes of a host go when its first process ends, and that ends with
the program that made it, however that ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

from running import NOT_NICE

ROOT = Path(__file__).resolve().parent.parent
NETWORK = "10.77.0"
PORT = 6379
TOOLS = ("ip", "unshare", "nsenter", "mount")
SHM_MIB = 2048
FIRST = "echo; while :; do sleep 1000000 & wait; done"  # a host's first process: says that it is there, reaps orphans


def why_not() -> str:
    """Why hosts cannot be made here; "" if they can."""
    if os.geteuid() != 0:
        return "hosts of namespaces need root"
    if missing := [tool for tool in TOOLS if not shutil.which(tool)]:
        return f"hosts of namespaces need {', '.join(missing)}"
    kinds = ["--net", "--pid", "--mount", "--uts", "--ipc", "--fork"]
    bridge = ["ip", "link", "add", "bridge", "type", "bridge"]
    try:
        subprocess.run(["unshare", *kinds, *bridge], check=True, capture_output=True)
    except subprocess.CalledProcessError as error:
        return f"no namespaces with a bridge can be made here: {error.stderr.decode().strip()}"
    return ""


def die_with_parent() -> None:
    """For a child, before it begins: SIGKILL when the thread that started it ends (PR_SET_PDEATHSIG of prctl(2))."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)


class Namespaces:
    """A process in namespaces of its own, of these kinds."""

    def __init__(self, *kinds: str):
        self.kinds = kinds
        flags = [f"--{kind}" for kind in kinds]
        if "pid" in kinds:
            flags += ["--fork", "--kill-child", "--mount-proc"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        script = FIRST if "pid" in kinds else "echo; exec sleep infinity"
        self.outer = subprocess.Popen(["unshare", *flags, "sh", "-c", script], **pipes, preexec_fn=die_with_parent)
        self.outer.stdout.readline()
        self.pid = self.outer.pid  # of the first process inside, seen from outside
        if "pid" in kinds:
            self.pid = int(Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()[0])

    def command(self, *command: str) -> list[str]:
        """A command, to be run inside."""
        return ["nsenter", f"--target={self.pid}", *(f"--{kind}" for kind in self.kinds), "--", *command]

    def run(self, *command: str, **options) -> str:
        """Run a command inside; its standard output. Raises RuntimeError with what it said, if it fails."""
        done = subprocess.run(self.command(*command), capture_output=True, text=True, **options)
        if done.returncode:
            raise RuntimeError(f"{shlex.join(command)}: {done.stdout}{done.stderr}")
        return done.stdout

    def kill(self) -> None:
        """SIGKILL to all processes inside, at once."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self.outer.wait()
        self.outer.stdin.close()
        self.outer.stdout.close()


class Host(Namespaces):
    """address: its IP on the network of all hosts."""

    def __init__(self, number: int, switch: Namespaces):
        super().__init__("net", "pid", "mount", "uts", "ipc")
        self.number = number
        self.switch = switch
        self.name = f"host{number}"
        self.address = f"{NETWORK}.{number}"
        self.run("hostname", self.name)
        self.cover(Path("/dev/shm"), {}, f"size={SHM_MIB}m,mode=1777")
        ours = {path for path in (ROOT, Path(sys.prefix).resolve()) if path.is_relative_to("/tmp")}
        ours = {path: path for path in ours if not ours & {*path.parents}}  # what lies below another comes with it
        self.cover(Path("/tmp"), ours, "size=4096m,mode=1777", aside=Path("/dev/shm/kept"))
        switch.run("ip", "link", "add", self.name, "type", "veth", "peer", "name", "eth0", "netns", str(self.pid))
        switch.run("ip", "link", "set", self.name, "master", "bridge", "up")
        self.run("ip", "link", "set", "lo", "up")
        self.run("ip", "addr", "add", f"{self.address}/24", "dev", "eth0")
        self.run("ip", "link", "set", "eth0", "up")

    def cover(self, folder: Path, keep: dict[Path, Path], options: str, aside: Path = Path("/tmp/kept")) -> None:
        """Put an empty folder over this one, with nothing in it but `keep`: {where: what}.

        options: of tmpfs. aside: a folder that is not there, for the time in between.
        """
        places = {aside / str(i): where for i, where in enumerate(keep)}
        for place, what in zip(places, keep.values(), strict=True):
            self.run("mkdir", "-p", str(place))
            self.run("mount", "--bind", str(what), str(place))
        self.run("mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder))
        for place, where in places.items():
            self.run("mkdir", "-p", str(where))
            self.run("mount", "--move", str(place), str(where))
            self.run("rmdir", str(place))
        if places:
            self.run("rmdir", str(aside))

    def hide(self, folder: Path, *keep: str) -> None:
        """Put an empty folder over this one, with nothing in it but the folders `keep`."""
        kept = {folder / name: (folder / name).resolve() for name in keep if (folder / name).exists()}
        self.cover(folder, kept, "mode=1777")

    def cut(self) -> None:
        """Take its cable out."""
        self.switch.run("ip", "link", "set", self.name, "down")

    def join(self) -> None:
        """Put it back."""
        self.switch.run("ip", "link", "set", self.name, "up")

    def processes(self) -> dict[int, str]:
        """{pid inside: command line} of all."""
        code = "import json, psutil; found = psutil.process_iter(['cmdline']); "
        code += "print(json.dumps([[p.pid, ' '.join(p.info['cmdline'] or [])] for p in found]))"
        return dict(json.loads(self.run(sys.executable, "-c", code)))

    def left(self) -> list[str]:
        """What a run has here: processes, files in /dev/shm, temporary files. Ray's own are the cluster's."""
        processes = self.processes().values()
        ours = r"ray::(?!IDLE|\w*Agent\b)|.*rlhf_colocate|.*JANITOR"
        found = [text.strip() for text in processes if re.match(ours, text)]
        found += [f"/tmp/{name}" for name in self.list("/tmp") if name.startswith("rlhf-")]
        return found + [f"/dev/shm/{name}" for name in self.list("/dev/shm") if "plasma" not in name]

    def list(self, folder: str) -> list[str]:
        return self.run("ls", "-A", folder).split()


class Hosts:
    """So many hosts; host 1 is `hosts[0]`. `with Hosts(2) as hosts:` takes them away at the end."""

    def __init__(self, count: int):
        self.hosts: list[Host] = []
        self.switch = Namespaces("net")
        self.env = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid.uuid4().hex}  # of all that belongs to its cluster
        try:
            self.switch.run("ip", "link", "add", "bridge", "type", "bridge")
            self.switch.run("ip", "link", "set", "bridge", "up")
            for _ in range(count):
                self.add()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Hosts:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def __getitem__(self, number: int) -> Host:
        return self.hosts[number]

    def add(self) -> Host:
        self.hosts.append(Host(len(self.hosts) + 1, self.switch))
        return self.hosts[-1]

    def close(self) -> None:
        """End all their processes, and with them all else."""
        for host in self.hosts:
            host.kill()
        self.switch.kill()

    def start_ray(self, host: Host, num_gpus: int, env: dict[str, str] | None = None, *options: str) -> None:
        """`ray start` in a host: the head in the first one, which the others join."""
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", f"--node-ip-address={host.address}"]
        command += [f"--num-gpus={num_gpus}", "--num-cpus=1", f"--object-store-memory={128 * 2**20}"]
        if host is self.hosts[0]:
            command += ["--head", f"--port={PORT}", "--include-dashboard=false"]
        else:
            command.append(f"--address={self.address}")
        clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "RAY_ADDRESS", "TMPDIR")}
        clean |= self.env | {"RAY_USAGE_STATS_ENABLED": "0", **NOT_NICE}
        host.run(*command, *options, env=clean | (env or {}), cwd="/", timeout=120)

    @property
    def address(self) -> str:
        return f"{self.hosts[0].address}:{PORT}"

    def wait_for_gpus(self, count: int, seconds: float = 60) -> None:
        """Until Ray has so many. Raises TimeoutError."""
        code = (
            f"import ray; ray.init('{self.address}', log_to_driver=False); print(ray.cluster_resources().get('GPU', 0))"
        )
        end = time.monotonic() + seconds
        env = os.environ | self.env
        while float(self.hosts[0].run(sys.executable, "-c", code, cwd="/", env=env).split()[-1]) != count:
            if time.monotonic() > end:
                raise TimeoutError(f"the cluster did not come to {count} GPUs within {seconds:g} s")


class Run:
    """The script in the first host, as a user starts it there.

    folder: for its report, which all hosts see. at: [(a regular expression, what to do when a line matches it)], each
    once and in this order. seconds: after these, all hosts are ended.
    """

    def __init__(self, hosts: Hosts, folder: Path, *arguments: str, at: list[tuple] = (), seconds: float = 300):
        output = folder / "report.json"
        command = [sys.executable, str(ROOT / "rlhf_colocate.py"), "--output-json", str(output), *arguments]
        clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "RAY_ADDRESS", "TMPDIR")}
        env = clean | hosts.env | {"RAY_ADDRESS": hosts.address}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        self.waiting = list(at)
        self.lines: list[tuple[float, str]] = []  # when each came, on the monotonic clock
        with subprocess.Popen(hosts[0].command(*command), **pipes, env=env, cwd="/") as process:
            alarm = threading.Timer(seconds, hosts.close)
            alarm.daemon = True  # what is done at a line may raise
            alarm.start()
            for line in process.stdout:
                self.lines.append((time.monotonic(), line))
                print(line, end="", flush=True)
                if self.waiting and re.search(self.waiting[0][0], line):
                    self.waiting.pop(0)[1]()
            process.wait()
            alarm.cancel()
        self.code = process.returncode
        self.output = "".join(line for _, line in self.lines)
        self.report = json.loads(output.read_text()) if output.exists() else {}
