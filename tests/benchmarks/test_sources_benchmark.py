"""The benchmark of sources tells estimates, intervals and budgets that are right from those that are not."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from benchmarks.sources.benchmark import EPOCHS, Row, budgets_beside, compared, criteria, in_order, quietly, report
from benchmarks.sources.runs import Outcome, Sizes, fit, label, packed_without, planted
from lightning_memsink.detection.verdicts import Verdict
from tests.support.made_up import statement_of
from tests.support.sourced import sourced

SMALL = Sizes(doses=(1, 6, 24), documents=6, background=120, controls=40, batch_size=16, evaluations=3)
DOSES = (1, 4, 16)


def rows() -> list[Row]:
    made = [
        Row(dose, epochs, seed, 100.0 * dose, 90.0 * dose, 120.0 * dose, 105.0 * dose, 0.5, 0.5, 0, 2)
        for epochs in EPOCHS
        for seed in (1, 2)
        for dose in DOSES
    ]
    nan = math.nan
    return [replace(row, bits=nan, low=nan, high=nan) if row.dose * row.epochs == 1 else row for row in made]


def short(place: int, **changes: float) -> list[str]:
    """Names of the criteria that fall short where one row is other."""
    made = rows()
    made[place] = replace(made[place], **changes)
    return [each.name for each in criteria(made) if not each.holds]


def test_each_criterion_falls_short_by_its_own_fault():
    assert all(each.holds for each in criteria(rows()))
    assert short(-1, truth=2000.0) == []  # one of ten
    made = [replace(row, truth=0.0) if row.dose == 4 else row for row in rows()]
    assert [each.name for each in criteria(made) if not each.holds] == ["intervals with the truth"]
    assert short(-1, high=4000.0) == ["half an interval as a share of the estimate, largest dose, worst"]
    assert short(-2, bits=90.0) == ["pairs of sources in the order of their doses, worst run"]
    assert short(-2, wrong_budgets=1) == ["budgets judged wrong"]
    assert short(-2, bits=math.nan, low=math.nan, high=math.nan) == ["repeated sources without an estimate"]


def test_the_report_counts_intervals_and_budgets():
    made = report(rows(), [1, 2], 3.0)
    assert "the truth is in 10 of 10 intervals, 0 of 24 budgets are judged wrong; 2 seeds, 3 s" in made.figure
    assert made.holds and [table.row_count for table in made.tables] == [6, 6]


def test_a_run_without_two_estimates_has_no_order():
    assert in_order(rows()[:1]) == in_order(rows()[:2]) == 0
    assert in_order(rows()[:3]) == 1


KEPT, SOME, ALL = ("inside", "undecided"), ("crossed", "undecided"), ("crossed",)


@pytest.mark.parametrize(
    ("share", "sure", "expected"),
    [
        (0.0, 0.0, [(0.05, KEPT)]),
        (0.2, 0.0, [(0.45, KEPT)]),
        (0.6, 0.2, [(0.85, KEPT), (0.3, SOME)]),
        (1.0, 0.6, [(0.5, SOME), (0.3, ALL)]),
    ],
)
def test_budgets_stand_beside_the_share_that_is_memorized(share, sure, expected):
    found = budgets_beside(share, sure)
    assert [right for _, right in found] == [right for _, right in expected]
    assert [budget for budget, _ in found] == pytest.approx([budget for budget, _ in expected])


def test_truth_is_the_loss_without_the_source_minus_the_loss_with_it():
    sizes = replace(SMALL, doses=(1, 6), documents=4)
    table, flags = sourced({label(1): {Verdict.LEARNED: 4}, label(6): {Verdict.MEMORIZED: 4}})
    targets = torch.tensor([len(each.tokens) - 1 for each in planted(sizes, 0).planted])
    flags.evaluations[-1] = replace(flags.evaluations[-1], statement=statement_of(0))
    with_all = targets * 3.0
    without = [with_all, with_all + torch.cat([torch.full((4,), 9.0), 2.0 * targets[4:]])]
    first, second = compared(sizes, 0, 1, Outcome(with_all, table, flags), without)
    assert (first.truth, first.true_share, first.share, first.wrong_budgets, first.budgets) == (0, 0, 0, 0, 1)
    assert second.truth == pytest.approx(2 * float(targets[4:].sum()) / math.log(2))
    assert (second.true_share, second.share, second.wrong_budgets, second.budgets) == (1, 1, 0, 2)
    flags.verdict[4:], flags.gap[4:] = int(Verdict.LEARNED), 0.0  # as if the detector had found nothing
    assert compared(sizes, 0, 1, Outcome(with_all, table, flags), without)[1].wrong_budgets == 2


def test_documents_of_all_kinds_are_distinct_and_shown_as_often_as_said():
    data = planted(SMALL, 3)
    every = [tuple(each.tokens.tolist()) for each in (*data.planted, *data.controls, *data.shown[:120])]
    assert len(set(every)) == len(every) == 18 + 40 + 120
    shown = [each.source for each in data.shown]
    assert {dose: shown.count(label(dose)) for dose in SMALL.doses} == {dose: 6 * dose for dose in SMALL.doses}
    without = packed_without(data.shown, label(24))
    assert label(24) not in {source for row in without["source"] for source in row}


def test_a_fit_without_a_source_does_not_know_it_and_a_fit_with_all_says_so():
    watched, without = (quietly(SMALL, 1, 2, left_out) for left_out in (None, label(24)))
    assert without.table is None and watched.table is not None and watched.flags is not None
    found = compared(SMALL, 1, 2, watched, [watched.losses, watched.losses, without.losses])
    assert [row.is_known for row in found] == [True, True, True]
    assert found[2].truth > 100 and found[0].truth == found[1].truth == 0
    assert torch.equal(fit(SMALL, 1, 2, label(24)).losses, without.losses)
