"""Scalars, tables and histograms of every evaluation, in every logger, during training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from lightning_utilities.core.rank_zero import WarningCache

from lightning_memsink._lightning import warn_once
from lightning_memsink.callbacks.runtime.checkpointing import restoring
from lightning_memsink.extraction.canaries import CanaryGroup, HasCanaryGroups
from lightning_memsink.ledger import Ledger
from lightning_memsink.localization.history import EvaluationProfile
from lightning_memsink.reporting.localization_summary import series
from lightning_memsink.reporting.loggers import logged_run
from lightning_memsink.reporting.loggers.logged_run import LoggedEnd, LoggedEvaluation, LoggedRun
from lightning_memsink.reporting.mitigation_summary import action_series, side_by_side
from lightning_memsink.reporting.provenance import settings_of, versions
from lightning_memsink.reporting.scalars import PlantedIds, any_known, scalars

MOST_ROWS = 1000


class LiveCurves(Callback):
    """Logs ``memsink/...`` to all loggers at each evaluation; to W&B also tables, histograms, and an alert at onset.

    `history` keeps what is logged, one row per evaluation, and is published in the ledger. If a logger fails, a warning
    names it once and training goes on.

    Args:
        rungs: groups of planted samples and their twins, to log loss curves of: `CanaryGroup`, or anything with
            ``name``, ``repeats``, ``ids`` and ``twin_ids``. By default those of a data module with a method `rungs()`;
            without one, curves are by number of exposures, beside that of all controls.
        top: memorized samples listed per evaluation, at most 1000.
        text: turns a sample id into text for the list. Without it no text leaves the machine.
    """

    saves_samples = True

    def __init__(
        self, rungs: Sequence[CanaryGroup] | None = None, top: int = 20, text: Callable[[int], str] | None = None
    ) -> None:
        if not 0 <= top <= MOST_ROWS:
            raise ValueError(f"top is a number of samples from 0 to {MOST_ROWS}, but it is {top}.")
        self.rungs, self.top, self.text = rungs, top, text
        self.history: list[dict[str, float]] = []
        self._planted: list[PlantedIds] = []
        self._runs: dict[int, LoggedRun] = {}
        self._config: dict[str, Any] = {}
        self._announced = False
        self._warnings = WarningCache()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        Ledger.of(trainer).history = self.history

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        ledger = Ledger.of(trainer)
        ledger.require(Ledger.losses, Ledger.controls, Ledger.flags, Ledger.onset)
        groups = self.rungs
        source = trainer.datamodule  # type: ignore[attr-defined]
        if groups is None and isinstance(source, HasCanaryGroups):
            groups = source.rungs()
        self._planted = [PlantedIds.of(group) for group in groups or ()]
        self._runs = {}
        self._config = {**settings_of(trainer.callbacks), "versions": versions()}  # type: ignore[attr-defined]
        self._log(trainer, lambda run: None)  # starts the runs, which shows the settings from the beginning

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._log_evaluation(trainer)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Evaluations between validations are written in on_before_backward. No callback writes in this next hook.
        self._log_evaluation(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log_evaluation(trainer)
        if not self.history:
            return
        ledger = Ledger.of(trainer)
        end = LoggedEnd(self.history[-1], ledger.onset, ledger.get(Ledger.certificate), ledger.get(Ledger.attribution))
        self._log(trainer, lambda run: run.end(end))

    def state_dict(self) -> dict[str, Any]:
        return {"history": [dict(row) for row in self.history], "announced": self._announced}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        with restoring("LiveCurves"):
            self.history[:] = state_dict["history"]  # in place: some strategies restore after it was published
            self._announced = state_dict["announced"]

    def _log_evaluation(self, trainer: Trainer) -> None:
        """Logs the last evaluation, if it is not in the history yet."""
        ledger = Ledger.of(trainer)
        flags = ledger.flags
        if not flags.evaluations or (self.history and flags.evaluations[-1].step <= self.history[-1]["step"]):
            return
        ledger.close(Ledger.attribution)
        profile = _profile(ledger)
        row = self._row(ledger, profile)
        self.history.append(row)
        if not trainer.is_global_zero:
            return
        if self._planted and not any_known(ledger.losses, self._planted):
            warn_once(
                self._warnings,
                "LiveCurves was given rungs, but training has seen none of their ids. Ids of planted sequences are "
                "ids of their content: use LossTracker(identity='content').",
            )
        onset = None if self._announced else ledger.onset
        self._announced = ledger.onset is not None
        evaluation = LoggedEvaluation(row, ledger.losses, flags, self.top, profile, onset)
        self._log(trainer, lambda run: run.evaluation(evaluation))

    def _row(self, ledger: Ledger, profile: EvaluationProfile | None) -> dict[str, float]:
        row = scalars(ledger.losses, ledger.controls, ledger.flags, ledger.onset, self._planted)
        actions = action_series(ledger.interventions)
        if actions:
            row |= actions | side_by_side(row)
        extraction = ledger.get(Ledger.extraction)
        if extraction is not None:
            row |= extraction.series(int(row["step"]))
        if profile is not None:
            row |= series(profile)
        return row

    def _log(self, trainer: Trainer, log: Callable[[LoggedRun], object]) -> None:
        """Calls ``log`` with the run of every logger, on the first process only."""
        if not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            try:
                log(self._run(logger))
            except Exception as error:  # a full disk or a lost network must not end the training
                warn_once(
                    self._warnings,
                    f"{type(logger).__name__} failed to log what memsink found. Training goes on, and later "
                    f"evaluations try again without a warning. {type(error).__name__}: {error}",
                    key=type(logger).__name__,
                )

    def _run(self, logger: Logger) -> LoggedRun:
        """The run of a logger, started at the first call that succeeds."""
        if id(logger) not in self._runs:
            run = logged_run(logger, self.text)
            run.start(self._config)
            self._runs[id(logger)] = run
        return self._runs[id(logger)]


def _profile(ledger: Ledger) -> EvaluationProfile | None:
    """The layers at the last evaluation; None without a ``SinkLocalizer``, or if that has recorded nothing since."""
    attribution = ledger.get(Ledger.attribution)
    if attribution is None or not attribution.rows:
        return None
    last = attribution.rows[-1]
    return last if last.step == ledger.flags.evaluations[-1].step else None
