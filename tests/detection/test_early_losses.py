"""Samples without features are matched by an early loss only where it was taken early."""

import math

import pytest
import torch

from lightning_memsink.detection.evaluate import SecondLook, evaluate, is_early, samples_of
from lightning_memsink.detection.matched_controls import DetectionRule
from lightning_memsink.detection.verdicts import Flags, Verdict
from lightning_memsink.samples.control_table import ControlTable
from lightning_memsink.samples.loss_table import LossTable

SAMPLES, CONTROLS, STEPS = 300, 400, 10
"""Steps of an epoch."""


def known_by_heart(every, epochs=20, width=0):
    """Epochs: after twenty all samples are known by heart. Validation at the end of ``every`` of them."""
    generator = torch.Generator().manual_seed(0)
    table, controls, features = LossTable(), ControlTable(), torch.randn(CONTROLS, width)
    difficulty = torch.randn(CONTROLS, generator=generator)
    for epoch in range(epochs):
        losses = max(0, 1 - epoch / 8) * (2.3 + 0.5 * torch.randn(SAMPLES, generator=generator)) + 0.01
        steps = torch.full((SAMPLES,), epoch * STEPS)
        table.record(torch.arange(SAMPLES), losses.clamp(min=0.01), steps, torch.ones(SAMPLES))
        if (epoch + 1) % every == 0:
            noise = 0.3 * torch.randn(CONTROLS, generator=generator)
            held_out = (2.3 + 1.2 * difficulty + noise).clamp(min=0.001)
            controls.record((epoch + 1) * STEPS, torch.arange(CONTROLS) + SAMPLES, held_out, features)
            table.reference_step = table.reference_step or controls.latest_step
    return table, controls


def looked(table, step, losses):
    rows = torch.arange(SAMPLES)
    return SecondLook(rows, losses, torch.ones(SAMPLES, dtype=torch.bool))


def after(epochs, look_loss=2.0):
    """A ledger after some epochs, evaluated once with a second look at all samples."""
    table, controls = known_by_heart(1, epochs)
    evaluate(table, controls, Flags(), DetectionRule(), 1, 0, looked(table, epochs, torch.full((SAMPLES,), look_loss)))
    return table, controls


def test_the_loss_of_a_look_after_a_visit_or_two_is_an_early_one():
    table, controls = after(2)
    rows = torch.arange(SAMPLES)
    assert is_early(table, rows).all() and (table.early_step == controls.latest_step).all()
    assert (table.early_loss == 2.0).all()
    known = samples_of(table, controls, rows).early
    assert known is not None and torch.isfinite(known).all()
    evaluate(table, controls, Flags(), DetectionRule(), 1, 0, looked(table, 3, torch.full((SAMPLES,), 1.0)))
    assert (table.early_loss == 2.0).all(), "the first look's stays"


def test_losses_of_later_looks_and_of_visits_after_training_are_none():
    table, controls = after(3)
    assert not is_early(table, torch.arange(SAMPLES)).any() and not table.early_looked.any()
    known = samples_of(table, controls, torch.arange(SAMPLES)).early
    assert known is None or torch.isnan(known).all()
    table, _ = after(2, math.nan)
    assert not table.early_looked.any()


def test_samples_with_features_keep_no_early_losses_of_looks():
    table, controls = known_by_heart(1, 2, width=2)
    table.describe(torch.arange(SAMPLES), torch.randn(SAMPLES, 2))
    evaluate(table, controls, Flags(), DetectionRule(), 1, 0, looked(table, 2, torch.ones(SAMPLES)))
    assert not table.early_looked.any()


@pytest.mark.parametrize("every", [1, 5, 10])
def test_samples_that_were_known_by_heart_when_they_were_first_matched_are_found(every):
    """Their like among the controls would be those that are easy."""
    flags = Flags()
    evaluate(*known_by_heart(every), flags, DetectionRule(), 1, 0)
    assert int((flags.verdict == Verdict.MEMORIZED).sum()) > 0.9 * SAMPLES
