"""Rules of provenance for the losses of ``torch.nn.functional``: without reduction one per row, else a mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_memsink.losses.provenance import Lost, Part, Provenance, Rows, merge, reduce
from lightning_memsink.losses.rule_call import Call, NotFollowed, Outcome, Rule, each, with_shared, within

MEAN = "a mean over the samples"
ACROSS = "a loss over the samples"


def _reduced(call: Call, provenance: Provenance | None, shape: Sequence[int]) -> Provenance | None:
    """Of unreduced losses of shape ``shape``, or of their mean or sum if the result is a scalar."""
    if call.result.shape == tuple(shape):
        return provenance
    if call.result.ndim:
        raise NotFollowed
    return reduce(provenance, shape, range(len(shape)), False, MEAN)


def elementwise(call: Call) -> Outcome:
    operands = call.operands()
    shape = torch.broadcast_shapes(*[operand.shape for operand in operands])
    return _reduced(call, merge([call.part(operand) for operand in operands], shape), shape)


def gaussian_nll(call: Call) -> Outcome:
    mean, target, variance = call.tensor(), call.tensor(1, "target"), call.get(2, "var")
    part = call.part(variance)
    if isinstance(variance, Tensor) and variance.shape == mean.shape[:-1]:
        part = each(part[0], lambda owners: owners.unsqueeze(-1)), [*part[1], 1]
    shape = torch.broadcast_shapes(mean.shape, target.shape)
    return _reduced(call, merge([call.part(mean), call.part(target), part], shape), shape)


def over_classes(call: Call) -> Outcome:
    """cross_entropy and nll_loss: classes are in axis 1, or 0 if there is no other."""
    scores, target = call.tensor(), call.tensor(1, "target")
    axis = min(1, scores.ndim - 1)
    shape = [extent for place, extent in enumerate(scores.shape) if place != axis]
    whole = merge([_without(call, scores, axis), _classes(call, target, axis, shape)], shape)
    return _reduced(call, with_shared(call, whole, [scores, target], shape), shape)


def _without(call: Call, operand: Tensor, axis: int) -> Part:
    shape = [extent for place, extent in enumerate(operand.shape) if place != axis % operand.ndim]
    return _squeezed(within(call, operand, [axis], ACROSS), [axis]), shape


def _squeezed(provenance: Provenance | None, axes: Sequence[int]) -> Provenance | None:
    return each(provenance, lambda owners: owners.squeeze(tuple(axes)))


def _classes(call: Call, target: Tensor, axis: int, shape: Sequence[int]) -> Part:
    return call.part(target) if list(target.shape) == list(shape) else _without(call, target, axis)


def linear_over_classes(call: Call) -> Outcome:
    """``F.linear_cross_entropy(input, weight, target)`` of vectors."""
    source, target = call.tensor(), call.tensor(2, "target")
    if source.ndim > 2:
        raise NotFollowed
    shape = source.shape[:-1]
    whole = merge([_without(call, source, -1), _classes(call, target, -1, shape)], shape)
    return _reduced(call, with_shared(call, whole, [source, target], shape), shape)


def over_last(*names: str) -> Rule:
    """A rule for losses that sum over the last axis of the first ``len(names)`` operands; others have no such axis."""

    def rule(call: Call) -> Outcome:
        parts = []
        for position, name in enumerate(names):
            operand = call.tensor(position, name)
            parts.append(_without(call, operand, -1) if operand.ndim else call.part(operand))
        shape = torch.broadcast_shapes(*[extents for _, extents in parts])
        others: list[Any] = [call.get(len(names), "target", "weight")] if call.name != "triplet_margin_loss" else []
        parts += [call.part(other) for other in others if isinstance(other, Tensor)]
        return _reduced(call, merge(parts, shape), shape)

    return rule


def triplet_with_distance(call: Call) -> Outcome:
    if call.get(99, "distance_function") is not None:
        raise NotFollowed
    return over_last("anchor", "positive", "negative")(call)


def multilabel_soft_margin(call: Call) -> Outcome:
    operands = call.operands()
    shape = torch.broadcast_shapes(*[operand.shape for operand in operands])[:-1]
    return _reduced(call, merge([_without(call, operand, -1) for operand in operands], shape), shape)


def ctc(call: Call) -> Outcome:
    """``[N]`` from ``log_probs`` ``[T, N, C]``; targets are ``[N, S]``, or joined to a vector."""
    scores, targets = call.tensor(0, "log_probs"), call.tensor(1, "targets")
    batched = scores.ndim == 3
    shape = [scores.shape[1]] if batched else []
    summed = [0, 2] if batched else [0, 1]
    parts: list[Part] = [(_squeezed(within(call, scores, summed, ACROSS), summed), shape)]
    lengths = call.get(3, "target_lengths")
    labels = call.of(targets)
    if batched and targets.ndim == 1:
        if labels is not None:
            parts.append((_of_runs(labels, lengths, shape[0]), shape))
    else:
        parts.append((_squeezed(within(call, targets, [-1], ACROSS), [-1]), shape))
    for extents in (call.get(2, "input_lengths"), lengths):
        if isinstance(extents, Tensor):
            parts.append((call.of(extents), extents.shape))
    return _reduced(call, merge(parts, shape), shape)


def _of_runs(labels: Provenance, lengths: Any, count: int) -> Provenance:
    """One owner a run of labels, whose lengths are given."""
    if isinstance(labels, Lost) or len(labels.candidates) != 1:
        raise NotFollowed
    runs = torch.as_tensor(lengths).cpu().long()
    owners = labels.candidates[0].expand(int(runs.sum()))
    first = torch.where(runs > 0, owners[(runs.cumsum(0) - runs).clamp(max=len(owners) - 1)], -1)
    if len(runs) != count or not torch.equal(first.repeat_interleave(runs), owners):
        raise NotFollowed
    return Rows((first,))


RULES: dict[str, Rule] = {
    **dict.fromkeys(
        "mse_loss l1_loss smooth_l1_loss huber_loss binary_cross_entropy binary_cross_entropy_with_logits kl_div "
        "poisson_nll_loss margin_ranking_loss hinge_embedding_loss soft_margin_loss".split(),
        elementwise,
    ),
    "gaussian_nll_loss": gaussian_nll,
    **dict.fromkeys("cross_entropy cross_entropy_loss nll_loss nll_loss_nd nll_loss2d".split(), over_classes),
    "linear_cross_entropy": linear_over_classes,
    "ctc_loss": ctc,
    "triplet_margin_loss": over_last("anchor", "positive", "negative"),
    "triplet_margin_with_distance_loss": triplet_with_distance,
    "cosine_embedding_loss": over_last("input1", "input2"),
    "multi_margin_loss": over_last("input"),
    "multilabel_margin_loss": over_last("input", "target"),
    "multilabel_soft_margin_loss": multilabel_soft_margin,
}
