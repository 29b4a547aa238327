"""A private Ray, or yours: what it needs of the machine, how it starts, its bundles, how it ends. Knows no models.

`check_environment`  what a private Ray would stumble over, found before it starts.
`environment`        the variables of all its processes.
`Cluster`            ray.init with a deadline, which Ctrl-C can interrupt; leaves neither processes nor files.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import dataclasses
import os
import re
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from colocate.config import FAIL, MISSING, Config, Stop, refuse_unless, stage_timeouts
from colocate.nodes import ClusterWatch, Node, find_nodes, link, plan, require_room
from colocate.signals import hear_signals_again, interrupts_deferred
from colocate.watch import Watch, adopt_orphans, children, end_children, remove, shared_memory_files

ROOT = Path(__file__).resolve().parent.parent  # of rlhf_utils and this folder, which all processes import
MODULES = ("rlhf_colocate.py", "rlhf_utils.py", "colocate")  # what Ray carries to the nodes of a cluster
SOCKET_PATH_BYTES = 107  # sockaddr_un.sun_path is 108 bytes with the final zero (man 7 unix)
ROOM_MIB = 64  # for Ray's logs and vLLM's sockets; a short run takes 1
PROCESS_MIB = 400  # of a process that has imported torch and vLLM, without what it shares with the others
SPARE_S = 7 * 86_400  # that a process waits to be used
RAY_MIB = 600  # of Ray's own processes, and the script's


# ---------------------------------------------------------------------------------------------------------------------
# What the machine must offer
# ---------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def temporary_folder(prefix: str = "rlhf-"):
    """A new folder in $TMPDIR (else /tmp), for everything that a run needs while it runs. It goes with the run.

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
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


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
            # The page cache counts as used, but is given back when memory is needed.
            stat = (used.parent / "memory.stat").read_text()
            cache = sum(int(n) for n in re.findall(r"^(?:in)?active_file (\d+)$", stat, re.MULTILINE))
            found.append(int(limit.read_text()) - int(used.read_text()) + cache)
    return min(found) / 2**20


# ---------------------------------------------------------------------------------------------------------------------
# Start and end
# ---------------------------------------------------------------------------------------------------------------------


# Of trainers: Ray shows each its own GPU alone. Ray's other processes belong to engines, see `environment`.
TRAINER_ENV = {
    "env_vars": {
        "RLHF_COLOCATE_ROLE": "trainer",
        "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "0",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",  # else a pool of processes, for a handful of kernels
    },
}


def environment(config: Config, folder: Path, rehearsal: bool) -> dict[str, str]:
    """The variables of Ray's processes, which are an engine's unless told otherwise (TRAINER_ENV).

    folder: for vLLM's sockets.
    """
    longest = max([config.timeout, *stage_timeouts(config).values()])
    own = [] if address_of(config) else [str(ROOT)]  # on a cluster, Ray brings our modules
    env = {
        "PYTHONPATH": os.pathsep.join([*own, *filter(None, [os.environ.get("PYTHONPATH")])]),
        "RLHF_COLOCATE_ROLE": "engine",
        "VLLM_RPC_BASE_PATH": str(folder),
        # vLLM's own deadline for a forward pass, else 300 s: the driver's come first, and say which rank is late.
        "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": str(int(longest) + 60),
        "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1",  # as vLLM wants it for its workers
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",  # else 15: beside a busy program, actors would get a twentieth of a core
        "RAY_IGNORE_UNHANDLED_ERRORS": "1",  # those of actors that are given up need no traceback
        "HF_HUB_OFFLINE": "1",  # the model is a folder by now
    }
    if rehearsal:  # trainers and engines take turns, and share few cores
        threads = max(1, (os.cpu_count() or 1) // config.num_gpus)
        env |= {"OMP_NUM_THREADS": str(threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        env["TORCH_COMPILE_DISABLE"] = "1"  # else the first request compiles C++ for half a minute
    if config.master_interface:
        env |= dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), config.master_interface)
    return env


def address_of(config: Config) -> str | None:
    """Of the Ray cluster to use; None: a private one."""
    return config.ray_address or os.environ.get("RAY_ADDRESS")


def new_watch(config: Config) -> Watch | ClusterWatch:
    """Over the processes of this host, for a private Ray, or over those of a cluster's nodes."""
    return ClusterWatch() if address_of(config) else Watch()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("", 0))
        return s.getsockname()[1]


def free_address(_actor) -> str:
    """host:port on an actor's node."""
    import ray

    return f"{ray.util.get_node_ip_address()}:{free_port()}"


class Cluster:
    """Ray, private or at an address. `start` it once, `stop` it once; what was private is gone then, files and all."""

    def __init__(self, config: Config, folder: Path, rehearsal: bool, watch: Watch | ClusterWatch):
        self.config = config
        self.folder = folder
        self.rehearsal = rehearsal
        self.watch = watch
        self.address = address_of(config)
        self.check: Callable[[ClusterWatch, list[str]], dict] | None = None  # see `place`
        self.unfit: dict[str, list[str]] = {}  # node's id -> why it is not used
        self.places: dict[int, tuple] = {}  # bundle -> (placement group, index in it, Node or None)
        self.not_ours = frozenset()  # children of this process that are nothing of Ray's
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None  # of ray.init
        self.started = threading.Event()  # ray.init has returned, or raised
        self.over = threading.Event()

    def options(self, env: dict[str, str]) -> dict:
        """Of ray.init, for Ray's processes with these variables.

        A private Ray starts num_cpus processes ahead, at once and in parallel, and each imports colocate.preload, which
        imports vLLM. An actor gets one of them if its runtime_env is empty, like theirs: hence the variables go into
        os.environ, which Ray's processes inherit. Without this, vLLM's workers would start to import it only when the
        engine has.
        """
        config = self.config
        options = {"log_to_driver": config.verbose, "logging_level": "error"}
        if self.address:
            os.environ["RAY_IGNORE_UNHANDLED_ERRORS"] = env["RAY_IGNORE_UNHANDLED_ERRORS"]  # in this process, too
            modules = [str(ROOT / name) for name in MODULES]
            hook = "colocate.preload.prepare"
            runtime_env = {"env_vars": env, "worker_process_setup_hook": hook, "py_modules": modules}
            options["runtime_env"] = runtime_env | {"excludes": ["__pycache__"]}
            return options
        if self.rehearsal:
            os.environ.pop("CUDA_VISIBLE_DEVICES", None)  # Ray would count its entries; the GPUs here are logical ones
        # Ray listens on all interfaces, and takes 127.0.0.1 as _node_ip_address for the host's own address, unless
        # this is said, on Linux too, before it is imported (ray._private.services.get_node_ip_address).
        os.environ.update(env | {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"})
        return options | {
            "num_gpus": config.num_gpus if self.rehearsal else None,
            "num_cpus": config.num_engines + config.num_gpus,  # an engine's own process and its workers'
            "include_dashboard": False,
            "object_store_memory": 128 * 2**20,  # bytes; only small messages pass through it
            "_temp_dir": str(self.folder),
            "_system_config": {
                "preload_python_modules": ["colocate.preload"],
                # All at once. By itself Ray starts as many at a time as the host has cores; on two of them an engine's
                # third process would begin when the others are ready, with one core idle. They take longer so, on a
                # busy host more than Ray's 60 s, after which it starts them anew.
                "worker_maximum_startup_concurrency": config.num_engines + 2 * config.num_gpus,
                "worker_register_timeout_seconds": 240,
                # No record of every call, which only the dashboard and `ray list` read: each process would grow by 40
                # to 80 bytes per call (20,000 calls of a bare actor; with this they do not).
                "task_events_report_interval_ms": 0,
            },
        }

    def start(self, env: dict[str, str], deadline: tuple[float, float, str]) -> None:
        """ray.init, until a deadline: (time on the monotonic clock, seconds that this gave, the flag that sets them).

        env: variables of Ray's processes, beside those of `environment`. Raises Stop(FAIL) for a private Ray that does
        not start, or is late; Stop(MISSING) if there is none at the address; KeyboardInterrupt at
        once. Nothing is left of it then.

        ray.init runs in a thread, so that the main thread, which alone hears signals, can give up a start that hangs.
        Ray's Python part then leaves SIGTERM alone, which it takes in the main thread only; see hear_signals_again.
        """
        end, seconds, flag = deadline
        self.not_ours = frozenset(children())
        if not self.address:
            adopt_orphans()
        env = environment(self.config, self.folder, self.rehearsal) | env
        env["RLHF_COLOCATE_SHM"] = f"/{self.watch.prefix}"
        self.thread = threading.Thread(target=self._hold_ray, args=(self.options(env),), name="ray", daemon=True)
        try:
            self.thread.start()
            while not self.started.wait(0.05):
                hear_signals_again()
                if time.monotonic() >= end:
                    found = f"Ray did not start within {seconds:g} s{stopped_processes()}"
                    raise Stop(f"{found}. To wait longer: {flag}{2 * seconds:g}")
            hear_signals_again()
            if self.error and self.address:
                fix = "Try: ray start --head, export RAY_AUTH_MODE=token if it wants one, or leave out --ray-address"
                raise Stop(f"There is no Ray cluster at {self.address!r} ({first_line(self.error)}). {fix}", MISSING)
            if self.error:
                raise Stop(f"Ray did not start ({first_line(self.error)}){stopped_processes()}")
            if not self.address:
                self.watch.add_ray()
        except BaseException:
            with interrupts_deferred():
                self.stop()
            raise

    def _start_watchers(self, end: float) -> None:
        """A watcher on each node that has none, with a copy of the run's folder; and the check of what it has."""
        new = [node for node in find_nodes() if node.id not in self.watch.nodes]
        self.watch.start(new, self.folder, end - time.monotonic())
        if new:
            self.watch.spread(self.folder)
            self.unfit |= self.check(self.watch, [node.id for node in new])

    def _find_nodes(self) -> list[Node]:
        """Those that can be used."""
        bad = self.watch.gone.keys() | self.unfit.keys()
        return [node for node in find_nodes() if node.id not in bad]

    def _plan(self) -> list[tuple[Node, int]]:
        """Which nodes give how many GPUs. Raises Stop(MISSING), with every node's name, if there are not enough.

        Where no node has room for a replica's shards, --push auto becomes gather.
        """
        n = self.config.num_gpus
        nodes = self._find_nodes()
        choices = [self.config]
        if self.config.push == "auto":
            choices.append(dataclasses.replace(self.config, push="gather"))
        for config in choices:
            unit = config.gpus_of_one_node
            found = plan(nodes, n, unit, config.gpus_per_node)
            if sum(count for _, count in found) == n:
                self.config = config
                break
        reasons = [f"{self.watch.name(node)}: {line}" for node, lines in self.unfit.items() for line in lines]
        reasons += [f"{self.watch.name(node)}: {why}" for node, why in self.watch.gone.items()]
        require_room(found, nodes, n, unit, self.address, reasons)
        return found

    def place(self, deadline: tuple[float, float, str], check: Callable[[ClusterWatch, list[str]], dict]) -> Config:
        """Book the bundles, one per GPU: in one placement group, on a cluster in one on each node that is needed.

        check: says what is wrong with these nodes of a cluster, {node's id: lines}. Raises Stop(MISSING) if the GPUs
        do not come free in time, or there are too few on nodes that can be used. Returns the configuration, with --push
        auto resolved.
        """
        found = [(None, self.config.num_gpus)]
        if self.address:
            self.check = check
            self._plan()
            self._start_watchers(deadline[0])
            found = self._plan()
        first = 0
        for node, count in found:
            self._book(list(range(first, first + count)), node, deadline)
            first += count
        if self.config.push == "auto":
            self.config = dataclasses.replace(self.config, push="recorded")
        return self.config

    def _book(self, bundles: list[int], node: Node | None, deadline: tuple[float, float, str]) -> None:
        """A placement group with these bundles. node: where it has to be."""
        import ray
        from ray.util.placement_group import placement_group

        wanted = [{"GPU": 1} for _ in bundles]
        if node:
            wanted[0][f"node:{node.address}"] = 0.001  # the resource that Ray gives to a node, to be asked for by name
        group = placement_group(wanted, strategy="STRICT_PACK")
        self.places |= {bundle: (group, index, node) for index, bundle in enumerate(bundles)}
        end, seconds, _ = deadline
        while not group.wait(1):  # in steps: Ctrl-C is heard only between them
            if time.monotonic() < end:
                continue
            have, free = (
                {k: v for k, v in r().items() if k in ("CPU", "GPU")}
                for r in (ray.cluster_resources, ray.available_resources)
            )
            found = f"{len(bundles)} GPUs did not come free within {seconds:g} s" + (f" on {node}" if node else "")
            raise Stop(f"placement group: {found}; the cluster has {have}, of which free are {free}", MISSING)

    def seat(self, name: str, bundles: list[int]) -> tuple:
        """Where an actor goes that takes these bundles: (their placement group, their indices in it)."""
        group, _, node = self.places[bundles[0]]
        if node:
            self.watch.homes[name] = node.id
        return group, [self.places[bundle][1] for bundle in bundles]

    def keep_spares(self) -> str:
        """Let Ray start processes ahead on each node, up to --spare-processes. Waits for none.

        Returns why that cannot be done, or "". They are in Ray's pool: an actor with the same runtime_env gets one that
        has done its imports. One request starts no more of them than Ray does at a time. Ray's Python API has no word
        for it, so each raylet is asked over gRPC:
        https://github.com/ray-project/ray/blob/master/src/ray/protobuf/node_manager.proto
        """
        count = self.config.spares(self.rehearsal)
        if not count:
            return ""
        import ray

        nodes = {node["NodeID"]: f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}" for node in ray.nodes()}
        idle = self.watch.idle() if self.address else dict.fromkeys(nodes, self.watch.idle())
        try:
            from ray._private.grpc_utils import init_grpc_channel
            from ray._private.ray_constants import GLOBAL_GRPC_OPTIONS
            from ray._private.worker import global_worker
            from ray.core.generated import common_pb2, node_manager_pb2, node_manager_pb2_grpc

            request = node_manager_pb2.PrestartWorkersRequest(
                language=common_pb2.PYTHON,
                job_id=bytes.fromhex(ray.get_runtime_context().get_job_id()),
                keep_alive_duration_secs=SPARE_S,
            )
            job = global_worker.core_worker.get_job_config()  # built with another copy of the same definitions
            request.runtime_env_info.ParseFromString(job.runtime_env_info.SerializeToString())
            for node, ready in idle.items():
                request.num_workers = max(0, count - len(ready))
                with init_grpc_channel(nodes[node], GLOBAL_GRPC_OPTIONS) as channel:
                    node_manager_pb2_grpc.NodeManagerServiceStub(channel).PrestartWorkers(request, timeout=5)
        except Exception as error:  # it is no promise of Ray's: without it, the next recovery takes longer
            why = f"{error.code().name}: {error.details()}" if hasattr(error, "details") else first_line(error)
            return f"no spare processes: Ray {ray.__version__} could not be asked for them ({why})"
        return ""

    def move(self, deadline: tuple[float, float, str]) -> set[int]:
        """Book other GPUs for the bundles of nodes that are gone. Returns those for which there are none."""
        from ray.util.placement_group import remove_placement_group

        if not self.address:
            return set()
        gone = sorted(b for b, (_, _, node) in self.places.items() if node.id in self.watch.gone)
        for group in {self.places[bundle][0] for bundle in gone}:
            remove_placement_group(group)
        for bundle in gone:
            del self.places[bundle]
        if not gone:
            return set()
        self._start_watchers(deadline[0])
        nodes = self._find_nodes()
        held = Counter(node.id for _, _, node in self.places.values())
        for node, count in plan(nodes, len(gone), self.config.gpus_of_one_node, self.config.gpus_per_node, held):
            self._book(gone[:count], node, deadline)
            gone = gone[count:]
        return {*gone}

    def require_enough(self, missing: set[int]) -> None:
        """Raise Stop(FAIL) if the run may not go on without these bundles."""
        left = len(self.places)
        least = self.config.min_gpus or self.config.num_gpus
        nodes = ", ".join(f"{self.watch.name(node)}: {why}" for node, why in self.watch.gone.items())
        message = f"{left} GPUs are left of {left + len(missing)} ({nodes}), and no other node has {len(missing)} free"
        fix = f"Try: --min-gpus {left}, or a spare node" if left else "Try: a spare node"
        refuse_unless(left >= least and left > 0, f"{message}. {fix}", FAIL)

    def locate(self, rows: list[dict], names: list[str]) -> list[dict]:
        """Rows of `match_placement`, with the node of each of these trainers, if there are several nodes."""
        if not self.address:
            return rows
        nodes = [self.watch.name(self.watch.homes[name]) for name in names]
        return [row | {"node": node} for row, node in zip(rows, nodes, strict=True)]

    def call(self, function: Callable, *args) -> None:
        """Call a function on this host, or on all nodes that have bundles. Raises the Stop that it raises."""
        if not self.address:
            function(*args)
            return
        ids = {node.id for _, _, node in self.places.values()}
        for node, found in self.watch.ask("call", each=dict.fromkeys(ids, (function, *args)), seconds=60).items():
            if isinstance(found, Stop):
                raise Stop(f"{self.watch.name(node)}: {found}", found.code)

    def everywhere(self, folder: Path) -> Path:
        """A path at which all nodes see this folder of the driver's: its own on a shared disk, else that of copies."""
        if not self.address or not self.watch.blind(folder):
            return folder
        path = folder
        if not folder.is_relative_to(self.folder):
            path = self.folder / "copy"
            link(path, str(folder))
        self.watch.spread(path)
        return path

    def gather(self, folder: Path, names: list[str]) -> None:
        """Bring what these actors have written into a folder to the driver's host, unless all see the same disk."""
        for node in {self.watch.homes[name] for name in names} if self.address else ():
            self.watch.fetch(folder, node)

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

    def stop(self, seconds: float = 10.0) -> None:
        """Leave the cluster; end it if it is private, and remove what its processes have, or had, in /dev/shm.

        seconds: that processes have to end by themselves.
        """
        import psutil

        if not self.running():
            return
        found = self.watch.all_files()
        if self.address and self.started.is_set() and not self.error:
            self.watch.leave()
            for group in {
                group for group, _, _ in self.places.values()
            }:  # the next user of this cluster wants the GPUs
                sys.modules["ray"].util.remove_placement_group(group)
        if self.started.wait(1) and not self.error:  # if ray.init needs just another moment, Ray can end as usual
            processes = children(self.not_ours)
            found.update(*(shared_memory_files(p.pid) for p in processes))
            sys.modules["ray"].shutdown()
            psutil.wait_procs(processes, timeout=seconds)
        elif not self.started.is_set():  # raise SystemExit in it as soon as it is in Python code: it starts no more
            ident = ctypes.c_ulong(self.thread.ident)
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, ctypes.py_object(SystemExit))
        found |= end_children(seconds, self.not_ours)
        remove(found - self.watch.others)
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


def match_placement(trainers: list[list[dict]], engines: list[list[dict]]) -> list[dict]:
    """Join the reports of trainers and of engines' workers by GPU. Returns one row per bundle.

    Raises Stop unless each GPU has one trainer and one worker, of one torch version.
    """
    workers: dict[str, dict] = {}
    for e, ranks in enumerate(engines):
        for worker in ranks:
            if other := workers.get(worker["gpu"]):
                raise Stop(f"placement: engines {other['engine']} and {e} both have a worker on {worker['gpu']}")
            workers[worker["gpu"]] = {"engine": e, **worker}
    rows = []
    for bundle, (trainer,) in enumerate(trainers):
        gpu = trainer["gpu"]
        worker = workers.pop(gpu, None)
        if worker is None:
            raise Stop(f"placement: trainer {bundle} is on {gpu}, where no engine has a worker of its own")
        if worker["torch"].split("+")[0] != trainer["torch"].split("+")[0]:
            found = f"torch {trainer['torch']} in trainer {bundle} and {worker['torch']} in engine {worker['engine']}"
            raise Stop(f"placement: {found}. CUDA IPC handles differ between versions: install one of them in both")
        row = {"bundle": bundle, "trainer_pid": trainer["pid"], "engine": worker["engine"]}
        rows.append(row | {"tp_rank": worker["tp_rank"], "worker_pid": worker["pid"], "gpu": gpu})
    if workers:
        gpu, worker = next(iter(workers.items()))
        raise Stop(f"placement: engine {worker['engine']} has a worker on {gpu}, where there is no trainer")
    return rows
