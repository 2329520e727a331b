"""Each process looks at its part of the samples; all of them get what one process alone measures."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_memsink.callbacks.loss_tracker import LossTracker
from tests.distributed.launching import forked
from tests.distributed.runs import VISITS, DeepLM, train
from tests.support.looking import Looks, watched
from tests.support.small_runs import chain

TEXTS = chain(60, seed=6)


class WriteLooks(Callback):
    def __init__(self, looks: Looks, folder: Path) -> None:
        self.looks, self.folder = looks, folder

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        found = [(look.rows, look.losses, look.mode) for look in self.looks.looks]
        facts = {
            "looks": found,
            "ids": self.looks.tracker.table.ids,
            "held": len(self.looks.second._reservoir),
            "forwards": pl_module.forwards,
        }
        torch.save(facts, self.folder / f"looks{trainer.global_rank}.pt")


class Counting(DeepLM):
    """Counts its forwards in evaluation, which have to be as many in each process."""

    forwards = 0

    def forward(self, input_ids: Tensor) -> Tensor:
        self.forwards += not self.training
        return super().forward(input_ids)


class OtherValidation(Counting):
    """Its validation refuses some batches of training, so that one process finds out before the other."""

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        if int(batch["input_ids"].sum()) % 3 == 0 and len(batch["input_ids"]) != 10:
            raise ValueError("not divisible")
        super().validation_step(batch, batch_idx)


class Stream(IterableDataset[dict[str, Tensor]]):
    """Each process has texts of its own."""

    def __len__(self) -> int:
        return len(TEXTS) // 2

    def __iter__(self) -> Any:
        rank = torch.distributed.get_rank()
        return ({"input_ids": text} for text in TEXTS[rank::2])


def run(
    folder: Path, world: int, model: Any = Counting, pick: Any = torch.arange, **options: Any
) -> list[dict[str, Any]]:
    folder.mkdir()

    def work() -> None:
        warnings.simplefilter("ignore")
        tracker, looks = watched("validation_step", LossTracker(families=False), pick=pick, samples=20)
        spread = {"strategy": "ddp_fork", "devices": world} if world > 1 else {}
        callbacks = [tracker, looks, WriteLooks(looks, folder)]
        train(folder, callbacks, model=model(), max_epochs=2, **spread, **options)

    forked(work, folder)
    return [torch.load(path) for path in sorted(folder.glob("looks*.pt"))]


def losses(facts: dict[str, Any], look: int) -> dict[int, float]:
    rows, values, _ = facts["looks"][look]
    return dict(zip(facts["ids"][rows].tolist(), values.tolist(), strict=True))


@pytest.mark.parametrize(
    "pick", [torch.arange, lambda known: torch.tensor([3, 9, 11]), lambda known: torch.tensor([7])]
)
def test_all_processes_have_the_losses_that_one_alone_measures(pick, tmp_path):
    (alone,) = run(tmp_path / "one", 1, pick=pick)
    one, other = run(tmp_path / "two", 2, pick=pick)
    assert len(VISITS) > len(alone["ids"]) and len(alone["looks"]) == len(one["looks"]) > 3
    assert one["forwards"] == other["forwards"]
    for look in range(len(alone["looks"])):
        assert losses(one, look) == losses(other, look)
        assert losses(one, look) == pytest.approx(losses(alone, look), abs=1e-5)
        assert len(losses(one, look)) == len(pick(len(alone["looks"][look][0])))


def test_all_processes_call_the_same_step(tmp_path):
    one, other = run(tmp_path / "two", 2, OtherValidation)
    assert {mode for facts in (one, other) for _, _, mode in facts["looks"]} == {"training_step"}
    assert losses(one, -1) == losses(other, -1) and one["forwards"] == other["forwards"]


def test_each_process_keeps_batches_of_its_own_stream(tmp_path):
    loader = DataLoader(Stream(), 5)
    one, other = run(tmp_path / "two", 2, train=loader, val_check_interval=None)
    assert one["held"] == other["held"] == 4
    assert losses(one, -1) == losses(other, -1) and 20 < len(losses(one, -1)) <= 40
