"""Tests of any localizer: injection, ownership recovery, ablation curves and prompt perturbation."""

from lightning_memsink.localization.evaluation.ablation_curves import (
    AblationTest,
    Curve,
    Groups,
    ablation_curve,
    evaluate_ablation,
)
from lightning_memsink.localization.evaluation.injection import Injection, Recall, evaluate_injection, injected
from lightning_memsink.localization.evaluation.ownership import OwnershipRecovery, evaluate_ownership
from lightning_memsink.localization.evaluation.prompt_perturbation import PromptPerturbation, perturb_prompts
from lightning_memsink.localization.evaluation.ranking import average_precision, recall_at

__all__ = [
    "AblationTest",
    "Curve",
    "Groups",
    "Injection",
    "OwnershipRecovery",
    "PromptPerturbation",
    "Recall",
    "ablation_curve",
    "average_precision",
    "evaluate_ablation",
    "evaluate_injection",
    "evaluate_ownership",
    "injected",
    "perturb_prompts",
    "recall_at",
]
