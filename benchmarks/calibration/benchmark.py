"""Does the detector accuse where nothing is memorized, and how many of its verdicts are false where some is?

Held-out samples pretend to have been trained on, in many random splits of the losses that small fits record of them,
and of losses that are drawn from heavy-tailed and skewed distributions; and fits run with the callbacks. Where nothing
is memorized, a verdict of memorization at any time of a run may come in five of 100 runs. With one in twenty samples
planted, on average five of 100 verdicts may be false.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.calibration.runs import Found, Job, run, sources
from benchmarks.common.criteria import (
    Criterion,
    Report,
    argument_parser,
    configure_process,
    fresh_seeds,
    run_in_processes,
)

NOMINAL = 0.05
SPLITS, QUICK_SPLITS = 200, 20
QUICK = (
    "digits",
    "regression",
    "Student t3",
    "lognormal, low tail",
    "exponential, one look, 50 controls",
    "fit: regression",
)
"""Sources of the quick run: of those that need no corpus and have few looks."""
BEFORE = Path(__file__).with_name("before.json")
"""What was measured of an earlier commit, which it names."""


@dataclass(frozen=True)
class Rates:
    """What was found in one setting, as rates."""

    runs: int
    accused: float
    """Share of clean runs in which any sample was ever said to be memorized."""
    false_share: float | None = None
    """Mean share of false verdicts where some samples are planted; None where none are."""
    false_share_error: float | None = None
    """Its standard error."""
    power: float | None = None

    @property
    def bounds(self) -> tuple[float, float]:
        """Of ``accused`` and ``false_share``: nominal and two standard errors."""
        error = math.sqrt(NOMINAL * (1 - NOMINAL) / self.runs)
        return NOMINAL + 2 * error, NOMINAL + 2 * (self.false_share_error or 0.0)


def rates(found: Found) -> Rates:
    runs, accused = len(found.accused), _mean(found.accused)
    if not found.false_share:
        return Rates(runs, accused)
    mean = _mean(found.false_share)
    variance = sum((share - mean) ** 2 for share in found.false_share) / max(1, runs - 1)
    return Rates(runs, accused, mean, math.sqrt(variance / runs), _mean(found.power))


def main(arguments_given: Sequence[str] | None = None) -> int:
    parser = argument_parser("calibration", "False verdicts where nothing, or a known part, is memorized.", seeds=4)
    parser.add_argument("--splits", type=int, help=f"splits and fits a setting, default {SPLITS}")
    parser.add_argument("--only", nargs="+", choices=sources(), metavar="SOURCE", help="fits and settings to run")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write the table as Markdown")
    options = parser.parse_args(arguments_given)
    options.seeds = 1 if options.quick else options.seeds
    splits = options.splits or (QUICK_SPLITS if options.quick else SPLITS)
    chosen = options.only or (QUICK if options.quick else sources())
    seeds, start = fresh_seeds(options), time.perf_counter()
    configure_process()
    measured = measure(chosen, seeds, -(-splits // len(seeds)))
    made = report(measured, before(), seeds, time.perf_counter() - start)
    if options.page is not None:
        options.page.write_text(page(measured, before(), seeds))
    return made.publish(options.json)


def measure(names: Sequence[str], seeds: Sequence[int], splits: int) -> dict[str, Rates]:
    """Rates by setting, of some sources, with so many splits a seed."""
    jobs = [(Job(name, seed, splits),) for name in names for seed in seeds]
    found: dict[str, Found] = {}
    for each in (one for results in run_in_processes(run, jobs) for one in results):
        found[each.name] = found[each.name].joined(each) if each.name in found else each
    return {name: rates(each) for name, each in found.items()}


def before() -> dict[str, Any]:
    """The earlier ``commit``, its ``seeds`` and its ``rates`` by setting."""
    saved = json.loads(BEFORE.read_text())
    return {**saved, "rates": {name: Rates(**each) for name, each in saved["rates"].items()}}


def report(measured: Mapping[str, Rates], earlier: Mapping[str, Any], seeds: Sequence[int], seconds: float) -> Report:
    table = Table(title=f"before: commit {earlier['commit']}; after: this one", title_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "setting" else "right")
    for row in rows(measured, earlier["rates"]):
        if row[0] in measured:
            table.add_row(*row)
    worst = max(each.accused for each in measured.values())
    shares = [each.false_share for each in measured.values() if each.false_share is not None]
    return Report(
        name="calibration",
        tables=[table],
        criteria=criteria(measured),
        figure=f"calibration: a false verdict in {worst:.1%} of clean runs of the worst of {len(measured)} settings, "
        f"false-discovery rate up to {max(shares, default=math.nan):.1%}; {len(seeds)} seeds, {seconds:.0f} s",
        settings={"seeds": list(seeds), "rates": {name: asdict(each) for name, each in measured.items()}},
    )


def criteria(measured: Mapping[str, Rates]) -> list[Criterion]:
    made = []
    for name, each in measured.items():
        any_bound, share_bound = each.bounds
        made.append(Criterion(f"{name}: clean runs with a verdict", each.accused, "<=", any_bound))
        if each.false_share is not None:
            made.append(Criterion(f"{name}: false-discovery rate", each.false_share, "<=", share_bound))
    return made


COLUMNS = (
    *("setting", "runs before", "after", "accused before", "after"),
    *("false before", "after", "power before", "after"),
)


def rows(measured: Mapping[str, Rates], earlier: Mapping[str, Rates]) -> list[tuple[str, ...]]:
    """The table, a row a setting. What was not measured is left empty."""
    made = []
    for name in dict.fromkeys([*earlier, *measured]):
        cells = [name]
        for column in ("runs", "accused", "false_share", "power"):
            cells += [
                _shown(column, None if one is None else getattr(one, column))
                for one in (earlier.get(name), measured.get(name))
            ]
        made.append(tuple(cells))
    return made


def page(measured: Mapping[str, Rates], earlier: Mapping[str, Any], seeds: Sequence[int]) -> str:
    """The table as a page of Markdown."""
    lines = [
        "# How often a verdict is false",
        "",
        "Written by `python -m benchmarks.calibration --page docs/verdicts-calibration.md`. Held-out samples pretend "
        "to have been trained on. Nothing is memorized but what is planted: one sample in twenty, whose loss in the "
        "second half of the run is lower by 1.5 nats, or by three standard deviations where losses are drawn from a "
        "distribution; a squared error is divided by e^1.5. Rules and their numbers are the detector's defaults; "
        "settings of one look ask for no second that agrees.",
        "",
        "- accused: of 100 clean runs, those in which any sample was ever said to be memorized",
        "- false: of 100 verdicts of memorization at the end of a run with planted samples, those on others",
        "- power: of 100 planted samples, those said to be memorized at the end",
        "",
        "Bounds: 5, and two standard errors.",
        "",
        f"Before: commit {earlier['commit']}, seeds from {min(earlier['seeds'])}. After: "
        + (f"seeds from {min(seeds)}." if seeds else "not measured yet."),
        "",
        f"| {' | '.join(COLUMNS)} |",
        f"| --- |{' ---: |' * (len(COLUMNS) - 1)}",
    ]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows(measured, earlier["rates"])), ""])


def _shown(column: str, value: float | None) -> str:
    if value is None:
        return ""
    return str(value) if column == "runs" else f"{100 * value:.1f}"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
