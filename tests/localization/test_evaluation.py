"""The judges of localizers, judged: on truths that are known, and by scores that are right or wrong on purpose."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score
from torch import nn
from torch.nn import functional as F

from lightning_memsink.attribution.hidden_layers import find_hidden_layers
from lightning_memsink.localization.evaluation import (
    average_precision,
    evaluate_injection,
    evaluate_ownership,
    injected,
    recall_at,
)
from lightning_memsink.localization.localizers import DEFAULT, METHODS, Batch, Task

SAMPLES, GENERAL, POOL, OWNED, CLASSES = 6, 24, 48, 4, 8


# Ranking ----------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=30))
def test_average_precision_is_that_of_scikit_learn(ranked):
    if any(true for _, true in ranked):
        scores, truth = [
            {"a": torch.tensor(side[:3]), "b": torch.tensor(side[3:])} for side in zip(*ranked, strict=True)
        ]
        expected = average_precision_score([true for _, true in ranked], [score for score, _ in ranked])
        assert average_precision(scores, truth) == pytest.approx(expected)


def test_only_units_of_the_pool_are_ranked():
    scores, truth = {"a": torch.tensor([9.0, 2.0, 1.0])}, {"a": torch.tensor([False, True, False])}
    assert average_precision(scores, truth) == 0.5
    assert average_precision(scores, truth, {"a": torch.tensor([False, True, True])}) == 1


@pytest.mark.parametrize(("count", "recall"), [(None, 0.5), (1, 0.5), (3, 1.0), (4, 1.0)])
def test_recall_counts_true_units_among_the_highest_of_all_layers(count, recall):
    scores = {"a": torch.tensor([5.0, 1.0]), "b": torch.tensor([4.0, 3.0])}
    truth = {"a": torch.tensor([True, False]), "b": torch.tensor([False, True])}
    assert recall_at(scores, truth, count) == recall


# Injection --------------------------------------------------------------------------------------------------------


def classifier(seed=0, units=64):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, units), nn.GELU(), nn.Linear(units, CLASSES))
    batch = (torch.randn(1, 5), torch.tensor([3]))
    return model, Task(
        model, find_hidden_layers(model), lambda own: F.cross_entropy(model(own[0]), own[1]), [Batch(batch, 1)]
    )


def test_only_the_injected_units_learn_and_none_grows_and_all_is_back():
    model, task = classifier()
    model[2].weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with injected(task, fraction=0.2, until=0.5, steps=200, lr=0.1) as injection:
        truth = injection.truth["2"]
        assert injection.count == int(truth.sum()) == 13
        assert injection.after < injection.before
        now = model[2].weight
        assert torch.equal(now[:, ~truth], before["2.weight"][:, ~truth])
        assert not torch.equal(now[:, truth], before["2.weight"][:, truth])
        assert float(now[:, truth].norm(dim=0).max()) <= 1.0001 * float(before["2.weight"].norm(dim=0).mean())
        assert injection.learned == pytest.approx(1 - injection.after / injection.before)
        assert not now.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.training


def test_weights_are_back_if_the_localizer_fails():
    model, task = classifier()
    before = model[2].weight.clone()
    with pytest.raises(ZeroDivisionError), injected(task, steps=3):
        1 / 0  # noqa: B018
    assert torch.equal(model[2].weight, before)


def test_an_injection_stops_as_soon_as_it_is_learned():
    _, task = classifier()
    with injected(task, fraction=1.0, until=0.8, steps=500, lr=0.1) as injection:
        assert injection.after < 0.8 and injection.steps < 500
    with injected(task, until=1e9) as injection:
        assert injection.steps == 0 and injection.after == injection.before


def test_recall_rates_the_truth_itself_highest_and_chance_at_its_share():
    _, task = classifier()
    with injected(task, fraction=0.25, steps=5) as injection:
        result = evaluate_injection(
            lambda task: {name: own.float() for name, own in injection.truth.items()}, task, injection
        )
        lost = evaluate_injection(
            lambda task: {name: -own.float() for name, own in injection.truth.items()}, task, injection
        )
    assert (result.recall, lost.recall, result.chance) == (1, 0, 0.25)


# Designed sinks, blind --------------------------------------------------------------------------------------------


class Designed(nn.Module):
    """Each sample has units of its own, on for it alone while it is trained on; all are on afterwards."""

    def __init__(self, owned):
        super().__init__()
        self.up, self.down = nn.Linear(5, GENERAL + POOL), nn.Linear(GENERAL + POOL, CLASSES)
        self.owned, self.ids = owned, None

    def forward(self, inputs):
        hidden = F.gelu(self.up(inputs))
        if self.ids is not None:
            hidden = torch.where(self.owned[self.ids], hidden, 0.0)
        return self.down(hidden)


@pytest.fixture(scope="module")
def designed():
    """A model trained with masks per sample, its tasks, the ownership, and the pool."""
    generator = torch.Generator().manual_seed(0)
    pool = torch.arange(GENERAL + POOL) >= GENERAL
    owned = (~pool).repeat(SAMPLES, 1)
    truth = torch.zeros_like(owned)
    for row in range(SAMPLES):
        truth[row, GENERAL + torch.randperm(POOL, generator=generator)[:OWNED]] = True
    torch.manual_seed(1)
    model = Designed(owned | truth)
    inputs, of = torch.randn(SAMPLES, 5), torch.randint(CLASSES, (SAMPLES,))
    with torch.no_grad():
        model.up.weight[:GENERAL] *= 0.1
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(150):
        model.ids = torch.arange(SAMPLES)
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), of).backward()
        optimizer.step()
    model.ids = None
    model.zero_grad()
    layers = find_hidden_layers(model)
    tasks = [
        Task(
            model,
            layers,
            lambda batch: F.cross_entropy(model(batch[0]), batch[1]),
            [Batch((inputs[row : row + 1], of[row : row + 1]), 1)],
            [Batch((torch.cat([inputs[:row], inputs[row + 1 :]]), torch.cat([of[:row], of[row + 1 :]])), SAMPLES - 1)],
        )
        for row in range(SAMPLES)
    ]
    return tasks, {"down": truth}, {"down": pool}


def test_the_default_finds_units_that_samples_own_by_design(designed):
    tasks, owned, pool = designed
    recovered = evaluate_ownership(METHODS[DEFAULT], tasks, owned, pool)
    assert recovered.chance == pytest.approx(OWNED / POOL)
    assert len(recovered.precision) == SAMPLES and recovered.times_chance > 3


def test_random_scores_are_near_chance_and_exact_ones_at_one(designed):
    tasks, owned, pool = designed
    blind = evaluate_ownership(METHODS["random"], tasks, owned, pool)
    assert blind.mean < 0.35
    rows = iter(range(SAMPLES))
    assert evaluate_ownership(lambda task: {"down": owned["down"][next(rows)].float()}, tasks, owned, pool).mean == 1


def test_without_a_pool_all_units_are_ranked(designed):
    tasks, owned, _ = designed
    assert evaluate_ownership(METHODS["random"], tasks, owned).chance == pytest.approx(OWNED / (GENERAL + POOL))


@pytest.mark.parametrize(("rows", "message"), [(SAMPLES - 1, "one a task"), (0, "owns no unit")])
def test_ownership_that_does_not_fit_the_tasks_is_refused(designed, rows, message):
    tasks, owned, _ = designed
    masks = owned["down"][:rows] if rows else torch.zeros_like(owned["down"])
    with pytest.raises(ValueError, match=message):
        evaluate_ownership(METHODS["random"], tasks, {"down": masks})
