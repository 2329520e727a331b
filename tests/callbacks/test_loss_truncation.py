"""The baseline: the highest losses are left out, and nothing before enough of them were seen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.nn import functional as F

from lightning_memsink.callbacks.loss_truncation import LossTruncation
from lightning_memsink.ledger import Ledger
from tests.support.small_runs import TRAIN, TinyLM, fit, snapshot, watch


class Truncating(TinyLM):
    """The oracle: keeps the last losses in a list and leaves samples out by hand."""

    def __init__(self, fraction: float, window: int) -> None:
        super().__init__()
        self.fraction, self.window, self.recent = fraction, window, []
        self.left_out = 0

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        tokens = batch["input_ids"]
        logits = self.logits(tokens)
        losses = F.cross_entropy(logits.transpose(1, 2), tokens[:, 2:], reduction="none").mean(1).detach()
        out = torch.zeros(len(tokens), dtype=torch.bool)
        if len(self.recent) == self.window:
            out = losses > torch.tensor(self.recent).quantile(1 - self.fraction)
        self.recent = [*self.recent, *losses.tolist()][-self.window :]
        self.left_out += int(out.sum())
        logits = torch.where(out[:, None, None], logits.detach(), logits)
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 2:].flatten())


@pytest.mark.parametrize("fraction", [0.05, 0.3])
def test_it_leaves_out_what_a_list_of_losses_says(fraction):
    by_hand = Truncating(fraction, 100)
    fit([], by_hand, max_epochs=2)
    mask = LossTruncation(fraction, 100)
    _, model = fit([mask], max_epochs=2)
    for one, other in zip(model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(one, other)
    assert mask.interventions.total("acted") == by_hand.left_out > 0
    assert mask.interventions.total("removed") == pytest.approx(by_hand.left_out / (2 * len(TRAIN)), abs=0.01)


def test_before_the_window_is_full_nothing_is_left_out():
    _, plain = fit([], max_epochs=1)
    _, model = fit([LossTruncation(window=1000)], max_epochs=1)
    assert all(torch.equal(*pair) for pair in zip(plain.parameters(), model.parameters(), strict=True))


def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path):
    def crew() -> list[Any]:
        keep = ModelCheckpoint(tmp_path, every_n_epochs=1, save_top_k=-1, filename="{epoch}")
        return [*watch(), LossTruncation(0.1, 200), keep]

    whole = fit(crew(), max_epochs=3, enable_checkpointing=True)
    resumed = fit(crew(), max_epochs=3, ckpt_path=str(tmp_path / "epoch=0.ckpt"), enable_checkpointing=True)
    assert snapshot(*resumed) == snapshot(*whole)
    actions = [Ledger.of(run).interventions["LossTruncation"] for run, _ in (whole, resumed)]
    assert actions[0].records == actions[1].records and actions[0].total("acted") > 0


class Broken(TinyLM):
    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        return super().loss(batch) * float("nan")


def test_losses_that_are_no_numbers_are_not_remembered():
    mask = LossTruncation(window=20)
    fit([mask], Broken(), max_epochs=1)
    assert len(mask.recent) <= 16 and mask.interventions.total("acted") == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [({"fraction": 0.0}, "between 0 and 1, but it is 0.0"), ({"window": 1}, "at least 2, but it is 1")],
)
def test_a_wrong_option_is_named_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        LossTruncation(**options)


def test_two_backwards_of_a_step_are_weighed_without_a_tracker():
    """Its own reader must outlive the first: any mistake would warn, which fails a test."""

    class Twice(TinyLM):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            for _ in range(2):
                self.manual_backward(self.loss(batch) / 2)
            optimizer.step()

    truncation = LossTruncation(fraction=0.3, window=16)
    fit([truncation], Twice(), max_epochs=1, controls="none")
    assert truncation.interventions.total("visits") == len(TRAIN)
    assert truncation.interventions.total("acted") > 0
