"""Ctrl-C, SIGTERM and SIGHUP all end a run in the same way: by KeyboardInterrupt, when nothing is half done."""

from __future__ import annotations

import contextlib
import signal

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def end_by_interrupt() -> None:
    """Let each of them raise KeyboardInterrupt, unless the script was started to ignore it (nohup, a shell's `&`)."""
    for number in ENDING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)


def hear_signals_again() -> None:
    """Give Python's handlers their signals back: Ray's C++ part takes SIGTERM for itself, and would end the script."""
    for number in ENDING:
        signal.signal(number, signal.getsignal(number))


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
        if pending:  # also where what was done within has failed
            raise KeyboardInterrupt
