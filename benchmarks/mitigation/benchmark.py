"""How much memorization mitigations prevent and what they cost, on real text, compared with other methods.

E1: sequences repeated in a domain that other text covers, too. E2: repeated source code that no other text covers.
E3: fine-tuning on texts and on phone numbers of made-up people. E4: an ordinary training over epochs. Every arm of an
experiment sees the same text in the same order from the same initial weights, in E3 from those of one pretrained model.
Our arms use our own detector and controls.
"""

from __future__ import annotations

import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from benchmarks.common.criteria import Criterion, Report, argument_parser, configure_process, fresh_seeds
from benchmarks.common.planted_text import Sizes
from benchmarks.mitigation import fine_tuning, ordinary
from benchmarks.mitigation.arms import (
    EVERY_SEED,
    EXTRA,
    GUIDED,
    HOLD,
    HOLD_AUTO,
    HOLD_HIGH,
    MEMSINKS,
    ONCE,
    SKIP,
    STANDARD,
    UNTIED,
)
from benchmarks.mitigation.figure import draw
from benchmarks.mitigation.fine_tuning import Tuned, pretrain, tune
from benchmarks.mitigation.ordinary import Ordinary, train_ordinarily
from benchmarks.mitigation.runs import Result, run
from benchmarks.mitigation.tables import fine_tuning_table, ordinary_table, table

WORKERS = 2
EXPERIMENTS = ("E1", "E2", "E3", "E4")
Extent = Literal["few", "usual", "all"]
QUICK = Sizes(background=640, natural=4, twice=12, domain=32, canaries=4, easy=4, controls=96, twins=32, unseen=128)
QUICK_TUNING = fine_tuning.Sizes(pretrained=1024, texts=128, control_texts=64, unseen=128)
QUICK_ORDINARY = ordinary.Sizes(texts=256, controls=64, unseen=128, epochs=3, every=8)
QUICK_ARMS = (STANDARD, MEMSINKS, UNTIED, SKIP, HOLD, HOLD_AUTO, HOLD_HIGH, "deduplicated (oracle)")
NAN = float("nan")
Each = TypeVar("Each")


@dataclass
class Measurements:
    """All measurements, by experiment, arm and seed."""

    results: dict[tuple[str, str, int], Result] = field(default_factory=dict)
    tuned: dict[tuple[str, int], Tuned] = field(default_factory=dict)
    ordinary: dict[tuple[str, int], Ordinary] = field(default_factory=dict)

    def of(self, experiment: str, arm: str) -> list[Result]:
        return [each for (where, name, _), each in self.results.items() if (where, name) == (experiment, arm)]

    def worst(self, experiment: str, arm: str, measure: Callable[[Result, Result], float], sense: str) -> float:
        """The worst value of all seeds; NaN where one is missing. ``measure`` takes the results of the arm and of the
        standard run of one seed."""
        values = [
            measure(each, self.results[experiment, STANDARD, each.seed])
            for each in self.of(experiment, arm)
            if (experiment, STANDARD, each.seed) in self.results
        ]
        return _worst(values, sense)


def _worst_of(
    found: Mapping[tuple[str, int], Each], arm: str, measure: Callable[[Each, Each], float], sense: str
) -> float:
    """As `Measurements.worst`, of one experiment's results by arm and seed."""
    values = [
        measure(each, found[STANDARD, seed])
        for (name, seed), each in found.items()
        if name == arm and (STANDARD, seed) in found
    ]
    return _worst(values, sense)


def _worst(values: Sequence[float], sense: str) -> float:
    if not values or any(value != value for value in values):
        return NAN
    return max(values) if sense == "<=" else min(values)


def criteria(found: Measurements) -> list[Criterion]:
    """All criteria, each evaluated on the worst seed."""
    runs: list[tuple[str, str, str, Callable[[Result, Result], float], Any, float]] = [
        ("canaries said", "E1", STANDARD, lambda own, _: own.kinds["canary"].exact, ">=", 0.9),
        ("canaries said", "E1", MEMSINKS, lambda own, _: own.kinds["canary"].exact, "<=", 0.05),
        ("validation against standard, nats", "E1", MEMSINKS, _extra_loss, "<=", 0.0),
        ("gap closed, natural", "E1", MEMSINKS, lambda own, std: own.closed(std, "natural"), ">=", 0.65),
        ("gap closed, canaries", "E1", MEMSINKS, lambda own, std: own.closed(std, "canary"), ">=", 0.45),
        ("gap closed, natural", "E1", SKIP, lambda own, std: own.closed(std, "natural"), ">=", 0.8),
        ("validation against standard, nats", "E1", SKIP, _extra_loss, "<=", 0.0),
        ("false flags among all that is not memorized", "E1", SKIP, lambda own, _: own.false_flags, "<=", 0.03),
        ("validation against standard, nats", "E2", HOLD, _extra_loss, "<=", 0.0),
        ("unseen text of the domain against standard, nats", "E2", HOLD,
         _extra_loss_of_domain, "<=", 0.0),
        ("gap of the domain cut by", "E2", HOLD, lambda own, std: 1 - own.gap / std.gap, ">=", 0.55),
        ("canaries said", "E2", HOLD, lambda own, _: own.kinds["canary"].exact, "<=", 0.0),
        ("canaries said", "E1", HOLD_AUTO, lambda own, _: own.kinds["canary"].exact, "<=", 0.0),
        ("validation against standard, nats", "E1", HOLD_AUTO, _extra_loss, "<=", 0.01),
        ("canaries said", "E2", HOLD_AUTO, lambda own, _: own.kinds["canary"].exact, "<=", 0.0),
        ("validation against standard, nats", "E2", HOLD_AUTO, _extra_loss, "<=", 0.01),
        ("unseen text of the domain against standard, nats", "E2", HOLD_AUTO,
         _extra_loss_of_domain, "<=", 0.0),
    ]  # fmt: skip
    tuned: list[tuple[str, str, Callable[[Tuned, Tuned], float], Any, float]] = [
        ("numbers said at the end", STANDARD, lambda own, _: own.last.total / own.sentences, ">=", 0.6),
        ("numbers said at any epoch", HOLD_HIGH, lambda own, _: max(each.total for each in own.epochs), "<=", 0),
        ("held-out at the end against the best of standard, nats", HOLD_HIGH,
         lambda own, std: own.last.held_out - std.best.held_out, "<=", 0.25),
        ("held-out at its best against the best of standard, nats", HOLD_HIGH,
         lambda own, std: own.best.held_out - std.best.held_out, "<=", 0.03),
        ("numbers said at any epoch", HOLD_AUTO, lambda own, _: max(each.total for each in own.epochs), "<=", 0),
        ("held-out at its best against the best of standard, nats", HOLD_AUTO,
         lambda own, std: own.best.held_out - std.best.held_out, "<=", 0.01),
        ("held-out at the end against the end of standard, nats", HOLD_AUTO,
         lambda own, std: own.last.held_out - std.last.held_out, "<=", -0.02),
    ]  # fmt: skip
    usual: list[tuple[str, Callable[[Ordinary, Ordinary], float], Any, float]] = [
        ("held-out at its best against the best of standard, nats", lambda own, std: own.best - std.best, "<=", 0.01),
        ("held-out at the end against the end of standard, nats", lambda own, std: own.last - std.last, "<=", -0.02),
    ]
    said = [
        Criterion(f"{where}, {arm}: {name}", found.worst(where, arm, measure, sense), sense, bound)
        for name, where, arm, measure, sense, bound in runs
    ]
    ratios = [
        each.kinds["natural"].shown / untied.kinds["natural"].shown
        for each in found.of("E1", MEMSINKS)
        for untied in found.of("E1", UNTIED)
        if each.seed == untied.seed
    ]
    said.append(Criterion("E1, MemSinks: loss on repeated text, tied by untied", _worst(ratios, ">="), ">=", 3.0))
    said += [
        Criterion(f"E3, {arm}: {name}", _worst_of(found.tuned, arm, measure, sense), sense, bound)
        for name, arm, measure, sense, bound in tuned
    ]
    said += [
        Criterion(f"E4, {HOLD_AUTO}: {name}", _worst_of(found.ordinary, HOLD_AUTO, measure, sense), sense, bound)
        for name, measure, sense, bound in usual
    ]
    return said


def _extra_loss_of_domain(own: Result, standard: Result) -> float:
    return own.kinds["domain"].unseen - standard.kinds["domain"].unseen


def _extra_loss(own: Result, standard: Result) -> float:
    return own.validation - standard.validation


def arms_of(experiment: str, first: bool, quick: bool, extent: Extent = "usual") -> list[str]:
    """The arms to run on a seed. Only the first seed has the rivals and the sweep, unless ``extent`` is few; with
    ``quick``, only the first has E3 and E4."""
    if quick and experiment in ("E3", "E4") and not first:
        return []
    names = ONCE[experiment] if first and extent != "few" else EVERY_SEED[experiment]
    names = (*names, *EXTRA[experiment]) if first and extent == "all" else names
    return [name for name in names if name in QUICK_ARMS] if quick else list(names)


def run_experiments(
    seeds: Sequence[int],
    quick: bool,
    model: Path | None,
    only: Sequence[str] = EXPERIMENTS,
    extent: Extent = "usual",
) -> Measurements:
    """Runs all arms in two processes of one thread each: first those that others depend on, then the longest.

    Args:
        only: the experiments to run.
        extent: which arms to run.
    """
    sizes, tuning = (QUICK, QUICK_TUNING) if quick else (Sizes(), fine_tuning.Sizes())
    plain = QUICK_ORDINARY if quick else ordinary.Sizes()
    todo = [
        (where, name, seed)
        for where in ("E2", "E1")
        if where in only
        for seed in seeds
        for name in arms_of(where, seed == seeds[0], quick, extent)
    ]
    guides = [job for job in todo if job == ("E2", HOLD, seeds[0])]
    context = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(WORKERS, mp_context=context, initializer=configure_process) as pool,
    ):
        pretrained = model or Path(folder)
        pretraining = [(pretrain, pretrained, seeds[0], tuning)] if model is None and "E3" in only else []
        first = _done(pool, [*pretraining, *((run, *job, sizes) for job in guides)])
        guide = next((each for each in first if each is not None), None)
        like = guide and {kind: guide.kinds[kind].trained for kind in (guide.repeated, "canary")}
        tuning_jobs = [
            (tune, pretrained, name, seed, tuning)
            for seed in seeds
            if "E3" in only
            for name in arms_of("E3", seed == seeds[0], quick, extent)
        ]
        jobs = [
            (run, *job, sizes, *([like] if job[1] in GUIDED else []))
            for job in todo
            if job not in guides and (like or job[1] not in GUIDED)
        ]
        ordinary_jobs = [
            (train_ordinarily, name, seed, plain)
            for seed in seeds
            if "E4" in only
            for name in arms_of("E4", seed == seeds[0], quick, extent)
        ]
        ended = [*first, *_done(pool, [*ordinary_jobs, *tuning_jobs, *jobs])]
    results = {(each.experiment, each.arm, each.seed): each for each in ended if isinstance(each, Result)}
    tuned = [each for each in ended if isinstance(each, Tuned)]
    usual = {(each.arm, each.seed): each for each in ended if isinstance(each, Ordinary)}
    return Measurements(results, {(each.arm, each.seed): each for each in tuned}, usual)


def _done(pool: ProcessPoolExecutor, jobs: Sequence[tuple[Any, ...]]) -> list[Any]:
    """The results of each function called with its arguments. A job that fails is printed and left out, so that the
    results of the others are not lost."""
    start = time.perf_counter()
    futures = {pool.submit(*job): job for job in jobs}
    results = []
    for future in as_completed(futures):
        function, *arguments = futures[future]
        error = future.exception()
        words = [function.__name__, *(str(each) for each in arguments if isinstance(each, (str, int)))]
        end = f"after {time.perf_counter() - start:.0f} s" if error is None else f"failed: {error!r}"
        print(*words, end, file=sys.stderr, flush=True)
        if error is None:
            results.append(future.result())
    return results


def report(found: Measurements, seeds: Sequence[int], seconds: float, only: Sequence[str] = EXPERIMENTS) -> Report:
    tables = [table(found.results, where) for where in ("E1", "E2") if where in only]
    tables += [fine_tuning_table(found.tuned)] if "E3" in only else []
    tables += [ordinary_table(found.ordinary)] if "E4" in only else []
    said = [each for each in criteria(found) if each.name[:2] in only]
    holding = [each for each in found.of("E2", HOLD) if ("E2", STANDARD, each.seed) in found.results]
    cheaper = [each.validation - found.results["E2", STANDARD, each.seed].validation for each in holding]
    held = f"{HOLD} in E2: validation {sum(cheaper) / len(cheaper):+.3f} nats against standard, " if cheaper else ""
    holds = sum(each.holds for each in said)
    figure = f"mitigation: {held}{holds} of {len(said)} criteria hold; {len(seeds)} seeds, {seconds:.0f} s"
    measured = {"/".join(map(str, key)): each.plain() for key, each in found.results.items()}
    measured |= {f"E3/{arm}/{seed}": each.plain() for (arm, seed), each in found.tuned.items()}
    measured |= {f"E4/{arm}/{seed}": each.plain() for (arm, seed), each in found.ordinary.items()}
    settings = {"seeds": list(seeds), "measured": measured}
    return Report("mitigation", tables, said, figure, settings)


def main(arguments_given: Sequence[str] | None = None) -> int:
    parser = argument_parser("mitigation", "Memorization left under mitigations and rivals, and their cost.", seeds=3)
    parser.add_argument("--model", type=Path, metavar="DIR", help="a transformers folder to fine-tune")
    parser.add_argument(
        "--figure",
        type=Path,
        default=Path("runs/mitigation.png"),
        metavar="FILE",
        help="where memorization left is drawn against validation loss",
    )
    parser.add_argument("--only", nargs="+", choices=EXPERIMENTS, default=EXPERIMENTS, help="these experiments")
    parser.add_argument(
        "--arms", choices=get_args(Extent), default="usual", help="few: those that a criterion is about"
    )
    options = parser.parse_args(arguments_given)
    seeds, start = fresh_seeds(options), time.perf_counter()
    configure_process()
    found = run_experiments(seeds, options.quick, options.model, options.only, options.arms)
    code = report(found, seeds, time.perf_counter() - start, options.only).publish(options.json)
    if found.results:
        draw(found.results, options.figure)
        print(f"figure: {options.figure}")
    return code


if __name__ == "__main__":
    sys.exit(main())
