"""Are verdicts the same where validation runs under averaged weights?

The same fit runs without an average, with averages that Lightning's callbacks swap in for validation, and with SWA.
Beside each is what would be flagged if the losses of the validation were taken for those of the controls: a model whose
weights are averaged has other losses than the one that trains, and ordinary samples differ from controls by that.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from benchmarks.averaging.runs import PLAIN, TASKS, Outcome, averages, run
from benchmarks.common.criteria import (
    Criterion,
    Report,
    argument_parser,
    configure_process,
    fresh_seeds,
    run_in_processes,
)

EPOCHS, QUICK_EPOCHS = {"language model": 3, "classifier": 16}, {"language model": 3, "classifier": 8}
SWA = "SWA"
"""Lightning's callback sets another learning rate, so that training itself differs."""
MORE_FLAGGED, FEWER_FOUND = 0.01, 0.05
"""Shares by which SWA may differ from no average: of ordinary samples flagged, of planted ones found."""
FAULT = 10
"""Wrong verdicts, of ordinary and planted samples, that one of the averages must cause where nothing is checked; else
these fits could not show the fault."""


@dataclass(frozen=True)
class Row:
    """One way to average in one task, beside the same fits without."""

    task: str
    average: str
    found: Sequence[Outcome]
    plain: Sequence[Outcome]
    unchecked: Outcome | None
    """The first seed's, with the validation's losses as they are; None where these are of the weights that train."""

    @property
    def differing(self) -> int:
        """Verdicts that are not those of the same fit without an average."""
        pairs = zip(self.found, self.plain, strict=True)
        return sum(int((one.verdicts != other.verdicts).sum()) for one, other in pairs)

    @property
    def more_flagged(self) -> float:
        """Share of ordinary samples flagged beyond those without an average, of the worst seed."""
        pairs = zip(self.found, self.plain, strict=True)
        return max((one.ordinary - other.ordinary) / one.of_ordinary for one, other in pairs)

    @property
    def fewer_found(self) -> float:
        """Share of planted samples found without an average and not with it, of the worst seed."""
        pairs = zip(self.found, self.plain, strict=True)
        return max((other.planted - one.planted) / one.of_planted for one, other in pairs)

    @property
    def wrong_unchecked(self) -> int:
        """Samples of the first seed by which the numbers flagged would differ from those without an average."""
        plain = self.plain[0]
        if self.unchecked is None:
            return 0
        return abs(self.unchecked.ordinary - plain.ordinary) + abs(self.unchecked.planted - plain.planted)


def main(arguments_given: Sequence[str] | None = None) -> int:
    parser = argument_parser("averaging", "Verdicts where validation runs under averaged weights.", seeds=3)
    options = parser.parse_args(arguments_given)
    options.seeds = 1 if options.quick else options.seeds
    seeds, start = fresh_seeds(options), time.perf_counter()
    configure_process()
    rows = [row for task in TASKS for row in measure(task, seeds, (QUICK_EPOCHS if options.quick else EPOCHS)[task])]
    return report(rows, seeds, time.perf_counter() - start).publish(options.json)


def measure(task: str, seeds: Sequence[int], epochs: int) -> list[Row]:
    """All averages of one task, each with every seed, and those swapped in for validation once more as it gave them."""
    names = list(averages(task, steps=1))
    jobs = [(task, name, True, seed, epochs) for name in names for seed in seeds]
    jobs += [(task, name, False, seeds[0], epochs) for name in names if name not in (PLAIN, SWA)]
    outcomes = dict(zip(jobs, run_in_processes(quietly, jobs), strict=True))
    found = {name: [outcomes[task, name, True, seed, epochs] for seed in seeds] for name in names}
    return [
        Row(task, name, found[name], found[PLAIN], outcomes.get((task, name, False, seeds[0], epochs)))
        for name in names
    ]


def quietly(task: str, average: str, checked: bool, seed: int, epochs: int) -> Outcome:
    """`run`, without what Lightning prints."""
    configure_process()  # again: Lightning, which is loaded by now, has set the level of its messages
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return run(task, average, checked, seed, epochs)


def report(rows: Sequence[Row], seeds: Sequence[int], seconds: float) -> Report:
    averaged = [row for row in rows if row.average != PLAIN]
    flagged, ordinary = (
        sum(getattr(one, name) for row in averaged for one in row.found) for name in ("ordinary", "of_ordinary")
    )
    return Report(
        name="averaging",
        tables=[table(task, [row for row in rows if row.task == task], len(seeds)) for task in TASKS],
        criteria=criteria(rows),
        figure=f"averaging: {flagged} of {ordinary} ordinary samples flagged under averages, "
        f"{sum(row.differing for row in averaged if row.average != SWA)} verdicts other than without; "
        f"{len(seeds)} seeds, {seconds:.0f} s",
        settings={"seeds": list(seeds)},
    )


def criteria(rows: Sequence[Row]) -> list[Criterion]:
    made = []
    for task in TASKS:
        own = [row for row in rows if row.task == task and row.average != PLAIN]
        swa = [row for row in own if row.average == SWA]
        swapped = [row for row in own if row.average != SWA]
        made += [
            Criterion(f"{task}: evaluations, fewest", min(_evaluations(row) for row in own), ">=", 2),
            Criterion(f"{task}: verdicts other than without", sum(row.differing for row in swapped), "<=", 0),
            Criterion(f"{task}: more flagged, SWA", max(row.more_flagged for row in swa), "<=", MORE_FLAGGED),
            Criterion(f"{task}: fewer found, SWA", max(row.fewer_found for row in swa), "<=", FEWER_FOUND),
            Criterion(f"{task}: wrong if unchecked", max(row.wrong_unchecked for row in swapped), ">=", FAULT),
        ]
    return made


def _evaluations(row: Row) -> int:
    return min(one.evaluations for one in row.found)


def table(task: str, rows: Sequence[Row], seeds: int) -> Table:
    made = Table(title=f"{task}, {seeds} seeds; unchecked: the first seed", title_justify="left")
    for column in (
        "average",
        "ordinary flagged",
        "planted flagged",
        "verdicts other",
        "unchecked: ordinary",
        "planted",
    ):
        made.add_column(column, justify="left" if column == "average" else "right")
    for row in rows:
        ordinary, of_ordinary, planted, of_planted = (
            sum(getattr(one, name) for one in row.found)
            for name in ("ordinary", "of_ordinary", "planted", "of_planted")
        )
        made.add_row(
            row.average,
            f"{ordinary} of {of_ordinary}",
            f"{planted} of {of_planted}",
            "" if row.average == SWA else str(row.differing),
            f"{row.unchecked.ordinary} of {row.unchecked.of_ordinary}" if row.unchecked else "",
            f"{row.unchecked.planted} of {row.unchecked.of_planted}" if row.unchecked else "",
        )
    return made
