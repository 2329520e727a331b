"""The tables of an audit's report.

N  suspected texts      M  controls      C  texts examined one by one
"""

from __future__ import annotations

from math import isfinite

import torch
from torch import Tensor

from lightning_memsink.detection.statistics import bits
from lightning_memsink.extraction.audit.results import Audit
from lightning_memsink.extraction.audit.statistics import SCORES
from lightning_memsink.reporting.document import Grid
from lightning_memsink.reporting.formatting import percent


def by_group(audit: Audit) -> Grid:
    """How much can be extracted of each group of suspected texts and of controls."""
    rows = []
    for cohort, kind in ((audit.suspects, "suspected"), (audit.controls, "control")):
        for group in dict.fromkeys(each.group for each in cohort.texts):
            chosen = torch.tensor([each.group == group for each in cohort.texts])
            long = chosen & (cohort.results.suffix > 0)
            rows.append(
                (
                    f"{group} ({kind})",
                    f"{int(chosen.sum()):,}",
                    f"{int(long.sum()):,}",
                    f"{int(cohort.results.exact[long].sum()):,}",
                    f"{int(cohort.results.discoverable(audit.config.n)[long].sum()):,}",
                    _number(_median((cohort.results.longest_run / cohort.results.suffix.clamp(min=1))[long]), "{:.0%}"),
                    _number(_median(cohort.results.loss[chosen]), "{:.2f}"),
                )
            )
    head = ("group", "texts", "tested", "word for word", "in tries", "longest run", "loss")
    return Grid(head, rows, "Longest run: median share of the continuation. Loss: median, in nats per token")


def scores(audit: Audit) -> Grid:
    """How well each score separates suspected texts from controls."""
    rows = [
        (
            name,
            f"{each.auroc:.3f}",
            f"{each.auroc_low:.3f} to {each.auroc_high:.3f}",
            f"{percent(each.tpr)} at {percent(each.fpr)}",
        )
        for name, each in ((name, audit.separations[name]) for name in SCORES if name in audit.separations)
    ]
    return Grid(("score", "AUROC", "95 % interval", "suspected texts found, at false positives"), rows)


def gaps(audit: Audit) -> list[Grid]:
    """The mean gap of each group to comparable controls; no table if gaps were not measured."""
    if audit.gaps is None:
        return []
    rows = []
    groups = [each.group for each in audit.suspects.texts]
    for group in [*dict.fromkeys(groups), None]:
        chosen = audit.matched(group)
        gap = audit.mean_gap(group)
        (low, high), (bits_mean, bits_low, bits_high) = gap.interval, gap.bits
        rows.append(
            (
                group or "all",
                f"{int(chosen.sum()):,}",
                f"{gap.nats:+.3f}" if chosen.any() else "",
                f"{low:+.3f} to {high:+.3f}" if isfinite(low) else "",
                f"{bits_mean:+.3f}" if chosen.any() else "",
                f"{bits_low:+.3f} to {bits_high:+.3f}" if isfinite(low) else "",
                f"{int(audit.gaps.flagged[chosen].sum()):,}",
            )
        )
    head = ("group", "texts matched", "nats a token", "95 % interval", "bits a token", "95 % interval", "memorized")
    return [Grid(head, rows, "Mean gap: the loss of comparable controls minus that of the text")]


def single(audit: Audit) -> list[Grid]:
    """The suspected texts with the largest gaps, one by one; no table if there are none."""
    top, suspects = audit.top_texts, audit.suspects
    if not top.rows:
        return []
    rows = []
    for place, row in enumerate(top.rows):
        verdict = ["", "", "", ""]
        if audit.gaps is not None:
            whole = bits(audit.gaps.gap, suspects.tokens - 1)
            flagged = "memorized" if audit.gaps.flagged[row] else ""
            verdict = [
                f"{float(audit.gaps.gap[row]):+.2f}",
                f"{float(whole[row]):+,.0f}",
                f"{float(audit.gaps.p[row]):.2g}",
                flagged if audit.gaps.matched[row] else "no comparable controls",
            ]
        rows.append(
            (
                f"{suspects.texts[row].line}",
                suspects.texts[row].group,
                f"{float(suspects.results.loss[row]):.2f}",
                *verdict,
                "yes" if suspects.results.exact[row] else "",
                f"{float(top.similarity[place]):.2f}",
                _number(float(top.prefix_bits[place]), "{:+,.0f}"),
                _tries(float(suspects.results.log10_tries[row])),
            )
        )
    head = (
        *("line", "group", "loss", "gap", "bits", "p", "verdict", "word for word"),
        *("similarity", "own beginning, bits", "tries needed"),
    )
    caption = (
        f"The {len(rows)} texts with the largest gaps. Loss and gap in nats per token, bits over the whole text. "
        "Similarity: of the generated continuation to the true one, 1 if they are equal. Own beginning: how many bits "
        "likelier the rest of the text is after its own beginning than after those of controls"
    )
    return [Grid(head, rows, caption)]


def layers(audit: Audit) -> list[Grid]:
    """How many units of each layer were localized; no table without localization."""
    if audit.localized_units is None:
        return []
    sinks = audit.localized_units.sinks
    rows = [
        (name, f"{len(sinks.units.get(name, ())):,}", f"{size:,}", percent(len(sinks.units.get(name, ())) / size))
        for name, size in sinks.sizes.items()
    ]
    return [Grid(("layer", "localized", "units", "share"), rows)]


def _median(values: Tensor) -> float:
    known = values.double()[values.double().isfinite()]
    return float(known.median()) if len(known) else float("nan")


def _number(value: float, how: str) -> str:
    return how.format(value).replace("%", " %") if isfinite(value) else "never" if value > 0 else ""


def _tries(logarithm: float) -> str:
    if not isfinite(logarithm):
        return "never"
    return f"{10**logarithm:,.0f}" if logarithm < 4 else f"10^{logarithm:.0f}"
