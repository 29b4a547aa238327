"""The nodes of a Ray cluster: what they have, where a layout goes on them, and a watcher on each.

The driver sees processes and files of its own host only. So an actor on each node with GPUs holds a `Watch` of that
node, and `ClusterWatch` hands the driver's questions to all of them. A node whose watcher has died, or has not answered
for HEARTBEAT_S, counts as gone, with all that was on it. Knows no models.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from colocate.config import MISSING, Lost, Stop, refuse_unless
from colocate.watch import Watch, join_names, kill, remove

if TYPE_CHECKING:
    import psutil

HEARTBEAT_S = 30.0  # a link may be cut for 20 s; Ray itself gives a silent node up after a minute or so
ANSWER_S = 1.0  # that the driver waits for watchers, each time it looks
WORK_S = 60.0  # for what takes them longer: ending processes, files
SILENCE = object()  # in place of an answer
CHUNK = 64 * 2**20  # bytes of a file that travel at once

WATCHER_ENV = {"env_vars": {"RLHF_COLOCATE_ROLE": "watcher"}}


@dataclasses.dataclass(frozen=True)
class Node:
    """A node with GPUs."""

    id: str
    address: str
    name: str
    gpus: int
    free: int

    def __str__(self) -> str:
        return self.address if self.name == self.address else f"{self.name} ({self.address})"


def find_nodes() -> list[Node]:
    """All living nodes that have GPUs, the head first, then by address."""
    import ray
    from ray._private.state import available_resources_per_node

    free = available_resources_per_node()
    found = []
    for node in ray.nodes():
        has = node["Resources"]
        if node["Alive"] and has.get("GPU"):
            left = free.get(node["NodeID"], {}).get("GPU", 0)
            names = (node["NodeManagerAddress"], node["NodeManagerHostname"])
            found.append(
                ("node:__internal_head__" not in has, Node(node["NodeID"], *names, int(has["GPU"]), int(left)))
            )
    return [node for _, node in sorted(found, key=lambda pair: (pair[0], pair[1].address))]


def plan(
    nodes: list[Node], count: int, unit: int, per_node: int | None = None, held: dict[str, int] | None = None
) -> list[tuple[Node, int]]:
    """So many GPUs on these nodes, of each a multiple of `unit`, which is never split over nodes. [(node, GPUs)].

    On one node if it has room for all, else on as few as possible. per_node: GPUs of a node, at most, with those that
    the run has there already, held: {node's id: GPUs}. Fewer than `count` in all, where there are not enough.
    """
    held = held or {}
    most = {node: per_node - held.get(node.id, 0) if per_node else node.free for node in nodes}
    room = {node: min(node.free, most[node]) // unit * unit for node in nodes}
    whole = [node for node in nodes if room[node] >= count]
    order = whole or sorted(nodes, key=lambda node: -room[node])  # stable: the head first, where they are alike
    found = []
    for node in order:
        if take := min(room[node], count):
            found.append((node, take))
            count -= take
    return sorted(found, key=lambda pair: nodes.index(pair[0]))


def require_room(
    found: list[tuple[Node, int]], nodes: list[Node], count: int, unit: int, address: str, reasons: list[str] = ()
) -> None:
    """Raise Stop(MISSING) unless `plan` has found so many GPUs. The message names every node.

    reasons: why others are not among them.
    """
    have = sum(take for _, take in found)
    free = sum(node.free for node in nodes)
    message = f"The Ray cluster at {address!r} has {free} free GPUs, and {count} are needed"
    if unit > 1:
        message += f", each {unit} on one node"
    message += "".join(f"; {node} has {node.free} of {node.gpus} free" for node in nodes)
    message += "".join(f"; {reason}" for reason in reasons)
    most = max([1, *(node.free for node in nodes)])
    smaller = f"--tensor-parallel-size (and --shard-size, unless --push gather) of {most} at most"
    fix = f"--num-gpus {have}" if have else smaller
    other = "wait for its other jobs, or leave out --ray-address"
    refuse_unless(have >= count, f"{message}. Try: {fix}, {other}", MISSING)


# ---------------------------------------------------------------------------------------------------------------------
# On each node
# ---------------------------------------------------------------------------------------------------------------------

# Ends what a run has left on a node once the watcher is gone, however it went: its standard input closes then. From
# there it has names of files in /dev/shm. It is no child of the watcher, since Ray ends those with it.
JANITOR = """# JANITOR
import os, sys
if os.fork():
    os._exit(0)
os.setsid()
from colocate.nodes import clean
clean(*sys.argv[1:], {*sys.stdin.read().split()})
"""


def marked(mark: str) -> list[psutil.Process]:
    """Processes of this host whose environment has this mark, but not this one."""
    import psutil

    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            # Ray writes its processes' titles over a part of their environment: the mark itself is looked for.
            environment = Path(f"/proc/{process.pid}/environ").read_bytes()
            if process.pid != os.getpid() and mark.encode() in environment:
                found.append(process)
    return found


def clean(mark: str, folder: str, files: set[str]) -> None:
    """End the processes of a run on this host, and remove its folder and its files in /dev/shm.

    files: those whose names do not begin with the mark.
    """
    import psutil

    end = time.monotonic() + 10
    while (found := marked(mark)) and time.monotonic() < end:
        kill(found)
        psutil.wait_procs(found, timeout=1)
    remove(files.union(name for name in os.listdir("/dev/shm") if name.startswith(mark)))
    shutil.rmtree(folder, ignore_errors=True)


class NodeWatch(Watch):
    """The watch over one node, in an actor there. The run's processes are those with its mark in their environment."""

    def __init__(self, mark: str, folder: str):
        super().__init__()
        self.prefix = mark
        self.folder = folder
        if os.path.exists(folder):  # the driver's own: this is its host
            self.folder = ""
        else:
            os.makedirs(folder)
        env = {name: value for name, value in os.environ.items() if mark not in value}
        env["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        command = [sys.executable, "-c", JANITOR, mark, self.folder]
        janitor = subprocess.Popen(command, stdin=subprocess.PIPE, env=env)
        self.lifeline = janitor.stdin  # closes with this process
        self.told: set[str] = set()  # of the files, the janitor
        janitor.wait()

    def note_files(self) -> None:
        super().note_files()
        self._tell_janitor()

    def note_early_files(self) -> None:
        super().note_early_files()
        self._tell_janitor()

    def _tell_janitor(self) -> None:
        new = self.all_files() - self.told
        self.told |= new
        self.lifeline.write("".join(f"{name}\n" for name in new).encode())
        self.lifeline.flush()

    def processes(self) -> list[psutil.Process]:
        return marked(self.prefix)

    def sign_of_life(self) -> bool:
        return True

    def call(self, function: Callable, *args):
        """function(*args) on this node, or the Stop that it raised."""
        try:
            return function(*args)
        except Stop as stop:
            return stop

    def list_files(self, folder: str) -> dict:
        return list_files(Path(folder))

    def read(self, path: str, offset: int) -> bytes:
        return read(Path(path), offset)

    def write(self, path: str, offset: int, data: bytes) -> None:
        write(Path(path), offset, data)

    def link(self, path: str, target: str) -> None:
        link(Path(path), target)

    def remove_folder(self, folder: str) -> None:
        shutil.rmtree(folder, ignore_errors=True)

    def leave(self) -> None:
        """End what is left of the run here."""
        import psutil

        # They have been told to end. Of one that something else ends sooner, Ray says that it died unexpectedly.
        psutil.wait_procs([m.process for m in self.members if m.process], timeout=3)
        clean(self.prefix, self.folder, self.all_files())


def list_files(folder: Path) -> dict[str, tuple[int, int] | str]:
    """{path in the folder: (bytes, when it was written, ns), or where a link leads}."""
    found: dict[str, tuple[int, int] | str] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = os.readlink(path)
        elif path.is_file():
            found[name] = (path.stat().st_size, path.stat().st_mtime_ns)
    return found


def read(path: Path, offset: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(CHUNK)


def write(path: Path, offset: int, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("r+b" if offset else "wb") as file:
        file.seek(offset)
        file.write(data)


def link(path: Path, target: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.symlink_to(target)


# ---------------------------------------------------------------------------------------------------------------------
# In the driver
# ---------------------------------------------------------------------------------------------------------------------


class ClusterWatch:
    """`Watch`, over the nodes of a cluster: each question goes to the watchers of all nodes at once.

    homes: {actor: node's id}; `Cluster` fills it.
    """

    def __init__(self):
        self.prefix = Watch().prefix
        self.others: set[str] = set()  # see NodeWatch: each node has its own
        self.nodes: dict[str, Node] = {}
        self.homes: dict[str, str] = {}
        self.gone: dict[str, str] = {}  # node's id -> why it counts as gone
        self._told: set[str] = set()  # which of them
        self._watchers: dict[str, object] = {}
        self._silent: dict[str, tuple[object, float]] = {}  # node's id -> (what it was asked, when)

    # --- nodes come and go

    def start(self, nodes: list[Node], folder: Path, seconds: float) -> None:
        """Start watchers on these nodes, which make the run's folder there. One that does not start in time is gone."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        signs = {}
        for node in nodes:
            here = NodeAffinitySchedulingStrategy(node.id, soft=False)
            options = {"num_cpus": 0, "num_gpus": 0, "scheduling_strategy": here, "runtime_env": WATCHER_ENV}
            # Its calls do not wait for one another: it may be ending processes while it is asked for a sign of life.
            actor = ray.remote(NodeWatch).options(**options, max_concurrency=4)
            self.nodes[node.id] = node
            self._watchers[node.id] = actor.remote(self.prefix, str(folder))
            signs[self._watchers[node.id].sign_of_life.remote()] = node.id
        late = ray.wait([*signs], num_returns=len(signs), timeout=max(0, seconds))[1] if signs else []
        self.gone |= {signs[ref]: "its watcher did not start in time" for ref in late}

    def ask(self, method: str, *args, each: dict[str, tuple] | None = None, seconds: float = ANSWER_S) -> dict:
        """{node's id: what its watcher returned}, of those that answer in time, and are not known to be gone.

        each: the nodes that are asked, with arguments of their own. Raises what a watcher raised.
        """
        import ray

        asked = {}
        for node, own in (each if each is not None else dict.fromkeys(self.nodes, args)).items():
            if node in self.gone:
                continue
            if node in self._silent and not self._answers_again(node):
                continue  # one question at a time waits for a node that does not answer
            asked[node] = getattr(self._watchers[node], method).remote(*own)
        ready = set(ray.wait([*asked.values()], num_returns=len(asked), timeout=seconds)[0]) if asked else set()
        answers = {node: self._answer(node, ref) if ref in ready else SILENCE for node, ref in asked.items()}
        for node, answer in answers.items():
            if answer is SILENCE and node not in self.gone:
                self._silent[node] = (asked[node], time.monotonic())
        return {node: answer for node, answer in answers.items() if answer is not SILENCE}

    def _answer(self, node: str, ref):
        """What a watcher has returned; SILENCE if it could not be reached. If it has ended, its node is gone."""
        import ray

        try:
            return ray.get(ref)
        except ray.exceptions.ActorUnavailableError:  # Ray's word for a connection that may come back
            return SILENCE
        except ray.exceptions.RayActorError:
            self._lose(node, "its watcher has ended")
            return SILENCE

    def _answers_again(self, node: str) -> bool:
        """Whether a silent node has answered by now. If it has not for HEARTBEAT_S, it is gone."""
        import ray

        ref, since = self._silent[node]
        if ray.wait([ref], timeout=0)[0]:
            if self._answer(node, ref) is not SILENCE:
                del self._silent[node]
                return True
            if node in self.gone:
                return False
            self._silent[node] = (self._watchers[node].sign_of_life.remote(), since)
        if time.monotonic() - since >= HEARTBEAT_S:
            self._lose(node, f"no answer for {HEARTBEAT_S:g} s")
        return False

    def settle(self) -> list[str]:
        """Wait until each node has answered, or counts as gone. Returns a line for each that is gone since the last."""
        self.ask("sign_of_life")
        while self._silent:
            time.sleep(0.2)
            self.ask("sign_of_life")
        new = [node for node in self.gone if node not in self._told]
        self._told.update(new)
        return [self._describe_gone(node) for node in new]

    def _describe_gone(self, node: str) -> str:
        return f"the node {self.name(node)} is gone ({self.gone[node]})"

    def _lose(self, node: str, why: str) -> None:
        self.gone[node] = why
        self._silent.pop(node, None)

    def name(self, node: str) -> str:
        return str(self.nodes[node])

    # --- what `Watch` has

    def _by_node(self, names: Iterable[str]) -> dict[str, set[str]]:
        found: dict[str, set[str]] = {}
        for name in names:
            if name in self.homes:
                found.setdefault(self.homes[name], set()).add(name)
        return found

    def _of_gone(self) -> set[str]:
        return {name for name, node in self.homes.items() if node in self.gone}

    def _out_of_reach(self) -> set[str]:
        return {name for name, node in self.homes.items() if node in self.gone or node in self._silent}

    def add(self, found: list[tuple[str, str, int, str]]) -> None:
        rows: dict[str, list] = {}
        for row in found:
            rows.setdefault(self.homes[row[0]], []).append(row)
        self.ask("add", each={node: (own,) for node, own in rows.items()}, seconds=WORK_S)

    def require_ray(self) -> None:
        """Ray itself ends a driver that has lost the head."""

    def troubled_ray(self) -> list:
        return []

    def choose(self, names: set[str], unreported: bool) -> None:
        asked = {node: (own, unreported) for node, own in self._by_node(names).items()}
        self.ask("choose", each=asked, seconds=WORK_S)

    def end(self, names: set[str], seconds: float) -> list[int]:
        asked = {node: (own, seconds) for node, own in self._by_node(names).items()}
        alive = [pid for pids in self.ask("end", each=asked, seconds=seconds + WORK_S).values() for pid in pids]
        if not alive:
            for name in names:
                self.homes.pop(name, None)
        return alive

    def kill(self, names: set[str]) -> None:
        self.ask("kill", each={node: (own,) for node, own in self._by_node(names).items()}, seconds=WORK_S)

    def drop(self, name: str) -> None:
        self.ask("drop", each={node: (name,) for node in self._by_node([name])}, seconds=WORK_S)

    def ended(self) -> set[str]:
        found = self.ask("ended").values()
        return self._of_gone().union(*found)

    def troubled(self, names: Iterable[str]) -> set[str]:
        asked = {node: (own,) for node, own in self._by_node(names).items()}
        found = self.ask("troubled", each=asked).values()
        return ({*names} & self._out_of_reach()).union(*found)

    def describe(self, names: Iterable[str]) -> str:
        texts = []
        by_node = self._by_node(names)
        told = self.ask("describe", each={node: (own,) for node, own in by_node.items()})
        for node in sorted(by_node, key=lambda node: (node not in self.gone, self.name(node))):
            if node in self.gone:
                texts.append(self._describe_gone(node))
            elif node in self._silent:
                texts.append(f"the node {self.name(node)} does not answer")
            else:
                texts.append(f"{told.get(node) or join_names(by_node[node])} on {self.name(node)}")
        telling = [text for text in texts if re.search(" has ended| is stopped| is gone| not answer", text)]
        return ", ".join(telling or texts)

    def note_files(self) -> None:
        self.ask("note_files")

    def note_early_files(self) -> None:
        self.ask("note_early_files")

    def all_files(self) -> set[str]:
        """None of this host: `leave` removes those of each node."""
        return set()

    def leave(self) -> None:
        """End what is left on all nodes, and remove its files."""
        self.ask("leave", seconds=WORK_S)

    def idle(self) -> dict[str, set[int]]:
        """{node's id: `Watch.idle`}."""
        return self.ask("idle")

    # --- files

    def fetch(self, folder: Path, node: str) -> None:
        """Bring a folder of a node to the same place here, and remove it there. Nothing to do on a shared disk.

        A new name tells whether it is one: what a network's disk says of files that others have written may be old.
        """
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder) as probe:
            seen = self.ask("call", each={node: (os.path.exists, probe.name)}, seconds=WORK_S)
        if seen.get(node):
            return
        answers = self.ask("list_files", each={node: (str(folder),)}, seconds=WORK_S)
        if node not in seen or node not in answers:  # what was written there is not whole without it
            names = {name for name, home in self.homes.items() if home == node}
            raise Lost(names, f"{self.name(node)} did not hand over {folder}", during="checkpoint")
        files = answers[node]
        for name, (size, _) in files.items():
            for offset in range(0, max(size, 1), CHUNK):
                data = self.ask("read", each={node: (str(folder / name), offset)}, seconds=WORK_S)
                if node not in data:
                    raise Stop(f"{self.name(node)} did not hand over {folder / name}")
                write(folder / name, offset, data[node])
        self.ask("remove_folder", each={node: (str(folder),)}, seconds=WORK_S)

    def blind(self, folder: Path) -> list[str]:
        """Nodes that do not see the very files of this folder."""
        files = list_files(folder)
        return [n for n, found in self.ask("list_files", str(folder), seconds=WORK_S).items() if found != files]

    def spread(self, folder: Path) -> None:
        """Copy a folder of this host to the same place on all nodes that do not see it.

        Links are made anew: what they lead to must be there.
        """
        to = dict.fromkeys(self.blind(folder))
        self.ask("remove_folder", each=dict.fromkeys(to, (str(folder),)), seconds=WORK_S)
        for name, found in list_files(folder).items():
            if isinstance(found, str):
                self.ask("link", each=dict.fromkeys(to, (str(folder / name), found)), seconds=WORK_S)
                continue
            for offset in range(0, max(found[0], 1), CHUNK):
                part = (str(folder / name), offset, read(folder / name, offset))
                self.ask("write", each=dict.fromkeys(to, part), seconds=WORK_S)
