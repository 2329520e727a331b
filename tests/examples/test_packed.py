"""The recipe of packed text: what it trains on, and that it finds the source that is over its budget."""

import json
import sys
from pathlib import Path

import pytest
import torch

from lightning_memsink.cli import main
from lightning_memsink.examples.corpora import python_code, python_docs
from lightning_memsink.examples.packed import Document, PackedCausalLM, PackedSources, packed
from lightning_memsink.samples.sample_ids import SampleIds
from lightning_memsink.samples.source_labels import source_labels


def document(length: int, source: str = "a", first: int = 1) -> Document:
    return Document(torch.arange(first, first + length), source)


def test_a_document_is_put_into_the_first_row_with_room_for_it():
    batch = packed([document(5), document(6, "b", 20), document(3, "c", 40)], 8)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 40, 41, 42], [20, 21, 22, 23, 24, 25, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2], [0, 1, 2, 3, 4, 5, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 2, 3, 4, 5, -100, 41, 42], [-100, 21, 22, 23, 24, 25, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1] * 8, [1] * 6 + [0] * 2]
    assert batch["source"] == [["a", "c"], ["b"]]


def test_no_documents_make_no_rows():
    assert packed([], 8)["input_ids"].shape == (0, 8)


def test_a_document_longer_than_a_row_is_said():
    with pytest.raises(ValueError, match="A document of 9 tokens does not fit a row of 8"):
        packed([document(9)], 8)


def test_documents_of_a_row_are_kept_apart():
    """The loss of two packed documents is that of both alone, by their numbers of targets."""
    model = PackedCausalLM(n_layer=1, n_embd=16, n_head=2, vocab_size=64, context=16).eval()
    both, one, other = (packed(some, 16) for some in ([document(6), document(9, first=9)], [document(6)],
                                                      [document(9, first=9)]))  # fmt: skip
    assert len(both["input_ids"]) == 1
    losses = [float(model._loss(batch).detach()) for batch in (both, one, other)]
    assert losses[0] == pytest.approx((5 * losses[1] + 8 * losses[2]) / 13, abs=1e-6)


@pytest.fixture(scope="module")
def part_of_python():
    return {"python_docs": python_docs()[::4], "python_code": python_code()[::2]}


@pytest.fixture
def here(tmp_path, monkeypatch, part_of_python):
    """A folder for the report, and a part of Python's texts, so that the tokenizer is soon trained."""
    for name, texts in part_of_python.items():
        monkeypatch.setattr(f"lightning_memsink.examples.packed.{name}", lambda texts=texts: texts)
    for name, value in (("WANDB_MODE", "offline"), ("WANDB_SILENT", "true")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["memsink"])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_sources_are_shown_as_often_as_said_and_held_out_documents_never(here):
    data = PackedSources(documentation=50, code=3, code_times=4, controls=20, vocab_size=300, context=24, batch_size=10)
    data.setup("fit")
    shown = [tuple(each.tokens.tolist()) for each in data.train]
    assert len(shown) == 50 + 3 * 4 and len(set(shown)) == 53
    assert not set(shown) & {tuple(each.tokens.tolist()) for each in data.held_out}
    assert [each.source for each in data.held_out] == ["documentation"] * 20 + ["code"] * 20
    assert all(16 <= len(each.tokens) <= 24 for each in (*data.train, *data.held_out))
    sources = [label for batch in data.train_dataloader() for row in batch["source"] for label in row]
    assert sorted(sources) == ["code"] * 12 + ["documentation"] * 50


def test_a_batch_whose_rows_hold_one_document_each_has_sources_and_own_ids_too():
    batch = packed([document(8), document(8, "b", 20)], 8) | {"sample_id": [[7], [9]]}
    ids = SampleIds()
    assert ids.of(batch, None).tolist() == [7, 9] and ids.documents is None
    assert source_labels(batch, 2, ids.documents) == ["a", "b"]


def test_too_little_text_is_said(here):
    with pytest.raises(ValueError, match=r"has \d+ documents of documentation, fewer than the 20 controls and 99999"):
        PackedSources(documentation=99_999, controls=20).setup("fit")


@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
@pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:Over budget")
def test_the_recipe_finds_the_source_that_is_over_its_budget(here, capsys):
    sizes = ["--data.documentation=200", "--data.code=5", "--data.code_times=48", "--data.controls=60"]
    small = ["--data.batch_size=8", "--data.vocab_size=512", "--data.context=48", "--model.context=48"]
    model = ["--model.vocab_size=512", "--model.n_embd=64", "--model.lr=0.01", "--memsink.localize=false"]
    main(["fit", "-c", "packed", *sizes, *small, *model, "--trainer.logger=false"])
    numbers = json.loads(Path("memsink_report.json").read_text())["numbers"]
    (row,) = numbers["budget"]
    assert (row["source"], row["state"], row["samples"]) == ("code", "crossed", 5) and row["memorized"] >= 3
    assert {source["source"]: source["samples"] for source in numbers["sources"]} == {"documentation": 200, "code": 5}
    assert main(["gate", "."]) == 1
    assert "over budget: code" in capsys.readouterr().out
