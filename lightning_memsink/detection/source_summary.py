"""How much of each source is memorized, from the loss table and the verdicts on its samples.

N  samples known      S  sources      M  controls
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_memsink.detection.onset import onset_of, onset_times
from lightning_memsink.detection.statistics import LN2
from lightning_memsink.detection.verdicts import Flags, Onset, Verdict
from lightning_memsink.samples.loss_table import LossTable
from lightning_memsink.samples.sources import NO_SOURCE

MEASURED = (
    Verdict.LEARNED,
    Verdict.HARD,
    Verdict.MEMORIZED,
    Verdict.WAITING,
    Verdict.BELOW_FLOOR,
    Verdict.AMONG_MEMORIZED,
)
"""Verdicts on samples whose loss could be compared with matched controls."""
CONTROLS_OF_A_SAMPLE = 8
"""With how many the detector compares a sample, by default."""
LARGEST_SHARE = 0.5
"""Of all visits. There is no telling what training would come to without a larger one."""
TAKEN = 0.25
"""Times a source's share of all visits: the part of its gap that other samples may have instead, without it. What is
learned by heart takes from a model what unseen samples would gain (`benchmarks.sources`: up to a fifth)."""
Z = 1.959964
"""Standard deviations of a normal interval of 95 %."""


@dataclass(frozen=True)
class SourceSummary:
    """A row per source that has samples, in the order of codes: all ``[S]``."""

    codes: Tensor
    """int64; `NO_SOURCE` for the samples without one, if there are any."""
    samples: Tensor
    tokens: Tensor
    """Of its samples, each once; float64."""
    exposures: Tensor
    """Visits of its samples."""
    repeated: Tensor
    """Samples with more than one exposure: the others are judged where a second look drew them."""
    measured: Tensor
    """Samples that were compared with matched controls."""
    memorized: Tensor
    """Measured samples with the verdict ``memorized``."""
    bits: Tensor
    """Memorized bits of its samples, float64: see `summarize_sources`. NaN where less than half was measured."""
    bits_low: Tensor
    bits_high: Tensor
    """The 95 % interval of ``bits``."""

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def share(self) -> Tensor:
        """``memorized`` as a share of ``measured``; NaN where none was measured."""
        return self.memorized.double() / self.measured

    def only(self, rows: Tensor) -> SourceSummary:
        """The sources in ``rows``, a mask or positions."""
        return SourceSummary(**{name: getattr(self, name)[rows] for name in self.__dataclass_fields__})

    def largest(self, count: int, by: str = "samples") -> SourceSummary:
        """The ``count`` sources with the largest value in a column, largest first; those without a label are left
        out."""
        labelled = self.only(self.codes != NO_SOURCE)
        values = getattr(labelled, by).double().nan_to_num(-torch.inf)
        return labelled.only(values.argsort(descending=True, stable=True)[:count])


def summarize_sources(table: LossTable, flags: Flags) -> SourceSummary:
    """The sources of a table, at the last evaluation.

    Bits sum, over all measured samples of a source, the gap above the mean gap of controls, times tokens. Flagged
    samples alone would give too much of what is flagged (a sample is flagged because its gap came out large) and
    nothing of the rest; over all samples the errors of single gaps cancel. The sum may be negative where nothing is
    memorized. Of samples that were seen once only some are measured, which a second look has drawn at random: they
    count for all of the source's that were seen once. Bits are unknown where less than half of a source's tokens was
    measured.

    What ``bits_low`` and ``bits_high`` span has two parts: what a single sample's loss deviates from that of its
    matched controls, which the controls' own gaps show, and what the controls deviate as a whole, which is common to
    all samples of a source. Of the M controls a source is taken to be compared with its share, as if they were drawn as
    the samples are, and at least with those of one sample. Training without the source would moreover teach less of
    what all samples share: both ends allow for what held-out loss moves where so many visits are missing (it falls
    about evenly with the logarithm of their number), and the lower end for what others would learn in its place. The
    upper end also allows for the latest training step on each sample, which came after its latest loss: as much again
    as each step before it has added on average. Not in it is what two fits differ by chance, which one fit does not
    show.
    """
    codes = table.source.long() + 1
    count = int(codes.max()) + 1 if len(codes) else 0
    tokens, exposures = table.elements.double(), table.exposures
    rows = measured_rows(flags)
    verdict = flags.verdict
    of_measured, their_tokens = codes[rows], tokens[rows]

    def sums(of: Tensor, weights: Tensor | None = None) -> Tensor:
        return torch.bincount(of, weights, minlength=count)

    once, all_once = exposures[rows] == 1, exposures == 1
    stands_for = sums(codes[all_once], tokens[all_once]) / sums(of_measured[once], their_tokens[once]).clamp(min=1)
    their_tokens = their_tokens * torch.where(once, stands_for.clamp(min=1)[of_measured], 1.0)

    null = flags.null_gaps[torch.isfinite(flags.null_gaps)].double()
    mean, variance = (null.mean(), null.var()) if len(null) > 1 else (torch.tensor(torch.nan),) * 2
    measured, token_sum = sums(of_measured), sums(of_measured, their_tokens)
    own_controls = (len(null) * measured / max(1, len(rows))).clamp(min=CONTROLS_OF_A_SAMPLE)
    their_bits = (flags.gap[rows].double() - mean) * their_tokens / LN2
    bits = sums(of_measured, their_bits)
    latest = sums(of_measured, their_bits / (exposures[rows] - 1).clamp(min=1)).clamp(min=0)
    error = (variance * (sums(of_measured, their_tokens.square()) + token_sum.square() / own_controls)).sqrt() / LN2
    visits = sums(codes, exposures.double())
    fewer = (visits / visits.sum().clamp(min=1)).clamp(max=LARGEST_SHARE)
    error = Z * error - _learning_rate(flags) * torch.log1p(-fewer) * token_sum / LN2
    taken = TAKEN * fewer * bits.clamp(min=0)
    is_of_bits = (2 * sums(of_measured, tokens[rows]) >= sums(codes, tokens)) & (measured > 0)
    is_of_bits &= torch.tensor(table.unit != "ratio")
    bits = torch.where(is_of_bits, bits, torch.nan)
    samples = sums(codes)
    summary = SourceSummary(
        codes=torch.arange(-1, count - 1),
        samples=samples,
        tokens=sums(codes, tokens),
        exposures=visits.long(),
        repeated=sums(codes[exposures > 1]),
        measured=measured,
        memorized=sums(codes[rows[verdict[rows] == Verdict.MEMORIZED]]),
        bits=bits,
        bits_low=bits - error - taken,
        bits_high=bits + error + latest,
    )
    return summary.only(samples > 0)


def measured_rows(flags: Flags) -> Tensor:
    """Rows of the samples that were compared with matched controls."""
    compared = torch.isin(flags.verdict, torch.tensor(MEASURED, dtype=torch.uint8))
    return (compared & torch.isfinite(flags.gap)).nonzero().flatten()


def _learning_rate(flags: Flags) -> float:
    """How far held-out loss moves where the training grows by a factor of e, in its unit: between the evaluation
    nearest to the middle of the run and the last one. 0 where that is unknown."""
    if not flags.evaluations:
        return 0.0
    last = flags.evaluations[-1]
    before = [each for each in flags.evaluations if 0 < each.step < last.step]
    if not before:
        return 0.0
    middle = min(before, key=lambda each: abs(each.step - last.step / 2))
    rate = abs(middle.control_loss - last.control_loss) / math.log(last.step / middle.step)
    return rate if math.isfinite(rate) else 0.0


def source_onsets(table: LossTable, flags: Flags, codes: Tensor) -> dict[int, Onset]:
    """By code, the onset of each of the sources ``codes`` ``[S]`` that has samples which were ever memorized."""
    rows = (flags.onset_step >= 0).nonzero().flatten()
    of_rows = table.source[rows].long()
    order = of_rows.argsort(stable=True)
    rows, of_rows = rows[order], of_rows[order]
    last = flags.evaluations[-1].step if flags.evaluations else 0
    onsets: dict[int, Onset] = {}
    for code in codes.tolist():
        first, end = torch.searchsorted(of_rows, torch.tensor([code, code + 1])).tolist()
        onset = onset_of(onset_times(table, flags, rows[first:end]), last)
        if onset is not None:
            onsets[code] = onset
    return onsets


def plain_row(summary: SourceSummary, place: int) -> dict[str, Any]:
    """The numbers of one source by name, as Python's, with its share; its place is that in the ``summary``."""
    names = ("samples", "tokens", "exposures", "measured", "memorized", "bits", "bits_low", "bits_high")
    return {name: getattr(summary, name)[place].item() for name in names} | {"share": summary.share[place].item()}
