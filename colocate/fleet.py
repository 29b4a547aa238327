"""Actors by name: one call to many, a deadline for the answers, an eye on the processes behind them.

`Fleet.ask` is `ray.get([actor.method.remote(...) for ...])` that never waits for good: it raises `Lost` for actors that
died or did not answer in time, and `Stop` with an actor's own error. Of the layout it knows names, of vLLM the texts of
its errors.
"""

from __future__ import annotations

import contextlib
import functools
import re
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from colocate import trace
from colocate.config import FAIL, MISSING, STAGES, Lost, Stop, refuse_unless
from colocate.watch import Watch, join_names

if TYPE_CHECKING:
    from colocate.report import Report

PING_S = 10.0  # enough for an actor that is not stuck
TOGETHER = ("train", "push", "verify")  # stages in which trainers may wait for one another
EXIT_CODES = {"NotHandled": MISSING}  # by the kind of an actor's error: this model cannot be pushed, no check failed
OUT_OF_MEMORY = {  # stage -> what to type
    "train": "--sleep-level 2 (unless it was 2), --tokens-per-micro-batch 1024, --gradient-checkpointing, or a lower "
    "--gpu-memory-utilization",
    **dict.fromkeys(("wake", "push"), "a lower --gpu-memory-utilization, or --offload-optimizer"),
}


class Fleet:
    """The actors of a run, by name.

    timeouts: {stage: seconds}, where they differ from `timeout`. watch: over this host, or over a cluster's nodes.
    """

    def __init__(self, report: Report, timeouts: dict[str, float], timeout: float, watch: Watch | None = None):
        self.report = report
        self.timeouts = timeouts
        self.timeout = timeout
        self.watch = watch or Watch()
        self.actors: dict[str, object] = {}
        self.reports: dict[str, list[dict]] = {}  # name -> one for each of its processes
        self.missing: set[str] = set()  # ended, and what takes their place has not reported yet
        self.stage_now = ""
        self.stage_began = 0.0

    # --- stages and deadlines

    @contextlib.contextmanager
    def stage(self, name: str):
        """Time a stage (see `Report.stage`), and let all waits within it end by its deadline."""
        before = (self.stage_now, self.stage_began)
        self.stage_now = name
        self.stage_began = time.monotonic()
        try:
            with self.report.stage(name):
                yield
        finally:
            self.stage_now, self.stage_began = before

    def deadline(self) -> tuple[float, float, str]:
        """(the present stage's end on the monotonic clock, seconds that it may take, the flag that changes them)."""
        stage = self.stage_now.split(" ")[0]  # "wake KV" has the time of "wake"
        seconds = self.timeouts.get(stage, self.timeout)
        flag = f"--stage-timeout {stage}=" if stage in STAGES else "--timeout "
        return (self.stage_began if stage else time.monotonic()) + seconds, seconds, flag

    # --- actors come and go

    def add(self, name: str, actor) -> None:
        """An actor that starts. Once it has answered, `note` its processes."""
        self.actors[name] = actor
        self.missing.add(name)

    def note(self, names: list[str], reports: list) -> None:
        """These actors are ready. Watch their processes, which they report as {"pid", "gpu"[, "tp_rank"]}.

        An actor with workers reports a list of them, each with the actor's own "engine_pid" in it.
        """
        found = []
        for name, report in zip(names, reports, strict=True):
            rows = report if isinstance(report, list) else [report]
            self.reports[name] = rows
            if "engine_pid" in rows[0]:
                found.append((name, name, rows[0]["engine_pid"], ""))
            for row in rows:
                role = f"{name} rank {row['tp_rank']}" if "tp_rank" in row else name
                found.append((name, role, row["pid"], row["gpu"]))
        self.watch.add(found)
        self.missing -= {*names}

    def end(self, names: set[str]) -> None:
        """End what is left of these actors, and give back their GPU memory and their files in /dev/shm."""
        import ray

        self.watch.choose(names, unreported=bool(names & self.missing))
        for name in names & self.actors.keys():
            ray.kill(self.actors.pop(name))
        # Ray asks a worker to leave first, and a stopped one never hears it.
        left = self.deadline()[0] - time.monotonic()
        if alive := self.watch.end(names, max(PING_S, left)):
            pids = ", ".join(map(str, alive))
            raise Stop(f"{join_names(names)} were killed, but pid {pids} is still there and keeps its GPU memory")
        self.missing |= names

    def forget(self, names: set[str]) -> None:
        """These have ended, and nothing takes their place."""
        self.missing -= names

    def close(self, polite: list[str], method: str) -> None:
        """Collect what --trace shows. Let the actors `polite` call `method`, as far as they can; then end all."""
        import ray

        if self.report.config.trace:
            self.report.actor_spans = self.ask_living([*self.actors], trace.spans_of)
        broken = self._broken()
        self.ask_living(polite, method)
        self.watch.kill(broken)
        for name in self.actors.keys() - broken:  # without a Ray that hears it, this might not return
            ray.kill(self.actors[name])

    def _broken(self) -> set[str]:
        """Actors that cannot be asked any more: of which a process has ended or is stopped, or all for want of Ray."""
        return {*self.actors} if self.watch.troubled_ray() else self.watch.troubled(self.actors)

    # --- asking them

    def ask(self, names: list[str], call: str | Callable, *args, each: list[tuple] | None = None, **options) -> list:
        """Let these actors do something, all at once. Their results in order.

        call: a method's name, or a function of an importable module: it gets the actor as its first argument.
        each: one tuple of arguments for each actor, in place of `args`.
        Raises Lost if one has died or the stage's deadline has passed, Stop with an actor's own error.
        """
        return self.begin(names, call, *args, each=each, **options)()

    def begin(
        self, names: list[str], call: str | Callable, *args, each: list[tuple] | None = None, **options
    ) -> Callable[[], list]:
        """`ask` in two halves: it returns at once, with a function that waits for the results."""
        each = each or [args] * len(names)
        refs = [self._call(name, call, *own, **options) for name, own in zip(names, each, strict=True)]
        what = call.__name__ if callable(call) else call
        if call == "collective_rpc":  # the method of its workers says more
            what = args[0].rpartition(":")[2]
        return functools.partial(self._wait, refs, names, what)

    @contextlib.contextmanager
    def meanwhile(self, names: list[str], call: str) -> Iterator[None]:
        """These actors do something while others, who are asked in the block, wait for it."""
        wait = self.begin(names, call)
        try:
            yield
        except Lost:
            raise
        except Stop:
            wait()  # their own error says more
            raise
        wait()

    def ask_living(self, names: list[str], call: str | Callable) -> dict[str, object]:
        """{actor: its result} of those of these actors that answer within PING_S. Raises nothing of theirs."""
        import ray

        able = self.actors.keys() - self._broken() - self.missing
        asked = {self._call(name, call): name for name in names if name in able}
        answered = ray.wait([*asked], num_returns=len(asked), timeout=PING_S)[0] if asked else []
        return {asked[ref]: ray.get(ref) for ref in answered if not error_of(ref)}

    def _call(self, name: str, call: str | Callable, *args, **options):
        """A reference to what the actor will return. call: as in `ask`."""
        actor = self.actors[name]
        if callable(call):
            return actor.__ray_call__.remote(call, *args, **options)
        return getattr(actor, call).remote(*args, **options)

    def require_alive(self, what: str) -> None:
        """Raise Lost, or Stop for Ray itself, if a process has ended: a wait of less than a second does not look."""
        self.watch.require_ray()
        if lost := self.watch.ended():
            raise self._lost(lost, f"{what}: lost {join_names(lost)}: {self.watch.describe(lost)}")

    def _lost(self, names: set[str], message: str) -> Lost:
        return Lost(names, message, during=self.stage_now)

    def _wait(self, refs: list, names: list[str], what: str) -> list:
        """ray.get with the stage's deadline, one actor per reference.

        Once a second it looks for itself whether all processes live: Ray does not tell the driver that a worker of
        vLLM's has died until vLLM gives up.
        """
        import ray

        deadline, seconds, flag = self.deadline()
        stage = self.stage_now
        watch = self.watch
        try:
            while True:
                try:
                    return ray.get(refs, timeout=max(0.0, min(1.0, deadline - time.monotonic())))
                except ray.exceptions.GetTimeoutError:
                    watch.require_ray()
                    if stage in ("start", "recover"):
                        watch.note_early_files()
                    if watch.ended() or time.monotonic() >= deadline:
                        break
                    busy = {n for n, ref in zip(names, refs, strict=True) if not ray.wait([ref], timeout=0)[0]}
                    self.report.waiting(stage or what, time.monotonic() - deadline + seconds, join_names(busy))
        except ray.exceptions.RayError as error:
            watch.require_ray()
            text = explain(error)
        else:
            text = ""
        errors = {n: error_of(ref) for n, ref in zip(names, refs, strict=True) if ray.wait([ref], timeout=0)[0]}
        failed = {n for n, error in errors.items() if error}
        failed_in_init = {n for n in failed if getattr(errors[n], "actor_init_failed", False)}
        died = {n for n in failed - failed_in_init if isinstance(errors[n], ray.exceptions.RayActorError)}
        if failed_in_init:  # another one's constructor would raise, too
            raise self._own_error(failed_in_init, what, explain(errors[min(failed_in_init)]))
        # Ray's and vLLM's words for a process that has ended. They may come before the process is gone.
        death_reported = re.search(r"connection error code|: cancelled$|Executor failed|ActorUnavailable", text)
        lost = died | watch.ended()
        if text:
            lost |= self._find_lost(failed, PING_S if death_reported and not died else 0)
        if not lost and death_reported:
            lost = failed  # one that is starting: not all its processes are known
        if lost:
            clear = not text or (death_reported and watch.troubled(lost))
            message = f"{what}: lost {join_names(lost)}: {watch.describe(lost)}" + ("" if clear else f" ({text})")
            raise self._lost(lost, message)
        if text:  # its method raised, and all processes live
            raise self._own_error(failed, what, text)
        late = {*names} - errors.keys()  # nothing has ended or raised: the deadline
        if not late:  # they answered in the meantime
            return self._wait(refs, names, what)
        stopped = watch.troubled(late)  # the others may just be waiting for these
        late = stopped or late
        found = f"no answer from {join_names(late)} within {seconds:g} s: {watch.describe(late)}"
        longer = "" if stopped else f". To wait longer: {flag}{2 * seconds:g}"
        raise self._lost(late, f"{what}: {found}{longer}")

    def _own_error(self, names: set[str], what: str, text: str) -> Stop:
        """What an actor's method raised, as a Stop."""
        kind = text.partition(":")[0]
        hint = OUT_OF_MEMORY.get(self.stage_now.split(" ")[0], "")
        if "out of memory" in text and hint:
            text = f"{text} Out of GPU memory in the stage {self.stage_now!r}. Try: {hint}"
        return Stop(f"{join_names(names)} ({what}): {text}", EXIT_CODES.get(kind, FAIL))

    # --- who is lost

    def find_all_lost(self, lost: Lost) -> set[str]:
        """All actors that have to be replaced: the lost, those that Ray knows to be dead, and those that do not answer.

        The busy are waited for until the stage's deadline: they may hold all that is left of the trainers' state. But
        an all-reduce with a missing peer hangs forever: if one was lost in a stage in which they do something together,
        or is lost while others are waited for, those that were in it have PING_S to answer.
        """
        for line in self.watch.settle():
            self.report("lost", line)
        gone = lost.names | self.watch.ended() | self.missing
        dead, busy = self._ping(self.actors.keys() - gone, 1.0)
        gone |= dead
        end = max(self.deadline()[0], time.monotonic() + PING_S)
        announced: set[str] = set()
        while busy:  # in turns of PING_S: who is stuck depends on who has been lost by then
            kinds = {name.split()[0] for name in gone if lost.during in TOGETHER}
            stuck = {name for name in busy if name.split()[0] in kinds}
            left = end - time.monotonic()
            if announced != (stuck or busy):
                announced = stuck or busy
                seconds = min(PING_S, left) if stuck else left
                self.report("lost", f"waiting for {join_names(announced)}, {seconds:.0f} s at most")
            dead, silent = self._ping(busy, min(PING_S, left))
            late = silent if left <= PING_S else silent & (stuck | self.watch.troubled(silent))
            if late:
                self.report("lost", f"{join_names(late)} did not answer, and count as lost, too")
            gone |= dead | late
            busy = silent - late
        return gone

    def _find_lost(self, failed: set[str], patience: float) -> set[str]:
        """Actors with an ended process, and those that Ray knows to be dead. A busy one is not lost.

        failed: actors whose method raised; a stopped process of theirs will be why. patience: seconds to wait for the
        first.
        """
        until = time.monotonic() + patience
        while True:
            lost = self.watch.ended() | self.watch.troubled(failed)
            lost |= self._ping(self.actors.keys() - lost, patience=2.0)[0]
            if lost or time.monotonic() >= until:
                return lost
            time.sleep(0.1)

    def _ping(self, names: Iterable[str], patience: float) -> tuple[set[str], set[str]]:
        """(those that Ray knows to be dead, those that do not answer within `patience` seconds).

        Actors that are being replaced are not asked, and one whose process has ended or is stopped is not waited for.
        """
        import ray

        until = time.monotonic() + patience
        waiting = {self.actors[name].__ray_ready__.remote(): name for name in {*names} - self.missing}
        dead: set[str] = set()
        silent: set[str] = set()
        while waiting:
            timeout = max(0.0, min(1.0, until - time.monotonic()))
            answered, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=timeout)
            dead |= {waiting[ref] for ref in answered if isinstance(error_of(ref), ray.exceptions.RayActorError)}
            rest = {name for ref, name in waiting.items() if ref not in answered}
            late = time.monotonic() >= until
            silent |= rest if late else self.watch.troubled(rest)
            waiting = {ref: name for ref, name in waiting.items() if name in rest - silent}
        return dead, silent


def require_restart(lost: Lost, restarts: int, allowed: int) -> None:
    """Raise Stop unless a run may go on after this loss, for which it needs so many restarts in all."""
    used = f"{allowed} of --max-restarts {allowed} are used up" if allowed else "--max-restarts is 0"
    refuse_unless(restarts <= allowed, f"{lost}; {used}. To go on after a loss: --max-restarts {restarts}", FAIL)


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
