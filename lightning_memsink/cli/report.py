"""``memsink report``: the page of a finished run or audit, made again, alone or beside another run."""

from __future__ import annotations

import json
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning_memsink._files import written_whole
from lightning_memsink.reporting.document import Document, Grid, Section
from lightning_memsink.reporting.html_page import write

COMPARED = {
    "memorized samples": ("last_evaluation", "counts", "memorized"),
    "gap of the top percent": ("curves", "gap_of_top_percent"),
    "held-out loss": ("curves", "control_loss"),
    "training loss": ("curves", "train_loss"),
}


def run(argv: Sequence[str]) -> int:
    """Writes ``NAME.html`` beside ``NAME.json``, and a model card if asked, and tells where."""
    parser = ArgumentParser(
        prog="memsink report", description="Makes the HTML report of a finished run or audit again."
    )
    parser.add_argument("folder", type=Path, help="where the run left NAME.json, or that file")
    parser.add_argument("--against", type=Path, help="another run, without the mitigation, say, to show beside it")
    parser.add_argument("--model-card", type=Path, metavar="README.md", help="put a section into this model card")
    options = parser.parse_args(argv)
    try:
        path = report_in(options.folder)
        document = read_document(path)
        if options.against is not None:
            other = report_in(options.against)
            document = beside(document, read_document(other), other.parent.name)
        files = path.with_name(f"{path.stem}_files")
        pictures = {each.stem: each.read_text(encoding="utf-8") for each in sorted(files.glob("*.svg"))}
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
    """The one report's JSON in a folder, or the file itself.

    Raises:
        FileNotFoundError: there is none, or there are several.
    """
    if folder.is_file():
        return folder
    found = [path for path in sorted(folder.glob("*.json")) if path.with_suffix(".html").exists()]
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise FileNotFoundError(f"One report (NAME.json with NAME.html) was expected in {folder}, and found: {names}.")
    return found[0]


def read_document(path: Path) -> Document:
    """Raises a ValueError if it is no report."""
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no report: it is not JSON ({error}).") from None
    return Document.from_json(told if isinstance(told, dict) else {})


def beside(document: Document, other: Document, name: str) -> Document:
    """With one more section, after the first: what differs from another run.

    Raises:
        ValueError: they are not two runs.
    """
    if {document.kind, other.kind} != {"run"}:
        raise ValueError("Two runs can be shown beside one another, and no audits.")
    rows = []
    for what, place in COMPARED.items():
        own, its = _number(document.numbers, place), _number(other.numbers, place)
        if own is not None and its is not None:
            rows.append((what, f"{its:,.4g}", f"{own:,.4g}", f"{own - its:+,.4g}"))
    lines = ["What the same numbers are in the two runs, at the last evaluation of each; losses and gaps in nats."]
    if document.numbers.get("fingerprint") != other.numbers.get("fingerprint"):
        lines.append("The two runs did not see the same samples as often: compare them with care.")
    section = Section("Beside another run", lines, [Grid(("", f"{name} (other)", "this run", "difference"), rows)])
    kept = [each for each in document.sections if each.title != section.title]
    return replace(document, sections=[section, *kept])


def _number(numbers: Mapping[str, Any], place: Sequence[str]) -> float | None:
    value: Any = numbers
    for name in place:
        value = value.get(name) if isinstance(value, Mapping) else None
    return float(value) if isinstance(value, (int, float)) else None
