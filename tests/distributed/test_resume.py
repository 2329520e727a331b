"""A checkpoint resumes with another world size: nothing is counted twice or lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_memsink import LossTracker
from tests.distributed.launching import forked
from tests.distributed.runs import GLOBAL_BATCH, VISITS, assert_nearly_equal, crew, differences, ranks, train

MITIGATIONS = ("SinkGradientMask", "LossTruncation")


def part(folder: Path, world: int, epochs: int, checkpoint: Path | None = None) -> dict[str, Any]:
    """Up to the end of pass ``epochs``; the facts, equal on all ranks."""
    folder.mkdir()
    spread = {"strategy": "ddp_fork", "devices": world} if world > 1 else {}
    keeps = ModelCheckpoint(folder, "{epoch}", save_top_k=-1, every_n_epochs=1, save_on_train_epoch_end=True)
    options = {"max_epochs": epochs, "enable_checkpointing": True, "ckpt_path": checkpoint}
    forked(lambda: train(folder, [*crew(*MITIGATIONS), keeps], **spread, **options), folder)
    first, *others = ranks(folder)
    for other in others:
        assert differences(first, other) == []
    assert first["world"] == world
    return first


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Three passes on one process, never interrupted."""
    return part(tmp_path_factory.mktemp("whole") / "run", 1, 3)


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 3)])
def test_the_run_goes_on_as_if_nothing_had_changed(before, after, whole, tmp_path):
    stopped = part(tmp_path / "before", before, 2)
    found = part(tmp_path / "after", after, 3, tmp_path / "before" / "epoch=1.ckpt")
    assert int(stopped["losses"]["columns"]["exposures"].sum()) == 2 * len(VISITS)
    assert int(found["losses"]["columns"]["exposures"].sum()) == 3 * len(VISITS)
    assert torch.equal(found["losses"]["columns"]["exposures"], whole["losses"]["columns"]["exposures"])
    for name in ("weights", "losses", "controls", "actions"):
        assert_nearly_equal(whole[name], found[name], name)
    for name in ("verdict", "onset_step", "gap"):
        assert_nearly_equal(whole["flags"][name], found["flags"][name], name)
    assert whole["onset"] == found["onset"] and whole["onset"] != "None"


def test_what_was_counted_when_a_checkpoint_was_written_is_counted_once(tmp_path):
    """The last steps before the end of a pass come after its last evaluation: their counts are open in a checkpoint."""
    one, two = part(tmp_path / "before", 2, 1), part(tmp_path / "after", 2, 2, tmp_path / "before" / "epoch=0.ckpt")
    visits = [sum(record["visits"] for record in run["actions"]["LossTruncation"]["records"]) for run in (one, two)]
    assert visits[0] == len(VISITS) and len(VISITS) * 1.5 < visits[1] <= 2 * len(VISITS)


def test_a_checkpoint_between_two_writes_has_the_visits_of_all_processes(tmp_path):
    keeps = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=7)
    tracker = LossTracker(flush_every=5)
    options = {"strategy": "ddp_fork", "devices": 2, "enable_checkpointing": True, "max_steps": 8}
    forked(lambda: train(tmp_path, [tracker, keeps], **options), tmp_path)
    saved = torch.load(tmp_path / "step=7.ckpt", weights_only=True)["callbacks"]["LossTracker"]
    waiting = [visit["step"] for visit in saved["visits"] for _ in visit["ids"]]
    assert waiting == sorted(waiting) and len(waiting) == 2 * GLOBAL_BATCH
    assert int(saved["table"]["columns"]["exposures"].sum()) == 5 * GLOBAL_BATCH
