"""What a run tells: lines, a status line, tables, the verdict, its exit code, all files (--output-json, --plot, ...).

Each fact is said once, by the method that is named after it: it prints the line and keeps the entry. Knows no actors.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from colocate import trace, trackers
from colocate.config import FAIL, INTERRUPTED, MISSING, PASS, USAGE, Config, Lost, Stop
from colocate.signals import end_by_interrupt, interrupts_deferred

START = time.perf_counter()
SILENCE_S = 30


def command_line(script: str, arguments: list[str]) -> str:
    """As a file may say it that is published: without folders."""
    return " ".join([f"python {script}", *(Path(a).name if "/" in a else a for a in arguments)])


class Report:
    """Of one run. `data` becomes --output-json."""

    def __init__(self, config: Config, argv: list[str] | None = None):
        self.config = config
        self.exit_code = PASS
        self.failure: BaseException | None = None  # the first that ended the run
        self.stages_s: dict[str, float] = {}
        self.spans: collections.deque[trace.Span] = collections.deque(maxlen=trace.LAST)  # of stages, for --trace
        self.actor_spans: dict[str, list[trace.Span]] = {}
        self.terminal = sys.stdout.isatty()
        self.colour = self.terminal and "NO_COLOR" not in os.environ
        self.bar = ""  # of the loop, in the status line
        self.said = START  # when the last line was printed
        self.step_seconds: dict[str, float] = {}  # of the stages of the present step
        self.rollout: dict | None = None  # what is known of a step before it is trained
        self.trackers: list[trackers.Tracker] = []  # of --report-to
        arguments = sys.argv[1:] if argv is None else argv
        self.data: dict = {
            "verdict": "FAIL",
            "command": command_line("rlhf_colocate.py", arguments),
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "config": {},
            "versions": {},
            "hardware": {},
            "placement": [],
            "pushes": [],
            "verify": {},
            "stages_s": self.stages_s,
        }
        self.settings(config)

    # --- lines and stages

    def elapsed(self) -> float:
        """Seconds since the script started."""
        return time.perf_counter() - START

    def __call__(self, tag: str, text: str) -> None:
        mark = f"\033[36m[{tag}]\033[0m" if self.colour else f"[{tag}]"
        clear = "\r\033[K" if self.terminal else ""
        # In one piece, newline and all: Ray's threads print, too.
        print(f"{clear}{self.elapsed():7.1f}s {mark} {text}\n", end="", flush=True)
        self.said = time.perf_counter()

    def waiting(self, stage: str, seconds: float, actors: str) -> None:
        """A sign of life, each second on a terminal; elsewhere a line after every 30 seconds of silence."""
        text = f"{stage}: {seconds:.0f} s, waiting for {actors}"
        self._status(text)
        if not self.terminal and time.perf_counter() - self.said >= SILENCE_S:
            self("wait", text)

    def _status(self, text: str) -> None:
        if self.terminal:
            line = f"        {self.bar}{text}"[: shutil.get_terminal_size().columns - 1]
            print(f"\r\033[K{line}", end="", flush=True)

    @contextlib.contextmanager
    def stage(self, name: str):
        """Time a stage; stages of the same name add up, over the run and over the present step."""
        if self.bar:
            self._status(name)
        begun = time.time()
        start = time.perf_counter()
        try:
            yield
        finally:
            took = time.perf_counter() - start
            self.stages_s[name] = round(self.stages_s.get(name, 0) + took, 3)
            self.step_seconds[name] = self.step_seconds.get(name, 0) + took
            self.spans.append((name, begun, took))

    def _last_ms(self) -> float:
        """Milliseconds of the stage that has just ended."""
        return 1e3 * self.spans[-1][2]

    def _part_of(self, stage: str, part: str, seconds: float) -> None:
        """So much of a stage was another one's, which went on inside an actor."""
        for times in (self.stages_s, self.step_seconds):
            times[stage] = round(times[stage] - seconds, 6)
            times[part] = round(times.get(part, 0) + seconds, 6)

    # --- the start

    def settings(self, config: Config) -> None:
        """The flags, with --dtype auto resolved. Of absolute paths the name alone: the file may be published."""
        self.config = config
        settings = dataclasses.asdict(config)
        self.data["config"] = {name: published(value) for name, value in settings.items()}

    def placed(self, config: Config) -> None:
        """The flags as they are once the nodes of a cluster are chosen."""
        if config.push != self.config.push and config.push == "gather":
            self("place", "--push auto: gather, since no node has room for all shards of a replica")
        self.settings(config)

    def track(self) -> None:
        """Begin to send metrics to --report-to. Before Ray: processes that are started later are ended with it."""
        self.trackers = trackers.start(self.config.report_to, self.data["config"])

    def notes(self, notes: list[str]) -> None:
        """What preflight has found that does not end the run."""
        for note in notes:
            self("preflight", note)

    def placement(self, rows: list[dict]) -> None:
        """Rows of `cluster.match_placement`. Only the first start's are told."""
        if self.data["placement"]:
            return
        self.data["placement"] = rows
        self("place", "verified by GPU UUID, both ways:")
        header = ["bundle", "trainer pid", "engine", "TP rank", "worker pid", "GPU", "node"]
        print_table(header[: len(rows[0])], [list(row.values()) for row in rows])

    def kept(self, engines: list[list[list[str]]]) -> None:
        """What `verify.first_look` has found on the engines' workers. Only the first start's is told."""
        names = list(dict.fromkeys(name for workers in engines for found in workers for name in found))
        if names and "kept" not in self.data:
            self.data["kept"] = names
            self("place", f"kept over a sleep, since no push brings it: {summary(names)}")

    # --- the push and its proof

    def connected(self, workers: list[dict]) -> None:
        """Right after the stage "connect", with what the workers replied."""
        first = "connect" not in self.data
        wall_ms = self._last_ms()
        self.data["connect"] = {"wall_ms": wall_ms, "workers": workers}
        copies = sum(w["copies"] for w in workers)
        loaders = sum(len(w["loaders"]) for w in workers)
        text = f"connected {len(workers)} workers in {wall_ms:.1f} ms: {copies} copies recorded"
        if loaders:
            text += f", {loaders} weights go through vLLM's loaders at each push"
        if first:
            self("push", text)

    def pushed(self, version: int, method: str, replies: list[dict]) -> dict:
        """Right after the stage "push", with what the engines replied.

        Returns {"version", "method", "wall_ms", "wake_ms", "wake_kv_ms", "reset_ms", "bytes", "workers"}: wall_ms
        without the waking up, which counts as the stages "wake" and "wake KV"; of that reset_ms are the prefix caches';
        bytes read (simple) or written (recorded), over all workers.
        """
        push = {"version": version, "method": method}
        slowest = max(replies, key=lambda reply: reply["wake_ms"] + reply["wake_kv_ms"])
        for stage, name in (("wake", "wake_ms"), ("wake KV", "wake_kv_ms")):
            push[name] = slowest[name]
            self._part_of("push", stage, slowest[name] / 1e3)
        workers = [worker for reply in replies for worker in reply["workers"]]
        push["wall_ms"] = self.push_ms = self._last_ms() - push["wake_ms"] - push["wake_kv_ms"]
        push["reset_ms"] = max(reply["reset_ms"] for reply in replies)
        push |= {"bytes": sum(worker["bytes"] for worker in workers), "workers": workers}
        if len(self.data["pushes"]) < 2:  # the proof's
            self.data["pushes"].append(push)
            size = f"{push['bytes'] / 1e6:.1f} MB into {len(push['workers'])} workers"
            self("push", f"version {push['version']}: {size} in {push['wall_ms']:.1f} ms")
        return push

    def replicas_equal(self, weights: int, replicas: int) -> None:
        """All weights, or pieces of them, were changed by noise, in all replicas alike."""
        self.data["verify"]["replicas"] = {"ok": True, "checked": weights * replicas, "wrong": []}
        alike = f", {replicas} replicas bitwise identical" if replicas > 1 else ""
        self("train", f"{weights} tensors changed by noise{alike}")

    def nodes(self, facts: dict[str, dict], differences: dict[str, list[str]]) -> None:
        """Of each new node of a cluster: what it has, and why it is not used, if it is not."""
        self.data.setdefault("nodes", {}).update(facts)
        for node, found in facts.items():
            free = [f"{gpu['free'] / 1024:.1f}" if gpu["free"] else "?" for gpu in found["gpus"]]
            gpus = f"{len(free)} x {found['gpus'][0]['name']} ({', '.join(free)} GiB free), " if free else ""
            driver = f"driver {found['driver']}, " if found["driver"] else ""
            self("preflight", f"{node}: {gpus}{driver}{found['memory_gib']:.1f} GiB of memory free")
        for node, lines in differences.items():
            for line in lines:
                self("preflight", f"{node} is not used: {line}")

    def checked(self, checks: dict[str, dict]) -> None:
        """Some of the proof's checks: {name: {"ok", "checked", "wrong", ...}}. `proven` raises if one has failed."""
        self.data["verify"] |= checks
        for name, check in checks.items():
            found = describe(name, check) if check["ok"] else f"FAILED: {summary(check['wrong'])}"
            self("verify", f"{name}: {found}")

    def proven(self, before: list[dict], after: list[dict], text: Callable) -> None:
        """before, after: samples with the old and the new weights, of each prompt one by each engine. text: decodes
        token ids.

        Raises Stop with all checks that have failed.
        """
        verify = self.data["verify"]
        if failed := [name for name, check in verify.items() if not check["ok"]]:
            raise Stop("; ".join(f"{name}: {summary(verify[name]['wrong'])}" for name in failed))
        self.data["first_verified_push_s"] = round(self.elapsed(), 3)
        n = self.config.num_engines
        pairs = list(zip(before[::n], after[::n], strict=True))[:2]
        self.data["samples"] = [{"old": text(old["tokens"]), "new": text(new["tokens"])} for old, new in pairs]
        for sample in self.data["samples"]:
            self("rollout", f"old weights {shorten(repr(sample['old']))}")
            self("rollout", f"new weights {shorten(repr(sample['new']))}")

    # --- the loop

    def loop(self, done: int, last: int) -> None:
        """The loop begins after so many steps, and ends after `last`."""
        self.data["steps"] = []
        self.data.setdefault("losses", [])  # one before it is in there
        self.first = done
        self.last = last
        self.step_seconds.clear()
        self._move_bar()

    def _move_bar(self) -> None:
        done = len(self.data["steps"])
        total = self.last - self.first
        self.bar = f"[{'#' * (30 * done // total):.<30}] {done}/{total} "
        if done:
            seconds = sum(sum(row["seconds"].values()) for row in self.data["steps"])
            self.bar += f"{self.data['steps'][-1]['tokens_per_s']:.0f} tokens/s, "
            self.bar += f"{seconds / done * (total - done) / 60:.1f} min left "

    def trains(self, choices: str) -> None:
        """How the trainers compute a step: what they chose when they began with the first."""
        if self.data.get("train") != choices:
            self.data["train"] = choices
            self("train", choices)

    def sleeps(self, level: int, found: str) -> None:
        """What --sleep-level auto has chosen for a step, and why. Each choice is told once."""
        told = self.data.setdefault("sleep_level_auto", {})
        if str(level) not in told:
            told[str(level)] = found
            self("sleep", f"{'engines sleep' if level else 'engines stay awake'} while trainers train: {found}")

    def sampled(self, step: int, samples: list[dict], text: Callable, gpu_used_gib: list[float]) -> None:
        """A rollout is rewarded; it will be trained on next. text: decodes token ids."""
        rewards = [s["reward"] for s in samples]
        tokens = sum(len(s["tokens"]) for s in samples)
        row = {"step": step, "reward": sum(rewards) / len(rewards), "tokens": tokens}
        row |= {"tokens_per_s": tokens / self.step_seconds["rollout"], "push_ms": self.push_ms}
        row |= means_of_rewards(samples) | {"equal_groups": equal_groups(rewards, self.config.group_size)}
        row |= {"gpu_used_gib": gpu_used_gib, "best": text(max(samples, key=lambda s: s["reward"])["tokens"])}
        self.rollout = row

    def evaluated(self, step: int, samples: list[dict], text: Callable) -> bool:
        """--eval-prompts were answered greedily after this step. Whether their reward is the best so far."""
        evals = [e for e in self.data.get("evals", []) if e["step"] < step]  # after a loss it may be done again
        rewards = [sample["reward"] for sample in samples]
        n = len(rewards)
        mean = sum(rewards) / n
        variance = sum((reward - mean) ** 2 for reward in rewards) / max(1, n - 1)
        row = {"step": step, "n": n, "reward": mean, "se": (variance / n) ** 0.5} | means_of_rewards(samples)
        # What a resumed run begins with is no progress of its own.
        best = all(mean > e["reward"] for e in evals) and bool(evals or not self.config.resume)
        shown = [{"prompt": text(s["prompt"]), "answer": text(s["tokens"]), "reward": s["reward"]} for s in samples[:8]]
        self.data["evals"] = [*evals, row | {"samples": shown}]
        self("eval", f"after step {step}: reward {mean:.4f} ± {row['se']:.4f} (standard error) of {n} prompts")
        self._note({"eval": row})
        self.step_seconds.pop("eval", None)
        return best

    def step(self, version: int, metrics: dict) -> None:
        """The step of the last rollout is trained. Raises Stop if trainers and sampler do not agree on it."""
        tolerance = self.config.gap_tolerance
        if not metrics["logprob_gap"] <= tolerance:
            gap = f"{metrics['logprob_gap']:.4f} nats from the sampler's, tolerance {tolerance:g}"
            raise Stop(f"logprobs: step {self.rollout['step']}: the trainers' log-probabilities are {gap}")
        row = self.rollout | {"version": version, **metrics, "seconds": dict(self.step_seconds)}
        self.step_seconds.clear()
        self.data["steps"].append(row)
        self._move_bar()
        self("step", describe_step(row, self.last))
        self._note(row)

    def verified(self, step: int, checks: dict) -> None:
        """The elements of the engines' weights are compared again. Raises Stop if one is wrong."""
        for name, check in checks.items():
            if not check["ok"]:
                raise Stop(f"{name}: step {step}: {summary(check['wrong'])}")
        elements = checks["placement"]["checked"]
        self("verify", f"step {step}: {elements} parameter elements equal the trainers' bit for bit")

    def learned(self, before: list[dict], after: list[dict], text: Callable) -> None:
        """What the loop has changed: of each prompt of the proof one sample, before it and after it."""
        rows = self.data["steps"]
        self.data["learned"] = [
            {"prompt": text(b["prompt"]), "before": text(b["tokens"]), "after": text(a["tokens"])}
            for b, a in zip(before, after, strict=True)
        ]
        rewards = [f"{row['reward']:.3f} in step {row['step']}" for row in (rows[0], rows[-1])]
        self("step", f"reward {', '.join(rewards)}")
        if losses := self.data["losses"]:
            self("lost", f"{len(losses)} of --max-restarts {self.config.max_restarts} were needed")
        for sample in self.data["learned"][:2]:
            self("rollout", f"before {shorten(repr(sample['before']))}")
            self("rollout", f"after  {shorten(repr(sample['after']))}")

    # --- losses

    def lost(self, loss: Lost) -> None:
        """`all_lost` and `goes_on` follow, if the run goes on."""
        self.data.setdefault("losses", []).append({"lost": sorted(loss.names), "message": str(loss)})
        self("lost", str(loss))
        self.lost_at = time.monotonic()

    def all_lost(self, names: set[str]) -> None:
        """Those of the last loss, and what else does not answer."""
        self.data["losses"][-1]["lost"] = sorted(names)

    def goes_on(self, step: int, version: int, metrics: dict) -> None:
        """After a loss the trainers are after this step, whose metrics these are. What follows it is done again."""
        losses = self.data["losses"]
        seconds = round(time.monotonic() - self.lost_at, 3)
        losses[-1]["seconds"] = seconds
        count = f"restart {len(losses)} of {self.config.max_restarts}"
        self("lost", f"recovered in {seconds:.1f} s, {count}: going on after step {step} with version {version}")
        self._note({"lost": losses[-1]["lost"], "back_to_step": step + 1})
        rows = self.data["steps"]
        rows[:] = [row for row in rows if row["step"] <= step]
        rolled_out = self.rollout and self.rollout["step"] == step
        if rolled_out and (not rows or rows[-1]["step"] < step):  # it was trained, but its metrics did not arrive
            self.step(version, metrics)
        self.step_seconds.clear()
        self._move_bar()

    # --- the end

    @contextlib.contextmanager
    def verdict(self):
        """PASS, or what a Stop, Ctrl-C or an error says: the last line, the exit code, and all files."""
        end_by_interrupt()
        verdict = "PASS"
        try:
            yield
        except BaseException as error:
            self.exit_code, verdict = self._judge(error)
            if self.config.verbose and not isinstance(error, (Stop, KeyboardInterrupt)):
                traceback.print_exception(error)
            if self.failure not in (None, error) and self.exit_code != INTERRUPTED:
                before = self._judge(self.failure)[1]
                verdict = f"FAIL: teardown: {verdict.removeprefix('FAIL: ')}; without that: {before}"
        if self.exit_code in (USAGE, MISSING):
            print(f"rlhf_colocate.py: error: {verdict.removeprefix('FAIL: ')}", file=sys.stderr)
            return
        with contextlib.suppress(KeyboardInterrupt), interrupts_deferred():  # there is nothing left to end
            verdict = self._write_files(verdict)
        mb = {"push": f"{sum(p['bytes'] for p in self.data['pushes']) / 1e6:.1f}"}
        print_table(["stage", "seconds", "MB"], [[k, f"{v:.2f}", mb.get(k, "")] for k, v in self.stages_s.items()])
        print(verdict, flush=True)

    def _judge(self, error: BaseException) -> tuple[int, str]:
        """(exit code, verdict) of what ended a run."""
        if isinstance(error, Stop):
            return error.code, f"FAIL: {error}"
        if isinstance(error, KeyboardInterrupt):
            return INTERRUPTED, "FAIL: interrupted"
        if not isinstance(error, Exception):
            raise error
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).name}:{last.lineno}"
        return FAIL, f"FAIL: {type(error).__name__}: {error} ({where}; --verbose shows the traceback)"

    def failing(self, error: BaseException | None) -> None:
        """Say at once what has gone wrong, since ending everything may take a while."""
        self.failure = error
        if error is None:
            return
        code, verdict = self._judge(error)
        if code == FAIL:
            with contextlib.suppress(OSError):  # the output is closed, as after `| head`
                self("fail", verdict)

    def _write_files(self, verdict: str) -> str:
        """Write what was asked for, with what data there is. Returns the verdict: FAIL if a file was not written."""
        files = {
            "plot": self._plot,
            "trace": self._trace,
            "report_to": self._report_to,
            "output_json": self._output_json,
        }
        for name, write in files.items():
            self.data["verdict"] = verdict
            path = getattr(self.config, name)
            try:
                if path:
                    write(path)
            except Exception as error:  # of the disk, or of matplotlib
                self.exit_code = self.exit_code or FAIL
                verdict = f"FAIL: --{name.replace('_', '-')} was not written ({error}); without that: {verdict}"
        return verdict

    def _plot(self, path: str) -> None:
        if self.data.get("steps"):
            plot_steps(self.data["steps"], path, self.data.get("evals", []))

    def _trace(self, path: str) -> None:
        trace.write(path, {"stages": self.spans} | dict(sorted(self.actor_spans.items())))

    def _report_to(self, names: str) -> None:
        for tracker in self.trackers:
            tracker.close()

    def _output_json(self, path: str) -> None:
        Path(path).write_text(json.dumps(self.data, indent=1) + "\n")

    def _note(self, line: dict) -> None:
        for tracker in self.trackers:
            tracker.log(line)
        if self.config.metrics:
            with open(self.config.metrics, "a") as file:
                file.write(json.dumps(line) + "\n")


def print_table(header: list[str], rows: list[list]) -> None:
    cells = [header, *[[str(c) for c in r] for r in rows]]
    widths = [max(len(r[i]) for r in cells) for i in range(len(header))]
    for r in cells:
        print("    " + "  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip())


def summary(wrong) -> str:
    """The first few offenders of a list of names, or of a dict {where: names}."""
    items = list(map(str, wrong))
    if isinstance(wrong, dict):
        items = [f"{k}: {summary(v) if isinstance(v, (dict, list)) else v}" for k, v in wrong.items()]
    return ", ".join(items[:3]) + (f" and {len(items) - 3} more" if len(items) > 3 else "")


def published(value: object) -> object:
    """A flag's value, of absolute paths the name alone."""
    if isinstance(value, tuple):
        return [published(one) for one in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def shorten(text: str) -> str:
    """At most a hundred characters of it."""
    return text if len(text) <= 100 else text[:97] + "..."


def short(value: object) -> str:
    """In one line of at most 100 characters; strings in quotes."""
    text = str(value) if isinstance(value, BaseException) else repr(value)
    return shorten(" ".join(text.split()))


def describe(name: str, check: dict) -> str:
    """What a passed check has shown, in one line."""
    checked = check["checked"]
    if name == "transport":
        return f"{checked} tensors arrived with the trainers' digests"
    if name == "changed":
        return f"every parameter of {checked} workers differs from before"
    if name == "beside":
        return f"{checked} buffers and other tensors of layers, which no push brings, are as at the first look"
    if name == "behaviour":
        gap = f"{check['mean_gap_nats']:.4f} nats from the trainers' (tolerance {check['tolerance_nats']:g})"
        return f"log-probabilities of {checked} tokens: {gap}, {check['moved_by_nats']:.4f} from the old weights'"
    text = f"{checked} parameter elements equal the trainers' bit for bit, {sum(check['padding'].values())} are padding"
    if processed := sum(check["processed"].values()):
        text += f", {processed} are in a kernel's own layout and not comparable"
    if unknown := check["unknown"]:
        names = list(dict.fromkeys(where.split(" ", 1)[1] for where in unknown))
        text += f", {sum(unknown.values())} elements of {len(names)} parameters ({summary(names)}) are not known to "
        text += "the layout and were not compared: vLLM's loaders wrote each exactly once"
    return text


def equal_groups(rewards: list[float], group_size: int) -> int:
    """How many groups have equal rewards: they teach nothing."""
    groups = [rewards[i : i + group_size] for i in range(0, len(rewards), group_size)]
    return sum(min(group) == max(group) for group in groups)


def means_of_rewards(samples: list[dict]) -> dict:
    """{"rewards": {function: mean of what it said}} where there are several."""
    said: dict[str, list[float]] = {}
    for sample in samples:
        for name, value in sample.get("rewards", {}).items():
            said.setdefault(name, []).extend([] if value is None else [value])
    means = {name: sum(values) / len(values) for name, values in said.items() if values}
    return {"rewards": means} if said else {}


def describe_step(row: dict, last: int) -> str:
    """One line: what was learned, and where the time went."""
    numbers = " ".join(f"{k} {row[k]:.4f}" for k in ("reward", "loss", "grad_norm", "kl", "ratio") if k in row)
    if row.get("equal_groups"):
        numbers += f" equal groups {row['equal_groups']}"
    seconds = row["seconds"]
    times = " ".join(f"{k} {seconds[k]:.2f}" for k in ("rollout", "sleep", "train"))
    wake = seconds.get("wake", 0) + seconds.get("wake KV", 0)
    memory = " → ".join(f"{gib:.1f}" for gib in row["gpu_used_gib"] if gib)
    return (
        f"{row['step']:3}/{last} {numbers} gap {row['logprob_gap']:.4f} | {times} wake {wake:.2f} s, push "
        f"{row['push_ms']:.1f} ms | {row['tokens_per_s']:.0f} tokens/s" + (f" | GPU {memory} GiB" if memory else "")
    )


def plot_steps(rows: list[dict], path: str, evals: list[dict] = ()) -> None:
    """Reward, in rollouts and in evaluations with their standard errors, and seconds per stage, by step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (upper, lower) = plt.subplots(2, 1, sharex=True, figsize=(8, 5), layout="constrained")
    steps = [r["step"] for r in rows]
    upper.plot(steps, [r["reward"] for r in rows], ".-", color="#e07b39")
    if evals:
        points = ([e["step"] for e in evals], [e["reward"] for e in evals], [e["se"] for e in evals])
        upper.errorbar(*points, fmt="s-", color="#4c566a", capsize=3, label="evaluation")
        upper.legend(loc="lower right", fontsize=8)
    upper.set_ylabel("mean reward")
    names = list(dict.fromkeys(name for r in rows for name in r["seconds"]))
    lower.stackplot(steps, [[r["seconds"].get(name, 0) for r in rows] for name in names], labels=names)
    lower.set(xlabel="step", ylabel="seconds")
    lower.legend(loc="upper right", fontsize=8)
    for axis in (upper, lower):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
