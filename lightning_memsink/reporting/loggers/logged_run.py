"""What a logger shows of a run, and the default for loggers that take scalars only."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lightning.pytorch.loggers import Logger

from lightning_memsink.detection.verdicts import Flags, Onset
from lightning_memsink.localization.history import EvaluationProfile, LocalizationHistory
from lightning_memsink.mitigation.certificate import Certificate
from lightning_memsink.reporting.scalars import MemorizedSample, top_memorized
from lightning_memsink.samples.loss_table import LossTable


@dataclass(frozen=True)
class LoggedEvaluation:
    """One evaluation."""

    row: Mapping[str, float]
    """``step`` and every scalar by name."""
    table: LossTable
    flags: Flags
    top: int
    """How many memorized samples are listed."""
    profile: EvaluationProfile | None = None
    """Of the layers; None without a ``SinkLocalizer``."""
    onset: Onset | None = None
    """Only at the evaluation at which it is settled, or settled anew."""
    crossed: Sequence[str] = ()
    """A sentence for each source whose budget this evaluation is the first to find crossed."""

    @property
    def step(self) -> int:
        return int(self.row["step"])

    @property
    def metrics(self) -> dict[str, float]:
        """The scalars by the name that loggers get: ``memsink/...``."""
        return {f"memsink/{name}": value for name, value in self.row.items() if name != "step"}

    def samples(self) -> list[MemorizedSample]:
        """The memorized samples with the largest gaps."""
        return top_memorized(self.table, self.flags, self.step, self.top)


@dataclass(frozen=True)
class LoggedEnd:
    """The end of training."""

    row: Mapping[str, float]
    """Of the last evaluation."""
    onset: Onset | None
    certificate: Certificate | None
    attribution: LocalizationHistory | None
    sources: Sequence[Mapping[str, Any]] = ()
    """A row of numbers by name per source, those with the most memorized bits first."""
    is_news: bool = False
    """Whether no evaluation announced an onset, and there is one."""


class LoggedRun(Protocol):
    """A run as one logger shows it. Any method may raise: training goes on without what it would have logged."""

    def start(self, config: Mapping[str, Any]) -> None:
        """Called before training with the settings of the callbacks."""

    def evaluation(self, evaluation: LoggedEvaluation) -> None: ...

    def end(self, end: LoggedEnd) -> None: ...

    def how_to_open(self) -> str | None:
        """Where the run is and what to type to open it; None if the logger can't tell."""

    def keep(self, files: Iterable[Path]) -> None:
        """Keeps files and folders with the run, if the logger can."""


class ScalarRun:
    """The run of a logger that takes scalars only; it has no place for ``text``."""

    def __init__(self, logger: Logger, text: Callable[[int], str] | None = None) -> None:
        self._logger = logger

    def start(self, config: Mapping[str, Any]) -> None:
        """Logs nothing: Lightning logs hyperparameters itself."""

    def evaluation(self, evaluation: LoggedEvaluation) -> None:
        self._logger.log_metrics(evaluation.metrics, evaluation.step)

    def end(self, end: LoggedEnd) -> None:
        """Logs nothing: the last evaluation was logged."""

    def how_to_open(self) -> str | None:
        return None

    def keep(self, files: Iterable[Path]) -> None:
        """Keeps nothing."""
