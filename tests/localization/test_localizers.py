"""Each localizer against a slow definition; and that none leaves a trace in the model."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from lightning_memsink._evaluation import isolated_eval
from lightning_memsink.attribution.hidden_layers import find_hidden_layers
from lightning_memsink.localization.localizers import DEFAULT, METHODS, Batch, Task, localizer
from lightning_memsink.localization.localizers.attribution_methods import (
    _path_effects,
    activation_times_gradient,
    hidden_units,
)
from lightning_memsink.localization.localizers.pruning import hard_gate, open_probability, slimming
from lightning_memsink.localization.localizers.task import gated, mean_loss, open_gates

UNITS, CLASSES = 16, 4


class Two(nn.Module):
    """Two hidden layers, one after the other, with dropout and a norm that keeps statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(5, UNITS), nn.GELU(), nn.Linear(UNITS, 5))
        self.norm, self.dropout = nn.BatchNorm1d(5), nn.Dropout(0.5)
        self.second = nn.Sequential(nn.Linear(5, UNITS), nn.GELU(), nn.Linear(UNITS, CLASSES))

    def forward(self, inputs):
        return self.second(self.dropout(self.norm(inputs + self.first(inputs))))


@pytest.fixture
def task():
    torch.manual_seed(0)
    model = Two()
    batches = [Batch((torch.randn(size, 5), torch.randint(CLASSES, (size,))), size) for size in (2, 1, 3)]
    return Task(
        model,
        find_hidden_layers(model),
        lambda batch: F.cross_entropy(model(batch[0]), batch[1]),
        batches[:2],
        batches[2:],
    )


def test_methods_keep_their_names_and_order():
    assert list(METHODS) == [
        DEFAULT,
        "activation x gradient, margin",
        "activation x gradient, less controls",
        "|activation x gradient|, less controls",
        "activations",
        "integrated gradients",
        "zero-out",
        "slimming",
        "hard concrete",
        "weight norm",
        "random",
    ]


def test_a_decorated_localizer_is_a_method(task, monkeypatch):
    monkeypatch.setattr("lightning_memsink.localization.localizers.task.METHODS", registered := {})

    @localizer("constant, 2", value=2.0)
    @localizer("constant")
    def constant(task, value=1.0):
        return {layer.name: torch.full((layer.units,), value) for layer in task.layers}

    assert list(registered) == ["constant", "constant, 2"]
    assert all((own == 2).all() for own in registered["constant, 2"](task).values())


@pytest.mark.parametrize("method", METHODS)
def test_a_localizer_scores_every_unit_and_leaves_no_trace(task, method):
    task.model.second[0].eval()  # a mode of its own, which must be restored
    for parameter in task.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    task.model.first[2].weight.requires_grad_(False)
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    modes, state = [module.training for module in task.model.modules()], torch.get_rng_state()
    scores = METHODS[method](task)
    assert {name: own.shape for name, own in scores.items()} == {layer.name: (UNITS,) for layer in task.layers}
    assert all(own.isfinite().all() and not own.requires_grad for own in scores.values())
    assert all(torch.equal(value, before[name]) for name, value in task.model.state_dict().items())
    assert all(torch.equal(parameter.grad, torch.ones_like(parameter)) for parameter in task.model.parameters())
    assert [module.training for module in task.model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in task.model.modules())
    again = METHODS[method](task)
    assert all(torch.equal(own, again[name]) for name, own in scores.items())


@pytest.mark.parametrize("method", METHODS)
def test_a_localizer_that_fails_leaves_no_trace_either(task, method):
    def fails(batch):
        task.model(batch[0])
        raise RuntimeError("out of memory")

    if method not in ("weight norm", "random"):
        with pytest.raises(RuntimeError, match="out of memory"):
            METHODS[method](Task(task.model, task.layers, fails, task.targets))
    assert task.model.training and task.model.second.training
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in task.model.modules())


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("weight norm", "random", "activations")])
def test_the_unit_that_alone_knows_the_target_is_found(method):
    """One unit of many fires for the target and raises its class; the others do next to nothing."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, UNITS), nn.ReLU(), nn.Linear(UNITS, CLASSES, bias=False))
    with torch.no_grad():
        model[2].weight.mul_(0.05)
        model[0].weight[7], model[0].bias[7] = torch.tensor([4.0, 0, 0, 0, 0]), 0.0
        model[2].weight[:, 7] = torch.tensor([0, 1.0, 0, 0])
    target, control = torch.eye(5)[:1], -torch.eye(5)[:1]

    def loss(batch):
        return F.cross_entropy(model(batch), torch.ones(len(batch), dtype=torch.int64))

    task = Task(model, find_hidden_layers(model), loss, [Batch(target, 1)], [Batch(control, 1)])
    scores = METHODS[method](task)
    assert int(scores[task.layers[0].name].argmax()) == 7


def test_zero_out_is_the_loss_without_the_unit(task):
    scores = METHODS["zero-out"](task)
    task.model.eval()
    with torch.no_grad():
        before = mean_loss(task, task.targets)
        for layer in task.layers:
            for unit in range(UNITS):
                kept = layer.module.weight.clone()
                layer.module.weight[:, unit] = 0
                assert_close(scores[layer.name][unit], mean_loss(task, task.targets) - before)
                layer.module.weight.copy_(kept)


def test_integrated_effects_sum_to_what_all_units_do_together(task):
    with isolated_eval(task.model):
        effects = _path_effects(task, task.targets[:1], steps=200)
        nothing = {name: 0 * gate for name, gate in open_gates(task).items()}
        with gated(task.layers, nothing):
            without = task.loss(task.targets[0].batch)
        expected = without - task.loss(task.targets[0].batch)
    assert_close(sum(own.sum() for own in effects.values()), expected.detach(), atol=1e-3, rtol=1e-3)
    assert effects[task.layers[0].name].shape == (2, UNITS)


def test_activations_are_means_before_absolute_values_times_the_weights_norm(task):
    scores = METHODS["activations"](task)
    task.model.eval()
    inputs = torch.cat([batch[0] for batch, _ in task.targets])
    hidden = task.model.first[:2](inputs)
    expected = hidden.mean(0).abs() * task.model.first[2].weight.norm(dim=0)
    assert_close(scores["first.2"], expected.detach())


def scored(task, controls=(), **how):
    return activation_times_gradient(Task(task.model, task.layers, task.loss, task.targets, controls), **how)


def test_sizes_sum_to_one_and_less_those_of_controls_to_nothing(task):
    assert float(sum(own.sum() for own in scored(task, signed=False).values())) == pytest.approx(1)
    both = scored(task, task.controls, signed=False, contrasted=True)
    assert float(sum(own.sum() for own in both.values())) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("method", [DEFAULT, "activation x gradient, margin", "integrated gradients"])
def test_a_score_is_the_mean_over_samples_however_they_are_batched(task, method):
    one_by_one = [
        METHODS[method](Task(task.model, task.layers, task.loss, [Batch((inputs[n : n + 1], of[n : n + 1]), 1)]))
        for (inputs, of), size in task.targets
        for n in range(size)
    ]
    for name, own in METHODS[method](task).items():
        assert_close(own, torch.stack([each[name] for each in one_by_one]).mean(0))


def test_a_contrast_without_controls_is_none(task):
    for name, own in scored(task, contrasted=True).items():
        assert_close(own, scored(task)[name])


def test_gates_scale_units_on_the_axis_they_are_on():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 3, 2), nn.ReLU(), nn.Conv1d(3, 4, 2))
    layers, inputs = find_hidden_layers(model), torch.randn(2, 2, 6)
    gate = torch.tensor([[0.5, 1.0, 0.0], [1.0, 2.0, 1.0]])
    with gated(layers, {layers[0].name: gate}):
        output = model(inputs)
    assert_close(output, model[2](model[1](model[0](inputs)) * gate[:, :, None]))


def test_hidden_units_are_what_the_module_reads(task):
    task.model.eval()
    inputs = task.targets[0].batch
    assert_close(hidden_units(task, inputs)["first.2"], task.model.first[:2](inputs[0]).detach())


def test_a_hard_gate_is_open_as_often_as_its_probability_says():
    uniform = (torch.arange(10_000) + 0.5) / 10_000
    for logit in (-2.0, 0.0, 3.0):
        gate = hard_gate(torch.tensor(logit), uniform)
        assert float((gate > 0).float().mean()) == pytest.approx(float(open_probability(torch.tensor(logit))), abs=2e-3)
        assert 0 <= float(gate.min()) and float(gate.max()) <= 1
    assert float(open_probability(torch.tensor(0.0))) == pytest.approx(1 / (1 + math.exp(2 / 3 * math.log(0.1 / 1.1))))


def test_slimming_shuts_what_the_target_does_not_need(task):
    for dear, cheap in zip(slimming(task, price=50.0).values(), slimming(task, price=0.01).values(), strict=True):
        assert dear.mean() < 0.2 < cheap.mean()


@pytest.mark.parametrize(("layers", "targets"), [([], [Batch(None, 1)]), (["layer"], [])])
def test_a_task_without_layers_or_targets_is_refused(layers, targets):
    with pytest.raises(ValueError, match="needs hidden layers and targets"):
        Task(nn.Identity(), layers, lambda batch: torch.zeros(()), targets)
