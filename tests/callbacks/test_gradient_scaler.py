"""float16 with a gradient scaler, which multiplies losses, changes its mind after a step, and lets some overflow."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor
from torch.nn import functional as F

from lightning_memsink.callbacks.loss_tracker import LossTracker
from lightning_memsink.callbacks.sample_gradient_mask import SampleGradientMask
from lightning_memsink.callbacks.sink_localizer import SinkLocalizer
from lightning_memsink.ledger import Ledger
from tests.support.small_runs import TinyLM, fit, train_loader, trainer, watch, weights

GROWS = {"init_scale": 1024.0, "growth_interval": 1}
OVERFLOWS = {"init_scale": 2.0**40, "growth_interval": 3}


def half(**scaler: Any) -> dict[str, Any]:
    return {"plugins": MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", **scaler))}


class TwoTerms(TinyLM):
    """The language model's loss, and a third of another; the true ones are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        tokens = batch["input_ids"]
        logits = self.logits(tokens).float()
        likelihood = F.cross_entropy(logits.transpose(1, 2), tokens[:, 2:], reduction="none").mean(1)
        size = F.mse_loss(logits, torch.zeros_like(logits), reduction="none").flatten(1).mean(1)
        self.seen.append((likelihood + size / 3).detach())
        return likelihood.mean() + size.mean() / 3


@pytest.mark.parametrize("scaler", [GROWS, OVERFLOWS], ids=["grows", "overflows"])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_losses_of_several_terms_are_told_in_the_scale_of_their_step(scaler, accumulated):
    model = TwoTerms()
    run = trainer([LossTracker(identity="index")], max_epochs=1, accumulate_grad_batches=accumulated, **half(**scaler))
    run.fit(model, train_loader())
    # Every row is seen once, and the ledger has them in the order of first sight.
    torch.testing.assert_close(Ledger.of(run).losses.last_loss, torch.cat(model.seen))


@pytest.mark.parametrize("scaler", [GROWS, OVERFLOWS], ids=["grows", "overflows"])
def test_what_overflows_leaves_no_trace_in_what_is_told(scaler):
    _, plain = fit([], **half(**scaler))
    run, model = fit([*watch(), SinkLocalizer(every=1, norms=True)], **half(**scaler))
    assert torch.equal(weights(plain), weights(model))
    rows = Ledger.of(run).attribution.rows
    assert len(rows) > 2
    for row in rows:
        values = [value for by_group in (row.shares, row.norms) for group in by_group.values() for value in group]
        assert torch.tensor([*values, *row.movement, *row.by_memorized]).isfinite().all(), row.step
    assert Ledger.of(run).attribution.memorized.shares.isfinite().all()


def test_a_mitigation_holds_under_a_scaler_what_it_holds_without():
    """The set point is in nats of the loss, and not of the scaled one."""
    masks = [SampleGradientMask(k=4) for _ in range(2)]
    for mask, scale in zip(masks, (1.0, 1024.0), strict=True):
        fit([*watch(), mask], **half(init_scale=scale, growth_interval=10**6))  # it never grows: no step is skipped
    acted = [mask.interventions.total("acted") for mask in masks]
    assert acted[0] > 50 and acted[1] == acted[0]
