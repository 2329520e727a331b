"""A progress bar that also shows the number of memorized samples."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from rich.progress import ProgressColumn, Task
from rich.table import Column
from rich.text import Text

from lightning_memsink.detection.verdicts import Flags
from lightning_memsink.ledger import Ledger
from lightning_memsink.reporting.gap_units import LOG_RATIO, RATIO, short


class MemSinkProgressBar(RichProgressBar):
    """Lightning's rich progress bar with one more column, ``memorized 12 · gap 0.84 nats``.

    The column replaces the metrics ``memsink/...``, which are left out.
    """

    _flags = Flags()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._flags = Ledger.of(trainer).flags
        super().on_train_start(trainer, pl_module)

    def configure_columns(self, trainer: Trainer) -> list[Any]:
        return [*super().configure_columns(trainer), _MemorizedColumn(lambda: describe_flags(self._flags))]

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        return {name: value for name, value in metrics.items() if not name.startswith("memsink/")}


class _MemorizedColumn(ProgressColumn):
    """A column with the text that ``text()`` returns."""

    def __init__(self, text: Callable[[], str]) -> None:
        self.text = text
        super().__init__(Column(no_wrap=True))

    def render(self, task: Task) -> Text:
        return Text(self.text(), style="bold")


def describe_flags(flags: Flags) -> str:
    """The last evaluation in a few words; empty before the first."""
    if not flags.evaluations:
        return ""
    last = flags.evaluations[-1]
    unit = LOG_RATIO if last.unit == RATIO else last.unit
    words = short(last.gap, unit) if unit == LOG_RATIO else f"gap {short(last.gap, unit)}"
    gap = f" · {words}" if math.isfinite(last.gap) else ""
    return f"memorized {last.memorized}{gap}"
