"""torchdata's StatefulDataLoader: a run that ends within an epoch goes on with the batches that are left."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from tests.support.text_runs import SaveAfter, by_row, check, fit_and_compare, fit_texts, id_of, texts, visits_of

stateful = pytest.importorskip("torchdata.stateful_dataloader")

pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata 0.11 under torch 2.13

TEXTS = [text[:4] for text in texts()]


class Stream(IterableDataset[Tensor]):
    """A stream that goes on where it was."""

    def __init__(self) -> None:
        self.place = 0

    def __iter__(self) -> Any:
        while self.place < len(TEXTS):
            self.place += 1
            yield torch.tensor(TEXTS[self.place - 1])
        self.place = 0

    def state_dict(self) -> dict[str, int]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.place = state["place"]


def loader(kind: str, workers: int) -> Any:
    data = Stream() if kind == "stream" else [torch.tensor(text) for text in TEXTS]
    return stateful.StatefulDataLoader(data, 4, shuffle=kind == "rows", num_workers=workers)


KINDS = [("rows", 0), ("rows", 2), ("stream", 0), ("stream", 1)]


@pytest.mark.parametrize(("kind", "workers"), KINDS)
def test_two_epochs(kind, workers):
    fitted = fit_and_compare(lambda: loader(kind, workers), by_row)
    check(fitted)
    expected = Counter(id_of(text) for text in TEXTS)
    assert fitted.exposures == {id: 2 * count for id, count in expected.items()}
    assert (set(fitted.column("first_row").values()) == {-1}) == (kind == "stream")


@pytest.mark.parametrize("after", [3, 11], ids=["first epoch", "second epoch"])
@pytest.mark.parametrize(("kind", "workers"), KINDS)
def test_a_run_that_goes_on_within_an_epoch_counts_each_visit_once(kind, workers, after, tmp_path: Path):
    path = tmp_path / "within.ckpt"
    first = fit_texts(
        loader(kind, workers),
        by_row,
        {},
        callbacks=[SaveAfter(path, after)],
        max_steps=after,
        enable_checkpointing=True,
    )
    resumed = fit_texts(loader(kind, workers), by_row, {}, ckpt_path=path)
    visits = visits_of(first, resumed)
    assert resumed.exposures == visits
    assert resumed.messages == []
    if kind == "rows":  # of a stream, Lightning fetches a batch ahead of the one that it saves after
        assert visits == {id: 2 * count for id, count in Counter(map(id_of, TEXTS)).items()}


def test_nodes():
    """torchdata's successor to loaders, which is none of torch's."""
    nodes = pytest.importorskip("torchdata.nodes")

    def loader() -> Any:
        texts = nodes.IterableWrapper([torch.tensor(text) for text in TEXTS])
        return nodes.Loader(nodes.Mapper(nodes.Batcher(texts, 5, drop_last=False), torch.stack))

    fitted = fit_and_compare(loader, by_row)
    check(fitted)
    assert fitted.exposures == {id: 2 * count for id, count in Counter(map(id_of, TEXTS)).items()}
