"""Weights on the samples or tokens of a loss, in the backward that is about to run.

The loss calls are found in the graph. What leaves a call towards the model is multiplied, row by row, on its way: the
forward, the loss and its denominators stay as they were. Under a mean the rest weigh what they weighed.

    B  samples in a batch
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.utils.hooks import RemovableHandle

from lightning_memsink.losses.autograd_graph import FoundCall, LossNodes, has_learned_factor
from lightning_memsink.losses.per_sample import IDS_KEY, Term, terms_of, weigh
from lightning_memsink.losses.readers import is_likelihood, is_log_softmax, is_report, metadata, saved_value
from lightning_memsink.losses.sample_rows import SampleAxisLost, SampleRows
from lightning_memsink.losses.unreadable import UnreadableLoss
from lightning_memsink.losses.upstreams import set_upstreams


class OpenLoss:
    """The loss calls behind ``loss``, before its backward, and hooks that weigh them in it.

    Args:
        loss: as it will be differentiated, scaled as it may be.
        batch_size: B.
        found: its loss calls, with the rows of samples that `StepReader` found.
        loss_scale: what accumulation and gradient scaling multiplied the loss with.

    Raises:
        UnreadableLoss: a call's rows can't be assigned to samples, or the loss can't be differentiated twice.
    """

    def __init__(self, loss: Tensor, batch_size: int, found: LossNodes, loss_scale: float = 1.0) -> None:
        self.batch_size, self.loss_scale = batch_size, loss_scale
        # who found them waits for another upstream than we
        self.calls = [replace(each, call=copy(each.call)) for each in found]
        _note_upstreams(loss, self.calls)
        for each in self.calls:
            if isinstance(each.call.rows, str):
                raise SampleAxisLost(f"{each.call.kind}: {each.call.rows}")
            if each.weigh_at is None:
                raise UnreadableLoss(f"{each.call.kind} is computed in a way that can't be weighed by sample")
        if has_learned_factor(loss, [each.node for each in found]):
            raise UnreadableLoss("it is multiplied with a parameter, whose gradient is of all samples together")
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
            if isinstance(each.call.rows, SampleRows):
                own = weights.to(each.call.losses.device, non_blocking=True)
                self.weigh_elements(each, each.call.rows.spread(own, each.call.losses.shape))

    def weigh_elements(self, each: FoundCall, weights: Tensor) -> None:
        """The same for one call, one weight for each of its elements."""
        assert each.weigh_at is not None  # `__init__` refuses others
        self._handles.append(
            each.weigh_at.register_hook(_scale(each.weigh_at, weights.reshape(each.call.losses.shape)))
        )

    def close(self) -> None:
        """After the backward: a second one through the same graph is weighed anew or not at all."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def _note_upstreams(loss: Tensor, found: LossNodes) -> None:
    if all(each.call.upstream is not None for each in found):
        return
    if len(found) == 1 and (is_report(found[0].node) or getattr(found[0].node, "_saved_reduction", False)):
        found[0].call.upstream = torch.ones((), device=loss.device)  # one number for all elements cancels
        return
    set_upstreams(loss, found)


def _scale(node: Node, weights: Tensor) -> Callable[[Sequence[Any], Sequence[Any]], tuple[Any, ...]]:
    if is_likelihood(node):
        return _scale_targets(node, weights)
    if is_log_softmax(node):
        weights = weights.unsqueeze(saved_value(node, "dim"))

    def scale(leaving: Sequence[Any], arriving: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(_weighed(gradient, weights) for gradient in leaving)

    return scale


def _weighed(gradient: Tensor | None, weights: Tensor) -> Tensor | None:
    """A gradient of as many rows as there are weights, or of rows with a class axis behind."""
    if gradient is None:
        return None
    if gradient.ndim > weights.ndim:
        weights = weights.reshape(*weights.shape, *[1] * (gradient.ndim - weights.ndim))
    return _times(gradient, weights) if gradient.ndim == weights.ndim else gradient


def _scale_targets(node: Node, weights: Tensor) -> Callable[[Sequence[Any], Sequence[Any]], tuple[Any, ...]]:
    """A hook that multiplies the gradient of a likelihood, ``[N, C, ...]`` or ``[C]``, with ``weights`` of its targets.

    The gradient is zero except at the targets, so only those are multiplied, and in place, since the tensor was made
    for this node alone. A pass over all classes would cost more than the loss itself.
    """
    targets = saved_value(node, "target")
    dim = min(1, targets.ndim)  # of the classes
    place = torch.where(targets == saved_value(node, "ignore_index"), 0, targets).unsqueeze(dim)
    weights = weights.reshape(targets.shape).unsqueeze(dim)

    def scale(leaving: Sequence[Any], arriving: Sequence[Any]) -> tuple[Any, ...]:
        gradient, *rest = leaving
        if torch.is_grad_enabled():  # a graph of the gradient itself is being made
            return gradient.scatter(dim, place, _times(gradient.gather(dim, place), weights)), *rest
        return gradient.scatter_(dim, place, _times(gradient.gather(dim, place), weights)), *rest

    return scale


def _times(gradient: Tensor, weights: Tensor) -> Tensor:
    """Exactly 0 where the weight is, though 0 times infinity is not."""
    return (gradient * weights.to(gradient.dtype)).masked_fill(weights == 0, 0)
