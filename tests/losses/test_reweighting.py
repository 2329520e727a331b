"""A sample's gradient leaves the backward exactly as asked, and everything else stays as it was."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from lightning_memsink.losses.autograd_graph import awaiting_upstream, find_loss_nodes
from lightning_memsink.losses.per_sample import per_sample, terms_of, weigh
from lightning_memsink.losses.reweighting import OpenLoss
from lightning_memsink.losses.sample_rows import SampleAxisLost
from lightning_memsink.losses.step_reader import StepReader
from tests.support.capturing import CLASS_WEIGHT, QUIET, B, Model, Sequences, T, alone, new, token_loss
from tests.support.reading import opened, read
from tests.support.user_losses import (
    BY_HAND,
    CHUNKS,
    FACTORS,
    TIME_MAJOR,
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
    """Sums of squares of each sample, as a fused loss would give them: with nothing to read in its node."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square().flatten(1).sum(1)

    @staticmethod
    def backward(ctx, gradient):
        return 2 * ctx.saved_tensors[0] * gradient[:, None, None]


def checkpointed(model, batch):
    return checkpoint(lambda x: F.cross_entropy(model(x).mT, batch["y"]), batch["x"], use_reentrant=False)


STEPS = {
    **USERS,
    **BY_HAND,
    **FACTORS,
    **CHUNKS,
    "indexed mean": indexed_mean,
    "several losses": weighted_sum,
    "picked by a mask": picked_by_a_mask,
    "reported": reported,
    "checkpointed": checkpointed,
    "in custom code": lambda m, b: Opaque.apply(m(b["x"])).sum(),
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
    loss, found = opened(partial(value, step, model), batch, len(weights), scale)
    found.weigh_samples(weights)
    loss.backward()
    found.close()
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
        loss, nodes = read(StepReader(), partial(value, step, model), batch, B, scale)
        calls = awaiting_upstream(nodes)
        found = OpenLoss(loss, B, nodes, scale)
        now = found.losses()
        if weights is not None:
            found.weigh_samples(weights)
        loss.backward()
        recorded.append(weigh(terms_of(calls, B, scale)))
        assert_close(now, recorded[-1], atol=1e-6, rtol=1e-5)
    assert torch.equal(*recorded)


def test_losses_are_each_samples_own():
    model, batch = new(token_loss), batch_of()
    _, found = opened(partial(token_loss, model), batch, B)
    assert_close(found.losses(), alone(token_loss, model, batch))
    counted = (batch["y"] != -100).sum(1)
    assert_close(found.shares(), counted / counted.sum())


def test_a_report_brings_its_ids():
    model, batch = new(reported), batch_of()
    assert opened(partial(reported, model), batch, B)[1].ids.tolist() == list(range(B))
    assert opened(partial(token_loss, model), batch, B)[1].ids is None


def test_a_sequence_without_a_label_has_no_loss_and_weighs_nothing():
    model, batch = new(token_loss), batch_of(all_ignored=1)
    _, found = opened(partial(token_loss, model), batch, B)
    assert found.losses().isnan().tolist() == [False, True, False, False]
    assert found.shares()[1] == 0 and found.shares().sum() == pytest.approx(1)


def test_a_sample_of_weight_zero_leaves_even_where_its_gradient_is_no_number():
    batch = {"x": torch.randn(B, T, requires_grad=True), "y": torch.randn(B, T)}
    batch["y"][1] = torch.inf
    loss, found = opened(lambda batch: F.mse_loss(batch["x"] * 1.0, batch["y"]), batch, B)
    found.weigh_samples(torch.tensor([1.0, 0.0, 1.0, 1.0]))
    loss.backward()
    assert batch["x"].grad.isfinite().all() and batch["x"].grad[1].eq(0).all()


def test_once_closed_a_second_backward_is_plain():
    model, plain = pair(token_loss)
    loss, found = opened(partial(token_loss, model), batch_of(), B)
    found.weigh_samples(torch.zeros(B))
    loss.backward(retain_graph=True)
    found.close()
    assert all(gradient.eq(0).all() for gradient in gradients(model).values())
    loss.backward()
    token_loss(plain, batch_of()).backward()
    for name, gradient in gradients(model).items():
        assert torch.equal(gradient, gradients(plain)[name])


@pytest.mark.parametrize(
    ("step", "found"),
    [
        (lambda m, b: Opaque.apply(m(b["x"])).sum() ** 0.5, "PowBackward0, which is not linear"),
        (
            lambda m, b: checkpoint(lambda x: F.cross_entropy(m(x).mT, b["y"]), b["x"], use_reentrant=True),
            "a graph",
        ),
        (lambda m, b: F.mse_loss(m(b["x"]).mean((0, 1)), CLASS_WEIGHT), "a mean over the samples"),
        (lambda m, b: torch.zeros((), requires_grad=True), "a graph"),
    ],
    ids=["a root", "checkpointed", "no sample axis", "a leaf"],
)
def test_what_cannot_be_weighed_is_said(step, found):
    model = new(None)
    with pytest.raises(SampleAxisLost, match=found):
        opened(partial(step, model), batch_of(), B)


def test_rows_that_nothing_assigns_to_samples_are_refused():
    loss = token_loss(new(None), batch_of())
    nodes = find_loss_nodes(loss)
    with pytest.raises(SampleAxisLost, match="cross_entropy: nothing says which samples its rows are"):
        OpenLoss(loss, B, nodes)
