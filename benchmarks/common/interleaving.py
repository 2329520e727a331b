"""Interleaved fits: each takes one step in turn, so that a change of the machine's speed affects all of them.

The speed of a shared processor varies for seconds at a time, by more than what is measured, so fits that run one after
the other can't be compared. Here each fit is a coroutine on one thread, which yields where its next batch begins.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

from greenlet import getcurrent, greenlet
from lightning.pytorch import Callback, LightningModule, Trainer

UNTIMED_STEPS = 5
"""First steps of a fit, which are left out: they allocate."""


class StepTimer(Callback):
    """Measures processor seconds of each step, and yields to the other fits between two steps.

    It must be the first of a Trainer's callbacks. A step then includes the hooks of the other callbacks, validations
    and the loading of the next batch; it excludes what callbacks do once, at the end of training.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start: float | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        self._stop()
        scheduler = getcurrent().parent
        if scheduler is not None:
            scheduler.switch()
        self._start = time.process_time()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._start is not None:
            self.seconds.append(time.process_time() - self._start)


Fit = Callable[[StepTimer], object]
"""Runs a whole ``Trainer.fit`` with the timer as its first callback."""


def interleave(fits: Mapping[str, Fit], seed: int) -> dict[str, list[float]]:
    """Seconds of each step of each fit, by name.

    In every round each fit takes one step, in an order drawn with ``seed``. The order in which they start is drawn too:
    where weights lie in memory affects the speed, and must not favour the same fit each time.
    """
    timers = {name: StepTimer() for name in fits}
    order = random.Random(seed)
    running = [(greenlet(fits[name]), timers[name]) for name in order.sample([*fits], len(fits))]
    for fit, timer in running:
        fit.switch(timer)  # up to its first batch
    while running := [each for each in running if not each[0].dead]:
        for fit, _ in order.sample(running, len(running)):
            fit.switch()
    return {name: timer.seconds for name, timer in timers.items()}


def seconds_per_step(fits: Sequence[Sequence[float]]) -> float:
    """Mean over steps of each step's median over repetitions of the same fit.

    Work that every repetition does at the same step, such as an evaluation, counts; an interruption of one does not.

    >>> seconds_per_step([[9.0] * 5 + [1.0, 3.0], [9.0] * 5 + [1.0, 3.0], [9.0] * 5 + [7.0, 3.0]])
    2.0
    """
    return statistics.fmean(
        statistics.median(step) for step in zip(*(fit[UNTIMED_STEPS:] for fit in fits), strict=True)
    )


def time_ratio(fits: Sequence[Sequence[float]], *plain: Sequence[Sequence[float]]) -> float:
    """Time of a step divided by that of a plain one; several plain fits are averaged, because they are noisy too."""
    return seconds_per_step(fits) / statistics.fmean(seconds_per_step(each) for each in plain)
