"""The files of a report: Markdown, HTML, JSON and figures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_memsink._files import written_whole
from lightning_memsink.reporting.document import Document, markdown
from lightning_memsink.reporting.html_page import write

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_document(document: Document, figures: Mapping[str, Figure], path: Path) -> list[Path]:
    """Writes Markdown at ``path``, JSON and HTML beside it, and the figures; each file is complete or not there.

    Args:
        document: the report.
        figures: by stem, as SVG and PNG into `files_folder`; empty leaves them out of the report.
        path: ``NAME.md``.

    Returns:
        The paths of ``NAME.json``, ``NAME.html`` and ``NAME.md``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures = {}
    if figures:
        from lightning_memsink.reporting.figures import save_all

        pictures = save_all(figures, files_folder(path))
    return write_pages(document, pictures, path)


def write_pages(document: Document, pictures: Mapping[str, str], path: Path) -> list[Path]:
    """Writes all of `write_document` but the figures: ``pictures`` are these as SVG, by stem."""
    with written_whole(path) as unfinished:
        text = markdown(document, files_folder(path).name if pictures else None)
        unfinished.write_text(text, encoding="utf-8")
    return [*write(document, pictures, path.parent, path.stem), path]


def files_folder(path: Path) -> Path:
    """The folder of the figures of the report at ``path``, and of what else belongs to it: ``NAME_files`` beside it."""
    return path.with_name(f"{path.stem}_files")
