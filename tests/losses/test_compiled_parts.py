"""Watching stays out of compiled parts of a model, and keeps no operand of a step that its backward does not need."""

from __future__ import annotations

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_memsink.losses.compiled_parts import around_compiled_parts, has_compiled_parts
from lightning_memsink.losses.evaluation_capture import EvaluationCapture
from lightning_memsink.losses.step_watch import StepWatch
from tests.support.capturing import QUIET, C, Model, check, new, token_loss, watched

pytestmark = [*QUIET, pytest.mark.filterwarnings("ignore:The .grad attribute")]  # by Dynamo itself


class Blocks(nn.Module):
    """Calls that Dynamo can't trace under a function mode, within a loop, which has it leave all to Python."""

    def forward(self, hidden):
        for _ in range(2):
            place = torch.arange(hidden.shape[1], device=hidden.device)
            hidden = hidden.unflatten(-1, (2, -1)).flatten(-2) + 0.0 * place[:, None]
        return hidden


class Looped(Model):
    def __init__(self, step, whole=False) -> None:
        super().__init__(step)
        self.blocks = torch.compile(Blocks(), backend="eager", fullgraph=whole)

    def hidden(self, x):
        return self.blocks(super().hidden(x))


class Whole(Looped):
    """A graph break raises."""

    def __init__(self, step) -> None:
        super().__init__(step, whole=True)


class InPlace(Model):
    def __init__(self, step) -> None:
        super().__init__(step)
        self.blocks = Blocks()
        self.blocks.compile(backend="eager", fullgraph=True)

    def hidden(self, x):
        return self.blocks(super().hidden(x))


@pytest.mark.parametrize("cls", [Looped, Whole, InPlace])
def test_validation_of_a_compiled_part_runs_as_it_does_alone(cls):
    torch._dynamo.reset()
    check(watched(new(token_loss, cls), token_loss, validate=True))


def test_code_that_the_compiler_leaves_to_python_gets_its_own_attributes():
    """The mode's own function must not be compiled: it would give a shape for a device."""
    torch._dynamo.reset()
    function = torch.compile(Blocks(), backend="eager").forward  # of a function, no part of the model that is known
    hidden = torch.randn(3, 4, 6)
    watch = StepWatch()
    watch.start()
    try:
        assert torch.equal(function(hidden), hidden)
    finally:
        watch.stop()
    assert watch.error is None


def test_compiled_parts_are_called_as_before_when_a_step_has_ended():
    model = nn.Sequential(Blocks(), torch.compile(Blocks(), backend="eager"), Blocks())
    model[2].compile(backend="eager")
    assert has_compiled_parts(model)
    before = [vars(model[1])["forward"], vars(model[2])["_compiled_call_impl"]]
    watch = StepWatch()
    with pytest.raises(ValueError, match="of the user"), around_compiled_parts(model, watch.suspended):
        assert vars(model[1])["forward"] is not before[0]
        raise ValueError("of the user")
    assert [vars(model[1])["forward"], vars(model[2])["_compiled_call_impl"]] == before


class Remembers(Model):
    """Whether its logits in float are still in memory when its backward begins."""

    alive = None

    def on_before_backward(self, loss):
        type(self).alive.append(self.logits() is not None)


def test_logits_of_a_watched_step_are_gone_before_its_backward():
    def step(model, batch):
        logits = model(batch["x"]).view(-1, C).double()  # backward does not need them
        model.logits = weakref.ref(logits)
        return F.cross_entropy(logits, batch["y"].view(-1))

    class Late(Remembers):
        def backward(self, loss, *args, **kwargs):
            self.alive.append(self.logits() is not None)
            super().backward(loss, *args, **kwargs)

    Late.alive = []
    check(watched(new(step, Late), token_loss))
    assert Late.alive and not any(Late.alive)


def test_an_evaluation_capture_without_a_module_is_none_of_a_compiled_one():
    from lightning_memsink.losses.capture import StepCapture

    capture = EvaluationCapture(StepCapture())
    capture.begin({}, 0)
    capture.abandon()
    assert not capture.watch.entered
