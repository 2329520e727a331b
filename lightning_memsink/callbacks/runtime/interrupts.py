"""Ctrl-C waits until what is being written to the ledger is whole."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def interrupts_deferred() -> Iterator[None]:
    """A SIGINT within takes effect at the end, as if it had come then.

    Half of an update is worse than none: Lightning may save a checkpoint on the way out. In other threads than the main
    one no signal arrives, and where SIGINT is not handled in Python there is nothing to defer.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    came: list[Any] = []
    signal.signal(signal.SIGINT, lambda number, frame: came.append(frame))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if came:
            before(signal.SIGINT, came[0])
