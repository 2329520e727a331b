"""Why an evaluation has no controls, and what to type."""

from __future__ import annotations

from collections.abc import Callable

from lightning.pytorch import LightningModule

OTHER_WEIGHTS = "validation runs under other weights than training (averaged ones, say)"


def not_evaluated(error: Exception) -> str:
    """Controls of the user's loader, or split off, could not be evaluated."""
    return (
        f"LossTracker could not evaluate its controls ({type(error).__name__}: {error}). Training goes on, and samples "
        "are judged by the evaluation before, if there was one. The controls' batches must be such as training_step "
        "takes."
    )


def failed(step: Callable[..., object], error: Exception) -> str:
    """A step of the user's raised an error outside of Lightning's loops. Of its text the first line."""
    text = " ".join(f"{error}".split("\n", 1)[0].split())
    return f"{step.__name__} raises {type(error).__name__}: {text}" if text else f"{step.__name__} raises {error!r}"


def not_repeatable(module: LightningModule, reason: str) -> str:
    """A validation ran under other weights, and could not be repeated under those that train."""
    remedy = "Name held-out samples instead: memsink(controls=loader)."
    if not module.automatic_optimization:  # under which there are no such controls
        remedy = "Validate under the weights that train."
    return (
        f"LossTracker has no controls: {OTHER_WEIGHTS}, and can't be repeated under those of training: {reason}. "
        f"Samples get no verdict while that is so. {remedy}"
    )


def repeated() -> str:
    """A validation ran under other weights, and was repeated under those that train."""
    return (
        f"memsink: {OTHER_WEIGHTS}. Controls are measured under those of training, in one more pass over the "
        "validation set."
    )
