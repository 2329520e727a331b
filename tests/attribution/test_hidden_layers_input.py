"""Models without hidden layers that can be read: refused, with the structures that were searched."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_memsink.attribution.hidden_layers import find_hidden_layers, unit_weights


class CausalAttention(nn.Module):
    """Widths of an MLP, the name of none, and a forward that shows nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(8, 32), nn.Linear(32, 8)


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def test_a_packed_weight_is_refused():
    [layer] = find_hidden_layers(small())
    layer.module.weight = nn.Parameter(torch.zeros(8, 1))
    with pytest.raises(ValueError, match=r"reads 8 units with a weight.*load the model unquantized"):
        unit_weights(layer)


def test_a_grouped_convolution_is_refused_by_name():
    model = nn.Sequential(nn.Conv2d(4, 8, 1), nn.ReLU6(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU6())
    with pytest.raises(ValueError, match=r"in 2 \(groups > 1\) a unit is no column"):
        find_hidden_layers(model, ["2"])


@pytest.mark.parametrize(
    "model, message",
    [
        (
            nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)),
            r"in Sequential\. Looked for MLPs .* There are 0, 1\. Name the",
        ),
        (nn.LSTM(2, 3), r"in LSTM\. .* There is none\."),
        (CausalAttention(), r"There are inner, out\."),
        (nn.ModuleList(nn.Linear(4, 4) for _ in range(9)), r"There are 0, 1, 2, 3, 4, 5 and 3 more\."),
    ],
)
def test_a_model_without_hidden_layers_says_what_was_looked_for(model, message):
    with pytest.raises(ValueError, match=message):
        find_hidden_layers(model)


def compiled_in_place() -> nn.Module:
    model = nn.Sequential(nn.Embedding(3, 4), small())
    model[1].compile(backend="eager")
    return model


@pytest.mark.parametrize(
    "build, message",
    [
        (
            lambda: torch.compile(small(), backend="eager"),
            r"The model \(OptimizedModule\) is compiled and holds the hidden layer _orig_mod\.2",
        ),
        (
            lambda: nn.Sequential(nn.Embedding(3, 4), torch.compile(small(), backend="eager")),
            r"1 \(OptimizedModule\) is compiled and holds the hidden layer 1\._orig_mod\.2",
        ),
        (compiled_in_place, r"1 \(Sequential\) is compiled and holds the hidden layer 1\.2.*Leave it uncompiled"),
    ],
)
def test_compiled_code_is_refused_by_name(build, message):
    with pytest.raises(ValueError, match=message):
        find_hidden_layers(build())


def test_a_compiled_part_elsewhere_is_no_obstacle():
    model = nn.ModuleDict({"body": small(), "head": nn.Linear(2, 2)})
    model["head"].compile(backend="eager")
    assert [layer.name for layer in find_hidden_layers(model)] == ["body.2"]
