"""An id that comes with different content is said once, with how many it had; augmentation is no such thing."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from lightning_memsink.callbacks.runtime.loader_ids import LoaderIds
from lightning_memsink.samples.id_contents import Contents, IdContents
from lightning_memsink.samples.sample_ids import SampleIds
from tests.support.coded_rows import Idle
from tests.support.loaders import QUIET, fit

pytestmark = QUIET

ROWS, TOKENS = 24, 40


class Drawn(Dataset[Any]):
    """Row i as ``make(row, visit)``, where ``visit`` counts the times that the row was fetched before."""

    def __init__(self, make: Callable[[int, int], Any]) -> None:
        self.make = make
        self.visits = [0] * ROWS

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, row: int) -> Any:
        self.visits[row] += 1
        return self.make(row, self.visits[row] - 1)


def text(*seed: int) -> Tensor:
    return torch.randint(500, (TOKENS,), generator=torch.Generator().manual_seed(hash(seed)))


def image(*seed: int) -> Tensor:
    return torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(hash(seed)))


def masked(row: int, visit: int) -> dict[str, Tensor]:
    """Masked language modelling: three tokens of twenty are others each time."""
    tokens = text(row)
    hidden = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(hash((row, visit))))
    tokens[hidden[: TOKENS * 3 // 20]] = 999
    return {"input_ids": tokens, "labels": text(row)}


def said(loader: Any, identity: Any = "auto", **options: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(loader, ids=LoaderIds(SampleIds(identity)), model=Idle(), **options)
    return [str(each.message) for each in caught if "had other content" in str(each.message)]


SAID: dict[str, Callable[[int, int], Any]] = {
    "packed anew": lambda row, visit: {"input_ids": text(row, visit)},
    "bare texts": lambda row, visit: (text(row, visit), text(row, visit)),
    "texts anew for half": lambda row, visit: {"input_ids": text(row, visit if row % 2 else 0)},
    "other labels": lambda row, visit: {"x": image(row, visit), "y": (row + visit * 3) % 10},
    "other floats for some": lambda row, visit: {"x": image(row, visit if row % 4 == 0 else 0)},
    "own ids": lambda row, visit: {"input_ids": text(row, visit), "sample_id": f"s{row}"},
}
QUIETLY: dict[str, Callable[[int, int], Any]] = {
    "the same": lambda row, visit: {"input_ids": text(row)},
    "masked": masked,
    "random views": lambda row, visit: {"x": image(row, visit), "y": row % 10},
    "random views without labels": lambda row, visit: image(row, visit),
    "the same images": lambda row, visit: (image(row), row % 3),
    "another mask of pixels": lambda row, visit: {
        "x": image(row, visit), "mask": image(row, visit)[0] > 0, "y": row % 10
    },
}  # fmt: skip


@pytest.mark.parametrize("name", SAID)
def test_other_content_is_said_once_with_what_to_type(name):
    messages = said(DataLoader(Drawn(SAID[name]), 6, shuffle=True), max_epochs=4)
    assert len(messages) == 1
    assert " has come with " in messages[0] and (name != "own ids" or "'s" in messages[0])
    if name == "own ids":
        assert "batch['sample_id'] doesn't name one sample" in messages[0]
    elif name.startswith("other"):
        assert "Use LossTracker(identity='content')" in messages[0]
    else:
        assert "use LossTracker(identity='index')" in messages[0]


@pytest.mark.parametrize("name", QUIETLY)
def test_the_same_content_and_random_views_are_not_said(name):
    assert said(DataLoader(Drawn(QUIETLY[name]), 6, shuffle=True), max_epochs=4) == []


def test_ids_that_are_hashes_of_content_are_never_said():
    assert said(DataLoader(Drawn(SAID["packed anew"]), 6), "content", max_epochs=3) == []


def padded(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """To a width of its own each time, on either side."""
    padded.calls += 1  # type: ignore[attr-defined]
    width, left = TOKENS + padded.calls % 7, padded.calls % 2 == 0  # type: ignore[attr-defined]
    blank = torch.zeros(len(samples), width - TOKENS, dtype=torch.int64)
    ids = torch.stack([sample["input_ids"] for sample in samples])
    parts = [blank, ids] if left else [ids, blank]
    masks = [blank, torch.ones_like(ids)] if left else [torch.ones_like(ids), blank]
    return {"input_ids": torch.cat(parts, 1), "attention_mask": torch.cat(masks, 1)}


padded.calls = 0  # type: ignore[attr-defined]


def test_padding_is_no_content():
    loader = DataLoader(Drawn(QUIETLY["the same"]), 6, shuffle=True, collate_fn=padded)
    assert said(loader, max_epochs=4) == []


class Shards(IterableDataset[dict[str, Any]]):
    """As ``dataset.map(with_indices=True)`` numbers the samples of each shard from 0."""

    def __init__(self, make: Callable[[int, int], Any]) -> None:
        self.make = make

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        for shard in range(worker.id if worker else 0, 4, worker.num_workers if worker else 1):
            for row in range(12):
                yield {**self.make(shard, row), "sample_id": row}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "make",
    [lambda *place: {"input_ids": text(*place)}, lambda *place: {"x": image(*place), "y": hash(place) % 10}],
    ids=["text", "images with labels"],
)
def test_a_stream_whose_ids_repeat_for_different_samples_is_said(make, workers):
    messages = said(DataLoader(Shards(make), 6, num_workers=workers), max_epochs=1)
    assert len(messages) == 1 and "Make it unique, as in f'{shard}-{row}'" in messages[0]


def test_contents_are_counted():
    check = IdContents()
    for visit in range(3):
        rows = torch.stack([text(row, visit) for row in range(6)])
        contents = Contents.of({"input_ids": rows}, 6)
        assert contents is not None and contents.kind == "tokens" and contents.rows.shape == (6, 32)
        found = check.check(torch.arange(6), contents)
        if visit == 1:
            assert found == "6 of 6 sample ids that came again had other content: id 0 has come with 2 contents"
        else:
            assert found is None


def test_memory_is_bounded():
    check = IdContents(many=10)
    for visit in range(40):
        rows = torch.stack([text(row % 3, row, visit if row == 5 else 0) for row in range(30)])
        contents = Contents.of({"input_ids": rows}, 30)
        assert contents is not None
        check.check(torch.arange(30), contents)
    assert len(check._first) == 10 and max(map(len, check._known.values())) <= 16


def test_a_run_whose_samples_stay_the_same_is_not_compared_for_ever():
    check = IdContents(most=20)
    contents = Contents.of({"input_ids": torch.stack([text(row) for row in range(6)])}, 6)
    assert contents is not None
    visits = 0
    while check.wants(torch.arange(6)):
        assert check.check(torch.arange(6), contents) is None
        visits += 1
    assert visits == 5 and not IdContents(many=0).wants(torch.arange(6))


@pytest.mark.parametrize("batch", [["a", "b"], {"x": torch.zeros(2, 0)}, {"input_ids": torch.zeros(2, 0).long()}, None])
def test_a_batch_without_content_is_not_compared(batch):
    contents = Contents.of(batch, 2)
    assert contents is None or IdContents().check(torch.arange(2), contents) is None
