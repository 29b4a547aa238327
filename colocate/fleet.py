"""What a run does when a part of the layout is lost: how it notices, what it says, and how it goes on.

`Watch`     the processes that hold each part, and what has become of them.
`wait_for`  every wait for an actor: a deadline, and a look at the processes each second.
`Lost`      a training actor or an engine that has died, or did not answer in time.
`recover`   rebuilds it on its bundles, connects it, and pushes everything again. Called by `rlhf_colocate.learn` only.

An engine needs no state: a push brings it all there is. A trainer's state, which is the same in all replicas, comes
from a survivor or from the last --checkpoint, and all trainers start again from it: their process group cannot lose a
member, and so a recovery takes the path of --resume.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import re
import secrets
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from colocate.config import FAIL, MISSING, STAGES, Stop
from colocate.preflight import check_shared_memory
from colocate.watch import children, kill, remove, shared_memory_files

if TYPE_CHECKING:
    import psutil

    from colocate.report import Log
    from rlhf_colocate import Colocation

Part = tuple[str, int]  # ("training actor", 2) or ("engine", 0)
PING_S = 10.0  # enough for whoever is not stuck


def part_name(part: Part) -> str:
    return f"{part[0]} {part[1]}"


def names(parts) -> str:
    return " and ".join(map(part_name, sorted(parts)))


class Lost(Stop):
    """Parts of the layout that have died, or did not answer in time; the run can go on without them."""

    def __init__(self, parts: set[Part], message: str):
        super().__init__(message)
        self.parts = parts


@dataclasses.dataclass
class Member:
    """A process of a part. process: None where it is not a descendant of the script's (a cluster at --ray-address)."""

    part: Part
    role: str
    pid: int
    gpu: str
    process: psutil.Process | None

    def __str__(self) -> str:
        return f"{self.role} (pid {self.pid}{f' on {self.gpu}' if self.gpu else ''})"

    def state(self) -> str:
        """ "has ended", "is stopped" (by a signal or a debugger), or "": running, or of another host."""
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
    """The processes behind the parts of a layout, by the pids that they reported."""

    def __init__(self):
        self.members: list[Member] = []
        self.ray: list[Member] = []
        self.replacing: set[Part] = set()  # ended by `bury`; whoever takes their place is not ready yet
        self.files: dict[Part, set[str]] = {}  # in /dev/shm, noted early: the dead cannot name theirs any more
        self.loose: set[str] = set()  # the same, of processes that had not reported yet
        self.prefix = f"r{secrets.token_hex(4)}"  # of queues of engines; Python allows 9 characters
        self.others = set(os.listdir("/dev/shm"))  # what was there before

    def add(self, found: list[tuple[Part, str, int, str]]) -> None:
        """found: (part, role, pid, GPU or "")."""
        import psutil

        ours = {p.pid: p for p in psutil.Process().children(recursive=True)}
        self.members += [Member(part, role, pid, gpu, ours.get(pid)) for part, role, pid, gpu in found]
        self.note_files()

    def add_ray(self) -> None:
        """Watch a private Ray's own processes, too."""
        import psutil

        found = [(p.name(), p) for p in psutil.Process().children()]
        self.ray = [Member(("Ray", 0), f"Ray's {n}", p.pid, "", p) for n, p in found if n in ("gcs_server", "raylet")]

    def note_files(self) -> None:
        """Remember what the processes have in /dev/shm by now: vLLM's queues, and what torch keeps for CUDA IPC."""
        for member in self.members:
            if member.process:
                self.files.setdefault(member.part, set()).update(self.shared_memory_files(member.pid))

    def note_files_of_children(self) -> None:
        """The same for all processes, while they start and no part has reported its own."""
        for process in children():
            self.loose.update(self.shared_memory_files(process.pid))

    def all_files(self) -> set[str]:
        queues = {name for name in os.listdir("/dev/shm") if name.startswith(self.prefix)}
        return queues.union(self.loose, *self.files.values())

    def drop(self, part: Part) -> None:
        self.replacing.add(part)
        self.members = [m for m in self.members if m.part != part]

    def of(self, parts: set[Part]) -> list[Member]:
        return [m for m in self.members if m.part in parts]

    def ended(self) -> set[Part]:
        return {m.part for m in self.members if m.state() == "has ended"}

    def require_ray(self) -> None:
        """Raise Stop if Ray has lost one of its own: a call may hang then, and after a minute Ray ends the driver."""
        if gone := [f"{m} {m.state()}" for m in self.ray if m.state()]:
            raise Stop(f"lost Ray: {', '.join(gone)}; nothing can be rebuilt without it")

    def describe(self, parts: set[Part]) -> str:
        """The members whose state says why; all of them if none does."""
        members = self.of(parts)
        telling = [f"{m} {m.state()}" for m in members if m.state()]
        return ", ".join(telling or map(str, members)) or names(parts)

    def shared_memory_files(self, pid: int) -> set[str]:
        """Names in /dev/shm that a process of this run has mapped: queues of vLLM, buffers of NCCL.

        Neither what was there before nor what is in folders: models, checkpoints and packages may be kept there.
        """
        return shared_memory_files(pid) - self.others


def wait_for(colocation: Colocation, refs: list, parts: list[Part], what: str) -> list:
    """ray.get with the stage's deadline, one part per reference. The actor's own error in place of Ray's traceback.

    Raises Lost for parts that died or are late, and Stop for one whose method or constructor raised. Once a second it
    looks for itself whether all processes live: nobody tells the driver that a worker of vLLM's has died until vLLM
    gives up.
    """
    import ray

    deadline, seconds, stage = colocation.deadline()
    watch = colocation.watch
    try:
        while True:
            try:
                return ray.get(refs, timeout=max(0.0, min(1.0, deadline - time.monotonic())))
            except ray.exceptions.GetTimeoutError:
                watch.require_ray()
                if stage in ("start", "recover"):
                    watch.note_files_of_children()
                if watch.ended() or time.monotonic() >= deadline:
                    break
                busy = {part for part, ref in zip(parts, refs, strict=True) if not ray.wait([ref], timeout=0)[0]}
                colocation.log.waiting(stage or what, time.monotonic() - deadline + seconds, names(busy))
    except ray.exceptions.RayError as error:
        watch.require_ray()
        text = explain(error)
    else:
        text = ""
    answered = {part: error_of(ref) for part, ref in zip(parts, refs, strict=True) if ray.wait([ref], timeout=0)[0]}
    failed = {part for part, error in answered.items() if error}
    unborn = {part for part in failed if getattr(answered[part], "actor_init_failed", False)}
    died = {part for part in failed - unborn if isinstance(answered[part], ray.exceptions.RayActorError)}
    if unborn:  # its constructor raised: another one's would, too
        text = explain(answered[min(unborn)])
        code = MISSING if "is not handled" in text else FAIL  # a model that this script does not know: no failed check
        raise Stop(f"{names(unborn)} ({what}): {text}", code)
    # Ray's and vLLM's words for a process that has ended. They may come before the process is gone.
    told = re.search(r"connection error code|: cancelled$|Executor failed", text)
    lost = died | (find_lost(colocation, failed, PING_S if told and not died else 0) if text else watch.ended())
    if lost := lost or (failed if told else set()):  # the failed: of one that is starting, not all processes are known
        clear = not text or (told and any(m.state() for m in watch.of(lost)))
        raise Lost(lost, f"{what}: lost {names(lost)}: {watch.describe(lost)}" + ("" if clear else f" ({text})"))
    if text:  # its method raised, and all processes live
        raise Stop(f"{names(failed) or what} ({what}): {text}")
    late = set(parts) - answered.keys()  # nothing has ended or raised: the deadline
    if not late:  # they answered in the meantime
        return wait_for(colocation, refs, parts, what)
    stopped = {m.part for m in watch.of(late) if m.state()}  # the others may just be waiting for these
    late = stopped or late
    found = f"no answer from {names(late)} within {seconds:g} s: {watch.describe(late)}"
    flag = f"--stage-timeout {stage}=" if stage in STAGES else "--timeout "
    raise Lost(late, f"{what}: {found}" + ("" if stopped else f"; to wait longer, type {flag}{2 * seconds:g}"))


def require_alive(colocation: Colocation, what: str) -> None:
    """Raise Lost, or Stop for Ray itself, if a process has ended: a wait of less than a second does not look."""
    colocation.watch.require_ray()
    if lost := colocation.watch.ended():
        raise Lost(lost, f"{what}: lost {names(lost)}: {colocation.watch.describe(lost)}")


def error_of(ref) -> Exception | None:
    """What a call that is over has raised."""
    import ray

    try:
        ray.get(ref)
    except ray.exceptions.RayError as error:
        return error
    return None


def explain(error) -> str:
    """What an actor's exception says, out of the wrappings of Ray and vLLM."""
    import ray

    cause: BaseException = error
    while isinstance(cause, ray.exceptions.RayTaskError) and isinstance(cause.cause, BaseException):
        cause = cause.cause
    text = str(cause).strip()
    for wrapping in (
        r"Worker failed with error '(.*)', please check the stack trace",  # vLLM's, of an error in a worker
        r"Worker exit detail: (.*?)(?: Some common causes| There are some potential|$)",  # Ray's, of a dead process
    ):
        if inner := re.search(wrapping, text, re.DOTALL):
            text = inner[1]
    text = f"{type(cause).__name__}: {text}"
    if "Traceback" in text or "ray::" in text:  # of another process: keep what its exception says
        lines = text.splitlines()
        first = max(i for i, line in enumerate(lines) if i == 0 or re.match(r"[\w.]+(Error|Exception)\b", line))
        text = "\n".join(lines[first:])
    return " ".join(text.split())


def find_lost(colocation: Colocation, failed: set[Part], patience: float) -> set[Part]:
    """Parts with an ended process, and those that Ray knows to be dead. A busy one is not lost.

    failed: parts whose method raised; a stopped process of theirs will be why. patience: seconds to wait for the first.
    """
    until, lost = time.monotonic() + patience, set()
    while not lost:
        lost = colocation.watch.ended() | {m.part for m in colocation.watch.of(failed) if m.state()}
        lost |= ping(colocation, set(colocation.parts()) - lost, patience=2.0)[0]
        if time.monotonic() >= until:
            break
        time.sleep(0.1)
    return lost


def ping(colocation: Colocation, parts: set[Part], patience: float) -> tuple[set[Part], set[Part]]:
    """(those of the parts that Ray knows to be dead, those that do not answer within `patience` seconds).

    Parts that are being replaced are not asked, and nobody waits for one whose process has ended or is stopped.
    """
    import ray

    actors, until = colocation.parts(), time.monotonic() + patience
    waiting = {actors[part].__ray_ready__.remote(): part for part in parts - colocation.watch.replacing}
    dead, silent = set(), set()
    while waiting:
        timeout = max(0.0, min(1.0, until - time.monotonic()))
        answered, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=timeout)
        dead |= {waiting[ref] for ref in answered if isinstance(error_of(ref), ray.exceptions.RayActorError)}
        rest = {part for ref, part in waiting.items() if ref not in answered}
        late = time.monotonic() >= until
        silent |= rest if late else {m.part for m in colocation.watch.of(rest) if m.state()}
        waiting = {ref: part for ref, part in waiting.items() if part in rest - silent}
    return dead, silent


# ---------------------------------------------------------------------------------------------------------------------
# Recovery
# ---------------------------------------------------------------------------------------------------------------------


def recover(colocation: Colocation, lost: Lost, version: int, losses: list[dict], log: Log) -> tuple:
    """Rebuild what is lost, as often as --max-restarts allows, and bring the trainers' weights into all engines.

    version: the highest that was given out; losses: those of this run, to which this one is added.
    Returns (version, what `Colocation.push` and `Colocation.check_replicas` do, steps done, the last step's metrics).
    Raises Stop if there was a loss too many, or the trainers' state is lost with them.
    """
    allowed, stuck = colocation.config.max_restarts, colocation.state == "broken: learn failed"  # see `transition`
    before, say = colocation.saved, functools.partial(log, "lost")
    with tempfile.TemporaryDirectory(prefix="rlhf-colocate-") as scratch:  # for the trainers' state
        while True:
            losses.append({"lost": sorted(map(part_name, lost.parts)), "message": str(lost)})
            if len(losses) > allowed:
                used = f"{allowed} of --max-restarts {allowed} are used up" if allowed else "found --max-restarts 0"
                raise Stop(f"{lost}; {used}; to go on after a loss, type --max-restarts {len(losses)}") from None
            say(str(lost))
            version, start = version + 1, time.monotonic()  # never one that an engine may have seen
            try:
                with colocation.stage("recover"):
                    parts, silent = take_stock(colocation, lost.parts, stuck, say)
                if silent:
                    losses[-1]["lost"] = sorted(map(part_name, parts))
                    say(f"{names(silent)} did not answer, and count as lost, too")
                with colocation.stage("recover"):
                    push, digests = rebuild(colocation, parts, Path(scratch), version, say)
                    steps, metrics = colocation.on_trainers("progress")[0]
            except Lost as another:
                lost = another
                continue
            if not colocation.config.checkpoint:
                colocation.saved = before  # what was saved meanwhile goes with the folder
            seconds = losses[-1]["seconds"] = round(time.monotonic() - start, 3)
            count = f"restart {len(losses)} of {allowed}"
            say(f"recovered in {seconds:.1f} s, {count}: going on after step {steps} with version {version}")
            return version, push, digests, steps, metrics


def take_stock(colocation: Colocation, lost: set[Part], stuck: bool, say) -> tuple[set[Part], set[Part]]:
    """(all parts to rebuild, those among them that live but do not answer).

    The busy are waited for until the stage's deadline, as they may be all that is left of the trainers' state. Only
    where a trainer is lost in an optimizer step (`stuck`), the others do not get out of NCCL's all-reduce any more.
    """
    lost = lost | colocation.watch.ended() | colocation.watch.replacing
    rest = colocation.parts().keys() - lost
    trainers = {part for part in rest if part[0] == "training actor"}
    stuck = stuck and any(part[0] == "training actor" for part in lost)
    dead, silent = set(), set()
    for asked, patient in ((trainers, not stuck), (rest - trainers, True)):
        left = colocation.deadline()[0] - time.monotonic()
        patience = max(PING_S, left) if patient else PING_S
        found, busy = ping(colocation, asked, 1.0)
        if busy:
            say(f"waiting for {names(busy)}, {patience:.0f} s at most")
            found_later, busy = ping(colocation, busy, patience)
            found |= found_later
        dead, silent = dead | found, silent | busy
    return lost | dead | silent, silent


def rebuild(colocation: Colocation, parts: set[Part], scratch: Path, version: int, say) -> tuple[dict, dict[str, str]]:
    """Replace these parts, then go on as a step does after its training: wake up, (connect,) push."""
    bury(colocation, parts)
    trainers = {p for p in parts if p[0] == "training actor"}
    engines = {p for p in parts if p[0] == "engine"}
    for i, engine in enumerate(colocation.engines):
        if ("engine", i) in engines:
            continue
        try:
            colocation.ask([engine], "stand_by", colocation.config.sleep_level if trainers else 0)
        except Lost:
            raise
        except Stop as stop:  # a CUDA error that stays, for instance
            say(f"{stop}: it is rebuilt, too")
            engines.add(("engine", i))
            bury(colocation, {("engine", i)})
    if trainers:
        say(f"all training actors start again from {rescue(colocation, trainers, scratch, say)}")
        colocation.rebuild_trainers(colocation.saved)
    if engines:
        check_shared_memory(len(engines), FAIL)
        say(f"rebuilding {names(engines)}")
        colocation.rebuild_engines(sorted(i for _, i in engines))
    new = engines | {p for p in colocation.parts() if trainers and p[0] == "training actor"}
    say("rebuilt: " + ", ".join(f"{m.role} is pid {m.pid}" for m in colocation.watch.of(new)))
    colocation.on_trainers("restore", version)  # for the version: there is no noise to take back
    digests = colocation.check_replicas()
    colocation.state = "asleep"
    colocation.wake_up("weights")
    if colocation.config.push == "recorded":
        colocation.connect()
    push = colocation.push(version)
    colocation.wake_up("kv_cache")
    elements = colocation.require_elements(digests, "after a restart")
    say(f"{elements} parameter elements equal the trainers' bit for bit")
    return push, digests


def bury(colocation: Colocation, parts: set[Part]) -> None:
    """End what is left of these parts, and give back their GPU memory and their files in /dev/shm."""
    import psutil
    import ray

    watch = colocation.watch
    watch.note_files()
    processes = [m.process for m in watch.of(parts) if m.process]
    if parts & watch.replacing:
        kinds = (colocation.training_actor.__name__, colocation.engine_actor.__name__, "RayWorkerProc")  # vLLM's
        processes += half_started(colocation, *kinds)
    for part in parts:
        ray.kill(colocation.parts()[part])
    kill(processes)  # Ray asks a worker to leave first, and a stopped one never hears it
    left = colocation.deadline()[0] - time.monotonic()
    if alive := psutil.wait_procs(processes, timeout=max(PING_S, left))[1]:
        raise Stop(
            f"killed {names(parts)}, but found pid {', '.join(str(p.pid) for p in alive)} still there; their GPU "
            "memory is needed for those who take their place"
        )
    kept = {f for m in watch.members if m.part not in parts for f in watch.shared_memory_files(m.pid)}
    for part in parts:
        remove(watch.files.pop(part, set()) - kept)
        watch.drop(part)


def half_started(colocation: Colocation, *kinds: str) -> list[psutil.Process]:
    """Processes of actors of these classes that have not reported yet, so that the watch does not know them."""
    import psutil

    known, found = {m.pid for m in colocation.watch.members}, []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            title = " ".join(process.cmdline())  # Ray sets it: ray::CLASS, or ray::CLASS.METHOD
            if process.pid not in known and re.match(f"ray::({'|'.join(kinds)})\\b", title):
                found.append(process)
    return found


def rescue(colocation: Colocation, lost: set[Part], scratch: Path, say) -> str:
    """Let `colocation.saved` be the trainers' last state that can be had. Returns a name for where it is from.

    A survivor's is written to --checkpoint, where there is one: it is not lost, then, if the recovery fails.
    """
    alive = [i for i in range(len(colocation.trainers)) if ("training actor", i) not in lost]
    steps = {i: colocation.ask([colocation.trainers[i]], "progress")[0][0] for i in alive}
    for i in sorted(alive, key=steps.get, reverse=True):
        try:
            colocation.ask([colocation.trainers[i]], "weight_digests")  # raises if they are not finite
            colocation.save(Path(colocation.config.checkpoint or scratch / "saved-before"), by=i)
        except Lost:
            raise
        except Stop as stop:  # a CUDA error that stays, or a full disk
            say(f"{stop}: its state is not to be had")
        else:
            return f"training actor {i}'s state after step {steps[i]}"
    if colocation.saved:
        return f"the checkpoint {colocation.saved.name}"
    raise Stop(
        "no training actor is left, and no checkpoint was written: the optimizer's state is gone; to survive this, "
        "type --checkpoint DIR --checkpoint-every 10"
    )
