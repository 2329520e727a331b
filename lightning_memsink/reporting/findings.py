"""The facts of a finished run that its summary, its report and its files are made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from lightning_memsink.detection.source_budget import BudgetRow, SourceBudget
from lightning_memsink.detection.source_summary import SourceSummary, summarize_sources
from lightning_memsink.detection.verdicts import Evaluation, Flags, Onset
from lightning_memsink.extraction.history import ExtractionHistory
from lightning_memsink.localization.history import LocalizationHistory
from lightning_memsink.mitigation.certificate import Certificate
from lightning_memsink.mitigation.intervention_log import InterventionLog
from lightning_memsink.reporting.gap_units import LOG_RATIO, RATIO
from lightning_memsink.reporting.name_text import names_of
from lightning_memsink.reporting.scalars import MemorizedSample, top_memorized
from lightning_memsink.samples.loss_table import LossTable

CONSECUTIVE = 2
"""Where the settings of the detector are unknown: its default."""


@dataclass(frozen=True)
class Findings:
    """The facts of a run at its end."""

    table: LossTable
    flags: Flags
    onset: Onset | None
    history: Sequence[Mapping[str, float]]
    """A row of scalars per evaluation, as `LiveCurves` logs them."""
    attribution: LocalizationHistory | None = None
    """None without a ``SinkLocalizer``."""
    interventions: Mapping[str, InterventionLog] = field(default_factory=dict)
    """By name of the mitigation; empty without one."""
    certificate: Certificate | None = None
    """Of designed sinks."""
    extraction: ExtractionHistory | None = None
    """None without an ``ExtractionProbe``."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Arguments by callback."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """By package."""
    budget: SourceBudget | None = None
    """Of sources; None without one."""
    logged_runs: Sequence[str] = ()
    """How to open each run that a logger recorded."""
    shows_names: bool = True
    """Whether samples are shown with the names that are known of them; for files that leave the machine, they aren't.
    """

    @property
    def measured(self) -> bool:
        """Whether the last evaluation, if there was one, could compare samples with controls."""
        return bool(self.flags.evaluations) and self.evaluation.tail != "none"

    @property
    def evaluation(self) -> Evaluation:
        """The last evaluation. IndexError if there was none."""
        return self.flags.evaluations[-1]

    @cached_property
    def sources(self) -> SourceSummary:
        """How much of each source is memorized."""
        return summarize_sources(self.table, self.flags)

    @cached_property
    def budget_rows(self) -> list[BudgetRow]:
        """The budgets of sources at the last evaluation, crossed ones first; empty without any."""
        return [] if self.budget is None else self.budget.rows(self.table, self.flags, self.sources)

    @property
    def unit(self) -> str:
        """Of gaps: ``nats``, ``nats per token``, or `LOG_RATIO`. Samples of one loss element each have no tokens."""
        if self._kind_of_unit == RATIO:
            return LOG_RATIO
        return "nats per token" if len(self.table) and int(self.table.elements.max()) > 1 else "nats"

    @property
    def loss_unit(self) -> str:
        """Of losses; empty where they are no likelihoods, whose unit is the user's."""
        return "" if self.unit == LOG_RATIO else self.unit

    @property
    def _kind_of_unit(self) -> str:
        return self.evaluation.unit if self.flags.evaluations else self.table.unit

    @property
    def consecutive(self) -> int:
        """Evaluations in a row that must flag a sample before it is memorized."""
        detector = self.settings.get("MemorizationDetector")
        return int(detector.get("consecutive", CONSECUTIVE)) if isinstance(detector, Mapping) else CONSECUTIVE

    def top(self, count: int) -> list[MemorizedSample]:
        """The ``count`` memorized samples with the largest gaps; empty without an evaluation."""
        if not self.flags.evaluations:
            return []
        return top_memorized(self.table, self.flags, self.evaluation.step, count)

    @property
    def has_names(self) -> bool:
        """Whether any sample has a name: a key of the user's own that is no 64-bit integer."""
        return len(self.table.names) > 0

    def names_of(self, samples: Sequence[MemorizedSample]) -> list[str | None]:
        """The names of samples as text; None for one that has none, or if `shows_names` is False."""
        if not self.shows_names:
            return [None] * len(samples)
        return names_of(self.table.names, [sample.id for sample in samples])
