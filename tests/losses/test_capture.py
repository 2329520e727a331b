"""Captured losses are those of each sample run alone, whatever loss the user wrote."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.support.capturing import (
    QUIET,
    B,
    C,
    Sequences,
    T,
    check,
    flat,
    new,
    token_loss,
    watched,
)
from tests.support.reading import captured
from tests.support.user_losses import (
    BY_HAND,
    CHUNKS,
    FACTORS,
    TIME_MAJOR,
    USERS,
    TimeMajor,
    ignored_sum,
    indexed_mean,
    masked_mean,
    weighted_sum,
)

pytestmark = QUIET


@pytest.mark.parametrize("step", USERS.values(), ids=USERS)
def test_a_samples_loss_is_its_loss_alone(step):
    check(watched(new(step), step, validate=True))


@pytest.mark.parametrize("step", BY_HAND.values(), ids=BY_HAND)
def test_a_loss_written_by_hand_is_read_from_its_mean(step):
    check(watched(new(step), step, validate=True))


@pytest.mark.parametrize("step", [masked_mean, indexed_mean, ignored_sum])
def test_validation_sees_the_mask_a_user_averages_with(step):
    check(watched(new(step), step, validate=True))


@pytest.mark.parametrize("step", FACTORS.values(), ids=FACTORS)
def test_a_sole_loss_comes_in_its_own_units_whatever_is_done_to_it(step):
    check(watched(new(step), token_loss))


@pytest.mark.parametrize("step", CHUNKS.values(), ids=CHUNKS)
def test_chunks_of_a_loss_are_one_loss(step):
    """In validation too, where no graph says with which weight each chunk enters the loss."""
    check(watched(new(step), token_loss, validate=True))


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
    batch = {"x": torch.randn(B, T), "y": torch.randn(B, T)}
    batch["y"][2, 0] = bad
    losses = captured(lambda batch: F.mse_loss(batch["x"].requires_grad_() * 1.0, batch["y"]), batch, B).losses
    assert losses.isfinite().tolist() == [True, True, False, True]


def test_an_empty_batch_has_no_losses():
    batch = {"x": torch.zeros(0, C, requires_grad=True), "y": torch.zeros(0, dtype=torch.int64)}
    assert captured(lambda batch: F.cross_entropy(batch["x"], batch["y"]), batch, 0).losses.shape == (0,)
