"""The files of a run's report: Markdown, HTML, JSON, figures, the ledger as Parquet, and the localized units.

Where samples have names, all of them are written twice. Names may be personal data, so loggers keep the files without.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_warn

from lightning_memsink._files import written_whole
from lightning_memsink.localization.sinks import Sinks
from lightning_memsink.reporting.document import Document
from lightning_memsink.reporting.document_files import files_folder, write_document, write_pages
from lightning_memsink.reporting.findings import Findings
from lightning_memsink.reporting.parquet import write_ledger
from lightning_memsink.reporting.run_document import run_document
from lightning_memsink.reporting.run_figures import draw_figures
from lightning_memsink.samples.control_table import ControlTable


def write_report(findings: Findings, path: Path) -> str:
    """Writes Markdown at ``path``, HTML and JSON beside it, and figures; each file is complete or not there.

    Without matplotlib it warns and writes no figures. A copy without names that an earlier run has left is removed.

    Returns:
        A line that names the files.
    """
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    document, copy = run_document(findings, date), _copy_without_names(path)
    try:
        figures = draw_figures(findings)
    except ImportError:
        rank_zero_warn("RunReport draws no figures without matplotlib: pip install 'lightning-memsink[report]'.")
        figures = {}
    if copy.parent.exists():
        shutil.rmtree(copy.parent)
    _, page, _ = write_document(document, figures, path)
    if findings.has_names:
        _write_copy(run_document(replace(findings, shows_names=False), date), figures, path, copy)
    return f"Report: {page} (for a browser), {path}"


def write_tables(findings: Findings, controls: ControlTable, sinks: Sinks | None, path: Path) -> list[str]:
    """Writes the ledger as Parquet and the localized units, if any, into the folder of the report at ``path``.

    Returns:
        A line per kind of file.
    """
    folder, copy = files_folder(path), files_folder(_copy_without_names(path))
    for each in [folder, copy] if findings.has_names else [folder]:
        write_ledger(each / "ledger", findings.table, controls, findings.flags, with_names=each is folder)
        if sinks is not None:
            sinks.save(each / "sinks.safetensors")
    lines = [f"Ledger: {folder / 'ledger'} (Parquet)"]
    if sinks is not None:
        lines.append(f"Units: {folder / 'sinks.safetensors'} (lightning_memsink.Sinks.load)")
    if findings.has_names:
        lines.append(f"All of these without the samples' names: {copy.parent}")
    return lines


def report_files(path: Path) -> list[Path]:
    """What loggers keep of the report at ``path``: three files and their folder, without names of samples."""
    copy = _copy_without_names(path)
    if copy.parent.exists():
        path = copy
    return [*(path.with_suffix(suffix) for suffix in (".md", ".html", ".json")), files_folder(path)]


def _copy_without_names(path: Path) -> Path:
    """The path of the copy without names of the report at ``path``, in a folder of its own."""
    return files_folder(path) / "without_names" / path.name


def _write_copy(document: Document, stems: Collection[str], path: Path, copy: Path) -> None:
    """Writes a document at ``copy`` with the figures of the report at ``path``, which have these ``stems``."""
    origin, folder = files_folder(path), files_folder(copy)
    folder.mkdir(parents=True, exist_ok=True)
    for stem in stems:
        for name in (f"{stem}.svg", f"{stem}.png"):
            with written_whole(folder / name) as unfinished:
                shutil.copyfile(origin / name, unfinished)
    write_pages(document, {stem: (folder / f"{stem}.svg").read_text(encoding="utf-8") for stem in stems}, copy)
