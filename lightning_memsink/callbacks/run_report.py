"""The report at the end of training: a summary on the terminal, and files with figures."""

from __future__ import annotations

from pathlib import Path
from textwrap import fill

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_memsink.ledger import Ledger
from lightning_memsink.reporting.findings import Findings
from lightning_memsink.reporting.loggers import logged_run
from lightning_memsink.reporting.provenance import settings_of, versions
from lightning_memsink.reporting.run_files import report_files, write_report, write_tables
from lightning_memsink.reporting.run_summary import summary


class RunReport(Callback):
    """Prints at the end of a successful training what was memorized, and writes a report with figures.

    Args:
        path: the Markdown file. Beside it are written one self-contained HTML file and the same as JSON, and a folder
            ``NAME_files`` with the figures and the ledger (Parquet). A W&B run keeps them as an artifact, without names
            of samples. None writes no file.
    """

    def __init__(self, path: str | Path | None = "memsink_report.md") -> None:
        self.path = None if path is None else Path(path)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        ledger = Ledger.of(trainer)
        ledger.require(Ledger.losses, Ledger.controls, Ledger.flags, Ledger.onset, Ledger.history)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Not in on_fit_end: the last row of the history is written there.
        if stage != "fit" or not trainer.is_global_zero:
            return
        ledger = Ledger.of(trainer)
        if ledger.get(Ledger.losses) is None:  # the Tuner leaves a fit before it starts, as if it had succeeded
            return
        findings = Findings(
            ledger.losses,
            ledger.flags,
            ledger.onset,
            ledger.history,
            ledger.get(Ledger.attribution),
            ledger.interventions,
            ledger.get(Ledger.certificate),
            ledger.get(Ledger.extraction),
            settings_of(trainer.callbacks),  # type: ignore[attr-defined]
            versions(),
            ledger.get(Ledger.budget),
            _logged_runs(trainer),
        )
        lines = list(findings.logged_runs)
        if self.path is not None:
            try:
                written = [
                    write_report(findings, self.path),
                    *write_tables(findings, ledger.controls, ledger.get(Ledger.sinks), self.path),
                ]
                lines.append("\n".join(written))
                _keep(trainer, report_files(self.path))
            except Exception as error:  # a full disk, say: training is over and must not end in this error
                rank_zero_warn(f"RunReport can't write {self.path}: {error}. The summary below is all of the report.")
        try:
            _print("\n\n".join([summary(findings), *lines]))
        except OSError as error:  # the reader of a pipe has gone: train.py | head
            rank_zero_warn(f"RunReport can't print its summary: {error}. Files are written to {self.path}.")


def _logged_runs(trainer: Trainer) -> list[str]:
    """How to open the run of each logger. A logger that fails is left out: `LiveCurves` has warned of it."""
    lines = []
    for logger in trainer.loggers:
        try:
            line = logged_run(logger).how_to_open()
        except Exception:
            continue
        if line is not None:
            lines.append(line)
    return lines


def _keep(trainer: Trainer, files: list[Path]) -> None:
    """Keeps the files with the run of every logger that can."""
    for logger in trainer.loggers:
        try:
            logged_run(logger).keep(files)
        except Exception as error:  # a logger must not end the training
            rank_zero_warn(f"{type(logger).__name__} could not keep the report: {type(error).__name__}: {error}")


def _print(text: str) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console()
    if console.is_terminal:
        text = "\n".join(_wrapped(line, console.width) for line in text.splitlines())
    styled = Text(text)
    styled.highlight_regex(r"(?m)^[A-Z][a-z ]+$", "bold")  # the titles of the paragraphs
    with console.capture() as captured:  # rich itself would end the process if the reader of a pipe has gone
        console.print()  # a progress bar may still be in this line
        console.print(styled, soft_wrap=True)
    try:
        print(captured.get(), end="", flush=True)
    except UnicodeEncodeError:  # the terminal's encoding has no dash
        print(captured.get().encode("ascii", "replace").decode(), end="", flush=True)


def _wrapped(line: str, width: int) -> str:
    """The line wrapped at ``width``. Paths and commands are not broken, so that they can be copied."""
    return fill(line, width, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
