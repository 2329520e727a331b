"""The time that each mitigation adds to a training step: whole fits, plain and with each, in alternating steps.

A mitigation runs with the callbacks that it needs and no others: their time is part of its cost. Time is processor
time of a whole step, with the hooks of all callbacks, clipping and AdamW; validations are included, and freed memory is
kept. Every mitigation has samples to act on, since one without costs nothing; a table shows the share it acted on.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import nan
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, seed_everything
from rich.table import Table
from torch import Tensor

from benchmarks.common.criteria import Criterion, Report, argument_parser, configure_process, fresh_seeds
from benchmarks.common.interleaving import UNTIMED_STEPS, StepTimer, interleave, seconds_per_step, time_ratio
from benchmarks.common.memory import RESERVE, keep_freed_memory
from benchmarks.common.workloads import WORKLOADS, Workload, images
from benchmarks.overhead.runs import AGAIN, PLAIN, run
from lightning_memsink.attribution.hidden_layers import find_hidden_layers
from lightning_memsink.callbacks.goldfish import Goldfish
from lightning_memsink.callbacks.loss_tracker import LossTracker
from lightning_memsink.callbacks.memorization_detector import MemorizationDetector
from lightning_memsink.callbacks.memsinks import MemSinks
from lightning_memsink.callbacks.sample_gradient_mask import SampleGradientMask
from lightning_memsink.callbacks.sink_dropout import SinkDropout
from lightning_memsink.callbacks.sink_gradient_mask import SinkGradientMask
from lightning_memsink.ledger import Ledger
from lightning_memsink.localization.sinks import Sinks

SAMPLES = 512
"""Few, so that each is visited often, since no mitigation acts on a first visit; and enough for epochs of 16 steps."""
SHORTER, CLIP, EVALUATIONS = 2 / 3, 1.0, 2
"""As many steps between two evaluations as in `benchmarks.overhead --tracking`."""
FRACTION = 0.01
"""Share of all units that are sinks, as SinkLocalizer finds."""
ACTED = 0.05
"""Smallest share of visits that a mitigation must act on, for its time to count."""


@dataclass(frozen=True)
class Way:
    """A mitigation, or none, and the bound on its time.

    ``make``: makes the callback for a module. ``watchers``: how many of LossTracker and MemorizationDetector, in this
    order, it reads from. ``bound``: on its time relative to the plain run. ``texts_only``: whether it needs tokens.
    """

    name: str
    make: Callable[[LightningModule], Callback] | None
    watchers: int
    bound: float | None = None
    texts_only: bool = False


def some_sinks(module: LightningModule) -> Sinks:
    """``FRACTION`` of all units at random, spread over all layers."""
    layers, generator = find_hidden_layers(module), torch.Generator().manual_seed(0)
    units = {
        layer.name: torch.randperm(layer.units, generator=generator)[: max(1, round(FRACTION * layer.units))]
        for layer in layers
    }
    scores = {name: torch.ones(len(chosen)) for name, chosen in units.items()}
    return Sinks(units, scores, {layer.name: layer.units for layer in layers}, "at random")


WAYS = (
    Way("MemSinks", lambda module: MemSinks(), 1, 1.05),
    Way("SampleGradientMask, hold", lambda module: SampleGradientMask("hold", at=0.0), 2, 1.03),
    Way("SinkGradientMask", lambda module: SinkGradientMask(sinks=some_sinks(module)), 0, 1.05),
    Way("SinkDropout", lambda module: SinkDropout(who="all", sinks=some_sinks(module)), 0),
    Way("Goldfish", lambda module: Goldfish(k=4), 0, texts_only=True),
)
WATCHED = "LossTracker and MemorizationDetector alone"
BASES = (Way(PLAIN, None, 0), Way(AGAIN, None, 0), Way(WATCHED, None, 2))


@dataclass
class Measured:
    """Measurements of one workload, by way: seconds of each step for each seed, and the share of visits acted on."""

    name: str
    seconds: dict[str, list[list[float]]] = field(default_factory=dict)
    acted: dict[str, float] = field(default_factory=dict)

    def ratio(self, way: str) -> float:
        """Time of ``way`` relative to plain; NaN if it does not apply. For the second plain run:
        relative to the first, a measure of the noise."""
        plain = [self.seconds[each] for each in (PLAIN, AGAIN) if each != way]
        return time_ratio(self.seconds[way], *plain) if way in self.seconds else nan


def measure(workload: Workload, seeds: Sequence[int], ways: Sequence[Way]) -> Measured:
    """Fits every way once for each seed, in alternating steps."""
    fitting = [*BASES, *(way for way in ways if not (way.texts_only and is_of_images(workload)))]
    found = Measured(workload.name)
    for way in fitting:  # imports and the first allocations
        fit(replace(workload, steps=2 * UNTIMED_STEPS), seeds[0], way, {}, StepTimer())
    for seed in seeds:
        fits = {way.name: partial(fit, workload, seed, way, found.acted) for way in fitting}
        for name, seconds in interleave(fits, seed).items():
            found.seconds.setdefault(name, []).append(seconds)
    return found


def fit(workload: Workload, seed: int, way: Way, acted: dict[str, float], turn: StepTimer) -> None:
    """Runs one fit, and sets in ``acted`` the share of visits that the way acted on, if it has a mitigation."""
    seed_everything(seed, verbose=False)
    module = workload.module()
    watching: list[Any] = [LossTracker(features=brightness if is_of_images(workload) else None), MemorizationDetector()]
    callbacks = [turn, *watching[: way.watchers]]
    if way.make is not None:
        callbacks.append(way.make(module))
    trainer = run(module, workload, seed, callbacks, samples=SAMPLES, evaluations=EVALUATIONS, gradient_clip_val=CLIP)
    for actions in Ledger.of(trainer).interventions.values():
        acted[way.name] = actions.total("acted") / max(1.0, actions.total("visits"))


def is_of_images(workload: Workload) -> bool:
    return workload.data is images


def brightness(batch: tuple[Tensor, Tensor]) -> Tensor:
    """``[B, 1]``: the feature that images are matched on."""
    return batch[0].flatten(1).mean(1, keepdim=True)


def report(found: Sequence[Measured], seeds: Sequence[int], ways: Sequence[Way]) -> Report:
    workloads = [each.name for each in found]
    times, acted = (Table("", *workloads, title=title) for title in TITLES)
    for name in (AGAIN, WATCHED, *(way.name for way in ways)):
        times.add_row(name, *(_cell(each.ratio(name)) for each in found))
    times.add_row("plain, ms a step", *(f"{1000 * seconds_per_step(each.seconds[PLAIN]):.2f}" for each in found))
    for way in ways:
        acted.add_row(way.name, *(_cell(each.acted.get(way.name, nan)) for each in found))
    usual = {way.name: _median([each.ratio(way.name) for each in found]) for way in ways}
    criteria = [
        Criterion(f"{way.name}, time per step against plain, median of workloads", usual[way.name], "<=", way.bound)
        for way in ways
        if way.bound is not None
    ]
    least = min(each.acted.get(way.name, 1.0) for each in found for way in ways)
    criteria.append(Criterion("share of visits acted on, least of all ways and workloads", least, ">=", ACTED))
    figure = "mitigation against plain: " + ", ".join(f"{name} {factor:.3f}x" for name, factor in usual.items())
    settings = {"seeds": list(seeds), "ratios": {each.name: _ratios(each, ways) for each in found}}
    return Report("mitigation_cost", [times, acted], criteria, figure, settings)


TITLES = ("time of a training step against a plain one, with the callbacks that it needs", "share of visits acted on")


def _cell(value: float) -> str:
    return "" if value != value else f"{value:.3f}"


def _ratios(measured: Measured, ways: Sequence[Way]) -> dict[str, float]:
    return {way.name: measured.ratio(way.name) for way in ways if way.name in measured.seconds}


def _median(ratios: Sequence[float]) -> float:
    return statistics.median(ratio for ratio in ratios if ratio == ratio)


def measure_all(options: argparse.Namespace) -> int:
    seeds = fresh_seeds(options)
    configure_process()
    keep_freed_memory(RESERVE)
    workloads = [replace(each, steps=round(each.steps * (0.2 if options.quick else SHORTER))) for each in WORKLOADS]
    return report([measure(each, seeds, WAYS) for each in workloads], seeds, WAYS).publish(options.json)


def main(arguments_given: Sequence[str] | None = None) -> int:
    parser = argument_parser("mitigation_cost", "Cost of each mitigation.", seeds=3)
    return measure_all(parser.parse_args(arguments_given))


if __name__ == "__main__":
    sys.exit(main())
