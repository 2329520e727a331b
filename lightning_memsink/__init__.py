"""PyTorch Lightning callbacks that see memorization while it happens, and hold it back.

>>> from lightning_memsink import memsink
>>> [type(callback).__name__ for callback in memsink()]
['LossTracker', 'MemorizationDetector', 'LiveCurves', 'RunReport']
"""

from __future__ import annotations

from importlib import import_module

from lightning_memsink import _moved
from lightning_memsink.callbacks.registry import CALLBACKS

TYPE_CHECKING = False  # as type checkers know it; importing typing would take most of the package's import time
if TYPE_CHECKING:  # for type checkers and editors; a test compares it with `__all__`
    from typing import Any

    from lightning_memsink.callbacks.extraction_probe import ExtractionProbe as ExtractionProbe
    from lightning_memsink.callbacks.goldfish import Goldfish as Goldfish
    from lightning_memsink.callbacks.live_curves import LiveCurves as LiveCurves
    from lightning_memsink.callbacks.loss_tracker import LossTracker as LossTracker
    from lightning_memsink.callbacks.loss_truncation import LossTruncation as LossTruncation
    from lightning_memsink.callbacks.memorization_detector import MemorizationDetector as MemorizationDetector
    from lightning_memsink.callbacks.memsinks import MemSinks as MemSinks
    from lightning_memsink.callbacks.preset import memsink as memsink
    from lightning_memsink.callbacks.progress import MemSinkProgressBar as MemSinkProgressBar
    from lightning_memsink.callbacks.run_report import RunReport as RunReport
    from lightning_memsink.callbacks.sample_gradient_mask import SampleGradientMask as SampleGradientMask
    from lightning_memsink.callbacks.sink_dropout import SinkDropout as SinkDropout
    from lightning_memsink.callbacks.sink_gradient_mask import SinkGradientMask as SinkGradientMask
    from lightning_memsink.callbacks.sink_localizer import SinkLocalizer as SinkLocalizer
    from lightning_memsink.detection.verdicts import Verdict as Verdict
    from lightning_memsink.extraction.canaries import plant_canaries as plant_canaries
    from lightning_memsink.ledger import Ledger as Ledger
    from lightning_memsink.localization.sinks import Sinks as Sinks
    from lightning_memsink.losses.per_sample import per_sample as per_sample
    from lightning_memsink.mitigation.bake import bake as bake
    from lightning_memsink.mitigation.certificate import Certificate as Certificate
    from lightning_memsink.mitigation.designed_sinks import Pool as Pool
    from lightning_memsink.mitigation.unit_removal import ablate as ablate

_MODULES = {entry.name: f"callbacks.{entry.module}" for entry in CALLBACKS} | {
    "Certificate": "mitigation.certificate",
    "Ledger": "ledger",
    "Pool": "mitigation.designed_sinks",
    "Sinks": "localization.sinks",
    "Verdict": "detection.verdicts",
    "ablate": "mitigation.unit_removal",
    "bake": "mitigation.bake",
    "memsink": "callbacks.preset",
    "per_sample": "losses.per_sample",
    "plant_canaries": "extraction.canaries",
}
"""By public name, the module that defines it."""

__all__ = sorted(_MODULES)

_moved.install()


def __getattr__(name: str) -> Any:
    """Imports a public name at its first use, so that the command line lists recipes without loading torch."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
