"""Zeroing a unit's weights is zeroing the unit, and leaves no trace."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_memsink.attribution.hidden_layers import find_hidden_layers
from lightning_memsink.localization.ablation import ablated
from lightning_memsink.localization.sinks import Sinks
from tests.support.low_rank import LowRank


def plain():
    return nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 3)), torch.randn(2, 4)


def low_rank():
    return nn.Sequential(nn.Linear(4, 6), nn.GELU(), LowRank(nn.Linear(6, 3))), torch.randn(2, 4)


def convolutional():
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 2, 3)), torch.randn(2, 1, 7, 7)


def gpt():
    config = GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config).eval(), torch.randint(20, (2, 8))


def run(model, inputs):
    output = model(inputs)
    return output if isinstance(output, torch.Tensor) else output.logits


def masks_for(layers, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {layer.name: torch.rand(layer.units, generator=generator) < 0.5 for layer in layers}


def silenced(layer, mask):
    """The oracle: the module gets zeros where the unit was."""

    def before(module, inputs):
        return (inputs[0].movedim(layer.unit_axis, -1).masked_fill(mask, 0).movedim(-1, layer.unit_axis), *inputs[1:])

    return layer.module.register_forward_pre_hook(before)


@pytest.mark.parametrize("make", [plain, low_rank, convolutional, gpt])
def test_the_model_computes_as_if_the_units_were_zero_and_then_as_before(make):
    torch.manual_seed(0)
    model, inputs = make()
    layers = find_hidden_layers(model)
    masks, before = masks_for(layers), {name: value.clone() for name, value in model.state_dict().items()}
    handles = [silenced(layer, masks[layer.name]) for layer in layers]
    expected = run(model, inputs)
    for handle in handles:
        handle.remove()
    with ablated(layers, masks):
        assert_close(run(model, inputs), expected)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_weights_are_back_after_an_error_and_a_pause():
    model, _ = plain()
    layers, before = find_hidden_layers(model), model[2].weight.clone()
    with pytest.raises(KeyboardInterrupt), ablated(layers, masks_for(layers)):
        raise KeyboardInterrupt
    assert torch.equal(model[2].weight, before)


def test_tied_weights_are_back_too():
    model = nn.ModuleDict({name: nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4)) for name in "ab"})
    model["b"][2].weight = model["a"][2].weight
    layers, before = find_hidden_layers(model), model["a"][2].weight.clone()
    assert len(layers) == 2
    everything = {layer.name: torch.ones(6, dtype=torch.bool) for layer in layers}
    with ablated(layers, everything):
        assert not model["a"][2].weight.any()
    assert torch.equal(model["a"][2].weight, before)


def test_odd_values_come_back_bit_by_bit():
    model, _ = plain()
    with torch.no_grad():
        model[2].weight[0] = torch.tensor([torch.nan, torch.inf, -0.0, 1e-42, 1.0, -1.0])
    before = model[2].weight.detach().clone().view(torch.int32)
    layers = find_hidden_layers(model)
    with ablated(layers, {layers[0].name: torch.ones(6, dtype=torch.bool)}):
        pass
    assert torch.equal(model[2].weight.detach().view(torch.int32), before)


def test_sinks_name_the_units_themselves():
    model, _ = plain()
    layers = find_hidden_layers(model)
    name = layers[0].name
    sinks = Sinks({name: torch.tensor([4, 1])}, {name: torch.tensor([2.0, 1.0])}, {name: 6})
    with ablated(layers, sinks):
        assert (model[2].weight == 0).all(0).nonzero().flatten().tolist() == [1, 4]


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"elsewhere": torch.ones(6, dtype=torch.bool)}, "'elsewhere'"),
        ({"2": torch.ones(5, dtype=torch.bool)}, "has 6 units"),
        ({"2": torch.ones(6)}, "has 6 units"),
    ],
)
def test_units_that_the_model_does_not_have_are_refused_before_anything_changes(masks, message):
    model, _ = plain()
    before = model[2].weight.clone()
    good = {"2": torch.ones(6, dtype=torch.bool)} if "2" not in masks else {}
    with pytest.raises(ValueError, match=message), ablated(find_hidden_layers(model), good | masks):
        pass
    assert torch.equal(model[2].weight, before)
