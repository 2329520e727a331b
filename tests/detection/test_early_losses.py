"""Samples without features are matched by an early loss only where it was taken early."""

import pytest
import torch

from lightning_memsink.detection.evaluate import evaluate, is_early, samples_of
from lightning_memsink.detection.matched_controls import DetectionRule
from lightning_memsink.detection.verdicts import Flags, Verdict
from lightning_memsink.samples.control_table import ControlTable
from lightning_memsink.samples.loss_table import LossTable

SAMPLES, CONTROLS, STEPS = 300, 400, 10
"""Steps of an epoch."""


def known_by_heart(every):
    """Twenty epochs, at the end of which all samples are known by heart; validation at the end of ``every`` of them."""
    generator = torch.Generator().manual_seed(0)
    table, controls, nothing = LossTable(), ControlTable(), torch.empty(CONTROLS, 0)
    difficulty = torch.randn(CONTROLS, generator=generator)
    for epoch in range(20):
        losses = max(0, 1 - epoch / 8) * (2.3 + 0.5 * torch.randn(SAMPLES, generator=generator)) + 0.01
        steps = torch.full((SAMPLES,), epoch * STEPS)
        table.record(torch.arange(SAMPLES), losses.clamp(min=0.01), steps, torch.ones(SAMPLES))
        if (epoch + 1) % every == 0:
            noise = 0.3 * torch.randn(CONTROLS, generator=generator)
            held_out = (2.3 + 1.2 * difficulty + noise).clamp(min=0.001)
            controls.record((epoch + 1) * STEPS, torch.arange(CONTROLS) + SAMPLES, held_out, nothing)
            table.reference_step = table.reference_step or controls.latest_step
    return table, controls


@pytest.mark.parametrize(("every", "early"), [(1, True), (2, False), (10, False)])
def test_an_early_loss_is_of_the_second_visit_at_the_latest(every, early):
    table, controls = known_by_heart(every)
    rows = torch.arange(SAMPLES)
    assert is_early(table, rows).all() if early else not is_early(table, rows).any()
    known = samples_of(table, controls, rows).early
    assert known is not None and bool(torch.isfinite(known).all()) == early


@pytest.mark.parametrize("every", [1, 5, 10])
def test_samples_that_were_known_by_heart_when_they_were_first_matched_are_found(every):
    """Their like among the controls would be those that are easy."""
    flags = Flags()
    evaluate(*known_by_heart(every), flags, DetectionRule(), 1, 0)
    assert int((flags.verdict == Verdict.MEMORIZED).sum()) > 0.9 * SAMPLES
