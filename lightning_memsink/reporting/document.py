"""A report as plain values, from which Markdown, HTML and JSON are made alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

VERSION = 1
"""Of the JSON's schema, ``report.schema.json``; grows when a reader of old reports would not understand a new one."""
State = Literal["yes", "no", "partly", "unknown"]


@dataclass(frozen=True)
class Answer:
    """A question of the first page: "Was memorization measured?", in a word and a sentence."""

    question: str
    state: State
    words: str


@dataclass(frozen=True)
class Grid:
    """A table; cells are text as it is shown."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""


@dataclass(frozen=True)
class Picture:
    """A figure by the stem of its file."""

    stem: str
    caption: str


@dataclass(frozen=True)
class Section:
    """``paragraphs`` come first, then tables, then pictures."""

    title: str
    paragraphs: Sequence[str] = ()
    grids: Sequence[Grid] = ()
    pictures: Sequence[Picture] = ()


@dataclass(frozen=True)
class Document:
    """A whole report.

    ``answers`` and ``plain`` are the first page, for readers who are no engineers; ``sections`` are everything else.
    ``numbers`` are for machines: JSON values by name.
    """

    kind: Literal["run", "audit"]
    title: str
    answers: Sequence[Answer]
    plain: Sequence[str]
    sections: Sequence[Section]
    numbers: Mapping[str, Any] = field(default_factory=dict)
    date: str = ""
    """ISO 8601; the only part that differs between two reports of the same run."""

    def as_json(self) -> dict[str, Any]:
        """What ``report.schema.json`` describes."""
        return {"schema_version": VERSION, **asdict(self)}

    @staticmethod
    def from_json(told: Mapping[str, Any]) -> Document:
        """The inverse of `as_json`.

        Raises:
            ValueError: it was written by a version that this one does not read, or is no report.
        """
        if told.get("schema_version") != VERSION:
            raise ValueError(
                f"A report of schema version {VERSION} was expected, and found: {told.get('schema_version')!r}. "
                "Read it with the lightning-memsink that wrote it, or run it again."
            )
        return Document(
            told["kind"],
            told["title"],
            [Answer(**each) for each in told["answers"]],
            list(told["plain"]),
            [
                Section(
                    each["title"],
                    each["paragraphs"],
                    [Grid(**grid) for grid in each["grids"]],
                    [Picture(**picture) for picture in each["pictures"]],
                )
                for each in told["sections"]
            ],
            dict(told["numbers"]),
            told["date"],
        )


def first_page(document: Document) -> list[str]:
    """Lines of Markdown, without a title."""
    answers = [f"- **{each.question}** {each.state.capitalize()}. {each.words}" for each in document.answers]
    return [*answers, "", *(f"{words}\n" for words in document.plain)]


def markdown(document: Document, figures: str | None = None, level: int = 1) -> str:
    """``figures``: the directory of the pictures, relative to the file, or None for none; ``level``: of the title."""
    head = "#" * level
    lines = [f"{head} {document.title}", "", *first_page(document)]
    for section in document.sections:
        lines += [f"{head}# {section.title}", "", *(f"- {words}" for words in section.paragraphs)]
        for grid in section.grids:
            lines += ["", *([grid.caption, ""] if grid.caption else []), *_rows(grid)]
        for picture in section.pictures if figures is not None else ():
            lines += ["", f"![{picture.caption}]({figures}/{picture.stem}.png)", "", f"*{picture.caption}.*"]
        lines.append("")
    return "\n".join(lines)


def _rows(grid: Grid) -> list[str]:
    rows = [" | ".join(cell.replace("|", "\\|") for cell in row) for row in grid.rows]
    return [f"| {' | '.join(grid.head)} |", "|" + " --- |" * len(grid.head), *(f"| {row} |" for row in rows)]
