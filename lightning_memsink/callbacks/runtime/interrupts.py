"""Defers Ctrl-C until an update of the ledger is complete."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def interrupts_deferred() -> Iterator[None]:
    """Within, a SIGINT is deferred: its handler runs at the end.

    Half of an update is worse than none, because Lightning may save a checkpoint when it is interrupted. Does nothing
    outside the main thread, where no signal arrives, and where SIGINT is not handled in Python.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    frames: list[Any] = []
    signal.signal(signal.SIGINT, lambda number, frame: frames.append(frame))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if frames:
            handler(signal.SIGINT, frames[0])
