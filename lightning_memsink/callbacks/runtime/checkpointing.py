"""A ledger in a checkpoint: it is read completely, refused with the remedy, or left out for a new one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning.pytorch import Callback
from lightning_memsink.samples.loss_table import REMEDY


@contextmanager
def restoring(callback: str) -> Iterator[None]:
    """Turns any error from restoring a damaged or foreign state of ``callback`` into a ValueError with the remedy."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        raise ValueError(
            f"The checkpoint holds a state of {callback} that this version can't read ({type(error).__name__}: "
            f"{error}). {REMEDY}"
        ) from error


def leave_out(checkpoint: dict[str, Any], callbacks: Iterable[Callback]) -> None:
    """Removes from a loaded ``checkpoint``, before it is restored, the states of ``callbacks`` that belong to a ledger.

    These callbacks have the class attribute ``saves_samples = True``: their state refers to samples of one ledger, or
    to steps at which these were evaluated, so all of them start anew together. Every callback of this package that has
    a state declares the attribute; a callback of the user's may.
    """
    for callback in callbacks:
        if getattr(callback, "saves_samples", False):
            checkpoint["callbacks"].pop(callback.state_key, None)
