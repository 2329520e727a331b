"""How many bits of each source does a model know by heart, and is that what training without the source says?

Six sources of one kind of text, packed into rows, differ in how many times an epoch their documents are shown. What the
callbacks say of each from the one run is compared with further runs, each without one source: there its documents have
the loss that they have unlearned, and the difference, in bits, is the truth. It holds what the two runs differ by
chance, too. A document that was seen once has no estimate: that would need a loss after training on it.

Without a source that has half of all visits, unseen documents have lower losses: the model learns others in its place.
So its bits come out too high, by a tenth after three epochs; the lower end of an interval allows for it.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from rich.table import Table
from torch import Tensor

from benchmarks.common.criteria import (
    Criterion,
    Report,
    argument_parser,
    configure_process,
    fresh_seeds,
    run_in_processes,
)
from benchmarks.sources.runs import Outcome, Sizes, fit, label, planted
from lightning_memsink.detection.source_budget import SourceBudget, State
from lightning_memsink.detection.source_summary import plain_row, summarize_sources

EPOCHS = (1, 3)
QUICK = Sizes(doses=(1, 8, 32), documents=16, background=1600, controls=200, evaluations=10)
COVERED = 0.9
"""Share of the intervals of 95 % that must hold the truth."""
WIDEST = 0.4
"""Half an interval's width as a share of the estimate, for the source that is shown most: intervals that say nothing
would hold any truth."""
APART, FAR = 0.5, 0.25
"""Documents memorized by so much that the run could find a single one must, where their share is ``APART``, cross a
budget of half of it. A budget of half the share of those memorized by more than the threshold must not be said to be
kept, and one that is larger than it by ``FAR`` must not be crossed. In between, several answers fit."""
SMALLEST = 0.05
"""The budget of a source of which nothing is memorized, which it must not cross."""


@dataclass(frozen=True)
class Row:
    """One source in one run."""

    dose: int
    epochs: int
    seed: int
    bits: float
    """The estimate and its interval; NaN without one."""
    low: float
    high: float
    truth: float
    """Bits."""
    share: float
    """Of its measured documents, those that are memorized."""
    true_share: float
    """Of its documents, those whose loss per token is higher without the source by more than the threshold."""
    wrong_budgets: int
    """Budgets with a state that is not right (`budgets_beside`)."""
    budgets: int

    @property
    def is_known(self) -> bool:
        return math.isfinite(self.bits)

    @property
    def is_covered(self) -> bool:
        return self.low <= self.truth <= self.high


def main(arguments_given: Sequence[str] | None = None) -> int:
    parser = argument_parser("sources", "Memorized bits of sources against training without each.", seeds=3)
    options = parser.parse_args(arguments_given)
    options.seeds = 1 if options.quick else options.seeds
    seeds, start = fresh_seeds(options), time.perf_counter()
    configure_process()
    sizes = QUICK if options.quick else Sizes()
    sources = [None, *map(label, sizes.doses)]
    # The long fits first, so that no process waits for one at the end.
    jobs = [(sizes, seed, epochs, left_out) for epochs in EPOCHS[::-1] for seed in seeds for left_out in sources]
    outcomes = dict(zip(jobs, run_in_processes(quietly, jobs), strict=True))
    rows: list[Row] = []
    for epochs in EPOCHS:
        for seed in seeds:
            without = [outcomes[sizes, seed, epochs, source].losses for source in sources[1:]]
            rows += compared(sizes, seed, epochs, outcomes[sizes, seed, epochs, None], without)
    return report(rows, seeds, time.perf_counter() - start).publish(options.json)


def quietly(sizes: Sizes, seed: int, epochs: int, left_out: str | None) -> Outcome:
    """`fit`, without what Lightning prints."""
    configure_process()  # again: Lightning, which is loaded by now, has set the level of its messages
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fit(sizes, seed, epochs, left_out)


def compared(sizes: Sizes, seed: int, epochs: int, outcome: Outcome, without: Sequence[Tensor]) -> list[Row]:
    """A row for each source. ``without``: for each, the losses ``[D]`` of all documents after training without it."""
    table, flags = outcome.table, outcome.flags
    assert table is not None and flags is not None  # it is the run that was watched
    summary = summarize_sources(table, flags)
    targets = torch.tensor([len(each.tokens) - 1 for each in planted(sizes, seed).planted])
    rows = []
    for number, dose in enumerate(sizes.doses):
        own = slice(number * sizes.documents, (number + 1) * sizes.documents)
        gained = (without[number] - outcome.losses)[own]
        latest = flags.evaluations[-1]
        assert latest.statement is not None
        by_token = gained / targets[own]
        true_share = float((by_token >= latest.threshold).float().mean())
        sure_share = float((by_token >= latest.statement.detectable_gap).float().mean())
        code = table.source_names.labels.index(label(dose))
        found = plain_row(summary, int((summary.codes == code).nonzero()))
        wrong, of = 0, 0
        for budget, right in budgets_beside(true_share, sure_share) if found["measured"] else []:
            states = {each.source: each.state for each in SourceBudget({label(dose): budget}).rows(table, flags)}
            wrong += states[label(dose)] not in right
            of += 1
        estimate = found["bits"], found["bits_low"], found["bits_high"]
        truth = float(gained.sum()) / math.log(2)
        rows.append(Row(dose, epochs, seed, *estimate, truth, found["share"], true_share, wrong, of))
    return rows


def budgets_beside(share: float, sure: float) -> list[tuple[float, tuple[State, ...]]]:
    """Budgets for a source of which this ``share`` is memorized, ``sure`` of it by what can't be missed, and the states
    that are right for each."""
    above = share + FAR if share else SMALLEST
    budgets: list[tuple[float, tuple[State, ...]]] = [(above, ("inside", "undecided"))] if above <= 1 else []
    if share >= APART:
        budgets.append((share / 2, ("crossed", "undecided")))
    if sure >= APART:
        budgets.append((sure / 2, ("crossed",)))
    return budgets


def in_order(rows: Sequence[Row]) -> float:
    """Share of the pairs of sources whose order by estimated bits is that of their doses, in a run; 0 without one."""
    pairs = list(combinations([row for row in rows if row.is_known], 2))
    right = sum((one.bits < other.bits) == (one.dose < other.dose) for one, other in pairs)
    return right / max(1, len(pairs))


def report(rows: Sequence[Row], seeds: Sequence[int], seconds: float) -> Report:
    known = [row for row in rows if row.is_known]
    covered, wrong = sum(row.is_covered for row in known), sum(row.wrong_budgets for row in rows)
    return Report(
        name="sources",
        tables=[table([row for row in rows if row.epochs == epochs], epochs) for epochs in EPOCHS],
        criteria=criteria(rows),
        figure=f"sources: the truth is in {covered} of {len(known)} intervals, {wrong} of "
        f"{sum(row.budgets for row in rows)} budgets are judged wrong; {len(seeds)} seeds, {seconds:.0f} s",
        settings={"seeds": list(seeds)},
    )


def criteria(rows: Sequence[Row]) -> list[Criterion]:
    runs = [
        [row for row in rows if (row.seed, row.epochs) == (seed, epochs)]
        for seed in sorted({row.seed for row in rows})
        for epochs in EPOCHS
    ]
    known = [row for row in rows if row.is_known]
    unknown = sum(not row.is_known and row.dose * row.epochs > 1 for row in rows)
    largest = max(row.dose for row in rows)
    widths = [(row.high - row.low) / 2 / row.bits for row in known if row.dose == largest]
    return [
        Criterion("repeated sources without an estimate", unknown, "<=", 0),
        Criterion("pairs of sources in the order of their doses, worst run", min(map(in_order, runs)), ">=", 1),
        Criterion("intervals with the truth", sum(row.is_covered for row in known) / len(known), ">=", COVERED),
        Criterion("half an interval as a share of the estimate, largest dose, worst", max(widths), "<=", WIDEST),
        Criterion("budgets judged wrong", sum(row.wrong_budgets for row in rows), "<=", 0),
    ]


def table(rows: Sequence[Row], epochs: int) -> Table:
    made = Table(title=f"{epochs} epoch{'s' if epochs > 1 else ''}", title_justify="left")
    columns = ("shown, an epoch", "seed", "bits", "interval", "truth", "", "memorized", "true share", "wrong budgets")
    for column in columns:
        made.add_column(column, justify="right")
    for row in sorted(rows, key=lambda row: (row.dose, row.seed)):
        estimate = [f"{row.bits:,.0f}", f"{row.low:,.0f} to {row.high:,.0f}"] if row.is_known else ["seen once", ""]
        made.add_row(
            str(row.dose), str(row.seed), *estimate, f"{row.truth:,.0f}",
            "" if not row.is_known else "in" if row.is_covered else "out", f"{row.share:.0%}" if row.is_known else "",
            f"{row.true_share:.0%}", f"{row.wrong_budgets} of {row.budgets}",
        )  # fmt: skip
    return made
