"""Checks of callbacks, mitigations and localizers of anybody's: the rules that this package's own ones keep.

>>> from lightning_memsink.testing import check_callback
>>> check_callback(lambda: MyCallback(threshold=0.5))

The checks of callbacks train a small model for some steps on the CPU, in a few seconds a class. A check that fails
raises AssertionError with what was found, what was expected and what to do.
"""

from __future__ import annotations

from lightning_memsink.localization.localizers import Localizer
from lightning_memsink.testing import callback_checks, localizer_checks
from lightning_memsink.testing.callback_runs import Factory

__all__ = ["check_callback", "check_localizer", "check_mitigation"]


def check_callback(factory: Factory) -> None:
    """Checks a callback that watches training and changes nothing.

    Args:
        factory: returns a new callback at each call. It runs beside `LossTracker`, `MemorizationDetector`,
            `SinkLocalizer` and `LiveCurves`, except its own class.

    Raises:
        AssertionError: at the first rule that the callback breaks.
    """
    callback_checks.check_weights_are_unchanged(factory)
    for check in callback_checks.CHECKS:
        check(factory)


def check_mitigation(factory: Factory, always_acts: bool = False) -> None:
    """Checks a callback that acts on what is memorized.

    Args:
        factory: as for `check_callback`.
        always_acts: whether it acts on every sample from the first step, flagged or not: then weights are not compared
            with a run without it.

    Raises:
        AssertionError: at the first rule that the mitigation breaks.
    """
    if not always_acts:
        callback_checks.check_idle_mitigation_changes_no_weight(factory)
    for check in callback_checks.CHECKS:
        check(factory)


def check_localizer(localizer: Localizer, baseline: bool = False) -> None:
    """Checks a function that scores which hidden units carry given samples.

    Args:
        localizer: takes a `lightning_memsink.localization.localizers.Task`.
        baseline: whether it is a baseline that need not find injected units, such as random scores.

    Raises:
        AssertionError: at the first rule that the localizer breaks.
    """
    for check in localizer_checks.CHECKS:
        check(localizer)
    if not baseline:
        localizer_checks.check_injected_units_are_found(localizer)
