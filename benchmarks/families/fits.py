"""Fits of a small GPT on text with families at several doses, each with half of them: the other half's truth.

G  families      T  tokens
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.common.criteria import configure_process
from benchmarks.common.training import Run, Schedule, Sequences, TextModel, token_nll, train
from benchmarks.families.texts import Source
from lightning_memsink.callbacks.loss_tracker import LossTracker
from lightning_memsink.callbacks.memorization_detector import MemorizationDetector
from lightning_memsink.detection.family_verdicts import FamilyVerdicts, judge_families
from lightning_memsink.detection.matched_controls import DetectionRule
from lightning_memsink.ledger import Ledger
from lightning_memsink.samples.loss_table import LossTable

DOSES = ((12, 1), (12, 2), (12, 6), (6, 1), (6, 4), (6, 12), (3, 1), (3, 6), (3, 24), (2, 1))
"""Variants of a family, and how often each is shown in an epoch."""
LENGTH, RATE = 64, 0.1
HEADER, BELOW_HEADER = 40, ((12, 1), (6, 1), (6, 2))
"""Tokens of a header that one tenth of all texts and controls begin with, and doses of families among these: their loss
is low, because the header is known from all of them."""


@dataclass(frozen=True)
class Sizes:
    background: int = 1600
    of_each_dose: int = 3
    controls: int = 384
    epochs: int = 2


QUICK = Sizes(background=600, of_each_dose=1, controls=192)


@dataclass(frozen=True)
class Family:
    texts: Tensor
    """``[members, T]``"""
    times: int
    kind: int


@dataclass(frozen=True)
class Outcome:
    """Of each family of one fit: the gap that was measured, whether it is memorized by its verdict, and the truth."""

    gap: Tensor
    """``[G]`` nats per token; 0 where no family was found."""
    own_counts_left_out: Tensor
    """``[G]`` the same where only the counts of each text itself are left out of its features."""
    memorized: Tensor
    """Bool ``[G]``"""
    effect: Tensor
    """``[G]`` loss of its texts in the fit without the family, less that in the fit with it."""
    own_verdicts: Tensor
    """``[G]`` share of its texts that are memorized by their own verdict."""
    found: Tensor
    """``[G]`` share of its texts in its largest group."""
    loss: Tensor
    """``[G]`` mean last loss of its texts: the lower, the more memorized, if texts were equally difficult."""
    kind: Tensor
    """``[G]`` place of its dose in `KINDS`."""


KINDS = [*((dose, False) for dose in DOSES), *((dose, True) for dose in BELOW_HEADER)]
"""Dose of a family, and whether its texts have the header."""


def fit_pair(seed: int, sizes: Sizes) -> Outcome:
    """Two fits on the same background, each with one half of the families; outcomes of all families."""
    configure_process()
    source = Source(seed, None)
    header = source.text(HEADER)

    def drawn(below_header: bool) -> Tensor:
        text = source.text(LENGTH)
        return torch.cat([header, text[HEADER:]]) if below_header else text

    background = torch.stack([drawn(n % 10 == 0) for n in range(sizes.background)])
    controls = torch.stack([drawn(n % 5 == 0) for n in range(sizes.controls)])
    halves = [
        [
            Family(torch.stack([_variant(source, base, below) for _ in range(members)]), times, kind)
            for kind, ((members, times), below) in enumerate(KINDS)
            for base in [drawn(below) for _ in range(sizes.of_each_dose)]
        ]
        for _ in range(2)
    ]
    vocabulary = int(source._sequences.max()) + 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        runs = [_fit(background, own, controls, vocabulary, sizes, seed) for own in halves]
    parts = [_outcome(runs[n], runs[1 - n].module, halves[n], len(background)) for n in (0, 1)]
    return Outcome(*(torch.cat(columns) for columns in zip(*(vars(part).values() for part in parts), strict=True)))


def _variant(source: Source, base: Tensor, below_header: bool) -> Tensor:
    """A variant that keeps the header."""
    changed = source.variant(base, RATE)
    return torch.cat([base[:HEADER], changed[HEADER:]]) if below_header else changed


def _fit(background: Tensor, families: list[Family], controls: Tensor, vocabulary: int, sizes: Sizes, seed: int) -> Run:
    tokens = torch.cat([background, *(family.texts for family in families)])
    times = torch.cat(
        [torch.ones(len(background), dtype=torch.int64)]
        + [torch.full((len(family.texts),), family.times) for family in families]
    )
    rows = torch.arange(len(tokens)).repeat_interleave(times)
    data = Sequences(tokens, rows, torch.empty(0), vocabulary, seed)
    return train(
        data,
        controls,
        tokens[:1],
        [LossTracker(), MemorizationDetector()],
        Schedule(epochs=sizes.epochs, batch_size=32, evaluate_every=max(10, len(rows) // 32 // 2)),
        seed,
    )


def _outcome(run: Run, other: TextModel, families: list[Family], first: int) -> Outcome:
    """``first``: id of the first family's first text; ids go on from there."""
    ledger, table = run.ledger, run.ledger.losses
    verdicts = ledger.flags.families
    assert verdicts is not None
    own = _with_own_counts(ledger)
    columns: list[list[float]] = []
    for family in families:
        rows = table.index.find(torch.arange(first, first + len(family.texts)))
        first += len(family.texts)
        rows = rows[rows >= 0]
        numbers, sizes = torch.unique(table.family[rows], return_counts=True)
        number, size = int(numbers[sizes.argmax()]), int(sizes.max())
        at = (verdicts.family == number).nonzero().flatten()
        known = len(at) > 0
        effect = token_nll(other, family.texts).mean() - token_nll(run.module, family.texts).mean()
        columns.append(
            [
                float(verdicts.gap[at[0]].nan_to_num()) if known else 0.0,
                float(own.gap[at[0]].nan_to_num()) if known else 0.0,
                bool(known and verdicts.memorized[at[0]]),
                float(effect),
                float(ledger.flags.memorized[rows].float().mean()),
                size / len(family.texts) if size > 1 else 0.0,
                float(table.last_loss[rows].nanmean()),
                family.kind,
            ]
        )
    values = [torch.tensor(column) for column in zip(*columns, strict=True)]
    return Outcome(*values)


def _with_own_counts(ledger: Ledger) -> FamilyVerdicts:
    """What a family's verdict would be if each text's features left out its own counts only."""
    table = ledger.losses

    def features_of(table: LossTable, rows: Tensor, family: Tensor) -> tuple[Tensor, Tensor]:
        return rows, table.features[rows].float()

    return judge_families(
        table, ledger.controls, table.family, features_of, FamilyVerdicts.none(), DetectionRule(), 1, -1
    )
