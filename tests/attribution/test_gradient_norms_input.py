"""Modules whose gradient norms can't be read are named, and never guessed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.testing import assert_close

from tests.support.one_by_one import in_one, mean_square, one_by_one


class Unreadable(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.head = kind, nn.Linear(6, 2)
        match kind:
            case "attention":
                self.part: nn.Module = nn.MultiheadAttention(6, 2, batch_first=True)
            case "recurrent":
                self.part = nn.LSTM(6, 6, batch_first=True)
            case "batch statistics":
                self.part = nn.BatchNorm1d(5)
            case "parameter":
                self.part = nn.Module()
                self.part.scale = nn.Parameter(torch.ones(6))
            case "parametrized":
                self.part = nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))
            case _:
                self.part = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        match self.kind:
            case "attention":
                x = self.part(x, x, x)[0]
            case "recurrent":
                x = self.part(x)[0]
            case "parameter":
                x = x * self.part.scale
            case "flattened":
                x = self.part(x.flatten(0, 1)).view_as(x)
            case "routed":  # by chance to as many rows as there are samples
                rows = x.flatten(0, 1)
                chosen = torch.tensor([0, 1, 9, 13])
                x = rows.index_add(0, chosen, self.part((rows * 1.0)[chosen])).view_as(x)
            case "without a call":
                x = functional.linear(x, self.part.weight, self.part.bias)
            case _:
                x = self.part(x)
        return self.head(x)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("attention", "without calling its parts"),
        ("recurrent", "steps through time"),
        ("batch statistics", "mix the samples"),
        ("parameter", "no rule"),
        ("parametrized", "no rule"),
        ("flattened", "20 rows along the batch axis, not 4"),
        ("routed", "picked out of a flattened batch"),
        ("without a call", "not called"),
    ],
)
def test_what_cannot_be_read_is_named_and_never_guessed(kind, reason):
    torch.manual_seed(0)
    model, batch = Unreadable(kind), torch.randn(4, 5, 6, requires_grad=True)
    norms, recorder = in_one(model, batch, mean_square)
    assert all(name.startswith("part") and reason in why for name, why in recorder.uncovered.items())
    assert set(norms) - {"part" if kind == "parametrized" else ""} == {"head"} and 0 < recorder.covered < 1
    if kind not in ("batch statistics", "routed"):  # alone, a sample has other statistics or fewer rows
        assert_close(norms["head"], one_by_one(model, batch, mean_square)["head"], rtol=1e-5, atol=0)


def test_an_output_overwritten_in_place_is_exact_or_named():
    """Autograd forgets hooks on a view that is overwritten, and a linear layer's output of three axes is one."""
    torch.manual_seed(0)
    model, batch = nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace=True), nn.Linear(6, 2)), torch.randn(4, 5, 6)
    norms, recorder = in_one(model, batch, mean_square)
    assert set(norms) | set(recorder.uncovered) == {"0", "2"}
    oracle = one_by_one(model, batch, mean_square)
    for name, norm in norms.items():
        assert_close(norm, oracle[name], rtol=1e-5, atol=0)
