"""Where samples lie in what a collate function makes: proven by values, never by the number of rows alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pack_sequence, pad_sequence
from torch.utils.data import DataLoader, default_collate

from lightning_memsink.samples.batch_rows import UNPROVEN, whole
from lightning_memsink.samples.collate_layout import CollateLayout, Layout
from tests.support.coded_rows import CodedStream, coded, fit_checked, loader_of, text
from tests.support.loaders import QUIET

pytestmark = QUIET

Samples = list[dict[str, Any]]


def square(row: int) -> dict[str, Any]:
    """As many tokens as there are samples in a batch."""
    return {"x": coded(row, 4), "label": row % 2}


def image(row: int) -> dict[str, Any]:
    return {"x": coded(row, 4, 3, 3).float(), "label": row % 2}


def array(row: int) -> dict[str, Any]:
    return {"x": coded(row, 4).numpy().astype(np.float64), "label": np.int64(row % 2)}


def numbers(row: int) -> dict[str, Any]:
    return {"x": coded(row, 4).tolist(), "label": row % 2}


def pair(row: int) -> tuple[Any, int]:
    return coded(row, 4), row % 2


def labels(samples: Samples) -> torch.Tensor:
    return torch.tensor([sample["label"] for sample in samples])


def time_major(samples: Samples) -> dict[str, Any]:
    return {"x": torch.stack([torch.as_tensor(sample["x"]) for sample in samples], 1), "y": labels(samples)}


def batch_major(samples: Samples) -> tuple[Any, Any]:
    return torch.stack([torch.as_tensor(sample["x"]) for sample in samples]), labels(samples)


def of_pairs(samples: list[tuple[Any, int]]) -> list[Any]:
    return [torch.stack([x for x, _ in samples], 1), torch.tensor([y for _, y in samples])]


def padded_time_major(samples: Samples) -> dict[str, Any]:
    return {"x": pad_sequence([sample["x"] for sample in samples]), "y": labels(samples)}


def padded(samples: Samples) -> dict[str, Any]:
    return {"x": pad_sequence([sample["x"] for sample in samples], batch_first=True), "y": labels(samples)}


def padded_left(samples: Samples) -> dict[str, Any]:
    x = pad_sequence([sample["x"] for sample in samples], batch_first=True, padding_side="left")
    return {"x": x.T.contiguous()}


def shifted(samples: Samples) -> dict[str, Any]:
    x = torch.stack([sample["x"] for sample in samples], 1)
    return {"x": x[:-1], "y": x[1:]}


def popped(samples: Samples) -> dict[str, Any]:
    """Takes apart what it gets."""
    return {"x": torch.stack([sample.pop("x") for sample in samples], 1), "y": labels(samples)}


SECOND_AXIS: dict[str, tuple[Any, Any]] = {
    "time-major": (lambda row: {"x": coded(row, 7), "label": 0}, time_major),
    "time-major, B equal to T": (square, time_major),
    "arrays": (array, time_major),
    "lists of numbers": (numbers, time_major),
    "pairs": (pair, of_pairs),
    "padded": (text, padded_time_major),
    "padded left": (text, padded_left),
    "shifted": (lambda row: {"x": coded(row, 5)}, shifted),
    "images along channels": (image, time_major),
}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", SECOND_AXIS)
def test_samples_along_the_second_axis_are_proven(name, workers):
    make, collate = SECOND_AXIS[name]
    watch = fit_checked(loader_of(make, collate, 4, workers, shuffle=True))
    assert all(any(shape.startswith("1x4") for shape in claimed) for claimed in watch.claimed)
    assert all(len(ids) == 4 for ids in watch.taken["train"])


def test_a_collate_that_takes_its_samples_apart_gets_and_gives_what_it_would():
    samples = [square(row) for row in range(4)]
    layout, batch = CollateLayout(popped), popped([dict(sample) for sample in samples])
    for sample in samples:
        sample.pop("x")
    assert layout.of(samples, batch) == Layout((UNPROVEN, UNPROVEN))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("make", [square, image, array, numbers], ids=["tokens", "image", "array", "numbers"])
@pytest.mark.parametrize("collate", [batch_major, None], ids=["custom", "default"])
def test_samples_along_the_first_axis_are_proven_where_another_is_as_long(make, collate, workers):
    if collate is None and make is numbers:
        pytest.skip("torch's own makes columns of lists")
    watch = fit_checked(loader_of(make, collate, 4, workers, shuffle=True))
    assert all(any(shape.startswith("4x1") for shape in claimed) for claimed in watch.claimed)


def test_padding_that_makes_a_batch_square_is_proven():
    watch = fit_checked(loader_of(text, padded, 6, shuffle=True))
    assert all("6x1" in claimed for claimed in watch.claimed)


def test_a_square_batch_that_cannot_be_compared_is_not_claimed():
    def hidden(samples: Samples) -> dict[str, Any]:
        return {"x": torch.stack([sample["x"] * 2.5 + 1 for sample in samples])}

    layout = CollateLayout(hidden)
    samples = [square(row) for row in range(4)]
    assert layout.of(samples, hidden(samples)) == Layout((UNPROVEN,))


def test_what_was_proven_in_earlier_batches_holds_where_a_batch_shows_nothing():
    layout = CollateLayout(time_major)
    first = [{"x": coded(row, 7), "label": 0} for row in range(4)]
    assert layout.of(first, time_major(first)).axes == (1, UNPROVEN)
    alike = [{"x": torch.zeros(4).long(), "label": 0} for _ in range(4)]
    assert layout.of(alike, time_major(alike)).axes == (1, UNPROVEN)


def test_samples_that_are_all_alike_prove_nothing():
    alike = [{"x": torch.zeros(4), "label": 0} for _ in range(4)]
    assert CollateLayout(time_major).of(alike, time_major(alike)).axes == (UNPROVEN, UNPROVEN)


def as_they_are(samples: list[Any]) -> list[Any]:
    return samples


def zipped(samples: list[tuple[Any, Any]]) -> tuple[Any, ...]:
    return tuple(zip(*samples, strict=True))


def detected(row: int) -> tuple[Any, dict[str, Any]]:
    """An image with as many channels as there are in a batch, and its boxes."""
    return coded(row, 3, 2, 2).float(), {"boxes": coded(row, 1 + row % 3, 4).float(), "id": torch.tensor(row)}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("collate", [as_they_are, zipped])
def test_lists_of_samples_are_proven(collate, workers):
    watch = fit_checked(loader_of(detected, collate, 3, workers, shuffle=True))
    assert all(ids is not None and len(ids) == 3 for ids in watch.taken["train"])
    assert all({"1x1x1", "1x1", ""} <= claimed for claimed in watch.claimed)


def test_lists_of_samples_whose_tensors_are_new_are_proven():
    samples = [detected(row) for row in range(3)]
    batch = [[image.clone() for image, _ in samples], [target["boxes"].clone() for _, target in samples]]
    assert CollateLayout(zipped).of(samples, batch).axes == tuple(map(whole, (0, 1, 2, 0, 1, 2)))


def sorted_by_length(samples: Samples) -> dict[str, Any]:
    return padded(sorted(samples, key=lambda sample: -len(sample["x"])))


def sorted_and_packed(samples: Samples) -> Any:
    ordered = sorted(samples, key=lambda sample: -len(sample["x"]))
    return pack_sequence([sample["x"] for sample in ordered]), padded(ordered)["x"]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("collate", [sorted_by_length, sorted_and_packed])
def test_a_collate_that_sorts_has_the_ids_of_its_own_order(collate, workers):
    watch = fit_checked(loader_of(text, collate, 6, workers, shuffle=True))
    assert all(len(ids) == 6 for ids in watch.taken["train"]) and all(watch.claimed)


def test_a_collate_that_sorts_lists_has_the_ids_of_its_own_order():
    def collate(samples: Samples) -> list[torch.Tensor]:
        return sorted((sample["x"] for sample in samples), key=len)

    watch = fit_checked(loader_of(text, collate, 6, shuffle=True))
    assert all(len(ids) == 6 for ids in watch.taken["train"]) and all(watch.claimed)


def test_a_collate_that_begins_to_sort_later_is_noticed():
    layout = CollateLayout(batch_major)
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        samples = [square(int(row)) for row in torch.randperm(24, generator=generator)[:4]]
        assert layout.of(samples, batch_major(samples)) == Layout((0, UNPROVEN))
    orders = []
    for _ in range(8):
        samples = [square(int(row)) for row in torch.randperm(24, generator=generator)[:4]]
        orders.append(layout.of(samples, batch_major([samples[n] for n in (1, 2, 3, 0)])).order)
    first = orders.index((1, 2, 3, 0))
    assert first < 4 and set(orders[first:]) == {(1, 2, 3, 0)}


def test_samples_drawn_twice_may_change_places_with_themselves():
    rows = [3, 5, 3, 1]
    samples = [text(row) for row in rows]
    ordered = sorted(samples, key=lambda sample: -len(sample["x"]))
    layout = CollateLayout(sorted_by_length)
    found = layout.of(samples, padded(ordered), rows)
    assert not found.is_lost
    assert [samples[n]["x"].tolist() for n in found.order or ()] == [sample["x"].tolist() for sample in ordered]
    assert CollateLayout(sorted_by_length).of(samples, padded(ordered)).is_lost


def hidden_order(samples: Samples) -> dict[str, Any]:
    """Sorts, and leaves nothing to compare but labels of two values."""
    ordered = sorted(samples, key=lambda sample: sample["label"])
    return {"x": torch.stack([sample["x"] * 0.1 for sample in ordered]), "label": labels(ordered)}


def test_an_order_that_cannot_be_identified_is_refused():
    with pytest.warns(UserWarning, match=r"another order, which can't be identified.*no losses.*batch\['sample_id'\]"):
        watch = fit_checked(loader_of(square, hidden_order, 8))
    assert watch.taken["train"] == [None] * 6


def words(row: int) -> str:
    return str(row)


def tokenized(samples: list[str]) -> dict[str, Any]:
    ids = torch.stack([coded(int(word), 4) for word in samples])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids, "other": ids}


def test_text_that_is_tokenized_by_the_collate_is_batch_first_by_convention():
    watch = fit_checked(loader_of(words, tokenized, 4, shuffle=True), identity="index")
    assert all(claimed == {"4x1"} for claimed in watch.claimed)
    layout = CollateLayout(tokenized)
    samples = [words(row) for row in range(4)]
    assert layout.of(samples, tokenized(samples)).axes == (UNPROVEN,) * 4


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("collate", "begin"), [(time_major, "1x4"), (default_collate, "4x1")], ids=["second", "first"])
def test_batches_of_a_stream_are_proven_as_well(collate, begin, workers):
    loader = DataLoader(CodedStream(square), 4, collate_fn=collate, num_workers=workers)
    watch = fit_checked(loader, has_rows=False)
    assert all(any(shape.startswith(begin) for shape in claimed) for claimed in watch.claimed)


def test_a_custom_collate_changes_no_random_number():
    before: list[Any] = []
    for watched in (True, False):
        torch.manual_seed(3)
        layout = CollateLayout(time_major)
        for _ in range(3):
            samples = [{"x": torch.randint(9, (4,)), "label": 0} for _ in range(4)]
            batch = time_major(samples)
            if watched:
                layout.of(samples, batch)
        before.append(torch.get_rng_state())
    assert torch.equal(*before)


class Odd(dict[str, Any]):
    """A sample that can't be read twice."""

    def items(self) -> Any:
        raise RuntimeError("read twice")


def test_a_sample_that_cannot_be_read_is_not_compared():
    samples = [Odd(square(row)) for row in range(4)]
    assert CollateLayout(batch_major).of(samples, batch_major(samples)) == Layout()


def test_a_batch_of_one_shows_its_axis_unless_its_sample_is_a_batch_itself():
    sample = {"x": torch.arange(5), "y": torch.rand(3, 1)}

    def across(samples):
        return {"x": torch.stack([each["x"] for each in samples], 1), "y": samples[0]["y"]}

    assert CollateLayout(across).of([sample], across([sample])).axes == (1, UNPROVEN)
