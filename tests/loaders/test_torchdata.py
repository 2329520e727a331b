"""torchdata's StatefulDataLoader: a run that ends within an epoch goes on with the batches that are left."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor
from torch.utils.data import IterableDataset

from tests.support.text_runs import by_row, check, fit_and_compare, fit_texts, id_of, texts

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


class Save(Checkpoint):
    """Saves a checkpoint after one batch, when other callbacks are done with it."""

    def __init__(self, path: Path, after: int) -> None:
        self.path, self.after = path, after

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.after:
            trainer.save_checkpoint(self.path)


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
        loader(kind, workers), by_row, {}, callbacks=[Save(path, after)], max_steps=after, enable_checkpointing=True
    )
    resumed = fit_texts(loader(kind, workers), by_row, {}, ckpt_path=path)
    visits = Counter[int]()
    for run in (first, resumed):
        visits.update({id_of(text): len(losses) for text, losses in run.model.visits.items()})
    assert resumed.exposures == visits
    assert resumed.messages == []
    if kind == "rows":  # of a stream, Lightning fetches a batch ahead of the one that it saves after
        assert visits == {id: 2 * count for id, count in Counter(map(id_of, TEXTS)).items()}
