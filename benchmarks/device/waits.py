"""How often the host waits for the device, by whom and when, as `torch.cuda.set_sync_debug_mode` sees it."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from benchmarks.device.fits import LOOK, WAYS, Settings
from benchmarks.device.models import Training

PHASES = ("start", "step", "look", "validation batch", "evaluation", "end")
PACKAGE = "lightning_memsink"
STEPS, EVERY = 72, 24
SETTLED = 16
"""Steps that are counted as a start: the first ones are watched to learn whose losses are whose."""


class Waits:
    """``found``: waits by phase and by the package's own line that waited; empty for Lightning's and the user's."""

    def __init__(self) -> None:
        self.found: Counter[tuple[str, str]] = Counter()
        self.phase = "start"

    def note(self, message: Any, *_: Any) -> None:
        """In the place of `warnings.showwarning`."""
        if "synchroniz" in str(message):
            self.found[self.phase, _own_line()] += 1

    @contextmanager
    def counted(self, cuda: bool) -> Iterator[None]:
        if not cuda:
            yield
            return
        shown = warnings.showwarning
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = self.note  # type: ignore[assignment]
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield
            finally:
                torch.cuda.set_sync_debug_mode("default")
                warnings.showwarning = shown

    def each(self, entered: Counter[str]) -> dict[str, float]:
        """Waits of ours by phase, for each time that it was entered."""
        own: Counter[str] = Counter()
        for (phase, line), times in self.found.items():
            if line:
                own[phase] += times
        return {phase: own[phase] / max(1, entered[phase]) for phase in PHASES}


def _own_line() -> str:
    frame, lines = sys._getframe(2), list[str]()
    while frame is not None and len(lines) < 2:
        file = frame.f_code.co_filename
        if f"/{PACKAGE}/" in file:
            lines.append(f"{file.split(f'/{PACKAGE}/')[-1]}:{frame.f_lineno} {frame.f_code.co_name}")
        frame = frame.f_back  # type: ignore[assignment]
    return " < ".join(lines)


class PhaseMarks(Callback):
    """Must be the first callback: what others do after it belongs to the phase that it names."""

    def __init__(self, waits: Waits) -> None:
        self.waits = waits
        self.entered: Counter[str] = Counter(start=1)

    def _enter(self, phase: str) -> None:
        self.waits.phase = phase
        self.entered[phase] += 1

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step >= SETTLED:
            self._enter("look" if trainer.global_step % LOOK == 0 else "step")

    def on_validation_batch_start(self, *_: Any) -> None:
        self._enter("validation batch")

    def on_validation_epoch_end(self, *_: Any) -> None:
        self._enter("evaluation")

    def on_train_end(self, *_: Any) -> None:
        self._enter("end")


def count(settings: Settings, way: str) -> tuple[dict[str, float], Sequence[tuple[str, float]]]:
    """Waits by phase, and the lines that wait most in steady steps, each with its number a step."""
    waits = Waits()
    marks = PhaseMarks(waits)
    with waits.counted(settings.cuda):
        module = Training(settings.small().build(), fused=settings.cuda)
        data = settings.tokens(settings.small(), batches=6)
        settings.fit(module, data, STEPS, [marks, *WAYS[way]()], "bf16-mixed", EVERY)
    lines = [
        (f"{phase}: {line}", times / max(1, marks.entered[phase]))
        for (phase, line), times in waits.found.most_common()
        if line
    ]
    return waits.each(marks.entered), lines
