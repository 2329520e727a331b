"""What a report says of sources: how much of each is memorized, and which budgets are crossed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from lightning_memsink.detection.source_budget import BudgetRow
from lightning_memsink.detection.source_shares import source_shares
from lightning_memsink.detection.source_summary import SourceSummary, plain_row, source_onsets, summarize_sources
from lightning_memsink.detection.verdicts import Flags
from lightning_memsink.mitigation.intervention_log import InterventionLog
from lightning_memsink.reporting.document import LABELS, Grid
from lightning_memsink.reporting.findings import Findings
from lightning_memsink.reporting.formatting import count_of, percent
from lightning_memsink.reporting.name_text import shown
from lightning_memsink.reporting.scalars import ONSET
from lightning_memsink.samples.loss_table import LossTable
from lightning_memsink.samples.sources import NO_SOURCE

ACTED = "acted on"
IN_TABLE, IN_SENTENCES, IN_NUMBERS = 100, 5, 1000
"""Sources that the table lists, that the summary describes in sentences, and whose numbers the JSON file has."""


def has_sources(findings: Findings) -> bool:
    """Whether any sample has a source, or a source a budget."""
    return bool(len(findings.table.source_names) or "source" in findings.table.columns or findings.budget)


def source_sentences(findings: Findings) -> list[str]:
    """How many sources there are, what can't be said of them, and their budgets."""
    summary, names = findings.sources, findings.table.source_names
    labelled = int((summary.codes != NO_SOURCE).sum())
    lines = []
    if labelled:
        without = int(summary.samples[summary.codes == NO_SOURCE].sum())
        lines.append(
            f"Samples have {count_of(labelled, 'source')}."
            + (f" {count_of(without, 'sample')} {_verb(without, 'has', 'have')} none." if without else "")
        )
    if names.with_several:
        lines.append(f"{count_of(names.with_several, 'sample')} came with more than one source: the first one counts.")
    unmeasured = int(((summary.measured == 0) & (summary.codes != NO_SOURCE)).sum())
    if unmeasured:
        lines.append(
            f"{count_of(unmeasured, 'source')} {_verb(unmeasured, 'has', 'have')} no sample that was compared with "
            "controls: samples that were seen once can't be judged."
        )
    return [*lines, *_budget_sentences(findings.budget_rows)]


def top_sources(findings: Findings) -> list[str]:
    """The sources with the most memorized bits, for a terminal."""
    rows = source_rows(findings.table, findings.flags, findings.interventions, findings.sources, IN_SENTENCES)
    return [
        f"Source {shown(row['source'])}: {row['memorized']:,} of {count_of(row['measured'], 'measured sample')} "
        f"memorized ({percent(row['share'])}), {_bits(row['bits'])} bits."
        for row in rows
        if row["memorized"]
    ]


def source_tables(findings: Findings) -> list[Grid]:
    """A row per source, and a row per budget."""
    found = source_rows(findings.table, findings.flags, findings.interventions, findings.sources, IN_TABLE)
    rows = [
        (
            shown(row["source"]),
            f"{row['samples']:,}",
            f"{row['tokens']:,.0f}",
            f"{row['exposures']:,}",
            f"{row['measured']:,}",
            f"{row['memorized']:,}",
            _share(row["share"], row["share_low"], row["share_high"]),
            f"{_bits(row['bits'])} ({_bits(row['bits_low'])} to {_bits(row['bits_high'])})",
            "" if row["onset_step"] is None else f"{row['onset_step']:,}",
            *([percent(row["acted_on"])] if "acted_on" in row else []),
        )
        for row in found
    ]
    head: tuple[str, ...] = (LABELS, "samples", "tokens", "exposures", "measured", "memorized", "share", "bits")
    head = (*head, "since step", *([ACTED] if found and "acted_on" in found[0] else []))
    count = int((findings.sources.codes != NO_SOURCE).sum())
    which = "Sources" if count <= IN_TABLE else f"The {IN_TABLE} of {count:,} sources with the most memorized bits"
    caption = (
        f"{which}. Share: memorized samples of those measured, with what the share can be (95 %) by the gaps "
        "of all of them, flagged or not. Bits: the gap above that of controls, over all samples, with a 95 % interval"
    )
    grids = [Grid(head, rows, caption)] if rows else []
    return [*grids, *_budget_table(findings.budget_rows)]


def source_rows(
    table: LossTable,
    flags: Flags,
    interventions: Mapping[str, InterventionLog],
    sources: SourceSummary | None = None,
    most: int = IN_NUMBERS,
) -> list[dict[str, Any]]:
    """The numbers of each source, those with the most memorized bits first.

    ``acted_on`` is the share of its exposures on which a mitigation acted, where one counts that by source.

    Args:
        table: of the samples.
        flags: their verdicts.
        interventions: by name of the mitigation.
        sources: the summary of these, if it is known already.
        most: how many sources are listed.
    """
    summary = (summarize_sources(table, flags) if sources is None else sources).largest(most, by="bits")
    _, low, high = source_shares(table, flags, summary.codes)
    onsets = source_onsets(table, flags, summary.codes)
    acted = [log.by_source for log in interventions.values() if log.by_source]
    rows = []
    for place, code in enumerate(summary.codes.tolist()):
        onset = onsets.get(code)
        when = {name: None if onset is None else getattr(onset, name) for name in ONSET}
        rows.append(
            {"source": table.source_names.label(code), **plain_row(summary, place)}
            | {"share_low": float(low[place]), "share_high": max(float(high[place]), summary.share[place].item())}
            | {f"onset_{name}": value for name, value in when.items()}
        )
        if acted:
            visits = sum(counts.get(rows[-1]["source"], 0) for counts in acted)
            rows[-1]["acted_on"] = visits / max(1, rows[-1]["exposures"])
    return rows


def source_numbers(findings: Findings) -> Mapping[str, Any]:
    """For the JSON file: ``sources`` and ``budget``, each only where there is any."""
    if not has_sources(findings):
        return {}
    rows = source_rows(findings.table, findings.flags, findings.interventions, findings.sources)
    numbers: dict[str, Any] = {"sources": rows}
    if findings.budget is not None:
        numbers["budget"] = [asdict(row) for row in findings.budget_rows]
    return numbers


def crossing(row: BudgetRow) -> str:
    """A sentence on a budget that is crossed."""
    since = "" if row.crossed_at is None else f", since step {row.crossed_at:,}"
    if row.memorized <= row.budget * row.measured:
        return (
            f"Over budget: by the gaps of its {row.measured:,} measured samples together, at least "
            f"{percent(row.share_low)} of the source {shown(row.source)} are memorized, where {percent(row.budget)} "
            f"may be{since}."
        )
    return (
        f"Over budget: {percent(row.share)} of the measured samples of the source {shown(row.source)} are memorized, "
        f"{row.memorized:,} of {row.measured:,}, where {percent(row.budget)} may be{since}."
    )


def _budget_sentences(rows: list[BudgetRow]) -> list[str]:
    if not rows:
        return []
    lines = [crossing(row) for row in rows if row.state == "crossed"]
    hidden = len(lines) - IN_SENTENCES
    if hidden > 0:
        lines = [*lines[:IN_SENTENCES], f"Over budget: {count_of(hidden, 'other source')}."]
    undecided = [row for row in rows if row.state == "undecided"]
    if undecided:
        reasons = ", ".join(f"{shown(row.source)} ({row.reason})" for row in undecided[:IN_SENTENCES])
        more = len(undecided) - IN_SENTENCES
        lines.append(f"No answer on the budget of {reasons}{f' and {more:,} others' if more > 0 else ''}.")
    return lines or [f"All {count_of(len(rows), 'budget')} are kept." if len(rows) > 1 else "The budget is kept."]


def _budget_table(rows: list[BudgetRow]) -> list[Grid]:
    cells = [
        (
            shown(row.source),
            percent(row.budget),
            _share(row.share, row.share_low, row.share_high),
            f"{row.memorized:,} of {row.measured:,}",
            row.state + (f": {row.reason}" if row.reason else ""),
            "" if row.crossed_at is None else f"{row.crossed_at:,}",
        )
        for row in rows[:IN_TABLE]
    ]
    head = (LABELS, "budget", "share", "memorized", "state", "crossed at step")
    caption = (
        "Budgets: the largest share of a source's measured samples that may be memorized. One is crossed where more "
        "are memorized than it allows and than false flags explain (5 %); the interval is of samples like these, and "
        "does not decide"
    )
    return [Grid(head, cells, caption)] if cells else []


def _share(share: float, low: float, high: float) -> str:
    return "unknown" if math.isnan(share) else f"{percent(share)} ({percent(low)} to {percent(high)})"


def _bits(bits: float) -> str:
    return "unknown" if math.isnan(bits) else f"{bits:,.0f}"


def _verb(number: int, one: str, many: str) -> str:
    return one if number == 1 else many
