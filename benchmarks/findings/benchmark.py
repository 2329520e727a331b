"""Tests five claims about memorization on real text, and writes FINDINGS.md.

Memorization sets in early, and before anything can be extracted. Repeated text is at risk, and most of all text that
resembles no other. Memorization is concentrated on few units. The model goes on generalizing meanwhile. Longer training
reinforces memorization as long as repetition goes on.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
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
from benchmarks.findings.figure import draw
from benchmarks.findings.runs import GOES_ON, STOPS, Run, Sizes, run
from lightning_memsink.localization.concentration import Concentration

QUICK = Sizes(background=1536, per_rung=8, canaries=4, easy=4, controls=96)
BEFORE, EARLY, DOSE, SIGNIFICANT = 0.8, 0.5, 0.5, 0.05
SUPPORTED, NOT_SUPPORTED = "supported", "not supported at this scale"


@dataclass(frozen=True)
class Finding:
    """A claim, which is supported if all ``criteria`` hold. ``words``: the measurements, in sentences."""

    claim: str
    criteria: list[Criterion]
    words: list[str]

    @property
    def verdict(self) -> str:
        return SUPPORTED if all(each.holds for each in self.criteria) else NOT_SUPPORTED


def early(runs: Sequence[Run]) -> Finding:
    """Are the most repeated sequences flagged before they can be extracted, and how early in training?"""
    before, extracted, onsets = 0, 0, []
    for one in runs:
        flags = torch.cat([one.flagged[name] for name in most_repeated(one)])
        exact = torch.cat([first_extracted(one, name) for name in most_repeated(one)])
        is_extracted = exact >= 0
        extracted += int(is_extracted.sum())
        before += int(((flags >= 0) & (flags < exact))[is_extracted].sum())
        early_flags = flags[(flags >= 0) & (flags <= one.half)]
        onsets.append(float(early_flags.double().median()) / one.half if len(early_flags) else float("nan"))
    low, high = wilson(before, extracted)
    return Finding(
        "Memorization sets in early, and before extraction",
        [
            Criterion("flagged before extracted, share, lower end of 95 %", low, ">=", BEFORE),
            Criterion("median flag, as share of the repetition, worst seed", max(onsets), "<=", EARLY),
        ],
        [
            f"{before} of {extracted} extracted sequences were flagged first (95 % interval {low:.2f} to {high:.2f}).",
            f"Half of the flags were raised in the first {mean_and_range(onsets)} of the steps with repetition.",
        ],
    )


def at_risk(runs: Sequence[Run]) -> Finding:
    """Does memorization grow with the number of repeats, and at equal repeats with rarity?"""
    doses, rarities = [], []
    for one in runs:
        snapshot = one.at_half()
        ladder = [
            (repeats, one.gap(snapshot, kind, repeats)) for kind, repeats in one.groups.values() if kind == "natural"
        ]
        times = torch.cat([torch.full((len(gaps),), float(repeats)) for repeats, gaps in ladder])
        doses.append(spearman(times, torch.cat([gaps for _, gaps in ladder])))
        highest = max(repeats for kind, repeats in one.groups.values() if kind == "easy")
        rare, common = one.gap(snapshot, "canary", highest), one.gap(snapshot, "easy", highest)
        rarities.append(float(rare.mean() - common.mean()))
    return Finding(
        "What is repeated is at risk, and of that most what nothing else resembles",
        [
            Criterion("rank correlation of gap and repeats, worst seed", min(doses), ">=", DOSE),
            Criterion(
                "gap of random less that of easy text, repeated as often, nats, worst seed", min(rarities), ">=", 1.0
            ),
        ],
        [
            f"Rank correlation of a passage's gap with its number of repeats: {mean_and_range(doses)}.",
            f"Repeated as often, random text is memorized by {mean_and_range(rarities)} nats more than text that is "
            "easy to predict.",
        ],
    )


def localizes(runs: Sequence[Run]) -> Finding:
    """Is the effect on memorized samples concentrated on few units, more than that on matched other samples?"""
    tests = [test for test in (last_concentration(one) for one in runs) if test is not None]
    worst = max((each.p for each in tests), default=float("nan"))
    shares = [f"{each.gini:.2f} against {each.null_gini:.2f}" for each in tests]
    moved = [layer_movement(one) for one in runs]
    return Finding(
        "Memorization localizes",
        [Criterion("p of a permutation test of concentration, worst seed", worst, "<=", SIGNIFICANT)],
        [
            f"Concentration of memorized samples' attribution on units (Gini) against that of randomly chosen others: "
            f"{'; '.join(shares) or 'too few memorized samples to test'}.",
            f"Between the first and the last evaluation, {mean_and_range(moved)} of memorized samples' attribution "
            "moved to another layer.",
        ],
    )


def coexists(runs: Sequence[Run]) -> Finding:
    """Does the held-out loss go on falling after the first sample is memorized?"""
    improved, grown = [], []
    for one in runs:
        since = [snapshot for snapshot in one.snapshots if snapshot.memorized and snapshot.step <= one.half]
        improved.append(since[0].held_out - since[-1].held_out if since else float("nan"))
        grown.append(float(since[-1].memorized - since[0].memorized) if since else float("nan"))
    return Finding(
        "Generalization and memorization coexist",
        [
            Criterion(
                "held-out loss fell since the first memorized sample, nats, worst seed", min(improved), ">=", 0.0
            ),
            Criterion("memorized samples more since then, worst seed", min(grown), ">=", 1.0),
        ],
        [
            f"While the memorized set grew by {mean_and_range(grown)} samples, held-out loss fell by "
            f"{mean_and_range(improved)} nats.",
        ],
    )


def reinforces(going: Sequence[Run], stopped: Sequence[Run]) -> Finding:
    """Does the gap grow while repetition goes on, and shrink after it stops?"""
    grown, faded, left = [], [], []
    for on, off in zip(going, stopped, strict=True):
        repeats = max(repeats for kind, repeats in on.groups.values() if kind == "natural")
        at, end, after = (
            float(one.gap(snapshot, "natural", repeats).mean())
            for one, snapshot in ((on, on.at_half()), (on, on.snapshots[-1]), (off, off.snapshots[-1]))
        )
        grown.append(end - at)
        faded.append(at - after)
        left.append(after / at)
    return Finding(
        "Training longer reinforces it while repetition goes on; afterwards it fades",
        [
            Criterion("gap grown by the second half with repetition, nats, worst seed", min(grown), ">=", 0.0),
            Criterion("gap lost in the second half without it, nats, worst seed", min(faded), ">=", 0.0),
        ],
        [
            f"With repetition the gap grew by {mean_and_range(grown)} nats in the second half; without, it fell by "
            f"{mean_and_range(faded)} nats, and {mean_and_range(left)} of it was left.",
        ],
    )


def most_repeated(one: Run) -> list[str]:
    """Names of the canary groups with the most repeats, without those of easy text."""
    hard = {name: repeats for name, (kind, repeats) in one.groups.items() if kind != "easy"}
    return [name for name, repeats in hard.items() if repeats == max(hard.values())]


def first_extracted(one: Run, name: str) -> Tensor:
    """The first step at which each sequence of a canary group was extracted word for word, ``[n]``; -1 if never."""
    first = torch.full((len(one.flagged[name]),), -1)
    for snapshot in reversed(one.snapshots):
        first[snapshot.exact[name]] = snapshot.step
    return first


def last_concentration(one: Run) -> Concentration | None:
    return next((each.concentration for each in reversed(one.profiles) if each.concentration is not None), None)


def layer_movement(one: Run) -> float:
    """The share of memorized samples' attribution that is in another layer at the end than at the beginning."""
    rows = [torch.tensor(each.shares["memorized"]) for each in one.profiles if "memorized" in each.shares]
    return float((rows[-1] - rows[0]).abs().sum() / 2) if rows else float("nan")


def spearman(one: Tensor, other: Tensor) -> float:
    from torchmetrics.functional.regression import spearman_corrcoef

    return float(spearman_corrcoef(one.float(), other.float()))


def wilson(hits: int, trials: int) -> tuple[float, float]:
    """The 95 % interval of the share ``hits / trials`` (Wilson 1927)."""
    if not trials:
        return 0.0, 1.0
    z, share = 1.96, hits / trials
    centre, reach = share + z * z / (2 * trials), z * sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    return (centre - reach) / (1 + z * z / trials), (centre + reach) / (1 + z * z / trials)


def find(going: Sequence[Run], stopped: Sequence[Run]) -> list[Finding]:
    return [early(going), at_risk(going), localizes(going), coexists(going), reinforces(going, stopped)]


def report(findings: Sequence[Finding], seeds: Sequence[int], seconds: float) -> Report:
    rows = Table("claim", "verdict", title="Five findings")
    for each in findings:
        rows.add_row(each.claim, each.verdict)
    supported = sum(each.verdict == SUPPORTED for each in findings)
    figure = f"findings: {supported} of {len(findings)} supported; {len(seeds)} seeds, {seconds:.0f} s"
    measured = {each.claim: {"verdict": each.verdict, "words": each.words} for each in findings}
    criteria = [criterion for each in findings for criterion in each.criteria]
    return Report("findings", [rows], criteria, figure, {"seeds": list(seeds), "findings": measured})


def page(findings: Sequence[Finding], seeds: Sequence[int], command: str, figure: str | None) -> str:
    """The text of FINDINGS.md."""
    lines = [
        "# Findings",
        "",
        f"Written by `{command}`: GPTs of 0.93 million parameters on Python's documentation, seeds "
        f"{', '.join(map(str, seeds))}. Ranges are over seeds: mean [least, most].",
        "",
        *["| claim | verdict |", "| --- | --- |", *(f"| {each.claim} | **{each.verdict}** |" for each in findings)],
    ]
    for number, each in enumerate(findings, 1):
        lines += ["", f"## {number}. {each.claim}: {each.verdict}", "", *(f"- {words}" for words in each.words), ""]
        lines += [f"- Criterion: {' '.join(str(criterion).split())}" for criterion in each.criteria]
    if figure is not None:
        lines += ["", f"![The measurements, a panel per claim]({figure})"]
    return "\n".join(lines) + "\n"


def main(arguments_given: Sequence[str] | None = None) -> int:
    parser = argument_parser("findings", "Tests five claims about memorization and writes a page.", seeds=3)
    parser.add_argument("--page", type=Path, default=Path("FINDINGS.md"), metavar="FILE", help="the page to write")
    parser.add_argument(
        "--figure", type=Path, default=Path("docs/findings.png"), metavar="FILE", help="the figure to write"
    )
    options = parser.parse_args(arguments_given)
    seeds, start = fresh_seeds(options), time.perf_counter()
    configure_process()
    sizes = QUICK if options.quick else Sizes()
    runs = run_in_processes(run, [(then, seed, sizes) for seed in seeds for then in (GOES_ON, STOPS)])
    going, stopped = ([one for one in runs if one.then == then] for then in (GOES_ON, STOPS))
    findings = find(going, stopped)
    draw(going, stopped, options.figure)
    command = f"python -m benchmarks.findings --seeds {len(seeds)}" + (" --quick" if options.quick else "")
    options.page.write_text(page(findings, seeds, command, str(options.figure)), encoding="utf-8")
    return report(findings, seeds, time.perf_counter() - start).publish(options.json)


if __name__ == "__main__":
    sys.exit(main())
