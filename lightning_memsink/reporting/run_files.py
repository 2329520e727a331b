"""The files of a run's report: Markdown, HTML, JSON, figures, the ledger as Parquet, and the localized units."""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_warn

from lightning_memsink.localization.sinks import Sinks
from lightning_memsink.reporting.document_files import files_folder, write_document
from lightning_memsink.reporting.findings import Findings
from lightning_memsink.reporting.parquet import write_ledger
from lightning_memsink.reporting.run_document import run_document
from lightning_memsink.reporting.run_figures import draw_figures
from lightning_memsink.samples.control_table import ControlTable


def write_report(findings: Findings, path: Path) -> str:
    """Writes Markdown at ``path``, HTML and JSON beside it, and figures; each file is complete or not there.

    Without matplotlib it warns and writes no figures.

    Returns:
        A line that names the files.
    """
    document = run_document(findings, datetime.now(timezone.utc).isoformat(timespec="seconds"))
    try:
        figures = draw_figures(findings)
    except ImportError:
        rank_zero_warn("RunReport draws no figures without matplotlib: pip install 'lightning-memsink[report]'.")
        figures = {}
    _, page, _ = write_document(document, figures, path)
    return f"Report: {page} (for a browser), {path}"


def write_tables(findings: Findings, controls: ControlTable, sinks: Sinks | None, path: Path) -> list[str]:
    """Writes the ledger as Parquet and the localized units, if any, into the folder of the report at ``path``.

    Returns:
        A line per kind of file.
    """
    folder = files_folder(path)
    write_ledger(folder / "ledger", findings.table, controls, findings.flags)
    lines = [f"Ledger: {folder / 'ledger'} (Parquet)"]
    if sinks is not None:
        sinks.save(folder / "sinks.safetensors")
        lines.append(f"Units: {folder / 'sinks.safetensors'} (lightning_memsink.Sinks.load)")
    return lines


def report_files(path: Path) -> list[Path]:
    """Everything that belongs to the report at ``path``: three files and their folder."""
    return [*(path.with_suffix(suffix) for suffix in (".md", ".html", ".json")), files_folder(path)]
