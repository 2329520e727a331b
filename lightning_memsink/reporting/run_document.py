"""What a run found, as a report for two readers: a first page in plain words, and everything behind it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from math import isfinite
from typing import Any

from lightning_memsink.reporting.document import Answer, Document, Grid, Picture, Section
from lightning_memsink.reporting.provenance import seed
from lightning_memsink.reporting.run_summary import FIGURES, NOTHING, Findings, parts, percent
from lightning_memsink.samples.loss_table import LossTable

TOP = 20
PLACES = {
    "loss_by_rung": "When",
    "gap_distribution": "Which",
    "verdict_map": "Which",
    "layers": "Where",
    "mitigation": "What was done",
}
"""The section of each figure."""


def run_document(findings: Findings, settings: Mapping[str, Any], versions: Mapping[str, str], date: str) -> Document:
    """``settings``: arguments by callback; ``date``: ISO 8601."""
    sections = [_section(title, lines, findings) for title, lines in _parts(findings).items()]
    data = fingerprint(findings.table)
    sections.append(_method(findings, data, settings, versions))
    numbers = _numbers(findings, data, settings, versions)
    return Document("run", "What this run memorized", _answers(findings), _plain(findings), sections, numbers, date)


def _parts(findings: Findings) -> dict[str, list[str]]:
    if findings.flags.evaluations:
        return parts(findings)
    return {"Nothing was judged": [line.format(f"{len(findings.table):,} samples") for line in NOTHING]}


def _answers(findings: Findings) -> list[Answer]:
    evaluations = findings.flags.evaluations
    if not evaluations or findings.evaluation.tail == "none":
        none = "No sample could be compared with controls."
        return [
            Answer("Was memorization measured?", "no", none),
            Answer(
                "Was it monitored during training?",
                "no",
                f"{len(findings.table):,} samples were followed, none judged.",
            ),
            _suppressed(findings, None),
        ]
    last = findings.evaluation
    known = max(1, sum(last.counts.values()))
    judged = known - last.counts["unseen"] - last.counts["undecided"]
    measured = Answer(
        "Was memorization measured?", "yes" if judged >= known / 2 else "partly",
        f"{judged:,} of {known:,} samples have a verdict, from {last.controls:,} controls.",
    )  # fmt: skip
    monitored = Answer(
        "Was it monitored during training?", "yes" if len(evaluations) > 1 else "partly",
        f"{len(evaluations):,} evaluations, from step {evaluations[0].step:,} to {last.step:,}.",
    )  # fmt: skip
    return [measured, monitored, _suppressed(findings, last.memorized)]


def _suppressed(findings: Findings, memorized: int | None) -> Answer:
    question = "Was it suppressed?"
    if not findings.interventions:
        return Answer(question, "no", "Nothing acted on memorization: this run was only watched.")
    names = ", ".join(findings.interventions)
    acted = sum(done.total("acted") for done in findings.interventions.values())
    if not acted:
        return Answer(question, "no", f"{names} had nothing to act on.")
    if memorized is None:
        return Answer(question, "unknown", f"{names} acted, and nothing was measured.")
    left = f"{memorized:,} samples stand as memorized at the end" if memorized else "no sample stands as memorized"
    return Answer(question, "partly" if memorized else "yes", f"{names} acted; {left}.")


def _plain(findings: Findings) -> list[str]:
    if not findings.flags.evaluations or findings.evaluation.tail == "none":
        return ["Nothing can be said of what this run memorized: there was nothing to compare its samples with."]
    last = findings.evaluation
    share = percent(last.flagged_fraction)
    lines = [
        f"A sample counts as memorized if the model knows it far better than comparable text it never trained on. "
        f"{last.memorized:,} samples do ({share} of all). Of samples called so, about {percent(last.alpha)} at most "
        "are expected to be called so wrongly, if the controls are of the same kinds as the training data."
    ]
    undecided = last.counts["undecided"] / max(1, sum(last.counts.values()))
    if undecided > 0.5:
        lines.append(f"{percent(undecided)} of samples have no verdict.")
    return lines


def _section(title: str, lines: list[str], findings: Findings) -> Section:
    pictures = [Picture(stem, FIGURES[stem]) for stem, place in PLACES.items() if place == title]
    grids = [_samples(findings)] if title == "Which" and findings.top(1) else []
    return Section(title, lines, grids, pictures)


def _samples(findings: Findings) -> Grid:
    rows = [
        (
            one.name,
            f"{one.exposures:,}",
            f"{one.loss:.3f}",
            f"{one.control_loss:.3f}",
            f"{one.gap:.3f}",
            f"{one.bits:,.0f}",
            f"{one.p:.2g}",
            "" if one.onset_step is None else f"{one.onset_step:,}",
        )
        for one in findings.top(TOP)
    ]
    head = ("sample", "exposures", "loss", "controls' loss", "gap", "bits", "p", "since step")
    return Grid(head, rows, f"The most memorized samples, by id or hash; loss and gap in {findings.unit}")


def _method(findings: Findings, data: str, settings: Mapping[str, Any], versions: Mapping[str, str]) -> Section:
    table = findings.table
    lines = [
        f"Data: {len(table):,} samples, seen {int(table.exposures.sum()):,} times; SHA-256 {data[:16]} "
        "of ids and exposures.",
        "A sample's loss is compared with those of the held-out controls nearest in difficulty; p-values are "
        "conformal, and the false-discovery rate is held by Benjamini and Hochberg's procedure.",
        "Seed: not set by Lightning's seed_everything." if seed() is None else f"Seed: {seed()}.",
    ]
    told = [(name, _told(arguments)) for name, arguments in settings.items()]
    grids = [Grid(("callback", "settings"), told, "Settings")] if told else []
    return Section("Method", lines, [*grids, Grid(("package", "version"), list(versions.items()), "Versions")])


def _told(arguments: Any) -> str:
    return ", ".join(f"{name}={value}" for name, value in arguments.items()) if isinstance(arguments, Mapping) else ""


def fingerprint(table: LossTable) -> str:
    """SHA-256 of ids and exposures, whatever their order."""
    ids, order = table.ids.sort()
    digest = hashlib.sha256(ids.numpy().tobytes())
    digest.update(table.exposures[order].long().numpy().tobytes())
    return digest.hexdigest()


def _numbers(findings: Findings, data: str, settings: Mapping[str, Any], versions: Mapping[str, str]) -> dict[str, Any]:
    evaluations = findings.flags.evaluations
    actions = {
        name: {key: done.total(key) for key in ("visits", "acted", "removed")}
        for name, done in findings.interventions.items()
    }
    certificate, extraction = findings.certificate, findings.extraction
    told: dict[str, Any] = _json_able(
        {
            "samples": len(findings.table),
            "fingerprint": data,
            "evaluations": len(evaluations),
            "last_evaluation": asdict(evaluations[-1]) if evaluations else None,
            "onset": None if findings.onset is None else asdict(findings.onset),
            "curves": dict(findings.history[-1]) if findings.history else {},
            "memorized": [
                {"sample": one.name, "gap": one.gap, "bits": one.bits, "exposures": one.exposures}
                for one in (findings.top(TOP) if evaluations else [])
            ],
            "actions": actions,
            "certificate": None if certificate is None else {**asdict(certificate), "verdict": certificate.verdict},
            "extraction": None if extraction is None or not extraction.rows else extraction.rows[-1],
            "seed": seed(),
            "settings": settings,
            "versions": versions,
        }
    )
    return told


def _json_able(value: Any) -> Any:
    """None for what is no number, all the way down."""
    if isinstance(value, Mapping):
        return {str(name): _json_able(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_able(part) for part in value]
    return None if isinstance(value, float) and not isfinite(value) else value
