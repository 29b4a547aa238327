"""--trace: when each actor's methods ran, beside the driver's stages, as one timeline."""

from __future__ import annotations

import collections
import functools
import json
import time
from collections.abc import Iterable
from pathlib import Path

Span = tuple[str, float, float]  # what ran, seconds since the epoch when it began, seconds that it took
LAST = 10_000  # spans that an actor keeps of a long run


def traced(kind: type) -> type:
    """An actor's class whose public methods note when they ran."""
    methods = {name: method for name, method in vars(kind).items() if callable(method) and not name.startswith("_")}
    return type(kind.__name__, (kind,), {name: timed(name, method) for name, method in methods.items()})


def timed(name: str, method):
    """The method, which appends a Span to its object's `spans`."""

    @functools.wraps(method)
    def call(self, *args, **options):
        begun = time.time()
        try:
            return method(self, *args, **options)
        finally:
            spans = self.__dict__.setdefault("spans", collections.deque(maxlen=LAST))
            spans.append((args[0] if name == "collective_rpc" else name, begun, time.time() - begun))

    return call


def spans_of(actor) -> list[Span]:
    return list(actor.__dict__.get("spans", []))


def write(path: str, rows: dict[str, Iterable[Span]]) -> None:
    """Rows, by name, in Chrome's trace format (Perfetto, chrome://tracing).

    https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
    """
    events = []
    for number, (row, spans) in enumerate(rows.items()):
        events.append({"ph": "M", "name": "thread_name", "pid": 0, "tid": number, "args": {"name": row}})
        for name, start, seconds in spans:
            times = {"ts": round(1e6 * start), "dur": round(1e6 * seconds)}
            events.append({"ph": "X", "name": name, "pid": 0, "tid": number, **times})
    Path(path).write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}) + "\n")
