"""Reading a step's losses changes nothing of the step, keeps nothing of it, and says what it refuses."""

from __future__ import annotations

import weakref
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_memsink.losses import step_reader, step_watch
from lightning_memsink.losses.capture import StepCapture
from lightning_memsink.losses.per_sample import NotCaptured
from lightning_memsink.losses.reweighting import OpenLoss
from lightning_memsink.losses.sample_rows import SampleAxisLost
from lightning_memsink.losses.step_reader import StepReader
from lightning_memsink.losses.unreadable import UnreadableLoss
from tests.support.capturing import QUIET, B, C, Model, Sequences, new, targets, token_loss
from tests.support.reading import captured, losses_read, read
from tests.support.user_losses import BY_HAND, CHUNKS, FACTORS, USERS, indexed_mean, masked_mean, weighted_sum

pytestmark = QUIET
STEPS = {
    **USERS,
    **BY_HAND,
    **CHUNKS,
    **{name: step for name, step in FACTORS.items() if name != "a dict"},
    "masked mean": masked_mean,
    "indexed mean": indexed_mean,
    "several losses": weighted_sum,
}


def texts():
    data = Sequences(B)
    return {"x": data.x.clone(), "y": data.y.clone()}


def model_of(step):
    model = new(step)
    model.log = lambda *args: None
    return model


@pytest.fixture(params=["watched", "between"])
def reader(request, monkeypatch):
    """Makes a reader whose next step with this model is watched, or not."""

    def make(step, model):
        made = StepReader()
        if request.param == "between":
            monkeypatch.setattr(step_reader, "FIRST_STEPS", 1)
            losses_read(made, partial(step, model), texts(), B)
        return made

    return make


class Noisy(Model):
    def hidden(self, x):
        return F.dropout(super().hidden(x), 0.5)


@pytest.mark.parametrize("name", STEPS)
def test_weights_and_random_state_are_those_of_a_run_that_is_not_read(name):
    step, results = STEPS[name], []
    for is_read in (False, True):
        model, reader = new(step, Noisy), StepReader()
        model.log = lambda *args: None
        optimizer = torch.optim.SGD(model.parameters(), 0.5)
        for _ in range(3):
            optimizer.zero_grad()
            if is_read:
                loss, found = read(reader, partial(step, model), texts(), B)
                OpenLoss(loss, B, found).losses()
            else:
                loss = step(model, texts())
            loss.backward()
            optimizer.step()
        results.append([torch.get_rng_state(), *model.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize("name", STEPS)
def test_a_hook_of_the_users_fires_once_a_backward(name, reader):
    step, fired = STEPS[name], []
    model = model_of(step)
    made = reader(step, model)

    def hooked(batch):
        loss = step(model, batch)
        loss.register_hook(fired.append)
        return loss

    loss, found = read(made, hooked, texts(), B)
    OpenLoss(loss, B, found).losses()
    assert fired == []
    loss.backward()
    assert [float(gradient) for gradient in fired] == [1.0]


def test_a_mistake_while_watching_is_kept_from_the_step(monkeypatch):
    def broken(*args):
        raise KeyError("a bug")

    model = new(None)
    plain = token_loss(model, texts())
    monkeypatch.setattr(step_watch, "follow", broken)
    seen = []
    refused = captured(lambda batch: seen.append(token_loss(model, batch)) or seen[0], texts(), B)
    assert torch.equal(seen[0], plain)
    assert isinstance(refused, NotCaptured) and refused.is_internal and "KeyError: 'a bug'" in refused.reason


def test_no_mode_stays_behind_a_step_that_fails():
    def fails(batch):
        token_loss(new(None), batch)
        raise ArithmeticError("the user's own")

    with pytest.raises(ArithmeticError, match="the user's own"):
        read(StepReader(), fails, texts(), B)
    capture = StepCapture()
    capture.begin(texts(), B)
    assert torch._C._len_torch_function_stack() == 1
    capture.abandon()
    assert torch._C._len_torch_function_stack() == 0


def test_two_readers_of_one_step_read_the_same():
    model, one, other = new(None), StepReader(), StepReader()
    batch = texts()
    one.begin(batch, B)
    other.begin(batch, B)
    loss = token_loss(model, batch)
    first, second = (OpenLoss(loss, B, reader.read(loss)).losses() for reader in (one, other))
    one.end()
    other.end()
    assert torch.equal(first, second) and torch._C._len_torch_function_stack() == 0


@pytest.mark.parametrize("name", STEPS)
def test_nothing_of_a_step_outlives_it(name, reader):
    step = STEPS[name]
    model = model_of(step)
    made = reader(step, model)
    batch, seen = texts(), weakref.WeakSet()

    def noting(module, args, output):
        seen.add(output)

    handle = model.head.register_forward_hook(noting)
    made.begin(batch, B)
    loss = step(model, batch)
    handle.remove()
    found = made.read(loss)
    opened = OpenLoss(loss, B, found)
    opened.losses()
    loss.backward()
    opened.close()
    made.end()
    seen.update((loss, *batch.values(), *(each.call.losses for each in found)))
    assert len(seen) > 3
    del loss, batch, found, opened
    assert len(seen) == 0


class Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return (x**2).sum() / 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0]


def mixed(model, batch):
    order, share = torch.tensor([1, 2, 3, 0]), 0.7
    embedded = model.embed(batch["x"])
    embedded = share * embedded + (1 - share) * embedded[order]
    logits = model.head(torch.tanh(model.mix(embedded))).mean(1)
    y = batch["y"][:, 0]
    return share * F.cross_entropy(logits, y) + (1 - share) * F.cross_entropy(logits, y[order])


def variance(model, batch):
    return model(batch["x"]).var(0).mean()


REFUSED = {
    "a root": (lambda m, b: token_loss(m, b) ** 0.5, "PowBackward0, which is not linear"),
    "an exponential": (lambda m, b: token_loss(m, b).exp(), "ExpBackward0, which is not linear"),
    "a product": (
        lambda m, b: token_loss(m, b) * F.mse_loss(m(b["x"]), targets(b)),
        "MulBackward0, which is not linear",
    ),
    "the worst": (
        lambda m, b: torch.stack([token_loss(m, b), m(b["x"]).square().mean()]).max(),
        "MaxBackward1, which is not linear",
    ),
    "custom": (lambda m, b: Fused.apply(m(b["x"])), "FusedBackward, which is not linear"),
    "mixup": (mixed, "rows of different samples in one element (mixup)"),
    "a variance": (
        lambda m, b: m(b["x"]).var(0).mean(),
        "a variance over the samples",
    ),
    "a mean of the batch": (
        lambda m, b: m(b["x"]).mean(0).square().mean(),
        "a mean over the samples",
    ),
}


@pytest.mark.parametrize(("step", "found"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused_is_said(step, found):
    with pytest.raises(SampleAxisLost) as refused:
        read(StepReader(), partial(step, new(None)), texts(), B)
    assert str(refused.value) == found


def test_a_large_part_of_no_sample_is_refused_with_its_share():
    def step(model, batch):
        return token_loss(model, batch) + 100 * variance(model, batch)

    rest = r"the rest is not of samples that are known \(a variance over the samples\)"
    with pytest.raises(UnreadableLoss, match=rf"^cross_entropy explains \d+% of it; {rest}$"):
        read(StepReader(), partial(step, new(None)), texts(), B)


def test_a_batch_without_samples_that_are_known_is_refused():
    model = nn.Linear(3, C)
    batch = [torch.randn(5, 3), torch.randn(7)]
    with pytest.raises(SampleAxisLost, match="its batch has no tensor whose samples are known"):
        read(StepReader(), lambda batch: model(batch[0]).mean(), batch, B)
