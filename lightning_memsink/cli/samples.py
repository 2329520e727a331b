"""``memsink samples``: lists the most memorized samples of a finished run, and shows them from the user's own data.

Names and texts may be personal data. They are printed because the user asks for them, and go nowhere else.
"""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING

from lightning_memsink.cli.own_texts import KINDS, texts_at
from lightning_memsink.reporting.formatting import count_of
from lightning_memsink.reporting.name_text import shown
from lightning_memsink.reporting.sample_listing import ListedFamily, ListedSample, RunSamples, as_json, samples_file

if TYPE_CHECKING:
    from rich.table import Table

WIDTH = 100
"""Columns of the output where it is no terminal; a terminal has its own."""
LONGEST = 400
"""Characters of a text that are shown."""
Listed = list[ListedSample] | list[ListedFamily]


def run(argv: Sequence[str]) -> int:
    """Prints a table of samples or families, and below it their texts if the user names the data."""
    options = _parser().parse_args(argv)
    try:
        samples = RunSamples(samples_file(options.run))
        among = None if options.source is None else samples.of_source(options.source)
        listed: Listed
        if options.family:
            listed, families = samples.largest_families(options.top, among)
            title = f"{len(listed):,} of {families:,} families, those with the largest gaps"
        else:
            listed = samples.most_memorized(options.top, among)
            known = len(samples) if among is None else int(among.sum())
            memorized = int(samples.memorized.sum() if among is None else (samples.memorized & among).sum())
            title = f"{memorized:,} of {count_of(known, 'sample')} memorized; {len(listed):,} with the largest gaps"
        texts, note = _texts(samples, listed, options)
    except (ValueError, OSError) as error:
        raise SystemExit(f"memsink samples: {error}") from None
    if note:
        print(f"memsink samples: {note}", file=sys.stderr)
    if options.json:
        _print(as_json(listed, texts))
    else:
        _print_table(title, listed, texts)
    return 0


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="memsink samples", description="Lists the most memorized samples of a finished run.")
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of the run's report, or its samples.parquet")
    parser.add_argument("--source", metavar="LABEL", help="only samples of this source")
    parser.add_argument("--family", action="store_true", help="families of near-duplicates instead of samples")
    parser.add_argument("--top", type=_positive, default=20, metavar="N", help="how many are listed (default: 20)")
    parser.add_argument("--text", metavar="DATA", help=f"show the texts from your own data: {KINDS}")
    parser.add_argument("--column", metavar="NAME", help="the column of DATA with the text or the token ids")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="decodes token ids; a local folder")
    parser.add_argument("--json", action="store_true", help="print a JSON array, with all digits and whole texts")
    return parser


def _positive(word: str) -> int:
    if not word.isascii() or not word.isdecimal() or int(word) < 1:
        raise ArgumentTypeError(f"{word} is no number of samples: expected 1 or more")
    return int(word)


def _texts(samples: RunSamples, listed: Listed, options: Namespace) -> tuple[list[str | None] | None, str]:
    """The text of each sample, or of each family's member, and a sentence on how rows were found, if one is due."""
    if options.text is None:
        return None, ""
    members = [each.member if isinstance(each, ListedFamily) else each for each in listed]
    rows, note = [member.first_row for member in members], ""
    if members and all(row is None for row in rows):
        if not samples.has_row_numbers_as_ids:
            raise ValueError(
                f"{samples.path} doesn't say which rows its samples came from, and their ids are no row numbers. "
                "Without --text they are listed"
            )
        rows, note = [member.id for member in members], "the ledger names no rows, so ids are taken as row numbers"
    places = [place for place, row in enumerate(rows) if row is not None]
    found = texts_at(options.text, [row for row in rows if row is not None], options.column, options.tokenizer)
    texts: list[str | None] = [None] * len(rows)
    for place, text in zip(places, found, strict=True):
        texts[place] = text
    return texts, note


def _print_table(title: str, listed: Listed, texts: list[str | None] | None) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=WIDTH, no_color=True)
    with console.capture() as captured:
        console.print(Text(title))
        if listed:
            console.print(_table(listed))
    lines = [line.rstrip() for line in captured.get().splitlines()]
    for place, text in enumerate(texts or []):
        lines += ["", *_paragraph(f"{place + 1}.", listed[place], text, min(console.width, WIDTH))]
    _print("\n".join(lines))


def _table(listed: Listed) -> Table:
    from rich.table import Table
    from rich.text import Text

    is_family = any(isinstance(each, ListedFamily) for each in listed)
    members = [each.member if isinstance(each, ListedFamily) else each for each in listed]
    columns = {
        "": [f"{place}." for place in range(1, len(listed) + 1)],
        "family of" if is_family else "sample": [shown(_label(member)) for member in members],
        "row": [_rows(member) for member in members],
        "source": [shown(member.source) for member in members],
        "texts": [f"{each.texts:,}" if isinstance(each, ListedFamily) else "" for each in listed],
        "exposures": [f"{each.exposures:,}" for each in listed],
        "gap": ["" if each.gap is None else f"{each.gap:.2f}" for each in listed],
        "memorized": [f"{each.memorized:,}" if isinstance(each, ListedFamily) else "" for each in listed],
        "verdict": ["" if is_family else member.verdict for member in members],
        "onset step": ["" if each.onset_step is None else f"{each.onset_step:,}" for each in listed],
    }
    table = Table(box=None, pad_edge=False, header_style="bold")
    cells = []
    for name, column in columns.items():
        if any(column):  # a column in which nothing is known is left out
            is_text = name in ("sample", "family of", "source")
            table.add_column(
                name,
                justify="left" if is_text or name == "verdict" else "right",
                overflow="fold",
                no_wrap=not is_text,
            )
            cells.append(column)
    for row in zip(*cells, strict=True):
        table.add_row(*map(Text, row))
    return table


def _label(sample: ListedSample) -> str:
    return str(sample.id) if sample.name is None else sample.name


def _rows(sample: ListedSample) -> str:
    if sample.first_row is None:
        return ""
    return f"{sample.first_row:,}" + (f" (+{sample.more_rows:,} rows)" if sample.more_rows else "")


def _paragraph(number: str, listed: ListedSample | ListedFamily, text: str | None, width: int) -> list[str]:
    """A text as a wrapped paragraph without control characters; of a long one the beginning, and its length."""
    sample = listed.member if isinstance(listed, ListedFamily) else listed
    heading = f"{number} {shown(_label(sample))}" + ("" if sample.first_row is None else f", row {sample.first_row:,}")
    if text is None:
        return [heading, "    (its row is not known)"]
    visible = "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text[:LONGEST])
    if len(text) > LONGEST:
        visible += f" … ({len(text):,} characters in all)"
    return [heading, fill(visible or "(empty)", width, initial_indent="    ", subsequent_indent="    ")]


def _print(text: str) -> None:
    """Prints to any encoding, and to a pipe that is closed at the other end: memsink samples RUN | head."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        print(text.encode(encoding, "replace").decode(encoding), flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more at its end
