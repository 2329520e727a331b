"""How the cost of watching grows: with the batch, the sequence, the width, the depth and the data set.

One GPT is stretched along one axis at a time. Time is processor time of a training step, a validation and an evaluation
by the detector within; fits take their steps in turn. Memory is what was resident at most above what was before the
fit, in a process of its own that was forked from one that has warmed up.
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
"""The default set against a plain run, median over all points."""
AXES: Mapping[str, tuple[int, ...]] = {
    "batch": (4, 16, 64),
    "sequence": (16, 64, 256),
    "width": (64, 128, 256),
    "depth": (1, 2, 4),
    "samples": (512, 4096, 262144),
}
"""The middle one is where the axes cross."""
EVALUATIONS = 1
WAYS: Mapping[str, Mapping[str, Any]] = {
    PLAIN: {},
    "default set": {},
    "and units, every 8th step": {"localize": True, "norms": False},
    "and norms, every 8th step": {"localize": True},
    "units and norms, every step": {"localize": True, "every": 1},
}


Told = TypeVar("Told")


@dataclass(frozen=True)
class Point:
    """What is trained."""

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
    """By way, of each fit: ``seconds`` of its steps and ``memory`` in MiB."""

    seconds: dict[str, list[list[float]]] = field(default_factory=dict)
    memory: dict[str, float] = field(default_factory=dict)

    def ratio(self, way: str) -> float:
        return time_ratio(self.seconds[way], self.seconds[PLAIN])

    def added(self, way: str) -> float:
        """Seconds a step above plain."""
        return seconds_per_step(self.seconds[way]) - seconds_per_step(self.seconds[PLAIN])

    def extra_memory(self, way: str) -> float:
        """MiB above plain."""
        return self.memory[way] - self.memory[PLAIN]


def measure(point: Point, seeds: Sequence[int], steps: int) -> Cost:
    """Each way alone, for its memory; then, for each seed, all of them in turns."""
    cost = Cost(memory={way: in_a_fork(partial(memory_of, point, seeds[0], steps, way)) for way in WAYS})
    for seed in seeds:
        for way, seconds in in_a_fork(partial(times_of, point, seed, steps)).items():
            cost.seconds.setdefault(way, []).append(seconds)
    return cost


def memory_of(point: Point, seed: int, steps: int, way: str) -> float:
    """MiB at most above what was resident before."""
    before = memory_in_use()
    reset_peak()
    fit(point, seed, steps, way, StepTimer())
    return (memory_in_use("VmHWM") - before) / MEBIBYTE


def times_of(point: Point, seed: int, steps: int) -> dict[str, list[float]]:
    """By way, seconds of each step."""
    keep_freed_memory()
    return interleave({way: partial(fit, point, seed, steps, way) for way in WAYS}, seed)


def fit(point: Point, seed: int, steps: int, way: str, turn: StepTimer) -> None:
    seed_everything(seed, verbose=False)
    workload = point.workload(steps)
    watching = [] if way == PLAIN else memsink(path=None, identity="index", **WAYS[way])
    run(workload.module(), workload, seed, [turn, *watching], samples=point.samples, evaluations=EVALUATIONS)


def in_a_fork(work: partial[Told]) -> Told:
    """What ``work`` returns in a copy of this process.

    Raises:
        RuntimeError: it did not end well.
    """
    told: Told | None = run_forked(work)
    if told is None:
        raise RuntimeError(f"A fit failed: {work.args}. Run benchmarks.growth.fit on it to see why.")
    return told


def slope(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Of a line through logarithms: 1 is in proportion, 0 does not grow. NaN if a value is not above zero.

    >>> slope([1, 2, 4], [3, 12, 48])
    2.0
    """
    if min(values) <= 0:
        return math.nan
    return round(
        statistics.linear_regression([math.log(each) for each in sizes], [math.log(each) for each in values])[0], 6
    )


Costs = Mapping[str, Mapping[int, Cost]]
"""By axis and size."""


def report(costs: Costs, seeds: Sequence[int]) -> Report:
    tables = [_table(axis, found) for axis, found in costs.items()]
    slopes = Table("", *costs, title="log-log slopes: time of a plain step, and what is added to it")
    slopes.add_row(PLAIN, *(f"{slope([*found], _plain(found)):.2f}" for found in costs.values()))
    for way in [*WAYS][1:]:
        added = ([each.added(way) for each in found.values()] for found in costs.values())
        grown = [slope([*found], values) for found, values in zip(costs.values(), added, strict=True)]
        slopes.add_row(way, *("within noise" if each != each else f"{each:.2f}" for each in grown))
    ratios = {way: _median(costs, way) for way in [*WAYS][1:]}
    criteria = [
        Criterion("default set, time per step against plain, median of points", ratios["default set"], "<=", RATIO)
    ]
    figure = "growth: " + ", ".join(f"{way} {factor:.3f}x" for way, factor in ratios.items())
    settings = {"seeds": list(seeds), "ratios": {axis: _ratios(found) for axis, found in costs.items()}}
    return Report("growth", [*tables, slopes], criteria, figure, settings)


def _table(axis: str, found: Mapping[int, Cost]) -> Table:
    title = f"{axis}: time of a step against plain, and MiB above it"
    table = Table(axis, "plain, ms", "MiB", *[*WAYS][1:], title=title)
    for size, cost in found.items():
        plain = (1000 * seconds_per_step(cost.seconds[PLAIN]), cost.memory[PLAIN])
        ways = (f"{cost.ratio(way):.3f}  {cost.extra_memory(way):+.0f}" for way in [*WAYS][1:])
        table.add_row(f"{size:,}", f"{plain[0]:.1f}", f"{plain[1]:.0f}", *ways)
    return table


def _plain(found: Mapping[int, Cost]) -> list[float]:
    return [seconds_per_step(cost.seconds[PLAIN]) for cost in found.values()]


def _ratios(found: Mapping[int, Cost]) -> dict[str, dict[str, float]]:
    return {str(size): {way: cost.ratio(way) for way in [*WAYS][1:]} for size, cost in found.items()}


def _median(costs: Costs, way: str) -> float:
    return statistics.median(cost.ratio(way) for found in costs.values() for cost in found.values())


def main(arguments_given: Sequence[str] | None = None) -> int:
    parser = argument_parser("growth", "How the cost of watching grows.", seeds=3)
    options = parser.parse_args(arguments_given)
    seeds, steps = fresh_seeds(options), 20 if options.quick else 30
    configure_process()
    with redirect_stdout(io.StringIO()):  # the reports' own words would bury the tables
        for way in WAYS:  # imports and the first allocations
            fit(Point(samples=512), seeds[0], 2 * UNTIMED_STEPS, way, StepTimer())
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
