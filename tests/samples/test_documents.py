"""Where documents of packed rows are found, what is padding, and which targets are theirs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DataCollatorWithFlattening

from lightning_memsink.samples.documents import COUNTS_FOR_NONE, documents_in
from lightning_memsink.samples.hashing import content_ids
from lightning_memsink.samples.sample_ids import SampleIds
from lightning_memsink.samples.text_batches import TextBatches, is_of_tokens

TEXTS = [[5, 6, 7], [8, 9], [5, 6, 7], [3, 4, 3, 4, 3], [2]]
ROWS = [TEXTS[:2], TEXTS[2:]]  # of five and nine tokens, in rows of ten
OWNERS = [[0, 0, 0, 1, 1, -1, -1, -1, -1, -1], [2, 2, 2, 3, 3, 3, 3, 3, 4, -1]]


def rows(values: Any, fill: int) -> Tensor:
    """``[2, 10]`` of ``values(document, text)``, lists as long as the text."""
    number, filled = 0, []
    for texts in ROWS:
        row: list[int] = []
        for text in texts:
            row += values(number, text)
            number += 1
        filled.append(row + [fill] * (10 - len(row)))
    return torch.tensor(filled)


IDS = rows(lambda n, text: text, 1)
MASK = rows(lambda n, text: [1] * len(text), 0)
NUMBERS = rows(lambda n, text: [n] * len(text), -1)
POSITIONS = rows(lambda n, text: list(range(len(text))), 0)
BLOCKS = ((NUMBERS[:, :, None] == NUMBERS[:, None, :]) & (NUMBERS >= 0)[:, None, :]).tril()
LABELS = rows(lambda n, text: [-100, *text[1:]], -100)

FOUND: dict[str, tuple[dict[str, Tensor], Any]] = {
    "position_ids": ({"position_ids": POSITIONS, "labels": LABELS}, None),
    "positions and a mask": ({"position_ids": POSITIONS, "attention_mask": MASK}, None),
    "seq_idx": ({"seq_idx": NUMBERS}, None),
    "document_ids": ({"document_ids": NUMBERS + 70, "attention_mask": MASK}, None),
    "numbers in the mask": ({"attention_mask": rows(lambda n, text: [1 + n] * len(text), 0)}, None),
    "a mask of blocks": ({"attention_mask": BLOCKS[:, None]}, None),
    "a mask that is added": ({"attention_mask": torch.zeros(2, 1, 10, 10).masked_fill(~BLOCKS[:, None], -1e4)}, None),
    "a function": ({}, lambda batch: NUMBERS),
}


@pytest.mark.parametrize("name", FOUND)
def test_documents_are_found_and_padding_is_of_none(name):
    given, segments = FOUND[name]
    documents = documents_in({"input_ids": IDS, **given}, segments=segments)
    assert documents is not None and documents.count == 5
    assert documents.owners.tolist() == OWNERS
    assert documents.rows.tolist() == [0, 0, 1, 1, 1]
    texts = documents.texts(IDS)
    assert [ids[mask].tolist() for ids, mask in zip(texts.ids, texts.mask, strict=True)] == TEXTS


@pytest.mark.parametrize("options", [{}, {"return_flash_attn_kwargs": True}, {"return_seq_idx": True}])
def test_flattened_batches_have_a_row_of_all_documents(options):
    batch = DataCollatorWithFlattening(**options)([{"input_ids": text} for text in TEXTS])
    documents = documents_in(dict(batch))
    assert documents is not None and documents.count == 5
    assert documents.owners.tolist() == [[n for n, text in enumerate(TEXTS) for _ in text]]


def test_a_document_has_the_id_of_its_text_wherever_it_stands():
    ids = SampleIds()
    packed = ids.of({"input_ids": IDS, "position_ids": POSITIONS, "labels": LABELS}, None)
    alone = [content_ids({"input_ids": torch.tensor([text])}) for text in TEXTS]
    assert packed is not None and packed.tolist() == torch.cat(alone).tolist()
    assert ids.source == "content" and packed[0] == packed[2]


@pytest.mark.parametrize("given", [["a", "b", "c", "d", "e"], [["a", "b"], ["c", "d", "e"]]])
def test_own_ids_are_of_documents(given):
    ids = SampleIds()
    found = ids.of({"input_ids": IDS, "seq_idx": NUMBERS, "sample_id": given}, None)
    assert ids.names.of([] if found is None else found.tolist()) == ["a", "b", "c", "d", "e"]


def test_ids_of_tokens_say_the_documents_as_well():
    ids = SampleIds()
    found = ids.of({"input_ids": IDS, "attention_mask": MASK, "sample_id": NUMBERS * 7 + 100}, None)
    assert found is not None and found.tolist() == [100, 107, 114, 121, 128]
    assert ids.documents is not None and ids.documents.owners.tolist() == OWNERS


def test_ids_of_rows_leave_rows_the_samples_and_that_is_said():
    ids = SampleIds()
    with pytest.warns(UserWarning, match="names the 2 rows of a batch, in which seq_idx shows 5 documents"):
        found = ids.of({"input_ids": IDS, "seq_idx": NUMBERS, "sample_id": torch.tensor([4, 5])}, None)
    assert found is not None and found.tolist() == [4, 5] and ids.documents is None


def test_ids_that_fit_neither_are_refused():
    with pytest.raises(RuntimeError, match="holds 3 ids for 5 documents in 2 rows, found in seq_idx"):
        SampleIds().of({"input_ids": IDS, "seq_idx": NUMBERS, "sample_id": torch.tensor([4, 5, 6])}, None)


def test_lists_by_row_that_fit_other_rows_are_refused():
    """As many ids as documents, but not as many in each row."""
    with pytest.raises(
        RuntimeError, match=r"needs integers or strings in batch\['sample_id'\], but found \['a', 'b', 'c'\]"
    ):
        SampleIds().of({"input_ids": IDS, "seq_idx": NUMBERS, "sample_id": [["a", "b", "c"], ["d", "e"]]}, None)


def test_segments_of_another_shape_are_named():
    with pytest.warns(
        UserWarning, match=r"given as segments=, returned torch.int64 \[2, 3\]. Return integers \[2, 10\]"
    ):
        found = SampleIds(segments=lambda batch: NUMBERS[:, :3]).of({"input_ids": IDS}, None)
    assert found is not None and len(found) == 2


@pytest.mark.parametrize(
    "batch",
    [
        {"input_ids": IDS},
        {"input_ids": IDS, "attention_mask": MASK},
        {"input_ids": IDS, "position_ids": torch.arange(10).expand(2, 10)},
        {"input_ids": IDS, "attention_mask": torch.ones(2, 1, 10, 10, dtype=torch.bool).tril()},
        {"input_ids": IDS, "token_type_ids": NUMBERS},
        (IDS, IDS),
    ],
    ids=["bare", "padded", "one each", "causal", "types", "pair"],
)
def test_rows_of_one_document_stay_rows(batch):
    assert documents_in(batch) is None


def test_left_padding_is_no_document():
    ids, mask = torch.tensor([[0, 0, 5, 6, 7]]), torch.tensor([[0, 0, 1, 1, 1]])
    batch = {"input_ids": ids, "attention_mask": mask, "position_ids": torch.tensor([[1, 1, 0, 1, 2]])}
    assert documents_in(batch) is None


def test_a_row_of_only_padding_has_no_document():
    positions = torch.stack([torch.tensor([0, 1, 2, 0, 1, 2]), torch.zeros(6, dtype=torch.int64)])
    ids = torch.tensor([[5, 6, 7, 5, 6, 7], [1] * 6])
    documents = documents_in({"input_ids": ids, "position_ids": positions})
    assert documents is not None and documents.count == 2 and documents.owners[1].tolist() == [-1] * 6
    empty = documents_in({"input_ids": ids[1:], "position_ids": positions[1:]})
    assert empty is not None and empty.count == 0 and empty.texts(ids[1:]).ids.shape == (0, 0)


def test_an_empty_flattened_batch_has_no_samples():
    nothing = torch.zeros(1, 0, dtype=torch.int64)
    found = SampleIds().of({"input_ids": nothing, "position_ids": nothing, "labels": nothing}, None)
    assert found is not None and found.shape == (0,)


OF_TARGETS = {
    "the text": (IDS, [[-1, 0, 0, -1, 1] + [-1] * 5, [-1, 2, 2, -1, 3, 3, 3, 3, -1, -1]]),
    "labels": (LABELS, [[-1, 0, 0, -1, 1] + [-1] * 5, [-1, 2, 2, -1, 3, 3, 3, 3, -1, -1]]),
    # of each document by itself: its last target is its own
    "next tokens": (rows(lambda n, text: [*text[1:], 50 + n], -100), OWNERS),
    # of the whole row, so that a document's last target is the first token of another
    "next tokens of the row": (
        torch.cat([IDS[:, 1:], IDS[:, :1]], 1),
        [[0, 0, -1, 1, -1, -1, -1, -1, -1, -1], [2, 2, -1, 3, 3, 3, 3, -1, -1, -1]],
    ),
    "other numbers": (IDS + 20, OWNERS),
}


@pytest.mark.parametrize("name", OF_TARGETS)
def test_targets_are_of_the_document_that_would_predict_them_alone(name):
    targets, expected = OF_TARGETS[name]
    batch = {"input_ids": IDS, "seq_idx": NUMBERS, "labels": targets}
    documents = documents_in(batch)
    assert documents is not None
    *_, owners = documents.axes(batch)
    assert owners.clamp(min=-1).tolist() == expected
    assert bool((owners[documents.owners < 0] != COUNTS_FOR_NONE).all())  # padding may stand beside any document


def test_masks_and_positions_tell_no_owner():
    batch = {"input_ids": IDS, "position_ids": POSITIONS, "attention_mask": MASK, "weights": MASK.float()}
    documents = documents_in(batch)
    assert documents is not None
    first, positions, mask, weights = documents.axes(batch)
    assert positions is None and mask is None and weights.tolist() == OWNERS and first is not None


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        (IDS, True),
        ([IDS], True),
        ((IDS, IDS), True),
        ({"input_ids": IDS, "labels": IDS}, True),
        ({"input_ids": IDS, "source": ["a", "b"]}, True),
        ((IDS, torch.tensor([0, 1])), False),
        ({"input_ids": IDS, "labels": torch.tensor([0, 1])}, False),
        ({"input_ids": IDS, "labels": IDS[:, :4]}, False),
        (IDS.float(), False),
        ({"x": IDS}, False),
    ],
)
def test_batches_of_nothing_but_tokens(batch, expected):
    assert is_of_tokens(batch) is expected


def test_text_that_is_masked_anew_is_the_same_text():
    texts = torch.randint(5, 90, (4, 30), generator=torch.Generator().manual_seed(0))
    found = []
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.rand(texts.shape, generator=generator) < 0.15
        inputs = torch.where(chosen & (torch.rand(texts.shape, generator=generator) < 0.8), 99, texts)
        batch = {"input_ids": inputs, "labels": texts.masked_fill(~chosen, -100)}
        found.append(SampleIds().of(batch, None))
    assert found[0] is not None and all(found[0].tolist() == ids.tolist() for ids in found if ids is not None)
    assert found[0].tolist() == content_ids({"input_ids": texts}).tolist()


def test_a_translation_as_long_as_its_text_is_no_text_alone():
    """A collator pads both to the longest, which may be equal by chance."""
    batches = TextBatches()
    text, other = torch.arange(20, 32).reshape(2, 6), torch.arange(40, 52).reshape(2, 6)
    assert not batches.has({"input_ids": text, "labels": other[:, :4]})
    assert not batches.has({"input_ids": text, "labels": other})
    assert not is_of_tokens({"input_ids": text, "labels": other})


def test_the_first_batch_of_a_kind_says_whether_it_is_of_texts():
    batches = TextBatches()
    assert batches.has({"input_ids": IDS, "labels": IDS})
    assert batches.has({"input_ids": IDS, "labels": IDS + 30})
    assert not batches.has({"input_ids": IDS, "labels": torch.zeros(len(IDS), dtype=torch.int64)})


@pytest.mark.parametrize("pixels", [torch.zeros(2, 3, 4, 4), torch.zeros(9, 12)], ids=["an image a row", "patches"])
def test_a_text_with_an_image_is_no_text_alone(pixels):
    assert not is_of_tokens({"input_ids": IDS, "labels": IDS, "pixel_values": pixels})
    assert is_of_tokens({"input_ids": IDS, "labels": IDS, "weights": torch.ones(IDS.shape)})


def test_what_belongs_to_tokens_leaves_a_text_alone():
    square = torch.zeros(2, 1, IDS.shape[1], IDS.shape[1])
    assert is_of_tokens({"input_ids": IDS, "bias": square, "weights": torch.ones(IDS.shape), "scale": torch.ones(2, 1)})
    assert (
        is_of_tokens((IDS, (IDS > 0).long())) and is_of_tokens((IDS, IDS > 0)) and is_of_tokens((IDS, IDS.roll(-1, 1)))
    )


def test_a_pair_of_texts_is_no_text_alone_if_they_are_of_one_length_either():
    batches = TextBatches()
    text, other = torch.arange(20, 32).reshape(2, 6), torch.arange(40, 52).reshape(2, 6)
    assert not batches.has((text, other)) and not batches.has((text, other[:, :4]))
