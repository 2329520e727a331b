"""What belongs to a unit is exactly what, changed at will, changes nothing once the unit is silent."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

from lightning_memsink.attribution.hidden_layers import find_hidden_layers
from lightning_memsink.localization.sink_layers import given_sinks, sink_layers
from lightning_memsink.localization.sinks import Sinks
from lightning_memsink.mitigation.unit_parameters import unit_axes, unit_slices
from tests.support.low_rank import LowRank

ENDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
SMALL = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}


def plain():
    return nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 3)), torch.randn(2, 4)


def low_rank():
    return nn.Sequential(LowRank(nn.Linear(4, 6)), nn.GELU(), LowRank(nn.Linear(6, 3))), torch.randn(2, 4)


def convolutional():
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 2, 3)), torch.randn(2, 1, 7, 7)


def gpt():
    config = GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=2, n_head=2, **ENDS)
    return GPT2LMHeadModel(config).eval(), torch.randint(20, (2, 8))


def llama():
    return LlamaForCausalLM(LlamaConfig(**SMALL, **ENDS)).eval(), torch.randint(20, (2, 8))


def phi():
    return Phi3ForCausalLM(Phi3Config(**SMALL, **ENDS)).eval(), torch.randint(20, (2, 8))


FAMILIES = [plain, low_rank, convolutional, gpt, llama, phi]


def run(model, given):
    output = model(given)
    return output if isinstance(output, torch.Tensor) else output.logits


def sinks_of(layers, seed=0):
    generator = torch.Generator().manual_seed(seed)
    units = {layer.name: torch.randperm(layer.units, generator=generator)[: layer.units // 3] for layer in layers}
    return Sinks(units, {name: -own.double() for name, own in units.items()}, {one.name: one.units for one in layers})


def silencer(mask, axis):
    """The oracle's hook: the module gets zeros where the unit was."""
    return lambda module, given: (given[0].movedim(axis, -1).masked_fill(mask, 0).movedim(-1, axis), *given[1:])


def scrambled(model, slices):
    with torch.no_grad():
        for each in slices:
            own = each.of(each.parameter)
            each.put_(each.parameter, own + torch.randn(own.shape))


@pytest.mark.parametrize("make", FAMILIES)
def test_with_the_units_silent_nothing_that_belongs_to_them_matters(make):
    torch.manual_seed(0)
    model, given = make()
    layers = find_hidden_layers(model)
    sinks = sinks_of(layers)
    slices = unit_slices(unit_axes(model, layers), sinks)
    awake = run(model, given)
    with torch.no_grad():
        twin = copy.deepcopy(model)
        scrambled(twin, unit_slices(unit_axes(twin, find_hidden_layers(twin)), sinks))
        assert not torch.allclose(run(twin, given), awake), "units that are not silent do matter"
    for layer in layers:
        layer.module.register_forward_pre_hook(silencer(sinks.masks()[layer.name], layer.unit_axis))
    expected = run(model, given)
    scrambled(model, slices)
    torch.testing.assert_close(run(model, given), expected)


@pytest.mark.parametrize("make", FAMILIES)
def test_with_only_the_units_awake_everything_that_matters_belongs_to_them(make):
    """Gradients say it: where all other units are silent, those of writers and readers vanish outside the slices."""
    torch.manual_seed(0)
    model, given = make()
    layers = find_hidden_layers(model)
    sinks = sinks_of(layers)
    for layer in layers:  # with the others silent
        mask, axis = ~sinks.masks()[layer.name], layer.unit_axis
        layer.module.register_forward_pre_hook(silencer(mask, axis))
    run(model, given).square().sum().backward()
    for name, places in unit_axes(model, layers).items():
        for place in places:
            [each] = unit_slices({name: [place]}, only(sinks, name))
            gradient = place.parameter.grad
            assert torch.count_nonzero(gradient.index_fill(each.axis, each.index, 0)) == 0
            assert torch.count_nonzero(each.of(gradient)) > 0


def only(sinks, name):
    return Sinks({name: sinks.units[name]}, {name: sinks.scores[name]}, sinks.sizes)


@given(units=st.integers(2, 9), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=30)
def test_a_copy_put_back_restores_the_parameter_bit_by_bit(units, seed):
    model = nn.Sequential(nn.Linear(3, units), nn.ReLU(), nn.Linear(units, 2))
    layers = find_hidden_layers(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    slices = unit_slices(unit_axes(model, layers), sinks_of(layers, seed))
    copies = [each.of(each.parameter) for each in slices]
    scrambled(model, slices)
    with torch.no_grad():
        for each, own in zip(slices, copies, strict=True):
            each.put_(each.parameter, own)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("direction", "expected"), [("in", {"0.weight", "0.bias"}), ("out", {"2.weight"}), ("both", None)]
)
def test_a_direction_means_what_makes_or_what_reads(direction, expected):
    model, _ = plain()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    layers = find_hidden_layers(model)
    slices = unit_slices(unit_axes(model, layers, direction), sinks_of(layers))
    assert {names[id(each.parameter)] for each in slices} == (expected or {"0.weight", "0.bias", "2.weight"})


def test_a_weight_that_two_layers_share_comes_once_with_the_units_of_both():
    model = nn.ModuleList(plain()[0] for _ in range(2))
    model[1][0].weight, model[1][2].weight = model[0][0].weight, model[0][2].weight
    layers = find_hidden_layers(model)
    sizes, units = {"0.2": 6, "1.2": 6}, {"0.2": torch.tensor([4, 1]), "1.2": torch.tensor([1, 5])}
    slices = unit_slices(unit_axes(model, layers), Sinks(units, {name: torch.ones(2) for name in units}, sizes))
    found = {(id(each.parameter), each.axis): each.index.tolist() for each in slices}
    assert len(found) == len(slices) == 4, "two weights, and two biases that are each layer's own"
    assert found[id(model[0][0].weight), 0] == found[id(model[0][2].weight), 1] == [1, 4, 5]
    assert found[id(model[0][0].bias), 0] == [1, 4] and found[id(model[1][0].bias), 0] == [1, 5]


def test_a_layer_with_an_unknown_writer_can_be_frozen_by_its_columns_only():
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3))
    layers = find_hidden_layers(model, ["2"])
    with pytest.raises(ValueError, match=r"which module writes them.*Pass direction='out'"):
        unit_axes(model, layers)
    assert [axis.axis for axis in unit_axes(model, layers, "out")["2"]] == [1]


def test_a_computed_weight_has_no_number_of_a_unit():
    model, _ = plain()
    nn.utils.parametrizations.weight_norm(model[0])
    with pytest.raises(ValueError, match="its weight is computed from others: it has no row per unit"):
        unit_axes(model, find_hidden_layers(model))


def test_sinks_of_another_model_are_refused_with_its_layers_named():
    model, _ = plain()
    alien = Sinks({"blocks.0.down": torch.tensor([1])}, {"blocks.0.down": torch.ones(1)}, {"blocks.0.down": 6})
    with pytest.raises(ValueError, match=r"sinks name blocks\.0\.down, but the hidden layers of Sequential are 2\."):
        sink_layers(model, alien)
    larger = Sinks({"2": torch.tensor([1])}, {"2": torch.ones(1)}, {"2": 9})
    with pytest.raises(ValueError, match="have 2 with 9 units, but in Sequential it has 6"):
        sink_layers(model, larger)
    assert sink_layers(model, Sinks(sizes={"2": 6})) == []


def test_given_sinks_are_loaded_and_never_empty(tmp_path):
    sinks = sinks_of(find_hidden_layers(plain()[0]))
    sinks.save(tmp_path / "sinks.safetensors")
    assert given_sinks(sinks) is sinks
    assert given_sinks(tmp_path / "sinks.safetensors").units["2"].tolist() == sinks.units["2"].tolist()
    with pytest.raises(ValueError, match=r"name no unit, so there is nothing to act on\. SinkLocalizer\(\)"):
        given_sinks(Sinks(sizes={"2": 6}))
