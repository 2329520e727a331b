"""Recall and ablation tests of localizers: do they find the units that carry a memorized text?

A GPT learns Python's documentation, some sequences of it many times over, and as many random canaries. Each localizer
scores injected units, units by design, and the units of one memorized sequence, which are then zeroed.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from rich.table import Table

from benchmarks.common.criteria import (
    Criterion,
    Report,
    argument_parser,
    configure_process,
    fresh_seeds,
    mean_and_range,
    run_in_processes,
)
from benchmarks.localization.runs import DESIGN, KINDS, PLACEBO, SLOW, ZEROED, Attempt, SeedResult, Sizes, run_seed
from lightning_memsink.localization.evaluation.ablation_curves import FRACTIONS
from lightning_memsink.localization.localizers import DEFAULT, METHODS

RECALL, OWNERSHIP, TARGET, OTHERS, DAMAGE, RANDOM = 0.9, 5.0, 0.5, 0.7, 0.05, 0.9
REMOVED = 0.5
"""Share of a set's gap that has to close within the budget of held-out damage before it counts as removed."""
LEARNED = 0.7
"""Share of the loss that an injection has to take away to count as learned."""
QUICK = Sizes(background=600, planted=4, repeats=96, twins=8, targets=2, injections=1)


def mean(values: Sequence[float]) -> float:
    """Mean of the values that are not NaN; NaN if there are none."""
    known = [value for value in values if value == value]
    return sum(known) / len(known) if known else float("nan")


def _measured(attempts: Sequence[Attempt], measure: str, group: str) -> float:
    """Mean after zeroing: ``exact``, or ``change`` in nats."""
    curves = [each.curve for each in attempts]
    return mean([float((each.change(group) if measure == "change" else each.exact[group])[-1]) for each in curves])


def criteria(results: Sequence[SeedResult]) -> list[Criterion]:
    """Criteria of the worst seed, each the mean over its targets of both kinds; the tables separate the kinds."""
    ablations = [
        ("target still said", DEFAULT, "exact", "target", "<=", TARGET),
        ("others still said", DEFAULT, "exact", "others", ">=", OTHERS),
        ("held-out damage, nats", DEFAULT, "change", "held_out", "<=", DAMAGE),
        ("target still said, random units", "random", "exact", "target", ">=", RANDOM),
    ]
    recall = min(mean(each.recalls[DEFAULT]) for each in results)
    recovery = min(each.ownership_recovery[DEFAULT].times_chance for each in results)
    result = [
        Criterion("recall of injected units", recall, ">=", RECALL),
        Criterion("designed sinks found blind, average precision by chance", recovery, ">=", OWNERSHIP),
    ]
    for name, method, measure, group, sense, bound in ablations:
        values = [_measured(each.of(method), measure, group) for each in results]
        worst = float("nan") if any(v != v for v in values) else (max if sense == "<=" else min)(values)
        result.append(Criterion(name, worst, sense, bound))
    return result


def sentences(results: Sequence[SeedResult]) -> list[str]:
    """The effect of zeroing on whole sets, one sentence a kind."""
    lines = []
    for kind in KINDS:
        sets = [each.sets[kind] for each in results if kind in each.sets]
        if not sets:
            continue
        closed = mean([test.localized.closure_within() for _, test in sets])
        chance = mean([test.matched.closure_within() for _, test in sets])
        ratio = mean([float(test.localized.selectivity()[1 + FRACTIONS.index(ZEROED)]) for _, test in sets])
        verdict = "can't be removed selectively" if closed < REMOVED else "can be removed together"
        lines.append(
            f"All {sets[0][0]} {kind} sequences together {verdict}: for .02 nats of held-out loss, {closed:.0%} of "
            f"their gap to unseen twins closes (equally active random units {chance:.0%}); zeroing 5 % of units costs "
            f"them {ratio:.1f} nats for each nat of held-out loss.".replace("%", " %").replace("5  %", "5 %")
        )
    return lines


def table(results: Sequence[SeedResult], kind: str) -> Table:
    title = (
        f"{kind}: zeroing {ZEROED:.0%} of units for one memorized sequence; means over targets and seeds.\n"
        "EM: share reproduced verbatim. Δ: nats. Comes back: of the removed, reproduced after a perturbed prompt."
    )
    rows = Table(title=title, title_justify="left")
    for column in (
        "method",
        "targets",
        "target EM",
        "others EM",
        "Δ target",
        "Δ twins",
        "Δ held-out",
        "comes back",
        "seconds",
    ):
        rows.add_column(column, justify="left" if column == "method" else "right")
    for method in (*METHODS, PLACEBO):
        own = [attempt for each in results for attempt in each.of(method, kind)]
        exact = [_measured(own, "exact", group) for group in ("target", "others")]
        change = [_measured(own, "change", group) for group in ("target", "twins", "held_out")]
        back = mean([each.returns for each in own])
        rows.add_row(
            f"{method} (one a seed)" if method in SLOW else method,
            str(len(own)),
            *(f"{value:.2f}" for value in exact),
            *(f"{value:+.3f}" for value in change),
            "" if back != back else f"{back:.2f}",
            f"{mean([each.seconds for each in own]):.2f}",
        )
    return rows


def injection_table(results: Sequence[SeedResult]) -> Table:
    injections = [injection for each in results for injection in each.injections]
    learned = sum(injection.learned >= LEARNED for injection in injections)
    before, after = (mean([getattr(each, when) for each in injections]) for when in ("before", "after"))
    rows = Table(
        title=f"recall of {injections[0].count} injected units, norm-clipped; {learned} of {len(injections)} injections"
        f" took {LEARNED:.0%} of the loss, on average {before:.1f} to {after:.1f} nats",
        title_justify="left",
        caption=f"Blind: average precision for {DESIGN.active_fraction:.0%} of a pool that a sequence owns by design; "
        f"chance {mean([each.ownership_recovery[DEFAULT].chance for each in results]):.3f}.",
        caption_justify="left",
    )
    for column in ("method", "injections", "recall@k [worst seed, best seed]", "blind AP [worst, best]"):
        rows.add_column(column, justify="left" if column == "method" else "right")
    for method in METHODS:
        by_seed = [mean(each.recalls[method]) for each in results]
        slow = f"{method} (one a kind)" if method in SLOW else method
        precise = [each.ownership_recovery[method].mean for each in results if method in each.ownership_recovery]
        many = str(sum(len(each.recalls[method]) for each in results))
        rows.add_row(slow, many, mean_and_range(by_seed), mean_and_range(precise) if precise else "")
    return rows


def report(results: Sequence[SeedResult], seeds: Sequence[int], seconds: float) -> Report:
    recall = mean_and_range([mean(each.recalls[DEFAULT]) for each in results])
    gone = mean_and_range([_measured(each.of(DEFAULT), "exact", "target") for each in results])
    figure = f"localization: recall {recall}, target EM {gone} at 5 % zeroed; {len(seeds)} seeds, {seconds:.0f} s"
    return Report(
        name="localization",
        tables=[*(table(results, kind) for kind in KINDS), injection_table(results)],
        criteria=criteria(results),
        figure="\n".join([*sentences(results), figure]),
        settings={"seeds": list(seeds)},
    )


def main(argv: Sequence[str] | None = None) -> int:
    options = argument_parser("localization", "Recall, ablation and price of all localizers.", seeds=3).parse_args(argv)
    seeds, start = fresh_seeds(options), time.perf_counter()
    configure_process()
    results = run_in_processes(run_seed, [(QUICK if options.quick else Sizes(), seed) for seed in seeds])
    return report(results, seeds, time.perf_counter() - start).publish(options.json)


if __name__ == "__main__":
    sys.exit(main())
