"""What an audit compares texts with, and how sure it is."""

import dataclasses
import math

import pytest
import torch

from lightning_memsink.extraction.audit.audit import AuditConfig, Cohort, gaps_of, tell_kinds_apart
from lightning_memsink.extraction.audit.mean_gap import mean_gap
from lightning_memsink.extraction.audit.texts import Text
from lightning_memsink.extraction.probe import ExtractionResults


def asked_for(losses, group):
    """Texts of one difficulty, as far as anyone can tell."""
    losses = torch.as_tensor(losses)
    texts = [Text(f"text {row}", "any", group, row) for row in range(len(losses))]
    flat = torch.ones(len(losses))
    answers = ExtractionResults(flat, flat < 0, flat, flat, flat, losses, flat, flat)
    return Cohort(texts, flat, answers, {}, torch.ones(len(losses), 3))


def joined(*parts):
    answers = [
        torch.cat([getattr(each.answers, field.name) for each in parts])
        for field in dataclasses.fields(ExtractionResults)
    ]
    features = torch.cat([each.features for each in parts])
    texts = [text for each in parts for text in each.texts]
    return Cohort(texts, torch.ones(len(texts)), ExtractionResults(*answers), {}, features)


@pytest.mark.parametrize("named_alike", [True, False])
def test_controls_are_sought_in_the_texts_own_kind(named_alike):
    """Verse is harder than prose; nothing is memorized."""
    noise = torch.Generator().manual_seed(0)
    verse, prose = (mean + 0.2 * torch.randn(60, generator=noise) for mean in (6.0, 3.0))
    controls = joined(asked_for(verse[:40], "verse"), asked_for(prose[:40], "prose"))
    names = ("verse", "prose") if named_alike else ("a", "b")
    suspects = joined(*(asked_for(each[40:], name) for each, name in zip((verse, prose), names, strict=True)))
    suspects, controls, by_kind = tell_kinds_apart(suspects, controls)
    gaps, _ = gaps_of(suspects, controls, AuditConfig().rule)
    assert by_kind == named_alike
    assert (gaps.gap.abs().max() < 1) == named_alike


def test_how_far_texts_stand_out_is_told_with_its_uncertainty():
    draw = torch.Generator().manual_seed(0)
    inside = 0
    for _ in range(400):
        gap, null = 0.5 + torch.randn(30, generator=draw), 0.1 + 0.5 * torch.randn(60, generator=draw)
        low, high = mean_gap(gap, null).interval
        inside += low < 0.4 < high
    assert 0.92 < inside / 400 < 0.98
    assert mean_gap(torch.ones(1), torch.zeros(9)).nats == 1.0
    assert math.isnan(mean_gap(torch.ones(1), torch.zeros(9)).error)
