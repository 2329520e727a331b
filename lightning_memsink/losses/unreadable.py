"""The exception for a loss that can't be read, and the warning for a mistake of this package."""

from __future__ import annotations

from pathlib import Path
from traceback import extract_tb


class UnreadableLoss(Exception):
    """A loss call of the user's that can't be split into samples or weighed by sample.

    Its message is the reason, without a full stop: "the loss is l1_loss, with no targets [B, T]". It is expected, and
    answered with a refusal that names the remedy. Any other exception while a loss is read is a mistake in this
    package: it doesn't end the training either, but it warns with `InternalError`.
    """


class InternalError(RuntimeWarning):
    """A mistake in lightning_memsink that was kept from ending the training. Tests turn it into a failure."""


def internal_error(task: str, error: Exception) -> str:
    """The message of an `InternalError`. ``task``: what failed, "Reading the losses of Model.training_step"."""
    frames = extract_tb(error.__traceback__)
    place = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return (
        f"{task} failed with {type(error).__name__}: {error}{place}. The step goes on without it. This is a mistake in "
        "lightning_memsink, please report it"
    )
