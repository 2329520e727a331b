"""The benchmark of averaged weights tells verdicts that are right from those that averages would give."""

from __future__ import annotations

import torch

from benchmarks.averaging.benchmark import PLAIN, SWA, TASKS, Row, criteria, quietly, report
from benchmarks.averaging.runs import Outcome, averages


def outcome(ordinary: int = 1, planted: int = 9, evaluations: int = 4) -> Outcome:
    verdicts = torch.arange(100) % 50 < ordinary
    return Outcome(verdicts, ordinary, 100, planted, 10, evaluations)


def rows(found: Outcome, swa: Outcome, unchecked: Outcome) -> list[Row]:
    plain = [outcome(), outcome()]
    return [
        Row(task, name, plain if name == PLAIN else [outcome(), swa if name == SWA else found], plain, unchecked)
        for task in TASKS
        for name in averages(task, steps=1)
    ]


def short(*outcomes: Outcome) -> set[str]:
    """Names of the criteria that fall short, without the task."""
    return {each.name.partition(": ")[2] for each in criteria(rows(*outcomes)) if not each.holds}


def test_each_criterion_falls_short_by_its_own_fault():
    right, fault = outcome(), outcome(30, 2)
    assert short(right, right, fault) == set()
    assert short(outcome(2), right, fault) == {"verdicts other than without"}
    assert short(right, outcome(3), fault) == {"more flagged, SWA"}
    assert short(right, outcome(planted=8), fault) == {"fewer found, SWA"}
    assert short(right, right, right) == {"wrong if unchecked"}
    assert short(outcome(evaluations=1), right, fault) == {"evaluations, fewest"}


def test_the_report_counts_what_was_flagged_under_averages():
    made = report(rows(outcome(), outcome(), outcome(30)), [1, 2], 3.0)
    averaged = len(TASKS) * (len(averages("classifier", steps=1)) - 1)
    assert f"{2 * averaged} of {200 * averaged} ordinary samples flagged" in made.figure and made.holds


def test_a_short_fit_has_the_same_verdicts_under_an_average():
    plain, checked = (quietly("classifier", name, True, 0, 3) for name in (PLAIN, "decay .9"))
    unchecked = quietly("classifier", "decay .9", False, 0, 3)
    assert plain.evaluations == checked.evaluations == 3 and plain.of_planted > 50
    assert torch.equal(plain.verdicts, checked.verdicts) and not torch.equal(plain.verdicts, unchecked.verdicts)
