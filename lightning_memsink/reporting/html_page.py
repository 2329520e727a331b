"""A report as one self-contained HTML file, and as JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_memsink._files import written_whole
from lightning_memsink.reporting.document import Document

TEMPLATE = Path(__file__).with_name("page.html.jinja")
SCHEMA = Path(__file__).with_name("report.schema.json")


def html(document: Document, pictures: Mapping[str, str]) -> str:
    """The report as one HTML file that refers to nothing outside itself.

    Args:
        document: the report.
        pictures: SVG by stem, as `figures.svg` makes it. Those that the document does not name are left out.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined, finalize=_with_fixed_spaces
    )
    shown = {stem: _inline(stem, drawn) for stem, drawn in pictures.items()}
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(document=document, pictures=shown)


def write(
    document: Document,
    pictures: Mapping[str, str],
    folder: Path,
    stem: str = "report",
    kinds: Sequence[str] = ("json", "html"),
) -> list[Path]:
    """Writes ``STEM.json`` and ``STEM.html`` into ``folder``, each complete or not there, and returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    make = {
        "json": lambda: json.dumps(document.as_json(), indent=2, sort_keys=True, allow_nan=False) + "\n",
        "html": lambda: html(document, pictures),
    }
    written = []
    for kind in kinds:
        path, content = folder / f"{stem}.{kind}", make[kind]()
        with written_whole(path) as unfinished:
            unfinished.write_text(content, encoding="utf-8")
        written.append(path)
    return written


def _with_fixed_spaces(value: Any) -> Any:
    """The text with a no-break space between a number and its percent sign."""
    return value.replace(" %", "\u00a0%") if type(value) is str else value


def _inline(stem: str, drawn: str) -> str:
    """SVG that HTML may contain: no prologue, no namespaces, which HTML implies, and ids that no other figure has."""
    drawn = drawn[drawn.index("<svg") :]
    drawn = re.sub(r"<metadata>.*?</metadata>", "", drawn, flags=re.DOTALL)
    drawn = re.sub(r'\s(xmlns(:\w+)?|version)="[^"]*"', "", drawn)
    drawn = re.sub(r'\bid="([^"]+)"', rf'id="{stem}-\1"', drawn)
    drawn = re.sub(r"url\(#([^)]+)\)", rf"url(#{stem}-\1)", drawn)
    return re.sub(r'(xlink:)?href="#([^"]+)"', rf'href="#{stem}-\2"', drawn)
