"""``memsink()``: the default callbacks in one expression."""

from __future__ import annotations

from difflib import get_close_matches
from inspect import signature
from typing import Any

from lightning.pytorch import Callback

from lightning_memsink.callbacks.registry import preset_entries
from lightning_memsink.reporting.loggers.wandb import offline_without_key


def memsink(
    mitigation: Callback | None = None, *, localize: bool = False, extract: bool = False, **options: Any
) -> list[Callback]:
    """The default callbacks for ``Trainer(callbacks=...)``: record losses, detect memorization, log it, report it.

    Args:
        mitigation: a callback that mitigates memorization; None adds none.
        localize: add a ``SinkLocalizer``, which finds the layers and units that carry memorized samples; the model
            must have hidden layers.
        extract: add an ``ExtractionProbe``, which tests whether chosen texts can be extracted; the model must be a
            language model.
        options: any argument of ``LossTracker``, ``MemorizationDetector``, ``LiveCurves`` or ``RunReport`` (and of
            ``SinkLocalizer`` and ``ExtractionProbe``), by name: ``memsink(identity="content", k=16, path=None)``.

    Raises:
        TypeError: none of the chosen callbacks has an argument of that name.
    """
    options_on = {None: True, "localize": localize, "extract": extract}
    kinds = [entry.load() for entry in preset_entries() if options_on[entry.option]]
    owner = {name: kind for kind in kinds for name in signature(kind).parameters}
    for name in options:
        if name not in owner:
            close = get_close_matches(name, owner, n=1)
            hint = f"did you mean `{close[0]}`?" if close else f"it has {', '.join(sorted(owner))}."
            raise TypeError(f"memsink() has no option `{name}`: {hint}")
    offline_without_key()
    callbacks = [kind(**{name: value for name, value in options.items() if owner[name] is kind}) for kind in kinds]
    return callbacks if mitigation is None else [*callbacks, mitigation]
