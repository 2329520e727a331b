"""Costs of a step, memory, an evaluation and a checkpoint, from 10^4 samples to 10^7.

Every size is measured in a separate process, whose resident memory includes every allocation. Steps are measured in
one process on all tables in turns. Samples are matched on four features and the early loss, with 2,000
controls; ids lie anywhere among 64-bit numbers; at each evaluation every sample was visited since the last, which is
the largest possible work. Linux only, because a process reads its memory from /proc.
"""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

from rich.table import Table

from benchmarks.common.criteria import Criterion, Report, argument_parser, configure_process
from benchmarks.common.memory import MEBIBYTE
from benchmarks.scale.runs import CONTROLS, SizeCosts, StepCosts, measure_size, measure_steps

SIZES, QUICK = (10_000, 100_000, 1_000_000, 10_000_000), (10_000, 100_000, 1_000_000)
STEPS = 80
BYTES, SECONDS, THREADS = 64, 30, 2
SHARE = 1.0
"""In percent: fits differ by more than a table can cost, so what it costs is measured without the fit, too."""
PHASES = ("visits", "evaluation", "curves", "save", "load", "report")


def alone(work: Any, *job: Any) -> Any:
    """Runs ``work(*job)`` in a separate process and waits for it."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=configure_process) as pool:
        return pool.submit(work, *job).result()


def report(sized: Sequence[SizeCosts], stepped: StepCosts, settings: dict[str, Any]) -> Report:
    smallest, largest = sized[0].samples, sized[-1]
    more, noise = added(stepped, largest.samples) - added(stepped, smallest), noise_of(stepped)
    plain = statistics.median(stepped.plain)
    table = statistics.median(stepped.table[largest.samples]) - statistics.median(stepped.table[smallest])
    criteria = [
        Criterion(f"µs more a step at {largest.samples:.0e} samples than at {smallest:.0e}, within noise",
                  1e6 * more, "<=", 1e6 * noise),
        Criterion("the table's part of that, measured alone, % of a plain step", 100 * table / plain, "<=", SHARE),
        Criterion("bytes a sample, tensors", largest.tensors / largest.samples, "<=", BYTES),
        Criterion("bytes a sample, resident after two evaluations", largest.resident / largest.samples, "<=", BYTES),
        Criterion("bytes a sample, checkpoint", largest.file / largest.samples, "<=", BYTES),
        Criterion("seconds of a full evaluation", largest.seconds["evaluation"], "<=", SECONDS),
        Criterion("tables that a checkpoint brought back to the bit", sum(each.equal for each in sized), ">=",
                  len(sized)),
    ]  # fmt: skip
    figure = (
        f"scale: {largest.samples:,} samples in {largest.tensors / largest.samples:.1f} bytes each, evaluated in "
        f"{largest.seconds['evaluation']:.1f} s against {CONTROLS:,} controls; {1e6 * more:+.0f} µs a step "
        f"(noise {1e6 * noise:.0f} µs, a plain step takes {1e6 * plain:,.0f} µs)"
    )
    return Report("scale", _tables(sized, stepped), criteria, figure, settings | _numbers(sized, stepped))


def added(stepped: StepCosts, size: int) -> float:
    """Seconds that LossTracker adds to a step, with a table of ``size``: the median over rounds, there and back."""
    pairs = [sum(stepped.watched[size][at : at + 2]) - sum(stepped.plain[at : at + 2]) for at in _rounds(stepped)]
    return statistics.median(pairs) / 2


def noise_of(stepped: StepCosts) -> float:
    """Noise of a difference of two fits: the median over rounds of plain against plain."""
    return statistics.median(abs(stepped.plain[at] - stepped.plain[at + 1]) for at in _rounds(stepped))


def _rounds(stepped: StepCosts) -> range:
    return range(0, len(stepped.plain), 2)


def _tables(sized: Sequence[SizeCosts], stepped: StepCosts) -> list[Table]:
    steps = Table("samples", "added to a step, µs", "of it the table's, µs", title="A training step, plain: "
                  f"{1e6 * statistics.median(stepped.plain):,.0f} µs")  # fmt: skip
    memory = Table("samples", "tensors", "resident", "checkpoint", "memorized", title="Bytes a sample")
    times = Table("samples", *PHASES, title=f"Seconds, on {THREADS} threads; the slower of two evaluations")
    busy = Table("samples", *PHASES, title="Processor seconds, which are more reliable on a shared machine")
    peaks = Table("samples", *PHASES, title="Largest resident memory meanwhile, MiB")
    for each in sized:
        name, size = f"{each.samples:,}", each.samples
        table = statistics.median(stepped.table[size])
        steps.add_row(name, f"{1e6 * added(stepped, size):.0f}", f"{1e6 * table:.0f}")
        memory.add_row(
            name, *(f"{total / size:.1f}" for total in (each.tensors, each.resident, each.file)), f"{each.memorized:,}"
        )
        times.add_row(name, *(f"{each.seconds[phase]:.2f}" for phase in PHASES))
        busy.add_row(name, *(f"{each.processor[phase]:.2f}" for phase in PHASES))
        peaks.add_row(name, *(f"{each.peaks[phase] / MEBIBYTE:,.0f}" for phase in PHASES))
    return [steps, memory, times, busy, peaks]


def _numbers(sized: Sequence[SizeCosts], stepped: StepCosts) -> dict[str, Any]:
    return {
        f"{each.samples:.0e}": {
            "added_us": 1e6 * added(stepped, each.samples),
            "table_us": 1e6 * statistics.median(stepped.table[each.samples]),
            "bytes": {"tensors": each.tensors, "resident": each.resident, "checkpoint": each.file},
            "seconds": each.seconds,
            "processor_seconds": each.processor,
            "peak_bytes": each.peaks,
            "memorized": each.memorized,
        }
        for each in sized
    }


def main(arguments_given: Sequence[str] | None = None) -> int:
    parser = argument_parser(
        "scale", "Costs of a step, memory, evaluation and checkpoint by number of samples.", seeds=5
    )
    options = parser.parse_args(arguments_given)
    sizes = QUICK if options.quick else SIZES
    rounds, steps = (1, STEPS // 2) if options.quick else (options.seeds, STEPS)
    stepped = alone(measure_steps, sizes, rounds, steps)
    threads = min(THREADS, os.cpu_count() or 1)
    sized = [alone(measure_size, size, threads) for size in sizes]
    settings = {"rounds": rounds, "steps": steps, "controls": CONTROLS, "evaluation_threads": threads}
    return report(sized, stepped, settings).publish(options.json)


if __name__ == "__main__":
    sys.exit(main())
