"""Scalars, tables and histograms of every evaluation, in every logger, during training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_warn
from lightning_utilities.core.rank_zero import WarningCache

from lightning_memsink._lightning import warn_once
from lightning_memsink.callbacks.runtime.checkpointing import restoring
from lightning_memsink.detection.onset import is_settled
from lightning_memsink.detection.source_budget import SourceBudget
from lightning_memsink.detection.source_summary import SourceSummary, summarize_sources
from lightning_memsink.detection.verdicts import Flags, Onset
from lightning_memsink.extraction.canaries import CanaryGroup, HasCanaryGroups
from lightning_memsink.ledger import Ledger
from lightning_memsink.localization.history import EvaluationProfile
from lightning_memsink.reporting.family_section import family_series
from lightning_memsink.reporting.localization_summary import series
from lightning_memsink.reporting.loggers import logged_run
from lightning_memsink.reporting.loggers.logged_run import LoggedEnd, LoggedEvaluation, LoggedRun
from lightning_memsink.reporting.mitigation_summary import action_series, side_by_side
from lightning_memsink.reporting.provenance import settings_of, versions
from lightning_memsink.reporting.scalars import PlantedIds, any_known, scalars, source_series
from lightning_memsink.reporting.source_section import crossing, source_rows
from lightning_memsink.samples.loss_table import LossTable

MOST_ROWS = 1000


class LiveCurves(Callback):
    """Logs ``memsink/...`` to all loggers at each evaluation; to W&B also tables, histograms, and an alert of the onset
    of memorization: once two evaluations in a row agree on it, or at the end of training. The series ``onset_*`` begin
    with the alert, and show the same numbers.

    `history` keeps what is logged, one row per evaluation, and is published in the ledger. If a logger fails, a warning
    names it once and training goes on.

    Args:
        rungs: groups of planted samples and their twins, to log loss curves of: `CanaryGroup`, or anything with
            ``name``, ``repeats``, ``ids`` and ``twin_ids``. By default those of a data module with a method `rungs()`;
            without one, curves are by number of exposures, beside that of all controls.
        top: memorized samples listed per evaluation, at most 1000.
        text: turns a sample id into text for the list. Without it no text leaves the machine.
        budget: by source, the largest share of its samples, 0…1, that may be memorized; ``default`` is that of all
            others: ``{"customer-a": 0.001, "default": 0.01}``. A source that crosses its budget is warned of once, in
            W&B with an alert; the report lists all, and ``memsink gate`` ends with an exit code. See
            `detection.source_budget` for what counts as crossed.

    Raises:
        ValueError: ``top`` is out of range, or a budget is no share.
    """

    saves_samples = True

    def __init__(
        self,
        rungs: Sequence[CanaryGroup] | None = None,
        top: int = 20,
        text: Callable[[int], str] | None = None,
        budget: Mapping[str, float] | None = None,
    ) -> None:
        if not 0 <= top <= MOST_ROWS:
            raise ValueError(f"top is a number of samples from 0 to {MOST_ROWS}, but it is {top}.")
        self.rungs, self.top, self.text = rungs, top, text
        self.budget = None if budget is None else SourceBudget(budget)
        self.history: list[dict[str, float]] = []
        self._planted: list[PlantedIds] = []
        self._runs: dict[int, LoggedRun] = {}
        self._config: dict[str, Any] = {}
        self._announced = False
        self._announced_step: int | None = None  # None: not known, of a checkpoint of version 0.1.0
        self._warnings = WarningCache()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        ledger = Ledger.of(trainer)
        ledger.history, ledger.budget = self.history, self.budget

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
        certificate, attribution = ledger.get(Ledger.certificate), ledger.get(Ledger.attribution)
        sources = source_rows(ledger.losses, ledger.flags, ledger.interventions) if trainer.is_global_zero else []
        is_news = ledger.onset is not None and not self._announced
        end = LoggedEnd(self.history[-1], ledger.onset, certificate, attribution, sources, is_news)
        self._log(trainer, lambda run: run.end(end))
        if self.budget is not None:
            self._warn_of_unknown(ledger.losses, ledger.flags, self.budget)

    def state_dict(self) -> dict[str, Any]:
        state = {
            "history": [dict(row) for row in self.history],
            "announced": self._announced,
            "announced_step": self._announced_step,
        }
        return state if self.budget is None else {**state, "budget": self.budget.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        with restoring("LiveCurves"):
            self.history[:] = state_dict["history"]  # in place: some strategies restore after it was published
            self._announced, self._announced_step = state_dict["announced"], state_dict.get("announced_step")
            if self.budget is not None:
                self.budget.load_state_dict(state_dict.get("budget", {}))

    def _log_evaluation(self, trainer: Trainer) -> None:
        """Logs the last evaluation, if it is not in the history yet."""
        ledger = Ledger.of(trainer)
        flags = ledger.flags
        if not flags.evaluations or (self.history and flags.evaluations[-1].step <= self.history[-1]["step"]):
            return
        ledger.close(Ledger.attribution)
        profile = _profile(ledger)
        sources = summarize_sources(ledger.losses, flags) if self._needs_sources(ledger) else None
        row = self._row(ledger, profile, sources)
        self.history.append(row)
        crossed = [] if self.budget is None else self.budget.update(ledger.losses, flags, sources)
        if not trainer.is_global_zero:
            return
        if self._planted and not any_known(ledger.losses, self._planted):
            warn_once(
                self._warnings,
                "LiveCurves was given rungs, but training has seen none of their ids. Ids of planted sequences are "
                "ids of their content: use LossTracker(identity='content').",
            )
        onset = self._news(ledger.onset)
        sentences = [crossing(source) for source in crossed]
        evaluation = LoggedEvaluation(row, ledger.losses, flags, self.top, profile, onset, sentences)
        self._log(trainer, lambda run: run.evaluation(evaluation))
        for sentence in sentences:
            rank_zero_warn(sentence)

    def _news(self, onset: Onset | None) -> Onset | None:
        """The onset if it is settled and was not announced yet, or was at another step."""
        if onset is None or not is_settled(onset):
            return None
        known = self._announced and self._announced_step in (None, onset.step)
        self._announced, self._announced_step = True, onset.step
        return None if known else onset

    def _needs_sources(self, ledger: Ledger) -> bool:
        return self.budget is not None or "source" in ledger.losses.columns

    def _row(
        self, ledger: Ledger, profile: EvaluationProfile | None, sources: SourceSummary | None
    ) -> dict[str, float]:
        onset = ledger.onset if is_settled(ledger.onset) else None
        row = scalars(ledger.losses, ledger.controls, ledger.flags, onset, self._planted)
        row |= family_series(ledger.flags.families)
        if sources is not None:
            row |= source_series(ledger.losses, sources)
        actions = action_series(ledger.interventions)
        if actions:
            row |= actions | side_by_side(row)
        extraction = ledger.get(Ledger.extraction)
        if extraction is not None:
            row |= extraction.series(int(row["step"]))
        if profile is not None:
            row |= series(profile)
        return row

    def _warn_of_unknown(self, table: LossTable, flags: Flags, budget: SourceBudget) -> None:
        unknown = budget.unknown(table, summarize_sources(table, flags))
        if unknown:
            warn_once(
                self._warnings,
                f"No sample of this run has the source {', '.join(map(repr, unknown))}, which LiveCurves(budget=...) "
                f"names. Its sources are {_some(table.source_names.labels)}.",
            )

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


def _some(labels: list[str], most: int = 10) -> str:
    """The first labels of a list, for a message."""
    more = f" and {len(labels) - most:,} others" if len(labels) > most else ""
    return ", ".join(map(repr, labels[:most])) + more if labels else "unknown: batches have no labels"


def _profile(ledger: Ledger) -> EvaluationProfile | None:
    """The layers at the last evaluation; None without a ``SinkLocalizer``, or if that has recorded nothing since."""
    attribution = ledger.get(Ledger.attribution)
    if attribution is None or not attribution.rows:
        return None
    last = attribution.rows[-1]
    return last if last.step == ledger.flags.evaluations[-1].step else None
