"""Does a localizer find the units that carry a memorized text? Known units, single targets, whole sets.

A GPT learns Python's documentation, some sequences of it many times over, and as many random canaries. Each
localizer is asked for units that were injected, and for those of one memorized sequence, which are then zeroed.
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
from benchmarks.localization.runs import DESIGN, KINDS, PLACEBO, SLOW, ZEROED, Attempt, Found, Sizes, investigate
from lightning_memsink.localization.evaluation.ablation_curves import FRACTIONS
from lightning_memsink.localization.localizers import DEFAULT, METHODS

RECALL, BLIND, TARGET, OTHERS, DAMAGE, RANDOM = 0.9, 5.0, 0.5, 0.7, 0.05, 0.9
REMOVED = 0.5
"""Share of a set's gap that has to close within the budget of held-out damage before it counts as removed."""
LEARNED = 0.7
"""Share of the loss that an injection has to take away to count as learned."""
QUICK = Sizes(background=600, planted=4, repeats=96, twins=8, targets=2, injections=1)


def mean(values: Sequence[float]) -> float:
    """NaN of nothing; what is no number is left out."""
    known = [value for value in values if value == value]
    return sum(known) / len(known) if known else float("nan")


def _measured(attempts: Sequence[Attempt], measure: str, group: str) -> float:
    """Mean after zeroing: ``exact``, or ``change`` in nats."""
    curves = [each.curve for each in attempts]
    return mean([float((each.change(group) if measure == "change" else each.exact[group])[-1]) for each in curves])


def criteria(found: Sequence[Found]) -> list[Criterion]:
    """Each of the worst seed: the mean over its targets of both kinds, which the tables tell apart."""
    told = [
        ("target still said", DEFAULT, "exact", "target", "<=", TARGET),
        ("others still said", DEFAULT, "exact", "others", ">=", OTHERS),
        ("held-out damage, nats", DEFAULT, "change", "held_out", "<=", DAMAGE),
        ("target still said, random units", "random", "exact", "target", ">=", RANDOM),
    ]
    recall = min(mean(each.recalls[DEFAULT]) for each in found)
    blind = min(each.blind[DEFAULT].times_chance for each in found)
    result = [
        Criterion("recall of injected units", recall, ">=", RECALL),
        Criterion("designed sinks found blind, average precision by chance", blind, ">=", BLIND),
    ]
    for name, method, measure, group, sense, bound in told:
        values = [_measured(each.of(method), measure, group) for each in found]
        worst = float("nan") if any(v != v for v in values) else (max if sense == "<=" else min)(values)
        result.append(Criterion(name, worst, sense, bound))
    return result


def plain_words(found: Sequence[Found]) -> list[str]:
    """What zeroing does to whole sets, a sentence a kind."""
    lines = []
    for kind in KINDS:
        sets = [each.sets[kind] for each in found if kind in each.sets]
        if not sets:
            continue
        closed = mean([deletion.localized.closure_within() for _, deletion in sets])
        chance = mean([deletion.matched.closure_within() for _, deletion in sets])
        ratio = mean([float(deletion.localized.selectivity()[1 + FRACTIONS.index(ZEROED)]) for _, deletion in sets])
        verdict = "can't be removed selectively" if closed < REMOVED else "can be removed together"
        lines.append(
            f"All {sets[0][0]} {kind} sequences together {verdict}: for .02 nats of held-out loss, {closed:.0%} of "
            f"their gap to unseen twins closes (equally active random units {chance:.0%}); zeroing 5 % of units costs "
            f"them {ratio:.1f} nats for each nat of held-out loss.".replace("%", " %").replace("5  %", "5 %")
        )
    return lines


def table(found: Sequence[Found], kind: str) -> Table:
    title = (
        f"{kind}: zeroing {ZEROED:.0%} of units for one memorized sequence; means over targets and seeds.\n"
        "EM: share said word for word. Δ: nats. Comes back: of the silenced, said again after a perturbed prompt."
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
        own = [attempt for each in found for attempt in each.of(method, kind)]
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


def injection_table(found: Sequence[Found]) -> Table:
    injections = [injection for each in found for injection in each.injections]
    learned = sum(injection.learned >= LEARNED for injection in injections)
    before, after = (mean([getattr(each, when) for each in injections]) for when in ("before", "after"))
    rows = Table(
        title=f"recall of {injections[0].count} injected units, norm-clipped; {learned} of {len(injections)} injections"
        f" took {LEARNED:.0%} of the loss, on average {before:.1f} to {after:.1f} nats",
        title_justify="left",
        caption=f"Blind: average precision for {DESIGN.active_fraction:.0%} of a pool that a sequence owns by design; "
        f"chance {mean([each.blind[DEFAULT].chance for each in found]):.3f}.",
        caption_justify="left",
    )
    for column in ("method", "injections", "recall@k [worst seed, best seed]", "blind AP [worst, best]"):
        rows.add_column(column, justify="left" if column == "method" else "right")
    for method in METHODS:
        by_seed = [mean(each.recalls[method]) for each in found]
        slow = f"{method} (one a kind)" if method in SLOW else method
        precise = [each.blind[method].mean for each in found if method in each.blind]
        many = str(sum(len(each.recalls[method]) for each in found))
        rows.add_row(slow, many, mean_and_range(by_seed), mean_and_range(precise) if precise else "")
    return rows


def report(found: Sequence[Found], seeds: Sequence[int], seconds: float) -> Report:
    recall = mean_and_range([mean(each.recalls[DEFAULT]) for each in found])
    gone = mean_and_range([_measured(each.of(DEFAULT), "exact", "target") for each in found])
    figure = f"localization: recall {recall}, target EM {gone} at 5 % zeroed; {len(seeds)} seeds, {seconds:.0f} s"
    return Report(
        name="localization",
        tables=[*(table(found, kind) for kind in KINDS), injection_table(found)],
        criteria=criteria(found),
        figure="\n".join([*plain_words(found), figure]),
        settings={"seeds": list(seeds)},
    )


def main(arguments_given: Sequence[str] | None = None) -> int:
    options = argument_parser("localization", "Recall, ablation and price of all localizers.", seeds=3).parse_args(
        arguments_given
    )
    seeds, start = fresh_seeds(options), time.perf_counter()
    configure_process()
    found = run_in_processes(investigate, [(QUICK if options.quick else Sizes(), seed) for seed in seeds])
    return report(found, seeds, time.perf_counter() - start).publish(options.json)


if __name__ == "__main__":
    sys.exit(main())
