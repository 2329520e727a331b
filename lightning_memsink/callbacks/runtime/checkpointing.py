"""A ledger in a checkpoint: read whole, or refused with what to do, or left alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning.pytorch import Callback
from lightning_memsink.samples.loss_table import REMEDY

ABOUT_SAMPLES = ("LossTracker", "MemorizationDetector", "SinkLocalizer", "LiveCurves", "SampleGradientMask")
"""Callbacks whose state names samples of one ledger, or steps at which they were judged: they begin anew together."""


@contextmanager
def restoring(whose: str) -> Iterator[None]:
    """Turns what a damaged or foreign state raises into one ValueError that says what to do."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        raise ValueError(
            f"The checkpoint holds a state of {whose} that this version can't read ({type(error).__name__}: {error}). "
            f"{REMEDY}"
        ) from error


def leave_out(checkpoint: dict[str, Any], callbacks: Iterable[Callback]) -> None:
    """Takes out of a loaded ``checkpoint``, before it is restored, all that ``callbacks`` know of samples."""
    for callback in callbacks:
        if any(base.__name__ in ABOUT_SAMPLES for base in type(callback).__mro__):
            checkpoint["callbacks"].pop(callback.state_key, None)
