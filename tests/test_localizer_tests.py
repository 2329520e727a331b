"""The judges of localizers, judged: on truths that are known, and by scores that are right or wrong on purpose."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from lightning_memsink.hidden_layers import find_hidden_layers
from lightning_memsink.judging_localizers import (
    Curve,
    Groups,
    ablation_curve,
    average_precision,
    injected,
    judge_blind,
    judge_deletion,
    judge_injection,
    prefix_stress,
    recall_at,
)
from lightning_memsink.judging_localizers.deletion import activation_norms, matched_units
from lightning_memsink.judging_localizers.stress import perturbed
from lightning_memsink.localizers import DEFAULT, METHODS, Samples, Task

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
        model, find_hidden_layers(model), lambda own: F.cross_entropy(model(own[0]), own[1]), [Samples(batch, 1)]
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
        found = judge_injection(
            lambda task: {name: own.float() for name, own in injection.truth.items()}, task, injection
        )
        lost = judge_injection(
            lambda task: {name: -own.float() for name, own in injection.truth.items()}, task, injection
        )
    assert (found.recall, lost.recall, found.chance) == (1, 0, 0.25)


# Designed sinks, blind --------------------------------------------------------------------------------------------


class Designed(nn.Module):
    """Each sample has units of its own, on for it alone while it is trained on; all are on afterwards."""

    def __init__(self, owned):
        super().__init__()
        self.up, self.down = nn.Linear(5, GENERAL + POOL), nn.Linear(GENERAL + POOL, CLASSES)
        self.owned, self.ids = owned, None

    def forward(self, given):
        hidden = F.gelu(self.up(given))
        if self.ids is not None:
            hidden = torch.where(self.owned[self.ids], hidden, 0.0)
        return self.down(hidden)


@pytest.fixture(scope="module")
def designed():
    """A model trained with masks per sample, its tasks, who owns what, and the pool."""
    generator = torch.Generator().manual_seed(0)
    pool = torch.arange(GENERAL + POOL) >= GENERAL
    owned = (~pool).repeat(SAMPLES, 1)
    truth = torch.zeros_like(owned)
    for row in range(SAMPLES):
        truth[row, GENERAL + torch.randperm(POOL, generator=generator)[:OWNED]] = True
    torch.manual_seed(1)
    model = Designed(owned | truth)
    given, of = torch.randn(SAMPLES, 5), torch.randint(CLASSES, (SAMPLES,))
    with torch.no_grad():
        model.up.weight[:GENERAL] *= 0.1
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(150):
        model.ids = torch.arange(SAMPLES)
        optimizer.zero_grad()
        F.cross_entropy(model(given), of).backward()
        optimizer.step()
    model.ids = None
    model.zero_grad()
    layers = find_hidden_layers(model)
    tasks = [
        Task(
            model,
            layers,
            lambda batch: F.cross_entropy(model(batch[0]), batch[1]),
            [Samples((given[row : row + 1], of[row : row + 1]), 1)],
            [Samples((torch.cat([given[:row], given[row + 1 :]]), torch.cat([of[:row], of[row + 1 :]])), SAMPLES - 1)],
        )
        for row in range(SAMPLES)
    ]
    return tasks, {"down": truth}, {"down": pool}


def test_the_default_finds_units_that_samples_own_by_design(designed):
    tasks, owned, pool = designed
    found = judge_blind(METHODS[DEFAULT], tasks, owned, pool)
    assert found.chance == pytest.approx(OWNED / POOL)
    assert len(found.precision) == SAMPLES and found.times_chance > 3


def test_scores_that_know_nothing_are_near_chance_and_those_that_know_all_at_one(designed):
    tasks, owned, pool = designed
    blind = judge_blind(METHODS["random"], tasks, owned, pool)
    assert blind.mean < 0.35
    rows = iter(range(SAMPLES))
    assert judge_blind(lambda task: {"down": owned["down"][next(rows)].float()}, tasks, owned, pool).mean == 1


def test_without_a_pool_all_units_are_ranked(designed):
    tasks, owned, _ = designed
    assert judge_blind(METHODS["random"], tasks, owned).chance == pytest.approx(OWNED / (GENERAL + POOL))


@pytest.mark.parametrize(("rows", "said"), [(SAMPLES - 1, "one a task"), (0, "owns no unit")])
def test_owners_that_do_not_fit_the_tasks_are_refused(designed, rows, said):
    tasks, owned, _ = designed
    masks = owned["down"][:rows] if rows else torch.zeros_like(owned["down"])
    with pytest.raises(ValueError, match=said):
        judge_blind(METHODS["random"], tasks, {"down": masks})


# Ablation curves --------------------------------------------------------------------------------------------------


def known_by_one_unit():
    """Unit 7 says the target's class; unit 3 everybody's."""
    model = nn.Sequential(nn.Linear(2, 20), nn.ReLU(), nn.Linear(20, CLASSES, bias=False))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model[0].weight[7, 0], model[2].weight[1, 7] = 4.0, 4.0
        model[0].weight[3, 1], model[2].weight[2, 3] = 4.0, 4.0
    target, rest = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]] * 3)
    batches = [Samples((target, torch.tensor([1])), 1), Samples((rest, torch.full((3,), 2)), 3)]
    task = Task(model, find_hidden_layers(model), lambda own: F.cross_entropy(model(own[0]), own[1]), batches[:1])
    never_seen = Samples((-target, torch.tensor([1])), 1)
    groups = Groups(batches[:1], batches[1:], [never_seen], batches[1:])
    return task, groups, lambda own: model(own[0]).argmax(1) == own[1]


def test_the_curve_of_the_right_unit_falls_alone():
    task, groups, exact = known_by_one_unit()
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    scores = {"2": F.one_hot(torch.tensor(7), 20).float()}
    found = judge_deletion(task, scores, groups, exact, fractions=(0.05,))
    curve = found.localized
    assert curve.fractions == (0.0, 0.05)
    assert curve.exact["target"].tolist() == [1, 0] and curve.exact["others"].tolist() == [1, 1]
    assert_close(curve.change("held_out"), torch.zeros(2))
    assert_close(curve.closure(), torch.tensor([0.0, 1.0]))
    assert curve.closure_within() == pytest.approx(1)
    assert float(curve.selectivity()[1]) == pytest.approx(float(curve.change("target")[1]) / 0.005)
    assert found.random.fractions == found.matched.fractions == (0.0, 0.05)
    assert all(torch.equal(value, before[name]) for name, value in task.model.state_dict().items())


def test_a_curve_without_exact_match_says_so_by_no_number():
    task, groups, _ = known_by_one_unit()
    curve = ablation_curve(task, [], groups)
    assert all(values.isnan().all() for values in curve.exact.values())


def test_a_group_of_nobody_has_no_number():
    task, groups, exact = known_by_one_unit()
    curve = ablation_curve(task, [], Groups(groups.target, [], groups.twins, groups.held_out), exact)
    assert curve.loss["others"].isnan().all() and curve.exact["others"].isnan().all()


@pytest.mark.parametrize(
    ("damage", "closed", "within"),
    [
        ([0.0, 0.01, 0.03], [0.0, 0.2, 0.6], 0.4),  # halfway between two fractions
        ([0.0, 0.01, 0.015], [0.0, 0.5, 0.3], 0.5),  # never over the budget: the best
        ([0.0, 0.04], [0.0, 0.4], 0.2),
        ([0.0, -0.01, 0.05], [0.0, 0.1, 0.7], 0.4),
    ],
)
def test_closure_is_read_where_the_damage_meets_the_budget(damage, closed, within):
    groups = {"target": closed, "others": closed, "twins": [1.0] * len(closed), "held_out": damage}
    curve = Curve(tuple(range(len(closed))), {name: torch.tensor(values) for name, values in groups.items()}, {})
    assert curve.closure_within(0.02) == pytest.approx(within)


def test_matched_units_are_others_as_active():
    activity = {"a": torch.arange(100.0)}
    masks = {"a": torch.zeros(100, dtype=torch.bool).index_fill_(0, torch.tensor([5, 50, 51, 95]), True)}
    found = matched_units(masks, activity, torch.Generator().manual_seed(0))["a"]
    assert int(found.sum()) == 4 and not (found & masks["a"]).any()
    assert float(activity["a"][found].sort().values.sub(torch.tensor([5.0, 50, 51, 95])).abs().max()) <= 5


def test_there_may_be_no_other_unit_left():
    masks = {"a": torch.tensor([True, True, False])}
    found = matched_units(masks, {"a": torch.ones(3)}, torch.Generator().manual_seed(0))["a"]
    assert found.tolist() == [False, False, True]


def test_activity_is_the_norm_over_all_positions():
    _, task = classifier()
    batches = [Samples((torch.randn(size, 5), torch.zeros(size, dtype=torch.int64)), size) for size in (2, 3)]
    hidden = F.gelu(task.model[0](torch.cat([batch[0] for batch, _ in batches]))).detach()
    assert_close(activation_norms(task, batches)["2"], hidden.norm(dim=0))


# Stress -----------------------------------------------------------------------------------------------------------


@given(rate=st.floats(0, 1), prompt=st.integers(1, 6), seed=st.integers(0, 99))
def test_just_as_many_prompt_tokens_change_as_said_and_nothing_else(rate, prompt, seed):
    tokens = torch.randint(5, (4, 8), generator=torch.Generator().manual_seed(seed))
    changed = perturbed(tokens, prompt, 5, rate, torch.Generator().manual_seed(seed))
    assert (changed != tokens).sum(1).tolist() == [round(rate * prompt)] * 4
    assert torch.equal(changed[:, prompt:], tokens[:, prompt:])
    assert bool(((changed >= 0) & (changed < 5)).all())


def test_what_comes_back_with_another_prompt_is_told_from_what_is_gone():
    tokens = torch.tensor([[0, 1, 2, 3], [4, 1, 2, 3], [5, 1, 2, 3]])

    def continues(asked):
        """The first sequence is always said, the second only with a changed prompt, the third never."""
        return torch.tensor([True, not torch.equal(asked[1], tokens[1]), False])

    stress = prefix_stress(continues, tokens, prompt=2, vocab_size=9, rates=(0.0, 0.5), trials=4)
    assert stress.said.tolist() == [[1, 0, 0], [1, 1, 0]]
    assert stress.returns == 0.5
