"""Captured losses are those of each sample run alone, whatever loss the user wrote."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.functional import cross_entropy

from lightning_memsink.losses.capture import StepCapture
from tests.support.capturing import (
    CLASS_WEIGHT,
    QUIET,
    B,
    C,
    Model,
    Sequences,
    T,
    against,
    check,
    flat,
    new,
    targets,
    token_loss,
    watched,
)

pytestmark = QUIET


def masked_mean(model, batch):
    mask = (batch["y"] != -100).float()
    losses = F.cross_entropy(model(batch["x"]).transpose(1, 2), batch["y"].clamp(min=0), reduction="none")
    return (losses * mask).sum() / mask.sum()


def shifted(model, batch):
    logits = model(batch["x"])[:, :-1].contiguous()
    return F.cross_entropy(logits.view(-1, C), batch["y"][:, 1:].contiguous().view(-1))


def soft_labels(model, batch):
    return F.cross_entropy(model(batch["x"]).view(-1, C), torch.softmax(3 * targets(batch), -1).view(-1, C))


def by_hand(model, batch):
    log_probs = torch.log_softmax(model(batch["x"]), -1)
    return -log_probs.gather(-1, batch["y"].clamp(min=0)[..., None]).mean()


def classification(model, batch):
    return F.cross_entropy(model(batch["x"]).mean(1), batch["y"][:, 0])


def on_probabilities(model, batch):
    return F.binary_cross_entropy(model(batch["x"]).sigmoid(), targets(batch))


def squared_by_hand(model, batch):
    return ((model(batch["x"]) - targets(batch)) ** 2).mean()


USERS = {
    "cross_entropy": lambda m, b: F.cross_entropy(*flat(m, b)),
    "imported by name": lambda m, b: cross_entropy(*flat(m, b)),
    "class weight": lambda m, b: F.cross_entropy(*flat(m, b), weight=CLASS_WEIGHT),
    "ignore_index": lambda m, b: F.cross_entropy(*flat(m, b), ignore_index=-100),
    "ignored class": lambda m, b: F.cross_entropy(flat(m, b)[0], flat(m, b)[1].clamp(min=0), ignore_index=0),
    "label smoothing": lambda m, b: F.cross_entropy(*flat(m, b), label_smoothing=0.1),
    "soft labels": soft_labels,
    "module": lambda m, b: nn.CrossEntropyLoss(ignore_index=-100)(*flat(m, b)),
    "nll_loss": lambda m, b: F.nll_loss(F.log_softmax(flat(m, b)[0], -1), flat(m, b)[1]),
    "two-dimensional": lambda m, b: F.cross_entropy(m(b["x"]).transpose(1, 2), b["y"]),
    "two-dimensional, smoothed": lambda m, b: F.cross_entropy(m(b["x"]).transpose(1, 2), b["y"], label_smoothing=0.2),
    "shifted": shifted,
    "classification": classification,
    "mse": against(F.mse_loss),
    "mse module": against(nn.MSELoss()),
    "l1": against(F.l1_loss),
    "smooth l1": against(F.smooth_l1_loss, beta=0.3),
    "huber": against(F.huber_loss, delta=0.4),
    "bce": on_probabilities,
    "bce with logits": against(F.binary_cross_entropy_with_logits),
    "bce with pos_weight": against(F.binary_cross_entropy_with_logits, pos_weight=CLASS_WEIGHT),
}
TRAINING_ONLY = {  # their loss calls have no name that validation could watch
    "log-softmax by hand": by_hand,
    "square by hand": squared_by_hand,
}


@pytest.mark.parametrize("step", USERS.values(), ids=USERS)
def test_a_samples_loss_is_its_loss_alone(step):
    check(watched(new(step), step, validate=True))


@pytest.mark.parametrize("step", TRAINING_ONLY.values(), ids=TRAINING_ONLY)
def test_a_loss_written_by_hand_is_read_from_its_graph(step):
    check(watched(new(step), step))


def indexed_mean(model, batch):
    losses = F.cross_entropy(*flat(model, batch), reduction="none").view(batch["y"].shape)
    return losses[batch["y"] != -100].mean()


@pytest.mark.parametrize("step", [masked_mean, indexed_mean])
def test_validation_sees_the_mask_a_user_averages_with(step):
    check(watched(new(step), step, validate=True))


FACTORS = {
    "a factor": lambda m, b: 0.3 * F.cross_entropy(*flat(m, b)),
    "a sum": lambda m, b: F.cross_entropy(*flat(m, b), reduction="sum"),
    "a number of items": lambda m, b: F.cross_entropy(*flat(m, b), reduction="sum") / 1000,
    "a masked mean": masked_mean,
    "a penalty": lambda m, b: F.cross_entropy(*flat(m, b)) + sum(p.abs().mean() for p in m.parameters()),
    "a drift penalty": lambda m, b: F.cross_entropy(*flat(m, b)) + (m.mix.weight - 1).abs().mean(),
    "a loss only logged": lambda m, b: (m.log("mse", against(F.mse_loss)(m, b)), F.cross_entropy(*flat(m, b)))[1],
    "a dict": lambda m, b: {"loss": F.cross_entropy(*flat(m, b)), "other": 1},
}


@pytest.mark.parametrize("step", FACTORS.values(), ids=FACTORS)
def test_a_sole_loss_comes_in_its_own_units_whatever_is_done_to_it(step):
    check(watched(new(step), token_loss))


def in_chunks(pieces, reduction="sum"):
    def step(model, batch):
        parts = [F.cross_entropy(logits, y, reduction=reduction) for logits, y in pieces(model(batch["x"]), batch["y"])]
        return sum(parts) / ((batch["y"] != -100).sum() if reduction == "sum" else len(parts))

    return step


CHUNKS = {
    "flat": in_chunks(lambda z, y: zip(z.view(-1, C).split(10), y.view(-1).split(10), strict=True)),
    "flat, mean of means": in_chunks(
        lambda z, y: zip(z.view(-1, C).split(12), y.view(-1).split(12), strict=True), "mean"
    ),
    "by time": in_chunks(
        lambda z, y: ((a.reshape(-1, C), b.reshape(-1)) for a, b in zip(z.split(2, 1), y.split(2, 1), strict=True))
    ),
}


@pytest.mark.parametrize("step", CHUNKS.values(), ids=CHUNKS)
def test_chunks_of_a_loss_are_one_loss(step):
    """In validation too, where the call's targets alone tell which rows a chunk has."""
    check(watched(new(step), token_loss, validate=True))


def weighted_sum(model, batch):
    return 0.5 * against(F.mse_loss)(model, batch) + 2.0 * F.cross_entropy(*flat(model, batch))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_several_losses_count_as_the_user_weighted_them(accumulate):
    check(watched(new(weighted_sum), weighted_sum, validate=True, accumulate_grad_batches=accumulate))


def test_two_heads_of_the_same_kind_are_two_losses():
    def step(model, batch):
        return F.cross_entropy(*flat(model, batch)) + F.cross_entropy(-flat(model, batch)[0], batch["y"].view(-1))

    check(watched(new(step), step))


def test_mixed_labels_weigh_as_they_were_mixed():
    def step(model, batch):
        log_probs = F.log_softmax(model(batch["x"]).mean(1), -1)
        return 0.7 * F.nll_loss(log_probs, batch["y"][:, 0]) + 0.3 * F.nll_loss(log_probs, batch["y"][:, 1])

    check(watched(new(step), step))


class TimeMajor(Model):
    def forward(self, x):
        return super().forward(x).transpose(0, 1).contiguous()


TIME_MAJOR = {
    "cross_entropy": lambda m, b: F.cross_entropy(m(b["x"]).view(-1, C), b["y"].t().reshape(-1)),
    "mse": lambda m, b: F.mse_loss(m(b["x"]), targets(b).transpose(0, 1)),
}


@pytest.mark.parametrize("step", TIME_MAJOR.values(), ids=TIME_MAJOR)
def test_time_major_rows_find_their_samples(step):
    check(watched(new(step, TimeMajor), step, validate=True))


def test_rows_picked_by_a_mask_find_their_samples():
    def step(model, batch):
        mask = batch["y"] != -100
        return F.cross_entropy(model(batch["x"])[mask], batch["y"][mask])

    check(watched(new(step), token_loss))


def test_a_sequence_without_a_label_has_no_loss():
    step = token_loss
    watch = watched(new(step), step, data=Sequences(all_ignored=1))
    check(watch)
    assert watch.seen[0].losses.isnan().tolist() == [False, True, False, False]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_broken_sample_does_not_break_its_neighbours(bad):
    capture = StepCapture()
    prediction = torch.randn(B, T, requires_grad=True) * 1.0
    target = torch.randn(B, T)
    target[2, 0] = bad
    loss = F.mse_loss(prediction, target)
    capture.begin()
    capture.before_backward(loss)
    loss.backward()
    losses = capture.finish(loss, B).losses
    assert losses.isfinite().tolist() == [True, True, False, True]


def test_an_empty_batch_has_no_losses():
    capture = StepCapture()
    loss = F.cross_entropy(torch.zeros(0, C, requires_grad=True), torch.zeros(0, dtype=torch.int64))
    capture.begin()
    capture.before_backward(loss)
    loss.backward()
    assert capture.finish(loss, 0).losses.shape == (0,)
