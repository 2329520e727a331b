"""The cost of watching: the same fit with and without it, in alternating steps; and whether it changes any weight.

Time is processor time of a training step, the first ones left out: validations, the detector's evaluations and logging
lie within, imports, set-up and reports lie without. All fits validate alike. Memory is had from the start and
kept when freed: what a fit needs of it is not in these times, but in `benchmarks.growth`. Second looks are off in these
fits, which validate every 25 to 50 steps; what one costs stands beside.
"""

from __future__ import annotations

import io
import statistics
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import partial

from rich.table import Table

from benchmarks.common.criteria import Criterion, Report, argument_parser, configure_process, fresh_seeds
from benchmarks.common.interleaving import StepTimer, interleave, seconds_per_step, time_ratio
from benchmarks.common.memory import RESERVE, keep_freed_memory
from benchmarks.common.workloads import WORKLOADS, Workload
from benchmarks.overhead.runs import AGAIN, PLAIN, WATCHED, fit
from benchmarks.overhead.second_look import LookCost, look_cost, look_table

RATIO = 1.03
LOOK = 1.5
"""Of a look, in validation passes over as many samples: a forward costs the same, what is more is fetching them."""


@dataclass(frozen=True)
class Comparison:
    """One workload: by way, seconds of each step of each fit; and the largest change of a weight."""

    name: str
    seconds: Mapping[str, Sequence[Sequence[float]]]
    change: float

    @property
    def ratio(self) -> float:
        """Of a watched step to a plain one."""
        return time_ratio(self.seconds[WATCHED], self.seconds[PLAIN], self.seconds[AGAIN])

    @property
    def noise(self) -> float:
        """What a ratio can be off by: that of a plain fit to another."""
        return time_ratio(self.seconds[AGAIN], self.seconds[PLAIN])


def compare(workload: Workload, seeds: Sequence[int]) -> Comparison:
    """Two fits alone, for their weights, and to have imported all; then, for each seed, three in turns."""
    ways = {PLAIN: False, AGAIN: False, WATCHED: True}
    with redirect_stdout(io.StringIO()):  # the report's own words would bury the table
        weights = [fit(workload, seeds[0], watch, StepTimer()) for watch in (False, True)]
        fits = [{name: partial(fit, workload, seed, watch) for name, watch in ways.items()} for seed in seeds]
        blocks = [interleave(block, seed) for block, seed in zip(fits, seeds, strict=True)]
    change = max(float((before - after).abs().max()) for before, after in zip(*weights, strict=True))
    return Comparison(workload.name, {name: [block[name] for block in blocks] for name in ways}, change)


def report(compared: Sequence[Comparison], looks: Sequence[LookCost], seeds: Sequence[int]) -> Report:
    table = Table("workload", "plain ms/step", "watched ms/step", "ratio", "plain against plain", "largest change")
    for each in compared:
        milliseconds = (f"{1000 * seconds_per_step(each.seconds[way]):.2f}" for way in (PLAIN, WATCHED))
        table.add_row(each.name, *milliseconds, f"{each.ratio:.3f}", f"{each.noise:.3f}", f"{each.change:g}")
    typically = statistics.median(each.ratio for each in compared)
    return Report(
        name="overhead",
        tables=[table, look_table(looks)],
        criteria=[
            Criterion("time per step against plain, median of workloads", typically, "<=", RATIO),
            Criterion("largest change of any weight", max(each.change for each in compared), "<=", 0),
            Criterion(
                "a second look in validation passes, median",
                statistics.median(each.ratio for each in looks),
                "<=",
                LOOK,
            ),
        ],
        figure=f"overhead: {typically:.3f}x plain, {len(seeds)} seeds for each of {len(compared)} workloads",
        settings={
            "seeds": list(seeds),
            "ratios": {each.name: each.ratio for each in compared},
            "looks": {each.name: each.ratio for each in looks},
        },
    )


def main(arguments_given: Sequence[str] | None = None) -> int:
    parser = argument_parser("overhead", "Cost of watching, and whether it changes training.", seeds=3)
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--tracking", action="store_true", help="memsink() and W&B offline against none")
    mode.add_argument("--attribution", action="store_true", help="units and gradient norms against none, and peers")
    mode.add_argument("--mitigation", action="store_true", help="each mitigation against none")
    options = parser.parse_args(arguments_given)
    if options.attribution:
        from benchmarks.overhead import attribution as attribution_cost

        return attribution_cost.run(options)
    if options.mitigation:
        from benchmarks.overhead import mitigation as mitigation_cost

        return mitigation_cost.measure_all(options)
    seeds = fresh_seeds(options)
    configure_process()
    keep_freed_memory(RESERVE)
    workloads = [replace(each, steps=each.steps // 5) for each in WORKLOADS] if options.quick else WORKLOADS
    looks = [look_cost(each, *((64,) if options.quick else ())) for each in workloads]
    return report([compare(each, seeds) for each in workloads], looks, seeds).publish(options.json)


if __name__ == "__main__":
    sys.exit(main())
