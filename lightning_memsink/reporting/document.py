"""A report as plain values, from which Markdown, HTML and JSON are made."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

VERSION = 1
"""Of the JSON schema ``report.schema.json``. It grows when readers of old reports would not understand a new one."""
NAMES = "name"
"""Head of a table's column with samples' names, which Markdown shows letter by letter."""
LABELS = "source"
"""Head of a table's column with sources' labels, which Markdown shows letter by letter, too: they are the user's words.
"""
State = Literal["yes", "no", "partly", "unknown"]


@dataclass(frozen=True)
class Answer:
    """A question of the first page, "Was memorization measured?", say, with its answer as a word and as a sentence."""

    question: str
    state: State
    words: str


@dataclass(frozen=True)
class Grid:
    """A table. Its cells are text as it is shown; its caption has no full stop."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""


@dataclass(frozen=True)
class Picture:
    """A figure, by the stem of its file. Its caption has no full stop."""

    stem: str
    caption: str


@dataclass(frozen=True)
class Section:
    """A part of the report under a title: paragraphs, then tables, then pictures."""

    title: str
    paragraphs: Sequence[str] = ()
    grids: Sequence[Grid] = ()
    pictures: Sequence[Picture] = ()


@dataclass(frozen=True)
class Document:
    """A whole report.

    ``answers`` and ``plain`` are the first page, for readers without technical knowledge; ``sections`` are the rest.
    ``numbers`` are for programs: JSON values by name.
    """

    kind: Literal["run", "audit"]
    title: str
    answers: Sequence[Answer]
    plain: Sequence[str]
    sections: Sequence[Section]
    numbers: Mapping[str, Any] = field(default_factory=dict)
    date: str = ""
    """ISO 8601. The only part that differs between two reports of the same run."""

    def as_json(self) -> dict[str, Any]:
        """The report as JSON values, in the form that ``report.schema.json`` describes."""
        return {"schema_version": VERSION, **asdict(self)}

    @staticmethod
    def from_json(content: Mapping[str, Any]) -> Document:
        """The inverse of `as_json`.

        Raises:
            ValueError: another schema version wrote it, or it is not a report.
        """
        if content.get("schema_version") != VERSION:
            raise ValueError(
                f"A report of schema version {VERSION} was expected, and found: {content.get('schema_version')!r}. "
                "Read it with the version of lightning-memsink that wrote it, or make the report again."
            )
        return Document(
            content["kind"],
            content["title"],
            [Answer(**each) for each in content["answers"]],
            list(content["plain"]),
            [
                Section(
                    each["title"],
                    each["paragraphs"],
                    [Grid(**grid) for grid in each["grids"]],
                    [Picture(**picture) for picture in each["pictures"]],
                )
                for each in content["sections"]
            ],
            dict(content["numbers"]),
            content["date"],
        )


def first_page(document: Document) -> list[str]:
    """The answers and the overview as lines of Markdown, without a title."""
    answers = [f"- **{each.question}** {each.state.capitalize()}. {each.words}" for each in document.answers]
    return [*answers, "", *(f"{words}\n" for words in document.plain)]


def markdown(document: Document, figures: str | None = None) -> str:
    """The whole report as Markdown.

    Args:
        document: the report.
        figures: the folder of its figures, relative to the Markdown file; None leaves them out.
    """
    lines = [f"# {document.title}", "", *([document.date, ""] if document.date else []), *first_page(document)]
    for section in document.sections:
        lines += [f"## {section.title}", "", *(f"- {words}" for words in section.paragraphs)]
        for grid in section.grids:
            lines += ["", *([f"{grid.caption}:", ""] if grid.caption else []), *_table(grid)]
        for picture in section.pictures if figures is not None else ():
            path = f"{figures}/{picture.stem}"
            lines += ["", f"![{picture.caption}]({path}.png)", "", f"*{picture.caption}.* [SVG]({path}.svg)"]
        lines.append("")
    return "\n".join(lines)


def _table(grid: Grid) -> list[str]:
    rows = [" | ".join(_cell(*pair) for pair in zip(grid.head, row, strict=True)) for row in grid.rows]
    return [f"| {' | '.join(grid.head)} |", "|" + " --- |" * len(grid.head), *(f"| {row} |" for row in rows)]


def _cell(head: str, cell: str) -> str:
    return re.sub(r"([!-/:-@[-`{-~])", r"\\\1", cell) if head in (NAMES, LABELS) else cell.replace("|", "\\|")
