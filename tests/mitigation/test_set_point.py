"""The set point that `hold` measures in a run, on tables whose gaps are known."""

import math

import pytest
import torch

from lightning_memsink.mitigation.set_point import CHANCE, MARGIN, SetPoint, compare
from lightning_memsink.samples.control_table import ControlTable
from lightning_memsink.samples.loss_table import LossTable

SAMPLES, CONTROLS = 200, 60


def features(many, seed):
    return torch.rand(many, 2, generator=torch.Generator().manual_seed(seed))


class Run:
    """A run whose controls all have one loss, and whose samples stand ``gap`` nats below."""

    def __init__(self, noise=0.0):
        self.table, self.controls = LossTable(), ControlTable()
        self.noise = noise * torch.randn(CONTROLS, generator=torch.Generator().manual_seed(1))
        self.level = 4.0

    def evaluate(self, step, level, ids=None):
        ids = torch.arange(CONTROLS) if ids is None else ids
        self.controls.record(step, ids, level + self.noise, features(CONTROLS, 2))
        self.level = level

    def visit(self, step, gap):
        ids = torch.arange(SAMPLES)
        losses, steps = torch.full((SAMPLES,), self.level - gap), torch.full((SAMPLES,), step)
        rows = self.table.record(ids, losses, steps, torch.ones(SAMPLES))
        self.table.describe(rows, features(SAMPLES, 3))


def test_nothing_is_held_before_it_was_measured():
    run, point = Run(), SetPoint()
    point.update(run.table, run.controls)
    assert point.value == math.inf
    run.evaluate(10, 4.0)
    point.update(run.table, run.controls)
    assert point.value == math.inf
    run.visit(12, 0.2)
    run.evaluate(20, 3.9)
    point.update(run.table, run.controls)
    assert point.value == pytest.approx(0.2 + MARGIN, abs=1e-5)


def test_it_follows_what_samples_have_in_common_until_the_controls_are_at_their_best():
    run, point = Run(), SetPoint()
    run.evaluate(10, 4.0)
    point.update(run.table, run.controls)
    for step, gap, level in ((20, 0.1, 3.8), (30, 0.6, 3.7), (40, 1.5, 3.75), (50, 3.0, 3.9), (60, 0.9, 3.6)):
        run.visit(step - 5, gap)
        run.evaluate(step, level)
        point.update(run.table, run.controls)
        expected = {20: 0.1, 30: 0.6, 40: 0.6, 50: 0.6, 60: 0.9}[step]
        assert point.value == pytest.approx(expected + MARGIN, abs=1e-5), step


def test_samples_that_stand_above_their_controls_do_not_lower_it():
    run, point = Run(), SetPoint()
    for step, level in ((10, 4.0), (20, 3.5)):
        run.evaluate(step, level)
        point.update(run.table, run.controls)
        run.visit(step + 5, -2.0)
    run.evaluate(30, 3.4)
    point.update(run.table, run.controls)
    assert point.value == MARGIN


def test_controls_that_match_badly_widen_it():
    """A sample stands as far below by chance as a hundredth of the controls do below the others."""
    run, point = Run(noise=1.0), SetPoint()
    run.evaluate(10, 4.0)
    point.update(run.table, run.controls)
    run.visit(15, 0.0)
    run.evaluate(20, 3.9)
    gaps, change, null = compare(run.table, run.controls, run.controls.previous)
    torch.testing.assert_close(change, torch.full((SAMPLES,), -0.1))
    by_chance = float(null.quantile(CHANCE) - null.median())
    assert len(gaps) == SAMPLES and len(null) == CONTROLS and by_chance > 2 * MARGIN
    point.update(run.table, run.controls)
    assert point.value == pytest.approx(max(0.0, float(gaps.median())) + by_chance)


def test_an_evaluation_is_looked_at_once_and_a_restored_one_goes_on():
    run, point = Run(), SetPoint()
    run.evaluate(10, 4.0)
    point.update(run.table, run.controls)
    run.visit(12, 0.2)
    run.evaluate(20, 3.9)
    point.update(run.table, run.controls)
    before, restored = point.value, SetPoint()
    restored.load_state_dict(point.state_dict())
    run.visit(25, 1.0)
    for each in (point, restored):
        each.update(run.table, run.controls)
        assert each.value == before
    run.evaluate(30, 3.95)
    restored.update(run.table, run.controls)
    assert restored.value == before
    run.evaluate(40, 3.2)
    run.visit(45, 1.0)
    run.evaluate(50, 3.1)
    for each in (point, restored):
        each.update(run.table, run.controls)
    assert restored.value == point.value == pytest.approx(1.0 + MARGIN, abs=1e-5)


def test_other_controls_than_before_begin_a_history_of_their_own():
    run, point = Run(), SetPoint()
    run.evaluate(10, 4.0)
    run.visit(12, 0.2)
    run.evaluate(20, 3.9)
    point.update(run.table, run.controls)
    known = point.value
    run.evaluate(30, 3.0, ids=torch.arange(CONTROLS) + 1000)  # an easier set, measured once: nothing to compare with
    point.update(run.table, run.controls)
    assert point.value == known
    run.visit(35, 0.7)
    run.evaluate(40, 2.9, ids=torch.arange(CONTROLS) + 1000)
    point.update(run.table, run.controls)
    assert point.value == pytest.approx(0.7 + MARGIN, abs=1e-5)


@pytest.mark.parametrize("fault", ["no features", "one control", "no finite loss", "trained on", "no visits"])
def test_where_nothing_can_be_compared_nothing_is_held(fault):
    run, point = Run(), SetPoint()
    for step in (10, 20, 30):
        ids = torch.arange(1 if fault == "one control" else CONTROLS)
        losses = torch.full((len(ids),), math.nan if fault == "no finite loss" else 4.0 - step / 100)
        described = torch.zeros(len(ids), 0) if fault == "no features" else features(len(ids), 2)
        run.controls.record(step, ids, losses, described)
        run.controls.trained = torch.full((len(ids),), fault == "trained on")
        point.update(run.table, run.controls)
        if fault != "no visits":
            run.visit(step + 5, 0.2)
            if fault == "no features":
                run.table.describe(torch.arange(SAMPLES), torch.zeros(SAMPLES, 0))
    assert point.value == math.inf
