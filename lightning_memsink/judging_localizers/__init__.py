"""Tests of localizers, of ours and of anybody's: known units, ablation curves, stress."""

from lightning_memsink.judging_localizers.blind import Blind, judge_blind
from lightning_memsink.judging_localizers.deletion import (
    Curve,
    Deletion,
    Groups,
    ablation_curve,
    judge_deletion,
)
from lightning_memsink.judging_localizers.injection import Injection, Recall, injected, judge_injection
from lightning_memsink.judging_localizers.ranking import average_precision, recall_at
from lightning_memsink.judging_localizers.stress import Stress, prefix_stress

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
