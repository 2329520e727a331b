"""How often a run will measure its controls, as its Trainer is set."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning.pytorch import Trainer

MANY = 10**6


@dataclass(frozen=True)
class EvaluationSchedule:
    """When controls are measured, from epoch ``first_epoch`` and step ``first_step`` on. None: unknown or unlimited."""

    epochs: int | None
    """``Trainer(max_epochs=)``."""
    steps: int | None
    """``Trainer(max_steps=)``, of the optimizer."""
    batches: int | None
    """Of an epoch, in each process."""
    accumulate: int | None = 1
    """Batches of an optimizer step; None under manual optimization."""
    every_epochs: int | None = 1
    """``Trainer(check_val_every_n_epoch=)``; None: batches are counted over all epochs."""
    every_batches: int | None = None
    """Between two validations; None: at the end of an epoch."""
    own_every: int | None = None
    """Optimizer steps between two evaluations of controls that are no validation set; None: they are one."""
    is_enabled: bool = True
    """Whether there are controls to be measured."""
    is_by_time: bool = False
    """Whether validations come by the clock."""
    first_epoch: int = 0
    first_step: int = 0

    @classmethod
    def of(cls, trainer: Trainer, own_every: int | None = None) -> EvaluationSchedule:
        """Of a Trainer whose loaders are set up, so from `on_train_start` on."""
        interval = trainer.val_check_batch
        is_manual = not trainer.lightning_module.automatic_optimization
        return cls(
            epochs=_limit(trainer.max_epochs),
            steps=_limit(trainer.max_steps),
            batches=_limit(trainer.num_training_batches),
            accumulate=None if is_manual else trainer.accumulate_grad_batches,
            every_epochs=trainer.check_val_every_n_epoch,
            every_batches=_limit(interval),
            own_every=own_every,
            is_enabled=own_every is not None or bool(trainer.enable_validation),
            is_by_time=own_every is None and getattr(trainer, "_val_check_time_interval", None) is not None,
            first_epoch=trainer.current_epoch,
            first_step=trainer.global_step,
        )

    @property
    def evaluations(self) -> int | None:
        """Number of evaluations if nothing ends the run before its time."""
        if not self.is_enabled:
            return 0
        if self.is_by_time:
            return None
        return self._of_own_controls() if self.own_every is not None else self._of_validation_set()

    @property
    def batches_in_all(self) -> int | None:
        """Number of batches that are trained on, in each process."""
        ends = self._ends()
        return None if ends is None else sum(ends)

    def _of_validation_set(self) -> int | None:
        if self.every_epochs is None and self.every_batches is not None:
            return None if self.batches_in_all is None else self.batches_in_all // self.every_batches
        ends = self._ends()
        if ends is None:
            return None
        every = self.every_epochs or 1
        each = [end for epoch, end in enumerate(ends, self.first_epoch + 1) if epoch % every == 0]
        if self.every_batches is not None:
            return sum(end // self.every_batches for end in each)
        return None if self.batches is None else sum(end == self.batches for end in each)

    def _of_own_controls(self) -> int | None:
        """At every ``own_every`` steps, and at the end of an epoch."""
        ends, every = self._ends(), max(1, self.own_every or 1)
        if ends is None or self.accumulate is None:
            return None
        step, count = self.first_step, 0
        for end in ends:
            after = step + math.ceil(end / self.accumulate)
            count += after // every - step // every + (after % every > 0)
            step = after
        return count

    def _ends(self) -> list[int] | None:
        """Batches of each epoch from now on; None if their number is unknown."""
        left = None if self.epochs is None else max(0, self.epochs - self.first_epoch)
        steps = None if self.steps is None or self.accumulate is None else max(0, self.steps - self.first_step)
        if self.batches is None:
            # a stream may end at any batch: only a limit on steps says how many come
            return None if steps is None else [steps * (self.accumulate or 1)]
        if steps is None:
            return None if left is None else [self.batches] * min(left, MANY)
        of_epoch = math.ceil(self.batches / (self.accumulate or 1))
        whole, rest = divmod(steps, of_epoch)
        if left is not None and left <= whole:
            return [self.batches] * min(left, MANY)
        return [self.batches] * min(whole, MANY) + [rest * (self.accumulate or 1)] * (rest > 0)


def _limit(number: float | int | None) -> int | None:
    """A limit of Lightning's; None for -1 and infinity, which are none."""
    return None if number is None or number < 0 or math.isinf(number) else int(number)
