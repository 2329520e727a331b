"""PyTorch Lightning callbacks that see memorization while it happens, and hold it back.

>>> from lightning_memsink import memsink
>>> [type(callback).__name__ for callback in memsink()]
['LossTracker', 'MemorizationDetector', 'LiveCurves', 'RunReport']
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_memsink.callbacks.live_curves import LiveCurves
    from lightning_memsink.callbacks.loss_tracker import LossTracker
    from lightning_memsink.callbacks.memorization_detector import MemorizationDetector
    from lightning_memsink.callbacks.progress import MemSinkProgressBar
    from lightning_memsink.callbacks.run_report import RunReport
    from lightning_memsink.callbacks.sink_localizer import SinkLocalizer
    from lightning_memsink.canaries import plant_canaries
    from lightning_memsink.default_set import memsink
    from lightning_memsink.ledger import Ledger
    from lightning_memsink.losses import per_sample
    from lightning_memsink.sinks import Sinks
    from lightning_memsink.verdicts import Verdict

__all__ = [
    "Ledger",
    "LiveCurves",
    "LossTracker",
    "MemSinkProgressBar",
    "MemorizationDetector",
    "RunReport",
    "SinkLocalizer",
    "Sinks",
    "Verdict",
    "memsink",
    "per_sample",
    "plant_canaries",
]

_HOMES = {
    "Ledger": "ledger",
    "LiveCurves": "callbacks.live_curves",
    "LossTracker": "callbacks.loss_tracker",
    "MemSinkProgressBar": "callbacks.progress",
    "MemorizationDetector": "callbacks.memorization_detector",
    "RunReport": "callbacks.run_report",
    "SinkLocalizer": "callbacks.sink_localizer",
    "Sinks": "sinks",
    "Verdict": "verdicts",
    "memsink": "default_set",
    "per_sample": "losses",
    "plant_canaries": "canaries",
}


def __getattr__(name: str) -> Any:
    """Imported at first use, so that the command line lists recipes without loading torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
