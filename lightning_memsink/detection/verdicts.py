"""The detector's results: verdicts on samples, evaluations and the onset of the run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_memsink.detection.run_statement import RunStatement

if TYPE_CHECKING:
    from lightning_memsink.detection.family_verdicts import FamilyVerdicts
    from lightning_memsink.samples.loss_table import LossTable


class Verdict(IntEnum):
    """The verdict on a sample. Those from ``NO_LOSS`` on share the word ``undecided`` and differ in the reason."""

    UNSEEN = 0  # no loss was measured after a training step on it
    LEARNED = 1  # low loss, like its controls
    HARD = 2  # high loss, like its controls
    MEMORIZED = 3  # far lower loss than its controls, at two evaluations in a row
    NO_LOSS = 4
    TOO_FEW_CONTROLS = 5
    NO_MATCHED_CONTROLS = 6
    WAITING = 7
    BELOW_FLOOR = 8  # a lower loss than all controls, but there are too few of them to say so of one sample among many
    EQUAL_CONTROLS = 9  # the controls' losses are equal
    AMONG_MEMORIZED = 10  # more samples are memorized than are flagged, and its gap is one that they may have

    @property
    def word(self) -> str:
        """``unseen``, ``learned``, ``hard``, ``memorized`` or ``undecided``."""
        return "undecided" if self >= Verdict.NO_LOSS else self.name.lower()

    @property
    def reason(self) -> str:
        """Why a sample is undecided; empty for the other verdicts."""
        return _REASONS.get(self, "")


_REASONS = {
    Verdict.NO_LOSS: "no finite loss",
    Verdict.TOO_FEW_CONTROLS: "too few controls",
    Verdict.NO_MATCHED_CONTROLS: "no matched controls",
    Verdict.WAITING: "flagged once, waits for a second evaluation",
    Verdict.BELOW_FLOOR: "beyond all controls, but too few controls",
    Verdict.EQUAL_CONTROLS: "controls can't tell samples apart",
    Verdict.AMONG_MEMORIZED: "as far below as memorized samples, but so are some controls",
}
WORDS = ("unseen", "learned", "hard", "memorized", "undecided")


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of the whole run. Losses in nats (per token for token losses), gaps in ``unit``."""

    step: int
    epoch: int
    controls: int
    tested: int
    """Samples with a loss measured after a training step on them, since the evaluation before."""
    counts: Mapping[str, int]
    """Samples by word, all samples known."""
    train_loss: float
    """Mean last loss of the tested samples."""
    control_loss: float
    gap: float
    """Mean of (expected from matched controls - own loss) over tested samples; > 0: lower loss than controls."""
    gap_memorized: float
    """The same over memorized samples; NaN if there is none."""
    null_low: float
    """2.5 % quantile of the gaps of controls, each against the other controls."""
    null_high: float
    """97.5 % quantile of them."""
    null_sd: float
    """Robust standard deviation of them."""
    threshold: float
    """Smallest gap that is flagged."""
    p_floor: float
    """Smallest p-value that this many controls allow."""
    alpha: float
    """False-discovery rate over the tested samples."""
    tail: str
    """How p-values were computed: ``conformal``; ``none``, if no sample was measured; ``normal``, a fitted tail, in
    evaluations of older versions."""
    unit: str = "nats"
    """``nats`` (per token for token losses), or ``ratio``: the logarithm of the controls' loss over the sample's."""
    held_out: int = 0
    """Controls that are held-out samples."""
    first_visits: int = 0
    """Controls that are first visits of training samples."""
    looked: int = 0
    """Samples that were measured once more, in the mode and at the step of the controls."""
    by_first_visits: float = math.nan
    """Share of the memorized samples of this evaluation whose matched controls are first visits for the most part."""
    controls_needed: int = 0
    """Controls that the samples beyond all controls would take for a verdict; 0 if there are none."""
    null_share: float = 1.0
    """Estimated share of samples that are not memorized, by which the procedure of Benjamini and Hochberg adapts."""
    statement: RunStatement | None = None
    """What a random sample says of the whole run."""

    @property
    def memorized(self) -> int:
        return self.counts["memorized"]

    @property
    def flagged_fraction(self) -> float:
        """Memorized samples as a share of all samples known, in 0…1."""
        return self.counts["memorized"] / max(1, sum(self.counts.values()))


@dataclass(frozen=True)
class Onset:
    """When memorization began: step and exposures over the memorized samples, each with a 95 % interval.

    The value is a quantile (by default one tenth) of the samples' own onsets. The interval is a bootstrap percentile
    interval over samples (Efron 1979). Its lower end is moved to the evaluation before, because the onset lies
    between two evaluations.
    """

    step: int
    step_low: int
    step_high: int
    exposures: float
    exposures_low: float
    exposures_high: float
    samples: int
    """Number of memorized samples that the estimate is computed from."""


class Flags:
    """The detector's columns, aligned with the rows of the loss table, and its evaluations so far.

    ``verdict[n]`` is a :class:`Verdict`; ``gap[n]`` in nats, NaN until measured; ``p[n]`` after the last
    measurement, NaN until then; ``streak[n]`` is the number of evaluations in a row at which it was flagged;
    ``onset_step[n]`` and ``onset_exposures[n]`` are step and exposures of the visit that was flagged first, -1 without;
    ``onset_after[n]`` is the step at which it was measured last before, and not flagged; -1 without.
    ``looked`` ``[V]`` are the rows that the last evaluation measured once more.
    ``null_gaps`` ``[M]``: gap of each control against the other controls at the last evaluation, held-out ones first.
    """

    def __init__(self) -> None:
        self.verdict = torch.zeros(0, dtype=torch.uint8)
        self.gap = torch.zeros(0, dtype=torch.float16)
        self.p = torch.zeros(0, dtype=torch.bfloat16)
        self.streak = torch.zeros(0, dtype=torch.uint8)
        self.onset_step = torch.zeros(0, dtype=torch.int32)
        self.onset_exposures = torch.zeros(0, dtype=torch.int16)
        self.onset_after = torch.zeros(0, dtype=torch.int32)
        self.looked = torch.zeros(0, dtype=torch.int64)
        self.null_gaps = torch.zeros(0)
        self.evaluations: list[Evaluation] = []
        self.families: FamilyVerdicts | None = None
        """Of near-duplicate texts, where these are looked for. Its state is kept apart."""

    def grow(self, rows: int) -> None:
        """Extends all columns to ``rows`` samples; new ones are unseen."""
        new = rows - len(self.verdict)
        if new > 0:
            for name, empty in _COLUMNS.items():
                column = getattr(self, name)
                setattr(self, name, torch.cat([column, torch.full((new,), empty, dtype=column.dtype)]))

    @property
    def nbytes(self) -> int:
        """Memory of all columns in bytes."""
        return sum(getattr(self, name).nbytes for name in _COLUMNS)

    @property
    def memorized(self) -> Tensor:
        """Bool ``[N]``: samples that are memorized now."""
        return self.verdict == Verdict.MEMORIZED

    def counts(self) -> dict[str, int]:
        """Number of samples by word."""
        by_code = torch.bincount(self.verdict.long(), minlength=len(Verdict)).tolist()
        counts = dict.fromkeys(WORDS, 0)
        for verdict in Verdict:
            counts[verdict.word] += by_code[verdict]
        return counts

    def state_dict(self) -> dict[str, Any]:
        columns = {name: getattr(self, name) for name in (*_COLUMNS, "null_gaps", "looked")}
        return {**columns, "evaluations": [asdict(evaluation) for evaluation in self.evaluations]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        known = len(state["verdict"])
        for name, unknown in _COLUMNS.items():
            empty = torch.full((known,), unknown, dtype=getattr(self, name).dtype)
            setattr(self, name, state.get(name, empty).clone())  # older versions had fewer columns
        self.null_gaps = state["null_gaps"].clone()
        self.looked = state.get("looked", self.looked).clone()
        self.evaluations = [
            Evaluation(**record | {"statement": _statement(record.get("statement"))}) for record in state["evaluations"]
        ]


def _statement(record: Mapping[str, Any] | None) -> RunStatement | None:
    return None if record is None else RunStatement.of(record)


def verdicts_of(ids: Tensor, table: LossTable, flags: Flags) -> Tensor:
    """Verdict codes ``[B]`` of the samples ``ids``; a sample first visited after the last evaluation is unseen."""
    rows = table.index.find(ids)
    known = (rows >= 0) & (rows < len(flags.verdict))
    codes = torch.full_like(rows, int(Verdict.UNSEEN))
    codes[known] = flags.verdict[rows[known]].long()
    return codes


_COLUMNS = {
    "verdict": int(Verdict.UNSEEN),
    "gap": torch.nan,
    "p": torch.nan,
    "streak": 0,
    "onset_step": -1,
    "onset_exposures": -1,
    "onset_after": -1,
}
