"""Work on what a run has recorded, in a thread of its own, while the model trains."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

from lightning_memsink.callbacks.runtime.interrupts import interrupts_deferred

MOST = 1 << 22
"""Numbers, of all jobs that wait together: 32 MiB of tokens."""


class _Job(NamedTuple):
    run: Callable[[], Any]
    then: Callable[[Any], None]
    size: int


class BesideTraining:
    """Runs jobs in the order in which they were put, and hands their results to whoever put them.

    Results are handed on in the caller's thread, in the same order, when `collect` or `settle` is called: so the run's
    tables are written by the thread that trains, and at points that don't depend on how fast this one is. The thread
    lives as long as jobs wait for it. What a job raises is raised there.
    """

    _changed: threading.Condition
    _waiting: deque[_Job]
    _done: deque[tuple[_Job, Any, BaseException | None]]
    _thread: threading.Thread | None

    def __init__(self) -> None:
        self._begin()

    def put(self, run: Callable[[], Any], then: Callable[[Any], None], size: int) -> None:
        """Has ``run()`` called in the thread, and then ``then`` with its result.

        If jobs of more than `MOST` numbers wait, it waits for the thread, so that memory stays bounded.

        Args:
            run: reads nothing that the training may change.
            then: takes what ``run`` has returned.
            size: numbers that the job holds in memory.
        """
        with self._changed:
            while self._waiting and sum(job.size for job in self._waiting) + size > MOST:
                self._changed.wait()
            self._waiting.append(_Job(run, then, size))
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="memsink-beside-training", daemon=True)
                self._thread.start()

    def collect(self) -> None:
        """Hands on what is finished, whatever interrupts it. Waits for nothing."""
        if not self._done:
            return
        with interrupts_deferred():
            while self._done:
                job, result, error = self._done.popleft()
                if error is not None:
                    raise error
                job.then(result)

    def settle(self) -> None:
        """Returns when all jobs are finished, and their results handed on."""
        with self._changed:
            while self._waiting and self._thread is not None:
                self._changed.wait()
        while self._waiting:  # in a process that was forked while jobs waited
            self._run_one()
        self.collect()

    def clear(self) -> None:
        """Forgets all jobs but the one that runs, for which it waits."""
        with self._changed:
            while len(self._waiting) > 1:
                self._waiting.pop()
            while self._waiting and self._thread is not None:
                self._changed.wait()
        self._waiting.clear()
        self._done.clear()

    def __getstate__(self) -> dict[str, Any]:
        self.settle()
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._begin()

    def _begin(self) -> None:
        self._changed = threading.Condition()
        self._waiting, self._done, self._thread = deque(), deque(), None

    def _work(self) -> None:
        while True:
            self._run_one()
            with self._changed:
                if not self._waiting:
                    self._thread = None
                    self._changed.notify_all()
                    return

    def _run_one(self) -> None:
        job, result, failed = self._waiting[0], None, None
        try:
            result = job.run()
        except BaseException as error:
            failed = error
        with self._changed:
            self._done.append((job, result, failed))
            self._waiting.popleft()
            self._changed.notify_all()
