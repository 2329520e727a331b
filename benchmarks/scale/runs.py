"""Time and memory of one table of many samples; each measurement in a separate process with its own peak memory."""

from __future__ import annotations

import io
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler

from benchmarks.common.interleaving import UNTIMED_STEPS, StepTimer
from benchmarks.common.memory import memory_in_use, reset_peak, trim_heap
from benchmarks.common.workloads import CONTEXT, VOCABULARY, WORKLOADS
from benchmarks.faults.benchmark import bits
from lightning_memsink._chunks import blocks
from lightning_memsink.callbacks.live_curves import LiveCurves
from lightning_memsink.callbacks.loss_tracker import LossTracker
from lightning_memsink.callbacks.memorization_detector import MemorizationDetector
from lightning_memsink.callbacks.run_report import RunReport

CONTROLS, FEATURES, MEMORIZED = 2000, 4, 0.001
"""Held-out samples; features beside the early loss, so that samples are matched on five; share far below controls."""
BATCH, FLUSH = 32, 50
STEPS = {"first": 10, "early": 2010, "then": 4010, "last": 6010}
"""The visits of all samples, as steps: two evaluations of the controls before memorization, two after."""
AT_A_TIME = 1 << 18


@dataclass(frozen=True)
class SizeCosts:
    """One table of ``samples``; times in seconds, of the clock and (``processor``) of all threads; memory in bytes.

    ``peaks``: of the resident memory in each phase, beyond what the process had before the table.
    """

    samples: int
    tensors: int
    resident: int
    file: int
    seconds: dict[str, float]
    processor: dict[str, float]
    peaks: dict[str, int]
    memorized: int
    equal: bool


def ids_of(rows: Tensor) -> Tensor:
    """Ids spread over all 64-bit numbers: rows that are neighbours in the table have distant ids."""
    return rows * -0x61C8864680B583EB


def _drawn(start: int, end: int, step: int) -> tuple[Tensor, Tensor]:
    """Features ``[V, F]`` of the samples in a block, always the same, and losses ``[V]`` at a step."""
    generator = torch.Generator().manual_seed(start + 1)
    features = torch.randn(end - start, FEATURES, generator=generator)
    losses = 4 + features[:, 0] + 0.2 * torch.randn(end - start, generator=generator)
    memorized = torch.rand(end - start, generator=generator) < MEMORIZED
    losses[memorized] -= 3.0 if step > STEPS["early"] else 0.0
    return features, losses


def visit_all(tracker: LossTracker, samples: int, step: int) -> None:
    """Records one visit and the features of every sample."""
    for part in blocks(samples, AT_A_TIME):
        features, losses = _drawn(part.start, part.stop, step)
        steps = torch.full(losses.shape, step, dtype=torch.int32)
        ids = ids_of(torch.arange(part.start, part.stop))
        rows = tracker.table.record(ids, losses, steps, torch.full(losses.shape, 64.0))
        tracker.table.describe(rows, features)


def record_controls(tracker: LossTracker, step: int) -> None:
    features, losses = _drawn(-CONTROLS, 0, 0)
    tracker.controls.record(step, torch.arange(CONTROLS), losses, features)
    if tracker.table.reference_step is None:
        tracker.table.reference_step = step


def filled(samples: int) -> LossTracker:
    """A tracker that recorded two visits of every sample, and the controls after each."""
    tracker = LossTracker(controls=())  # so that none of a validation are waited for
    for step in (STEPS["first"], STEPS["early"]):
        visit_all(tracker, samples, step)
        record_controls(tracker, step + 10)
    return tracker


def measure_size(samples: int, threads: int) -> SizeCosts:
    """Table, evaluations, checkpoint and report, all by the callbacks themselves."""
    torch.set_num_threads(threads)
    _warm_up()
    trim_heap()
    before = memory_in_use()
    seconds: dict[str, float] = {}
    processor: dict[str, float] = {}
    peaks: dict[str, int] = {}

    def timed(phase: str, work: Callable[[], Any]) -> Any:
        trim_heap()
        reset_peak()
        start, busy = time.perf_counter(), time.process_time()
        found = work()
        seconds[phase] = max(seconds.get(phase, 0.0), time.perf_counter() - start)
        processor[phase] = max(processor.get(phase, 0.0), time.process_time() - busy)
        peaks[phase] = max(peaks.get(phase, 0), memory_in_use("VmHWM") - before)
        return found

    tracker = timed("visits", lambda: filled(samples))
    detector, curves = MemorizationDetector(), LiveCurves()
    trainer = _trainer([tracker, detector, curves])
    for callback in (tracker, detector, curves):
        callback.on_fit_start(trainer, None)  # type: ignore[arg-type]
    for step in (STEPS["then"], STEPS["last"]):
        visit_all(tracker, samples, step)
        record_controls(tracker, step + 10)
        timed("evaluation", lambda: detector._evaluate(trainer))
        timed("curves", lambda: curves._log_evaluation(trainer))
    trim_heap()
    held = memory_in_use() - before
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        file = Path(folder) / "checkpoint"
        timed("save", lambda: torch.save([tracker.state_dict(), detector.state_dict()], file))
        size = file.stat().st_size
        loaded = timed("load", lambda: _loaded(file))
        equal = all(
            bits(saved.state_dict()) == bits(restored.state_dict())
            for saved, restored in zip((tracker, detector), loaded, strict=True)
        )
        del loaded
        report = RunReport(Path(folder) / "report.md")
        timed("report", lambda: report.teardown(trainer, None, "fit"))  # type: ignore[arg-type]
    flags = detector.flags
    return SizeCosts(
        samples,
        tracker.table.nbytes + flags.nbytes,
        held,
        size,
        seconds,
        processor,
        peaks,
        int(flags.memorized.sum()),
        equal,
    )


def _warm_up() -> None:
    """Runs each part once: what the first call allocates or imports is not counted for a table."""
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        tracker, detector, curves = filled(1000), MemorizationDetector(), LiveCurves()
        trainer = _trainer([tracker, detector, curves])
        for callback in (tracker, detector, curves):
            callback.on_fit_start(trainer, None)  # type: ignore[arg-type]
        detector._evaluate(trainer)
        curves._log_evaluation(trainer)
        RunReport(Path(folder) / "report.md").teardown(trainer, None, "fit")  # type: ignore[arg-type]


def _loaded(file: Path) -> tuple[LossTracker, MemorizationDetector]:
    tracker, detector = LossTracker(), MemorizationDetector()
    states = torch.load(file, weights_only=True)
    tracker.load_state_dict(states[0])
    detector.load_state_dict(states[1])
    return tracker, detector


# A step -----------------------------------------------------------------------------------------------------------


class Texts(Dataset[dict[str, Tensor]]):
    """As many samples as a table has, of 1,024 texts: a sample costs the same at every size."""

    def __init__(self, samples: int) -> None:
        self.samples = samples
        self.texts = torch.randint(VOCABULARY, (1024, CONTEXT), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {"input_ids": self.texts[row % 1024], "sample_id": ids_of(torch.tensor(row))}


@dataclass(frozen=True)
class StepCosts:
    """Processor seconds of a step, a fit each: ``plain``, and ``watched`` by size; and of the table's part alone."""

    plain: list[float]
    watched: dict[int, list[float]]
    table: dict[int, list[float]]


def measure_steps(sizes: tuple[int, ...], rounds: int, steps: int) -> StepCosts:
    """Fits in turns, forth and back, on tables in the same process: a drift of the machine affects all alike."""
    torch.set_num_threads(1)
    trackers = {size: filled(size).table for size in sizes}
    found = StepCosts([], {size: [] for size in sizes}, {size: [] for size in sizes})
    _fit(None, sizes[0], 2 * UNTIMED_STEPS, 0)
    for number in range(rounds):
        turns: list[int | None] = [None, *sizes]
        for turn in (*turns, *reversed(turns)):
            tracker = None
            if turn is not None:
                tracker = LossTracker()
                tracker.table = trackers[turn]
            seconds = _fit(tracker, turn or sizes[-1], steps, number)
            (found.plain if turn is None else found.watched[turn]).append(seconds)
    for size in (size for _ in range(20 * rounds) for size in sizes):
        found.table[size].append(_flush(trackers[size], size))
    return found


def _fit(tracker: LossTracker | None, samples: int, steps: int, seed: int) -> float:
    seed_everything(seed, verbose=False)
    turn, data = StepTimer(), Texts(samples)
    sampler = RandomSampler(data, replacement=True, num_samples=steps * BATCH)
    trainer = _trainer([turn, *([] if tracker is None else [tracker])], steps)
    trainer.fit(_module(), DataLoader(data, BATCH, sampler=sampler))
    return statistics.fmean(turn.seconds[UNTIMED_STEPS:])


def _module() -> LightningModule:
    return WORKLOADS[0].module()


def _flush(table: Any, samples: int) -> float:
    """Seconds a step to write to the table: a block of visits of known samples in random rows."""
    rows = torch.randint(samples, (BATCH * FLUSH,))
    ids, losses, many = ids_of(rows), torch.rand(len(rows)), torch.ones(len(rows))
    features, steps = torch.rand(len(rows), FEATURES), torch.full((len(rows),), STEPS["then"])
    start = time.process_time()
    at = table.record(ids, losses, steps, many)
    table.described(at, 0)
    table.describe(at, features)
    return (time.process_time() - start) / FLUSH


def _trainer(callbacks: list[Any], steps: int = 1) -> Trainer:
    return Trainer(
        accelerator="cpu",
        max_steps=steps,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
