"""Every step's losses are right, whether it is watched or not; where they can't be, that is said."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from lightning_memsink.losses import step_reader
from lightning_memsink.losses.sample_rows import SampleAxisLost
from lightning_memsink.losses.step_reader import StepReader
from tests.support.capturing import QUIET, B, C, Model, T, alone, new, token_loss
from tests.support.reading import losses_read
from tests.support.user_losses import (
    BY_HAND,
    CHUNKS,
    FACTORS,
    TIME_MAJOR,
    USERS,
    TimeMajor,
    indexed_mean,
    masked_mean,
    weighted_sum,
)

pytestmark = QUIET
STEPS = {
    **USERS,
    **BY_HAND,
    **FACTORS,
    **CHUNKS,
    "masked mean": masked_mean,
    "indexed mean": indexed_mean,
    "several losses": weighted_sum,
    **{f"time-major {name}": step for name, step in TIME_MAJOR.items()},
}
ALWAYS_WATCHED = {"flat", "indexed mean"}  # their rows are in no order that other steps must have


def text(seed: int, size: int = B, length: int = T):
    """A batch of ragged sequences."""
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randint(0, C, (2, size, length), generator=generator)
    y[:, -1] = torch.where(torch.arange(size) % 2 == 1, -100, y[:, -1])
    return {"x": x, "y": y}


def value(step, model, batch):
    loss = step(model, batch)
    return loss["loss"] if isinstance(loss, dict) else loss


def model_of(name, step):
    model = new(step, TimeMajor if name.startswith("time-major") else Model)
    model.log = lambda *args: None
    return model


@pytest.fixture
def watch_once(monkeypatch):
    monkeypatch.setattr(step_reader, "FIRST_STEPS", 1)


@pytest.mark.parametrize("name", STEPS)
def test_steps_between_watched_ones_are_read_as_those_are(name, watch_once):
    step = STEPS[name]
    model, reader = model_of(name, step), StepReader()
    for number in range(4):
        batch = text(number)
        between = losses_read(reader, partial(value, step, model), batch, B)
        watched = losses_read(StepReader(), partial(value, step, model), batch, B)
        assert watched.isfinite().all()
        assert_close(between, watched)
        assert reader.is_watching is (number == 0 or name in ALWAYS_WATCHED)


def views(model, batch):
    x, y = batch["x"], batch["y"]
    return F.cross_entropy(model(torch.cat([x, x.flip(1)])).view(-1, C), torch.cat([y, y]).view(-1))


def chunks(model, batch):
    """Each half with a mean of its own, which the other has no sample in."""
    parts = zip(model(batch["x"]).chunk(2), batch["y"].chunk(2), strict=True)
    return sum(F.cross_entropy(logits.reshape(-1, C), y.reshape(-1)) for logits, y in parts) / 2


def permuted(model, batch):
    order = torch.randperm(len(batch["x"]))
    return token_loss(model, {key: part[order] for key, part in batch.items()})


LAYOUTS = {"two views": (views, views), "chunks": (chunks, token_loss), "permuted": (permuted, token_loss)}


@pytest.mark.parametrize(("step", "oracle"), LAYOUTS.values(), ids=LAYOUTS)
def test_rows_find_their_samples_at_each_step_whatever_their_order(step, oracle, watch_once):
    model, reader = new(step), StepReader()
    for number in range(12):
        batch = text(number)
        assert_close(losses_read(reader, partial(step, model), batch, B), alone(oracle, model, batch))
        assert reader.is_watching is (number == 0 or step is permuted)


def test_samples_that_a_step_leaves_out_have_no_loss(watch_once):
    model, reader = new(None), StepReader()

    def of_half(batch):
        return token_loss(model, {key: part[: B // 2] for key, part in batch.items()})

    for number in range(3):
        batch = text(number)
        expected = alone(token_loss, model, batch)
        expected[B // 2 :] = torch.nan
        assert_close(losses_read(reader, of_half, batch, B), expected, equal_nan=True)


@pytest.mark.parametrize(
    ("step", "cls"),
    [(token_loss, Model), *((step, TimeMajor) for step in TIME_MAJOR.values())],
    ids=["batch-major", *TIME_MAJOR],
)
def test_a_batch_as_long_as_its_texts_is_read_where_the_loader_has_said_which_axis_is_of_samples(step, cls, watch_once):
    model, reader = new(step, cls), StepReader()
    for number in range(3):
        square = text(number, T, T)
        known = losses_read(reader, partial(step, model), square, T, axes=[0, 0])
        assert_close(known, alone(step, model, square))
    with pytest.raises(SampleAxisLost, match="its batch has no tensor whose samples are known"):
        losses_read(StepReader(), partial(step, model), square, T)


SHAPES = [(4, 6), (4, 9), (3, 6), (2, 9), (4, 6), (1, 6), (4, 3)]


@pytest.mark.parametrize("name", [*STEPS, *LAYOUTS])
def test_batches_of_new_shapes_are_read_or_have_no_loss_and_the_next_of_that_shape_is_read(name, watch_once):
    step = LAYOUTS[name][0] if name in LAYOUTS else STEPS[name]
    model, reader = model_of(name, step), StepReader()
    for number, (size, length) in enumerate(SHAPES):
        for seed in (number, number + 100):
            batch = text(seed, size, length)
            known = losses_read(reader, partial(value, step, model), batch, size)
            expected = losses_read(StepReader(), partial(value, step, model), batch, size)
            if seed == number and known.isnan().all():
                continue
            assert_close(known, expected, equal_nan=True)
