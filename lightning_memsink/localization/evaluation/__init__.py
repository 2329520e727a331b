"""Tests of localizers, of ours and of anybody's: known units, ablation curves, stress."""

from lightning_memsink.localization.evaluation.ablation_curves import (
    Curve,
    Deletion,
    Groups,
    ablation_curve,
    judge_deletion,
)
from lightning_memsink.localization.evaluation.injection import Injection, Recall, injected, judge_injection
from lightning_memsink.localization.evaluation.ownership import Blind, judge_blind
from lightning_memsink.localization.evaluation.prompt_perturbation import Stress, prefix_stress
from lightning_memsink.localization.evaluation.ranking import average_precision, recall_at

__all__ = [
    "Blind",
    "Curve",
    "Deletion",
    "Groups",
    "Injection",
    "Recall",
    "Stress",
    "ablation_curve",
    "average_precision",
    "injected",
    "judge_blind",
    "judge_deletion",
    "judge_injection",
    "prefix_stress",
    "recall_at",
]
