"""How the cost of measuring grows with batch size, sequence length, width, depth and size of the data set.

One axis of a GPT is varied at a time. Time is processor time of a training step, including a validation and an
evaluation by the detector; fits are interleaved. Memory is the peak of resident memory minus that before the fit, in a
process of its own, forked from one that has warmed up.
"""

from __future__ import annotations

import io
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import torch
from lightning.pytorch import seed_everything
from rich.table import Table
from torch.utils.data import Dataset

from benchmarks.common.criteria import Criterion, Report, argument_parser, configure_process, fresh_seeds
from benchmarks.common.interleaving import UNTIMED_STEPS, StepTimer, interleave, seconds_per_step, time_ratio
from benchmarks.common.memory import MEBIBYTE, keep_freed_memory, memory_in_use, reset_peak, run_forked
from benchmarks.common.training import Sequences, TextModel
from benchmarks.common.workloads import VOCABULARY, Workload
from benchmarks.overhead.runs import PLAIN, run
from lightning_memsink import memsink

RATIO = 1.05
"""Upper bound of the default set's time per step against a plain run, median over all points."""
AXES: Mapping[str, tuple[int, ...]] = {
    "batch": (4, 16, 64),
    "sequence": (16, 64, 256),
    "width": (64, 128, 256),
    "depth": (1, 2, 4),
    "samples": (512, 4096, 262144),
}
"""Sizes by axis. The middle one is used while another axis varies."""
EVALUATIONS = 1
SETUPS: Mapping[str, Mapping[str, Any]] = {
    PLAIN: {},
    "default set": {},
    "and units, every 8th step": {"localize": True, "norms": False},
    "and norms, every 8th step": {"localize": True},
    "units and norms, every step": {"localize": True, "every": 1},
}

Result = TypeVar("Result")


@dataclass(frozen=True)
class Point:
    """Size of a model and its data."""

    batch: int = 16
    sequence: int = 64
    width: int = 128
    depth: int = 2
    samples: int = 4096

    def workload(self, steps: int) -> Workload:
        model = partial(TextModel, VOCABULARY, self.sequence, self.depth, self.width)
        return Workload(str(self), model, partial(texts, self.sequence), self.batch, steps)


def texts(length: int, samples: int, seed: int) -> Dataset[Any]:
    tokens = torch.randint(VOCABULARY, (samples, length), generator=torch.Generator().manual_seed(seed))
    return Sequences(tokens, torch.arange(samples), torch.empty(0), VOCABULARY, seed)


@dataclass
class Cost:
    """Seconds of each step of each fit, and MiB of memory, by setup."""

    seconds: dict[str, list[list[float]]] = field(default_factory=dict)
    memory: dict[str, float] = field(default_factory=dict)

    def ratio(self, setup: str) -> float:
        return time_ratio(self.seconds[setup], self.seconds[PLAIN])

    def added(self, setup: str) -> float:
        """Seconds per step above a plain run."""
        return seconds_per_step(self.seconds[setup]) - seconds_per_step(self.seconds[PLAIN])

    def extra_memory(self, setup: str) -> float:
        """MiB above a plain run."""
        return self.memory[setup] - self.memory[PLAIN]


def measure(point: Point, seeds: Sequence[int], steps: int) -> Cost:
    """Memory of each setup alone; then, for each seed, the times of all of them interleaved."""
    cost = Cost(memory={setup: fork(partial(memory_of, point, seeds[0], steps, setup)) for setup in SETUPS})
    for seed in seeds:
        for setup, seconds in fork(partial(times_of, point, seed, steps)).items():
            cost.seconds.setdefault(setup, []).append(seconds)
    return cost


def memory_of(point: Point, seed: int, steps: int, setup: str) -> float:
    """Peak of resident memory in MiB, above that before the fit."""
    before = memory_in_use()
    reset_peak()
    fit(point, seed, steps, setup, StepTimer())
    return (memory_in_use("VmHWM") - before) / MEBIBYTE


def times_of(point: Point, seed: int, steps: int) -> dict[str, list[float]]:
    """Seconds of each step, by setup."""
    keep_freed_memory()
    return interleave({setup: partial(fit, point, seed, steps, setup) for setup in SETUPS}, seed)


def fit(point: Point, seed: int, steps: int, setup: str, timer: StepTimer) -> None:
    seed_everything(seed, verbose=False)
    workload = point.workload(steps)
    callbacks = [] if setup == PLAIN else memsink(path=None, identity="index", **SETUPS[setup])
    run(workload.module(), workload, seed, [timer, *callbacks], samples=point.samples, evaluations=EVALUATIONS)


def fork(work: partial[Result]) -> Result:
    """The result of ``work`` in a forked process.

    Raises:
        RuntimeError: the process failed.
    """
    result: Result | None = run_forked(work)
    if result is None:
        raise RuntimeError(f"A fit failed: {work.args}. Run benchmarks.growth.fit on it to see why.")
    return result


def slope(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Slope of the least-squares line on log-log axes: 1 if proportional, 0 if constant. NaN unless all values > 0.

    >>> slope([1, 2, 4], [3, 12, 48])
    2.0
    """
    if min(values) <= 0:
        return math.nan
    return round(
        statistics.linear_regression([math.log(each) for each in sizes], [math.log(each) for each in values])[0], 6
    )


Costs = Mapping[str, Mapping[int, Cost]]
"""Costs by axis and size."""


def report(costs: Costs, seeds: Sequence[int]) -> Report:
    tables = [_table(axis, by_size) for axis, by_size in costs.items()]
    slopes = Table("", *costs, title="log-log slopes: time of a plain step, and what is added to it")
    slopes.add_row(PLAIN, *(f"{slope([*by_size], _plain(by_size)):.2f}" for by_size in costs.values()))
    for setup in [*SETUPS][1:]:
        added = ([cost.added(setup) for cost in by_size.values()] for by_size in costs.values())
        growth = [slope([*by_size], values) for by_size, values in zip(costs.values(), added, strict=True)]
        slopes.add_row(setup, *("within noise" if each != each else f"{each:.2f}" for each in growth))
    ratios = {setup: _median(costs, setup) for setup in [*SETUPS][1:]}
    criteria = [
        Criterion("default set, time per step against plain, median of points", ratios["default set"], "<=", RATIO)
    ]
    figure = "growth: " + ", ".join(f"{setup} {factor:.3f}x" for setup, factor in ratios.items())
    settings = {"seeds": list(seeds), "ratios": {axis: _ratios(by_size) for axis, by_size in costs.items()}}
    return Report("growth", [*tables, slopes], criteria, figure, settings)


def _table(axis: str, by_size: Mapping[int, Cost]) -> Table:
    title = f"{axis}: time of a step against plain, and MiB above it"
    table = Table(axis, "plain, ms", "MiB", *[*SETUPS][1:], title=title)
    for size, cost in by_size.items():
        plain = (1000 * seconds_per_step(cost.seconds[PLAIN]), cost.memory[PLAIN])
        setups = (f"{cost.ratio(setup):.3f}  {cost.extra_memory(setup):+.0f}" for setup in [*SETUPS][1:])
        table.add_row(f"{size:,}", f"{plain[0]:.1f}", f"{plain[1]:.0f}", *setups)
    return table


def _plain(by_size: Mapping[int, Cost]) -> list[float]:
    return [seconds_per_step(cost.seconds[PLAIN]) for cost in by_size.values()]


def _ratios(by_size: Mapping[int, Cost]) -> dict[str, dict[str, float]]:
    return {str(size): {setup: cost.ratio(setup) for setup in [*SETUPS][1:]} for size, cost in by_size.items()}


def _median(costs: Costs, setup: str) -> float:
    return statistics.median(cost.ratio(setup) for by_size in costs.values() for cost in by_size.values())


def main(arguments_given: Sequence[str] | None = None) -> int:
    parser = argument_parser("growth", "How the cost of measuring grows.", seeds=3)
    options = parser.parse_args(arguments_given)
    seeds, steps = fresh_seeds(options), 20 if options.quick else 30
    configure_process()
    with redirect_stdout(io.StringIO()):  # summaries of the runs would hide the tables
        for setup in SETUPS:  # imports and the first allocations
            fit(Point(samples=512), seeds[0], 2 * UNTIMED_STEPS, setup, StepTimer())
    costs: dict[str, dict[int, Cost]] = {}
    measured: dict[Point, Cost] = {}
    for axis, sizes in AXES.items():
        for size in sizes[:: 2 if options.quick else 1]:
            point = replace(Point(), **{axis: size})
            if point not in measured:  # the axes cross
                measured[point] = measure(point, seeds, steps)
            costs.setdefault(axis, {})[size] = measured[point]
    return report(costs, seeds).publish(options.json)


if __name__ == "__main__":
    sys.exit(main())
