"""Fits on a device, and what each set of callbacks is called."""

from __future__ import annotations

import gc
import io
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from itertools import pairwise
from time import perf_counter
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader

from benchmarks.device.models import Shape, ZipfText
from lightning_memsink import Goldfish, MemSinks, SampleGradientMask, SinkDropout, memsink

PLAIN, AGAIN = "plain", "plain again"
LOOK = 8
"""Steps between two looks of the localizer."""

WAYS: dict[str, Callable[[], list[Callback]]] = {
    PLAIN: list,
    "watch": lambda: memsink(path=None, recheck=0),
    "watch, second looks": lambda: memsink(path=None),
    "hold": lambda: memsink(SampleGradientMask(), path=None),
    "memsinks": lambda: memsink(MemSinks(certify=0), path=None),
    "goldfish": lambda: memsink(Goldfish(), path=None),
    "sink dropout": lambda: memsink(SinkDropout(), path=None, localize=True, norms=False, every=LOOK),
    "units": lambda: memsink(path=None, localize=True, norms=False, every=LOOK),
    "units and norms": lambda: memsink(path=None, localize=True, every=LOOK),
    AGAIN: list,
}
"""Callbacks of a fit by the name of the set."""


@dataclass(frozen=True)
class Settings:
    """``device`` is ``cuda`` or ``cpu``; ``tiny`` makes everything small, so that it runs anywhere."""

    device: str
    tiny: bool
    workers: int

    @property
    def cuda(self) -> bool:
        return self.device == "cuda"

    def small(self) -> Shape:
        """For what is checked rather than timed."""
        shape = Shape("small", 4096, 256, 4, 4, 256, batch=8)
        return shape if not self.tiny else replace(shape, vocabulary=211, width=32, layers=2, length=48, batch=4)

    def backend(self) -> dict[str, Any]:
        """Options of `torch.compile`: a CPU without a compiler traces too."""
        return {} if self.cuda else {"backend": "aot_eager"}

    def tokens(self, shape: Shape, batches: int, padded: bool = False) -> tuple[DataLoader[Any], DataLoader[Any]]:
        """Loaders of training and of 32 held-out samples."""
        options: dict[str, Any] = {
            "pin_memory": self.cuda, "num_workers": self.workers, "persistent_workers": self.workers > 0,
        }  # fmt: skip
        train = ZipfText(shape.batch * batches, shape.length, shape.vocabulary, 0, padded)
        held_out = ZipfText(32, shape.length, shape.vocabulary, 1, padded)
        return DataLoader(train, shape.batch, shuffle=True, **options), DataLoader(held_out, shape.batch, **options)

    def fit(
        self,
        module: LightningModule,
        data: Sequence[DataLoader[Any]],
        steps: int,
        callbacks: Sequence[Callback],
        precision: Any = "32-true",
        every: int = 0,
    ) -> None:
        """Trains for ``steps``, with a validation every ``every`` of them."""
        with redirect_stdout(io.StringIO()):
            trainer = Trainer(
                accelerator="gpu" if self.cuda else "cpu", devices=1, max_steps=steps, precision=precision,
                val_check_interval=every or steps, check_val_every_n_epoch=None, num_sanity_val_steps=0, logger=False,
                enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
                callbacks=list(callbacks),
            )  # fmt: skip
            trainer.fit(module, data[0], data[1])


class StepClock(Callback):
    """Times each step by the device's own clock, without making it wait. Must be the first callback."""

    def __init__(self, first: int, last: int, cuda: bool) -> None:
        self.first, self.last, self.cuda = first, last, cuda
        self.marks: list[tuple[int, Any]] = []
        self.wall: dict[int, float] = {}
        self.peak = 0
        self.validated: set[int] = set()

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        step = trainer.global_step
        if step in (self.first, self.last):
            if self.cuda:
                torch.cuda.synchronize()
                if step == self.first:
                    torch.cuda.reset_peak_memory_stats()
                else:
                    self.peak = torch.cuda.max_memory_allocated()
            self.wall[step] = perf_counter()
        self.marks.append((step, self._now()))

    def on_validation_start(self, trainer: Trainer, *_: Any) -> None:
        self.validated.add(trainer.global_step - 1)

    def _now(self) -> Any:
        if not self.cuda:
            return perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def timing(self) -> dict[str, float]:
        """Milliseconds a step, over all (``mean``, with validations) and over those without one (``median``,
        ``longest``), and the peak of memory in GiB."""
        if self.cuda:
            torch.cuda.synchronize()
        took = {
            step: one.elapsed_time(other) if self.cuda else 1000 * (other - one)
            for (step, one), (_, other) in pairwise(self.marks)
            if self.first <= step < self.last and step not in self.validated
        }
        return {
            "mean": 1000 * (self.wall[self.last] - self.wall[self.first]) / (self.last - self.first),
            "median": statistics.median(took.values()),
            "longest": max(took.values()),
            "peak": self.peak / 2**30,
        }


def release() -> None:
    """Memory of the last fit is given back before the next."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def deterministic() -> Iterator[None]:
    """Kernels that add in the same order every time."""
    switches = (
        torch.backends.cuda.enable_flash_sdp,
        torch.backends.cuda.enable_mem_efficient_sdp,
        torch.backends.cuda.enable_cudnn_sdp,
    )
    for switch in switches:
        switch(False)
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        for switch in switches:
            switch(True)
