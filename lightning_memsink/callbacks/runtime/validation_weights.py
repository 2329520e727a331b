"""Controls are measured under the weights that train, whatever weights the validation runs under."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from lightning_utilities.core.rank_zero import WarningCache

from lightning_memsink._distributed import gather
from lightning_memsink._lightning import warn_once
from lightning_memsink.callbacks.runtime.control_messages import failed, not_repeatable, repeated
from lightning_memsink.callbacks.runtime.trained_weights import TrainedWeights
from lightning_memsink.callbacks.runtime.validation_replay import Step, replay, training_step, validation_step
from lightning_memsink.samples.control_table import ControlBatch, ControlTable

Abandon = Callable[[], object]


class ValidationWeights:
    """Keeps losses under other weights than those that train, such as averaged ones, out of the controls.

    The validation loop of fit is wrapped, so that the weights are known before any hook can change them. If the loop is
    seen to use others, its losses are dropped, and its batches are evaluated once more as soon as it has ended. From
    then on that is done before each validation, so that its hooks find the controls.
    """

    def __init__(self) -> None:
        self.records = True
        """Whether losses of the validation loop that runs now are to be collected as controls."""
        self.are_averaged = False
        """Whether the last validation ran under other weights; in a checkpoint, so that a resumed run does the same."""
        self._weights = TrainedWeights()
        self._callback: Callback | None = None
        self._loop: Any = None
        self._is_watching = True
        self._failure: Exception | None = None
        self._are_trained = True
        self._steps: list[Step] = []
        self._refusal = ""
        self._is_reported = False
        self._warnings = WarningCache()

    @property
    def repeats_training_steps(self) -> bool:
        """Whether controls are measured by ``training_step``, since ``validation_step`` itself uses other weights."""
        return self.are_averaged and bool(self._steps) and self._steps[0] is training_step

    def attach(self, trainer: Trainer, callback: Callback, controls: ControlTable, abandon: Abandon) -> None:
        """At the start of fit: wraps the validation loop, unless controls come from elsewhere.

        Args:
            trainer: whose model is complete.
            callback: collects controls in its validation hooks and calls `gather` at the end of them.
            controls: the table that they are written to.
            abandon: called after an exception in a step that ``callback`` has seen begin.
        """
        if self._callback is not None or controls.has_own_source:
            return
        self._weights.watch_training(trainer.lightning_module)
        self._callback, self._loop = callback, trainer.fit_loop.epoch_loop.val_loop
        self._steps = [validation_step]
        if trainer.lightning_module.automatic_optimization:
            self._steps.append(training_step)
        run = self._loop.run

        def run_watched() -> Any:
            return self._run(trainer, run, controls, abandon)

        vars(self._loop)["run"] = run_watched

    def watch(self, trainer: Trainer, pl_module: LightningModule, batch_idx: int) -> None:
        """Just before each validation step. Of every loader, the first batch is watched."""
        if self._callback is None or trainer.sanity_checking or not self._is_watching:
            return
        if batch_idx == 0 or not self._weights.is_watched:  # a validation that is resumed begins later
            self._weights.watch_validation(pl_module)

    def gather(self, collected: list[ControlBatch]) -> list[list[ControlBatch]]:
        """``collected`` of every process; nothing if they come from other weights in any of them."""
        every = gather((self._failure is None and not self._weights.differ(), collected))
        self._are_trained = all(are_trained for are_trained, _ in every)
        return [one for _, one in every] if self._are_trained else []

    def state_dict(self) -> dict[str, Any]:
        return {"are_averaged": self.are_averaged}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.are_averaged = state_dict.get("are_averaged", False)  # older checkpoints don't say

    def detach(self) -> None:
        """Restores the loop and removes all hooks."""
        self._weights.stop()
        self._weights = TrainedWeights()
        if self._loop is not None:
            vars(self._loop).pop("run", None)
        self._callback = self._loop = self._failure = None
        self._steps = []
        self.records = self._is_watching = True

    def _run(self, trainer: Trainer, run: Callable[[], Any], controls: ControlTable, abandon: Abandon) -> Any:
        """Runs the validation loop, and evaluates its batches before or after it where the loop itself can't."""
        module = trainer.lightning_module
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return run()
        self._weights.remember(module)
        trains = not trainer.fit_loop._skip_backward  # SWA ends with an epoch that only updates batch norm
        is_measured = trains and self.are_averaged and self._measure(trainer, controls, abandon)
        if is_measured:
            self._weights.remember(module)
        self.records = trains and not is_measured
        result = run()
        self.records = True
        self.are_averaged = any(gather(self._weights.differ()))
        if trains and self.are_averaged and not is_measured:
            if all(gather(self._weights.are_back(module))):
                self._measure(trainer, controls, abandon)
            else:
                self._refuse(trainer, controls, "these are not back when it ends")
        return result

    def _measure(self, trainer: Trainer, controls: ControlTable, abandon: Abandon) -> bool:
        """Evaluates the batches of the validation under the weights of now; False if that can't be done."""
        callback, module = self._callback, trainer.lightning_module
        assert callback is not None
        while self._steps:
            step = self._steps[0]
            self._weights.remember(module)
            self._is_watching = step is validation_step
            callback.on_validation_start(trainer, module)
            try:
                replay(trainer, module, step, callback)
            except Exception as error:  # an evaluation must not end the training
                self._failure = error
                abandon()
            callback.on_validation_end(trainer, module)
            failure, self._failure, self._is_watching = self._failure, None, True
            if self._are_trained:
                self._report()
                return True
            self._steps.pop(0)
            self._refusal = "validation_step itself uses the others" if failure is None else failed(step, failure)
        self._refuse(trainer, controls, self._refusal)
        return False

    def _report(self) -> None:
        if not self._is_reported:
            rank_zero_info(repeated())
        self._is_reported = True

    def _refuse(self, trainer: Trainer, controls: ControlTable, reason: str) -> None:
        """Says once that there are no controls, and leaves none of an earlier evaluation to be taken for these."""
        controls.latest, controls.latest_step = torch.full_like(controls.latest, torch.nan), -1
        warn_once(self._warnings, not_repeatable(trainer.lightning_module, reason), key="refused")
