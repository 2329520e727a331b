"""A run's report for two readers: a first page in plain words, and everything that it rests on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from math import isfinite
from typing import Any

from lightning_memsink.reporting.document import Answer, Document, Picture, Section, State
from lightning_memsink.reporting.family_section import family_numbers
from lightning_memsink.reporting.findings import Findings
from lightning_memsink.reporting.formatting import count_of, percent
from lightning_memsink.reporting.provenance import seed
from lightning_memsink.reporting.run_figures import figures_of
from lightning_memsink.reporting.run_sections import SECTIONS, TOP, fingerprint
from lightning_memsink.reporting.source_section import source_numbers
from lightning_memsink.reporting.statement_section import (
    if_none_is_memorized,
    share_words,
    why_none_is_no_answer,
)


def run_document(findings: Findings, date: str) -> Document:
    """``date``: ISO 8601."""
    figures = figures_of(findings)
    sections = [
        Section(
            section.title,
            section.sentences(findings),
            section.tables(findings),
            [Picture(figure.stem, figure.caption) for figure in figures if figure.section == section.title],
        )
        for section in SECTIONS
        if section.condition(findings)
    ]
    return Document(
        "run", "What this run memorized", _answers(findings), _overview(findings), sections, _numbers(findings), date
    )


def _answers(findings: Findings) -> list[Answer]:
    measured, monitored, suppressed = (
        "Was memorization measured?",
        "Was it monitored during training?",
        "Was it suppressed?",
    )
    if not findings.measured:
        return [
            Answer(measured, "no", "No sample could be compared with controls."),
            Answer(monitored, "no", f"{count_of(len(findings.table), 'sample')} followed, none judged."),
            Answer(suppressed, *_suppression(findings, None)),
        ]
    evaluations, last = findings.flags.evaluations, findings.evaluation
    known = max(1, sum(last.counts.values()))
    judged = known - last.counts["unseen"] - last.counts["undecided"]
    return [
        Answer(
            measured,
            "yes" if judged >= known / 2 else "partly",
            f"{judged:,} of {count_of(known, 'sample')} have a verdict, from {count_of(last.controls, 'control')}.",
        ),
        Answer(
            monitored,
            "yes" if len(evaluations) > 1 else "partly",
            f"{count_of(len(evaluations), 'evaluation')}, from step {evaluations[0].step:,} to {last.step:,}.",
        ),
        Answer(suppressed, *_suppression(findings, last.memorized)),
    ]


def _suppression(findings: Findings, memorized: int | None) -> tuple[State, str]:
    """Whether memorization was suppressed, and why that is the answer. ``memorized``: None if it was not measured."""
    if not findings.interventions:
        return "no", "No mitigation was in use: memorization was only measured."
    names = ", ".join(findings.interventions)
    if not any(log.total("acted") for log in findings.interventions.values()):
        return "no", f"{names} found no sample to act on."
    if memorized is None:
        return "unknown", f"{names} acted, but memorization was not measured."
    if not memorized:
        why = why_none_is_no_answer(findings)
        if why is not None:
            return (
                "unknown",
                f"{names} acted. No sample is called memorized at the end; none may be seen, because {why}.",
            )
        return "yes", f"{names} acted. No sample is memorized at the end."
    return "partly", f"{names} acted. Memorized at the end: {count_of(memorized, 'sample')}."


def _overview(findings: Findings) -> list[str]:
    if not findings.measured:
        return ["What this run memorized is unknown: its samples were not compared with controls."]
    last, it = findings.evaluation, findings.evaluation.statement
    lines = [
        "A sample counts as memorized if its loss is far below that of comparable samples that the model was never "
        f"trained on. At the last evaluation this is so for {count_of(last.memorized, 'sample')} "
        f"({percent(last.flagged_fraction)} of all). If the controls are of the same kinds as the training data, no "
        f"more than about {percent(last.alpha)} of these are expected to be wrong."
    ]
    if it is not None:
        lines.append(
            f"Of all samples trained on, {share_words(it)} are memorized, by a random sample of {it.samples:,}."
        )
    if not last.memorized:
        lines += if_none_is_memorized(findings)
    undecided = last.counts["undecided"] / max(1, sum(last.counts.values()))
    if undecided > 0.5:
        lines.append(f"{percent(undecided)} of all samples are undecided.")
    return lines


def _numbers(findings: Findings) -> dict[str, Any]:
    evaluations = findings.flags.evaluations
    certificate, extraction = findings.certificate, findings.extraction
    memorized = findings.top(TOP)
    numbers: dict[str, Any] = _json_value(
        {
            "samples": len(findings.table),
            "fingerprint": fingerprint(findings.table),
            "evaluations": len(evaluations),
            "last_evaluation": asdict(evaluations[-1]) if evaluations else None,
            "statement": _statement(findings),
            "cannot_be_said": why_none_is_no_answer(findings) if evaluations else None,
            "onset": None if findings.onset is None else asdict(findings.onset),
            "curves": dict(findings.history[-1]) if findings.history else {},
            "memorized": [
                {"sample": sample.name, "gap": sample.gap, "bits": sample.bits, "exposures": sample.exposures}
                | ({} if name is None else {"name": name})
                for sample, name in zip(memorized, findings.names_of(memorized), strict=True)
            ],
            "actions": {
                name: {key: log.total(key) for key in ("visits", "acted", "removed")}
                for name, log in findings.interventions.items()
            },
            "certificate": None if certificate is None else {**asdict(certificate), "verdict": certificate.verdict},
            "extraction": None if extraction is None or not extraction.rows else extraction.rows[-1],
            "seed": seed(),
            "settings": findings.settings,
            "versions": findings.versions,
            **family_numbers(findings),
            **source_numbers(findings),
        }
    )
    return numbers


def _statement(findings: Findings) -> dict[str, Any] | None:
    statement = findings.evaluation.statement if findings.flags.evaluations else None
    return None if statement is None else asdict(statement)


def _json_value(value: Any) -> Any:
    """The value with None in place of every float that is NaN or infinite, within mappings and sequences too."""
    if isinstance(value, Mapping):
        return {str(name): _json_value(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_value(part) for part in value]
    return None if isinstance(value, float) and not isfinite(value) else value
