"""Equal inputs have equal hashes wherever they stand, and others have others."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from lightning_memsink.samples.input_prints import ELEMENTS, NO_PRINT, input_prints, text_prints
from lightning_memsink.samples.tokens import Tokens

B = 8
GENERATOR = torch.Generator().manual_seed(5)


class Pair(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


def images(*shape):
    return torch.rand(B, *shape, generator=GENERATOR)


X, OTHER, Y = images(3, 16, 16), images(3, 16, 16), torch.arange(B)
FEATURES = images(5)

BATCHES = {
    "a tensor": lambda x, y: x,
    "a pair": lambda x, y: (x, y),
    "a list": lambda x, y: [x, y],
    "a named pair": lambda x, y: Pair(x, y),
    "names": lambda x, y: {"x": x, "y": y},
    "other names": lambda x, y: {"image": x, "label": y, "index": torch.randperm(B)},
    "row numbers first": lambda x, y: (torch.randperm(B), x, y),
    "row numbers and input": lambda x, y: (torch.randperm(B), x),
    "a small description": lambda x, y: {"x": x, "meta": torch.rand(B, 3), "target": y},
    "nested": lambda x, y: {"inputs": {"image": x}, "targets": {"class": y}},
    "nested pair": lambda x, y: ({"image": x}, {"class": y, "box": torch.rand(B, 4)}),
    "half precision": lambda x, y: (x.half(), y),
    "bfloat16": lambda x, y: (x.bfloat16(), y),
    "double": lambda x, y: (x.double(), y),
    "bytes": lambda x, y: ((255 * x).to(torch.uint8), y),
    "complex": lambda x, y: (torch.complex(x, -x), y),
    "features": lambda x, y: (x.flatten(1)[:, :5], y),
    "yes and no": lambda x, y: (x.flatten(1) > 0.5, y),
    "with a gradient": lambda x, y: (x.clone().requires_grad_(), y),
    "channels last": lambda x, y: (x.contiguous(memory_format=torch.channels_last), y),
    "targets as large": lambda x, y: (x, torch.rand(x.shape)),
}


@pytest.mark.parametrize("make", BATCHES.values(), ids=BATCHES)
def test_labels_and_row_numbers_do_not_count(make):
    prints = input_prints(make(X, Y), B)
    assert torch.equal(prints, input_prints(make(X, Y.flip(0) + 3), B))
    assert len(set(prints.tolist())) == B


@pytest.mark.parametrize("make", BATCHES.values(), ids=BATCHES)
def test_other_inputs_have_other_hashes(make):
    assert not set(input_prints(make(X, Y), B).tolist()) & set(input_prints(make(OTHER, Y), B).tolist())


@pytest.mark.parametrize("make", BATCHES.values(), ids=BATCHES)
def test_hashes_do_not_depend_on_the_rest_of_the_batch(make):
    order = torch.randperm(B, generator=GENERATOR)
    assert torch.equal(input_prints(make(X[order], Y[order]), B), input_prints(make(X, Y), B)[order])
    few = input_prints(tuple_or_same(make(X, Y), slice(3)), 3)
    assert torch.equal(few, input_prints(make(X, Y), B)[:3])


def tuple_or_same(batch, part):
    """The rows ``part`` of every tensor of a batch."""
    if isinstance(batch, torch.Tensor):
        return batch[part]
    if isinstance(batch, dict):
        return {name: tuple_or_same(value, part) for name, value in batch.items()}
    rows = [tuple_or_same(value, part) for value in batch]
    return type(batch)(*rows) if hasattr(batch, "_fields") else type(batch)(rows)


def test_a_single_number_of_each_sample_is_an_input_if_it_is_real():
    first, second = torch.rand(B, 1), torch.rand(B, 1)
    assert torch.equal(input_prints((first, second), B), input_prints((first, second + 1), B))


def test_a_single_integer_of_each_sample_may_be_a_row_number_and_does_not_count_alone():
    """Row 3 of the training set and row 3 of the validation set are others."""
    numbers, first, second = torch.arange(B), torch.rand(B), torch.rand(B)
    assert not set(input_prints((numbers, first), B).tolist()) & set(input_prints((numbers, second), B).tolist())


def test_columns_of_one_number_each_count_together():
    def table(age, city):
        return {"age": age, "city": city, "target": torch.rand(B)}

    age, city = torch.arange(B), torch.arange(B) % 3
    assert torch.equal(input_prints(table(age, city), B), input_prints(table(age, city), B))
    assert not bool((input_prints(table(age, city), B) == input_prints(table(age, city + 1), B)).any())


def test_a_zero_has_no_sign():
    assert torch.equal(input_prints(torch.zeros(B, 4), B), input_prints(-torch.zeros(B, 4), B))


def text(rows, width, side="right"):
    ids, mask = torch.zeros(len(rows), width, dtype=torch.int64), torch.zeros(len(rows), width, dtype=torch.int64)
    for n, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[n, place], mask[n, place] = torch.tensor(row), 1
    return {"input_ids": ids, "attention_mask": mask}


ROWS = [torch.randint(1, 500, (length,), generator=GENERATOR).tolist() for length in (3, 9, 40, 64, 65, 150)]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("width", [150, 200])
def test_padding_of_a_text_does_not_count(side, width):
    assert torch.equal(input_prints(text(ROWS, 150), 6), input_prints(text(ROWS, width, side), 6))


@pytest.mark.parametrize("place", range(3))
def test_one_other_token_of_a_short_text_is_another_text(place):
    row = list(ROWS[0])
    row[place] += 1
    first, second = input_prints(text([ROWS[0]], 9), 1), input_prints(text([row], 9), 1)
    assert not torch.equal(first, second)


def test_a_longer_text_is_another_text():
    first, second = input_prints(text([[7] * 5], 9), 1), input_prints(text([[7] * 6], 9), 1)
    assert not torch.equal(first, second)


def test_labels_of_a_text_do_not_count():
    batch = text(ROWS, 150)
    assert torch.equal(input_prints(batch, 6), input_prints({**batch, "labels": torch.arange(6)}, 6))


def test_what_names_no_sample_has_no_print_where_that_is_asked_for():
    rows = torch.zeros(B, 1000)
    rows[torch.arange(B), torch.arange(B) * 16] = 1.0  # each its own, and most alike in the elements that are hashed
    assert set(input_prints(rows, B, named_only=True).tolist()) == {NO_PRINT}
    assert NO_PRINT not in input_prints(rows, B).tolist()


@pytest.mark.parametrize("rows", [X, FEATURES, torch.eye(B)], ids=["images", "features", "few elements, all compared"])
def test_what_names_a_sample_has_its_print(rows):
    assert torch.equal(input_prints(rows, B, named_only=True), input_prints(rows, B))


def test_a_long_text_of_one_token_names_no_sample():
    batch = text([[7] * 100, ROWS[5], [7] * ELEMENTS, []], 150)
    prints = input_prints(batch, 4, named_only=True)
    assert (prints == NO_PRINT).tolist() == [True, False, False, True]


def test_an_input_that_is_always_the_same_is_none():
    batch = {"x": torch.ones(B, 5), "y": torch.arange(B)}
    assert set(input_prints(batch, B, named_only=True).tolist()) == {NO_PRINT}


def test_samples_along_another_axis_are_found_by_the_loaders_word():
    by_time = X.flatten(1).T.contiguous()
    assert torch.equal(input_prints((by_time, Y), B, [1, 0]), input_prints((X.flatten(1), Y), B))


NOTHING = {
    "no tensor": ["a", "b"],
    "no rows": {"x": torch.rand(3, 4)},
    "empty rows": torch.rand(B, 0),
    "on another device": torch.rand(B, 4, device="meta"),
    "partly on another device": (torch.rand(B, 4), torch.rand(B, 4, device="meta")),
    "sparse": torch.eye(B).to_sparse(),
    "a scalar": torch.tensor(1.0),
}


@pytest.mark.parametrize("batch", NOTHING.values(), ids=NOTHING)
def test_there_may_be_none(batch):
    assert input_prints(batch, B) is None


def test_numbers_that_are_none_are_equal_to_themselves():
    rows = torch.full((B, 5), torch.nan)
    rows[:, 0] = torch.arange(B)
    assert torch.equal(input_prints(rows, B), input_prints(rows.clone(), B))


def test_texts_are_hashed_alike_from_a_batch_and_as_tokens():
    batch = text(ROWS, 150)
    assert torch.equal(text_prints(Tokens(batch["input_ids"], batch["attention_mask"].bool())), input_prints(batch, 6))
