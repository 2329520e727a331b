"""Samples without features, beside controls of which a share is known by chance."""

import torch

from lightning_memsink.detection.evaluate import evaluate
from lightning_memsink.detection.matched_controls import DetectionRule
from lightning_memsink.detection.verdicts import Flags, Verdict
from lightning_memsink.samples.control_table import ControlTable
from lightning_memsink.samples.loss_table import LossTable

SAMPLES, CONTROLS = 400, 400


def losses(count, known, seed):
    """A share ``known`` of labels is predicted with certainty, the others are as certainly predicted wrong."""
    generator = torch.Generator().manual_seed(seed)
    right = torch.rand(count, generator=generator) < known
    small, large = 0.02 * torch.rand(count, generator=generator), 3 + 4 * torch.rand(count, generator=generator)
    return torch.where(right, small, large)


def evaluated(known, chance=0.5):
    """Labels at random: a share of what was not trained on is predicted right by chance."""
    table, controls, flags = LossTable(), ControlTable(), Flags()
    for visit in range(4):
        share = chance if visit == 0 else known
        table.record(torch.arange(SAMPLES), losses(SAMPLES, share, visit), torch.full((SAMPLES,), 10 * visit),
                     torch.ones(SAMPLES))  # fmt: skip
    for step in (20, 40):
        controls.record(
            step, torch.arange(CONTROLS) + SAMPLES, losses(CONTROLS, chance, step), torch.empty(CONTROLS, 0)
        )
        flags.evaluations.append(evaluate(table, controls, flags, DetectionRule(), 1, 0))
    return flags


def test_two_classes_known_by_heart_are_undecided_and_the_run_says_how_many():
    flags = evaluated(1.0)
    last = flags.evaluations[-1]
    assert last.statement is not None and last.statement.at_least > 0.25 * SAMPLES
    assert last.counts["memorized"] == 0 and last.counts["undecided"] > 0.9 * SAMPLES
    assert int((flags.verdict == Verdict.AMONG_MEMORIZED).sum()) == last.counts["undecided"]
    assert "so are some controls" in Verdict.AMONG_MEMORIZED.reason


def test_two_classes_of_which_nothing_was_learned_are_not():
    flags = evaluated(0.5)
    assert flags.evaluations[-1].statement.at_least == 0
    assert flags.evaluations[-1].counts["undecided"] == flags.evaluations[-1].counts["memorized"] == 0


def test_ten_classes_known_by_heart_are_found():
    flags = evaluated(1.0, chance=0.1)
    assert flags.evaluations[-1].counts["memorized"] > 0.95 * SAMPLES
    assert evaluated(0.1, chance=0.1).evaluations[-1].counts["memorized"] == 0
