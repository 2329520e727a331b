"""Tables and criteria of the settings whose samples come in three groups.

A draw of groups has three runs, of three seeds. Rates are pooled over these; of several draws the worst counts, unless
said otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain, pairwise
from math import sqrt
from typing import TypeAlias

import torch
from rich.table import Table
from torch import Tensor

from benchmarks.common.criteria import Criterion, mean_and_range
from benchmarks.detection import scores
from benchmarks.detection.group_runs import NEGATIVE, GroupFindings
from benchmarks.detection.settings import Setting
from lightning_memsink.detection.verdicts import Verdict

AUROC, FPR, FDR, EARLY, TWICE, TEMPLATES, CANARIES = 0.99, 0.03, 0.05, 0.98, 0.80, 0.05, 0.95
FEW = 20
"""Fewer cases than these support no bound on a rate of samples seen twice."""

Seed: TypeAlias = list[GroupFindings]
Found: TypeAlias = Mapping[Setting, Sequence[Seed]]


def criteria(found: Found) -> list[Criterion]:
    """Of every setting. Bounds on power are on planted samples, those on false flags on all."""
    return list(chain.from_iterable(_criteria_of(setting, seeds) for setting, seeds in found.items()))


def _criteria_of(setting: Setting, seeds: Sequence[Seed]) -> list[Criterion]:
    def worst(of: Callable[[Seed], float], is_bad: Callable[[Iterable[float]], float]) -> float:
        values = [of(seed) for seed in seeds]
        return math.nan if any(map(math.isnan, values)) else is_bad(values)

    runs = list(chain.from_iterable(seeds))
    discoveries = torch.cat([run.negative[run.flagged & (run.exposures > 0)] for run in runs])
    sampling = 2 * sqrt(FDR * (1 - FDR) / max(1, len(discoveries)))
    found = [
        Criterion("live FPR", worst(_fpr, max), "<=", FPR),
        Criterion("live FDR, bound with 2 s.e.", _share([discoveries], of_none=0), "<=", FDR + sampling),
        Criterion("flagged before first exact match", _share(_lead(run) for run in runs), ">=", EARLY),
    ]
    if setting.controls == "natural":  # most planted kinds have no controls: theirs is the question who is accused
        others = (run.flagged[run.of("template") & run.negative] for run in runs)
        found += [
            Criterion("template text not memorized, but flagged", _share(others), "<=", TEMPLATES),
            Criterion("canaries found", _tpr(runs, 1.0, lambda run: run.of("canary")), ">=", CANARIES),
        ]
    else:
        tpr = worst(lambda seed: _tpr(seed, setting.positive, lambda run: run.planted), min)
        found += [
            Criterion("live AUROC", worst(lambda seed: _auroc(seed, setting), min), ">=", AUROC),
            Criterion(f"live TPR above {setting.positive:g} nats", tpr, ">=", setting.tpr),
        ]
    if sum(int((run.seen_twice & (run.memorization > 1)).sum()) for run in runs) >= FEW:
        found.append(
            Criterion("seen twice, above 1 nat: TPR", _tpr(runs, 1.0, lambda run: run.seen_twice), ">=", TWICE)
        )
    return [Criterion(f"{setting.title}: {each.name}", each.value, each.sense, each.bound) for each in found]


def _share(cases: Iterable[Tensor], of_none: float = math.nan) -> float:
    """Share of True over all masks; ``of_none`` if there is no case."""
    together = torch.cat(list(cases)).float()
    return float(together.mean()) if len(together) else of_none


def _auroc(seed: Seed, setting: Setting, *, of_all: bool = False) -> float:
    """Memorized against not, by the detector's own gap; planted samples, or all that were trained on."""
    columns = [(run.gap, run.memorization, run.planted | ((run.exposures > 0) & of_all)) for run in seed]
    gap, truth, counts = (torch.cat(column) for column in zip(*columns, strict=True))
    return scores.auroc(gap, counts & (truth > setting.positive), counts & (truth < NEGATIVE))


def _tpr(runs: Iterable[GroupFindings], above: float, among: Callable[[GroupFindings], Tensor]) -> float:
    return _share(run.flagged[among(run) & (run.exposures > 0) & (run.memorization > above)] for run in runs)


def _fpr(runs: Iterable[GroupFindings]) -> float:
    return _share(run.flagged[run.negative] for run in runs)


def _lead(run: GroupFindings) -> Tensor:
    """Bool: of the samples ever extracted, those flagged at an earlier evaluation."""
    return (run.flag_step < run.exact_step)[run.extracted]


def tables(found: Found) -> list[Table]:
    return [_rate_table(found), _twice_table(found), *(_kind_table(setting, found[setting]) for setting in found)]


def _rate_table(found: Found) -> Table:
    head = ("setting", "AUROC planted", "AUROC all", "TPR planted", "TPR all", "FPR", "before extraction")
    table = Table(*head, title="Live verdicts by setting: mean [min, max] over seeds")
    for setting, seeds in found.items():
        table.add_row(setting.title, *_rates(setting, seeds))
    return table


def _rates(setting: Setting, seeds: Sequence[Seed]) -> list[str]:
    def over(of: Callable[[Seed], float]) -> str:
        return mean_and_range([of(seed) for seed in seeds])

    return [
        over(lambda seed: _auroc(seed, setting)),
        over(lambda seed: _auroc(seed, setting, of_all=True)),
        over(lambda seed: _tpr(seed, setting.positive, lambda run: run.planted)),
        over(lambda seed: _tpr(seed, setting.positive, lambda run: ~run.of("near"))),
        over(_fpr),
        f"{_share(_lead(run) for run in chain.from_iterable(seeds)):.3f}",
    ]


def _twice_table(found: Found) -> Table:
    """Samples that came twice, by strength: most were memorized at their last visit, and no training loss shows it."""
    edges = (-math.inf, NEGATIVE, 1.0, 2.0, math.inf)
    head = ("setting", *(f"{low:g} to {high:g} nats" for low, high in pairwise(edges)))
    table = Table(*head, title="Seen twice, near-duplicates left out: flagged (of)")
    for setting, seeds in found.items():
        runs = list(chain.from_iterable(seeds))
        cells = []
        for low, high in pairwise(edges):
            of = [run.flagged[run.seen_twice & (run.memorization >= low) & (run.memorization < high)] for run in runs]
            cells.append(f"{_share(of):.2f} ({sum(map(len, of))})")
        table.add_row(setting.title, *cells)
    return table


def _kind_table(setting: Setting, seeds: Sequence[Seed]) -> Table:
    """Memorization, gaps and flags by kind and repetitions, all runs together."""
    head = ("kind", "times", "samples", "memorization", "gap", "flagged", "false", "undecided", "extracted")
    table = Table(*head, title=f"By kind and times shown per epoch: {setting.title}")
    runs = list(chain.from_iterable(seeds))
    kind = list(chain.from_iterable(run.kind for run in runs))
    times = torch.cat([run.repeats for run in runs])
    visited = torch.cat([run.exposures > 0 for run in runs])
    rows = torch.stack(
        [
            torch.cat([run.memorization for run in runs]),
            torch.cat([run.gap for run in runs]),
            torch.cat([run.flagged for run in runs]).float(),
            torch.cat([torch.where(run.negative, run.flagged, torch.nan) for run in runs]),
            torch.cat([run.verdict >= Verdict.NO_LOSS for run in runs]).float(),
            torch.cat([run.exact_step.isfinite() for run in runs]).float(),
        ],
        1,
    )
    for name, often in dict.fromkeys(zip(kind, times.tolist(), strict=True)):
        of = torch.tensor([each == name for each in kind]) & (times == often) & visited
        table.add_row(name, str(often), str(int(of.sum())), *(f"{mean:.2f}" for mean in rows[of].nanmean(0)))
    return table
