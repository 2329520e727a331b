"""``memsink report``: makes the HTML report of a finished run or audit again, also compared with another run."""

from __future__ import annotations

import json
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning_memsink._files import written_whole
from lightning_memsink.reporting.document import Document, Grid, Section
from lightning_memsink.reporting.document_files import files_folder
from lightning_memsink.reporting.html_page import write

COMPARED_NUMBERS = {
    "memorized samples": ("last_evaluation", "counts", "memorized"),
    "gap of the top percent": ("curves", "gap_of_top_percent"),
    "held-out loss": ("curves", "control_loss"),
    "training loss": ("curves", "train_loss"),
}
"""By label, the keys of a number in ``Document.numbers``."""


def run(argv: Sequence[str]) -> int:
    """Writes ``NAME.html`` beside ``NAME.json``, with an option a model card, and prints their paths."""
    parser = ArgumentParser(
        prog="memsink report", description="Makes the HTML report of a finished run or audit again."
    )
    parser.add_argument("folder", type=Path, help="the folder with the report's NAME.json, or that file")
    parser.add_argument("--against", type=Path, help="another run to compare with, for example one without mitigation")
    parser.add_argument("--model-card", type=Path, metavar="README.md", help="write a section into this model card")
    options = parser.parse_args(argv)
    try:
        path = report_in(options.folder)
        document = read_document(path)
        if options.against is not None:
            other = report_in(options.against)
            document = compared(document, read_document(other), other.parent.name)
        files = sorted(files_folder(path).glob("*.svg"))
        pictures = {file.stem: file.read_text(encoding="utf-8") for file in files}
        written = write(document, pictures, path.parent, path.stem, ("html",))
        if options.model_card is not None:
            from lightning_memsink.reporting.model_card import with_section

            with written_whole(options.model_card) as unfinished:
                with_section(document, options.model_card).save(unfinished)
            written.append(options.model_card)
    except (ValueError, OSError) as error:
        raise SystemExit(f"memsink report: {error}") from None
    print(*written, sep="\n")
    return 0


def report_in(folder: Path) -> Path:
    """The JSON file of the one report in a folder, or the file itself.

    Raises:
        FileNotFoundError: there is no report in it, or several.
    """
    if folder.is_file():
        return folder
    reports = [path for path in sorted(folder.glob("*.json")) if path.with_suffix(".html").exists()]
    if len(reports) != 1:
        names = ", ".join(path.name for path in reports) or "none"
        raise FileNotFoundError(f"One report (NAME.json with NAME.html) was expected in {folder}, and found: {names}.")
    return reports[0]


def read_document(path: Path) -> Document:
    """The document of a report's JSON file. ValueError if it is not one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no report: it is not JSON ({error}).") from None
    return Document.from_json(content if isinstance(content, dict) else {})


def compared(document: Document, other: Document, name: str) -> Document:
    """The document with one more section, the first one, that compares its numbers with those of another run.

    Args:
        document: of a run.
        other: of another run.
        name: of the other run, as the section shows it.

    Raises:
        ValueError: one of them is not of a run.
    """
    if {document.kind, other.kind} != {"run"}:
        raise ValueError("--against compares two runs; at least one of these reports is of an audit.")
    rows = []
    for label, keys in COMPARED_NUMBERS.items():
        own, others = _number(document.numbers, keys), _number(other.numbers, keys)
        if own is not None and others is not None:
            rows.append((label, f"{others:,.4g}", f"{own:,.4g}", f"{own - others:+,.4g}"))
    lines = ["Numbers of the two runs at the last evaluation of each; losses and gaps are in nats."]
    if document.numbers.get("fingerprint") != other.numbers.get("fingerprint"):
        lines.append("The two runs differ in their samples, or in how often they saw them: compare with care.")
    grid = Grid(("", f"{name} (other)", "this run", "difference"), rows)
    section = Section("Compared with another run", lines, [grid])
    kept = [each for each in document.sections if each.title != section.title]
    return replace(document, sections=[section, *kept])


def _number(numbers: Mapping[str, Any], keys: Sequence[str]) -> float | None:
    """A number by the keys that lead to it in nested mappings; None if there is none."""
    value: Any = numbers
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return float(value) if isinstance(value, (int, float)) else None
