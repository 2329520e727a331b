"""Correctness, waits, time and memory on an accelerator; on a machine without one, everything small on the CPU.

Prints each number as soon as it is known, since time on a borrowed device ends.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from time import perf_counter
from typing import Any, TypeVar

import torch
from rich.table import Table

from benchmarks.common.criteria import Criterion, Report, argument_parser, configure_process
from benchmarks.device import cost, waits
from benchmarks.device.correctness import checks
from benchmarks.device.fits import PLAIN, WAYS, Settings, release

PARTS = ("correct", "waits", "cost")
TIME, MEMORY, MEMORY_OF_NORMS = 1.02, 1.02, 1.15
Result = TypeVar("Result")


class Run:
    """One run of the benchmark; what fails is said and left out."""

    def __init__(self, settings: Settings, budget: float) -> None:
        self.settings, self.budget = settings, budget
        self.start = perf_counter()
        self.failed: list[str] = []

    def say(self, text: str) -> None:
        print(f"[{perf_counter() - self.start:4.0f} s] {text}", flush=True)

    def attempt(self, name: str, work: Callable[[], Result]) -> Result | None:
        """None if it raised or if the time is over."""
        if perf_counter() - self.start > self.budget:
            self.say(f"{name}: left out, time is over")
            self.failed.append(f"{name}: left out")
            return None
        try:
            return work()
        except Exception as error:
            traceback.print_exc(limit=-8)
            self.failed.append(f"{name}: {type(error).__name__}")
            return None
        finally:
            release()

    def correct(self) -> list[Criterion]:
        found = []
        for name, work in checks(self.settings):
            for criterion in self.attempt(name, work) or [Criterion(f"{name}: failed", float("nan"), "<=", 0)]:
                self.say(str(criterion))
                found.append(criterion)
        return found

    def waits(self) -> tuple[Table, list[Criterion]]:
        table = Table("callbacks", *waits.PHASES, title="Waits for the device: ours, for each time")
        criteria = []
        for way in WAYS:
            counted = self.attempt(f"waits, {way}", partial(waits.count, self.settings, way))
            if counted is None:
                continue
            each, lines = counted
            table.add_row(way, *(f"{each[phase]:.3g}" for phase in waits.PHASES))
            self.say(f"waits, {way}: " + ", ".join(f"{phase} {each[phase]:.3g}" for phase in waits.PHASES))
            for line, times in lines[:16]:
                print(f"            {times:6.2f}  {line}")
            criteria.append(Criterion(f"waits a step, {way}", each["step"], "<=", 0))
        return table, criteria

    def costs(self) -> tuple[list[Table], list[Criterion], dict[str, Any]]:
        tables, criteria, numbers = [], [], {}
        for shape, compiled, ways in cost.shapes(self.settings):
            name = f"{shape.name}{', compiled' * compiled}"
            rows: dict[str, dict[str, float]] = {}
            for way in ways:
                timing = self.attempt(f"{name}, {way}", partial(cost.measure, self.settings, shape, compiled, way))
                if timing is not None:
                    rows[way] = timing
                    self.say(f"{name}, {way}: " + ", ".join(f"{key} {value:.2f}" for key, value in timing.items()))
            if PLAIN in rows:
                tables.append(_costs(name, rows))
                criteria += _bounds(name, rows) if self.settings.cuda else []
            numbers[name] = rows
        return tables, criteria, numbers


def _costs(name: str, rows: dict[str, dict[str, float]]) -> Table:
    table = Table(
        "callbacks", "ms/step, all", "ratio", "ms/step, median", "ratio", "longest", "peak GiB", "ratio", "left GiB",
        title=name,
    )  # fmt: skip
    for way, row in rows.items():
        table.add_row(
            way,
            f"{row['mean']:.1f}",
            f"{cost.ratio(rows, way, 'mean'):.3f}",
            f"{row['median']:.1f}",
            f"{cost.ratio(rows, way, 'median'):.3f}",
            f"{row['longest']:.0f}",
            f"{row['peak']:.2f}",
            f"{cost.ratio(rows, way, 'peak'):.3f}" if row["peak"] else "",
            f"{row['left']:.3f}",
        )
    return table


def _bounds(name: str, rows: dict[str, dict[str, float]]) -> list[Criterion]:
    return [
        criterion
        for way in rows
        if way not in (PLAIN, "plain again")
        for criterion in (
            Criterion(f"median step against plain, {name}, {way}", cost.ratio(rows, way, "median"), "<=", TIME),
            Criterion(
                f"peak memory against plain, {name}, {way}",
                cost.ratio(rows, way, "peak"),
                "<=",
                MEMORY_OF_NORMS if "norms" in way else MEMORY,
            ),
        )
    ]


def _settings(options: argparse.Namespace) -> Settings:
    cuda = options.device == "cuda"
    if not cuda:
        print("No CUDA device: everything is small and runs on the CPU; its times say nothing about a GPU.")
    return Settings(options.device, options.quick or not cuda, 2 if cuda else 0)


def main(arguments_given: Sequence[str] | None = None) -> int:
    parser = argument_parser("device", "Correctness, waits, time and memory on an accelerator.", seeds=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--budget", type=float, default=540, help="seconds after which no further fit begins")
    options = parser.parse_args(arguments_given)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic matrix products
    os.environ.setdefault("WANDB_MODE", "disabled")
    configure_process()
    warnings.filterwarnings("ignore")
    run = Run(_settings(options), options.budget)
    card = torch.cuda.get_device_name() if run.settings.cuda else "CPU"
    run.say(f"{card}, torch {torch.__version__}")
    tables: list[Table] = []
    criteria: list[Criterion] = []
    numbers: dict[str, Any] = {}
    if "correct" in options.parts:
        criteria += run.correct()
    if "waits" in options.parts:
        table, found = run.waits()
        tables.append(table)
        criteria += found
    if "cost" in options.parts:
        costs, found, numbers = run.costs()
        tables += costs
        criteria += found
    criteria.append(Criterion("parts that failed or were left out", len(run.failed), "<=", 0))
    for each in run.failed:
        print(f"failed or left out: {each}")
    figure = f"device: {card}, {sum(each.holds for each in criteria)} of {len(criteria)} criteria hold"
    settings = {"card": card, "seeds": [0], "costs": numbers}
    return Report("device", tables, criteria, figure, settings).publish(options.json)


if __name__ == "__main__":
    sys.exit(main())
