"""A second look between the steps of a training that is mitigated and localized: nothing of it changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_memsink import Goldfish, LossTruncation, MemSinks, SampleGradientMask, SinkDropout, SinkLocalizer
from lightning_memsink.callbacks.loss_tracker import LossTracker
from lightning_memsink.callbacks.memorization_detector import MemorizationDetector
from lightning_memsink.ledger import Ledger
from tests.support.looking import Looks
from tests.support.small_runs import TRAIN, Rows, fit, snapshot

CREWS: dict[str, Any] = {
    "hold": lambda: [SampleGradientMask(at=0.2, k=4)],
    "localized": lambda: [SinkLocalizer(every=2), SinkDropout(who="all")],
    "sinks by design": lambda: [MemSinks(pool_fraction=0.3, active_fraction=0.1)],
    "other losses": lambda: [Goldfish(k=3), LossTruncation(0.1)],
}


class BetweenSteps(Looks):
    """A look after every third step, in the tracker's own hook or after those of all others."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *batch: Any) -> None:
        if trainer.global_step % 3 == 0:
            self.look(trainer, pl_module)


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("mode", ["validation_step", "training_step", "training"])
@pytest.mark.parametrize("crew", CREWS)
def test_mitigations_and_localizers_do_not_notice(crew, mode, is_first):
    found = []
    for looks in (False, True):
        torch.manual_seed(0)
        tracker = LossTracker(identity="content", flush_every=1)
        look = [BetweenSteps(tracker, mode, at="not a hook")] if looks else []
        others = [MemorizationDetector(k=4), *CREWS[crew]()]
        callbacks = [tracker, *look, *others] if is_first else [tracker, *others, *look]
        run, module = fit(callbacks, train=DataLoader(Rows(TRAIN), 16, shuffle=True), max_epochs=1)
        done = {name: log.state_dict() for name, log in Ledger.of(run).interventions.items()}
        localized = Ledger.of(run).get(Ledger.attribution)
        found.append((snapshot(run, module), repr(done), repr(localized and localized.state_dict())))
    assert len(look[0].looks) == 7 and all(len(each.rows) for each in look[0].looks)
    assert found[0] == found[1]
