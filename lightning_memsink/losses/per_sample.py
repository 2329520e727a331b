"""Computes each sample's loss from the loss calls of a step.

A loss call has elements (tokens, pixels, outputs). Element ``e`` has an unreduced loss ``l_e`` and a coefficient
``s_e``, the weight it has in the number that is differentiated: the sum of ``s_e * l_e`` is that number.

    B  samples in a batch      N  rows of a loss call, B * rows per sample
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_memsink.losses.loss_call import LossCall
from lightning_memsink.losses.sample_rows import Runs, SampleAxisLost, SampleRows
from lightning_memsink.losses.unreadable import UnreadableLoss

LOSSES_KEY = "memsink/losses"
IDS_KEY = "memsink/ids"


def per_sample(losses: Tensor, ids: Tensor | None = None) -> dict[str, Tensor]:
    """What ``training_step`` or ``validation_step`` returns to report its own per-sample losses.

    Args:
        losses: ``[B]``, with their graph; their mean becomes the step's ``loss``.
        ids: ``[B]`` integers, if the step knows its samples better than the data loader does.

    >>> sorted(per_sample(torch.tensor([1.0, 3.0])))
    ['loss', 'memsink/losses']
    """
    if losses.ndim != 1:
        raise ValueError(
            f"per_sample takes one loss per sample, [B], but got {list(losses.shape)}. "
            "Average each sample first: `per_sample(losses.flatten(1).mean(1))`."
        )
    report = {"loss": losses.mean(), LOSSES_KEY: losses.detach()}
    if ids is not None:
        if ids.shape != losses.shape:
            raise ValueError(f"per_sample got {losses.numel()} losses but {ids.numel()} ids. Pass one id per loss.")
        report[IDS_KEY] = ids.detach()
    node: Any = report["loss"].grad_fn
    if node is not None and not torch.compiler.is_compiling():
        # Callbacks get the outputs after the backward; before it they find the report in the graph.
        node.metadata.update({key: value for key, value in report.items() if key != "loss"})
    return report


@dataclass(frozen=True)
class NotCaptured:
    """No per-sample losses this step."""

    reason: str
    """One message: what was found, and what to type."""
    is_internal: bool = False
    """Whether the reason is a mistake of this package, not the user's loss."""


@dataclass(frozen=True)
class Captured:
    """The per-sample losses of one step.

    ``losses`` is ``[B]`` float32, in the loss's own units (nats per token); NaN where no element of the sample counted.
    ``explained`` is the share of the step's loss that these calls add up to (1: all of it), known for the first
    captured step only, because reading it waits for the device. ``counted`` is ``[B]``: the weight of each sample's
    elements together, their number in an unweighted mean; None if there are several losses.
    """

    losses: Tensor
    explained: float | None = None
    counted: Tensor | None = None


@dataclass(frozen=True)
class Term:
    """One loss of a step: in each sample its mean is ``sums / weights``, in the step its weight is ``factor``.

    ``weights`` times ``scale`` are the coefficients ``s_e``, added by sample.
    """

    kind: str
    classes: int
    sums: Tensor  # [B]
    weights: Tensor  # [B]
    scale: Tensor | float
    factor: float = 1.0

    def means(self) -> Tensor:
        return self.sums / self.weights

    def total_weight(self) -> Tensor:
        """The sum of all ``s_e``."""
        return self.weights.sum() * self.scale


def fold(call: LossCall, batch_size: int) -> Term:
    """Sums a call's elements by sample.

    Raises:
        SampleAxisLost: nothing says which samples the elements belong to.
    """
    if isinstance(call.rows, str):
        raise SampleAxisLost(f"{call.kind}: {call.rows}")
    weights, scale = call.coefficients()
    shared = call.upstream is not None and call.upstream.ndim == 0
    by_sample = call.folded.get(batch_size) if shared else None
    if by_sample is None:
        sums = call.losses * weights
        if weights is not call.weights:  # 0 * inf, at an element the user masks, would be NaN
            sums = torch.where(weights == 0, 0.0, sums)
        by_sample = call.rows.fold(sums, batch_size), call.rows.fold(weights, batch_size)
    if shared:
        call.folded[batch_size] = by_sample
    return Term(call.kind, call.classes, *by_sample, scale)


def in_batch_order(calls: Sequence[LossCall], batch_size: int) -> Sequence[LossCall]:
    """The calls of a step whose writer vouches that their rows are those of the samples, one after the other."""
    for call in calls:
        rows, left = divmod(call.shape.numel(), max(1, batch_size))
        if not left and isinstance(call.rows, str):
            call.rows = SampleRows(Runs(1, 0, batch_size, rows).owners().reshape(call.shape))
    return calls


def merge(terms: Sequence[Term]) -> Term:
    """Chunks of one loss as the loss they are chunks of."""
    absent = torch.stack([term.weights == 0 for term in terms])  # their scale may be that of a mean over nothing
    sums = torch.stack([term.sums * term.scale for term in terms]).masked_fill(absent, 0.0).sum(0)
    weights = torch.stack([term.weights * term.scale for term in terms]).masked_fill(absent, 0.0).sum(0)
    return replace(terms[0], sums=sums, weights=weights, scale=1.0)


def alike(calls: Sequence[LossCall]) -> list[list[LossCall]]:
    """The calls by kind and number of classes: what may be chunks of one loss."""
    kinds: dict[tuple[str, int], list[LossCall]] = {}
    for call in calls:
        kinds.setdefault((call.kind, call.classes), []).append(call)
    return list(kinds.values())


def terms_of(calls: Sequence[LossCall], batch_size: int, loss_scale: float = 1.0) -> list[Term]:
    """The losses that a step's calls amount to: chunks merged, one weight each.

    Calls are chunks of one loss if they are alike, weigh at most 1 together, and either their elements weigh the same
    or no sample is in two of them. A sole loss has weight 1, whatever it is multiplied with.

    Raises:
        UnreadableLoss: a call has no sample axis (`SampleAxisLost`), or calls are on several devices.
    """
    if len(calls) == 1:
        return [fold(calls[0], batch_size)]
    devices = dict.fromkeys(str(call.losses.device) for call in calls)
    if len(devices) > 1:
        raise UnreadableLoss(f"its loss calls are on several devices, {', '.join(devices)}")
    terms: list[Term] = []
    for same in alike(calls):
        folded = [fold(call, batch_size) for call in same]
        if len(folded) < 2:
            terms += folded
        elif are_chunks(same, folded, loss_scale):
            terms.append(merge(folded))
        elif are_disjoint(folded, loss_scale):
            terms.append(merge([replace(term, sums=term.means(), weights=_is_in(term), scale=1.0) for term in folded]))
        else:
            terms += folded
    if len(terms) == 1:
        return terms
    factors = torch.stack([term.total_weight() for term in terms]).tolist()
    return [replace(term, factor=factor / loss_scale) for term, factor in zip(terms, factors, strict=True)]


def are_chunks(calls: Sequence[LossCall], terms: Sequence[Term], loss_scale: float) -> bool:
    """True if the elements of all calls weigh the same, at most 1 together. Waits for the device."""
    totals = torch.stack([term.total_weight() for term in terms]) / loss_scale
    heaviest = [
        call.upstream.abs().max() / call.divisor for call in calls if call.upstream is not None and call.losses.numel()
    ]
    if len(heaviest) < len(calls):
        return False
    *units, total = torch.cat([torch.stack(heaviest).float(), totals.sum()[None]]).tolist()
    return bool(total <= 1 + 1e-3 and max(units) - min(units) <= 1e-3 * max(units))


def are_disjoint(terms: Sequence[Term], loss_scale: float) -> bool:
    """True if no sample is in two terms, and they weigh at most 1 together: parts of a batch, each with its mean. Waits
    for the device."""
    shared = torch.stack([_is_in(term) for term in terms]).sum(0).max() if len(terms[0].weights) else torch.zeros(())
    total = torch.stack([term.total_weight() for term in terms]).sum() / loss_scale
    return bool(shared <= 1) and bool(total <= 1 + 1e-3)


def _is_in(term: Term) -> Tensor:
    """``[B]`` 1 where a sample has elements that count, 0 where it has none."""
    return (term.weights != 0).float()


def weigh(terms: Sequence[Term]) -> Tensor:
    """``[B]`` sum over terms of weight times the sample's mean; NaN where a sample has no element in any term."""
    if len(terms) == 1:
        return terms[0].means() if terms[0].factor == 1.0 else terms[0].means() * terms[0].factor
    absent = torch.stack([term.weights == 0 for term in terms])
    parts = torch.stack([term.means() * term.factor for term in terms])
    return torch.where(absent, 0.0, parts).sum(0).masked_fill(absent.all(0), torch.nan)
