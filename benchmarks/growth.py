"""How the cost of watching grows: with the batch, the sequence, the width, the depth and the data set.

One GPT is stretched along one axis at a time. Each fit is a process of its own, forked from one that has warmed up, so
that time and memory are those of that fit. Time is processor time per training step, validations and the detector's
evaluations within; memory is what was resident at most above what was before the fit.
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
from typing import Any

import torch
from lightning.pytorch import seed_everything
from rich.table import Table
from torch.utils.data import Dataset

from benchmarks.memory import MEBIBYTE, forget_peak, resident, told_by_fork
from benchmarks.overhead import SETTLING, Clock, ratio_of_blocks, run
from benchmarks.reporting import Criterion, Report, arguments, fresh_seeds, settle_down
from benchmarks.twin_runs import Sequences, TextModel
from benchmarks.workloads import VOCABULARY, Workload
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
PLAIN = "plain"
WAYS: Mapping[str, Mapping[str, Any]] = {
    PLAIN: {},
    "default set": {},
    "and units, every 8th step": {"localize": True, "norms": False},
    "and norms, every 8th step": {"localize": True},
    "units and norms, every step": {"localize": True, "every": 1},
}


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
    """By way, of each fit: ``seconds`` a step and ``memory`` in MiB."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    memory: dict[str, list[float]] = field(default_factory=dict)

    def ratio(self, way: str) -> float:
        """Median over blocks, each of which runs there and back."""
        return ratio_of_blocks(self.seconds[way], self.seconds[PLAIN])

    def added(self, way: str) -> float:
        """Seconds a step above plain."""
        return (self.ratio(way) - 1) * statistics.median(self.seconds[PLAIN])

    def extra_memory(self, way: str) -> float:
        """MiB above plain."""
        return statistics.median(self.memory[way]) - statistics.median(self.memory[PLAIN])


def measure(point: Point, seeds: Sequence[int], steps: int) -> Cost:
    """A block a seed: all ways in a row, then in reverse."""
    cost = Cost()
    for seed in seeds:
        for way in (*WAYS, *reversed(WAYS)):
            seconds, memory = in_a_fork(partial(timed, point, seed, steps, way))
            cost.seconds.setdefault(way, []).append(seconds)
            cost.memory.setdefault(way, []).append(memory)
    return cost


def timed(point: Point, seed: int, steps: int, way: str) -> tuple[float, float]:
    """Seconds a step, and MiB at most above what was resident before."""
    before = resident()
    forget_peak()
    seed_everything(seed, verbose=False)
    workload, clock = point.workload(steps), Clock()
    watching = [] if way == PLAIN else memsink(path=None, identity="index", **WAYS[way])
    run(workload.module(), workload, seed, [clock, *watching], samples=point.samples)
    return clock.seconds, (resident("VmHWM") - before) / MEBIBYTE


def in_a_fork(work: partial[tuple[float, float]]) -> tuple[float, float]:
    """What ``work`` returns in a copy of this process.

    Raises:
        RuntimeError: it did not end well.
    """
    told = told_by_fork(work)
    if told is None:
        raise RuntimeError(f"A fit failed: {work.args}. Run benchmarks.growth.timed on it to see why.")
    seconds, memory = told
    return seconds, memory


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
    ratios = {way: _typical(costs, way) for way in [*WAYS][1:]}
    criteria = [
        Criterion("default set, time per step against plain, median of points", ratios["default set"], "<=", RATIO)
    ]
    figure = "growth: " + ", ".join(f"{way} {ratio:.3f}x" for way, ratio in ratios.items())
    settings = {"seeds": list(seeds), "ratios": {axis: _ratios(found) for axis, found in costs.items()}}
    return Report("growth", [*tables, slopes], criteria, figure, settings)


def _table(axis: str, found: Mapping[int, Cost]) -> Table:
    title = f"{axis}: time of a step against plain, and MiB above it"
    table = Table(axis, "plain, ms", "MiB", *[*WAYS][1:], title=title)
    for size, cost in found.items():
        plain = (1000 * statistics.median(cost.seconds[PLAIN]), statistics.median(cost.memory[PLAIN]))
        ways = (f"{cost.ratio(way):.3f}  {cost.extra_memory(way):+.0f}" for way in [*WAYS][1:])
        table.add_row(f"{size:,}", f"{plain[0]:.1f}", f"{plain[1]:.0f}", *ways)
    return table


def _plain(found: Mapping[int, Cost]) -> list[float]:
    return [statistics.median(cost.seconds[PLAIN]) for cost in found.values()]


def _ratios(found: Mapping[int, Cost]) -> dict[str, dict[str, float]]:
    return {str(size): {way: cost.ratio(way) for way in [*WAYS][1:]} for size, cost in found.items()}


def _typical(costs: Costs, way: str) -> float:
    return statistics.median(cost.ratio(way) for found in costs.values() for cost in found.values())


def main(arguments_given: Sequence[str] | None = None) -> int:
    parser = arguments("growth", "How the cost of watching grows.", seeds=1)
    options = parser.parse_args(arguments_given)
    seeds, steps = fresh_seeds(options), 20 if options.quick else 40
    settle_down()
    with redirect_stdout(io.StringIO()):  # the reports' own words would bury the tables
        for way in WAYS:  # imports and the first allocations
            timed(Point(samples=512), seeds[0], 2 * SETTLING, way)
    costs: dict[str, dict[int, Cost]] = {}
    measured: dict[Point, Cost] = {}
    for axis, sizes in AXES.items():
        for size in sizes[:: 2 if options.quick else 1]:
            point = replace(Point(), **{axis: size})
            if point not in measured:  # the axes cross
                measured[point] = measure(point, seeds, steps)
            costs.setdefault(axis, {})[size] = measured[point]
    return report(costs, seeds).tell(options.json)


if __name__ == "__main__":
    sys.exit(main())
