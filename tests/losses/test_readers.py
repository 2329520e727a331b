"""Loss functions of the registry, watched and read, and what happens where reading fails."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lightning_memsink.losses.autograd_graph import find_loss_nodes
from lightning_memsink.losses.capture import StepCapture
from lightning_memsink.losses.per_sample import NotCaptured
from lightning_memsink.losses.readers import LOSS_FUNCTIONS
from lightning_memsink.losses.reductions import read_reduced
from lightning_memsink.losses.step_watch import StepWatch
from lightning_memsink.losses.unreadable import UnreadableLoss
from tests.support.reading import captured

B, C = 4, 7


def reduced(function, *args, **kwargs):
    """The one reduction seen in a call, and its loss call."""
    watch = StepWatch()
    watch.start([(each, torch.arange(B).reshape(-1, *[1] * (each.ndim - 1))) for each in args[:2]])
    try:
        function(*args, **kwargs)
    finally:
        watch.stop()
    assert watch.error is None
    (of_result,) = [*watch.seen.reductions.values(), *(each for _, each in watch.seen.without_graph)]
    return read_reduced(of_result, watch, B)


def test_losses_times_themselves_are_watched_without_a_mask():
    """Squared losses have no other operand: recording must not fail in the user's own step."""

    def squared(logits, target):
        losses = F.cross_entropy(logits, target, reduction="none")
        return (losses * losses).mean()

    logits, target = torch.randn(B, C, requires_grad=True), torch.arange(B)
    call = reduced(squared, logits, target)
    assert call.weights is None
    assert torch.equal(call.losses, F.cross_entropy(logits, target, reduction="none").square())


def test_a_loss_under_vmap_is_left_alone():
    logits, wanted = torch.randn(B, 1, C), torch.arange(B)[:, None]
    watch = StepWatch()
    watch.start([(logits, torch.arange(B)[:, None, None])])
    torch.vmap(F.cross_entropy)(logits, wanted)
    watch.stop()
    assert not watch.seen.reductions and not watch.seen.without_graph and watch.error is None


def test_positional_legacy_arguments_are_read():
    mse = reduced(F.mse_loss, torch.zeros(B, C), torch.ones(B, C), None, None, "sum")
    entropy = reduced(F.binary_cross_entropy, torch.full((B, C), 0.5), torch.ones(B, C), torch.full((B, C), 2.0))
    assert mse.divisor == 1.0 and entropy.divisor == B * C
    assert torch.equal(entropy.weights, torch.full((B, C), 2.0))


def test_one_sample_without_a_batch_axis_is_read_in_a_batch_of_one():
    batch = {"x": torch.randn(1, C, requires_grad=True), "y": torch.tensor([2])}
    expected = float(F.cross_entropy(batch["x"], batch["y"]).detach())
    found = captured(lambda batch: F.cross_entropy(batch["x"][0], batch["y"][0]), batch, 1)
    assert found.losses.tolist() == pytest.approx([expected])


def test_a_mistake_of_this_package_is_no_fault_of_the_users():
    """It is kept from ending the step, and marked, so that the tracker warns of an `InternalError`."""

    def read(loss, loss_scale):
        raise KeyError("a bug")

    batch = {"x": torch.zeros(B, requires_grad=True)}
    refused = captured(lambda batch: batch["x"].sum(), batch, B, StepCapture(read=read))
    assert isinstance(refused, NotCaptured) and refused.is_internal
    assert "LightningModule.training_step failed with KeyError: 'a bug'" in refused.reason
    assert refused.reason.endswith("please report it.")


def test_a_freed_graph_is_unreadable():
    weight = torch.randn(B, C, requires_grad=True)
    loss = F.cross_entropy(weight, torch.arange(B))
    loss.backward()
    with pytest.raises(UnreadableLoss, match="autograd can't give what NllLossBackward0 saved"):
        find_loss_nodes(loss)


@pytest.mark.parametrize(
    "entry", [entry for entry in LOSS_FUNCTIONS if entry.function is not F.l1_loss], ids=lambda e: e.function.__name__
)
def test_a_loss_function_is_watched_and_read_alike(entry):
    """One entry of the registry serves both ways of capture. (l1_loss is read from a difference that a user wrote.)"""
    inputs = torch.rand(B, C, requires_grad=True).clone()  # a loss on a parameter itself is a penalty
    by_class = entry.function in (F.cross_entropy, F.nll_loss)
    target = torch.arange(B) if by_class else torch.rand(B, C)
    watched = reduced(entry.function, inputs, target)
    (found,) = find_loss_nodes(entry.function(inputs, target))
    assert (found.call.kind, found.call.classes) == (watched.kind, watched.classes)
    assert torch.equal(found.call.losses, watched.losses)
    assert watched.rows.fold(torch.ones_like(watched.losses), B).tolist() == [watched.losses.numel() / B] * B


def test_where_the_user_gives_the_losses_mitigations_still_read_the_loss():
    capture, batch = StepCapture(loss=lambda batch, outputs: torch.zeros(B)), {"x": torch.rand(B, C)}
    head = torch.nn.Linear(C, C)
    capture.begin(batch, B)
    loss = F.cross_entropy(head(batch["x"]), torch.arange(B))
    capture.before_backward(loss)
    (found,) = capture.reader.read(loss)
    assert torch.equal(found.call.losses, F.cross_entropy(head(batch["x"]), torch.arange(B), reduction="none"))
    assert found.call.rows.owners.flatten().tolist() == list(range(B))
    assert capture.finish(loss, B).losses.tolist() == [0.0] * B
