"""Watching leaves loaders, batches and random numbers as they would have been."""

import random
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from lightning_memsink.callbacks.runtime.loader_ids import LoaderIds
from lightning_memsink.samples.sample_ids import SampleIds
from tests.support.loaders import LOADERS, QUIET, Model, Odd, Rows, fit

pytestmark = QUIET


def random_states() -> list[Any]:
    return [random.getstate(), torch.get_rng_state().tolist()]


@pytest.mark.parametrize("name", ["shuffled", "2 workers", "weighted", "persistent"])
def test_the_model_is_trained_as_if_nobody_watched(name):
    """Same order, same random numbers afterwards, same kind of batch."""
    _, watched, _ = fit(LOADERS[name]())
    after = random_states()
    _, alone, _ = fit(LOADERS[name](), ids=False)
    assert (watched.rows, watched.kinds, after) == (alone.rows, alone.kinds, random_states())


@pytest.mark.parametrize("name", ["shuffled", "persistent", "leaves batches out"])
def test_the_loader_is_the_users_own_again_and_serves_another_trainer(name):
    loader = LOADERS[name]()
    before = dict(vars(loader))
    for _ in range(2):
        watch, model, trainer = fit(CombinedLoader([loader], "min_size"), loader)
        assert watch.taken == model.rows
        assert trainer.train_dataloader == [loader] and trainer.val_dataloaders is loader
        assert vars(loader) == before and "process_dataloader" not in vars(trainer.strategy)
    assert fit(loader, ids=False)[1].rows["train"]


def test_attributes_set_on_the_loader_or_its_rows_reach_training():
    class Turn(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            view = trainer.train_dataloader
            assert isinstance(view, Odd) and type(view).__name__ == "Odd" and view.dataset is loader.dataset
            view.dataset.start, loader.mood = 100, "good"
            assert view.mood == "good" and len(view) == len(loader)

    loader = Odd(Rows(), 4)
    _, model, _ = fit(loader, callbacks=[Turn()])
    assert loader.dataset.start == 100 and model.rows["train"][-1][0] > 100


def test_the_user_may_iterate_over_the_same_loader_in_between():
    class Peek(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            assert len(next(iter(trainer.train_dataloader))["row"]) == 4

    watch, model, _ = fit(LOADERS["shuffled"](), callbacks=[Peek()])
    assert watch.taken["train"] == model.rows["train"]


def test_batches_that_are_none_or_skipped_do_not_shift_the_ids():
    def seldom(samples: list[dict[str, Any]]) -> Any:
        return None if samples[0]["row"] % 3 == 0 else default_collate(samples)

    class Skip(Model):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if batch_idx == 2 else None

    watch, model, _ = fit(DataLoader(Rows(), 2, shuffle=True, collate_fn=seldom), model=Skip())
    stepped = [taken for taken in watch.taken["train"] if taken in model.rows["train"]]
    assert stepped == model.rows["train"] and len(stepped) > 2


def test_nothing_stays_behind_when_training_fails():
    class Broken(Model):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            raise ArithmeticError

    loader, ids = LOADERS["persistent"](), LoaderIds(SampleIds())
    combined = CombinedLoader({"a": loader}, "min_size")
    with pytest.raises(ArithmeticError):
        fit(combined, ids=ids, model=Broken())
    assert combined.iterables == {"a": loader} and loader._iterator is None
    assert fit(combined, ids=ids)[0].taken["train"]
