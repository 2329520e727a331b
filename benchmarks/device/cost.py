"""Time and memory of steps of GPT-2 124 M and of a Llama-like model, with each set of callbacks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from benchmarks.device.fits import AGAIN, PLAIN, WAYS, Settings, StepClock, release
from benchmarks.device.models import Shape, Training

GPT2 = Shape("GPT-2 124M, 16x1024", 50304, 768, 12, 12, 1024, batch=16)
LLAMA = Shape("Llama 300M, 8x2048", 128256, 1024, 13, 16, 2048, batch=8, llama=True)
COMPILED = (PLAIN, "watch", "hold", AGAIN)
"""Sets that are measured on a compiled model."""
WINDOW, FIRST = 50, 20
"""Steps that are timed, and those before, in which losses are learned and code is compiled."""


def shapes(settings: Settings) -> list[tuple[Shape, bool, Sequence[str]]]:
    """Shape, whether it is compiled, and the sets to measure on it."""
    full = [(GPT2, False, tuple(WAYS)), (LLAMA, False, tuple(WAYS)), (GPT2, True, COMPILED)]
    if not settings.tiny:
        return full  # type: ignore[return-value]
    small = settings.small()
    return [(replace(small, name=shape.name, llama=shape.llama), compiled, ways) for shape, compiled, ways in full]


def measure(settings: Settings, shape: Shape, compiled: bool, way: str) -> dict[str, float]:
    """Milliseconds a step and GiB of one fit; ``left``: what callbacks still hold after it."""
    window, first, every = (16, 10, 6) if settings.tiny else (WINDOW, FIRST, 25)
    torch.manual_seed(0)
    with torch.device(settings.device):
        model = shape.build()
    if compiled:
        model = torch.compile(model, **settings.backend())  # type: ignore[assignment]
    clock = StepClock(first, first + window, settings.cuda)
    callbacks = [clock, *WAYS[way]()]
    module = Training(model, fused=settings.cuda)
    settings.fit(module, settings.tokens(shape, 20), first + window + 1, callbacks, "bf16-mixed", every)
    timing = clock.timing()
    del module, model
    release()
    timing["left"] = torch.cuda.memory_allocated() / 2**30 if settings.cuda else 0.0
    return timing


def ratio(rows: dict[str, dict[str, float]], way: str, what: str) -> float:
    """To the mean of the plain fits before and after."""
    plain = [rows[name][what] for name in (PLAIN, AGAIN) if name in rows]
    return rows[way][what] / (sum(plain) / len(plain))
