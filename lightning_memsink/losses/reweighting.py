"""Weights on the samples or tokens of a loss, in the backward that is about to run.

The loss calls are found in the graph. What leaves a call towards the model is multiplied, row by row, on its way: the
forward, the loss and its denominators stay as they were. Under a mean the rest weigh what they weighed.

    B  samples in a batch      R  runs of a loss call: equal pieces of its elements, each of one sample
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node
from torch.utils.hooks import RemovableHandle

from lightning_memsink.losses.autograd_graph import LossNodes, find_loss_nodes, names_near, note_upstream
from lightning_memsink.losses.loss_call import LossCall
from lightning_memsink.losses.per_sample import (
    IDS_KEY,
    SampleAxisLost,
    Term,
    alike,
    sample_of_run,
    samples_by_offset,
    terms_of,
    weigh,
)
from lightning_memsink.losses.readers import is_likelihood, is_log_softmax, is_report, metadata, saved_value
from lightning_memsink.losses.unreadable import UnreadableLoss


@dataclass(frozen=True)
class OpenCall:
    """A loss call that is about to be differentiated."""

    node: Node
    call: LossCall
    """With its ``upstream``; only up to a factor where there is one for all elements of the step."""
    owners: Tensor | None
    """``[R]`` sample numbers; None: there is one run for each sample, in order."""


class OpenLoss:
    """The loss calls behind ``loss``, before its backward, and hooks that weigh them in it.

    Calls without a sample axis (a penalty on the router, say) belong to no sample and keep their weight.

    Args:
        loss: as it will be differentiated, scaled as it may be.
        batch_size: B.
        loss_scale: what accumulation and gradient scaling multiplied the loss with.
        found: what `find_loss_nodes` returned for this loss, if it was called before.

    Raises:
        UnreadableLoss: no loss call is found (compiled code, custom autograd functions), or none has a sample axis.
    """

    def __init__(self, loss: Tensor, batch_size: int, loss_scale: float = 1.0, found: LossNodes | None = None) -> None:
        self.batch_size, self.loss_scale = batch_size, loss_scale
        found = find_loss_nodes(loss) if found is None else found
        if not found:
            raise UnreadableLoss(
                f"the loss comes from {', '.join(names_near(loss)) or 'no graph'}, where samples can't be "
                "separated. End training_step with `return per_sample(losses, ids)`"
            )
        found = [(node, copy(call)) for node, call in found]  # who found them waits for another upstream than we
        _note_upstreams(loss, found)
        self.calls: list[OpenCall] = []
        lost = ""
        for same in alike([call for _, call in found]):
            tiles = samples_by_offset(same, batch_size)
            for number, call in enumerate(same):
                node = next(node for node, its_call in found if its_call is call)
                try:
                    owners = sample_of_run(call, batch_size, None if tiles is None else tiles[number])
                    self.calls.append(OpenCall(node, call, owners))
                except SampleAxisLost as error:
                    lost = str(error)
        if not self.calls:
            raise UnreadableLoss(
                f"the loss has no sample axis: {lost}. End training_step with `return per_sample(losses, ids)`"
            )
        self._handles: list[RemovableHandle] = []

    @property
    def ids(self) -> Tensor | None:
        """``[B]`` ids that the step itself reported with `per_sample`."""
        node = self.calls[0].node
        return metadata(node).get(IDS_KEY) if is_report(node) else None

    @cached_property
    def _terms(self) -> list[Term]:
        return terms_of([each.call for each in self.calls], self.batch_size, self.loss_scale)

    def losses(self) -> Tensor:
        """``[B]`` each sample's loss now, as the ledger will have it: the mean over its elements that count, several
        losses added as the step adds them; NaN where none counts."""
        return weigh(self._terms)

    def shares(self) -> Tensor:
        """``[B]`` each sample's part of the loss's coefficients, adding up to 1: ``1/B`` each under a batch mean."""
        if len(self._terms) == 1:
            weights = self._terms[0].weights.abs()
            return weights / weights.sum()
        absent = torch.stack([term.weights == 0 for term in self._terms])  # a mean over nothing has no scale
        weights = torch.stack([term.weights * term.scale for term in self._terms]).masked_fill(absent, 0).abs().sum(0)
        return weights / weights.sum()

    def weigh_samples(self, weights: Tensor) -> None:
        """In the backward that follows, ``weights`` ``[B]`` times each sample's gradient; 0 leaves it out exactly."""
        if weights.is_cpu and bool((weights == 1).all()):  # elsewhere the question would wait for the device
            return
        for each in self.calls:
            own = weights.to(each.call.losses.device)
            self.weigh_runs(each, own if each.owners is None else own[each.owners])

    def weigh_runs(self, each: OpenCall, weights: Tensor) -> None:
        """The same for one call, ``weights`` ``[R]`` or as many for each run as it has elements."""
        self._handles.append(each.node.register_hook(_scale(each, weights)))

    def close(self) -> None:
        """After the backward: a second one through the same graph is weighed anew or not at all."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def _note_upstreams(loss: Tensor, found: LossNodes) -> None:
    """Fills in ``upstream`` as the backward would, by a walk from ``loss`` down to the calls and no further."""
    if len(found) == 1 and (is_report(found[0][0]) or getattr(found[0][0], "_saved_reduction", False)):
        found[0][1].upstream = torch.ones((), device=loss.device)  # one number for all elements cancels
        return
    edges = [GradientEdge(node, 0) for node, _ in found]
    try:
        gradients = torch.autograd.grad(loss, edges, torch.ones_like(loss), retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        raise UnreadableLoss(f"the loss can't be differentiated with respect to its loss calls ({error})") from error
    for (node, call), gradient in zip(found, gradients, strict=True):
        note_upstream(node, call)((gradient,))


def _scale(each: OpenCall, weights: Tensor) -> Callable[[Sequence[Any], Sequence[Any]], tuple[Any, ...]]:
    node, shape = each.node, each.call.losses.shape
    if weights.numel() < each.call.losses.numel():
        weights = weights[:, None].expand(-1, each.call.losses.numel() // len(weights))
    weights = weights.reshape(shape)
    if is_likelihood(node):
        return _scale_targets(node, weights)
    if is_log_softmax(node):
        weights = weights.unsqueeze(saved_value(node, "dim"))

    def scale(leaving: Sequence[Any], arriving: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(
            _times(gradient, weights) if gradient is not None and gradient.ndim == weights.ndim else gradient
            for gradient in leaving
        )

    return scale


def _scale_targets(node: Node, weights: Tensor) -> Callable[[Sequence[Any], Sequence[Any]], tuple[Any, ...]]:
    """A hook that multiplies the gradient of a likelihood, ``[N, C, ...]`` or ``[C]``, with ``weights`` of its targets.

    The gradient is zero except at the targets, so only those are multiplied, and in place, since the tensor was made
    for this node alone. A pass over all classes would cost more than the loss itself.
    """
    targets = saved_value(node, "target")
    dim = min(1, targets.ndim)  # of the classes
    place = torch.where(targets == saved_value(node, "ignore_index"), 0, targets).unsqueeze(dim)
    weights = weights.unsqueeze(dim)

    def scale(leaving: Sequence[Any], arriving: Sequence[Any]) -> tuple[Any, ...]:
        gradient, *rest = leaving
        if torch.is_grad_enabled():  # a graph of the gradient itself is being made
            return gradient.scatter(dim, place, _times(gradient.gather(dim, place), weights)), *rest
        return gradient.scatter_(dim, place, _times(gradient.gather(dim, place), weights)), *rest

    return scale


def _times(gradient: Tensor, weights: Tensor) -> Tensor:
    """Exactly 0 where the weight is, though 0 times infinity is not."""
    return (gradient * weights.to(gradient.dtype)).masked_fill(weights == 0, 0)
