"""PyTorch Lightning callbacks that see memorization while it happens, and hold it back.

>>> from lightning_memsink import memsink
>>> [type(callback).__name__ for callback in memsink()]
['LossTracker', 'MemorizationDetector', 'LiveCurves', 'RunReport']
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_memsink.callbacks.extraction_probe import ExtractionProbe
    from lightning_memsink.callbacks.goldfish import Goldfish
    from lightning_memsink.callbacks.live_curves import LiveCurves
    from lightning_memsink.callbacks.loss_tracker import LossTracker
    from lightning_memsink.callbacks.loss_truncation import LossTruncation
    from lightning_memsink.callbacks.memorization_detector import MemorizationDetector
    from lightning_memsink.callbacks.memsinks import MemSinks
    from lightning_memsink.callbacks.preset import memsink
    from lightning_memsink.callbacks.progress import MemSinkProgressBar
    from lightning_memsink.callbacks.run_report import RunReport
    from lightning_memsink.callbacks.sample_gradient_mask import SampleGradientMask
    from lightning_memsink.callbacks.sink_dropout import SinkDropout
    from lightning_memsink.callbacks.sink_gradient_mask import SinkGradientMask
    from lightning_memsink.callbacks.sink_localizer import SinkLocalizer
    from lightning_memsink.detection.verdicts import Verdict
    from lightning_memsink.extraction.canaries import plant_canaries
    from lightning_memsink.ledger import Ledger
    from lightning_memsink.localization.sinks import Sinks
    from lightning_memsink.losses.per_sample import per_sample
    from lightning_memsink.mitigation.bake import bake
    from lightning_memsink.mitigation.certificate import Certificate
    from lightning_memsink.mitigation.designed_sinks import Pool
    from lightning_memsink.mitigation.unit_removal import ablate

__all__ = [
    "Certificate",
    "ExtractionProbe",
    "Goldfish",
    "Ledger",
    "LiveCurves",
    "LossTracker",
    "LossTruncation",
    "MemSinkProgressBar",
    "MemSinks",
    "MemorizationDetector",
    "Pool",
    "RunReport",
    "SampleGradientMask",
    "SinkDropout",
    "SinkGradientMask",
    "SinkLocalizer",
    "Sinks",
    "Verdict",
    "ablate",
    "bake",
    "memsink",
    "per_sample",
    "plant_canaries",
]

_HOMES = {
    "Certificate": "mitigation.certificate",
    "ExtractionProbe": "callbacks.extraction_probe",
    "Goldfish": "callbacks.goldfish",
    "Ledger": "ledger",
    "LiveCurves": "callbacks.live_curves",
    "LossTracker": "callbacks.loss_tracker",
    "LossTruncation": "callbacks.loss_truncation",
    "MemSinkProgressBar": "callbacks.progress",
    "MemSinks": "callbacks.memsinks",
    "MemorizationDetector": "callbacks.memorization_detector",
    "Pool": "mitigation.designed_sinks",
    "RunReport": "callbacks.run_report",
    "SampleGradientMask": "callbacks.sample_gradient_mask",
    "SinkDropout": "callbacks.sink_dropout",
    "SinkGradientMask": "callbacks.sink_gradient_mask",
    "SinkLocalizer": "callbacks.sink_localizer",
    "Sinks": "localization.sinks",
    "Verdict": "detection.verdicts",
    "ablate": "mitigation.unit_removal",
    "bake": "mitigation.bake",
    "memsink": "callbacks.preset",
    "per_sample": "losses.per_sample",
    "plant_canaries": "extraction.canaries",
}


def __getattr__(name: str) -> Any:
    """Imported at first use, so that the command line lists recipes without loading torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
