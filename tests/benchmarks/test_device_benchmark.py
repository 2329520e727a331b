"""The benchmark of a device runs in its tiny form on a CPU, and bounds what it measures on a GPU."""

from __future__ import annotations

import warnings
from collections import Counter

import pytest
import torch

from benchmarks.device import cost
from benchmarks.device.benchmark import Run, _bounds, main
from benchmarks.device.correctness import checks
from benchmarks.device.fits import AGAIN, PLAIN, WAYS, Settings
from benchmarks.device.waits import PHASES, Waits, count

TINY = Settings("cpu", tiny=True, workers=0)
pytestmark = pytest.mark.filterwarnings("ignore")
CHECKS = dict(checks(TINY))


@pytest.mark.parametrize("name", [name for name in CHECKS if "weights, " not in name])
def test_what_is_read_is_right(name):
    torch._dynamo.reset()
    found = CHECKS[name]()
    assert found and all(criterion.holds for criterion in found), [str(criterion) for criterion in found]


def test_waits_are_counted_by_phase_and_by_our_own_line():
    waits = Waits()
    with warnings.catch_warnings():
        waits.note(UserWarning("called a synchronizing CUDA operation"), UserWarning, "file", 1)
        waits.note(UserWarning("something else"), UserWarning, "file", 1)
    assert dict(waits.found) == {("start", ""): 1}, "a line of the test is none of the package"
    waits.found["step", "samples/tokens.py:1 f"] = 6
    assert waits.each(Counter(step=3, start=1)) == dict.fromkeys(PHASES, 0) | {"step": 2}


def test_a_fit_enters_all_phases():
    each, lines = count(TINY, "watch")
    assert set(each) == set(PHASES) and not lines, "a CPU does not wait"


def test_costs_are_ratios_to_the_plain_fits_before_and_after():
    shape = cost.shapes(TINY)[0][0]
    row = cost.measure(TINY, shape, False, "watch")
    assert row["median"] > 0 and row["longest"] >= row["median"]
    plain = {"mean": 10.0, "median": 9.0, "longest": 11.0, "peak": 2.0, "left": 0.0}
    rows = {PLAIN: plain, AGAIN: plain | {"median": 11.0}, "watch": plain | {"median": 12.0, "peak": 2.1}}
    assert cost.ratio(rows, "watch", "median") == pytest.approx(1.2)
    assert [criterion.holds for criterion in _bounds("GPT", rows)] == [False, False]
    norms = {PLAIN: plain, "units and norms": plain | {"peak": 2.2}}
    assert [criterion.holds for criterion in _bounds("GPT", norms)] == [True, True]


def test_what_fails_is_said_and_ends_nothing(capsys):
    run = Run(TINY, budget=60)
    assert run.attempt("broken", lambda: 1 / 0) is None and run.failed == ["broken: ZeroDivisionError"]
    late = Run(TINY, budget=-1)
    assert late.attempt("late", lambda: 1) is None and "left out" in capsys.readouterr().out


def test_a_machine_without_a_gpu_says_so(capsys, monkeypatch):
    monkeypatch.setattr("benchmarks.device.benchmark.WAYS", {PLAIN: WAYS[PLAIN]})
    assert main(["--device", "cpu", "--parts", "waits"]) == 0
    assert "No CUDA device" in capsys.readouterr().out
