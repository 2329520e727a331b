"""The ledger: the facts that the callbacks of one Trainer share.

One slot per fact, one writer per slot, and no callback reads a slot in the hook that writes it; where it must, it has
the writer finish first (`Ledger.close`). So callbacks may be listed in any order.

    N  samples known      B  samples in a batch      K  visits remembered
    M  controls           E  control evaluations     F  matching features
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload
from weakref import WeakKeyDictionary, WeakMethod

from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher

from lightning_memsink._lightning import is_a
from lightning_memsink.losses.step_reader import StepReader

if TYPE_CHECKING:
    from collections.abc import Callable

    from lightning.pytorch import Trainer
    from torch import Tensor

    from lightning_memsink.detection.evaluate import SecondLook
    from lightning_memsink.detection.family_features import FamilyRecord
    from lightning_memsink.detection.source_budget import SourceBudget
    from lightning_memsink.detection.verdicts import Flags, Onset
    from lightning_memsink.extraction.history import ExtractionHistory
    from lightning_memsink.localization.history import LocalizationHistory
    from lightning_memsink.localization.sinks import Sinks
    from lightning_memsink.mitigation.certificate import Certificate
    from lightning_memsink.mitigation.intervention_log import InterventionLog
    from lightning_memsink.samples.control_table import ControlTable
    from lightning_memsink.samples.documents import Documents
    from lightning_memsink.samples.loss_table import LossTable

T = TypeVar("T")


class Slot(Generic[T]):
    """A fact with one writer. Reading it before the writer has set it raises RuntimeError with the callback to add."""

    def __init__(self, writer: str) -> None:
        self.writer = writer

    def __set_name__(self, owner: type[Ledger], name: str) -> None:
        self.name = name

    @overload
    def __get__(self, ledger: None, owner: type[Ledger]) -> Slot[T]: ...

    @overload
    def __get__(self, ledger: Ledger, owner: type[Ledger]) -> T: ...

    def __get__(self, ledger: Ledger | None, owner: type[Ledger]) -> T | Slot[T]:
        if ledger is None:
            return self
        if self.name not in ledger._facts:
            raise RuntimeError(
                ledger._trained_elsewhere()
                or f"No callback of this Trainer writes `{self.name}`. "
                f"Add {self.writer}() to Trainer(callbacks=[...]), at any position."
            )
        return ledger._facts[self.name]  # type: ignore[return-value]

    def __set__(self, ledger: Ledger, value: T) -> None:
        ledger._facts[self.name] = value


@dataclass
class CurrentBatch:
    """The training batch that is being trained on: known from its start until the next begins."""

    ids: Tensor | None = None
    """``[B]`` int64; None where its samples can't be identified."""
    documents: Documents | None = None
    """Where rows hold several documents, which are the samples then: which token is of which."""
    reader: StepReader = field(default_factory=StepReader)
    """Reads the loss calls of a loss before its backward, once for all callbacks."""


class Ledger:
    """The slots of one Trainer. Writers set them in ``on_fit_start`` (after a restore), readers require them in
    ``on_train_start``."""

    losses: Slot[LossTable] = Slot("LossTracker")
    controls: Slot[ControlTable] = Slot("LossTracker")
    batch: Slot[CurrentBatch] = Slot("LossTracker")
    families: Slot[FamilyRecord | None] = Slot("LossTracker")
    look: Slot[SecondLook | None] = Slot("LossTracker")
    flags: Slot[Flags] = Slot("MemorizationDetector")
    onset: Slot[Onset | None] = Slot("MemorizationDetector")
    budget: Slot[SourceBudget | None] = Slot("LiveCurves")
    attribution: Slot[LocalizationHistory] = Slot("SinkLocalizer")
    sinks: Slot[Sinks | None] = Slot("SinkLocalizer")
    extraction: Slot[ExtractionHistory] = Slot("ExtractionProbe")
    history: Slot[list[dict[str, float]]] = Slot("LiveCurves")
    certificate: Slot[Certificate | None] = Slot("MemSinks")

    def __init__(self) -> None:
        self._facts: dict[str, object] = {}
        self._closing: dict[str, WeakMethod[Callable[[Ledger], None]]] = {}
        self._nominate: WeakMethod[Callable[[Ledger], tuple[Tensor, Tensor]]] | None = None
        self.most_nominated = 0
        """How many samples an evaluation looks at again, at most."""
        self.interventions: dict[str, InterventionLog] = {}
        """By name of the mitigation, each written by that one and read by logs and reports."""

    def get(self, slot: Slot[T]) -> T | None:
        """The fact of a slot that a reader can do without, ``ledger.get(Ledger.sinks)``; None if nothing writes it."""
        return self._facts.get(slot.name)  # type: ignore[return-value]

    def require(self, *slots: Slot[Any]) -> None:
        """Raises RuntimeError, naming the callback to add, if nothing writes one of the ``slots``."""
        for slot in slots:
            slot.__get__(self, Ledger)

    def close_with(self, slot: Slot[Any], close: Callable[[Ledger], None]) -> None:
        """The writer of a slot that collects during an evaluation names its method that ends the collecting."""
        self._closing[slot.name] = WeakMethod(close)

    def close(self, slot: Slot[Any]) -> None:
        """Has the writer end its evaluation before a reader in the same hook reads the slot.

        Lightning promises no order of callbacks within a hook, so the reader may come first. Every process calls this
        in the same hook, since the writer may gather. A second call changes nothing.
        """
        closing = self._closing.get(slot.name)
        close = None if closing is None else closing()
        if close is not None:
            close(self)

    def nominate_with(self, nominate: Callable[[Ledger], tuple[Tensor, Tensor]], most: int) -> None:
        """Names the method that chooses up to ``most`` samples for a second look: rows of the loss table, and whether
        each was drawn at random. The writer of the losses asks it as soon as the controls are measured."""
        self._nominate, self.most_nominated = WeakMethod(nominate), most

    def nominated(self) -> tuple[Tensor, Tensor] | None:
        """The samples to look at again now; None if nothing asks for a second look."""
        nominate = None if self._nominate is None else self._nominate()
        return None if nominate is None else nominate(self)

    def current_batch_size(self, otherwise: int | None) -> int:
        """B of the current training batch: its number of ids. Without ids ``otherwise``: the rows of its first tensor,
        say, though in a batch of graphs those are the nodes of all graphs."""
        batch = self.get(Ledger.batch)
        return (otherwise or 0) if batch is None or batch.ids is None else len(batch.ids)

    def _trained_elsewhere(self) -> str | None:
        """The error message where the ledger is empty because other processes, which have ended, did the training."""
        trainer = next((trainer for trainer, ledger in _LEDGERS.items() if ledger is self), None)
        launcher = None if trainer is None else trainer.strategy.launcher
        if not is_a(launcher, _MultiProcessingLauncher) or not launcher._already_fit:
            return None
        return (
            f"This Trainer trains in processes of its own ({launcher._start_method}), and the ledger ended with them. "
            "Read the Parquet files beside the report (lightning_memsink.reporting.parquet), or train with "
            "strategy='ddp'."
        )

    @staticmethod
    def of(trainer: Trainer) -> Ledger:
        """The one ledger of this Trainer, made at the first call."""
        ledger = _LEDGERS.get(trainer)
        return _LEDGERS.setdefault(trainer, Ledger()) if ledger is None else ledger


_LEDGERS: WeakKeyDictionary[Trainer, Ledger] = WeakKeyDictionary()
