"""Does the detector find what was memorized? Against the truth of twin runs, beside other scores.

Truth: counterfactual memorization (Feldman & Zhang 2020; Zhang et al. 2023), the loss of a twin run that never saw
the sample less the loss of the run that did, corrected by held-out samples of the same kind; in nats per token.
"""

from __future__ import annotations

import pickle
import sys
import time
from collections.abc import Iterable, Sequence
from itertools import pairwise
from math import sqrt
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor

from benchmarks.common.criteria import (
    Criterion,
    Report,
    argument_parser,
    configure_process,
    fresh_seeds,
    mean_and_range,
    run_in_processes,
)
from benchmarks.common.training import Schedule
from benchmarks.detection import group_report
from benchmarks.detection.group_runs import GroupFindings, investigate_groups
from benchmarks.detection.groups import GROUPS, GroupSizes
from benchmarks.detection.population import Sizes
from benchmarks.detection.runs import FAMILIES, NEGATIVE, POSITIVE, Findings, investigate
from benchmarks.detection.settings import SETTINGS

AUROC, ADVANTAGE, TPR, FPR, FDR, EARLY, TWINS = 0.99, 0.05, 0.95, 0.03, 0.05, 0.98, 0.01
WITHOUT_CONTROLS = {"canary": FPR, "easy": FPR, "shuffled": FPR, "template": 0.05}
"""Bounds on the share of not memorized samples that are flagged without held-out controls of their kind. Template text
has the n-grams and the length of plain text: matching by statistics alone finds it the wrong controls."""
STANDARD = "standard"
QUICK_SETTINGS = (STANDARD, "llama", "unvalidated")
QUICK = Sizes(background=1500, held_out=240, repeats=(1, 8, 32), per_rung=6, easy=8, twins=32, once=16, noise=8)
QUICK_GROUPS = GroupSizes(
    background=600, held_out=200, repeats=(8, 32, 64), natural=4, canaries=3, easy=4, twins=32, once=24, noise=4,
    families=2, members=8,
)  # fmt: skip
SCHEDULE = Schedule()
LIVE = "knn gap, live"


def main(arguments_given: Sequence[str] | None = None) -> int:
    parser = argument_parser("detection", "AUROC, error rates and lead of the detector on real text.", seeds=3)
    parser.add_argument("--save", type=Path, metavar="DIR", help="keep what each standard seed measured")
    parser.add_argument(
        "--setting",
        nargs="+",
        choices=[STANDARD, *SETTINGS],
        metavar="NAME",
        help=f"which of {', '.join([STANDARD, *SETTINGS])}; default all, with --quick {', '.join(QUICK_SETTINGS)}",
    )
    options = parser.parse_args(arguments_given)
    chosen = options.setting or (QUICK_SETTINGS if options.quick else [STANDARD, *SETTINGS])
    seeds, start = fresh_seeds(options), time.perf_counter()
    configure_process()
    jobs = [
        (name, seed, options.quick, options.save)
        for name in chosen
        for seed in (seeds if name == STANDARD else seeds[: -(-len(seeds) // GROUPS)])  # of groups, three runs a seed
    ]
    results = [pickle.loads(each) for each in run_in_processes(investigate_setting, jobs)]
    found = {name: [result for job, result in zip(jobs, results, strict=True) if job[0] == name] for name in chosen}
    return report(found, seeds, time.perf_counter() - start).publish(options.json)


def investigate_setting(name: str, seed: int, quick: bool, save: Path | None) -> bytes:
    """The pickled findings of one setting and seed: tensors that pass between processes unpickled stay shared."""
    if name == STANDARD:
        return pickle.dumps(investigate(QUICK if quick else Sizes(), SCHEDULE, seed, save))
    return pickle.dumps(investigate_groups(SETTINGS[name], QUICK_GROUPS if quick else GroupSizes(), seed))


def report(
    found: dict[str, list[Findings] | list[list[GroupFindings]]], seeds: Sequence[int], seconds: float
) -> Report:
    standard = found.get(STANDARD, [])
    settings = {SETTINGS[name]: each for name, each in found.items() if name != STANDARD}
    tables, bounds, figure = [], [], f"detection: {len(found)} settings"
    if standard:
        ours, rival = ([each.auroc(score) for each in standard] for score in (LIVE, "final loss"))
        figure = f"detection: live AUROC {mean_and_range(ours)}, final loss {mean_and_range(rival)}"
        tables += [make(standard) for make in (_score_table, _rate_table, _strength_table, _kind_table, _family_table)]
        bounds += criteria(standard)
    if settings:
        tables += group_report.tables(settings)
        bounds += group_report.criteria(settings)
    return Report(
        name="detection",
        tables=tables,
        criteria=bounds,
        figure=f"{figure}; {len(seeds)} seeds, {seconds:.0f} s",
        settings={"seeds": list(seeds)},
    )


def criteria(found: Sequence[Findings]) -> list[Criterion]:
    """Each the worst of all seeds; or pooled over seeds, where one alone has too few cases.

    Rates are of the detector's own verdicts when training ended. The tables have those of an auditor beside them, by
    losses that were computed after training.
    """
    ours, rival = (torch.tensor([each.auroc(score) for each in found]) for score in (LIVE, "final loss"))
    tpr = torch.stack([each.flagged[each.positive].float().mean() for each in found])
    fpr = torch.stack([each.flagged[each.negative].float().mean() for each in found])
    flagged = torch.cat([each.flagged for each in found])
    discoveries = torch.cat([each.negative for each in found])[flagged]
    sampling = 2 * sqrt(FDR * (1 - FDR) / max(1, len(discoveries)))
    early = _pooled(each.lead_steps() > 0 for each in found)
    easy = _pooled(each.flagged[each.population.of("easy")] for each in found)
    twins = _pooled(each.twins for each in found)
    return [
        Criterion("live AUROC, worst seed", float(ours.min()), ">=", AUROC),
        Criterion("live AUROC above that of the final loss, worst seed", float((ours - rival).min()), ">=", ADVANTAGE),
        Criterion("live TPR, worst seed", float(tpr.min()), ">=", TPR),
        Criterion("live FPR, worst seed", float(fpr.max()), "<=", FPR),
        Criterion("live FDR, bound with 2 s.e.", _pooled([discoveries]), "<=", FDR + sampling),
        Criterion("flagged before first exact match", early, ">=", EARLY),
        Criterion("easy repeated text flagged", easy, "<=", 0),
        Criterion("never-trained twins flagged", twins, "<=", TWINS),
        *(
            Criterion(
                f"{kind} text not memorized, but flagged without held-out controls of its kind",
                _pooled(_flags_without_controls(each, kind, each.negative) for each in found),
                "<=",
                bound,
            )
            for kind, bound in WITHOUT_CONTROLS.items()
        ),
    ]


def _pooled(cases: Iterable[Tensor]) -> float:
    """Share of True over all masks; NaN if there is no case."""
    return float(torch.cat(list(cases)).float().mean())


def _flags_without_controls(found: Findings, kind: str, among: Tensor) -> Tensor:
    affected, measured = found.without_controls[kind]
    return measured.flagged[affected & among]


def _score_table(found: Sequence[Findings]) -> Table:
    many = ", ".join(f"{int(each.positive.sum())} against {int(each.negative.sum())}" for each in found)
    head = ("score", "AUROC mean [min, max]", "against easy repeats", "against shown anew")
    table = Table(*head, title=f"Memorized (> {POSITIVE:g} nats) against not (< {NEGATIVE:g}): {many}")
    for score in found[0].scores:
        rows = [[each.auroc(score, *kinds) for each in found] for kinds in ((), ("easy",), ("noise",))]
        table.add_row(score, *map(mean_and_range, rows))
    return table


def _rate_table(found: Sequence[Findings]) -> Table:
    """By seed: the rates that the criteria take the worst of."""
    table = Table("rate", *(f"seed {n + 1}" for n in range(len(found))), title="Flags, by seed")
    for word, truth in (("TPR", "positive"), ("FPR", "negative")):
        for when, flags in (("after training", "flagged_after"), ("live", "flagged")):
            rates = (_pooled([getattr(each, flags)[getattr(each, truth)]]) for each in found)
            table.add_row(f"{word} {when}", *(f"{rate:.3f}" for rate in rates))
    return table


def _strength_table(found: Sequence[Findings]) -> Table:
    """Flagged share by strength: only samples near the threshold may be missed."""
    columns = ("memorization", "flagged", "flagged_after")
    truth, flagged, after = (torch.cat([getattr(each, name) for each in found]) for name in columns)
    exact = torch.cat([each.exact_at < len(each.evaluation_step) for each in found])
    head = ("memorization, nats", "samples", "flagged live", "flagged after", "extracted")
    table = Table(*head, title="By strength, all seeds")
    for low, high in pairwise((-torch.inf, NEGATIVE, POSITIVE, 1.5, 2.0, 3.0, torch.inf)):
        of = (truth >= low) & (truth < high)
        shares = (f"{_pooled([which[of]]):.2f}" for which in (flagged, after, exact))
        table.add_row(f"{low:g} to {high:g}", str(int(of.sum())), *shares)
    return table


def _kind_table(found: Sequence[Findings]) -> Table:
    """Memorization, gaps and flags by kind and repetitions, all seeds together."""
    head = ("kind", "times", "samples", "memorization", "gap", "flagged", "extracted")
    table = Table(*head, title="By kind and times shown per epoch")
    merged: dict[tuple[str, int], list[tuple[float, ...]]] = {}
    for each in found:
        columns = zip(
            zip(each.population.kind, each.population.repeats.tolist(), strict=True),
            each.memorization.tolist(),
            each.scores[LIVE].tolist(),
            each.flagged.tolist(),
            (each.exact_at < len(each.evaluation_step)).tolist(),
            strict=True,
        )
        for group, *row in columns:
            merged.setdefault(group, []).append(tuple(row))
    for (kind, times), rows in merged.items():
        table.add_row(kind, str(times), str(len(rows)), *(f"{mean:.2f}" for mean in torch.tensor(rows).nanmean(0)))
    return table


def _family_table(found: Sequence[Findings]) -> Table:
    head = ("controls taken away", "undecided", "memorized flagged", "not memorized flagged")
    table = Table(*head, title="A kind of text without controls")
    for kind in FAMILIES:
        undecided = _pooled(~each.without_controls[kind][1].matched[each.without_controls[kind][0]] for each in found)
        memorized = _pooled(_flags_without_controls(each, kind, each.positive) for each in found)
        others = _pooled(_flags_without_controls(each, kind, each.negative) for each in found)
        table.add_row(kind, *(f"{share:.2f}" for share in (undecided, memorized, others)))
    return table


if __name__ == "__main__":
    sys.exit(main())
