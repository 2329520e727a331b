"""Controls given to the tracker instead of a validation set: any kind, in any order, failing or not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_memsink.callbacks.loss_tracker import LossTracker
from lightning_memsink.callbacks.memorization_detector import MemorizationDetector
from lightning_memsink.ledger import Ledger
from tests.support.graphs import GRAPHS, OfGraphs, collated, graphs
from tests.support.small_runs import CONTROLS, Rows, TinyLM, fit, trainer, weights


def watched(controls: Any, **options: Any) -> list[Any]:
    return [LossTracker(controls=controls, control_every=7, **options), MemorizationDetector(k=4)]


@pytest.mark.parametrize("identity", ["auto", "index", "content"])
def test_the_order_of_controls_does_not_matter(identity):
    """Two evaluations of a shuffling loader compare each control with itself."""
    in_order, shuffled = (
        Ledger.of(fit(watched(DataLoader(Rows(CONTROLS), 40, shuffle=shuffle), identity=identity), controls="none")[0])
        for shuffle in (False, True)
    )
    assert len(in_order.controls) == len(CONTROLS)
    for name in ("ids", "previous", "latest", "features"):
        torch.testing.assert_close(getattr(in_order.controls, name), getattr(shuffled.controls, name))
    assert torch.equal(in_order.flags.verdict, shuffled.flags.verdict)


def test_workers_of_controls_persist_between_evaluations_and_end_with_fit():
    loader = DataLoader(Rows(CONTROLS), 40, num_workers=1, persistent_workers=True, multiprocessing_context="fork")
    before = dict(vars(loader))
    run, _ = fit(watched(loader), controls="none", max_epochs=1)
    assert len(Ledger.of(run).controls) == len(CONTROLS)
    assert vars(loader) == before and loader._iterator is None


@pytest.mark.parametrize("own_ids", [True, False], ids=["ids of their own", "rows"])
def test_batches_of_graphs_can_be_controls(own_ids):
    """The first tensor of such a batch has one row per node."""
    held_out = graphs(seed=1)

    def collate(some: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        batch = collated(some)
        return batch if own_ids else {name: part for name, part in batch.items() if name != "sample_id"}

    controls = DataLoader(held_out, 8, collate_fn=collate)  # type: ignore[arg-type]
    run = trainer(watched(controls), max_epochs=2, val_check_interval=None)
    run.fit(OfGraphs(), DataLoader(graphs(seed=0), 8, collate_fn=collated))  # type: ignore[arg-type]
    assert Ledger.of(run).controls.ids.tolist() == list(range(GRAPHS))
    assert Ledger.of(run).controls.latest.isfinite().all()


class Stream(IterableDataset[dict[str, Tensor]]):
    """Without rows, and without a length."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return ({"input_ids": tokens} for tokens in CONTROLS)


@pytest.mark.parametrize("identity", ["auto", "content"])
def test_a_stream_can_be_controls(identity):
    run, _ = fit(watched(DataLoader(Stream(), 40), identity=identity), controls="none", max_epochs=1)
    assert len(Ledger.of(run).controls) == len(CONTROLS) and len(Ledger.of(run).controls.curve) > 1


class Broken(Rows):
    """Held-out data with a sample that can't be read."""

    def __init__(self, tokens: Tensor, readable: int) -> None:
        super().__init__(tokens)
        self.left = readable

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        self.left -= 1
        if self.left < 0:
            raise OSError("the file of the sample is gone")
        return super().__getitem__(index)


@pytest.mark.parametrize("readable", [50, len(CONTROLS) + 50], ids=["from the start", "later"])
def test_controls_that_fail_never_end_the_run(readable):
    _, plain = fit([], controls="none")
    with pytest.warns(UserWarning, match=r"could not evaluate its controls \(OSError: the file .*Training goes on"):
        run, model = fit(watched(DataLoader(Broken(CONTROLS, readable), 40)), controls="none")
    assert torch.equal(weights(plain), weights(model))
    assert model.training and type(model).training_step is TinyLM.training_step
    controls = Ledger.of(run).controls
    assert len(controls) == (0 if readable < len(CONTROLS) else len(CONTROLS)), "all of them, or none"
    assert len(controls.curve) == (0 if readable < len(CONTROLS) else 1)
    assert torch.overrides._get_current_function_mode() is None
