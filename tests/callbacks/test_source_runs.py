"""Sources of samples through whole runs: recorded, reported, logged, budgeted, resumed."""

import json
import math
import re
import warnings

import pyarrow.parquet as pq
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from lightning_memsink import LiveCurves, LossTracker, RunReport, SampleGradientMask, memsink
from lightning_memsink.examples.resumable import EpochShuffledSampler
from lightning_memsink.ledger import Ledger
from lightning_memsink.samples.hashing import content_ids
from tests.support import packed
from tests.support.small_runs import CANARIES, TRAIN, Rows, fit, watch

LABELS = ["web", "books"]
"""Of the rows of the chain, in turn; canaries are of the source "customer a/b"."""
CANARY = "customer a/b"


class Labelled(Rows):
    def __getitem__(self, index):
        is_canary = index >= 200
        return {**super().__getitem__(index), "source": CANARY if is_canary else LABELS[index % 2]}


def loader(rows=Labelled, tokens=TRAIN):
    return DataLoader(rows(tokens), 16, sampler=EpochShuffledSampler(len(tokens)))


def run(callbacks, **options):
    return fit(callbacks, **{"train": loader(), "max_epochs": 4, **options})[0]


def label_of(table, tokens):
    rows = table.index.find(content_ids({"input_ids": tokens}, len(tokens)))
    return [table.source_names.label(code) for code in table.source[rows].tolist()]


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    budget = {"web": 0.05, CANARY: 0.001, "never seen": 0.5, "default": 0.2}
    callbacks = [*watch(), LiveCurves(budget=budget), RunReport(folder / "report.md")]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = run(callbacks, logger=CSVLogger(folder, name="logs"))
    return trainer, folder, [str(warning.message) for warning in caught]


def test_each_sample_has_the_source_of_its_first_visit(reported):
    table = Ledger.of(reported[0]).losses
    assert label_of(table, CANARIES) == [CANARY] * 4
    assert label_of(table, TRAIN[:200]) == LABELS * 100
    assert table.source_names.with_several == 0


def test_the_report_has_a_row_for_each_source_and_each_budget(reported):
    _, folder, _ = reported
    numbers = json.loads((folder / "report.json").read_text())["numbers"]
    sources = {row["source"]: row for row in numbers["sources"]}
    assert set(sources) == {*LABELS, CANARY}
    canaries = sources[CANARY]
    assert (canaries["samples"], canaries["memorized"], canaries["share"]) == (4, 4, 1.0)
    assert canaries["exposures"] == 4 * 32 * 4 and canaries["tokens"] == 4 * 10 and canaries["onset_step"] > 0
    assert canaries["bits_low"] > 0
    bits = [row["bits"] for row in numbers["sources"]]
    assert bits == sorted(bits, reverse=True)
    budgets = {row["source"]: row for row in numbers["budget"]}
    states = {source: row["state"] for source, row in budgets.items()}
    assert states == {CANARY: "crossed", "web": "undecided", "books": "undecided", "never seen": "undecided"}
    assert all("their gaps say so together" in budgets[source]["reason"] for source in LABELS), (
        "four epochs of 200 rows"
    )
    assert all(sources[source]["bits"] > 400 and sources[source]["memorized"] == 0 for source in LABELS)
    assert budgets[CANARY]["crossed_at"] > 0 and budgets["web"]["crossed_at"] is None
    page = (folder / "report.html").read_text()
    assert "<h2" in page and "Sources" in page and CANARY in page
    assert r"customer a\/b" in (folder / "report.md").read_text()


def test_a_crossing_is_warned_of_once_and_names_that_no_sample_has_are_said(reported):
    said = [message for message in reported[2] if "Over budget" in message]
    by_gaps = (
        r"by the gaps of its 4 measured samples together, at least \d+ % of the source customer a/b are memorized, "
    )
    assert len(said) == 1 and re.search(by_gaps + r"where 0\.1 % may be, since step \d+\.", said[0])
    unknown = [message for message in reported[2] if "No sample of this run has the source 'never seen'" in message]
    assert len(unknown) == 1


def test_loggers_get_series_of_sources_with_labels_that_can_be_names_of_files(reported):
    trainer, _, _ = reported
    last = Ledger.of(trainer).history[-1]
    assert last["source/customer_a_b/share"] == 1.0 and last["source/customer_a_b/bits"] > 50
    assert {"source/web/share", "source/books/bits"} <= last.keys()
    assert all(math.isfinite(value) for value in last.values())
    with open(f"{trainer.logger.log_dir}/metrics.csv") as file:
        assert "memsink/source/customer_a_b/share" in file.read()


def test_the_ledger_on_disk_has_labels(reported):
    _, folder, _ = reported
    written = pq.read_table(folder / "report_files" / "ledger" / "samples.parquet")
    assert sorted(set(written["source"].to_pylist())) == sorted([*LABELS, CANARY])


def test_a_run_without_labels_has_no_section_and_no_column():
    table = Ledger.of(fit(watch(), max_epochs=1)[0]).losses
    assert "source" not in table.columns and len(table.source_names) == 0


def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path):
    def facts(trainer):
        table = Ledger.of(trainer).losses
        return repr((table.state_dict(), table.source_names.state_dict(), Ledger.of(trainer).history))

    def crew():
        return [*watch(), LiveCurves(budget={CANARY: 0.001})]

    with pytest.warns(UserWarning, match="Over budget"):
        whole = run(crew())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        half = run(crew(), max_epochs=2)
    half.save_checkpoint(tmp_path / "half.ckpt")
    callbacks = crew()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        resumed = run(callbacks, ckpt_path=tmp_path / "half.ckpt")
    assert facts(resumed) == facts(whole)
    assert callbacks[-1].budget.crossed_at == Ledger.of(whole).budget.crossed_at


def test_a_checkpoint_of_a_version_without_sources_is_resumed(tmp_path):
    first = fit(watch(), max_epochs=1)[0]
    first.save_checkpoint(tmp_path / "old.ckpt")
    content = torch.load(tmp_path / "old.ckpt", weights_only=False)
    (key,) = [key for key in content["callbacks"] if "LossTracker" in key]
    del content["callbacks"][key]["sources"]
    torch.save(content, tmp_path / "old.ckpt")
    table = Ledger.of(run(watch(), max_epochs=2, ckpt_path=tmp_path / "old.ckpt")).losses
    assert label_of(table, CANARIES) == [CANARY] * 4


def test_labels_that_fit_nothing_are_said_once_and_training_goes_on():
    class Broken(Labelled):
        def __getitem__(self, index):
            return {**super().__getitem__(index), "source": [1.5] * 3}

    with pytest.warns(UserWarning, match=r"batch\['source'\] holds a list of 3") as caught:
        table = Ledger.of(run(watch(), train=loader(Broken), max_epochs=1)).losses
    assert len([w for w in caught if "batch['source']" in str(w.message)]) == 1
    assert "source" not in table.columns and len(table) > 0


def test_a_source_that_changes_is_said_once_and_the_first_one_stays():
    class Changing(Labelled):
        def __getitem__(self, index):
            row = super().__getitem__(index)
            return {**row, "source": f"copy {index // 4 % 2}"} if index >= 200 else row

    with pytest.warns(UserWarning, match="come with more than one source") as caught:
        table = Ledger.of(run(watch(), train=loader(Changing), max_epochs=2)).losses
    assert len([w for w in caught if "more than one source" in str(w.message)]) == 1
    assert table.source_names.with_several == 4
    assert set(label_of(table, CANARIES)) <= {"copy 0", "copy 1"}


@pytest.mark.parametrize("source", [lambda batch: ["x"] * len(batch["input_ids"]), "licence", None])
def test_a_function_another_key_or_none(source):
    class Licensed(Labelled):
        def __getitem__(self, index):
            return {**super().__getitem__(index), "licence": "mit"}

    table = Ledger.of(run(watch(source=source), train=loader(Licensed), max_epochs=1)).losses
    assert table.source_names.labels == ([] if source is None else ["mit"] if source == "licence" else ["x"])


class Raising(CSVLogger):
    def log_metrics(self, metrics, step=None):
        if any(name.startswith("memsink/") for name in metrics):
            raise OSError("the disk is full")


def test_a_logger_that_raises_hides_no_crossing(tmp_path):
    with pytest.warns(UserWarning) as caught:
        run([*watch(), LiveCurves(budget={"default": 0.01})], logger=Raising(tmp_path))
    messages = [str(warning.message) for warning in caught]
    assert any("Over budget" in message for message in messages)
    assert any("the disk is full" in message for message in messages)


def test_a_budget_that_is_none_is_refused_where_it_is_written():
    with pytest.raises(ValueError, match="from 0 to 1"):
        LiveCurves(budget={"a": 1.5})


LAYOUTS = ["unpacked", *packed.LAYOUTS]
NAMES = ["web", "books", "code"]


class LabelledLayout:
    """Documents in a layout, each with a label by its length; or integers by token."""

    def __init__(self, layout, by_token):
        self.layout, self.by_token = layout, by_token

    def __call__(self, documents):
        batch = packed.laid_out(self.layout, documents)
        labels = [len(each) % 3 for each in documents]
        if not self.by_token:
            return {**batch, "source": [NAMES[label] for label in labels]}
        tokens = packed.laid_out(self.layout, [torch.full_like(each, len(each) % 3) for each in documents])["input_ids"]
        return {**batch, "source": torch.where(batch["attention_mask"] > 0, tokens, -1)}


@pytest.mark.parametrize("by_token", [False, True])
def test_documents_have_the_same_sources_in_every_layout(by_token):
    rows = packed.texts(24, seed=1)
    found = []
    for layout in LAYOUTS:
        train = DataLoader(rows, 8, collate_fn=LabelledLayout(layout, by_token))
        callbacks = [LossTracker(families=False)]
        trainer = fit(
            callbacks, packed.PackedGPT(), train=train, controls="none", max_epochs=2, val_check_interval=None
        )[0]
        table = Ledger.of(trainer).losses
        labels = {
            id: table.source_names.label(code)
            for id, code in zip(table.ids.tolist(), table.source.tolist(), strict=True)
        }
        found.append(labels)
        assert set(labels.values()) == ({"0", "1", "2"} if by_token else set(NAMES)), layout
        assert len(labels) == 24
    assert all(labels == found[0] for labels in found)


def test_the_preset_takes_sources_and_budgets():
    callbacks = memsink(SampleGradientMask(sources=["a"]), budget={"a": 0.001, "default": 0.01}, source="licence")
    assert callbacks[2].budget.shares == {"a": 0.001, "default": 0.01}
    with pytest.raises(ValueError, match=r"budget\['a'\]"):
        memsink(budget={"a": -1})
