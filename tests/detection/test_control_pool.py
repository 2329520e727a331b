"""First visits as controls: whose they are, and what is taken off their losses."""

import math

import pytest
import torch

from lightning_memsink.detection.control_pool import MOST_FIRST_VISITS, in_unit, naive_rows, pooled_controls
from lightning_memsink.detection.evaluate import evaluate, measure_visits
from lightning_memsink.detection.matched_controls import DetectionRule
from lightning_memsink.detection.nomination import RANDOM_SHARE, nominate
from lightning_memsink.detection.verdicts import Flags, Verdict
from lightning_memsink.samples.control_table import ControlTable
from lightning_memsink.samples.loss_table import LossTable

RULE = DetectionRule()


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Run:
    """One epoch of 1,000 samples, ten a step. Losses follow one feature, and fall with the logarithm of the step."""

    def __init__(self, samples=1000, held_out=0, slope=-0.8, extra=0.0, noise=0.1):
        self.table, self.controls = LossTable(), ControlTable()
        self.features, self.slope = drawn(samples, 1, seed=1), slope
        steps = torch.arange(samples) // 10
        losses = self.expected(self.features[:, 0], steps) + extra + noise * drawn(samples, seed=2)
        rows = self.table.record(torch.arange(samples), losses, steps, torch.ones(samples))
        self.table.describe(rows, self.features)
        self.step = int(steps[-1]) + 1
        if held_out:
            features = drawn(held_out, 1, seed=3)
            for step in (self.step // 2, self.step):
                now = torch.full((held_out,), step)
                losses = self.expected(features[:, 0], now) + noise * drawn(held_out, seed=4)
                self.controls.record(step, torch.arange(held_out) + 10**6, losses, features)
        else:
            self.controls.pass_by(self.step)

    def expected(self, difficulty, steps):
        return 6 + difficulty + self.slope * steps.double().clamp(min=1).log().float()

    def visit_again(self, rows, gap):
        """A second visit at the last step, with losses below what an unseen sample has by ``gap``."""
        steps = torch.full((len(rows),), self.step - 1)
        losses = self.expected(self.features[rows, 0], steps) - gap + 0.1 * drawn(len(rows), seed=5)
        self.table.record(rows, losses, steps, torch.ones(len(rows)))


@pytest.mark.parametrize("held_out", [0, 200])
@pytest.mark.parametrize("extra", [0.0, 0.5], ids=["same mode", "dropout adds half a nat"])
def test_first_visits_have_the_losses_that_they_would_have_now(held_out, extra):
    """What the mode adds shows against held-out samples only; alone, first visits are of their own mode."""
    run = Run(held_out=held_out, extra=extra)
    pool = pooled_controls(run.table, run.controls, RULE)
    first = pool.from_training
    truth = run.expected(pool.features[first, 0], torch.tensor(run.step)) + (0.0 if held_out else extra)
    assert int(first.sum()) == 900  # of the first tenth of the steps none
    assert (pool.after[first] - truth).mean().abs() < 0.06
    assert (pool.after[first] - truth).std() < 0.15
    late = run.expected(pool.features[first, 0], torch.tensor(max(1, run.controls.previous_step)))
    assert held_out == 0 or (pool.before[first] - late).mean().abs() < 0.06


def test_without_a_validation_set_first_visits_carry_verdicts():
    run, flags = Run(), Flags()
    memorized = torch.arange(0, 400, 10)
    run.visit_again(memorized, 2.0)
    run.visit_again(torch.arange(401, 500), 0.0)
    for _ in range(2):
        evaluation = evaluate(run.table, run.controls, flags, RULE, 2, epoch=0)
        flags.evaluations.append(evaluation)
        run.step += 1
        run.visit_again(memorized, 2.0)
        run.controls.pass_by(run.step)
    assert (flags.verdict[memorized] == Verdict.MEMORIZED).all()
    assert int((flags.verdict == Verdict.MEMORIZED).sum()) == len(memorized)
    assert (evaluation.held_out, evaluation.first_visits) == (0, 890)
    assert evaluation.by_first_visits == 1.0


def test_a_first_visit_is_naive_only_where_nothing_like_it_came_before():
    run = Run(samples=100)
    assert len(naive_rows(run.table, run.step)) == 90
    run.table.write("family", torch.arange(100), torch.arange(100) // 2 * 2)
    assert naive_rows(run.table, run.step).tolist() == list(range(10, 100, 2))
    run.table.begins_with_training = False
    assert not len(naive_rows(run.table, run.step))


def test_first_visits_long_ago_are_no_controls():
    run = Run()
    assert len(naive_rows(run.table, 10 * run.step)) == 0
    assert len(naive_rows(run.table, 5 * run.step)) == 500


def test_first_visits_are_bounded_evenly(monkeypatch):
    assert MOST_FIRST_VISITS >= 10**5
    monkeypatch.setattr("lightning_memsink.detection.control_pool.MOST_FIRST_VISITS", 100)
    rows = naive_rows(Run().table, 100)
    assert 50 <= len(rows) <= 100 and int(rows[-1]) > 980


def test_without_features_held_out_samples_are_the_controls_where_there_are_enough():
    run = Run(held_out=200)
    run.table.columns["features"] = torch.zeros(len(run.table.columns["exposures"]), 0).half()
    run.controls.features = torch.zeros(200, 0)
    pool = pooled_controls(run.table, run.controls, RULE)
    assert len(pool) == 200 and not pool.from_training.any()
    run.controls.latest[10:] = torch.nan
    assert pooled_controls(run.table, run.controls, RULE).from_training.all()


def test_a_scale_is_compared_by_its_logarithm_and_a_loss_of_zero_is_finite():
    table = Run(samples=20).table
    losses = torch.tensor([1.0, math.e, 0.0, -1.0, math.nan, math.inf])
    assert torch.equal(in_unit(losses[:4], table), losses[:4])
    table.unit = "ratio"
    found = in_unit(losses, table)
    assert found[:2].tolist() == pytest.approx([0, 1])
    assert -20 < float(found[2]) < -5 and found[3:5].isnan().all() and found[5].isinf()
    assert float(in_unit(torch.zeros(1), table)) == float(found[2])  # of samples and of controls the same


def test_the_few_samples_of_a_small_run_are_all_looked_at():
    run = Run(samples=100)
    run.visit_again(torch.arange(50), 0.0)
    rows, is_random = nominate(measure_visits(run.table, run.controls, Flags(), RULE), Flags(), 512)
    assert rows.tolist() == list(range(100)) and is_random.all()


def test_most_of_a_second_look_is_at_those_that_look_memorized():
    run, flags = Run(), Flags()
    memorized = torch.arange(0, 400, 10)
    run.visit_again(torch.arange(500, 900), 0.0)
    run.visit_again(memorized, 2.0)
    visits = measure_visits(run.table, run.controls, flags, RULE)
    rows, is_random = nominate(visits, flags, 100)
    assert len(rows.unique()) == 100 and int(is_random.sum()) == round(RANDOM_SHARE * 100)
    assert torch.isin(memorized, rows).all()
    again, _ = nominate(visits, flags, 100)
    assert torch.equal(rows, again)  # in every process the same
    run.controls.latest_step += 1
    other, _ = nominate(visits, flags, 100)
    assert not torch.equal(rows[is_random], other[is_random])
    drawn_often = torch.zeros(1000)
    for step in range(400):
        run.controls.latest_step = 101 + step
        rows, is_random = nominate(visits, flags, 100)
        drawn_often[rows[is_random]] += 1
    assert drawn_often[memorized].mean() == pytest.approx(10, rel=0.15)  # as often as any other


@pytest.mark.parametrize("widths", [(2, 1), (0, 1), (1, 0)])
def test_features_that_training_has_not_are_unknown_and_end_nothing(widths):
    """A validation set of another kind of batches, with other features: its controls are matched as average ones."""
    run, (of_controls, of_samples) = Run(held_out=200), widths
    run.controls.features = torch.zeros(200, of_controls)
    run.table.describe(torch.arange(1000), run.features[:, :of_samples])
    run.visit_again(torch.arange(50), gap=0.0)
    flags = Flags()
    evaluate(run.table, run.controls, flags, RULE, consecutive=1, epoch=0)
    pool = pooled_controls(run.table, run.controls, RULE)
    assert pool.features.shape == (len(pool), of_samples) and len(pool) >= 200
    assert not (flags.verdict[:50] == Verdict.MEMORIZED).any()
