"""The default set of callbacks in one expression."""

from __future__ import annotations

from difflib import get_close_matches
from inspect import signature
from typing import Any

from lightning.pytorch import Callback

from lightning_memsink.callbacks.extraction_probe import ExtractionProbe
from lightning_memsink.callbacks.live_curves import LiveCurves
from lightning_memsink.callbacks.loss_tracker import LossTracker
from lightning_memsink.callbacks.memorization_detector import MemorizationDetector
from lightning_memsink.callbacks.run_report import RunReport
from lightning_memsink.callbacks.sink_localizer import SinkLocalizer
from lightning_memsink.reporting.loggers.wandb import offline_without_key

_SET: tuple[type[Callback], ...] = (LossTracker, MemorizationDetector, LiveCurves, RunReport)


def memsink(
    mitigation: Callback | None = None, *, localize: bool = False, extract: bool = False, **options: Any
) -> list[Callback]:
    """The callbacks to hand to ``Trainer(callbacks=...)``: track, judge, show, report.

    Args:
        mitigation: a callback that acts on what the others find; None only watches.
        localize: also say in which layers and units, by a ``SinkLocalizer``; the model must have hidden layers.
        extract: also ask for texts, by an ``ExtractionProbe``; the model must be a language model.
        options: any argument of ``LossTracker``, ``MemorizationDetector``, ``LiveCurves`` or ``RunReport`` (and of
            ``SinkLocalizer`` and ``ExtractionProbe``), by name: ``memsink(identity="content", k=16, path=None)``.

    Raises:
        TypeError: for an option that none of them has.
    """
    kinds = (*_SET, *[SinkLocalizer] * localize, *[ExtractionProbe] * extract)
    owner = {name: kind for kind in kinds for name in signature(kind).parameters}
    for name in options:
        if name not in owner:
            close = get_close_matches(name, owner, n=1)
            hint = f"did you mean `{close[0]}`?" if close else f"it has {', '.join(sorted(owner))}."
            raise TypeError(f"memsink() has no option `{name}`: {hint}")
    offline_without_key()
    callbacks = [kind(**{name: value for name, value in options.items() if owner[name] is kind}) for kind in kinds]
    return callbacks if mitigation is None else [*callbacks, mitigation]
