"""Reads the loss calls of a watched step: the reductions that the step's loss is a linear combination of.

B  samples in a batch      N  rows of a loss call
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from lightning_memsink.losses.autograd_graph import (
    MOST_NODES,
    ForwardNeeded,
    FoundCall,
    NoForward,
    is_penalty,
    linear_children,
    walk,
)
from lightning_memsink.losses.loss_call import LossCall
from lightning_memsink.losses.provenance import MIXED, Lost, Provenance, Rows
from lightning_memsink.losses.readers import (
    RECORDERS,
    is_likelihood,
    is_log_softmax,
    is_report,
    read_loss_call,
    saved_value,
    saved_values,
)
from lightning_memsink.losses.reduced import Reduced
from lightning_memsink.losses.row_rules import follow
from lightning_memsink.losses.sample_rows import SampleRows
from lightning_memsink.losses.step_watch import StepWatch
from lightning_memsink.losses.unreduced import unreduced
from lightning_memsink.losses.upstreams import set_upstreams

MOST_BELOW = 32  # nodes between the result of a loss function and its elements


@dataclass
class LossParts:
    """What a loss is made of."""

    found: list[FoundCall] = field(default_factory=list)
    """Reductions over samples, in the order they were made."""
    lost: list[str] = field(default_factory=list)
    """Why other parts belong to no sample."""
    has_penalty: bool = False
    """Whether parts depend on parameters alone."""
    is_dynamic: bool = False
    """Whether a reduction's rows were picked or ordered by values."""


def read_reductions(loss: Tensor, watch: StepWatch, batch_size: int) -> LossParts:
    """The loss calls of a step that was watched, with their ``upstream``.

    Args:
        loss: the step's loss, or its shadow, before its backward.
        batch_size: B.
    """
    parts, seen = LossParts(), watch.seen.reductions
    for late, of_late in watch.seen.without_graph:
        if late.grad_fn is not None:
            seen[late.grad_fn] = of_late
    front = [(loss.grad_fn, False)] if loss.grad_fn is not None else []
    visited = set[Node]()
    while front and len(visited) < MOST_NODES:
        node, is_of_lost = front.pop()  # below a reduction that is lost, for a reason that is known
        if node in visited:
            continue
        visited.add(node)
        if is_report(node):
            return LossParts([FoundCall(node, read_loss_call(node, {}), node)])
        reduced = seen.get(node)
        if reduced is not None:
            call = read_reduced(reduced, watch, batch_size, node)
            if isinstance(call, LossCall):
                parts.found.append(FoundCall(node, call, _weighing_node(node, call.losses.shape)))
                parts.is_dynamic |= any(
                    known.is_dynamic for each in reduced.args if (known := watch.known(each)) is not None
                )
                continue
            if call is None:
                parts.has_penalty = True
                continue
            if not is_of_lost:
                parts.lost.append(call.reason)
            is_of_lost = True
        if node.name() == "torch::autograd::AccumulateGrad" or is_penalty(node):
            parts.has_penalty = True
            continue
        below = linear_children(node)
        if below is not None:
            front += [(child, is_of_lost) for child in below]
        elif not is_of_lost:
            parts.lost.append(f"{node.name()}, which is not linear")
    parts.found.sort(key=lambda each: each.node._sequence_nr())
    set_upstreams(loss, parts.found)
    parts.found = [replace(each, call=_weighted(each.call, seen[each.node])) for each in parts.found]
    return parts


def read_reduced(
    reduced: Reduced, watch: StepWatch, batch_size: int, node: Node | None = None
) -> LossCall | Lost | None:
    """The loss call of one reduction, whose ``upstream`` is left open; why it is not of samples; None if it depends on
    no sample at all."""
    if not reduced.is_intact:
        return Lost(f"{reduced.name} of a tensor that was changed in place since")
    if not reduced.is_loss_function:
        operand = reduced.args[0]
        provenance = watch.provenance_of(operand)
        if not isinstance(provenance, Rows) and not (batch_size == 1 and provenance is not None):
            return provenance
        losses = operand.detach().float()
        weights = None
        if reduced.function.__name__.startswith("nan"):
            weights, losses = (~losses.isnan()).float(), losses.nan_to_num()
        divisor = 1.0 if "sum" in reduced.function.__name__ else losses.numel()
        call = LossCall(reduced.name, 0, losses, weights, divisor)
    else:
        with torch.no_grad():
            call = _call_of_function(reduced, node)
        provenance = _provenance(reduced, call.losses, watch)
    if provenance is None:
        return None
    rows = _sample_rows(provenance, call.losses, batch_size)
    return rows if isinstance(rows, Lost) else replace(call, rows=rows)


def _call_of_function(reduced: Reduced, node: Node | None) -> LossCall:
    if node is not None and is_likelihood(node):  # its log-probabilities need not be computed again
        try:
            with NoForward():
                saved = saved_values(node)
        except ForwardNeeded:
            pass
        else:
            if saved["target"].ndim == 1:  # torch gives sequences of classes another shape
                return read_loss_call(node, saved)
    record = RECORDERS.get(reduced.function)
    if record is not None:
        kind, classes, losses, weights, divisor = record(*reduced.args, **reduced.kwargs)
        return LossCall(kind, classes, losses, weights, divisor)
    losses, divisor = unreduced(reduced.function, reduced.args, reduced.kwargs)
    return LossCall(reduced.name, 0, losses, None, divisor)


def _provenance(reduced: Reduced, losses: Tensor, watch: StepWatch) -> Provenance | None:
    """Whose elements the unreduced losses are. Where the prediction can't be followed, the target says it."""
    kwargs = {**reduced.kwargs, "reduction": "none"}

    def found(provenance_of: Callable[[Tensor], Provenance | None]) -> Provenance | None:
        result: Any = follow(reduced.function, reduced.args, kwargs, losses, provenance_of)
        return result  # type: ignore[no-any-return]

    provenance = found(watch.provenance_of)
    if isinstance(provenance, Lost) and (watch.is_packed or MIXED not in provenance.reason):
        opaque = provenance

        def of_target(tensor: Tensor) -> Provenance | None:
            own = watch.provenance_of(tensor)
            is_hidden = isinstance(own, Lost) and (watch.is_packed or MIXED not in own.reason)
            return None if is_hidden else own

        by_target = found(of_target)
        return by_target if isinstance(by_target, Rows) else opaque
    return provenance


def _sample_rows(provenance: Provenance, losses: Tensor, batch_size: int) -> SampleRows | Lost:
    if batch_size == 1:
        return SampleRows(torch.zeros([1] * losses.ndim, dtype=torch.int64))
    if isinstance(provenance, Lost):
        return provenance
    if len(provenance.candidates) != 1:
        return Lost("each element belongs to a pair of samples")
    owners = provenance.candidates[0]
    if owners.ndim != losses.ndim or any(a not in (1, b) for a, b in zip(owners.shape, losses.shape, strict=True)):
        if owners.numel() != losses.numel():
            return Lost(f"{list(losses.shape)} losses of {list(owners.shape)} rows")
        owners = owners.reshape(losses.shape)
    return SampleRows(owners)


def _weighing_node(node: Node, shape: torch.Size) -> Node | None:
    """The node at which one number becomes one for each element on the way back: where samples can be weighed.

    Under several numbers (smoothed labels have two) it is the log-softmax that all of them come from.
    """
    for _ in range(MOST_BELOW):
        below = [(child, number) for child, number in node.next_functions if child is not None]
        shapes = [_shape_of_output(child, number) for child, number in below]
        if is_likelihood(node) or any(each[: len(shape)] == tuple(shape) for each in shapes if each):
            return node
        if len(below) != 1 or shapes[0]:
            break
        node = below[0][0]
    softmaxes = {found for found, _ in walk(node, MOST_BELOW, is_log_softmax) if is_log_softmax(found)}
    softmax = softmaxes.pop() if len(softmaxes) == 1 else None
    if softmax is None:
        return None
    rows = list(_shape_of_output(softmax, 0))
    del rows[saved_value(softmax, "dim")]
    return softmax if rows == list(shape) else None


def _shape_of_output(node: Node, number: int) -> tuple[int, ...]:
    return tuple(node._input_metadata[number].shape)  # what comes in on the way back went out on the way there


def _weighted(call: LossCall, reduced: Reduced) -> LossCall:
    """The call with the mask, or the weights that add up to 1, that its operand was multiplied with.

    A sample of one element in a mean is no token of a sample: times zero its loss is zero, and not absent. What is
    subtracted from the loss is the loss of the opposite: a log-likelihood becomes a negative one.
    """
    if call.upstream is not None and call.upstream.ndim == 0:
        sign = torch.where(call.upstream < 0, -1.0, 1.0)
        call = replace(call, losses=call.losses * sign, upstream=call.upstream * sign)
    is_mean = "mean" in reduced.function.__name__
    if is_mean and isinstance(call.rows, SampleRows) and call.rows.owners.unique().numel() == call.losses.numel():
        return call
    mask: Tensor | None = None
    for factor in reduced.factors:
        try:
            weights = factor.detach().float().expand(call.losses.shape)
        except RuntimeError:
            continue
        total = weights.sum() * (0.0 if call.upstream is None else call.upstream) / call.divisor
        if bool(((weights == 0) | (weights == 1)).all()):
            mask = weights if mask is None else mask * weights
        elif abs(float(total) - 1) < 1e-4:
            return replace(call, losses=torch.where(weights == 0, 0.0, call.losses / weights), weights=weights)
    return call if mask is None or bool((mask == 1).all()) else replace(call, weights=mask)


def share_explained(calls: Sequence[LossCall], loss: Tensor) -> float | None:
    """The part of ``loss`` that the calls add up to; None if that is no number. Waits for the device."""
    if not calls:
        return 0.0
    share = float(torch.stack([call.total().float() for call in calls]).sum() / loss.detach().float())
    return share if abs(share) < float("inf") else None
