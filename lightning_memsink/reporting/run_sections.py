"""The sections of a run's report and of its summary on the terminal: one entry of `SECTIONS` each."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lightning_memsink.detection.verdicts import Verdict
from lightning_memsink.reporting.certainty_section import group_shares, how_sure, limits, null_share
from lightning_memsink.reporting.document import NAMES, Grid
from lightning_memsink.reporting.family_section import family_sentences, family_tables, has_families, top_families
from lightning_memsink.reporting.findings import Findings
from lightning_memsink.reporting.formatting import count_of, percent, value_range
from lightning_memsink.reporting.gap_units import LOG_RATIO, part_of_controls, short
from lightning_memsink.reporting.localization_summary import where
from lightning_memsink.reporting.mitigation_summary import what_was_done
from lightning_memsink.reporting.name_text import shown
from lightning_memsink.reporting.onset_text import onset_basis, onset_title
from lightning_memsink.reporting.provenance import seed
from lightning_memsink.reporting.scalars import MemorizedSample
from lightning_memsink.reporting.source_section import has_sources, source_sentences, source_tables, top_sources
from lightning_memsink.reporting.statement_section import (
    group_sentences,
    has_statement,
    if_none_is_memorized,
    statement_sentences,
    statement_tables,
)
from lightning_memsink.samples.loss_table import LossTable

TOP, TOP_IN_SENTENCES = 20, 5
"""Memorized samples that the table lists, and that the summary describes in sentences."""


@dataclass(frozen=True)
class RunSection:
    """A section that a report has if ``condition`` is true of its findings. Its figures name it by its ``title``."""

    title: str
    condition: Callable[[Findings], bool]
    sentences: Callable[[Findings], list[str]]
    tables: Callable[[Findings], list[Grid]] = lambda findings: []
    in_place_of_tables: Callable[[Findings], list[str]] = lambda findings: []
    """More sentences for the summary on the terminal, which has no tables."""
    in_summary: bool = True
    """Whether the section is also printed at the end of training."""


def _evaluated(findings: Findings) -> bool:
    return bool(findings.flags.evaluations)


def no_verdicts(findings: Findings) -> list[str]:
    """What is said of a run without evaluations."""
    return [
        f"memsink followed {count_of(len(findings.table), 'sample')} but judged none: the controls were never "
        "evaluated.",
        "Pass held-out samples as the validation set: trainer.fit(model, train_loader, control_loader).",
    ]


def _when(findings: Findings) -> list[str]:
    onset, last = findings.onset, findings.evaluation
    if onset is not None:
        exposures = value_range(onset.exposures, onset.exposures_low, onset.exposures_high)
        return [
            f"{onset_title(onset)} (95 % interval {onset.step_low:,} to {onset.step_high:,}), at exposure {exposures} "
            "of a sample.",
            onset_basis(onset),
        ]
    if last.memorized:
        verb = "is" if last.memorized == 1 else "are"
        return [f"{count_of(last.memorized, 'sample')} {verb} memorized; no onset was estimated."]
    return if_none_is_memorized(findings)


def _which(findings: Findings) -> list[str]:
    last, known = findings.evaluation, max(1, sum(findings.evaluation.counts.values()))
    others = ", ".join(f"{count:,} {word}" for word, count in last.counts.items() if count and word != "memorized")
    lines = [
        f"{last.memorized:,} of {count_of(known, 'sample')} memorized ({percent(last.memorized / known)})"
        + (f"; {others}." if others else ".")
    ]
    codes = torch.bincount(findings.flags.verdict.long(), minlength=len(Verdict)).tolist()
    reasons = ", ".join(f"{codes[code]:,} {code.reason}" for code in Verdict if code.reason and codes[code])
    if reasons:
        lines.append(f"Undecided because: {reasons}.")
    if last.controls_needed:
        lines.append(
            f"A verdict on those beyond all controls would take {count_of(last.controls_needed, 'control')}, "
            f"{count_of(last.controls, 'control')} took part: pass more held-out samples."
        )
    groups = _most_memorized_groups(findings)
    if groups:
        lines.append(f"Groups with the largest memorized share: {groups}.")
    return lines


def _top_samples(findings: Findings) -> list[str]:
    """Of samples by number: loggers record what a terminal shows, and names stay on the machine."""
    return [
        f"Sample {sample.name}: seen {sample.exposures:,} times; its loss is {sample.loss:.3g}, that of matched "
        f"controls {sample.control_loss:.3g} ({_gap_of(sample, findings.unit)})."
        for sample in findings.top(TOP_IN_SENTENCES)
    ]


def _gap_of(sample: MemorizedSample, unit: str) -> str:
    in_all = f", {sample.bits:,.0f} bits in all" if math.isfinite(sample.bits) else ""
    return short(sample.gap, unit) if unit == LOG_RATIO else f"gap {short(sample.gap, unit)}{in_all}"


def _sample_table(findings: Findings) -> list[Grid]:
    samples, is_ratio = findings.top(TOP), findings.unit == LOG_RATIO
    rows: list[tuple[str, ...]] = [
        (
            sample.name,
            f"{sample.exposures:,}",
            f"{sample.loss:.3g}" if is_ratio else f"{sample.loss:.3f}",
            f"{sample.control_loss:.3g}" if is_ratio else f"{sample.control_loss:.3f}",
            part_of_controls(sample.gap) if is_ratio else f"{sample.gap:.3f}",
            *([] if is_ratio else [f"{sample.bits:,.0f}"]),
            f"{sample.p:.2g}",
            "" if sample.onset_step is None else f"{sample.onset_step:,}",
        )
        for sample in samples
    ]
    gap = ("of the controls' loss",) if is_ratio else ("gap", "bits")
    head: tuple[str, ...] = ("sample", "exposures", "loss", "controls' loss", *gap, "p", "since step")
    names, by = findings.names_of(samples), "by id or hash"
    if any(name is not None for name in names):
        head, by = (head[0], NAMES, *head[1:]), "by id or hash, and by name"
        rows = [(row[0], shown(name), *row[1:]) for row, name in zip(rows, names, strict=True)]
    unit = "" if is_ratio else f". Loss and gap in {findings.unit}, bits over the whole sample"
    caption = f"The most memorized samples, {by}{unit}"
    return [Grid(head, rows, caption)] if rows else []


def _most_memorized_groups(findings: Findings) -> str:
    """Up to three groups with the largest memorized share, by name."""
    shares = {
        name: share for name, share in group_shares(findings).items() if share > 0 and not name.endswith("/twins")
    }
    largest = sorted(shares, key=lambda name: -shares[name])[:3]
    return ", ".join(f"{_group_name(name)} ({percent(shares[name])})" for name in largest)


def _group_name(series: str) -> str:
    _, family, member = series.split("/")
    return f"seen {member} times" if family == "exposures" else f"{family.replace('_', ' ')} {member}"


def _extraction(findings: Findings) -> list[str]:
    return [] if findings.extraction is None else findings.extraction.words()


def _localization(findings: Findings) -> list[str]:
    return [] if findings.attribution is None else where(findings.attribution)


def _mitigation(findings: Findings) -> list[str]:
    return what_was_done(findings.interventions, findings.certificate)


def _method(findings: Findings) -> list[str]:
    table, set_seed = findings.table, seed()
    return [
        f"Data: {len(table):,} samples, seen {int(table.exposures.sum()):,} times in all; the SHA-256 of their ids and "
        f"exposures begins with {fingerprint(table)[:16]}.",
        "Each sample's loss is compared with the losses of the controls nearest to it in difficulty. p-values are "
        "conformal ranks, of the hypothesis that the gap is no larger than the effect that counts. The procedure of "
        "Benjamini and Hochberg (1995), adapted to the estimated share of samples that are not memorized"
        f"{null_share(findings)}, bounds the false-discovery rate. docs/verdicts.md explains all of it.",
        "Seed: not set by Lightning's seed_everything." if set_seed is None else f"Seed: {set_seed}.",
    ]


def _settings_tables(findings: Findings) -> list[Grid]:
    settings = [(name, _arguments(arguments)) for name, arguments in findings.settings.items()]
    grids = [Grid(("callback", "settings"), settings, "Arguments of the callbacks")] if settings else []
    return [*grids, Grid(("package", "version"), list(findings.versions.items()), "Versions of the packages")]


def _arguments(arguments: Any) -> str:
    return ", ".join(f"{name}={value}" for name, value in arguments.items()) if isinstance(arguments, Mapping) else ""


def fingerprint(table: LossTable) -> str:
    """SHA-256 of ids and exposures, in hexadecimal digits. The order of the samples does not matter."""
    ids, order = table.ids.sort()
    digest = hashlib.sha256(ids.numpy().tobytes())
    digest.update(table.exposures[order].long().numpy().tobytes())
    return digest.hexdigest()


SECTIONS = (
    RunSection("Nothing was judged", lambda findings: not _evaluated(findings), no_verdicts),
    RunSection("When", _evaluated, _when),
    RunSection(
        "How much",
        has_statement,
        statement_sentences,
        statement_tables,
        in_place_of_tables=group_sentences,
    ),
    RunSection("Which", _evaluated, _which, _sample_table, in_place_of_tables=_top_samples),
    RunSection(
        "Families",
        lambda it: _evaluated(it) and has_families(it),
        family_sentences,
        family_tables,
        in_place_of_tables=top_families,
    ),
    RunSection(
        "Sources",
        lambda it: _evaluated(it) and has_sources(it),
        source_sentences,
        source_tables,
        in_place_of_tables=top_sources,
    ),
    RunSection("Where", lambda it: _evaluated(it) and it.attribution is not None, _localization),
    RunSection("What can be extracted", lambda it: _evaluated(it) and bool(_extraction(it)), _extraction),
    RunSection("What was done", lambda it: _evaluated(it) and bool(_mitigation(it)), _mitigation),
    RunSection("How sure", _evaluated, how_sure),
    RunSection("What this does not show", _evaluated, limits),
    RunSection("Method", lambda findings: True, _method, _settings_tables, in_summary=False),
    RunSection(
        "The logged run",
        lambda findings: bool(findings.logged_runs),
        lambda findings: [line.strip() for run in findings.logged_runs for line in run.splitlines()],
        in_summary=False,
    ),
)
"""In the order of the report. A new section is one entry here; its figures are entries of `run_figures.FIGURES`."""
