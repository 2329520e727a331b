"""What `SampleGradientMask` meets in the wild: a clear error at the start or one warning, and training goes on."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_memsink.callbacks.loss_tracker import LossTracker
from lightning_memsink.callbacks.memorization_detector import MemorizationDetector
from lightning_memsink.callbacks.sample_gradient_mask import SampleGradientMask
from lightning_memsink.ledger import Ledger
from lightning_memsink.losses.per_sample import per_sample
from lightning_memsink.samples.hashing import content_ids
from tests.support.small_runs import (
    CANARIES,
    CONTROLS,
    TRAIN,
    Rows,
    TinyLM,
    chain,
    control_loader,
    fit,
    train_loader,
    watch,
    weights,
)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "drop"}, r"mode is one of 'hold', 'skip', 'attenuate', 'route', but it is 'drop'\."),
        ({"at": -1.0}, "at is a gap in nats, at least 0, or 'auto', but it is -1.0"),
        ({"at": float("nan")}, "at is a gap in nats, at least 0, or 'auto', but it is nan"),
        ({"k": 0}, "k is a number of controls, at least 1, but it is 0"),
        ({"weight": 1.5}, "weight is the factor on a flagged sample.s gradient, between 0 and 1, but it is 1.5"),
        ({"reserved": 1.0}, "reserved is a share of each layer's units between 0 and 1, but it is 1.0"),
    ],
    ids=str,
)
def test_a_wrong_option_is_named_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        SampleGradientMask(**options)


@pytest.mark.parametrize(
    ("crew", "message"),
    [
        ([SampleGradientMask()], r"writes `batch`. Add LossTracker\(\)"),
        (
            [LossTracker(identity="content"), SampleGradientMask("skip")],
            r"writes `flags`. Add MemorizationDetector\(\)",
        ),
    ],
    ids=["losses", "flags"],
)
def test_a_missing_callback_is_named_before_the_first_step(crew, message):
    with pytest.raises(RuntimeError, match=message):
        fit(crew)


def test_hold_needs_no_detector():
    mask = SampleGradientMask()
    fit([LossTracker(identity="content"), mask])
    assert mask.interventions.total("acted") > 0


def test_routing_a_model_without_hidden_layers_is_refused_at_the_start():
    class Shallow(TinyLM):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = nn.Sequential(nn.Linear(32, 32))

    with pytest.raises(ValueError, match="No hidden layer found in Shallow"):
        fit([*watch(), SampleGradientMask("route")], Shallow())


class Hidden(torch.autograd.Function):
    """Softmax cross entropy, fused: samples' losses come out, and no node tells how."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        log_probs = logits.log_softmax(-1)
        ctx.save_for_backward(log_probs, targets)
        return -log_probs.gather(-1, targets[..., None]).squeeze(-1).mean(1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        log_probs, targets = ctx.saved_tensors
        wrong = log_probs.exp() - F.one_hot(targets, log_probs.shape[-1])
        return wrong * gradient[:, None, None] / targets.shape[1], None


class FusedLM(TinyLM):
    def __init__(self, report: bool) -> None:
        super().__init__()
        self.report = report

    def losses(self, batch: dict[str, Tensor]) -> Tensor:
        tokens = batch["input_ids"]
        seen = self.embed(tokens)
        return Hidden.apply(self.mlp(torch.cat([seen[:, :-2], seen[:, 1:-1]], -1)), tokens[:, 2:])

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
        losses = self.losses(batch)
        return per_sample(losses, content_ids(batch)) if self.report else losses.square().mean().sqrt()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
        return per_sample(self.losses(batch), content_ids(batch))


def test_a_loss_that_tells_no_samples_is_said_once_with_the_cure():
    _, plain = fit([], FusedLM(report=False))
    with pytest.warns(UserWarning) as caught:
        _, model = fit([*watch(), SampleGradientMask("skip")], FusedLM(report=False))
    ours = [str(each.message) for each in caught if "SampleGradientMask" in str(each.message)]
    assert len(ours) == 1 and "SqrtBackward0, which is not linear" in ours[0]
    tracker = [str(each.message) for each in caught if "FusedLM.training_step" in str(each.message)]
    assert len(tracker) == 1, tracker
    assert "return per_sample(losses, ids)" in tracker[0]
    assert torch.equal(weights(model), weights(plain))


@pytest.mark.parametrize("mode", ["hold", "skip"])
def test_the_cure_cures(mode):
    """Losses and ids that the step itself reports; the loader's ids are row numbers, of which nothing repeats."""
    mask = SampleGradientMask(mode)
    _, plain = fit([], FusedLM(report=True), max_epochs=4)
    _, model = fit([LossTracker(identity="index"), MemorizationDetector(k=4), mask], FusedLM(report=True), max_epochs=4)
    assert mask.interventions.total("acted") > 100
    assert model.loss({"input_ids": CANARIES}).item() > 1 + plain.loss({"input_ids": CANARIES}).item()


@pytest.mark.parametrize("controls", ["few", "none", "far"])
def test_without_matched_controls_samples_are_left_alone_and_it_is_said(controls):
    loader = {
        "few": control_loader(CONTROLS[:10]),
        "none": "none",
        "far": control_loader(torch.arange(20)[:, None].expand(20, 12).contiguous()),
    }[controls]
    _, plain = fit([])
    mask = SampleGradientMask()
    found = {
        "few": "leaves every sample alone: 10 controls have a finite loss, and 16 are needed",
        "none": "has no controls: this Trainer runs no validation",
        "far": r"leaves samples without a matched control alone: \d+ of \d+ visits .* as the training set is drawn",
    }[controls]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, model = fit([LossTracker(identity="content"), mask], controls=loader)
    assert sum(bool(re.search(found, str(each.message))) for each in caught) == 1
    if controls != "far":
        assert torch.equal(weights(model), weights(plain)) and mask.interventions.total("acted") == 0
    assert mask.interventions.total("unmatched") > 0 or controls == "none"


class Pictures(TinyLM):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.mlp(batch[0]), batch[1])


def pictures(rows: int) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(rows)
    images = torch.randn(rows, 6, generator=generator)
    return DataLoader(TensorDataset(images, torch.randint(3, (rows,), generator=generator)), 16)


def test_images_need_features_of_the_users():
    with pytest.warns(UserWarning, match=r"SampleGradientMask leaves every sample alone: .*LossTracker\(features="):
        fit(
            [LossTracker(), SampleGradientMask()],
            Pictures(),
            train=pictures(64),
            controls=pictures(40),
            val_check_interval=2,
        )
    mask = SampleGradientMask(at=0.0)
    tracker = LossTracker(features=lambda batch: batch[0][:, :2])
    fit([tracker, mask], Pictures(), train=pictures(64), controls=pictures(40), max_epochs=40, val_check_interval=2)
    assert mask.interventions.total("acted") > 0


class Broken(TinyLM):
    """Every fifth step has one sample with a NaN loss."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
        tokens = batch["input_ids"]
        logits = self.logits(tokens)
        if batch_idx % 5 == 0:
            logits = torch.cat([logits[:1] * torch.nan, logits[1:]])
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 2:].flatten())

    def configure_gradient_clipping(self, *args: Any, **options: Any) -> None:
        for weight in self.parameters():
            weight.grad.nan_to_num_(0, 0, 0)


@pytest.mark.parametrize("mode", ["hold", "skip", "route"])
def test_a_loss_that_is_no_number_costs_nothing_more(mode):
    mask = SampleGradientMask(mode)
    _, model = fit([*watch(), mask], Broken())
    assert weights(model).isfinite().all() and mask.interventions.total("visits") == 3 * len(TRAIN)
    assert 0 <= mask.interventions.total("removed") <= 1


class Ragged(TinyLM):
    """Sequences of which nothing counts, and batches with nothing in them."""

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        tokens = batch["input_ids"]
        if not len(tokens):
            return self.embed.weight.sum() * 0
        logits = self.logits(tokens)
        targets = tokens[:, 2:].masked_fill(tokens[:, :1] < 8, -100)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


@pytest.mark.filterwarnings("ignore:.*could not measure")  # rows are left out of a batch, or their text depends on it
@pytest.mark.parametrize("mode", ["hold", "skip", "attenuate", "route"])
def test_empty_batches_and_sequences_without_a_label_pass(mode):
    def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        tokens = torch.stack([row["input_ids"] for row in rows])
        return {"input_ids": tokens[:0] if len(rows) == 16 and int(tokens[0, 0]) % 5 == 0 else tokens}

    mask = SampleGradientMask(mode)
    _, model = fit([*watch(), mask], Ragged(), train=train_loader(collate_fn=collate))
    assert weights(model).isfinite().all() and 0 <= mask.interventions.total("removed") <= 1


class Keyed(Rows):
    """Ids of the user's own, negative and each twice."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {**super().__getitem__(index), "sample_id": torch.tensor(-(index // 2) - 1)}


def test_ids_may_be_negative_and_come_twice_in_a_batch():
    mask = SampleGradientMask()
    texts = torch.cat([chain(100, seed=1), CANARIES.repeat(16, 1)]).repeat_interleave(2, 0)
    run, _ = fit([LossTracker(), mask], train=DataLoader(Keyed(texts), 16), max_epochs=4)
    assert mask.interventions.total("acted") > 0 and int(Ledger.of(run).losses.ids.max()) == -1


class Manual(TinyLM):
    """Two backwards a step, each of half of the loss."""

    def __init__(self, backwards: int) -> None:
        super().__init__()
        self.automatic_optimization, self.backwards = False, backwards

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        for _ in range(self.backwards):
            self.manual_backward(self.loss(batch) / self.backwards)
        optimizer.step()


@pytest.mark.parametrize("backwards", [1, 2])
def test_manual_optimization_is_held_by_the_whole_loss(backwards):
    mask = SampleGradientMask()
    _, plain = fit([], Manual(backwards), max_epochs=4)
    _, model = fit([*watch(flush_every=1), mask], Manual(backwards), max_epochs=4)
    assert mask.interventions.total("visits") == 4 * len(TRAIN) and mask.interventions.total("acted") > 100
    assert model.loss({"input_ids": CANARIES}).item() > 1 + plain.loss({"input_ids": CANARIES}).item()


def test_tied_weights_route_and_hold():
    class Tied(TinyLM):
        def __init__(self) -> None:
            super().__init__()
            self.mlp[2] = nn.Linear(128, 16)
            self.mlp.append(nn.Linear(16, 32, bias=False))
            self.mlp[3].weight = self.embed.weight

    for mode in ("hold", "route"):
        mask = SampleGradientMask(mode)
        fit([*watch(), mask], Tied(), max_epochs=4)
        assert mask.interventions.total("acted") > 0


class Fails(Callback):
    def __init__(self, error: BaseException | None) -> None:
        self.error = error

    def on_train_batch_end(self, *args: Any) -> None:
        if self.error is not None:
            raise self.error


@pytest.mark.parametrize("error", [None, RuntimeError("of the user"), KeyboardInterrupt()], ids=["end", "error", "^C"])
def test_no_hook_stays_behind(error):
    model = TinyLM()
    try:
        fit([*watch(), SampleGradientMask("route"), Fails(error)], model, max_epochs=1)
    except (RuntimeError, SystemExit):
        assert error is not None
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
