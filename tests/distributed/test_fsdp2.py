"""Weights sharded over two processes (FSDP2): all that watches, and every mitigation that does not slice weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard

from lightning_memsink import SinkLocalizer
from lightning_memsink.detection.verdicts import Verdict
from tests.distributed.launching import Failed, forked, together
from tests.distributed.runs import (
    MITIGATION,
    DeepLM,
    are_canaries,
    assert_nearly_equal,
    crew,
    differences,
    ranks,
    train,
)

WITH_WEIGHTS = [name for name in MITIGATION if name.startswith("SinkGradientMask")]


class Sharded(DeepLM):
    def configure_model(self) -> None:
        if self.device_mesh is not None:
            for part in (*self.blocks, self.head, self):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])


def fsdp(
    folder: Path, *mitigations: str, world: int = 2, extra: tuple[Any, ...] = (), **options: Any
) -> dict[str, Any]:
    folder.mkdir()

    def work() -> None:
        strategy = ModelParallelStrategy(data_parallel_size=world, tensor_parallel_size=1)
        here = {"strategy": strategy, "devices": world, "precision": "32-true"}
        train(folder, [*crew(*mitigations), *extra], model=Sharded(), **here, **options)

    together(work, folder, world)
    first, *others = ranks(folder)
    assert [place for other in others for place in differences(first, other) if not place.startswith("/weights")] == []
    first["weights"] = {
        name: torch.cat([each["weights"][name] for each in (first, *others)]) for name in first["weights"]
    }
    return first


def alone(folder: Path, *mitigations: str, **options: Any) -> dict[str, Any]:
    folder.mkdir()
    forked(lambda: train(folder, crew(*mitigations), precision="32-true", **options), folder)
    return ranks(folder)[0]


@pytest.mark.parametrize("name", ["nothing", *(name for name in MITIGATION if name not in WITH_WEIGHTS)])
def test_sharded_weights_train_and_measure_as_whole_ones_do(name, tmp_path):
    mitigations = () if name == "nothing" else (name,)
    found = fsdp(tmp_path / "two", *mitigations)
    assert len(found["attribution"]["rows"]) > 1 and found["extraction"]
    assert min(found["attribution"]["rows"][-1]["movement"]) > 0
    if name in ("SinkDropout", "Goldfish"):  # by process; no run on one is the same
        return
    one = alone(tmp_path / "one", *mitigations)
    assert torch.equal(one["losses"]["columns"]["exposures"], found["losses"]["columns"]["exposures"])
    early = one["flags"]["evaluations"][0]["step"]
    assert early == found["flags"]["evaluations"][0]["step"]
    for row, other in zip(one["attribution"]["rows"][:1], found["attribution"]["rows"][:1], strict=True):
        for column in ("shares", "norms", "movement"):
            near_enough(row[column], other[column])
    assert_nearly_equal(one["losses"]["columns"]["first_loss"], found["losses"]["columns"]["first_loss"])
    if name == "nothing":
        assert found["flags"]["verdict"][are_canaries(found["losses"]["ids"])].tolist() == [Verdict.MEMORIZED] * 4
        assert torch.equal(one["flags"]["verdict"], found["flags"]["verdict"])


def every_pass(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, "{epoch}", save_top_k=-1, every_n_epochs=1, save_on_train_epoch_end=True)


def near_enough(one: Any, other: Any) -> None:
    """Summaries of runs that engines which add up in another order drove apart, step by step, in single precision: the
    noise grows with every update, to under a percent here. Losses and counts are compared, not the noise."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            near_enough(one[key], other[key])
    else:
        assert one == pytest.approx(other, rel=1e-2, abs=1e-4)


def test_a_run_resumes_from_a_sharded_checkpoint(tmp_path):
    keeps = {"extra": (every_pass(tmp_path),), "enable_checkpointing": True}
    whole = fsdp(tmp_path / "whole", "hold", "MemSinks", max_epochs=3)
    fsdp(tmp_path / "before", "hold", "MemSinks", **keeps, max_epochs=2)
    found = fsdp(
        tmp_path / "after",
        "hold",
        "MemSinks",
        **keeps,
        max_epochs=3,
        ckpt_path=tmp_path / "epoch=1.ckpt",
    )
    for name in ("losses", "controls", "flags", "onset", "sinks"):
        assert differences(whole[name], found[name]) == [], name


def test_another_world_size_resumes_from_a_sharded_checkpoint(tmp_path):
    keeps = {"extra": (every_pass(tmp_path),), "enable_checkpointing": True}
    before = fsdp(tmp_path / "before", "hold", **keeps, max_epochs=2)
    found = fsdp(
        tmp_path / "after",
        "hold",
        world=3,
        **keeps,
        max_epochs=3,
        ckpt_path=tmp_path / "epoch=1.ckpt",
    )
    visits = [int(run["losses"]["columns"]["exposures"].sum()) for run in (before, found)]
    assert visits[1] * 2 == visits[0] * 3


@pytest.mark.parametrize("name", WITH_WEIGHTS)
def test_slices_of_sharded_weights_are_refused_by_name(name, tmp_path):
    with pytest.raises(Failed, match="SinkGradientMask can't work under ModelParallelStrategy: it shards weights"):
        fsdp(tmp_path / "run", name)


def test_gradients_of_the_controls_are_refused_by_name(tmp_path):
    """They lacked the head and were at times empty: autograd gives no gradients for the weights of a forward pass."""

    def work() -> None:
        strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
        watching = [*crew()[:2], SinkLocalizer(agreement=True)]
        train(tmp_path, watching, model=Sharded(), strategy=strategy, devices=2, precision="32-true")

    with pytest.raises(
        Failed, match=r"SinkLocalizer\(agreement=True\) can't work under ModelParallelStrategy: its forward uses"
    ):
        together(work, tmp_path, 2)


def test_margins_are_attributed_as_on_one_process(tmp_path):
    """Its backward of our own ends at the hidden units, which are whole."""
    watching = [*crew()[:2], SinkLocalizer(every=2, norms=False, objective="margin")]
    here = {"model": Sharded(), "devices": 2, "precision": "32-true"}
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    together(lambda: train(two, watching, strategy=strategy, **here), two, 2)
    forked(lambda: train(one, watching, precision="32-true"), one)
    rows, others = (ranks(folder)[0]["attribution"]["rows"] for folder in (one, two))
    assert [row["visits"] for row in rows[:4]] == [row["visits"] for row in others[:4]]
    near_enough(rows[2]["shares"], others[2]["shares"])
    assert rows[2]["shares"]["memorized"]


def test_tensor_parallel_is_refused_by_name(tmp_path):
    def work() -> None:
        strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=2)
        train(tmp_path, crew(), model=Sharded(), strategy=strategy, devices=2, precision="32-true")

    with pytest.raises(Failed, match="can't work under ModelParallelStrategy: its tensor_parallel_size is 2"):
        together(work, tmp_path, 2)
