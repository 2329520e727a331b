"""Whole fits side by side, a step of each in turn: a drift of the machine hits all alike, and within a step.

Fits one after the other see different machines: where a processor is shared, its speed wanders by more than what is
measured, for seconds on end. Here each fit is a coroutine on the one thread, and gives way where its next batch begins.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

from greenlet import getcurrent, greenlet
from lightning.pytorch import Callback, LightningModule, Trainer

UNTIMED_STEPS = 5
"""Steps that do not count: the first ones allocate."""


class StepTimer(Callback):
    """Processor seconds of each step of a fit. The first of a Trainer's callbacks: hooks of the others, validations
    and the next batch's loading lie within a step; what others do once, at the end of training, lies without."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start: float | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        self._stop()
        others = getcurrent().parent
        if others is not None:
            others.switch()
        self._start = time.process_time()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._start is not None:
            self.seconds.append(time.process_time() - self._start)


Fit = Callable[[StepTimer], object]
"""A whole ``Trainer.fit``, whose first callback is the one given."""


def interleave(fits: Mapping[str, Fit], seed: int) -> dict[str, list[float]]:
    """Seconds of each step of each fit. In every round each of them takes one, in an order drawn with ``seed``, as is
    the one in which they begin: whose weights lie where in memory is luck, and must be nobody's for good."""
    turns = {name: StepTimer() for name in fits}
    order = random.Random(seed)
    running = [(greenlet(fits[name]), turns[name]) for name in order.sample([*fits], len(fits))]
    for one, turn in running:
        one.switch(turn)  # up to its first batch
    while running := [each for each in running if not each[0].dead]:
        for one, _ in order.sample(running, len(running)):
            one.switch()
    return {name: turn.seconds for name, turn in turns.items()}


def seconds_per_step(fits: Sequence[Sequence[float]]) -> float:
    """Seconds a step, of the same fit repeated: of each step the median over the repetitions, and then their mean.

    So what comes at certain steps only, as an evaluation does, counts; what comes from outside does not.

    >>> seconds_per_step([[9.0] * 5 + [1.0, 3.0], [9.0] * 5 + [1.0, 3.0], [9.0] * 5 + [7.0, 3.0]])
    2.0
    """
    return statistics.fmean(
        statistics.median(step) for step in zip(*(fit[UNTIMED_STEPS:] for fit in fits), strict=True)
    )


def time_ratio(fits: Sequence[Sequence[float]], *plain: Sequence[Sequence[float]]) -> float:
    """Time of a step by that of a plain one: the mean of all that are given, for what is divided by is noisy, too."""
    return seconds_per_step(fits) / statistics.fmean(seconds_per_step(each) for each in plain)
