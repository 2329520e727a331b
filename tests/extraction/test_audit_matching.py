"""Matched controls of an audit, and the interval of a mean gap."""

import math

import pytest
import torch

from lightning_memsink.extraction.audit.cohort import Cohort
from lightning_memsink.extraction.audit.config import AuditConfig
from lightning_memsink.extraction.audit.mean_gap import mean_gap
from lightning_memsink.extraction.audit.statistics import matched_gaps, with_kind_features
from lightning_memsink.extraction.audit.texts import Encoded, Text
from lightning_memsink.extraction.probe import ExtractionResults


def one_token(texts):
    return Encoded(torch.ones(len(texts), 1, dtype=torch.int64), torch.ones(len(texts), 1, dtype=torch.bool))


def cohort(losses, kind):
    """Texts of equal features of difficulty."""
    losses = torch.as_tensor(losses)
    texts = [Text(f"text {row}", "any", kind, row) for row in range(len(losses))]
    flat = torch.ones(len(losses))
    results = ExtractionResults(flat, flat < 0, flat, flat, flat, losses, flat, flat)
    return Cohort(texts, one_token(texts), results, {}, torch.ones(len(losses), 3))


def joined(*parts):
    results = [torch.cat([getattr(each.results, name) for each in parts]) for name in ExtractionResults.columns()]
    features = torch.cat([each.features for each in parts])
    texts = [text for each in parts for text in each.texts]
    return Cohort(texts, one_token(texts), ExtractionResults(*results), {}, features)


@pytest.mark.parametrize("same_names", [True, False])
def test_controls_are_matched_within_the_kind_of_a_text(same_names):
    """Verse is harder than prose; nothing is memorized."""
    noise = torch.Generator().manual_seed(0)
    verse, prose = (mean + 0.2 * torch.randn(60, generator=noise) for mean in (6.0, 3.0))
    controls = joined(cohort(verse[:40], "verse"), cohort(prose[:40], "prose"))
    names = ("verse", "prose") if same_names else ("a", "b")
    suspects = joined(*(cohort(each[40:], name) for each, name in zip((verse, prose), names, strict=True)))
    suspects, controls, within_kind = with_kind_features(suspects, controls)
    gaps, _ = matched_gaps(suspects, controls, AuditConfig().rule)
    assert within_kind == same_names
    assert (gaps.gap.abs().max() < 1) == same_names


def test_the_interval_of_a_mean_gap_covers_the_truth():
    draw = torch.Generator().manual_seed(0)
    inside = 0
    for _ in range(400):
        gap, null = 0.5 + torch.randn(30, generator=draw), 0.1 + 0.5 * torch.randn(60, generator=draw)
        low, high = mean_gap(gap, null).interval
        inside += low < 0.4 < high
    assert 0.92 < inside / 400 < 0.98
    assert mean_gap(torch.ones(1), torch.zeros(9)).nats == 1.0
    assert math.isnan(mean_gap(torch.ones(1), torch.zeros(9)).error)
