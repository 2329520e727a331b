"""The tables of an audit's report.

N  suspected texts      M  controls      C  texts looked at closer
"""

from __future__ import annotations

from math import isfinite

import torch
from torch import Tensor

from lightning_memsink.detection.statistics import bits
from lightning_memsink.extraction.audit.audit import SCORES, Audit
from lightning_memsink.reporting.document import Grid
from lightning_memsink.reporting.run_summary import percent


def by_group(audit: Audit) -> Grid:
    """What can be extracted, of suspected texts and of controls."""
    rows = []
    for asked, kind in ((audit.suspects, "suspected"), (audit.controls, "control")):
        for group in dict.fromkeys(each.group for each in asked.texts):
            chosen = torch.tensor([each.group == group for each in asked.texts])
            long = chosen & (asked.answers.suffix > 0)
            rows.append(
                (
                    f"{group} ({kind})",
                    f"{int(chosen.sum()):,}",
                    f"{int(long.sum()):,}",
                    f"{int(asked.answers.exact[long].sum()):,}",
                    f"{int(asked.answers.discoverable(audit.settings.n)[long].sum()):,}",
                    _number(_median((asked.answers.longest_run / asked.answers.suffix.clamp(min=1))[long]), "{:.0%}"),
                    _number(_median(asked.answers.loss[chosen]), "{:.2f}"),
                )
            )
    head = ("group", "texts", "asked for", "word for word", "in tries", "longest run", "loss")
    return Grid(head, rows, "Medians of: longest run, of what follows; loss, nats per token")


def scores(audit: Audit) -> Grid:
    """How well each score tells suspected texts from controls."""
    rows = [
        (
            name,
            f"{each.auroc:.3f}",
            f"{each.auroc_low:.3f} to {each.auroc_high:.3f}",
            f"{percent(each.tpr)} at {percent(each.fpr)}",
        )
        for name, each in ((name, audit.separations[name]) for name in SCORES if name in audit.separations)
    ]
    return Grid(("score", "AUROC", "95 % interval", "suspected found, at controls accused"), rows)


def gaps(audit: Audit) -> list[Grid]:
    """How far below comparable controls each group's loss lies; none where single texts were not measured."""
    if audit.gaps is None:
        return []
    rows = []
    groups = [each.group for each in audit.suspects.texts]
    for group in [*dict.fromkeys(groups), None]:
        chosen = audit.matched(group)
        found = audit.mean_gap(group)
        (low, high), (bits_mean, bits_low, bits_high) = found.interval, found.bits
        rows.append(
            (
                group or "all",
                f"{int(chosen.sum()):,}",
                f"{found.nats:+.3f}" if chosen.any() else "",
                f"{low:+.3f} to {high:+.3f}" if isfinite(low) else "",
                f"{bits_mean:+.3f}" if chosen.any() else "",
                f"{bits_low:+.3f} to {bits_high:+.3f}" if isfinite(low) else "",
                f"{int(audit.gaps.flagged[chosen].sum()):,}",
            )
        )
    head = ("group", "texts matched", "nats a token", "95 % interval", "bits a token", "95 % interval", "memorized")
    return [Grid(head, rows, "Mean gap: loss of comparable controls less the texts' own")]


def single(audit: Audit) -> list[Grid]:
    """The texts that stand out most, and what a closer look at them showed."""
    seen, asked = audit.closer, audit.suspects
    if not seen.rows:
        return []
    rows = []
    for at, row in enumerate(seen.rows):
        verdict = ["", "", "", ""]
        if audit.gaps is not None:
            whole = bits(audit.gaps.gap, asked.tokens - 1)
            known = "memorized" if audit.gaps.flagged[row] else ""
            verdict = [
                f"{float(audit.gaps.gap[row]):+.2f}",
                f"{float(whole[row]):+,.0f}",
                f"{float(audit.gaps.p[row]):.2g}",
                known if audit.gaps.matched[row] else "no controls like it",
            ]
        rows.append(
            (
                f"{asked.texts[row].line}",
                asked.texts[row].group,
                f"{float(asked.answers.loss[row]):.2f}",
                *verdict,
                "yes" if asked.answers.exact[row] else "",
                f"{float(seen.similarity[at]):.2f}",
                _number(float(seen.own_beginning[at]), "{:+,.0f}"),
                _tries(float(asked.answers.log10_tries[row])),
            )
        )
    head = (
        *("line", "group", "loss", "gap", "bits", "p", "verdict", "word for word"),
        *("likeness", "own beginning, bits", "tries needed"),
    )
    caption = (
        f"The {len(rows)} texts that stand out most; loss and gap in nats per token, bits in all. Likeness: of what is "
        "generated to what follows, 1 for equal. Own beginning: how much likelier the rest is after it than after "
        "controls' beginnings"
    )
    return [Grid(head, rows, caption)]


def layers(audit: Audit) -> list[Grid]:
    """Where the units are that carry the texts called memorized."""
    if audit.located is None:
        return []
    sinks = audit.located.sinks
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
