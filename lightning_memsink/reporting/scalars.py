"""The scalars of an evaluation, and the list of memorized samples, computed from the ledger's tables.

N  samples known      M  controls      R  samples of a canary group      W  twins of a canary group
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from lightning_memsink.detection.source_summary import SourceSummary
from lightning_memsink.detection.statistics import LN2, finite_mean
from lightning_memsink.detection.verdicts import Evaluation, Flags, Onset, Verdict
from lightning_memsink.extraction.canaries import CanaryGroup
from lightning_memsink.reporting.gap_units import RATIO
from lightning_memsink.samples.control_table import ControlTable
from lightning_memsink.samples.id_index import IdIndex
from lightning_memsink.samples.loss_table import LossTable

EVALUATION = (
    *("gap", "null_low", "null_high", "threshold", "gap_memorized", "flagged_fraction"),
    *("control_loss", "train_loss", "p_floor", "controls", "tested", "looked"),
)
"""Series of every evaluation, named like the fields of ``Evaluation``."""
STATEMENT = ("share", "share_low", "share_high", "detectable_gap")
"""Series of every evaluation that measured a random sample, named like the fields of ``RunStatement``."""
ONSET = ("step", "step_low", "step_high", "exposures", "exposures_low", "exposures_high")
"""Series ``onset_*``, which begin when an onset is known."""
MOST_SOURCES, LABEL_LENGTH = 20, 60
"""Sources that have series, and letters of a label in their names."""


@dataclass(frozen=True)
class PlantedIds:
    """The ids of a canary group, computed once. ``natural x64`` is member ``x64`` of the family ``natural``."""

    family: str
    member: str
    ids: Tensor
    """``[R]`` int64, among the training samples."""
    twin_ids: Tensor
    """``[W]`` int64, among the controls."""

    @staticmethod
    def of(group: CanaryGroup) -> PlantedIds:
        family = re.sub(r"[\s_-]*[x×]?\d+$", "", group.name) or "rung"
        return PlantedIds(family.replace(" ", "_"), f"x{group.repeats}", group.ids, group.twin_ids)


def scalars(
    table: LossTable, controls: ControlTable, flags: Flags, onset: Onset | None, planted: Sequence[PlantedIds]
) -> dict[str, float]:
    """A row of the history, of the last evaluation: ``step`` and every series by name. Only finite values are in it.

    Losses by group are those of the ``planted`` samples; if nothing was planted, those by number of exposures.
    """
    evaluation = flags.evaluations[-1]
    row: dict[str, float] = {"step": evaluation.step}
    row |= {name: getattr(evaluation, name) for name in EVALUATION}
    if evaluation.statement is not None:
        row |= {name: getattr(evaluation.statement, name) for name in STATEMENT}
    row["gap_of_top_percent"] = gap_of_top_percent(flags)
    row |= {f"verdict/{word}": count for word, count in evaluation.counts.items()}
    if onset is not None:
        row |= {f"onset_{name}": getattr(onset, name) for name in ONSET}
    if planted:
        row |= canary_series(table, controls, flags, evaluation, planted)
    else:
        row |= exposure_series(table, flags, evaluation)
    return {name: float(value) for name, value in row.items() if math.isfinite(value)}


def source_series(table: LossTable, sources: SourceSummary, most: int = MOST_SOURCES) -> dict[str, float]:
    """``source/LABEL/share`` and ``source/LABEL/bits`` of the largest sources; the report has the others, too.

    Loggers make paths and files of names, so a label keeps its letters, digits, dots and dashes only. Where two sources
    are alike then, the code of the later one is added.
    """
    series: dict[str, float] = {}
    largest = sources.largest(most)
    shares, bits = largest.share.tolist(), largest.bits.tolist()
    for place, code in enumerate(largest.codes.tolist()):
        label = re.sub(r"[^\w.-]+", "_", table.source_names.label(code) or "", flags=re.ASCII)[:LABEL_LENGTH] or "_"
        if f"source/{label}/share" in series:
            label = f"{label}_{code}"
        series |= {f"source/{label}/share": shares[place], f"source/{label}/bits": bits[place]}
    return {name: value for name, value in series.items() if math.isfinite(value)}


def canary_series(
    table: LossTable, controls: ControlTable, flags: Flags, evaluation: Evaluation, planted: Sequence[PlantedIds]
) -> dict[str, float]:
    """``loss/FAMILY/MEMBER``, the mean last loss, and ``share/FAMILY/MEMBER``, the share in 0…1 that is memorized.

    One pair per canary group, and per family a pair with the member ``twins``. Twins can't be memorized: their share is
    of those whose gap to the other controls passes the threshold, which by itself is not enough for a flag.
    """
    series: dict[str, float] = {}
    twins: dict[str, list[Tensor]] = {}
    memorized = _memorized(table, flags)
    for group in planted:
        rows = _known(table.index, group.ids)
        series[f"loss/{group.family}/{group.member}"] = finite_mean(table.last_loss[rows].double())
        series[f"share/{group.family}/{group.member}"] = finite_mean(memorized[rows].double())
        twins.setdefault(group.family, []).append(group.twin_ids)
    passes = _null_by_control(controls, flags) >= evaluation.threshold
    for family, ids in twins.items():
        of_family = torch.isin(controls.ids, torch.cat(ids))
        series[f"loss/{family}/twins"] = finite_mean(controls.latest[of_family].double())
        if len(passes) == len(of_family):
            series[f"share/{family}/twins"] = finite_mean(passes[of_family].double())
    return series


def exposure_series(table: LossTable, flags: Flags, evaluation: Evaluation) -> dict[str, float]:
    """``loss/exposures/BIN`` and ``share/exposures/BIN`` of samples with 1, 2-3, 4-7, … exposures; the mean loss of all
    controls is ``loss/exposures/controls``."""
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
    """A memorized sample as tables list it. Losses are in nats, per token for token losses, the gap in the unit of the
    evaluation.

    ``bits`` is the gap over the whole sample, in bits; NaN where the gap is a ratio, which has none.
    """

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
        """The id as 16 hexadecimal digits. A browser's numbers are doubles, which can't hold 64-bit ids exactly."""
        return f"{self.id & (2**64 - 1):016x}"

    @property
    def name(self) -> str:
        """The id for people: decimal if it is a small number, hexadecimal if it is a hash.

        Not the sample's own key, which no logger shows: see `Findings.names_of`.
        """
        return str(self.id) if 0 <= self.id < 2**40 else self.hash


def top_memorized(table: LossTable, flags: Flags, step: int, top: int) -> list[MemorizedSample]:
    """The ``top`` memorized samples with the largest gaps, largest first. ``step``: of the evaluation."""
    rows = flags.memorized.nonzero().flatten()
    gaps = flags.gap[rows].double()
    rows = rows[gaps.nan_to_num(-math.inf).argsort(descending=True)[:top]]
    ids = table.ids[rows].tolist()
    return [_sample(table, flags, step, row, id) for row, id in zip(rows.tolist(), ids, strict=True)]


def _sample(table: LossTable, flags: Flags, step: int, row: int, id: int) -> MemorizedSample:
    loss, gap = float(table.last_loss[row]), float(flags.gap[row])
    onset, is_ratio = int(flags.onset_step[row]), flags.evaluations[-1].unit == RATIO
    return MemorizedSample(
        step=step,
        id=id,
        exposures=int(table.exposures[row]),
        loss=loss,
        control_loss=loss * math.exp(gap) if is_ratio else loss + gap,
        gap=gap,
        bits=math.nan if is_ratio else gap * int(table.elements[row]) / LN2,
        p=float(flags.p[row]),
        verdict=Verdict(int(flags.verdict[row])).word,
        onset_step=onset if onset >= 0 else None,
    )


COLUMNS = ("step", "id", "hash", *list(MemorizedSample.__dataclass_fields__)[2:])


def row_values(sample: MemorizedSample) -> list[object]:
    """The values of ``COLUMNS`` of a sample. The id is text: see ``hash``."""
    values = {**asdict(sample), "id": str(sample.id), "hash": sample.hash}
    return [values[column] for column in COLUMNS]


def gap_of_top_percent(flags: Flags) -> float:
    """Mean gap of the 1 % of samples with the largest gaps, flagged or not; NaN if no gap was measured.

    It compares runs even if one of them flags no sample.
    """
    gaps = measured_gaps(flags)
    return float(gaps.topk(max(1, len(gaps) // 100)).values.mean()) if len(gaps) else math.nan


def measured_gaps(flags: Flags) -> Tensor:
    """The finite gaps of all samples, float32."""
    gaps = flags.gap.float()
    return gaps[torch.isfinite(gaps)]


def any_known(table: LossTable, planted: Iterable[PlantedIds]) -> bool:
    """Whether the table has any planted sample."""
    return any(len(_known(table.index, group.ids)) for group in planted)


def _known(index: IdIndex, ids: Tensor) -> Tensor:
    """Rows of those ``ids`` that the table has."""
    rows = index.find(ids)
    return rows[rows >= 0]


def _memorized(table: LossTable, flags: Flags) -> Tensor:
    """Bool ``[N]``; False for samples that were first seen after the last evaluation."""
    memorized = torch.zeros(len(table), dtype=torch.bool)
    memorized[: len(flags.verdict)] = flags.memorized
    return memorized


def _null_by_control(controls: ControlTable, flags: Flags) -> Tensor:
    """Null gaps of the held-out controls in their order, ``[M]``: NaN for a control without a finite loss.

    Empty if the null gaps are of another number of them.
    """
    used = torch.isfinite(controls.unknown_to_the_model) & torch.isfinite(controls.previous)
    last = flags.evaluations[-1]
    held_out = last.held_out if last.held_out or last.first_visits else len(flags.null_gaps)
    if int(used.sum()) != held_out or held_out > len(flags.null_gaps):
        return torch.zeros(0)
    gaps = torch.full((len(controls),), torch.nan)
    gaps[used] = flags.null_gaps[:held_out].float()
    return gaps
