"""Inputs and gradients are paired once per call, checkpointed or not, and the hooks leave no trace."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_memsink.attribution.module_hooks import ModuleCalls

CHECKPOINTING = {"none": None, "reentrant": True, "non-reentrant": False}


class TwoLayers(nn.Module):
    def __init__(self, checkpointing: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)
        self.reentrant = CHECKPOINTING[checkpointing]

    def block(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant is None:
            return self.block(x)
        return checkpoint(self.block, x, use_reentrant=self.reentrant)


def pairs_of(module: TwoLayers, side: str) -> tuple[dict[str, list[tuple[Tensor, Tensor]]], list[str]]:
    """Pairs of input and gradient of one step by name, and the names without a pair."""
    pairs = defaultdict(list)
    calls = ModuleCalls({"up": module.up, "down": module.down}, side, lambda name, *pair: pairs[name].append(pair))
    calls.open()
    x = torch.linspace(-1, 1, 12).reshape(3, 4).requires_grad_()
    module(x).square().sum().backward()
    lost = calls.close()
    calls.remove()
    return pairs, lost


def by_hand(module: TwoLayers, side: str) -> dict[str, tuple[Tensor, Tensor]]:
    x = torch.linspace(-1, 1, 12).reshape(3, 4).requires_grad_()
    up = module.up(x)
    hidden = torch.relu(up)
    down = module.down(hidden)
    places = [x, hidden] if side == "input" else [up, down]
    gradients = torch.autograd.grad(down.square().sum(), places)
    return {"up": (x, gradients[0]), "down": (hidden, gradients[1])}


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_input_and_gradient_are_paired_once_per_call(checkpointing, side):
    module = TwoLayers(checkpointing)
    pairs, lost = pairs_of(module, side)
    assert not lost
    for name, pair in by_hand(module, side).items():
        [(inputs, gradient)] = pairs[name]
        torch.testing.assert_close((inputs, gradient), pair)


def test_a_module_used_twice_has_two_pairs():
    module = TwoLayers("none")
    module.down = module.up = nn.Linear(4, 4)
    pairs, _ = pairs_of(module, "output")
    assert len(pairs["down"]) == len(pairs["up"]) == 2


def test_closed_or_removed_hooks_record_nothing():
    module, recorded = TwoLayers("none"), []
    calls = ModuleCalls({"up": module.up}, "output", lambda *pair: recorded.append(pair))
    module(torch.ones(2, 4)).sum().backward()
    calls.open()
    calls.remove()
    module(torch.ones(2, 4)).sum().backward()
    assert not recorded and not module.up._forward_hooks and not module.up._forward_pre_hooks


def test_no_input_is_kept_longer_than_autograd_keeps_it():
    module = TwoLayers("non-reentrant")
    calls = ModuleCalls({"down": module.down}, "output", lambda *pair: None)
    calls.open()
    loss = module(torch.ones(2, 4, requires_grad=True)).sum()
    [call] = calls._calls["down"]
    assert call.input() is None, "the hidden activation was dropped by the checkpoint"
    loss.backward()
    assert call.done and call.strong is None and call.gradient is None


def test_a_gradient_without_its_input_is_named():
    module = TwoLayers("none")
    calls = ModuleCalls({"up": module.up}, "output", lambda *pair: None)
    calls.open()
    output = module.up(torch.ones(2, 4) * 2)
    calls._calls["up"][0].weak = lambda: None
    output.sum().backward()
    assert calls.close() == ["up"]


def test_an_error_of_ours_is_kept_and_the_backward_goes_on():
    def fail(*pair: object) -> None:
        raise ZeroDivisionError

    module = TwoLayers("none")
    calls = ModuleCalls({"up": module.up}, "output", fail)
    calls.open()
    module(torch.ones(2, 4)).sum().backward()
    assert isinstance(calls.failed, ZeroDivisionError) and module.up.weight.grad is not None
