"""What loggers show of sources: series with clean names, a table at the end, and an alert for each crossing in W&B."""

import math
from types import SimpleNamespace

import pytest
import torch
import wandb

from lightning_memsink.callbacks.live_curves import LiveCurves
from lightning_memsink.detection.source_summary import summarize_sources
from lightning_memsink.detection.verdicts import Verdict
from lightning_memsink.reporting.loggers.wandb import SafeWandbLogger
from lightning_memsink.reporting.scalars import source_series
from lightning_memsink.reporting.source_section import source_rows
from tests.support.reported_runs import QUIET, Writer, fit
from tests.support.sourced import sourced
from tests.support.wandb_reader import read_run

V = Verdict


class SourcedWriter(Writer):
    """The first ten samples of the made-up ledger are of a customer, with all that is memorized."""

    def evaluate(self, trainer):
        super().evaluate(trainer)
        table = self.made.table
        labels = ["customer"] * 10 + ["web/crawl 1"] * (len(table) - 10)
        table.write("source", torch.arange(len(table)), table.source_names.codes(labels))


@QUIET
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:Over budget", "ignore:No sample of this run")
def test_wandb_has_series_a_table_and_one_alert(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    wandb.teardown()
    curves = LiveCurves(budget={"customer": 0.1, "default": 0.9})
    fit([curves, SourcedWriter()], SafeWandbLogger(offline=True, save_dir=tmp_path))
    wandb.finish()
    wandb.teardown()
    run = read_run(tmp_path)
    (alert,) = [alert for alert in run.alerts if "budget" in alert["title"]]
    assert "source customer are memorized, 3 of 8, where 10 % may be" in alert["text"]
    assert run.series("memsink/source/customer/share")[-1][1] == pytest.approx(3 / 8)
    assert len(run.series("memsink/source/web_crawl_1/bits")) == len(curves.history)
    rows = run.table("memsink/sources")
    assert [row["source"] for row in rows] == ["customer", "web/crawl 1"]
    assert (rows[0]["memorized"], rows[0]["measured"], rows[1]["onset_step"]) == (3, 8, None)


def test_at_most_twenty_sources_have_series_the_largest_and_names_stay_apart():
    counts = {f"s{n}": {V.LEARNED: n + 1} for n in range(50)}
    table, flags = sourced({**counts, "a b": {V.LEARNED: 90}, "a/b": {V.LEARNED: 80}, "é" * 99: {V.LEARNED: 70}})
    series = source_series(table, summarize_sources(table, flags))
    names = {name.split("/")[1] for name in series}
    assert len(names) == 20 and len(series) == 40
    assert {"a_b", "a_b_51", "_", "s49", "s33"} <= names and "s32" not in names


def test_sources_that_nothing_was_measured_of_have_no_series():
    table, flags = sourced({"a": {V.UNSEEN: 3}})
    assert source_series(table, summarize_sources(table, flags)) == {}


def test_rows_are_sorted_by_bits_and_limited():
    table, flags = sourced({"a": {V.LEARNED: 5}, "b": {V.MEMORIZED: 5}, "c": {V.UNSEEN: 5}})
    rows = source_rows(table, flags, {})
    assert [row["source"] for row in rows] == ["b", "a", "c"] and math.isnan(rows[2]["bits"])
    assert rows[0]["onset_step"] == 40 and rows[1]["onset_step"] is None
    assert len(source_rows(table, flags, {}, most=1)) == 1


@pytest.mark.parametrize("label", ["a|b", "<script>alert(1)</script>", "*bold*", "two\nlines", "x" * 500])
def test_labels_are_shown_as_they_are_and_break_no_page(label, tmp_path):
    from html5lib import HTMLParser

    from lightning_memsink.reporting.document_files import write_document
    from lightning_memsink.reporting.findings import Findings
    from lightning_memsink.reporting.run_document import run_document

    table, flags = sourced({label: {V.MEMORIZED: 3}, "b": {V.LEARNED: 3}})
    document = run_document(Findings(table, flags, None, []), "2026-01-01T00:00:00+00:00")
    write_document(document, {}, tmp_path / "report.md")
    page = (tmp_path / "report.html").read_text()
    HTMLParser(strict=True).parse(page)
    assert "<script>alert" not in page
    lines = (tmp_path / "report.md").read_text().splitlines()
    (head,) = [n for n, line in enumerate(lines) if line.startswith("| source | samples")]
    assert all(line.replace("\\|", "").count("|") == 10 for line in lines[head : head + 4])
    assert SimpleNamespace(**document.numbers).sources[0]["source"] == label
