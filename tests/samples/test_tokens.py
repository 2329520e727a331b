"""What is text in a batch, and what is padding in the text."""

from typing import Any

import pytest
import torch
from transformers import BatchEncoding

from lightning_memsink.samples.tokens import tokens_of

IDS = torch.tensor([[5, 6, 0], [7, 0, 0]])
MASK = torch.tensor([[1, 1, 0], [1, 0, 0]])
ALL = torch.ones(2, 3, dtype=torch.bool)

TEXT: dict[str, tuple[Any, torch.Tensor]] = {
    "mapping": ({"input_ids": IDS}, ALL),
    "mapping with mask": ({"input_ids": IDS, "attention_mask": MASK, "labels": IDS}, MASK.bool()),
    "float mask": ({"input_ids": IDS, "attention_mask": MASK.float()}, MASK.bool()),
    "packed mask": ({"input_ids": IDS, "attention_mask": torch.ones(2, 1, 3, 3)}, ALL),
    "encoding": (BatchEncoding({"input_ids": IDS, "attention_mask": MASK}), MASK.bool()),
    "bare": (IDS.int(), ALL),
    "tuple": ((IDS, torch.tensor([0, 1])), ALL),
    "list": ([IDS, IDS], ALL),
}


@pytest.mark.parametrize("name", TEXT)
def test_text_is_found_with_its_mask(name):
    batch, mask = TEXT[name]
    tokens = tokens_of(batch)
    assert torch.equal(tokens.ids, IDS) and tokens.ids.dtype == torch.int64
    assert torch.equal(tokens.mask, mask) and tokens.mask.dtype == torch.bool


@pytest.mark.parametrize(
    "batch",
    [
        torch.zeros(2, 3),
        IDS[0],
        IDS[None],
        ALL,
        (torch.zeros(2, 3, 4, 4), torch.tensor([0, 1])),
        {"image": torch.zeros(2, 3), "classes": IDS},
        {"input_ids": torch.zeros(2, 3)},
        {"input_ids": [[1, 2]]},
        ["a", "b"],
        [],
        {},
        None,
        3,
    ],
)
def test_nothing_else_is_text(batch):
    assert tokens_of(batch) is None


@pytest.mark.parametrize(
    ("places", "replaced"),
    [([3], [1]), ([3], [9]), ([6], [1]), ([2, 5], [1, 30]), ([2, 5], [30, 1]), ([1, 2, 6], [1, 30, 31])],
    ids=["masked", "another token", "at the end", "one masked", "the other", "one of three"],
)
def test_few_tokens_that_were_masked_are_put_back(places, replaced):
    """One in ten is replaced by a random token: of a few, half may be."""
    text = torch.tensor([[11, 12, 13, 14, 15, 16, 17]])
    ids, labels = text.clone(), torch.full_like(text, -100)
    labels[0, places], ids[0, places] = text[0, places], torch.tensor(replaced)
    found = tokens_of({"input_ids": ids, "labels": labels})
    assert found is not None and torch.equal(found.ids, text)


def test_classes_of_tokens_are_not_put_into_the_text():
    text = torch.tensor([[11, 12, 13, 14, 15, 16, 17], [12, 11, 18, 19, 20, 21, 22]])
    found = tokens_of({"input_ids": text, "labels": torch.tensor([[0, 1, 0, -100, 2, 0, 0], [1, 0, 0, 2, 0, -100, 0]])})
    assert found is not None and torch.equal(found.ids, text)


OF_LABELS = {
    "the text": ([[5, 6, 7, 8], [5, 6, -100, -100]], [4, 2]),
    "after a prompt": ([[-100, -100, 7, 8], [-100, 6, -100, -100]], [4, 2]),
    "the next tokens": ([[6, 7, 8, -100], [6, -100, -100, -100]], [4, 2]),
    "the next tokens after a prompt": ([[-100, 7, 8, -100], [6, -100, -100, -100]], [4, 2]),
    "no loss in a row": ([[5, 6, 7, 8], [-100] * 4], [4, 4]),
    "no loss at all": ([[-100] * 4, [-100] * 4], [4, 4]),
    "classes of tokens": ([[1, 0, 2, 1], [1, 0, -100, -100]], [4, 4]),
    "of another length": ([[5, 6, 7], [5, 6, -100]], [4, 4]),
}


@pytest.mark.parametrize("name", OF_LABELS)
def test_without_a_mask_a_text_ends_with_its_last_label(name):
    """Else its id would depend on the longest text of the batch."""
    labels, lengths = OF_LABELS[name]
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 0, 0]])
    found = tokens_of({"input_ids": ids, "labels": torch.tensor(labels)})
    assert found is not None and found.mask.sum(1).tolist() == lengths
    assert found.mask.tolist() == [[True] * length + [False] * (4 - length) for length in lengths]
