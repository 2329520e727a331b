"""The five findings: statistics against their definitions, verdicts on synthetic runs, and the page of findings."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import binomtest

from benchmarks.findings.benchmark import NOT_SUPPORTED, SUPPORTED, find, first_extracted, page, wilson
from benchmarks.findings.figure import draw
from benchmarks.findings.runs import GOES_ON, STOPS, Run, Snapshot, _is_row_of
from lightning_memsink.localization.concentration import Concentration
from lightning_memsink.localization.history import EvaluationProfile

RUNGS = {
    "natural x1": ("natural", 1),
    "natural x64": ("natural", 64),
    "canary x64": ("canary", 64),
    "easy x64": ("easy", 64),
}
HALF = 40


def made_up(then, seed, *, early=True, p=0.01):
    """Six looks, at step 10 to 60: what is shown 64 times loses a nat a look until the turn."""
    snapshots = []
    for number in range(6):
        step = 10 * (number + 1)
        grown = min(step, HALF) / 10 + (0 if step <= HALF else (0.5 if then == GOES_ON else -0.5) * (step - HALF) / 10)
        gaps = {"natural x1": 0.1, "natural x64": grown, "canary x64": 1.5 * grown, "easy x64": 0.05}
        losses = {name: 6.0 - gap + torch.linspace(-0.05, 0.05, 12) for name, gap in gaps.items()}
        exact = {name: torch.full((12,), name == "canary x64" and step >= 30) for name in RUNGS}
        twins = {name: torch.full((8,), 6.0) for name in RUNGS}
        snapshots.append(Snapshot(step, losses, twins, exact, 5.0 - number / 10, 2 * number))
    at = 20 if early else 40
    flagged = {name: torch.full((12,), at if "64" in name and "easy" not in name else -1) for name in RUNGS}
    found = Concentration(0.6, 30, 0.2, 0.5, 0.4, 0.55, 0.3, p, 9)
    profiles = [
        EvaluationProfile(10, {}, {"memorized": [0.7, 0.3]}, {}, [], [], None, {}),
        EvaluationProfile(60, {}, {"memorized": [0.4, 0.6]}, {}, [], [], found, {}),
    ]
    return Run(seed, then, HALF, RUNGS, snapshots, flagged, profiles)


def both(**changed):
    return [[made_up(then, seed, **changed) for seed in (1, 2)] for then in (GOES_ON, STOPS)]


def test_all_five_are_found_where_they_are():
    assert [each.verdict for each in find(*both())] == [SUPPORTED] * 5


def test_what_is_not_there_is_not_found():
    assert find(*both(early=False))[0].verdict == NOT_SUPPORTED
    assert find(*both(p=0.3))[2].verdict == NOT_SUPPORTED
    going, stopped = both()
    assert find(stopped, going)[4].verdict == NOT_SUPPORTED


def test_first_exact_is_the_first_step_at_which_a_text_is_extracted():
    one = made_up(GOES_ON, 1)
    assert first_extracted(one, "canary x64").tolist() == [30] * 12
    assert first_extracted(one, "natural x1").tolist() == [-1] * 12


@pytest.mark.parametrize(("hits", "of"), [(0, 5), (3, 9), (70, 73), (12, 12)])
def test_the_interval_of_a_share_is_scipys(hits, of):
    known = binomtest(hits, of).proportion_ci(method="wilson")
    assert wilson(hits, of) == pytest.approx((known.low, known.high), abs=1e-4)
    assert wilson(0, 0) == (0.0, 1.0)


def test_the_page_and_its_figure(tmp_path):
    going, stopped = both()
    draw(going, stopped, tmp_path / "docs" / "findings.png")
    text = page(find(going, stopped), [1, 2], "python -m benchmarks.findings --seeds 2", "docs/findings.png")
    assert "| Memorization localizes | **supported** |" in text
    assert "24 of 24 extracted sequences were flagged first" in text
    assert (tmp_path / "docs" / "findings.png").stat().st_size > 10_000


def test_which_rows_are_among_others():
    rows = torch.tensor([[1, 2], [3, 4], [1, 2]])
    assert _is_row_of(rows, rows[:1]).tolist() == [True, False, True]
    assert _is_row_of(rows[:0], rows).tolist() == []
