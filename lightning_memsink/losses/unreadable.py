"""The one exception for a loss that can't be read, and the warning for an error of our own."""

from __future__ import annotations


class UnreadableLoss(Exception):
    """A loss call of the user's that can't be split into samples or weighed by sample.

    Its message is the reason, without a full stop: "the loss is l1_loss, with no targets [B, T]". It is expected, and
    answered with a refusal that names the remedy. Any other exception while a loss is read is a mistake in this
    package: it doesn't end the training either, but it warns with `InternalError`.
    """


class InternalError(RuntimeWarning):
    """A mistake in lightning_memsink that was kept from ending the training. Tests turn it into a failure."""
