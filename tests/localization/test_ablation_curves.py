"""Curves of ablated units and perturbed prompts, on truths that are known."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from lightning_memsink.attribution.hidden_layers import find_hidden_layers
from lightning_memsink.localization.evaluation import Curve, Groups, ablation_curve, evaluate_ablation, perturb_prompts
from lightning_memsink.localization.evaluation.ablation_curves import activation_norms, matched_units
from lightning_memsink.localization.evaluation.prompt_perturbation import perturbed
from lightning_memsink.localization.localizers import Batch, Task

CLASSES = 8


def known_by_one_unit():
    """Unit 7 says the target's class; unit 3 everybody's."""
    model = nn.Sequential(nn.Linear(2, 20), nn.ReLU(), nn.Linear(20, CLASSES, bias=False))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model[0].weight[7, 0], model[2].weight[1, 7] = 4.0, 4.0
        model[0].weight[3, 1], model[2].weight[2, 3] = 4.0, 4.0
    target, rest = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]] * 3)
    batches = [Batch((target, torch.tensor([1])), 1), Batch((rest, torch.full((3,), 2)), 3)]
    task = Task(model, find_hidden_layers(model), lambda own: F.cross_entropy(model(own[0]), own[1]), batches[:1])
    never_seen = Batch((-target, torch.tensor([1])), 1)
    groups = Groups(batches[:1], batches[1:], [never_seen], batches[1:])
    return task, groups, lambda own: model(own[0]).argmax(1) == own[1]


def test_the_curve_of_the_right_unit_falls_alone():
    task, groups, exact = known_by_one_unit()
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    scores = {"2": F.one_hot(torch.tensor(7), 20).float()}
    test = evaluate_ablation(task, scores, groups, exact, fractions=(0.05,))
    curve = test.localized
    assert curve.fractions == (0.0, 0.05)
    assert curve.exact["target"].tolist() == [1, 0] and curve.exact["others"].tolist() == [1, 1]
    assert_close(curve.change("held_out"), torch.zeros(2))
    assert_close(curve.closure(), torch.tensor([0.0, 1.0]))
    assert curve.closure_within() == pytest.approx(1)
    assert float(curve.selectivity()[1]) == pytest.approx(float(curve.change("target")[1]) / 0.005)
    assert test.random.fractions == test.matched.fractions == (0.0, 0.05)
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
    matched = matched_units(masks, activity, torch.Generator().manual_seed(0))["a"]
    assert int(matched.sum()) == 4 and not (matched & masks["a"]).any()
    assert float(activity["a"][matched].sort().values.sub(torch.tensor([5.0, 50, 51, 95])).abs().max()) <= 5


def test_there_may_be_no_other_unit_left():
    masks = {"a": torch.tensor([True, True, False])}
    matched = matched_units(masks, {"a": torch.ones(3)}, torch.Generator().manual_seed(0))["a"]
    assert matched.tolist() == [False, False, True]


def test_activity_is_the_norm_over_all_positions():
    model = nn.Sequential(nn.Linear(5, 20), nn.GELU(), nn.Linear(20, CLASSES))
    batches = [Batch((torch.randn(size, 5), torch.zeros(size, dtype=torch.int64)), size) for size in (2, 3)]
    task = Task(model, find_hidden_layers(model), lambda own: F.cross_entropy(model(own[0]), own[1]), batches)
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

    def continues(tokens_with_prompt):
        """The first sequence is always reproduced, the second only after a changed prompt, the third never."""
        return torch.tensor([True, not torch.equal(tokens_with_prompt[1], tokens[1]), False])

    stress = perturb_prompts(continues, tokens, prompt=2, vocab_size=9, rates=(0.0, 0.5), trials=4)
    assert stress.reproduced.tolist() == [[1, 0, 0], [1, 1, 0]]
    assert stress.returns == 0.5
