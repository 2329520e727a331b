"""``memsink audit``: a model that was trained without us."""

from __future__ import annotations

import sys
from argparse import ArgumentError
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

from jsonargparse import ArgumentParser

from lightning_memsink._files import written_whole
from lightning_memsink.cli.recipes import config_path
from lightning_memsink.extraction.audit.answer_cache import AnswersFile
from lightning_memsink.extraction.audit.audit import Audit, AuditConfig, audit
from lightning_memsink.extraction.audit.model_loading import load
from lightning_memsink.extraction.audit.texts import read_texts
from lightning_memsink.reporting.audit_document import audit_document, picture_of
from lightning_memsink.reporting.document import Document, markdown

ASKED = ("prefix", "length", "p", "temperature", "top_k", "top_p")
"""Settings that answers depend on; the others only judge them."""


def run(argv: Sequence[str]) -> int:
    """Audits, writes ``report.html``, ``report.json`` and ``report.md``, and tells the first page."""
    before = ["", *argv[:-1]]
    words = [config_path(word) if flag in ("-c", "--config") else word for flag, word in zip(before, argv, strict=True)]
    try:
        options = _parser().parse_args(words)
        settings = AuditConfig(**vars(options.ask))
        _ = settings.scheme, settings.rule  # raise for what can't be asked
        suspects, controls = (read_texts(Path(each)) for each in (options.suspects, options.controls))
        subject = load(Path(options.model), None if options.tokenizer is None else Path(options.tokenizer))
        about = {"model": subject.fingerprint, **{name: getattr(settings, name) for name in ASKED}}
        kept = AnswersFile(Path(options.out) / "answers.jsonl", about)
        looked_at = min(settings.closer, len(suspects))
        with _progress(len(suspects) + len(controls) + looked_at) as advance:
            found = audit(subject, suspects, controls, settings, kept, advance)
    except (ArgumentError, ValueError, OSError, MemoryError) as error:
        raise SystemExit(f"memsink audit: {error}") from None
    document = audit_document(found, datetime.now(timezone.utc).isoformat(timespec="seconds"))
    print(_first_page(document))
    for path in _write(found, document, Path(options.out)):
        print(path)
    return 0


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="memsink audit",
        description="What a model knows of suspected texts, against controls that it was surely not trained on.",
        exit_on_error=False,
    )
    parser.add_argument("-c", "--config", action="config", help="a YAML file with these options, or a recipe's name")
    parser.add_argument("--model", type=str, required=True, help="a transformers folder, or a .gguf file")
    parser.add_argument("--tokenizer", type=str | None, default=None, help="a folder, if not that of the model")
    parser.add_argument("--suspects", type=str, required=True, help='JSONL: {"text": ..., "group": ...} a line')
    parser.add_argument("--controls", type=str, required=True, help="JSONL of texts that were not trained on")
    parser.add_argument("--out", type=str, default="memsink_audit", help="the folder of the report")
    parser.add_class_arguments(AuditConfig, "ask")
    return parser


def _write(found: Audit, document: Document, folder: Path) -> list[Path]:
    from lightning_memsink.reporting.html_page import write

    try:
        figures = picture_of(found)
    except ImportError:
        print("There are no figures without matplotlib: pip install 'lightning-memsink[report]'", file=sys.stderr)
        figures = {}
    files, pictures = folder / "report_files", {}
    if figures:
        from lightning_memsink.reporting.figures import save_all

        pictures = save_all(figures, files)
    written = write(document, pictures, folder)
    if found.located is not None:
        found.located.sinks.save(folder / "sinks.safetensors")
        written = [*written, folder / "sinks.safetensors"]
    path = folder / "report.md"
    with written_whole(path) as unfinished:
        unfinished.write_text(markdown(document, files.name if figures else None), encoding="utf-8")
    return [*written, path]


def _first_page(document: Document) -> str:
    answers = [f"{each.question} {each.state.capitalize()}. {each.words}" for each in document.answers]
    return "\n".join([document.title, "", *answers, *document.plain, ""])


class _progress:
    """A bar on a terminal; elsewhere a line each tenth."""

    def __init__(self, total: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("asking"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.bar, self.total, self.done = Progress(*columns, transient=True), total, 0

    def __enter__(self):  # type: ignore[no-untyped-def]
        self.bar.start()
        self.task = self.bar.add_task("", total=self.total)
        return self.advance

    def advance(self, done: int) -> None:
        self.bar.advance(self.task, done)
        tenths = 10 * self.done // max(1, self.total)
        self.done += done
        if not self.bar.console.is_terminal and 10 * self.done // max(1, self.total) > tenths:
            print(f"asked for {self.done} of {self.total}", file=sys.stderr, flush=True)

    def __exit__(self, *_: object) -> None:
        self.bar.stop()
