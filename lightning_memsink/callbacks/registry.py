"""The list of this package's callbacks, as plain strings: reading it imports neither torch nor Lightning.

A new callback needs one entry here. ``lightning_memsink.__all__``, the groups and mitigations of ``memsink fit`` and
the callbacks of ``memsink()`` follow from it.
"""

from __future__ import annotations

from importlib import import_module

TYPE_CHECKING = False  # as type checkers know it; importing typing would take most of the package's import time
if TYPE_CHECKING:
    from lightning.pytorch import Callback


class CallbackEntry:
    """One callback: where it is defined, and who uses it.

    Args:
        name: of the class, as ``lightning_memsink.NAME`` exports it.
        module: below ``lightning_memsink.callbacks``.
        group: its configuration group ``memsink.GROUP`` in `memsink fit`; None if it has none. A callback with a group
            belongs to the preset ``memsink()``.
        option: the option that adds it to the preset, ``memsink(OPTION=True)`` or ``--memsink.OPTION``; None if it is
            always in the preset.
        is_mitigation: whether it mitigates memorization: ``memsink(NAME())``, ``--memsink.mitigation=NAME``.
    """

    def __init__(
        self, name: str, module: str, group: str | None = None, option: str | None = None, is_mitigation: bool = False
    ) -> None:
        self.name, self.module = name, module
        self.group, self.option, self.is_mitigation = group, option, is_mitigation

    def load(self) -> type[Callback]:
        """The class. Imports its module."""
        kind: type[Callback] = getattr(import_module(f"lightning_memsink.callbacks.{self.module}"), self.name)
        return kind


CALLBACKS = (
    CallbackEntry("LossTracker", "loss_tracker", group="tracker"),
    CallbackEntry("MemorizationDetector", "memorization_detector", group="detector"),
    CallbackEntry("LiveCurves", "live_curves", group="curves"),
    CallbackEntry("RunReport", "run_report", group="report"),
    CallbackEntry("SinkLocalizer", "sink_localizer", group="localizer", option="localize"),
    CallbackEntry("ExtractionProbe", "extraction_probe", group="probe", option="extract"),
    CallbackEntry("MemSinkProgressBar", "progress"),
    CallbackEntry("SampleGradientMask", "sample_gradient_mask", is_mitigation=True),
    CallbackEntry("MemSinks", "memsinks", is_mitigation=True),
    CallbackEntry("SinkGradientMask", "sink_gradient_mask", is_mitigation=True),
    CallbackEntry("SinkDropout", "sink_dropout", is_mitigation=True),
    CallbackEntry("Goldfish", "goldfish", is_mitigation=True),
    CallbackEntry("LossTruncation", "loss_truncation", is_mitigation=True),
)
"""In the order of the options of `memsink fit`."""


def preset_entries() -> list[CallbackEntry]:
    """The callbacks that have a configuration group: those of ``memsink()``, optional ones included."""
    return [entry for entry in CALLBACKS if entry.group is not None]


def mitigations() -> list[CallbackEntry]:
    """The callbacks that mitigate memorization."""
    return [entry for entry in CALLBACKS if entry.is_mitigation]
