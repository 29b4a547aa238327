"""--trace: when each actor's methods ran, beside the driver's stages, as one timeline."""

from __future__ import annotations

import collections
import functools
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from colocate.fleet import Fleet

LAST = 10_000  # spans that an actor keeps of a long run


def traced(kind: type) -> type:
    """An actor's class whose public methods note when they ran."""
    methods = {name: method for name, method in vars(kind).items() if callable(method) and not name.startswith("_")}
    return type(kind.__name__, (kind,), {name: timed(name, method) for name, method in methods.items()})


def timed(name: str, method):
    """The method, which appends (name, seconds since the epoch, seconds) to its object's `spans`."""

    @functools.wraps(method)
    def call(self, *args, **options):
        begun = time.time()
        try:
            return method(self, *args, **options)
        finally:
            spans = self.__dict__.setdefault("spans", collections.deque(maxlen=LAST))
            spans.append((args[0] if name == "collective_rpc" else name, begun, time.time() - begun))

    return call


def spans_of(actor) -> list[tuple[str, float, float]]:
    return list(actor.__dict__.get("spans", []))


def write(path: str, stages: list[tuple[str, float, float]], fleet: Fleet) -> None:
    """A row for the driver and one for each actor, in Chrome's trace format (Perfetto, chrome://tracing).

    https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
    """
    names = sorted(fleet.actors)
    rows = [("stages", stages), *zip(names, fleet.ask(names, spans_of), strict=True)]
    events = []
    for number, (row, spans) in enumerate(rows):
        events.append({"ph": "M", "name": "thread_name", "pid": 0, "tid": number, "args": {"name": row}})
        for name, start, seconds in spans:
            times = {"ts": round(1e6 * start), "dur": round(1e6 * seconds)}
            events.append({"ph": "X", "name": name, "pid": 0, "tid": number, **times})
    Path(path).write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}) + "\n")
