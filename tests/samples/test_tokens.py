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
