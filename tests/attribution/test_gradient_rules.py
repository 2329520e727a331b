"""Gradient rules: a decorated function is all that another kind of layer needs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_memsink.attribution import gradient_rules
from lightning_memsink.attribution.ghost_norms import Dense
from tests.support.one_by_one import agree


class Scale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x


def test_a_rule_of_ones_own_covers_another_kind_of_layer(monkeypatch):
    monkeypatch.setattr(gradient_rules, "_RULES", list(gradient_rules._RULES))

    @gradient_rules.gradient_rule(Scale, parameters=["scale"])
    def scale(module: nn.Module, inputs: Tensor, gradient: Tensor) -> gradient_rules.Contributions:
        return {"scale": Dense((inputs * gradient).flatten(1, -2).sum(1))}

    torch.manual_seed(0)
    agree(nn.Sequential(Scale(6), nn.Linear(6, 2)), torch.randn(4, 5, 6))
