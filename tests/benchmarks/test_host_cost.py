"""The cost of the host: what is taken of a fit, and how it is compared."""

import pytest

from benchmarks.host_cost.benchmark import _differences, cost, report
from benchmarks.host_cost.fits import UNTIMED, Load, Times, fit

TINY = Load(4, 32, 24, 0.001)


def test_the_longest_steps_with_and_without_an_evaluation_are_told_apart():
    plain = Times([100.0, 101.0, 100.0], [1.0] * 3, [1.0] * 3, [])
    watched = Times([104.0, 180.0, 100.0], [2.0, 4.0, 3.0], [5.0] * 3, [1])
    assert _differences(plain, watched) == pytest.approx((2.0, 2.0, 3.0, 79.0))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("watch", [False, True])
def test_each_step_after_the_first_ones_is_timed(watch):
    (times,) = fit(TINY, 0, watch)
    assert len(times.wall) == len(times.process) == len(times.training_thread) == TINY.steps - UNTIMED - 1
    assert min(times.wall) >= 1.0 and all(0 < ms for ms in times.training_thread)
    assert bool(times.evaluations) == watch


@pytest.mark.filterwarnings("ignore")
def test_a_report_bounds_each_load_and_several_processes(capsys):
    found = cost(TINY, [0])
    made = report([found], found, [1e9], [0])
    assert [each.holds for each in made.criteria if "training thread" in each.name] == [True]
    assert made.criteria[-1].value == pytest.approx(1.0) and len(made.criteria) == 4
