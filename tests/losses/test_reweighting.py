"""A sample's gradient leaves the backward exactly as asked, and everything else stays as it was."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from lightning_memsink.losses.autograd_graph import find_loss_calls
from lightning_memsink.losses.per_sample import per_sample, terms_of, weigh
from lightning_memsink.losses.reweighting import OpenLoss
from lightning_memsink.losses.unreadable import UnreadableLoss
from tests.support.capturing import QUIET, B, Model, Sequences, T, alone, flat, new, token_loss
from tests.support.user_losses import (
    CHUNKS,
    FACTORS,
    TIME_MAJOR,
    TRAINING_ONLY,
    USERS,
    TimeMajor,
    indexed_mean,
    weighted_sum,
)

pytestmark = QUIET
WEIGHTS = torch.tensor([1.0, 0.0, 0.25, 1.0])


def picked_by_a_mask(model, batch):
    mask = batch["y"] != -100
    return F.cross_entropy(model(batch["x"])[mask], batch["y"][mask])


def reported(model, batch):
    losses = F.cross_entropy(model(batch["x"]).transpose(1, 2), batch["y"], reduction="none").mean(1)
    return per_sample(losses, torch.arange(B))["loss"]


class Opaque(torch.autograd.Function):
    """Sums of squares of each sample, as a fused loss would give them: with nothing to read in the graph."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square().flatten(1).sum(1)

    @staticmethod
    def backward(ctx, gradient):
        return 2 * ctx.saved_tensors[0] * gradient[:, None, None]


STEPS = {
    **USERS,
    **TRAINING_ONLY,
    **FACTORS,
    **CHUNKS,
    "indexed mean": indexed_mean,
    "several losses": weighted_sum,
    "picked by a mask": picked_by_a_mask,
    "reported": reported,
    "reported, in custom code": lambda m, b: per_sample(Opaque.apply(m(b["x"])))["loss"],
}


def batch_of(**options: Any) -> dict[str, Tensor]:
    data = Sequences(B, **options)
    return {"x": data.x, "y": data.y}


def damped(model: Model, axis: int, weights: Tensor) -> Model:
    """The oracle: a model whose outputs are the same and lead back by weight, whatever loss is made of them."""
    forward = model.forward

    def damping(x):
        out = forward(x)
        sizes = [-1 if at == axis else 1 for at in range(out.ndim)]
        return out.detach() + weights.view(sizes) * (out - out.detach())

    model.forward = damping
    return model


def value(step: Any, model: Model, batch: dict[str, Tensor]) -> Tensor:
    loss = step(model, batch)
    return loss["loss"] if isinstance(loss, dict) else loss


def gradients(model: Model) -> dict[str, Tensor]:
    return {name: weight.grad for name, weight in model.named_parameters()}


def weighed(step: Any, model: Model, batch: dict[str, Tensor], weights: Tensor, scale: float = 1.0) -> Model:
    loss = value(step, model, batch) * scale
    opened = OpenLoss(loss, len(weights), scale)
    opened.weigh_samples(weights)
    loss.backward()
    opened.close()
    return model


def pair(step: Any, cls: type[Model] = Model) -> tuple[Model, Model]:
    models = [copy.deepcopy(new(step, cls)) for _ in range(2)]
    for model in models:
        model.log = lambda *args: None
    return models[0], models[1]


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_a_samples_gradient_counts_by_its_weight(step):
    """Denominators included: under a mean the rest weigh what they weighed."""
    ours, oracle = pair(step)
    batch = batch_of()
    weighed(step, ours, batch, WEIGHTS)
    value(step, damped(oracle, 0, WEIGHTS), batch).backward()
    for name, gradient in gradients(ours).items():
        assert_close(gradient, gradients(oracle)[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("step", TIME_MAJOR.values(), ids=TIME_MAJOR)
def test_time_major_rows_are_weighed_by_sample(step):
    ours, oracle = pair(step, TimeMajor)
    weighed(step, ours, batch_of(), WEIGHTS)
    value(step, damped(oracle, 1, WEIGHTS), batch_of()).backward()
    for name, gradient in gradients(ours).items():
        assert_close(gradient, gradients(oracle)[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["cross_entropy", "mse", "two-dimensional", "label smoothing", "log-softmax by hand"])
def test_a_sample_of_weight_zero_leaves_to_the_bit(name):
    """Its logits get zeros, the others bit for bit what they got; weights of one change no bit at all."""
    step, batch, seen = STEPS[name], batch_of(), []
    for weights in (None, torch.ones(B), torch.tensor([1.0, 0.0, 1.0, 1.0])):
        model = new(step)
        forward = model.forward

        def noting(x, forward=forward):
            out = forward(x)
            out.register_hook(seen.append)
            return out

        model.forward = noting
        if weights is None:
            value(step, model, batch).backward()
        else:
            weighed(step, model, batch, weights)
    plain, same, without = seen
    assert torch.equal(plain, same)
    assert torch.equal(without[1], torch.zeros_like(without[1])) and bool(plain[1].abs().sum() > 0)
    assert torch.equal(without[[0, 2, 3]], plain[[0, 2, 3]])


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_losses_are_known_before_the_backward_and_recorded_alike_after_it(step):
    """The record that a tracker takes of a weighed backward is the one it would take of a plain one, to the bit."""
    batch, scale = batch_of(), 0.5
    recorded = []
    for weights in (None, WEIGHTS):
        model, _ = pair(step)
        loss = value(step, model, batch) * scale
        opened = OpenLoss(loss, B, scale)
        calls = find_loss_calls(loss)
        now = opened.losses()
        if weights is not None:
            opened.weigh_samples(weights)
        loss.backward()
        recorded.append(weigh(terms_of(calls, B, scale)))
        assert_close(now, recorded[-1], atol=1e-6, rtol=1e-5)
    assert torch.equal(*recorded)


def test_losses_are_each_samples_own():
    model, batch = new(token_loss), batch_of()
    opened = OpenLoss(token_loss(model, batch), B)
    assert_close(opened.losses(), alone(token_loss, model, batch))
    counted = (batch["y"] != -100).sum(1)
    assert_close(opened.shares(), counted / counted.sum())


def test_a_report_brings_its_ids():
    model, batch = new(reported), batch_of()
    assert OpenLoss(reported(model, batch), B).ids.tolist() == list(range(B))
    assert OpenLoss(token_loss(model, batch), B).ids is None


def test_a_sequence_without_a_label_has_no_loss_and_weighs_nothing():
    model, batch = new(token_loss), batch_of(all_ignored=1)
    opened = OpenLoss(token_loss(model, batch), B)
    assert opened.losses().isnan().tolist() == [False, True, False, False]
    assert opened.shares()[1] == 0 and opened.shares().sum() == pytest.approx(1)


def test_a_sample_of_weight_zero_leaves_even_where_its_gradient_is_no_number():
    prediction = torch.randn(B, T, requires_grad=True)
    target = torch.randn(B, T)
    target[1] = torch.inf
    loss = F.mse_loss(prediction * 1.0, target)
    opened = OpenLoss(loss, B)
    opened.weigh_samples(torch.tensor([1.0, 0.0, 1.0, 1.0]))
    loss.backward()
    assert prediction.grad.isfinite().all() and prediction.grad[1].eq(0).all()


def test_once_closed_a_second_backward_is_plain():
    model, plain = pair(token_loss)
    loss = token_loss(model, batch_of())
    opened = OpenLoss(loss, B)
    opened.weigh_samples(torch.zeros(B))
    loss.backward(retain_graph=True)
    opened.close()
    assert all(gradient.eq(0).all() for gradient in gradients(model).values())
    loss.backward()
    token_loss(plain, batch_of()).backward()
    for name, gradient in gradients(model).items():
        assert torch.equal(gradient, gradients(plain)[name])


@pytest.mark.parametrize(
    ("step", "found"),
    [
        (lambda m, b: Opaque.apply(m(b["x"])).sum(), "comes from OpaqueBackward"),
        (
            lambda m, b: checkpoint(lambda x: F.cross_entropy(m(x).mT, b["y"]), b["x"], use_reentrant=False),
            "comes from",
        ),
        (lambda m, b: F.cross_entropy(*(part[:7] for part in flat(m, b))), r"computed on \[7\] elements"),
        (lambda m, b: torch.zeros((), requires_grad=True), "no graph"),
    ],
    ids=["custom", "checkpointed", "no sample axis", "a leaf"],
)
def test_what_cannot_be_weighed_is_said_with_the_cure(step, found):
    with pytest.raises(UnreadableLoss, match=found) as raised:
        OpenLoss(step(new(None), batch_of()), B)
    assert "End training_step with `return per_sample(losses, ids)`" in str(raised.value)
