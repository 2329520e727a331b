"""The summary of a run that is printed at the end of training."""

from __future__ import annotations

from lightning_memsink.reporting.findings import Findings
from lightning_memsink.reporting.run_sections import SECTIONS, no_verdicts


def summary(findings: Findings) -> str:
    """Short paragraphs, each under the title of its section; two sentences for a run without evaluations."""
    if not findings.flags.evaluations:
        return "\n".join(no_verdicts(findings))
    paragraphs = [
        "\n  ".join([section.title, *section.sentences(findings), *section.in_place_of_tables(findings)])
        for section in SECTIONS
        if section.in_summary and section.condition(findings)
    ]
    return "\n\n".join(paragraphs)
