"""The sections of a run's report and of its summary on the terminal: one entry of `SECTIONS` each."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lightning_memsink.detection.statistics import LN2
from lightning_memsink.detection.verdicts import Verdict
from lightning_memsink.reporting.document import NAMES, Grid
from lightning_memsink.reporting.family_section import family_sentences, family_tables, has_families, top_families
from lightning_memsink.reporting.findings import Findings
from lightning_memsink.reporting.formatting import count_of, percent, value_range
from lightning_memsink.reporting.localization_summary import where
from lightning_memsink.reporting.mitigation_summary import what_was_done
from lightning_memsink.reporting.name_text import shown
from lightning_memsink.reporting.provenance import seed
from lightning_memsink.reporting.source_section import has_sources, source_sentences, source_tables, top_sources
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
            f"Memorization set in at step {onset.step:,} (95 % interval {onset.step_low:,} to {onset.step_high:,}), "
            f"at exposure {exposures} of a sample.",
            f"This is when the first tenth of {count_of(onset.samples, 'memorized sample')} had been flagged.",
        ]
    if last.memorized:
        verb = "is" if last.memorized == 1 else "are"
        return [f"{count_of(last.memorized, 'sample')} {verb} memorized; no onset was estimated."]
    if last.tail == "none":
        return ["Unknown: no sample could be compared with controls."]
    return [f"Memorization did not set in: up to step {last.step:,} no sample is memorized."]


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
    groups = _most_memorized_groups(findings)
    if groups:
        lines.append(f"Groups with the largest memorized share: {groups}.")
    return lines


def _top_samples(findings: Findings) -> list[str]:
    """Of samples by number: loggers record what a terminal shows, and names stay on the machine."""
    return [
        f"Sample {sample.name}: seen {sample.exposures:,} times; its loss is {sample.loss:.2f}, that of matched "
        f"controls {sample.control_loss:.2f} (gap {sample.gap:.2f} {findings.unit}, {sample.bits:,.0f} bits in all)."
        for sample in findings.top(TOP_IN_SENTENCES)
    ]


def _sample_table(findings: Findings) -> list[Grid]:
    samples = findings.top(TOP)
    rows: list[tuple[str, ...]] = [
        (
            sample.name,
            f"{sample.exposures:,}",
            f"{sample.loss:.3f}",
            f"{sample.control_loss:.3f}",
            f"{sample.gap:.3f}",
            f"{sample.bits:,.0f}",
            f"{sample.p:.2g}",
            "" if sample.onset_step is None else f"{sample.onset_step:,}",
        )
        for sample in samples
    ]
    head: tuple[str, ...] = ("sample", "exposures", "loss", "controls' loss", "gap", "bits", "p", "since step")
    names, by = findings.names_of(samples), "by id or hash"
    if any(name is not None for name in names):
        head, by = (head[0], NAMES, *head[1:]), "by id or hash, and by name"
        rows = [(row[0], shown(name), *row[1:]) for row, name in zip(rows, names, strict=True)]
    caption = f"The most memorized samples, {by}. Loss and gap in {findings.unit}, bits over the whole sample"
    return [Grid(head, rows, caption)] if rows else []


def _most_memorized_groups(findings: Findings) -> str:
    """Up to three groups with the largest memorized share, by name."""
    shares = {name: share for name, share in _shares(findings).items() if share > 0 and not name.endswith("/twins")}
    largest = sorted(shares, key=lambda name: -shares[name])[:3]
    return ", ".join(f"{_group_name(name)} ({percent(shares[name])})" for name in largest)


def _group_name(series: str) -> str:
    _, family, member = series.split("/")
    return f"seen {member} times" if family == "exposures" else f"{family.replace('_', ' ')} {member}"


def _shares(findings: Findings) -> dict[str, float]:
    last = findings.history[-1] if findings.history else {}
    return {name: value for name, value in last.items() if name.startswith("share/")}


def _how_sure(findings: Findings) -> list[str]:
    last = findings.evaluation
    if last.tail == "none":
        if not last.controls:
            return ["There were no usable controls, so there are no verdicts."]
        return [f"No sample was compared with the {count_of(last.controls, 'control')} yet, so there are no verdicts."]
    lines = [
        f"A sample is called memorized at a false-discovery rate of {percent(last.alpha)}, and only if its loss is at "
        f"least {last.threshold:.2f} {findings.unit} ({last.threshold / LN2:.2f} "
        f"{findings.unit.replace('nats', 'bits')}) below that of its matched controls.",
        f"{count_of(last.controls, 'control')} took part; the smallest p-value they allow is {last.p_floor:.2g}. "
        + _TAILS[last.tail],
    ]
    null = findings.flags.null_gaps.float()
    if len(null):
        above = int((null >= last.threshold).sum())
        lines.append(
            f"Of the controls themselves, which were never trained on, {above:,} of {len(null):,} have a loss that far "
            "below that of other controls."
        )
    twins = {name.split("/")[1]: share for name, share in _shares(findings).items() if name.endswith("/twins")}
    if twins:
        shares = ", ".join(f"{percent(share)} of {family}" for family, share in twins.items())
        lines.append(f"Twins of planted samples, never trained on, that pass the same threshold: {shares}.")
    return lines


_TAILS = {
    "conformal": "p-values are ranks among the controls (conformal): no assumption on the distribution of gaps.",
    "normal": "That is too coarse to flag any sample here, so a normal tail is fitted: take p-values as estimates.",
}


def _limits(findings: Findings) -> list[str]:
    return [
        "Memorized means a loss far below that of matched samples never trained on. "
        + (
            "Whether a sample can be extracted by prompting was not tested."
            if findings.extraction is None
            else "Extraction was tested with each text's own beginning only: other prompts may extract more."
        ),
        "Controls must come from the same source as the training data. Samples of a kind that the controls lack are "
        "at best undecided and at worst flagged wrongly.",
        "Samples seen once can't be judged: their only loss was taken before the model had learned from them.",
    ]


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
        "Each sample's loss is compared with the losses of the held-out controls nearest to it in difficulty. p-values "
        "are conformal, or from a fitted normal tail if there are too few controls for that. The procedure of "
        "Benjamini and Hochberg (1995) bounds the false-discovery rate.",
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
    RunSection("How sure", _evaluated, _how_sure),
    RunSection("What this does not show", _evaluated, _limits),
    RunSection("Method", lambda findings: True, _method, _settings_tables, in_summary=False),
    RunSection(
        "The logged run",
        lambda findings: bool(findings.logged_runs),
        lambda findings: [line.strip() for run in findings.logged_runs for line in run.splitlines()],
        in_summary=False,
    ),
)
"""In the order of the report. A new section is one entry here; its figures are entries of `run_figures.FIGURES`."""
