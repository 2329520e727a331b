"""Loss functions of the registry, watched and read, and what happens where reading fails."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lightning_memsink.losses.autograd_graph import find_loss_nodes
from lightning_memsink.losses.capture import StepCapture
from lightning_memsink.losses.function_mode import LossWatch
from lightning_memsink.losses.per_sample import NotCaptured
from lightning_memsink.losses.readers import LOSS_FUNCTIONS
from lightning_memsink.losses.unreadable import UnreadableLoss

B, C = 4, 7


def test_losses_times_themselves_are_watched_without_a_mask():
    """Squared losses have no other operand: recording must not fail in the user's own step."""
    watch = LossWatch()
    watch.start()
    losses = F.cross_entropy(torch.randn(B, C), torch.arange(B), reduction="none")
    (losses * losses).mean()
    (call,) = watch.stop()
    assert watch.error is None
    assert torch.equal(call.losses, losses)


def test_a_loss_under_vmap_is_left_alone():
    logits, wanted = torch.randn(B, 1, C), torch.arange(B)[:, None]
    watch = LossWatch()
    watch.start()
    torch.vmap(F.cross_entropy)(logits, wanted)
    assert watch.stop() == [] and watch.error is None


def test_positional_legacy_arguments_are_read():
    watch = LossWatch()
    watch.start()
    F.mse_loss(torch.zeros(B, C), torch.ones(B, C), None, None, "sum")
    F.binary_cross_entropy(torch.full((B, C), 0.5), torch.ones(B, C), torch.full((B, C), 2.0))
    mse, entropy = watch.stop()
    assert mse.divisor == 1.0 and entropy.divisor == B * C
    assert torch.equal(entropy.weights, torch.full((B, C), 2.0))


def test_one_sample_without_a_batch_axis_is_read_in_a_batch_of_one():
    logits = torch.randn(C, requires_grad=True)
    loss = F.cross_entropy(logits, torch.tensor(2))
    capture = StepCapture()
    capture.begin()
    capture.before_backward(loss)
    loss.backward()
    assert capture.finish(loss, 1).losses.tolist() == pytest.approx([float(loss.detach())])


def test_a_mistake_of_this_package_is_no_fault_of_the_users():
    """It is kept from ending the step, and marked, so that the tracker warns of an `InternalError`."""

    def search(loss):
        raise KeyError("a bug")

    loss = torch.zeros(B, requires_grad=True).sum()
    capture = StepCapture("Model", search=search)
    capture.begin()
    capture.before_backward(loss)
    refused = capture.finish(loss, B)
    assert isinstance(refused, NotCaptured) and refused.is_internal
    assert "Model.training_step failed with KeyError: 'a bug'" in refused.reason
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
    watch = LossWatch()
    watch.start()
    loss = entry.function(inputs, torch.arange(B) if by_class else torch.rand(B, C))
    (watched,) = watch.stop()
    ((_, read),) = find_loss_nodes(loss)
    assert (read.kind, read.classes) == (watched.kind, watched.classes)
    assert torch.equal(read.losses, watched.losses)
