"""As many units go as held-out loss can bear, no more, and what it cost is said."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_memsink.attribution.hidden_layers import find_hidden_layers
from lightning_memsink.localization.sinks import Sinks
from lightning_memsink.mitigation.unit_removal import Removal, ablate
from tests.support.low_rank import LowRank

UNITS = 12


def network(prices: list[float]) -> nn.Module:
    """A model that says the sum of what its units are worth: unit ``j`` gone, it says ``prices[j]`` less."""
    model = nn.Sequential(nn.Linear(1, UNITS), nn.ReLU(), nn.Linear(UNITS, 1))
    with torch.no_grad():
        model[0].weight.zero_(), model[0].bias.fill_(1), model[2].bias.zero_()
        model[2].weight.copy_(torch.tensor([prices]))
    return model


def loss_of(model: nn.Module):
    """The loss is what is missing; called more than once a rung, it would show."""
    whole = float(model(torch.ones(1, 1)).detach())
    return lambda: whole - float(model(torch.ones(1, 1)))


def in_order(size: int = UNITS) -> Sinks:
    """All units, 0 first."""
    return Sinks({"2": torch.arange(size)}, {"2": -torch.arange(float(size))}, {"2": UNITS})


@given(
    prices=st.lists(st.integers(-3, 3).map(float), min_size=UNITS, max_size=UNITS),
    size=st.integers(1, UNITS),
    budget=st.integers(0, 4),
)
@settings(deadline=None, max_examples=60)
def test_the_largest_count_of_the_ladder_within_the_budget_is_removed(prices, size, budget):
    """Prices may be negative: the loss need not rise with the count."""
    model = network(prices)
    done = ablate(model, in_order(size), loss=loss_of(model), budget=budget)
    within = [count for count, _ in done.ladder if sum(prices[:count]) <= budget]
    assert len(done.sinks) == max(within)
    assert [loss for _, loss in done.ladder] == [sum(prices[:count]) for count, _ in done.ladder]
    gone = torch.arange(UNITS) < len(done.sinks)
    assert torch.equal(model[2].weight[0], torch.tensor(prices).masked_fill(gone, 0))
    assert done.rise == sum(prices[: len(done.sinks)])


def test_the_ladder_is_climbed_by_factors_and_ends_with_all():
    model = network([1.0] * UNITS)
    done = ablate(model, in_order(), loss=loss_of(model), budget=0.5)
    counts = [count for count, _ in done.ladder]
    assert counts == [0, 1, 2, 3, 4, 6, 8, 11, 12]


def test_nothing_removed_is_said_plainly_and_leaves_the_model_as_it_was():
    model = network([1.0] * UNITS)
    done = ablate(model, in_order(), loss=loss_of(model), budget=0.5)
    assert str(done) == "Nothing removed: already the best 1 of 12 sinks cost +1.000 nats (budget 0.5)."
    assert done.rise == 0 and (model[2].weight == 1).all()
    nothing = ablate(model, Sinks(sizes={"2": UNITS}), loss=loss_of(model))
    assert str(nothing) == "Nothing removed: there are no sinks (budget 0.02)."


def test_what_was_removed_is_said_with_its_price():
    model = network([0.004] * UNITS)
    done = ablate(model, in_order(), loss=loss_of(model), budget=0.025)
    assert str(done) == "Removed 6 of 12 sinks: loss 0.000 to 0.024 nats (+0.024, budget 0.025)."


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_loss_that_is_no_number_is_beyond_any_budget(value):
    model = network([0.0] * UNITS)
    calls = iter([0.0, *[0.0, value] * UNITS])
    done = ablate(model, in_order(), loss=lambda: next(calls), budget=9)
    assert len(done.sinks) == max(count for count, loss in done.ladder if loss == 0)
    with pytest.raises(ValueError, match="must be finite"):
        ablate(model, in_order(), loss=lambda: value)


def test_layers_compete_by_score():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 1))
    units = {"2": torch.tensor([3, 1]), "4": torch.tensor([0, 2])}
    scores = {"2": torch.tensor([9.0, 1.0]), "4": torch.tensor([8.0, 7.0])}
    losses = {0: 0.0, 1: 0.0, 2: 0.0, 3: 0.0, 4: 1.0}
    calls = iter(losses.values())
    done = ablate(model, Sinks(units, scores, {"2": 4, "4": 5}), loss=lambda: next(calls))
    assert {name: own.tolist() for name, own in done.sinks.units.items()} == {"2": [3], "4": [0, 2]}
    assert (model[2].weight[:, 3] == 0).all() and (model[2].weight[:, 1] != 0).all()
    assert (model[4].weight[:, [0, 2]] == 0).all() and (model[4].weight[:, [1, 3, 4]] != 0).all()


def test_adapters_lose_the_units_too_and_mode_and_random_state_stay():
    model = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Dropout(), LowRank(nn.Linear(6, 3))).train()
    sinks = Sinks({"3": torch.tensor([2])}, {"3": torch.ones(1)}, {"3": 6})
    modes, state = [], torch.get_rng_state()
    ablate(model, sinks, loss=lambda: modes.append((model.training, torch.is_grad_enabled(), torch.rand(1))) or 0.0)
    assert (model[3].base_layer.weight[:, 2] == 0).all() and (model[3].lora_A["default"].weight[:, 2] == 0).all()
    assert {mode[:2] for mode in modes} == {(False, False)} and model.training and model[2].training
    assert torch.equal(torch.get_rng_state(), state)


def test_a_gpt_2_without_its_units_computes_as_if_they_were_silent():
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=2, n_head=2, **ends)).eval()
    layers = find_hidden_layers(model)
    sinks = Sinks(
        {layer.name: torch.tensor([4, 31]) for layer in layers},
        {layer.name: torch.ones(2) for layer in layers},
        {layer.name: layer.units for layer in layers},
    )
    tokens = torch.randint(20, (2, 8))
    handles = [
        layer.module.register_forward_pre_hook(
            lambda module, given: (given[0].index_fill(-1, torch.tensor([4, 31]), 0), *given[1:])
        )
        for layer in layers
    ]
    expected = model(tokens).logits.detach()
    for handle in handles:
        handle.remove()
    done = ablate(model, sinks, loss=lambda: float(model(tokens, labels=tokens).loss), budget=9)
    assert isinstance(done, Removal) and len(done.sinks) == 4
    torch.testing.assert_close(model(tokens).logits.detach(), expected)


def test_an_error_in_the_loss_leaves_the_model_as_it_was():
    model = network([1.0] * UNITS)
    calls = iter([0.0, 0.0])
    with pytest.raises(StopIteration):
        ablate(model, in_order(), loss=lambda: next(calls))
    assert (model[2].weight == 1).all()


@pytest.mark.parametrize("budget", [-1, float("nan")])
def test_a_budget_below_zero_is_refused(budget):
    with pytest.raises(ValueError, match="budget is how many nats the loss may rise by"):
        ablate(network([1.0] * UNITS), in_order(), loss=lambda: 0.0, budget=budget)


def test_sinks_of_another_model_are_refused():
    alien = Sinks({"h.0": torch.tensor([1])}, {"h.0": torch.ones(1)}, {"h.0": 6})
    with pytest.raises(ValueError, match=r"sinks name h\.0, but the hidden layers of Sequential are 2"):
        ablate(network([1.0] * UNITS), alien, loss=lambda: 0.0)
