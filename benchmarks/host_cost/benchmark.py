"""Milliseconds of the host a step, at 10^4 and 10^5 tokens: on the thread that trains, beside it, and at the longest.

The device is one that sleeps, so that all processor time is the host's. Every text is new in the first epoch, and comes
again in the second. Losses of tokens are read by the host here, which on a GPU is the device's work.
"""

from __future__ import annotations

import io
import statistics
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass

from rich.table import Table

from benchmarks.common.criteria import Criterion, Report, argument_parser, configure_process, fresh_seeds
from benchmarks.host_cost.fits import Load, Times, fit

LOADS = {Load(8, 4096, 150): 1.0, Load(64, 2048, 150): 4.0}
"""Bounds on what the training thread does more than in a plain run, milliseconds a step."""
STALL, BACKGROUND, FLAT = 20.0, 0.5, 1.2
"""Milliseconds that the longest step may be longer; cores that work beside training; and what a step may cost in each
of several processes, in terms of one alone."""


@dataclass(frozen=True)
class Cost:
    """Of watching, against a plain run of the same seed; the median over seeds."""

    load: Load
    processes: int
    training_thread: float
    """Milliseconds a step, writes and evaluations included."""
    beside: float
    """Of the other threads."""
    stall: float
    """Milliseconds that the longest step without an evaluation is longer than the longest plain one."""
    evaluation: float
    """The same of the longest step with one."""

    @property
    def cores(self) -> float:
        """That work beside training, where the device takes as long as here."""
        return self.beside / (1000 * self.load.seconds)


def cost(load: Load, seeds: Sequence[int], processes: int = 1) -> Cost:
    """A plain and a watched fit of each seed, in turns."""
    found = []
    for seed in seeds:
        with redirect_stdout(io.StringIO()):
            plain, watched = (fit(load, seed, watch, processes)[0] for watch in (False, True))
        found.append(_differences(plain, watched))
    return Cost(load, processes, *(statistics.median(each) for each in zip(*found, strict=True)))


def _differences(plain: Times, watched: Times) -> tuple[float, float, float, float]:
    thread = statistics.fmean(watched.training_thread) - statistics.fmean(plain.training_thread)
    beside = statistics.fmean(watched.process) - statistics.fmean(plain.process) - thread
    evaluates = set(watched.evaluations)
    steps = [ms for n, ms in enumerate(watched.wall) if n not in evaluates]
    others = [ms for n, ms in enumerate(watched.wall) if n in evaluates]
    return thread, beside, max(steps) - max(plain.wall), max(others, default=float("nan")) - max(plain.wall)


def main(arguments_given: Sequence[str] | None = None) -> int:
    parser = argument_parser("host_cost", "What watching costs the host at high token rates.", seeds=3)
    parser.add_argument("--processes", type=int, default=4, help="of the run that is compared with one, default 4")
    options = parser.parse_args(arguments_given)
    seeds = fresh_seeds(options)
    configure_process()
    loads = {Load(4, 512, 40, 0.01): bound for bound in (1.0,)} if options.quick else LOADS
    alone = [cost(load, seeds) for load in loads]
    many = cost(next(iter(loads)), seeds[:1], options.processes)
    return report(alone, many, [*loads.values()], seeds).publish(options.json)


def report(alone: Sequence[Cost], many: Cost, bounds: Sequence[float], seeds: Sequence[int]) -> Report:
    table = Table("tokens a step", "processes", "training thread ms", "beside it ms", "stall ms", "evaluation ms")
    for each in (*alone, many):
        numbers = (each.training_thread, each.beside, each.stall, each.evaluation)
        table.add_row(str(each.load), str(each.processes), *(f"{number:.1f}" for number in numbers))
    criteria = []
    for each, bound in zip(alone, bounds, strict=True):
        criteria += [
            Criterion(f"{each.load}: ms a step of the training thread", each.training_thread, "<=", bound),
            Criterion(f"{each.load}: ms that the longest step is longer", each.stall, "<=", STALL),
            Criterion(f"{each.load}: cores that work beside training", each.cores, "<=", BACKGROUND),
        ]
    flat = many.training_thread / max(alone[0].training_thread, 1e-9)
    criteria.append(Criterion(f"a step in {many.processes} processes, in terms of one", flat, "<=", FLAT))
    worst = max(alone, key=lambda each: each.training_thread)
    return Report(
        name="host_cost",
        tables=[table],
        criteria=criteria,
        figure=f"host_cost: {worst.training_thread:.1f} ms a step at {worst.load} tokens, {len(seeds)} seeds",
        settings={"seeds": list(seeds)},
    )


if __name__ == "__main__":
    sys.exit(main())
