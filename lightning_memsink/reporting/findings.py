"""The facts of a finished run that its summary, its report and its files are made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning_memsink.detection.verdicts import Evaluation, Flags, Onset
from lightning_memsink.extraction.history import ExtractionHistory
from lightning_memsink.localization.history import LocalizationHistory
from lightning_memsink.mitigation.certificate import Certificate
from lightning_memsink.mitigation.intervention_log import InterventionLog
from lightning_memsink.reporting.scalars import MemorizedSample, top_memorized
from lightning_memsink.samples.loss_table import LossTable


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
    logged_runs: Sequence[str] = ()
    """How to open each run that a logger recorded."""

    @property
    def measured(self) -> bool:
        """Whether the last evaluation, if there was one, could compare samples with controls."""
        return bool(self.flags.evaluations) and self.evaluation.tail != "none"

    @property
    def evaluation(self) -> Evaluation:
        """The last evaluation. IndexError if there was none."""
        return self.flags.evaluations[-1]

    @property
    def unit(self) -> str:
        """Of losses and gaps. Samples of one loss element each have no tokens, so theirs is not per token."""
        return "nats per token" if len(self.table) and int(self.table.elements.max()) > 1 else "nats"

    def top(self, count: int) -> list[MemorizedSample]:
        """The ``count`` memorized samples with the largest gaps; empty without an evaluation."""
        if not self.flags.evaluations:
            return []
        return top_memorized(self.table, self.flags, self.evaluation.step, count)
