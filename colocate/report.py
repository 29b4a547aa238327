"""What the user sees of a run: lines, tables, the status on a terminal; --plot and --trace."""

from __future__ import annotations

import collections
import contextlib
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlhf_colocate import Colocation

START = time.perf_counter()
SILENCE_S = 30


class Log:
    """Tagged lines with the time since the start, a status line on a terminal, and how long each stage took."""

    def __init__(self):
        self.stages_s: dict[str, float] = {}
        self.spans: collections.deque = collections.deque(maxlen=10_000)  # for --trace, as `traced` notes them
        self.terminal = sys.stdout.isatty()
        self.colour = self.terminal and "NO_COLOR" not in os.environ
        self.bar = ""  # of the loop, in the status line
        self.said = START  # when the last line was printed

    def elapsed(self) -> float:
        """Seconds since the script started."""
        return time.perf_counter() - START

    def __call__(self, tag: str, text: str) -> None:
        mark = f"\033[36m[{tag}]\033[0m" if self.colour else f"[{tag}]"
        clear = "\r\033[K" if self.terminal else ""
        # In one piece, newline and all: Ray's threads print, too.
        print(f"{clear}{self.elapsed():7.1f}s {mark} {text}\n", end="", flush=True)
        self.said = time.perf_counter()

    def progress(self, done: int, total: int, phase: str) -> None:
        """A bar that the next line replaces; nothing where there is no terminal."""
        self.bar = f"[{'#' * (30 * done // total):.<30}] {done}/{total} "
        self._status(phase)

    def waiting(self, stage: str, seconds: float, parts: str) -> None:
        """A sign of life, each second on a terminal; elsewhere a line after every 30 seconds of silence."""
        text = f"{stage}: {seconds:.0f} s, waiting for {parts}"
        self._status(text)
        if not self.terminal and time.perf_counter() - self.said >= SILENCE_S:
            self("wait", text)

    def _status(self, text: str) -> None:
        if self.terminal:
            line = f"        {self.bar}{text}"[: shutil.get_terminal_size().columns - 1]
            print(f"\r\033[K{line}", end="", flush=True)

    @contextlib.contextmanager
    def stage(self, name: str, seconds: dict | None = None):
        """Time a stage; stages of the same name add up. seconds: take the time down there as well."""
        begun, start = time.time(), time.perf_counter()
        try:
            yield
        finally:
            took = time.perf_counter() - start
            self.stages_s[name] = round(self.stages_s.get(name, 0) + took, 3)
            self.spans.append((name, begun, took))
            if seconds is not None:
                seconds[name] = took


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


def describe_connect(connect: dict) -> str:
    workers = connect["workers"]
    copies, loaders = sum(w["copies"] for w in workers), sum(len(w["loaders"]) for w in workers)
    text = f"connected {len(workers)} workers in {connect['wall_ms']:.1f} ms: {copies} copies recorded"
    return text + (f", {loaders} weights go through vLLM's loaders at each push" if loaders else "")


def describe(verify: dict) -> dict[str, str]:
    """What each passed check has shown, in one line."""
    t, p, c, b = (verify[k] for k in ("transport", "placement", "changed", "behaviour"))
    processed = sum(p["processed"].values())
    placement = f"{p['checked']} parameter elements equal the trainers' bit for bit, {sum(p['padding'].values())} "
    placement += "are padding" + (f", {processed} are in a kernel's own layout and not comparable" if processed else "")
    if p["unknown"]:
        names = list(dict.fromkeys(where.split(" ", 1)[1] for where in p["unknown"]))
        placement += f", {sum(p['unknown'].values())} elements of {len(names)} parameters ({summary(names)}) are not "
        placement += "known to the layout and were not compared: vLLM's loaders wrote each exactly once"
    return {
        "transport": f"{t['checked']} tensors arrived with the trainers' digests",
        "placement": placement,
        "changed": f"every parameter of {c['checked']} workers differs from before",
        "behaviour": f"log-probabilities of {b['checked']} tokens: {b['mean_gap_nats']:.4f} nats from the trainers' "
        f"(tolerance {b['tolerance_nats']:g}), {b['moved_by_nats']:.4f} from the old weights'",
    }


def brief(completion: str | list[int]) -> str:
    """The first hundred characters of a completion, as Python writes it."""
    text = repr(completion)
    return text if len(text) <= 100 else text[:97] + "..."


def describe_step(row: dict, last: int) -> str:
    """One line: what was learned, and where the time went."""
    numbers = " ".join(f"{k} {row[k]:.4f}" for k in ("reward", "loss", "grad_norm", "kl", "ratio") if k in row)
    seconds = row["seconds"]
    times = " ".join(f"{k} {seconds[k]:.2f}" for k in ("rollout", "sleep", "train"))
    wake = seconds.get("wake", 0) + seconds.get("wake KV", 0)
    memory = " → ".join(f"{gib:.1f}" for gib in row["gpu_used_gib"] if gib)
    return (
        f"{row['step']:3}/{last} {numbers} gap {row['logprob_gap']:.4f} | {times} wake {wake:.2f} s, push "
        f"{row['push_ms']:.1f} ms | {row['tokens_per_s']:.0f} tokens/s" + (f" | GPU {memory} GiB" if memory else "")
    )


def plot_steps(rows: list[dict], path: str) -> None:
    """Reward, and seconds per phase, by step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (upper, lower) = plt.subplots(2, 1, sharex=True, figsize=(8, 5), layout="constrained")
    steps = [r["step"] for r in rows]
    upper.plot(steps, [r["reward"] for r in rows], ".-", color="#e07b39")
    upper.set_ylabel("mean reward")
    names = list(dict.fromkeys(name for r in rows for name in r["seconds"]))
    lower.stackplot(steps, [[r["seconds"].get(name, 0) for r in rows] for name in names], labels=names)
    lower.set(xlabel="step", ylabel="seconds")
    lower.legend(loc="upper right", fontsize=8)
    for axis in (upper, lower):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def write_trace(path: str, log: Log, colocation: Colocation) -> None:
    """All spans in Chrome's trace format: the driver, and for each GPU its trainer and its engine, as rows.

    https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
    """
    tp, events = colocation.config.tensor_parallel_size, []

    def add(pid: int, process: str, tid: int, thread: str, spans: list) -> None:
        for kind, name in (("process_name", process), ("thread_name", thread)):
            events.append({"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": {"name": name}})
        for name, start, seconds in spans:
            times = {"ts": round(1e6 * start), "dur": round(1e6 * seconds)}
            events.append({"ph": "X", "name": name, "pid": pid, "tid": tid, **times})

    add(0, "driver", 0, "phases", log.spans)
    engines = colocation.on_engines("trace")
    for gpu, spans in enumerate(colocation.on_trainers("trace")):
        add(gpu + 1, f"GPU {gpu}", 0, f"trainer {gpu}", spans)
        add(gpu + 1, f"GPU {gpu}", 1, f"engine {gpu // tp}, rank {gpu % tp}", engines[gpu // tp])
    Path(path).write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}) + "\n")
