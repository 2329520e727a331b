"""What the curves show: from the ledger's tables to plain numbers, an evaluation at a time.

N  samples known      M  controls      R  samples of a rung      W  twins of a rung
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from lightning_memsink.detection.statistics import LN2
from lightning_memsink.detection.verdicts import Evaluation, Flags, Onset, Verdict
from lightning_memsink.samples.control_table import ControlTable
from lightning_memsink.samples.id_index import IdIndex
from lightning_memsink.samples.loss_table import LossTable

EVALUATION = (
    *("gap", "null_low", "null_high", "threshold", "gap_memorized", "flagged_fraction"),
    *("control_loss", "train_loss", "p_floor", "controls", "tested"),
)
"""Series that every evaluation has, as far as they are finite; named like the fields of ``Evaluation``."""
ONSET = ("step", "step_low", "step_high", "exposures", "exposures_low", "exposures_high")
"""Series ``onset_*`` that begin once an onset is known."""


class Rung(Protocol):
    """Samples planted on purpose, each ``repeats`` times, and twins of the same kind among the controls."""

    @property
    def name(self) -> str: ...
    @property
    def repeats(self) -> int: ...
    @property
    def ids(self) -> Tensor:
        """``[R]`` int64 ids among the training samples."""

    @property
    def twin_ids(self) -> Tensor:
        """``[W]`` int64 ids among the controls."""


@runtime_checkable
class HasRungs(Protocol):
    """A data module that knows what it planted."""

    def rungs(self) -> Sequence[Rung]: ...


@dataclass(frozen=True)
class PlantedIds:
    """A rung with its ids looked up once. ``natural x64`` is member ``x64`` of the family ``natural``."""

    family: str
    member: str
    ids: Tensor
    twin_ids: Tensor

    @staticmethod
    def of(rung: Rung) -> PlantedIds:
        family = re.sub(r"[\s_-]*[x×]?\d+$", "", rung.name) or "rung"
        return PlantedIds(family.replace(" ", "_"), f"x{rung.repeats}", rung.ids, rung.twin_ids)


def scalars(
    table: LossTable, controls: ControlTable, flags: Flags, onset: Onset | None, rungs: Sequence[PlantedIds]
) -> dict[str, float]:
    """A row of the history, of the last evaluation: ``step`` and every series by name; what is not finite is absent."""
    evaluation = flags.evaluations[-1]
    row: dict[str, float] = {"step": evaluation.step}
    row |= {name: getattr(evaluation, name) for name in EVALUATION}
    row["gap_of_top_percent"] = gap_of_top_percent(flags)
    row |= {f"verdict/{word}": count for word, count in evaluation.counts.items()}
    if onset is not None:
        row |= {f"onset_{name}": getattr(onset, name) for name in ONSET}
    if rungs:
        row |= rung_series(table, controls, flags, evaluation, rungs)
    else:
        row |= exposure_series(table, flags, evaluation)
    return {name: float(value) for name, value in row.items() if math.isfinite(value)}


def rung_series(
    table: LossTable, controls: ControlTable, flags: Flags, evaluation: Evaluation, rungs: Sequence[PlantedIds]
) -> dict[str, float]:
    """``loss/FAMILY/MEMBER`` mean last loss and ``share/FAMILY/MEMBER`` memorized in 0…1, per rung and per twin set.

    For twins, which can't be memorized, the share is of those whose gap to their fellow controls passes the
    threshold: false flags, had they been tested.
    """
    series: dict[str, float] = {}
    twins: dict[str, list[Tensor]] = {}
    memorized = _memorized(table, flags)
    for rung in rungs:
        rows = _known(table.index, rung.ids)
        series[f"loss/{rung.family}/{rung.member}"] = _mean(table.last_loss[rows])
        series[f"share/{rung.family}/{rung.member}"] = _mean(memorized[rows].float())
        twins.setdefault(rung.family, []).append(rung.twin_ids)
    passes = _null_by_control(controls, flags) >= evaluation.threshold
    for family, ids in twins.items():
        among = torch.isin(controls.ids, torch.cat(ids))
        series[f"loss/{family}/twins"] = _mean(controls.latest[among])
        if len(passes) == len(among):
            series[f"share/{family}/twins"] = _mean(passes[among].float())
    return series


def exposure_series(table: LossTable, flags: Flags, evaluation: Evaluation) -> dict[str, float]:
    """The same where nothing was planted: samples in bins of exposures 1, 2-3, 4-7, …, against all controls."""
    series: dict[str, float] = {}
    power_of = torch.searchsorted(2 ** torch.arange(1, 31), table.exposures, right=True)
    samples = torch.bincount(power_of)
    finite = torch.isfinite(table.last_loss)
    losses = torch.bincount(power_of[finite], table.last_loss[finite].double(), len(samples))
    finite_losses = torch.bincount(power_of[finite], minlength=len(samples))
    memorized = torch.bincount(power_of[_memorized(table, flags)], minlength=len(samples))
    for power in samples.nonzero().flatten().tolist():
        low, high = 2**power, 2 ** (power + 1) - 1
        name = "1" if high == 1 else f"{low}-{high}"
        series[f"loss/exposures/{name}"] = float(losses[power] / finite_losses[power])
        series[f"share/exposures/{name}"] = int(memorized[power]) / int(samples[power])
    series["loss/exposures/controls"] = evaluation.control_loss
    return series


@dataclass(frozen=True)
class MemorizedSample:
    """One sample as tables list it. Losses and gap in nats (per token for token losses), bits over all its tokens."""

    step: int
    """Of the evaluation."""
    id: int
    exposures: int
    loss: float
    control_loss: float
    """Expected from its matched controls."""
    gap: float
    bits: float
    p: float
    verdict: str
    onset_step: int | None

    @property
    def hash(self) -> str:
        """The id as 16 hexadecimal digits: 64-bit ids lose their last digits in a browser's numbers."""
        return f"{self.id & (2**64 - 1):016x}"

    @property
    def name(self) -> str:
        """For people: a number as a number, a hash as a hash."""
        return str(self.id) if 0 <= self.id < 2**40 else self.hash


def top_memorized(table: LossTable, flags: Flags, step: int, top: int) -> list[MemorizedSample]:
    """The ``top`` memorized samples of largest gap, largest first."""
    rows = flags.memorized.nonzero().flatten()
    gaps = flags.gap[rows].double()
    rows = rows[gaps.nan_to_num(-math.inf).argsort(descending=True)[:top]]
    ids = table.ids[rows].tolist()
    return [_sample(table, flags, step, row, id) for row, id in zip(rows.tolist(), ids, strict=True)]


def _sample(table: LossTable, flags: Flags, step: int, row: int, id: int) -> MemorizedSample:
    loss, gap = float(table.last_loss[row]), float(flags.gap[row])
    onset = int(flags.onset_step[row])
    return MemorizedSample(
        step=step,
        id=id,
        exposures=int(table.exposures[row]),
        loss=loss,
        control_loss=loss + gap,
        gap=gap,
        bits=gap * int(table.elements[row]) / LN2,
        p=float(flags.p[row]),
        verdict=Verdict(int(flags.verdict[row])).word,
        onset_step=onset if onset >= 0 else None,
    )


COLUMNS = ("step", "id", "hash", *list(MemorizedSample.__dataclass_fields__)[2:])


def cells(sample: MemorizedSample) -> list[object]:
    """A sample as a row of ``COLUMNS``; the id as text, for the reason given at ``hash``."""
    values = {**asdict(sample), "id": str(sample.id), "hash": sample.hash}
    return [values[column] for column in COLUMNS]


def gap_of_top_percent(flags: Flags) -> float:
    """Mean gap of the hundredth of samples with the largest, whether flagged or not: it compares between runs of which
    one flags nothing. NaN if none was measured."""
    gaps = measured_gaps(flags)
    return float(gaps.topk(max(1, len(gaps) // 100)).values.mean()) if len(gaps) else math.nan


def measured_gaps(flags: Flags) -> Tensor:
    """The gaps of all samples ever measured."""
    gaps = flags.gap.float()
    return gaps[torch.isfinite(gaps)]


def rungs_found(table: LossTable, rungs: Iterable[PlantedIds]) -> bool:
    """Whether any planted sample was seen."""
    return any(len(_known(table.index, rung.ids)) for rung in rungs)


def _known(index: IdIndex, ids: Tensor) -> Tensor:
    rows = index.find(ids)
    return rows[rows >= 0]


def _memorized(table: LossTable, flags: Flags) -> Tensor:
    """Bool ``[N]``; samples that came after the last evaluation are not."""
    memorized = torch.zeros(len(table), dtype=torch.bool)
    memorized[: len(flags.verdict)] = flags.memorized
    return memorized


def _null_by_control(controls: ControlTable, flags: Flags) -> Tensor:
    """``[M]`` null gaps beside the controls' ids, NaN where a control had no finite loss; empty if they don't fit."""
    used = torch.isfinite(controls.latest) & torch.isfinite(controls.previous)
    if int(used.sum()) != len(flags.null_gaps):
        return torch.zeros(0)
    gaps = torch.full((len(controls),), torch.nan)
    gaps[used] = flags.null_gaps.float()
    return gaps


def _mean(values: Tensor) -> float:
    finite = values[torch.isfinite(values)]
    return float(finite.double().mean()) if len(finite) else math.nan
