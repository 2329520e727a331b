"""The report at the end of training: a summary on the terminal, and a file with figures."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_memsink._files import written_whole
from lightning_memsink.ledger import Ledger
from lightning_memsink.reporting.html_page import write
from lightning_memsink.reporting.loggers.wandb import how_to_open, keep_files
from lightning_memsink.reporting.parquet import write_ledger
from lightning_memsink.reporting.provenance import settings_of, versions
from lightning_memsink.reporting.run_document import run_document
from lightning_memsink.reporting.run_summary import Findings, markdown, summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class RunReport(Callback):
    """Tells at the end of a successful training what was memorized, and writes it down with figures.

    Args:
        path: the Markdown file; one HTML file that stands alone, and the same as JSON, are written beside it, and into
            a directory of its name with `_files` at the end the figures and the ledger (Parquet). A W&B run keeps them
            as an artifact. None writes no file.
    """

    def __init__(self, path: str | Path | None = "memsink_report.md") -> None:
        self.path = None if path is None else Path(path)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        ledger = Ledger.of(trainer)
        ledger.require(Ledger.losses, Ledger.controls, Ledger.flags, Ledger.onset, Ledger.history)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Not in on_fit_end: there the last row of the history is written.
        if stage != "fit" or not trainer.is_global_zero:
            return
        ledger = Ledger.of(trainer)
        if not ledger.get(Ledger.losses) is not None:  # the Tuner leaves a fit before it starts, as if it had succeeded
            return
        attribution = ledger.get(Ledger.attribution)
        certificate = ledger.get(Ledger.certificate)
        extraction = ledger.get(Ledger.extraction)
        findings = Findings(
            ledger.losses,
            ledger.flags,
            ledger.onset,
            ledger.history,
            attribution,
            ledger.interventions,
            certificate,
            extraction,
        )
        opening = _opening(trainer)
        if self.path is not None:
            try:
                settings = settings_of(trainer.callbacks)  # type: ignore[attr-defined]
                written = write_report(findings, self.path, opening, settings)
                beside = _beside(self.path)
                write_ledger(beside / "ledger", ledger.losses, ledger.controls, ledger.flags)
                written += f"\nLedger: {beside / 'ledger'} (Parquet)"
                if ledger.get(Ledger.sinks) is not None and ledger.sinks is not None:
                    ledger.sinks.save(beside / "sinks.safetensors")
                    written += f"\nUnits: {beside / 'sinks.safetensors'} (lightning_memsink.Sinks.load)"
                opening = [*opening, written]
                _keep(trainer, [*(self.path.with_suffix(kind) for kind in (".md", ".html", ".json")), beside])
            except Exception as error:  # a full disk, say: training is over and must not end in an error of ours
                rank_zero_warn(f"RunReport can't write {self.path}: {error}. The summary below is all of it.")
        try:
            _print("\n\n".join([summary(findings), *opening]))
        except OSError as error:  # nobody reads any more: train.py | head
            rank_zero_warn(f"RunReport can't print its summary: {error}. Files are written to {self.path}.")


def write_report(findings: Findings, path: Path, opening: list[str], settings: Mapping[str, Any]) -> str:
    """Markdown, HTML, JSON and figures, each complete or not there; where they are. Without matplotlib no figures."""
    figures = _beside(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = _draw(findings)
    pictures = {}
    if drawn:
        from lightning_memsink.reporting.figures import save_all

        pictures = save_all(drawn, figures)
    with written_whole(path) as unfinished:
        unfinished.write_text(markdown(findings, figures.name if drawn else None, opening), encoding="utf-8")
    document = run_document(findings, settings, versions(), datetime.now(timezone.utc).isoformat(timespec="seconds"))
    _, page = write(document, pictures, path.parent, path.stem)
    return f"Report: {page} (for a browser), {path}"


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.stem}_files")


def _draw(findings: Findings) -> dict[str, Figure]:
    """The figures by file stem; none without evaluations, and none without matplotlib."""
    if not findings.flags.evaluations:
        return {}
    try:
        from lightning_memsink.reporting.figures import gap_distribution, loss_by_rung, verdict_map
    except ImportError:
        rank_zero_warn("RunReport draws no figures without matplotlib: pip install 'lightning-memsink[report]'.")
        return {}
    flags, table, unit = findings.flags, findings.table, findings.unit
    known, threshold = len(flags.verdict), findings.evaluation.threshold
    gaps = flags.gap.float()
    drawn = {
        "loss_by_rung": loss_by_rung(findings.history, findings.onset, unit),
        "gap_distribution": gap_distribution(gaps[gaps.isfinite()], flags.null_gaps.float(), threshold, unit),
        "verdict_map": verdict_map(table.early_loss[:known].float(), gaps, flags.verdict, threshold, unit),
    }
    if findings.interventions:
        from lightning_memsink.reporting.mitigation_figure import acting

        drawn["mitigation"] = acting(findings.history, unit)
    if findings.attribution is not None:
        from lightning_memsink.reporting.layer_heat_map import layer_heat_map

        seen = findings.attribution
        drawn["layers"] = layer_heat_map(seen.rows, list(seen.units), seen.blocks)
    return drawn


def _opening(trainer: Trainer) -> list[str]:
    """How to open what was logged; a logger that can't tell is passed over."""
    lines = []
    for logger in trainer.loggers:
        try:
            line = how_to_open(logger)
        except Exception:  # it failed before, and LiveCurves has said so
            continue
        if line is not None:
            lines.append(line)
    return lines


def _keep(trainer: Trainer, files: list[Path]) -> None:
    """With every logger that keeps files."""
    for logger in trainer.loggers:
        try:
            keep_files(logger, files)
        except Exception as error:  # no logger is worth the end of a training
            rank_zero_warn(f"{type(logger).__name__} could not keep the report: {type(error).__name__}: {error}")


def _print(text: str) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console()
    if console.is_terminal:
        text = "\n".join(_wrapped(line, console.width) for line in text.splitlines())
    told = Text(text)
    told.highlight_regex(r"(?m)^[A-Z][a-z ]+$", "bold")  # the questions that head the paragraphs
    with console.capture() as said:  # printed by rich, it would end the process when nobody reads any more
        console.print()  # a progress bar may still stand in the line
        console.print(told, soft_wrap=True)
    try:
        print(said.get(), end="", flush=True)
    except UnicodeEncodeError:  # a terminal that knows no dash
        print(said.get().encode("ascii", "replace").decode(), end="", flush=True)


def _wrapped(line: str, width: int) -> str:
    """Paths and commands stay whole, to be copied."""
    return fill(line, width, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
