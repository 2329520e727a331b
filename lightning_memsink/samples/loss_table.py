"""A table of every sample's losses: dense columns that grow with the number of samples.

N  samples known      V  visits in one block      K  visits remembered      F  matching features
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_memsink.samples.id_index import IdIndex
from lightning_memsink.samples.sample_names import SampleNames
from lightning_memsink.samples.sources import SourceNames
from lightning_memsink.samples.unique import last_of_each

SCHEMA = 1
REMEDY = (
    "Resume with the version that wrote it, or begin a new ledger with memsink(new_ledger=True) or "
    "LossTracker(new_ledger=True): weights, optimizer and progress are resumed all the same."
)


class Column:
    """A column of a `LossTable`: read as an attribute, it is a view of one row per known sample, ``[N, ...]``.

    Args:
        dtype: of its values.
        unknown: the value of a row that nothing was written to.
        is_optional: whether it takes no memory before `LossTable.write` writes to it.
        is_late: whether `LossTable.complete` is called before it is read.
    """

    def __init__(self, dtype: torch.dtype, unknown: float, is_optional: bool = False, is_late: bool = False) -> None:
        self.dtype, self.unknown = dtype, unknown
        self.is_optional, self.is_late = is_optional, is_late
        self.name = ""

    def empty(self, rows: int) -> Tensor:
        """``[rows]`` of rows that nothing was written to."""
        return torch.full((rows,), self.unknown, dtype=self.dtype)

    def __set_name__(self, owner: type[LossTable], name: str) -> None:
        self.name = name

    def __get__(self, table: LossTable, owner: type[LossTable]) -> Tensor:
        if self.is_late:
            table.complete()
        column = table.columns.get(self.name)
        return self.empty(len(table)) if column is None else column[: len(table)]


class LossTable:
    """Columns of all known samples, one row a sample.

    With several processes ``exposures`` counts what was trained on. A DistributedSampler repeats samples so that each
    process has as many: these repeats are visits like others. (For held-out controls a repeat counts nothing.)

    Losses are in nats (per token for token losses); NaN where none is known. With ids and the detector's columns a
    sample takes 58 bytes. bf16 keeps three digits, enough for values that are only compared in groups.

    Args:
        depth: K, the number of recent losses kept in ``recent``.
    """

    exposures = Column(torch.int32, 0)
    """Visits in training, with or without a finite loss."""
    first_loss = Column(torch.bfloat16, torch.nan)
    """Loss at the first visit with a finite loss: before any training step on the sample."""
    first_step = Column(torch.int32, -1)
    """Optimizer step of that visit; -1 before it."""
    last_loss = Column(torch.float32, torch.nan)
    """Loss at the last visit with a finite loss."""
    last_step = Column(torch.int32, -1)
    early_loss = Column(torch.bfloat16, torch.nan)
    """Loss at the first such visit at or after ``reference_step``."""
    early_step = Column(torch.int32, -1)
    elements = Column(torch.bfloat16, 0)
    """Tokens (or other loss elements) counted at the last visit."""
    recent = Column(torch.bfloat16, torch.nan)
    """``[N, K]`` the last K losses, newest first. K is 0 by default: nothing in this package reads them."""
    features = Column(torch.float16, 0, is_late=True)
    """``[N, F]`` matching features, as of the last time they were described."""
    first_row = Column(torch.int64, -1, is_optional=True)
    """Row of the data set that the text first came from."""
    rows = Column(torch.int16, 0, is_optional=True)
    """How many rows it came from, counted in the epoch in which it first came."""
    source = Column(torch.int16, -1, is_optional=True)
    """Code of its source's label."""
    family = Column(torch.int32, -1, is_optional=True)
    """Lowest row of this table with a near-duplicate of the text; its own if there is none."""
    window = Column(torch.int64, 0, is_optional=True)
    """Hash of the first window of the latest visit, of a document that may be cut into several."""
    window_tokens = Column(torch.int32, 0, is_optional=True)
    """Tokens of that visit so far."""
    window_epoch = Column(torch.int16, -1, is_optional=True)
    window_step = Column(torch.int32, -1, is_optional=True)
    """Optimizer step at which that visit began."""

    def __init__(self, depth: int = 0) -> None:
        self.index = IdIndex()
        self.names = SampleNames()
        """The keys of samples whose ids are hashes of them. Its state is kept apart."""
        self.source_names = SourceNames()
        """The labels that the codes in ``source`` stand for. Its state is kept apart, too."""
        self.reference_step: int | None = None
        """Step from which a visit counts as early; None until the controls were evaluated once."""
        self.unit = "nats"
        """``nats`` or ``nats per token`` where losses are likelihoods; ``ratio`` where they are a scale, as squared
        errors are."""
        self.begins_with_training = True
        """Whether first losses are of samples that the model was not trained on: no step was taken before the table."""
        self.complete: Callable[[], None] = _is_complete
        """Finishes what is worked out beside training, before features are read."""
        sizes = {"recent": (0, depth), "features": (0, 0)}
        self.columns = {
            name: torch.zeros(sizes.get(name, (0,)), dtype=column.dtype)
            for name, column in COLUMNS.items()
            if not column.is_optional
        }
        """All columns by name, with the rows they have in reserve."""

    def __len__(self) -> int:
        return len(self.index)

    @property
    def ids(self) -> Tensor:
        """``[N]`` int64, the id of each row."""
        return self.index.ids()

    def exposures_of(self, ids: Tensor) -> Tensor:
        """``[B]`` int32 visits so far; 0 for an unknown id."""
        if not len(self):
            return torch.zeros(len(ids), dtype=torch.int32)
        rows = self.index.find(ids)
        return torch.where(rows < 0, 0, self.exposures[rows])

    @property
    def nbytes(self) -> int:
        """Bytes of memory: the columns, with the rows they have in reserve, and the index."""
        return self.index.nbytes + sum(column.nbytes for column in self.columns.values())

    def write(self, name: str, rows: Tensor, values: Tensor) -> None:
        """Writes ``values`` ``[V]`` to an optional column, in the rows ``[V]`` of this table."""
        if name not in self.columns:
            self.columns[name] = COLUMNS[name].empty(len(self.columns["exposures"]))
        column = self.columns[name]
        column[rows] = values.to(column.dtype)

    def describe(self, rows: Tensor, features: Tensor) -> None:
        """Writes matching features ``[V, F]`` of the samples in ``rows`` ``[V]``, which are distinct."""
        if self.columns["features"].shape[1] != features.shape[1]:
            self.columns["features"] = torch.zeros(len(self.columns["exposures"]), features.shape[1]).half()
        self.columns["features"][rows] = features.half()

    def described(self, rows: Tensor, column: int) -> Tensor:
        """``[V]`` one feature of the samples in ``rows``, as written so far; 0 where it is not known yet."""
        features = self.columns["features"]
        return features[rows, column].float() if column < features.shape[1] else torch.zeros(len(rows))

    def rows_of(self, ids: Tensor) -> Tensor:
        """``[V]`` int64: the rows of samples, new ones for those that are not known yet."""
        rows = self.index.intern(ids)
        self._grow(len(self.index))
        return rows

    def record(
        self, ids: Tensor, losses: Tensor, steps: Tensor, elements: Tensor, is_part: Tensor | None = None
    ) -> Tensor:
        """Records visits in the order they happened, all ``[V]``. Returns their samples' rows ``[V]`` int64.

        A visit whose loss is NaN or infinite counts as an exposure and leaves every loss as it was.

        Args:
            ids: of the samples.
            losses: of the visits.
            steps: optimizer steps before them.
            elements: of each loss.
            is_part: bool ``[V]``, where a document is cut into windows: the visit goes on, so it is no exposure more,
                and the loss is that of the visit so far.
        """
        rows = self.rows_of(ids)
        counts = torch.ones_like(rows, dtype=torch.int32) if is_part is None else (~is_part).int()
        self.exposures.index_add_(0, rows, counts)
        finite = torch.isfinite(losses).nonzero().flatten()
        by_row, order = rows[finite].sort(stable=True)
        visits = finite[order]
        if not len(visits):
            return rows
        starts = torch.ones_like(by_row, dtype=torch.bool)
        starts[1:] = by_row[1:] != by_row[:-1]
        ends = starts.roll(-1)
        losses, steps = losses.float(), steps.int()
        self._set_once("first", by_row[starts], losses[visits[starts]], steps[visits[starts]])
        self._remember(by_row, losses[visits], starts)
        latest, at = visits[ends], by_row[ends]
        self.last_loss[at], self.last_step[at] = losses[latest], steps[latest]
        self.elements[at] = elements[latest].bfloat16()
        if self.reference_step is not None:
            late = steps[visits] >= self.reference_step
            rows_late, visits_late = by_row[late], visits[late]
            first = torch.ones_like(rows_late, dtype=torch.bool)
            first[1:] = rows_late[1:] != rows_late[:-1]
            self._set_once("early", rows_late[first], losses[visits_late[first]], steps[visits_late[first]])
        if is_part is not None:
            self._go_on(rows[is_part], losses[is_part])
        return rows

    def _go_on(self, rows: Tensor, losses: Tensor) -> None:
        """Corrects the losses of visits that go on, where the visit is the sample's first, or its early one."""
        rows, last = last_of_each(rows)
        losses = losses[last]
        for which in ("first", "early"):
            loss, step = self.columns[f"{which}_loss"], self.columns[f"{which}_step"]
            same = torch.isfinite(losses) & (step[rows] >= self.window_step[rows].clamp(min=0))
            loss[rows[same]] = losses[same].to(loss.dtype)

    def _set_once(self, which: str, rows: Tensor, losses: Tensor, steps: Tensor) -> None:
        """Writes the ``first`` or ``early`` loss and step of rows that have none."""
        loss, step = self.columns[f"{which}_loss"], self.columns[f"{which}_step"]
        fresh = step[rows] < 0
        loss[rows[fresh]], step[rows[fresh]] = losses[fresh].to(loss.dtype), steps[fresh]

    def _remember(self, rows: Tensor, losses: Tensor, starts: Tensor) -> None:
        """Puts each row's new losses in front of ``recent``. ``rows`` are sorted, and oldest first within a row."""
        recent = self.recent
        depth = recent.shape[1]
        if not depth:
            return
        group = starts.cumsum(0) - 1
        sizes = torch.bincount(group)
        from_end = sizes.cumsum(0)[group] - 1 - torch.arange(len(rows))
        at = rows[starts]
        column = torch.arange(depth) - sizes[:, None]  # where the old value of each place comes from
        old = recent[at].gather(1, column.clamp(min=0))
        recent[at] = torch.where(column >= 0, old, torch.nan)
        new = from_end < depth
        recent[rows[new], from_end[new]] = losses[new].bfloat16()

    def _grow(self, rows: int) -> None:
        have = len(self.columns["exposures"])
        if rows <= have:
            return
        capacity = max(1024, rows, have + have // 32)
        for name, column in self.columns.items():
            more = torch.full((capacity - have, *column.shape[1:]), COLUMNS[name].unknown, dtype=column.dtype)
            self.columns[name] = torch.cat([column, more])

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain types only, so that ``torch.load(weights_only=True)`` reads it back."""
        self.complete()
        columns = {name: column[: len(self)].clone() for name, column in self.columns.items()}
        return {
            "schema": SCHEMA,
            "ids": self.ids,
            "reference_step": self.reference_step,
            "unit": self.unit,
            "begins_with_training": self.begins_with_training,
            "columns": columns,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a table. Raises ValueError for another schema, or columns that don't fit together."""
        if state.get("schema") != SCHEMA:
            raise ValueError(
                f"The checkpoint holds a memsink ledger of schema {state.get('schema')}; this version reads schema "
                f"{SCHEMA}. {REMEDY}"
            )
        damage = self._damage(state)
        if damage:
            raise ValueError(f"The checkpoint's memsink ledger is damaged: {damage}. {REMEDY}")
        self.index = IdIndex.of(state["ids"])
        self.reference_step = state["reference_step"]
        self.unit = state.get("unit", "nats")  # older versions knew no other
        self.begins_with_training = state.get("begins_with_training", True)
        self.columns = {name: column.clone() for name, column in state["columns"].items()}

    def _damage(self, state: dict[str, Any]) -> str:
        """What doesn't fit together in a saved table; empty if everything does."""
        columns, rows = state["columns"], len(state["ids"])
        samples = len(torch.unique(state["ids"]))
        if samples != rows:
            return f"{rows} rows have {samples} different ids"
        optional = {name: column.empty(0) for name, column in COLUMNS.items() if column.is_optional}
        if columns.keys() - optional.keys() != self.columns.keys() - optional.keys():
            return f"it has the columns {', '.join(columns)}, and not {', '.join(self.columns)}"
        for name, saved in columns.items():
            own = self.columns[name] if name in self.columns else optional[name]
            if len(saved) != rows or saved.dtype != own.dtype or saved.ndim != own.ndim:
                return f"column {name} is {saved.dtype} {list(saved.shape)} for {rows} samples"
        return ""


def _is_complete() -> None:
    """Of a table that nobody writes beside training."""


COLUMNS = {name: column for name, column in vars(LossTable).items() if isinstance(column, Column)}
