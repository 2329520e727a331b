"""Curves while training runs: every evaluation, to every logger."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning_utilities.core.rank_zero import WarningCache

from lightning_memsink._lightning import is_a, warn_once
from lightning_memsink.callbacks.runtime.checkpointing import restoring
from lightning_memsink.ledger import Ledger
from lightning_memsink.localization.history import EvaluationProfile
from lightning_memsink.reporting.localization_summary import series
from lightning_memsink.reporting.loggers.wandb_run import WandbRun
from lightning_memsink.reporting.mitigation_summary import action_series, side_by_side
from lightning_memsink.reporting.provenance import settings_of, versions
from lightning_memsink.reporting.scalars import (
    HasRungs,
    PlantedIds,
    Rung,
    measured_gaps,
    rungs_found,
    scalars,
    top_memorized,
)

MOST_ROWS = 1000


class LiveCurves(Callback):
    """Logs ``memsink/...`` to all loggers at each evaluation; to W&B also tables, histograms, and an alert at onset.

    What is logged is remembered in `history`, a row an evaluation, and written to the ledger. A logger that fails
    is named once, and training goes on.

    Args:
        rungs: samples planted on purpose and their twins, to draw loss curves of; by default those of a data
            module with a method `rungs()`, and without one, samples by number of exposures against all controls.
        top: memorized samples listed per evaluation, at most 1000.
        text: turns a sample id into text for the list. Without it no text leaves the machine.
    """

    def __init__(
        self, rungs: Sequence[Rung] | None = None, top: int = 20, text: Callable[[int], str] | None = None
    ) -> None:
        if not 0 <= top <= MOST_ROWS:
            raise ValueError(f"top is a number of samples from 0 to {MOST_ROWS}, but it is {top}.")
        self.rungs, self.top, self.text = rungs, top, text
        self.history: list[dict[str, float]] = []
        self._planted: list[PlantedIds] = []
        self._runs: dict[int, WandbRun] = {}
        self._config: dict[str, Any] = {}
        self._announced = False
        self._warnings = WarningCache()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        Ledger.of(trainer).history = self.history

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        ledger = Ledger.of(trainer)
        ledger.require(Ledger.losses, Ledger.controls, Ledger.flags, Ledger.onset)
        rungs = self.rungs
        source = trainer.datamodule  # type: ignore[attr-defined]
        if rungs is None and isinstance(source, HasRungs):
            rungs = source.rungs()
        self._planted = [PlantedIds.of(rung) for rung in rungs or ()]
        self._runs = {}
        self._config = {**settings_of(trainer.callbacks), "versions": versions()}  # type: ignore[attr-defined]
        self._tell(trainer, self._wandb_run)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._show(trainer)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Evaluations between validations are written in on_before_backward; this is the next hook nobody writes in.
        self._show(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._show(trainer)
        if not self.history:
            return
        ledger = Ledger.of(trainer)
        row, onset = self.history[-1], ledger.onset
        certificate = ledger.get(Ledger.certificate)

        def end(logger: Logger) -> None:
            run = self._wandb_run(logger)
            if run is not None:
                run.end(row, onset)
                if certificate is not None:
                    run.certificate(certificate)
                if ledger.get(Ledger.attribution) is not None and ledger.attribution.rows:
                    run.heat_map(ledger.attribution)

        self._tell(trainer, end)

    def state_dict(self) -> dict[str, Any]:
        return {"history": [dict(row) for row in self.history], "announced": self._announced}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        with restoring("LiveCurves"):
            self.history[:] = state_dict["history"]  # in place: some strategies restore after it was published
            self._announced = state_dict["announced"]

    def _show(self, trainer: Trainer) -> None:
        """The last evaluation, if it was not shown yet."""
        ledger = Ledger.of(trainer)
        flags = ledger.flags
        if not flags.evaluations or (self.history and flags.evaluations[-1].step <= self.history[-1]["step"]):
            return
        row = scalars(ledger.losses, ledger.controls, flags, ledger.onset, self._planted)
        done = action_series(ledger.interventions, int(row["step"]))
        if done:
            row |= done | side_by_side(row)
        if ledger.get(Ledger.extraction) is not None:
            row |= ledger.extraction.series(int(row["step"]))
        ledger.close(Ledger.attribution)
        spread = _spread(ledger)
        if spread is not None:
            row |= series(spread)
        self.history.append(row)
        if not trainer.is_global_zero:
            return
        if self._planted and not rungs_found(ledger.losses, self._planted):
            warn_once(
                self._warnings,
                "LiveCurves was given rungs, but none of their ids was seen in training. Ids of planted sequences are "
                "ids of their content: use LossTracker(identity='content').",
            )
        step = int(row["step"])
        onset = None if self._announced else ledger.onset
        self._announced = ledger.onset is not None

        def show(logger: Logger) -> None:
            run = self._wandb_run(logger)
            if run is None:
                logger.log_metrics({f"memsink/{name}": value for name, value in row.items() if name != "step"}, step)
            else:
                samples = top_memorized(ledger.losses, flags, step, self.top)  # here, where a failure ends no training
                run.evaluation(row, samples, measured_gaps(flags))
                if spread is not None:
                    run.layers(int(row["step"]), spread.shares)
                if onset is not None:
                    run.onset(onset)

        self._tell(trainer, show)

    def _wandb_run(self, logger: Logger) -> WandbRun | None:
        """What is logged to a W&B run, described to it at the first call; None for other loggers."""
        if not is_a(logger, WandbLogger):
            return None
        if id(logger) not in self._runs:
            self._runs[id(logger)] = WandbRun(logger.experiment, self._config, self.text)
        return self._runs[id(logger)]

    def _tell(self, trainer: Trainer, message: Callable[[Logger], object]) -> None:
        if not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            try:
                message(logger)
            except Exception as error:  # a full disk, a lost network: no logger is worth the training
                warn_once(
                    self._warnings,
                    f"{type(logger).__name__} failed to log what memsink found. Training goes on, and later "
                    f"evaluations try again without a warning. {type(error).__name__}: {error}",
                    key=type(logger).__name__,
                )


def _spread(ledger: Ledger) -> EvaluationProfile | None:
    """What the last evaluation found of layers, if anybody localizes."""
    if not ledger.get(Ledger.attribution) is not None:
        return None
    rows = ledger.attribution.rows
    return rows[-1] if rows and rows[-1].step == ledger.flags.evaluations[-1].step else None
