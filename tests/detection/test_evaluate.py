"""From tables to verdicts, evaluation by evaluation, by hand."""

import math

import pytest
import torch

from lightning_memsink.detection.evaluate import evaluate
from lightning_memsink.detection.matched_controls import DetectionRule
from lightning_memsink.detection.verdicts import Flags, Verdict
from lightning_memsink.samples.control_table import ControlTable
from lightning_memsink.samples.loss_table import LossTable

RULE = DetectionRule(k=4)


class World:
    """A thousand controls around 5 nats; samples whose losses each test sets by hand, one visit an evaluation."""

    def __init__(self):
        self.table, self.controls, self.flags = LossTable(), ControlTable(), Flags()
        self.step = 0
        generator = torch.Generator().manual_seed(0)
        self.noise = 0.1 * torch.randn(1000, generator=generator)
        self.visit(torch.full((10,), 5.0))

    def visit(self, losses):
        self.step += 10
        ids = torch.arange(len(losses))
        self.table.record(ids, losses, torch.full((len(losses),), self.step - 1), torch.ones(len(losses)))

    def evaluate(self):
        self.controls.record(self.step, torch.arange(100, 1100), 5 + self.noise, torch.zeros(1000, 0))
        self.flags.evaluations.append(evaluate(self.table, self.controls, self.flags, RULE, 2, epoch=0))
        return [Verdict(code) for code in self.flags.verdict.tolist()]


def losses(*of_the_first, rest=5.0):
    return torch.tensor([*of_the_first, *[rest] * (10 - len(of_the_first))])


def test_a_sample_seen_once_is_unseen():
    assert set(World().evaluate()) == {Verdict.UNSEEN}


def test_a_flag_must_hold_at_two_evaluations_in_a_row():
    world = World()
    world.evaluate()
    world.visit(losses(1.0, 1.0))
    assert world.evaluate()[:2] == [Verdict.WAITING] * 2
    world.visit(losses(1.0, 5.0))
    assert world.evaluate()[0] is Verdict.MEMORIZED
    assert world.flags.counts()["memorized"] == 1
    assert world.flags.onset_step[:3].tolist() == [19, -1, -1]  # of the first of the two visits; withdrawn; never
    assert world.flags.onset_exposures[0] == 2


def test_a_sample_that_was_forgotten_is_no_longer_memorized_but_keeps_its_onset():
    world = World()
    for loss in (1.0, 1.0, 5.0):
        world.visit(losses(loss))
        world.evaluate()
    assert world.flags.counts()["memorized"] == 0
    assert world.flags.onset_step[0] == 19


def test_who_was_not_visited_keeps_the_verdict():
    world = World()
    for _ in range(2):
        world.visit(losses(1.0))
        world.evaluate()
    world.step += 10
    assert world.evaluate()[0] is Verdict.MEMORIZED
    assert world.flags.evaluations[-1].tested == 0


def test_low_and_high_losses_like_the_controls_are_learned_and_hard():
    world = World()
    world.visit(losses(4.9, 5.4))
    assert world.evaluate()[:2] == [Verdict.LEARNED, Verdict.HARD]


def test_a_visit_in_the_same_step_as_the_first_is_no_measurement():
    """A duplicate in one batch: the second loss was taken before any training step on it."""
    world = World()
    world.table.record(torch.tensor([50, 50]), torch.tensor([5.0, 1.0]), torch.tensor([9, 9]), torch.ones(2))
    assert world.evaluate()[-1] is Verdict.UNSEEN


def test_an_evaluation_counts_every_sample_under_one_word():
    world = World()
    world.visit(losses(1.0, 4.0))
    world.evaluate()
    evaluation = world.flags.evaluations[-1]
    assert sum(evaluation.counts.values()) == len(world.table)
    assert evaluation.p_floor == pytest.approx(1 / 1001) and evaluation.threshold == 0.3
    assert evaluation.gap == pytest.approx(float((5 + world.noise).mean() - losses(1.0, 4.0).mean()), abs=0.1)


def test_other_controls_start_a_new_history():
    controls = ControlTable()
    controls.record(10, torch.arange(5), torch.ones(5), torch.zeros(5, 0))
    controls.record(20, torch.arange(6), torch.ones(6), torch.zeros(6, 0))
    assert (controls.previous_step, controls.latest_step, len(controls.curve)) == (20, 20, 1)


def test_a_control_that_comes_twice_counts_once():
    controls = ControlTable()
    controls.record(10, torch.tensor([3, 1, 3]), torch.tensor([1.0, 2.0, 9.0]), torch.zeros(3, 0))
    assert controls.ids.tolist() == [1, 3] and controls.latest.tolist() == [2.0, 1.0]


def test_nothing_measured_is_no_number_rather_than_zero():
    evaluation = World()
    evaluation.evaluate()
    assert math.isnan(evaluation.flags.evaluations[-1].gap)
