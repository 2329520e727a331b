"""Every sample's losses, one row a sample: dense columns that grow as samples come.

N  samples known      V  visits in one block      K  visits remembered      F  matching features
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_memsink.samples.id_index import IdIndex

if TYPE_CHECKING:
    pass


SCHEMA = 1


class LossTable:
    """Columns of all samples known.

    ========== ===== ============================================================================
    exposures  int32 visits in training, with or without a finite loss
    first_loss bf16  loss at the first visit with a finite loss: before any training step on the sample
    first_step int32 its optimizer step; -1 before
    last_loss  f32   at the last such visit
    last_step  int32
    early_loss bf16  at the first such visit at or after ``reference_step``
    early_step int32
    elements   bf16  tokens (or other loss elements) counted at the last visit
    recent     bf16  ``[N, K]`` the last K losses, newest first; K is 0 unless asked for: nothing here reads them
    features   f16   ``[N, F]`` matching features, as of the last time they were described
    ========== ===== ============================================================================

    Over several processes ``exposures`` counts what was trained on: where a DistributedSampler repeats samples to give
    each process as many, the repeats are visits like others. (Of held-out controls a repeat counts nothing.)

    Losses in nats (per token for token losses); NaN where none is known. With ids and the detector's columns a sample
    takes 58 bytes; bf16 keeps three digits, enough for what is only compared in groups.
    """

    def __init__(self, depth: int = 0) -> None:
        self.index = IdIndex()
        self.reference_step: int | None = None
        """Step from which a visit counts as early; None until the controls were evaluated once."""
        self._columns = {
            "exposures": torch.zeros(0, dtype=torch.int32),
            "first_loss": torch.zeros(0, dtype=torch.bfloat16),
            "first_step": torch.zeros(0, dtype=torch.int32),
            "last_loss": torch.zeros(0),
            "last_step": torch.zeros(0, dtype=torch.int32),
            "early_loss": torch.zeros(0, dtype=torch.bfloat16),
            "early_step": torch.zeros(0, dtype=torch.int32),
            "elements": torch.zeros(0, dtype=torch.bfloat16),
            "recent": torch.zeros(0, depth, dtype=torch.bfloat16),
            "features": torch.zeros(0, 0, dtype=torch.float16),
        }

    def __len__(self) -> int:
        return len(self.index)

    def __getattr__(self, name: str) -> Tensor:
        columns: dict[str, Tensor] = self.__dict__.get("_columns", {})
        if name not in columns:
            raise AttributeError(f"LossTable has no column `{name}`; it has {', '.join(columns)}.")
        return columns[name][: len(self)]

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
        """Bytes held: the columns, with the room they have for more rows, and the index."""
        return self.index.nbytes + sum(column.nbytes for column in self._columns.values())

    def describe(self, rows: Tensor, features: Tensor) -> None:
        """Matching features ``[V, F]`` of the samples in ``rows`` ``[V]``, each named once."""
        if self.features.shape[1] != features.shape[1]:
            self._columns["features"] = torch.zeros(len(self._columns["exposures"]), features.shape[1]).half()
        self.features[rows] = features.half()

    def described(self, rows: Tensor, column: int) -> Tensor:
        """``[V]`` one feature of the samples in ``rows``; 0 where none was described yet."""
        return self.features[rows, column].float() if column < self.features.shape[1] else torch.zeros(len(rows))

    def record(self, ids: Tensor, losses: Tensor, steps: Tensor, elements: Tensor) -> Tensor:
        """Visits in the order they happened: all ``[V]``. Returns their samples' rows ``[V]`` int64.

        A visit whose loss is NaN or infinite counts as an exposure and leaves every loss as it was.
        """
        rows = self.index.intern(ids)
        self._grow(len(self.index))
        self.exposures.index_add_(0, rows, torch.ones_like(rows, dtype=torch.int32))
        seen = torch.isfinite(losses).nonzero().flatten()
        by_row, order = rows[seen].sort(stable=True)
        visits = seen[order]
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
        return rows

    def _set_once(self, which: str, rows: Tensor, losses: Tensor, steps: Tensor) -> None:
        loss, step = self._columns[f"{which}_loss"], self._columns[f"{which}_step"]
        fresh = step[rows] < 0
        loss[rows[fresh]], step[rows[fresh]] = losses[fresh].to(loss.dtype), steps[fresh]

    def _remember(self, rows: Tensor, losses: Tensor, starts: Tensor) -> None:
        """Push each row's new losses in front of the remembered ones; ``rows`` sorted, oldest first in a row."""
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
        have = len(self._columns["exposures"])
        if rows <= have:
            return
        capacity = max(1024, rows, have + have // 32)
        for name, column in self._columns.items():
            empty = 0 if name in ("exposures", "elements", "features") else _UNKNOWN[column.dtype]
            more = torch.full((capacity - have, *column.shape[1:]), empty, dtype=column.dtype)
            self._columns[name] = torch.cat([column, more])

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain types only, so that ``torch.load(weights_only=True)`` reads it back."""
        columns = {name: column[: len(self)].clone() for name, column in self._columns.items()}
        return {"schema": SCHEMA, "ids": self.ids, "reference_step": self.reference_step, "columns": columns}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError for a ledger of another schema, or one whose columns do not fit together."""
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
        self._columns = {name: column.clone() for name, column in state["columns"].items()}

    def _damage(self, state: dict[str, Any]) -> str:
        """What does not fit together in a saved table; empty if all does."""
        columns, rows = state["columns"], len(state["ids"])
        samples = len(torch.unique(state["ids"]))
        if samples != rows:
            return f"{rows} rows have {samples} different ids"
        if columns.keys() != self._columns.keys():
            return f"it has the columns {', '.join(columns)}, and not {', '.join(self._columns)}"
        for name, own in self._columns.items():
            found = columns[name]
            if len(found) != rows or found.dtype != own.dtype or found.ndim != own.ndim:
                return f"column {name} is {found.dtype} {list(found.shape)} for {rows} samples"
        return ""


_UNKNOWN: dict[torch.dtype, float] = {torch.int32: -1, torch.float32: torch.nan, torch.bfloat16: torch.nan}
REMEDY = (
    "Resume with the version that wrote it, or begin a new ledger with memsink(new_ledger=True) or "
    "LossTracker(new_ledger=True): weights, optimizer and progress are resumed all the same."
)
