"""Are near-duplicates found, are their families judged rightly, and what does it cost?

Finding: twelve variants of each of many texts, at several rates of change, among others, below headers, and beside
texts of templates. Verdicts: a small GPT is trained on families at several doses; the truth of a family is what its
texts lose in a fit without any of them. Cost: a million texts in a fresh process.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.table import Table
from sklearn.metrics import roc_auc_score
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
from benchmarks.families.cost import Cost, measure
from benchmarks.families.fits import KINDS, QUICK, Outcome, Sizes, fit_pair
from benchmarks.families.texts import Found, Source, found_in, of_templates, with_families

RATES = (0.05, 0.1, 0.2)
TEXTS: dict[str, tuple[int | None, tuple[int, int], int]] = {
    "documentation, 64 tokens": (None, (64, 64), 0),
    "documentation, 16 to 64": (None, (16, 64), 0),
    "documentation, 48 below a header of 64": (None, (48, 48), 64),
    "uniform, 16 tokens": (1000, (16, 16), 0),
    "uniform, 32 to 256": (30_000, (32, 256), 0),
    "uniform over 64, 64 tokens": (64, (64, 64), 0),
}
"""Vocabulary (None: real text), lengths, and tokens of a header."""
FILLED = (0.2, 0.35, 0.5)
"""Share of a template that is filled in."""
MARGIN = 1.0
"""Nats per token by which the texts' loss must be higher without their family for it to be memorized in truth. A fifth
of the families are near it: their truth is between half of it and one and a half."""
RECALL, RECALL_AT_A_FIFTH, FALSE_JOINS = 0.9, 0.4, 0.01
AUROC, CERTAIN = 0.95, 0.9
SECONDS_PER_MILLION, BYTES_PER_TEXT = 60, 400


@dataclass(frozen=True)
class Finding:
    """By kind of text: what was found at each rate, a list over seeds; by share that is filled in: templates."""

    variants: dict[str, dict[float, list[Found]]]
    templates: dict[float, list[Found]]


def main(arguments_given: Sequence[str] | None = None) -> int:
    parser = argument_parser("families", "Families of near-duplicates: found, judged, and at what cost.", seeds=3)
    options = parser.parse_args(arguments_given)
    options.seeds = 1 if options.quick else options.seeds
    seeds, start = fresh_seeds(options), time.perf_counter()
    configure_process()
    cost = measure(20_000 if options.quick else 1_000_000)
    finding = find(seeds, options.quick)
    outcomes = run_in_processes(fit_pair, [(seed, QUICK if options.quick else Sizes()) for seed in seeds])
    return report(finding, outcomes, cost, seeds, time.perf_counter() - start).publish(options.json)


def find(seeds: Sequence[int], quick: bool) -> Finding:
    families, alone, templates = (10, 200, 100) if quick else (40, 800, 300)
    variants: dict[str, dict[float, list[Found]]] = {}
    for name, (vocabulary, lengths, header) in TEXTS.items():
        variants[name] = {
            rate: [
                found_in(with_families(Source(seed, vocabulary), rate, lengths, families, alone, header))
                for seed in seeds
            ]
            for rate in RATES
        }
    filled = {
        share: [found_in(of_templates(Source(seed, None), share, 48, 3, templates)) for seed in seeds]
        for share in FILLED
    }
    return Finding(variants, filled)


def auroc(score: Tensor, truth: Tensor) -> float:
    return float(roc_auc_score(truth.numpy(), score.numpy())) if truth.any() and not truth.all() else float("nan")


def report(finding: Finding, outcomes: Sequence[Outcome], cost: Cost, seeds: Sequence[int], seconds: float) -> Report:
    areas = [auroc(one.gap, one.effect > MARGIN) for one in outcomes]
    return Report(
        name="families",
        tables=[
            found_table(finding, len(seeds)),
            dose_table(outcomes),
            score_table(outcomes),
            cost_table(cost),
        ],
        criteria=criteria(finding, outcomes, cost),
        figure=f"families: AUROC of a family's gap for its loss without it {mean_and_range(areas)}; "
        f"{len(seeds)} seeds, {seconds:.0f} s",
        settings={"seeds": list(seeds)},
    )


def criteria(finding: Finding, outcomes: Sequence[Outcome], cost: Cost) -> list[Criterion]:
    made = []
    for rate, bound in zip(RATES, (RECALL, RECALL, RECALL_AT_A_FIFTH), strict=True):
        recalls = [one.recall for by_rate in finding.variants.values() for one in by_rate[rate]]
        made.append(Criterion(f"found at {rate:.0%} changed, worst kind and seed", min(recalls), ">=", bound))
    joins = [one.false_joins for by_rate in finding.variants.values() for found in by_rate.values() for one in found]
    templates = [one.false_joins for found in finding.templates.values() for one in found]
    flagged = torch.cat([one.memorized for one in outcomes]) > 0
    effects = torch.cat([one.effect for one in outcomes])
    return [
        *made,
        Criterion("unrelated pairs joined, worst", max(joins), "<=", FALSE_JOINS),
        Criterion("pairs of one template joined, worst", max(templates), "<=", FALSE_JOINS),
        Criterion("AUROC of family gaps, mean of seeds",
                  sum(auroc(one.gap, one.effect > MARGIN) for one in outcomes) / len(outcomes), ">=", AUROC),
        Criterion("memorized families whose truth is half the margin or more", float(
            (effects[flagged] > MARGIN / 2).float().mean()), ">=", CERTAIN),
        Criterion("seconds a million texts", cost.seconds / cost.texts * 1e6, "<=", SECONDS_PER_MILLION),
        Criterion("bytes a text", cost.bytes_per_text, "<=", BYTES_PER_TEXT),
    ]  # fmt: skip


def found_table(finding: Finding, seeds: int) -> Table:
    made = Table(title=f"Texts found in the largest group of their family, {seeds} seeds", title_justify="left")
    for column in ("texts", *(f"{rate:.0%} changed" for rate in RATES), "unrelated pairs joined"):
        made.add_column(column, justify="left" if column == "texts" else "right")
    for name, by_rate in finding.variants.items():
        worst = max(one.false_joins for found in by_rate.values() for one in found)
        made.add_row(name, *(mean_and_range([one.recall for one in by_rate[rate]]) for rate in RATES), f"{worst:.1e}")
    for share, found in finding.templates.items():
        made.add_row(f"templates, {share:.0%} filled in", "", "", "", f"{max(one.false_joins for one in found):.1e}")
    return made


def dose_table(outcomes: Sequence[Outcome]) -> Table:
    made = Table(title="Families of a GPT's training text, nats per token, means", title_justify="left")
    columns = ("texts x visits", "header", "found", "loss without it", "gap", "by own counts", "memorized", "texts are")
    for column in columns:
        made.add_column(column, justify="left" if column == "header" else "right")
    joined = {name: torch.cat([getattr(one, name) for one in outcomes]) for name in vars(outcomes[0])}
    for place, ((members, times), below) in enumerate(KINDS):
        own = joined["kind"] == place
        mean = {name: float(values[own].float().mean()) for name, values in joined.items()}
        made.add_row(
            f"{members} x {times}",
            "yes" if below else "",
            f"{mean['found']:.0%}",
            f"{mean['effect']:+.2f}",
            f"{mean['gap']:+.2f}",
            f"{mean['own_counts_left_out']:+.2f}",
            f"{mean['memorized']:.0%}",
            f"{mean['own_verdicts']:.0%}",
        )
    return made


def score_table(outcomes: Sequence[Outcome]) -> Table:
    made = Table(title=f"AUROC for a loss without the family higher by {MARGIN:g} or more", title_justify="left")
    made.add_column("score")
    made.add_column("AUROC", justify="right")
    scores = {
        "gap, the family's counts left out": lambda one: one.gap,
        "gap, each text's own counts left out": lambda one: one.own_counts_left_out,
        "low loss": lambda one: -one.loss,
        "share of texts memorized by their own verdict": lambda one: one.own_verdicts,
    }
    for name, score in scores.items():
        made.add_row(name, mean_and_range([auroc(score(one), one.effect > MARGIN) for one in outcomes]))
    return made


def cost_table(cost: Cost) -> Table:
    made = Table(title=f"{cost.texts:,} texts of 64 tokens, in a fresh process", title_justify="left")
    made.add_column("")
    made.add_column("", justify="right")
    rows = {
        "processor time": f"{cost.seconds:.1f} s",
        "of it in the thread that adds them": f"{cost.seconds_of_calls:.2f} s",
        "reading all families": f"{cost.seconds_to_read:.2f} s",
        "memory of a text": f"{cost.bytes_per_text:.0f} bytes",
        "memory of the first 800": f"{cost.fixed_bytes / 2**20:.0f} MiB",
    }
    for name, value in rows.items():
        made.add_row(name, value)
    return made
