"""Does a run that knows its data by heart say so, and one that learned a rule that it knows nothing by heart?

Truth: counterfactual memorization, by fits on halves of the data (`truth.py`). A sample is known by heart if training
on it took more than .3 nats off its loss; where the loss is no likelihood, more than half of it.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Sequence
from math import sqrt

import torch
from rich.table import Table

from benchmarks.common.criteria import (
    Criterion,
    Report,
    argument_parser,
    configure_process,
    fresh_seeds,
    run_in_processes,
)
from benchmarks.overfitting.runs import Outcome, outcomes
from benchmarks.overfitting.tasks import TASKS, Size
from lightning_memsink.detection.verdicts import Verdict

FOUND, COVERED, WRONG = 0.90, 0.90, 0.05
"""Least share of what is known by heart that must be found, least share of intervals that must hold the truth, and the
false-discovery rate."""
QUICK = Size(samples=256, texts=48, pretraining=60, controls=(200,))
QUICK_TASKS = ("classes", "mse", "true")


def main(arguments_given: Sequence[str] | None = None) -> int:
    parser = argument_parser("overfitting", "Runs that know their data by heart, and one that learned.", seeds=3)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, help="only these")
    options = parser.parse_args(arguments_given)
    options.seeds = 1 if options.quick else options.seeds
    seeds, start = fresh_seeds(options), time.perf_counter()
    configure_process()
    names = options.tasks or (QUICK_TASKS if options.quick else tuple(TASKS))
    jobs = [(name, seed, QUICK if options.quick else Size()) for name in names for seed in seeds]
    found = [one for some in run_in_processes(outcomes, jobs) for one in some]
    return report(found, seeds, time.perf_counter() - start).publish(options.json)


def report(found: Sequence[Outcome], seeds: Sequence[int], seconds: float) -> Report:
    must = [one for one in found if one.must_find]
    return Report(
        name="overfitting",
        tables=[results_table(found), measures_table(found)],
        criteria=criteria(found),
        figure=f"overfitting: {_mean([one.found for one in must]):.3f} of what is known by heart is found, least "
        f"{min((one.found for one in must), default=torch.nan):.3f}; {sum(one.covers for one in found)} of "
        f"{len(found)} intervals hold the true share; {len(seeds)} seeds, {seconds:.0f} s",
        settings={"seeds": list(seeds)},
    )


def criteria(found: Sequence[Outcome]) -> list[Criterion]:
    """The worst seed of each setting, or all seeds together for rates: bounds of those are with 2 standard errors.

    Where a rule is all that there is to learn, the samples that the rule gets wrong are still known by heart, and there
    are few of them: the interval must hold 0.
    """
    made = []
    for setting, own in grouped(found).items():
        if own[0].must_find:
            made.append(Criterion(f"{setting}: known by heart and found", min(one.found for one in own), ">=", FOUND))
        called = max(1, sum(int(one.flagged.sum()) for one in own))
        falsely = sum(int((one.flagged & ~one.known).sum()) for one in own) / called
        sampling = 2 * sqrt(WRONG * (1 - WRONG) / called)
        made.append(Criterion(f"{setting}: called memorized, not known by heart", falsely, "<=", WRONG + sampling))
    ruled = [one for one in found if one.knows_nothing]
    if ruled:
        holding = _mean([float(one.share_low <= 0) for one in ruled])
        made.append(Criterion("true labels: intervals that hold 0", holding, ">=", COVERED))
    others = [one.covers for one in found if not one.knows_nothing]
    made.append(Criterion("intervals that hold the true share", _mean(others), ">=", COVERED))
    return made


def wrong(one: Outcome) -> float:
    """Share of what is called memorized that is not known by heart; 0 if nothing is called so."""
    return float((~one.known[one.flagged]).float().sum()) / max(1, int(one.flagged.sum()))


def grouped(found: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    """The outcomes of each setting, one a seed."""
    groups: dict[str, list[Outcome]] = {}
    for one in found:
        groups.setdefault(f"{one.task}, {one.arm}", []).append(one)
    return groups


def results_table(found: Sequence[Outcome]) -> Table:
    """What is known by heart, what is said of it, by setting and seed."""
    made = Table(title="Share known by heart, and what the run says", title_justify="left")
    for column in ("setting", "seed", "known", "found", "wrong", "stated share", "holds", "verdicts"):
        made.add_column(column, justify="left" if column in ("setting", "verdicts") else "right")
    for setting, own in grouped(found).items():
        for number, one in enumerate(own):
            made.add_row(
                "" if number else setting,
                str(one.seed),
                f"{float(one.known.float().mean()):.3f}",
                f"{one.found:.3f}",
                f"{wrong(one):.3f}",
                f"{one.share_low:.3f} to {one.share_high:.3f}",
                "yes" if one.covers else "no",
                words(one),
            )
    return made


def measures_table(found: Sequence[Outcome]) -> Table:
    """What verdicts rest on, medians over the samples that are known by heart."""
    made = Table(title="Of samples known by heart, medians", title_justify="left")
    for column in ("setting", "seed", "truth", "gap", "p", "p, upper quarter", "looked at", "nulls", "d", "p-values"):
        made.add_column(column, justify="left" if column in ("setting", "p-values") else "right")
    for setting, own in grouped(found).items():
        for number, one in enumerate(own):
            p = one.p[one.known]
            p = p[torch.isfinite(p)]
            looked = p[p < 1]
            quartile = f"{float(looked.quantile(0.75)):.3f}" if len(looked) else ""
            made.add_row(
                "" if number else setting,
                str(one.seed),
                f"{float(one.truth[one.known].median()):.2f}",
                f"{float(one.gap[one.known].nanmedian()):.2f}",
                f"{float(looked.median()):.3f}" if len(looked) else "",
                quartile,
                f"{len(looked)} of {int(one.known.sum())}",
                f"{one.null_share:.3f}",
                "" if one.evaluation is None else f"{one.evaluation.threshold:.2f}",
                "no evaluation" if one.evaluation is None else one.evaluation.tail,
            )
    return made


def words(one: Outcome) -> str:
    """Samples by verdict, and by reason where undecided: ``500 memorized, 12 learned``."""
    counts = Counter(one.verdict.tolist())
    said = ((count, Verdict(code)) for code, count in counts.most_common())
    return ", ".join(f"{count} {verdict.reason or verdict.word}" for count, verdict in said)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else torch.nan


if __name__ == "__main__":
    sys.exit(main())
