"""Codes of sources, and their labels read from batches of every form."""

import math
import warnings
from enum import Enum

import numpy as np
import pytest
import torch

from lightning_memsink.samples.documents import documents_in
from lightning_memsink.samples.source_labels import SourceLabels, UnfitLabels, source_labels
from lightning_memsink.samples.sources import NO_SOURCE, OTHER, OTHER_CODE, SourceNames, label_text

PACKED = {
    "input_ids": torch.arange(12).reshape(2, 6),
    "seq_idx": torch.tensor([[0, 0, 1, 1, 1, -1], [0, 0, 0, 1, 2, 2]]),
}
DOCUMENTS = documents_in(PACKED)
TEXT = {"input_ids": torch.arange(12).reshape(3, 4)}


class Licence(Enum):
    MIT = "mit"


@pytest.mark.parametrize(
    ("value", "labels"),
    [
        (["a", "b", "a"], ["a", "b", "a"]),
        (("a", "b", None), ["a", "b", None]),
        (torch.tensor([3, -1, 7]), ["3", None, "7"]),
        (torch.tensor([[3], [4], [7]]), ["3", "4", "7"]),
        (np.array([1, 2, 3]), ["1", "2", "3"]),
        (np.array(["x", "y", "z"]), ["x", "y", "z"]),
        ([torch.tensor(1), np.int64(2), 3], ["1", "2", "3"]),
        ([math.nan, Licence.MIT, ("web", 3)], [None, "Licence.MIT", "('web', 3)"]),
        ("wiki", ["wiki"] * 3),
        (torch.tensor(5), ["5"] * 3),
        (torch.tensor([[1, 1, 2, 2], [-1, 3, 3, 3], [4, 4, 4, 4]]), ["1", None, "4"]),
        (None, None),
    ],
)
def test_one_label_a_sample(value, labels):
    assert source_labels({**TEXT, "source": value}, 3) == labels


def test_labels_by_token_begin_behind_padding_on_the_left():
    tokens = torch.tensor([[-1, -1, 2, 2], [5, 5, 5, 5], [-1, 7, 7, 7]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]])
    assert source_labels({**TEXT, "attention_mask": mask, "source": tokens}, 3) == ["2", "5", "7"]


@pytest.mark.parametrize(
    ("value", "labels"),
    [
        (["a", "b", "c", "d", "e"], ["a", "b", "c", "d", "e"]),
        (torch.arange(5), ["0", "1", "2", "3", "4"]),
        (["a", "b"], ["a", "a", "b", "b", "b"]),
        (torch.tensor([8, 9]), ["8", "8", "9", "9", "9"]),
        ([["a", "b"], ("c", "d", "e")], ["a", "b", "c", "d", "e"]),
        ([torch.tensor([1, 2]), torch.tensor([3, 4, 5])], ["1", "2", "3", "4", "5"]),
        (torch.tensor([[4, 4, 5, 5, 5, -1], [6, 6, 6, 7, -1, -1]]), ["4", "5", "6", "7", None]),
        (
            [("a", 1), ("b", 2), ("c", 3), ("d", 4), ("e", 5)],
            [f"('{label}', {n})" for n, label in enumerate("abcde", 1)],
        ),
    ],
)
def test_documents_have_their_own_labels_or_those_of_their_rows(value, labels):
    assert DOCUMENTS.count == 5
    assert source_labels({**PACKED, "source": value}, 5, DOCUMENTS) == labels


@pytest.mark.parametrize("axes", [1, 2])
def test_documents_of_a_flattened_batch(axes):
    flat = {"input_ids": torch.arange(6), "position_ids": torch.tensor([0, 1, 0, 0, 1, 2])}
    batch = {name: part if axes == 1 else part[None] for name, part in flat.items()}
    documents = documents_in(batch)
    assert documents.count == 3
    assert source_labels({**batch, "source": ["a", "b", "c"]}, 3, documents) == ["a", "b", "c"]
    assert source_labels({**batch, "source": ["a"]}, 3, documents) == ["a"] * 3
    by_token = torch.tensor([1, 1, 2, 3, 3, 3]).reshape(batch["input_ids"].shape)
    assert source_labels({**batch, "source": by_token}, 3, documents) == ["1", "2", "3"]


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (["a", "b"], "a list of 2, and expected are 3 labels, one a sample"),
        (torch.zeros(3), r"a tensor float32 \[3\]"),
        (torch.zeros(3, 5, dtype=torch.int64), r"a tensor int64 \[3, 5\]"),
        ([["a"], ["b", "c"], []], "a list of 3"),
        ({"a": 1}, "a dict"),
        (7, "a int"),
        ([torch.zeros(2), 1, 2], "a list of 3"),
    ],
)
def test_labels_that_fit_no_sample_are_refused(value, found):
    with pytest.raises(UnfitLabels, match=rf"batch\['source'\] holds {found}.*memsink\(source=None\)"):
        source_labels({**TEXT, "source": value}, 3)


@pytest.mark.parametrize("value", [["a", "b", "c"], [["a"], ["b", "c", "d", "e"]], torch.zeros(2, 5).long()])
def test_labels_that_fit_no_document_are_refused(value):
    with pytest.raises(UnfitLabels, match="expected are 5 labels, one a document, or 2, one a row, or a list for each"):
        source_labels({**PACKED, "source": value}, 5, DOCUMENTS)


def test_a_function_of_the_batch_and_another_key():
    assert source_labels(TEXT, 3, None, lambda batch: list("xyz")) == ["x", "y", "z"]
    assert source_labels((torch.zeros(2, 3),), 2, None, lambda batch: ["u", "v"]) == ["u", "v"]
    assert source_labels({**TEXT, "licence": list("xyz")}, 3, None, "licence") == ["x", "y", "z"]
    assert source_labels(TEXT, 3) is None and source_labels(torch.zeros(3, 4), 3) is None
    with pytest.raises(UnfitLabels, match=r"source='licence' names a key of the batch, and its keys are 'input_ids'"):
        source_labels(TEXT, 3, None, "licence")


def test_what_cannot_be_read_is_said_once_and_gives_no_labels():
    def broken(batch):
        raise KeyError("domain")

    for source, batch, message in [
        ("source", {**TEXT, "source": ["a"]}, "Until then such samples have no source"),
        (broken, TEXT, r"broken\(batch\), given as source=, raised KeyError: 'domain'"),
        ("licence", TEXT, "its keys are 'input_ids'"),
    ]:
        labels = SourceLabels(source)
        with pytest.warns(UserWarning, match=message):
            assert labels.of(batch, 3, None) is None
        assert labels.of(batch, 3, None) is None  # warnings are errors in these tests
    assert SourceLabels(None).of({**TEXT, "source": ["a"]}, 3, None) is None
    with pytest.raises(ValueError, match="source is a key of the batch or a function of it, but it is a int: 3"):
        SourceLabels(3)


def test_an_empty_batch_has_no_labels():
    assert source_labels({"input_ids": torch.zeros(0, 4).long(), "source": []}, 0) == []
    assert source_labels({"input_ids": torch.zeros(0, 4).long(), "source": torch.zeros(0).long()}, 0) == []


@pytest.mark.parametrize(
    ("label", "text"),
    [
        *[
            ("a", "a"),
            (3, "3"),
            (np.str_("s"), "s"),
            (torch.tensor(4), "4"),
            (b"\xff", r"b'\xff'"),
            ("\ud800", r"\ud800"),
        ],
        *[(None, None), (math.nan, None), (np.float64("nan"), None), (True, "True")],
    ],
)
def test_labels_as_text(label, text):
    assert label_text(label) == text


def test_codes_are_given_in_the_order_of_labels_and_kept():
    names = SourceNames()
    codes = names.codes(["b", None, "a", "b"])
    assert codes.tolist() == [0, NO_SOURCE, 1, 0] and codes.dtype == torch.int16
    assert names.labels == ["b", "a"] and names.label(1) == "a" and names.label(NO_SOURCE) is None
    again = SourceNames()
    again.load_state_dict(names.state_dict())
    assert again.codes(["a", "c"]).tolist() == [1, 2]
    assert again.code("a") == 1 and again.code("none of them") is None
    again.load_state_dict({})
    assert len(again) == 0


def test_labels_beyond_the_codes_are_of_one_source_and_said_once():
    names = SourceNames(most=2)
    with pytest.warns(UserWarning, match=r"more than 2 sources.*of the source 'other'"):
        codes = names.codes(["a", "b", "c", "d", "a"])
    assert codes.tolist() == [0, 1, OTHER_CODE, OTHER_CODE, 0] and names.label(OTHER_CODE) == OTHER
    assert names.codes(["e", OTHER]).tolist() == [OTHER_CODE, OTHER_CODE]
    assert SourceNames().codes([OTHER, "a"]).tolist() == [OTHER_CODE, 0]
    everything = SourceNames()
    codes = everything.codes(map(str, range(OTHER_CODE)))
    assert codes[-1] == OTHER_CODE - 1 and len(everything) == OTHER_CODE


def test_the_first_source_of_a_sample_stays_and_others_are_said_once_with_their_number():
    names = SourceNames()
    known = torch.tensor([-1, -1, 0, -1, -1, 1], dtype=torch.int16)
    rows = torch.tensor([5, 5, 2, 7, 7, 3])
    codes = torch.tensor([1, 0, 1, -1, 2, 1], dtype=torch.int16)
    with pytest.warns(UserWarning, match="2 samples have come with more than one source"):
        at, values = names.note(known, rows, codes)
    assert dict(zip(at.tolist(), values.tolist(), strict=True)) == {5: 1, 7: 2}
    assert names.with_several == 2
    names.note(torch.tensor([0], dtype=torch.int16), torch.tensor([9000]), torch.tensor([1], dtype=torch.int16))
    again = SourceNames()
    again.load_state_dict(names.state_dict())
    assert again.with_several == 3


def test_samples_without_a_label_change_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        none = torch.full((3,), -1, dtype=torch.int16)
        at, values = SourceNames().note(torch.tensor([0, -1, 4], dtype=torch.int16), torch.arange(3), none)
    assert len(at) == len(values) == 0


def test_names_stand_for_what_the_batch_has():
    batch = {"source": torch.tensor([1, 0, 1, 7])}
    assert SourceLabels(names=["books", "web"]).of(batch, 4, None) == ["web", "books", "web", "7"]
    assert SourceLabels(names={7: "mail"}).of(batch, 4, None) == ["1", "0", "1", "mail"]
    assert SourceLabels(names={"cc-by": "open"}).of({"source": ["cc-by", "mit"]}, 2, None) == ["open", "mit"]
    with pytest.raises(ValueError, match="names is a list or a mapping of labels, but it is a str: 'books'"):
        SourceLabels(names="books")
