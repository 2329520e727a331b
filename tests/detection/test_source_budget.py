"""Budgets are crossed where they should be, and nowhere else."""

import math

import pytest
import torch

from lightning_memsink.detection.source_budget import LEVEL, SourceBudget, budget_numbers
from lightning_memsink.detection.statistics import benjamini_hochberg
from lightning_memsink.detection.verdicts import Verdict
from tests.support.sourced import evaluation, sourced

V = Verdict


def states(budget, counts, **options):
    table, flags = sourced(counts, **options)
    return {row.source: row.state for row in SourceBudget(budget).rows(table, flags)}


def test_sources_over_their_budget_are_crossed_and_others_are_not():
    counts = {
        "much": {V.LEARNED: 50, V.MEMORIZED: 50},
        "little": {V.LEARNED: 990, V.MEMORIZED: 10},
        "none": {V.HARD: 300},
        "allowed": {V.LEARNED: 20, V.MEMORIZED: 80},
    }
    found = states({"allowed": 0.9, "default": 0.015}, counts)
    assert found == {"much": "crossed", "little": "inside", "none": "inside", "allowed": "inside"}


@pytest.mark.parametrize(
    ("counts", "budget", "state"),
    [
        ({V.MEMORIZED: 1}, 0.001, "crossed"),
        ({V.MEMORIZED: 4}, 0.5, "crossed"),
        ({V.MEMORIZED: 2, V.LEARNED: 2}, 0.5, "inside"),
        ({V.MEMORIZED: 4}, 1.0, "inside"),
        ({V.LEARNED: 4}, 0.0, "inside"),
        ({V.MEMORIZED: 1, V.LEARNED: 9}, 0.1, "inside"),
        ({V.UNSEEN: 9}, 0.1, "undecided"),
        ({V.NO_MATCHED_CONTROLS: 9}, 0.1, "undecided"),
        ({V.NO_MATCHED_CONTROLS: 9, V.LEARNED: 8}, 0.1, "undecided"),
        ({V.NO_MATCHED_CONTROLS: 9, V.LEARNED: 8, V.UNSEEN: 100}, 0.1, "undecided"),
        ({V.NO_MATCHED_CONTROLS: 8, V.LEARNED: 8, V.UNSEEN: 100}, 0.1, "inside"),
        ({V.WAITING: 50, V.LEARNED: 50}, 0.1, "inside"),
    ],
)
def test_states(counts, budget, state):
    assert states({"a": budget}, {"a": counts, "rest": {V.LEARNED: 400}}) == {"a": state}


@pytest.mark.parametrize("memorized", [0, 30])
def test_false_flags_cross_no_budget_more_often_than_said(memorized):
    """With p-values that are uniform on [0, 1] where nothing is memorized, and many controls that pass as well."""
    generator = torch.Generator().manual_seed(0)
    table, flags = sourced({"a": {V.LEARNED: 300}, "b": {V.LEARNED: memorized}})
    flags.null_gaps[:40] = 2.0
    crossed = {"a": 0, "b": 0}
    for _ in range(1000):
        p = torch.cat([torch.rand(300, generator=generator), torch.full((memorized,), 1e-6)])
        flagged = benjamini_hochberg(p, 0.05)
        flags.verdict[:] = torch.where(flagged, int(V.MEMORIZED), int(V.LEARNED)).to(torch.uint8)
        for row in SourceBudget({"default": 0.0}).update(table, flags):
            crossed[row.source] += 1
    assert crossed["a"] <= 1000 * LEVEL + 3 * math.sqrt(1000 * LEVEL)
    assert crossed["b"] == (1000 if memorized else 0)


def test_what_false_flags_may_explain_is_undecided_and_says_so():
    table, flags = sourced({"a": {V.LEARNED: 2000, V.MEMORIZED: 4}, "b": {V.MEMORIZED: 500}}, controls=100)
    (row,) = SourceBudget({"a": 0.001}).rows(table, flags)
    assert row.state == "undecided" and "no more than false flags explain" in row.reason
    table, flags = sourced({"a": {V.LEARNED: 2000, V.MEMORIZED: 4}, "b": {V.LEARNED: 500}}, controls=10_000)
    (row,) = SourceBudget({"a": 0.001}).rows(table, flags)
    assert row.state == "crossed"


def test_a_crossing_is_reported_once_and_keeps_its_step():
    counts = {"a": {V.LEARNED: 10}, "b": {V.LEARNED: 10}}
    table, flags = sourced(counts)
    budget = SourceBudget({"default": 0.01})
    assert budget.update(table, flags) == []
    flags.verdict[:10] = int(V.MEMORIZED)
    flags.evaluations.append(evaluation(flags, 60))
    (row,) = budget.update(table, flags)
    assert (row.source, row.state, row.crossed_at, row.share, row.memorized) == ("a", "crossed", 60, 1.0, 10)
    flags.evaluations.append(evaluation(flags, 70))
    assert budget.update(table, flags) == []
    again = SourceBudget({"default": 0.01})
    again.load_state_dict(budget.state_dict())
    assert again.update(table, flags) == []
    assert [(row.source, row.crossed_at) for row in again.rows(table, flags)] == [("a", 60), ("b", None)]
    flags.verdict[:10] = int(V.LEARNED)
    assert [row.state for row in budget.rows(table, flags)] == ["inside", "inside"]
    assert budget.rows(table, flags)[0].crossed_at == 60


def test_names_that_no_text_has_are_undecided_and_other_sources_have_no_budget():
    table, flags = sourced({"a": {V.LEARNED: 10}, 7: {V.LEARNED: 10}} | {None: {V.MEMORIZED: 1}})
    rows = SourceBudget({"b": 0.1, "a": 0.1}).rows(table, flags)
    assert [(row.source, row.state, row.reason) for row in rows] == [
        ("b", "undecided", "no sample of this source was seen"),
        ("a", "inside", ""),
    ]
    assert math.isnan(rows[0].share) and budget_numbers(rows)[1]["samples"] == 10


def test_texts_without_a_source_have_the_default_budget():
    table, flags = sourced({None: {V.MEMORIZED: 5, V.LEARNED: 5}})
    assert [(row.source, row.state) for row in SourceBudget({"default": 0.1}).rows(table, flags)] == [
        ("no source", "crossed")
    ]
    assert SourceBudget({"a": 0.1}).update(table, flags) == []


def test_labels_are_compared_as_text():
    assert SourceBudget({3: 0.5, ("a", 1): 0.1}).shares == {"3": 0.5, "('a', 1)": 0.1}


@pytest.mark.parametrize("budget", [{}, None, 0.1, ["a"]])
def test_what_is_no_budget_is_refused(budget):
    with pytest.raises(ValueError, match="budget is a share for each source"):
        SourceBudget(budget)


@pytest.mark.parametrize("share", [-0.1, 1.5, math.nan, math.inf, "0.1", None, True])
def test_shares_out_of_range_are_refused(share):
    with pytest.raises(ValueError, match=r"budget\['a'\] is the largest share .* from 0 to 1"):
        SourceBudget({"a": share})


def test_a_ledger_that_nothing_was_recorded_in():
    table, flags = sourced({})
    flags.evaluations.clear()
    assert SourceBudget({"default": 0.1}).update(table, flags) == []
    assert SourceBudget({"default": 0.1}).rows(table, flags) == []


def together(gap, budget, samples=400):
    """The state of a source none of whose texts is flagged: a text is memorized by more than 1 nat."""
    table, flags = sourced({"a": {V.LEARNED: samples}, "rest": {V.LEARNED: 400}})
    noise = torch.randn(samples + 400, generator=torch.Generator().manual_seed(2)) / 4
    flags.gap[:] = noise.half()
    flags.gap[:samples] += gap
    return {row.source: row for row in SourceBudget({"a": budget}).rows(table, flags)}["a"]


def test_a_source_memorized_below_what_one_text_shows_is_not_said_to_keep_its_budget():
    assert together(0.0, 0.1).state == "inside" and together(0.5, 0.1).state == "inside"
    slightly = together(1.2, 0.5)
    assert slightly.state == "undecided" and "together" in slightly.reason and slightly.share_high == 1
    whole = together(3.0, 0.5)
    assert whole.state == "crossed" and whole.share_low > 0.8 and whole.memorized == 0


def test_sources_at_their_budget_are_rarely_crossed_by_gaps_alone():
    """Half of the texts are memorized, by enough to tell, and half may be."""
    crossed = 0
    for seed in range(100):
        table, flags = sourced({"a": {V.LEARNED: 60}})
        generator = torch.Generator().manual_seed(seed)
        flags.gap[:] = (torch.randn(60, generator=generator) / 4).half()
        flags.gap[:30] += 3
        flags.null_gaps = torch.randn(200, generator=generator) / 4
        crossed += SourceBudget({"a": 0.5}).rows(table, flags)[0].state == "crossed"
    assert crossed <= 2
