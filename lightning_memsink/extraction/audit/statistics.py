"""Statistics of an audit: matched controls, gaps, and how well scores separate suspected texts from controls.

N  suspected texts      M  controls      K  kinds of text
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_memsink.detection.matched_controls import (
    Controls,
    DetectionRule,
    Measurement,
    SampleFeatures,
    measure_gaps,
)
from lightning_memsink.extraction.audit.cohort import Cohort
from lightning_memsink.extraction.separation import Separation, separation

MATCHED = "gap to matched controls"
SCORES = (MATCHED, "loss", "zlib", "min-k%", "min-k%++")
"""Scores that separate suspected texts from controls, as the report names them: first the gap to controls of the same
difficulty, then membership scores, which ignore difficulty."""
KIND_WEIGHT = 4
"""Weight of a text's kind relative to each feature of its difficulty: controls of another kind are matched last."""


def with_kind_features(suspects: Cohort, controls: Cohort) -> tuple[Cohort, Cohort, bool]:
    """Both cohorts with a feature for each kind, and whether controls are matched within kinds.

    The features are added if every kind of the suspected texts is also a kind of controls, and controls have several.
    """
    kinds = sorted({text.kind for text in suspects.texts})
    control_kinds = {text.kind for text in controls.texts}
    shared = set(kinds) <= control_kinds
    if not shared or len(control_kinds) == 1:
        return suspects, controls, shared
    own, others = (
        replace(cohort, features=torch.cat([cohort.features, *[_one_hot_kinds(cohort, kinds)] * KIND_WEIGHT], 1))
        for cohort in (suspects, controls)
    )
    return own, others, True


def matched_gaps(suspects: Cohort, controls: Cohort, rule: DetectionRule) -> tuple[Measurement | None, str]:
    """The gap of each suspected text to its matched controls; or None and the reason why it can't be measured."""
    usable = int(controls.results.loss.isfinite().sum())
    if usable < rule.controls_needed:
        return None, (
            f"{usable} controls are too few for a verdict on single texts: at least {rule.controls_needed} are needed, "
            "of the same kinds as what is suspected."
        )
    losses = [cohort.results.loss.float() for cohort in (suspects, controls)]
    if not losses[0].isfinite().all():
        return None, "Some suspected texts have no finite loss."
    samples = SampleFeatures(losses[0], torch.ones_like(losses[0]), suspects.features)
    return measure_gaps(samples, Controls(losses[1], losses[1], controls.features), rule), ""


def separations(suspects: Cohort, controls: Cohort, gaps: Measurement | None, fpr: float) -> dict[str, Separation]:
    """How well each of `SCORES` separates suspected texts from controls; without those that have too few values."""
    values = {} if gaps is None else {MATCHED: (gaps.gap[gaps.matched], gaps.null)}
    values |= {name: (suspects.scores[name], controls.scores[name]) for name in suspects.scores}
    return {
        name: separation(*values[name], fpr)
        for name in SCORES
        if name in values and min(int(each.isfinite().sum()) for each in values[name]) > 1
    }


def rank_suspects(suspects: Cohort, gaps: Measurement | None) -> list[int]:
    """Rows of the suspected texts that are longer than the prefix, by falling gap; without gaps, by rising tries."""
    order = suspects.results.log10_tries if gaps is None else -gaps.gap
    rows: list[int] = order.argsort(stable=True).tolist()
    return [row for row in rows if suspects.results.suffix[row] > 0]


def _one_hot_kinds(cohort: Cohort, kinds: Sequence[str]) -> Tensor:
    """``[N, K]``"""
    return torch.tensor([[float(text.kind == kind) for kind in kinds] for text in cohort.texts])
