"""``memsink audit``: tests a finished model for memorized texts."""

from __future__ import annotations

import sys
from argparse import ArgumentError
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]  # comes with jsonargparse
from jsonargparse import ArgumentParser

from lightning_memsink.cli.recipes import config_path, map_configs
from lightning_memsink.extraction.audit.answer_cache import AnswersFile
from lightning_memsink.extraction.audit.audit import audit
from lightning_memsink.extraction.audit.config import AuditConfig
from lightning_memsink.extraction.audit.model_loading import load
from lightning_memsink.extraction.audit.results import Audit
from lightning_memsink.extraction.audit.texts import read_texts
from lightning_memsink.reporting.audit_document import audit_document, draw_figures
from lightning_memsink.reporting.document import Document
from lightning_memsink.reporting.document_files import write_document

GROUP, OLD_GROUP = "probe", "ask"
"""The group of options of `AuditConfig`, ``--probe.units``, and its name in earlier versions, which is still read."""
CACHE_KEYS = ("prefix", "length", "p", "temperature", "top_k", "top_p")
"""Options that the cached results of a text depend on; the other options only evaluate results."""


def run(argv: Sequence[str]) -> int:
    """Audits a model, writes ``report.html``, ``report.json`` and ``report.md``, and prints the first page."""
    try:
        options = _parser().parse_args(_resolved(argv))
        config = AuditConfig(**vars(options.probe))
        _ = config.probe, config.rule  # raise for values out of range
        suspects, controls = (read_texts(Path(file)) for file in (options.suspects, options.controls))
        subject = load(Path(options.model), None if options.tokenizer is None else Path(options.tokenizer))
        header = {"model": subject.fingerprint, **{name: getattr(config, name) for name in CACHE_KEYS}}
        cache = AnswersFile(Path(options.out) / "answers.jsonl", header)
        steps = len(suspects) + len(controls) + min(config.closer, len(suspects))
        with _Progress(steps) as advance:
            result = audit(subject, suspects, controls, config, cache, advance)
    except (ArgumentError, ValueError, OSError, MemoryError) as error:
        raise SystemExit(f"memsink audit: {error}") from None
    document = audit_document(result, datetime.now(timezone.utc).isoformat(timespec="seconds"))
    print(_first_page(document))
    for path in _write(result, document, Path(options.out)):
        print(path)
    return 0


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="memsink audit",
        description="Tests which suspected texts a model has memorized, against controls that it was not trained on.",
        exit_on_error=False,
    )
    parser.add_argument("-c", "--config", action="config", help="a YAML file with these options, or a recipe's name")
    parser.add_argument("--model", type=str, required=True, help="a transformers folder, or a .gguf file")
    parser.add_argument("--tokenizer", type=str | None, default=None, help="a folder, if not that of the model")
    parser.add_argument("--suspects", type=str, required=True, help='JSONL: {"text": ..., "group": ...} a line')
    parser.add_argument("--controls", type=str, required=True, help="JSONL of texts that were not trained on")
    parser.add_argument("--out", type=str, default="memsink_audit", help="the folder of the report")
    parser.add_class_arguments(AuditConfig, GROUP)
    return parser


def _resolved(argv: Sequence[str]) -> list[str]:
    """The same command line with recipes replaced by their files, and the old name of the option group by its name."""
    old = f"--{OLD_GROUP}"
    return [
        f"--{GROUP}{word.removeprefix(old)}" if word == old or word.startswith((f"{old}.", f"{old}=")) else word
        for word in map_configs(argv, _config)
    ]


def _config(name: str) -> str:
    """The path of a config; or the content of one with the old name of the option group, under the group's name."""
    path = config_path(name)
    try:
        content: Any = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, OSError, UnicodeDecodeError):
        return path  # the parser refuses it in its own words
    if not isinstance(content, dict) or OLD_GROUP not in content:
        return path
    options = content.pop(OLD_GROUP) or {}
    content[GROUP] = {**options, **(content.get(GROUP) or {})}
    return str(yaml.safe_dump(content))


def _write(result: Audit, document: Document, folder: Path) -> list[Path]:
    """The files of the report, after they are written."""
    try:
        figures = draw_figures(result)
    except ImportError:
        print("There are no figures without matplotlib: pip install 'lightning-memsink[report]'", file=sys.stderr)
        figures = {}
    written = write_document(document, figures, folder / "report.md")
    if result.localized_units is not None:
        result.localized_units.sinks.save(folder / "sinks.safetensors")
        written.append(folder / "sinks.safetensors")
    return written


def _first_page(document: Document) -> str:
    answers = [f"{each.question} {each.state.capitalize()}. {each.words}" for each in document.answers]
    return "\n".join([document.title, "", *answers, *document.plain, ""])


class _Progress:
    """A progress bar on a terminal; elsewhere one line per tenth of the texts."""

    def __init__(self, total: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("probing"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
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
            print(f"probed {self.done} of {self.total} texts", file=sys.stderr, flush=True)

    def __exit__(self, *_: object) -> None:
        self.bar.stop()
