"""Every sample says its own row, so the ids taken must be the rows that the step sees."""

from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader

from lightning_memsink.callbacks.runtime.loader_ids import LoaderIds
from lightning_memsink.samples.sample_ids import SampleIds
from tests.support.loaders import LOADER, LOADERS, QUIET, Model, Rows, Watch, fit

pytestmark = QUIET


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == "spawn" else name for name in LOADERS]
)
def test_ids_are_the_rows_that_the_step_sees(name):
    watch, model, _ = fit(LOADERS[name]())
    assert watch.taken["train"] == model.rows["train"] and len(model.rows["train"]) > 3
    assert watch.ids.sample_ids.source == "index"


def two() -> tuple[DataLoader, DataLoader]:
    """Their rows tell them apart as their ids should."""
    return DataLoader(Rows(15), 3, shuffle=True), DataLoader(Rows(8, start=LOADER), 2, shuffle=True, num_workers=1)


@pytest.mark.parametrize("mode", ["min_size", "max_size", "max_size_cycle"])
@pytest.mark.parametrize(
    "structure", [list, lambda loaders: dict(zip("ab", loaders, strict=True))], ids=["list", "dict"]
)
def test_loaders_of_one_step_are_kept_apart(mode, structure):
    watch, model, _ = fit(CombinedLoader(structure(two()), mode))
    assert watch.taken["train"] == model.rows["train"]
    assert {row // LOADER for batch in model.rows["train"] for row in batch} == {0, 1}


OPTIONS: dict[str, dict[str, Any]] = {
    "sanity check": {},
    "limits": {"limit_train_batches": 3, "limit_val_batches": 2, "max_epochs": 3},
    "overfit": {"overfit_batches": 2},
    "validation inside an epoch": {"val_check_interval": 2},
    "reload": {"reload_dataloaders_every_n_epochs": 1, "max_epochs": 3},
    "accumulation": {"accumulate_grad_batches": 3},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("workers", [0, 1])
def test_ids_of_training_and_validation_follow_their_own_order(name, workers):
    train = DataLoader(Rows(), 4, shuffle=True, num_workers=workers)
    validate = [DataLoader(Rows(7), 3), DataLoader(Rows(5), 2, num_workers=workers)]
    watch, model, _ = fit(train, validate, **OPTIONS[name])
    assert watch.taken == model.rows and model.rows["validate"]


def test_two_loaders_merged_by_a_hook_have_the_ids_of_both():
    class Merge(Model):
        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return {name: torch.cat([part[name] for part in batch]) for name in ("x", "row")}

    watch, model, _ = fit(CombinedLoader(list(two()), "max_size_cycle"), model=Merge())
    assert watch.taken["train"] == model.rows["train"]


def test_ids_stay_right_when_training_resumes_within_an_epoch(tmp_path):
    save = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1, filename="{step}")
    fit(LOADERS["shuffled"](), callbacks=[save], enable_checkpointing=True, max_steps=4)
    watch, model, trainer = fit(LOADERS["shuffled"](), ckpt=tmp_path / "step=2.ckpt")
    assert watch.taken["train"] == model.rows["train"] and trainer.global_step == 12


def test_a_validation_of_its_own_is_watched_too():
    watch, model, trainer = fit(LOADERS["plain"](), max_epochs=1)
    trainer.validate(model, [DataLoader(Rows(7), 3), DataLoader(Rows(5), 2)], verbose=False)
    assert watch.taken == model.rows and len(model.rows["validate"]) == 6


class Ranks(Watch):
    """Compares on each rank, for what a rank records stays in its process."""

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        assert trainer.world_size == 2 and self.taken["train"] == pl_module.rows["train"]


@pytest.mark.slow
def test_ids_are_right_on_every_rank():
    options = {"accelerator": "cpu", "devices": 2, "strategy": "ddp_fork", "max_epochs": 2, "logger": False}
    trainer = Trainer(**options, enable_checkpointing=False, callbacks=[Ranks(LoaderIds(SampleIds()))])
    trainer.fit(Model(), DataLoader(Rows(), 4, shuffle=True))
