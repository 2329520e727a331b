"""Each process meets labels in another order: all of them give the same codes, those of one process alone."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch.utils.data import DataLoader

from lightning_memsink import LiveCurves, LossTracker, MemorizationDetector
from lightning_memsink.ledger import Ledger
from tests.distributed.launching import forked
from tests.distributed.runs import ONCE, VISITS, GlobalBatches, train
from tests.support.small_runs import Rows


class Labelled(Rows):
    def __getitem__(self, index: int) -> dict[str, Any]:
        label = f"web {index % 5}" if index < 196 else "canary"
        return {**super().__getitem__(index), "source": label if index % 7 else None}


class Collate:
    """None is no value that `default_collate` takes."""

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "input_ids": torch.stack([row["input_ids"] for row in rows]),
            "source": [row["source"] for row in rows],
        }


class WriteSources(Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        ledger = Ledger.of(trainer)
        table, budget = ledger.losses, ledger.budget
        facts = {
            "world": trainer.world_size,
            "ids": table.ids,
            "source": table.source,
            "labels": table.source_names.labels,
            "crossed": None if budget is None else budget.crossed_at,
            "series": {name for name in ledger.history[-1] if name.startswith("source/")},
        }
        torch.save(facts, self.folder / f"sources{trainer.global_rank}.pt")


def run(folder: Path, world: int) -> list[dict[str, Any]]:
    folder.mkdir()

    def work() -> None:
        warnings.simplefilter("ignore")
        loader = DataLoader(Labelled(ONCE), batch_sampler=GlobalBatches(VISITS), collate_fn=Collate())  # type: ignore
        curves = LiveCurves(budget={"canary": 0.01})
        crew = [LossTracker(), MemorizationDetector(k=4), curves, WriteSources(folder)]
        spread = {"strategy": "ddp_fork", "devices": world} if world > 1 else {}
        train(folder, crew, train=loader, **spread)

    forked(work, folder)
    return [torch.load(path) for path in sorted(folder.glob("sources*.pt"))]


@pytest.mark.distributed
@pytest.mark.parametrize("world", [2, 3])
def test_codes_agree_between_processes_and_with_one_alone(world, tmp_path):
    (alone,) = run(tmp_path / "alone", 1)
    several = run(tmp_path / "several", world)
    assert [each["world"] for each in several] == [world] * world
    for each in several:
        assert repr({**each, "world": 1}) == repr({**several[0], "world": 1})
    by_id = [
        {
            id: -1 if code < 0 else facts["labels"][code]
            for id, code in zip(facts["ids"].tolist(), facts["source"].tolist(), strict=True)
        }
        for facts in (alone, several[0])
    ]
    assert by_id[0] == by_id[1] and set(by_id[0].values()) == {-1, "canary", *(f"web {n}" for n in range(5))}
    assert alone["crossed"].keys() == several[0]["crossed"].keys() == {"canary"}
    assert alone["series"] == several[0]["series"] and len(alone["series"]) == 12
