"""Effects equal the zeroing of a unit, shares add up, and weights undo the scale of the loss."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from lightning_memsink.attribution.attribute import attribute
from lightning_memsink.attribution.hidden_layers import find_hidden_layers
from lightning_memsink.attribution.unit_effects import margins, sample_weights, shares, unit_effects
from lightning_memsink.losses.autograd_graph import find_loss_calls
from lightning_memsink.losses.per_sample import in_batch_order

small = st.integers(1, 4)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=50)
@given(batch=small, tokens=small, units=small, seed=st.integers(0, 2**16), place=st.sampled_from(["BTU", "TBU", "BUT"]))
def test_an_effect_is_that_of_zeroing_the_unit_where_the_loss_is_linear(batch, tokens, units, seed, place):
    """Where the loss is linear in the activation, first order is exact: ablation is the oracle."""
    order = ["BTU".index(axis) for axis in place]
    hidden = normal(batch, tokens, units, seed=seed).permute(order)
    gradient = normal(batch, tokens, units, seed=seed + 1).permute(order)
    effects = unit_effects(hidden, gradient, place.index("B"), place.index("U"))
    for sample in range(batch):
        for unit in range(units):
            zeroed = hidden.clone()
            zeroed.select(place.index("U"), unit).select(
                place.index("B") - (place.index("B") > place.index("U")), sample
            ).zero_()
            assert_close(effects[sample, unit], ((zeroed - hidden) * gradient).sum())


def test_units_of_flat_and_spatial_activations_lie_where_they_are_said_to():
    hidden, gradient = normal(2, 3, 4, 5), normal(2, 3, 4, 5, seed=1)
    assert_close(unit_effects(hidden, gradient, unit_axis=1), -(hidden * gradient).sum((2, 3)))
    assert_close(unit_effects(hidden[0, 0], gradient[0, 0]), -(hidden * gradient)[0, 0])
    assert unit_effects(hidden.bfloat16(), gradient.bfloat16()).dtype == torch.float32
    with pytest.raises(ValueError, match=r"\[4, 5\] have units, but no batch axis 1"):
        unit_effects(hidden[0, 0], gradient[0, 0], batch_axis=1)


EFFECTS = st.lists(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=5, max_size=5), min_size=1, max_size=4)


@settings(deadline=None, max_examples=50)
@given(EFFECTS)
def test_a_sample_s_shares_over_all_layers_add_up_to_one(rows):
    effects = torch.tensor(rows)
    result = shares({"first": effects[:, :2], "second": effects[:, 2:]})
    for sample, row in enumerate(torch.cat(list(result.values()), 1)):
        exact = effects[sample].double().abs()
        assert_close(row.double(), exact / exact.sum() if exact.any() else exact, atol=1e-6, rtol=1e-5)


def test_shares_of_nothing_are_nothing():
    assert shares({}) == {} and not shares({"a": torch.zeros(2, 3)})["a"].any()


class Text(nn.Module):
    def __init__(self, checkpointing: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(7, 4)
        self.mlp = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 7))
        self.checkpointing = checkpointing

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        return checkpoint(self.mlp, hidden, use_reentrant=False) if self.checkpointing else self.mlp(hidden)


TOKENS = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 1], [2, 2, 6, 3]])
TARGETS = torch.tensor([[2, 3, 4, 5], [6, -100, -100, -100], [2, 6, -100, -100]])


def token_mean(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def accumulated(logits: Tensor, targets: Tensor) -> Tensor:
    return token_mean(logits, targets) / 8


def summed(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


def sample_mean(logits: Tensor, targets: Tensor) -> Tensor:
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
    return (losses.sum(1) / (targets >= 0).sum(1)).mean()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "token mean": token_mean,
    "accumulated": accumulated,
    "sum": summed,
    "sample mean": sample_mean,
}
COUNTS = torch.tensor([4.0, 1.0, 2.0])
WEIGHTS = {
    "token mean": COUNTS / 7,
    "accumulated": COUNTS / 56,
    "sum": COUNTS,
    "sample mean": torch.full((3,), 1 / 3),
}


@pytest.mark.parametrize("reduction", LOSSES)
def test_a_sample_weighs_what_its_own_mean_loss_is_multiplied_with(reduction):
    loss = LOSSES[reduction](Text()(TOKENS), TARGETS)
    calls = in_batch_order(find_loss_calls(loss), 3)
    loss.backward()
    weights = sample_weights(calls, 3)
    assert weights is not None
    assert_close(weights, WEIGHTS[reduction])


def test_a_sample_that_counts_nothing_weighs_nothing():
    loss = token_mean(Text()(TOKENS), torch.where(torch.tensor([[True], [False], [True]]), TARGETS, -100))
    calls = in_batch_order(find_loss_calls(loss), 3)
    loss.backward()
    assert_close(sample_weights(calls, 3), torch.tensor([4 / 6, 0.0, 2 / 6]))


def test_two_losses_weigh_their_samples_alike():
    output = nn.Linear(4, 7)(normal(3, 4).float())
    for scale in (1.0, 0.25):
        loss = scale * (F.cross_entropy(output, torch.tensor([0, 1, 2])) + 0.5 * F.mse_loss(output, torch.zeros(3, 7)))
        calls = in_batch_order(find_loss_calls(loss), 3)
        loss.backward(retain_graph=True)
        assert_close(sample_weights(calls, 3, loss_scale=scale), torch.full((3,), scale / 3))


def test_no_sample_axis_no_weights():
    loss = F.cross_entropy(normal(5, 7).requires_grad_(), torch.zeros(5, dtype=torch.long))
    calls = in_batch_order(find_loss_calls(loss), 3)
    loss.backward()
    assert sample_weights(calls, 3) is None and sample_weights([], 3) is None


def by_hand(model: Text, number: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """``[B, U]``, each sample on its own, differentiated at the hidden activation."""
    rows = []
    for tokens, targets in zip(TOKENS, TARGETS, strict=True):
        hidden = model.mlp[1](model.mlp[0](model.embed(tokens[None]))).detach().requires_grad_()
        [gradient] = torch.autograd.grad(number(model.mlp[2](hidden), targets[None]), hidden)
        rows.append(-(hidden * gradient).sum((0, 1)))
    return torch.stack(rows).detach()


def margin_by_hand(logits: Tensor, targets: Tensor) -> Tensor:
    total = torch.zeros(())
    for row, target in zip(logits.flatten(0, 1), targets.flatten().tolist(), strict=True):
        if target >= 0:
            total = total + row[target] - max(row[other] for other in range(7) if other != target)
    return total


def effects_of(model: Text, loss: Callable[[Tensor, Tensor], Tensor] = token_mean, **options: str) -> Tensor:
    [effects] = attribute(lambda: loss(model(TOKENS), TARGETS), find_hidden_layers(model), 3, **options).values()
    return effects


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("reduction", LOSSES)
def test_attribute_gives_each_sample_s_own_nats_however_the_batch_is_reduced(reduction, checkpointing):
    model = Text(checkpointing)
    assert_close(effects_of(model, LOSSES[reduction]), by_hand(model, token_mean))


def test_attribute_agrees_with_shrinking_a_unit_a_little():
    model, step = Text().double(), 1e-6
    effects = effects_of(model, sample_mean)
    before = [token_mean(model(TOKENS[n : n + 1]), TARGETS[n : n + 1]) for n in range(3)]
    for unit in range(6):
        with torch.no_grad():
            model.mlp[2].weight[:, unit] *= 1 - step
            after = [token_mean(model(TOKENS[n : n + 1]), TARGETS[n : n + 1]) for n in range(3)]
            model.mlp[2].weight[:, unit] /= 1 - step
        change = (torch.stack(after) - torch.stack(before)) / step
        assert_close(effects[:, unit], change.detach(), atol=1e-6, rtol=1e-4)


def test_the_margin_is_a_logit_ahead_of_the_best_other():
    logits = Text()(TOKENS)
    assert_close(margins(token_mean(logits, TARGETS)), margin_by_hand(logits, TARGETS))


def test_attribute_differentiates_the_margin():
    model = Text()
    assert_close(effects_of(model, objective="margin"), by_hand(model, lambda *pair: -margin_by_hand(*pair)))


def test_the_margin_keeps_its_gradient_where_the_loss_has_none():
    model = Text()
    with torch.no_grad():
        model.mlp[2].bias.copy_(200.0 * torch.arange(7))

    def loss() -> Tensor:
        return token_mean(model(TOKENS), torch.full_like(TARGETS, 6))

    layers = find_hidden_layers(model)
    assert not attribute(loss, layers, 3)["mlp.2"].any()
    assert attribute(loss, layers, 3, "margin")["mlp.2"].any(1).all()


def test_a_margin_before_the_users_own_backward_changes_nothing_in_it():
    model = Text()
    token_mean(model(TOKENS), TARGETS).backward()
    expected = model.embed.weight.grad.clone()
    model.zero_grad()
    loss = token_mean(model(TOKENS), TARGETS)
    torch.autograd.grad(margins(loss), list(model.parameters()), retain_graph=True)
    loss.backward()
    assert torch.equal(model.embed.weight.grad, expected)


def test_a_loss_without_cross_entropy_has_no_margin():
    with pytest.raises(ValueError, match="found none behind MseLossBackward0"):
        margins(F.mse_loss(normal(2).requires_grad_(), torch.zeros(2)))


def test_attribute_touches_no_gradient_and_leaves_no_hook():
    model = Text()
    model.embed.weight.grad = torch.ones_like(model.embed.weight)
    effects_of(model)
    assert model.embed.weight.grad.eq(1).all() and model.mlp[0].weight.grad is None
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_frozen_parameters_are_no_obstacle():
    model = Text()
    expected = effects_of(model)
    assert_close(effects_of(model.requires_grad_(False)), expected)


@torch.no_grad()
def test_attribute_needs_no_grad_mode_of_its_caller():
    assert effects_of(Text()).shape == (3, 6)


@pytest.mark.parametrize(
    "loss, message",
    [
        (lambda model: token_mean(model(TOKENS).detach(), TARGETS), "a loss with its graph"),
        (
            lambda model: token_mean(model(TOKENS.flatten()[None]), TARGETS),
            "no effects .3, U. in mlp.2: its input has 1",
        ),
        (lambda model: (model(TOKENS).detach() * model.embed.weight.sum()).sum(), "mlp.2: no gradient came"),
    ],
)
def test_attribute_names_what_is_missing(loss, message):
    model = Text()
    with pytest.raises(ValueError, match=message):
        attribute(lambda: loss(model), find_hidden_layers(model), 3)
    assert not model.mlp[2]._forward_pre_hooks
