"""Computes each sample's loss from the loss calls of a step.

A loss call has elements (tokens, pixels, outputs). Element ``e`` has an unreduced loss ``l_e`` and a coefficient
``s_e``, the weight it has in the number that is differentiated: the sum of ``s_e * l_e`` is that number.

    B  samples in a batch      N  rows of a loss call, B * rows per sample
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from lightning_memsink.losses.loss_call import LossCall
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
    captured step only, because reading it waits for the device.
    """

    losses: Tensor
    explained: float | None = None


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
    time_major: bool
    factor: float = 1.0
    calls: int = 1

    def means(self) -> Tensor:
        return self.sums / self.weights

    def total_weight(self) -> Tensor:
        """The sum of all ``s_e``."""
        return self.weights.sum() * self.scale


class SampleAxisLost(UnreadableLoss):
    """The rows of a loss call can't be assigned to samples."""


def time_steps(call: LossCall, batch_size: int) -> int:
    """``T`` if the rows run ``[T, B]``, else 0. The nearest tensor with a ``B`` in its first two sizes decides; where
    both are ``B`` the layout is ambiguous, and ``[B, T]`` is assumed."""
    for sizes in (tuple(call.losses.shape), *call.rows.sizes):
        if sizes[:1] == (batch_size,):
            return 0
        if sizes[1:2] == (batch_size,):
            return sizes[0]
    return 0


def sample_of_row(call: LossCall, batch_size: int) -> Tensor | None:
    """``[N]`` sample numbers, where rows are not simply ``B`` equal runs."""
    count, index = (call.losses.shape or (1,))[0], call.rows.index
    if index is not None and index.dtype == torch.bool and index.shape[0] % batch_size == 0:
        samples = index.nonzero()[:, 0] // (index.shape[0] // batch_size)
        if samples.numel() == count:
            return samples
    if count != batch_size and call.rows.picked_by:
        raise SampleAxisLost(
            f"{call.kind} was computed on {count} rows that {call.rows.picked_by} picked out of the batch, "
            "so a row's sample is no longer known"
        )
    return None


def sample_of_run(call: LossCall, batch_size: int, samples: Tensor | None = None) -> Tensor | None:
    """``[R]`` sample numbers of the R equal runs, one after the other, that the call's elements fall into; None where
    there is one run for each sample, in order.

    Args:
        samples: ``[N]`` the rows' samples, where the call's graph doesn't contain them.

    Raises:
        SampleAxisLost: the elements can't be assigned to samples.
    """
    if samples is None:
        samples = sample_of_row(call, batch_size)
    if samples is not None:
        return samples
    shape, steps = call.losses.shape, time_steps(call, batch_size)
    if call.losses.numel() % (batch_size * max(steps, 1)) or (not steps and (shape or (1,))[0] % batch_size):
        raise SampleAxisLost(f"{call.kind} was computed on {list(shape)} elements, not on {batch_size} samples")
    return torch.arange(batch_size, device=call.losses.device).repeat(steps) if steps > 1 else None


def fold(call: LossCall, batch_size: int, samples: Tensor | None = None) -> Term:
    """Sums a call's elements by sample: those that ``samples`` ``[N]`` names, or those found in the call's graph."""
    weights, scale = call.coefficients()
    shared = call.upstream is not None and call.upstream.ndim == 0 and samples is None
    by_sample = call.folded.get(batch_size) if shared else None
    if by_sample is None:
        by_sample = _by_sample(call, weights, batch_size, samples)
    if shared:
        call.folded[batch_size] = by_sample
    return Term(call.kind, call.classes, *by_sample, scale, time_steps(call, batch_size) > 0)


def _by_sample(call: LossCall, weights: Tensor, batch_size: int, samples: Tensor | None) -> tuple[Tensor, Tensor]:
    """``[B]`` weighted sums, and the weights."""
    sums = call.losses * weights
    if weights is not call.weights:  # 0 * inf, at an element the user masks, would be NaN
        sums = torch.where(weights == 0, 0.0, sums)
    owners = sample_of_run(call, batch_size, samples)
    runs = batch_size if owners is None else len(owners)
    sums, weights = (each.reshape(runs, each.numel() // max(1, runs)).sum(1) for each in (sums, weights))
    if owners is None:
        return sums, weights
    sums, weights = (each.new_zeros(batch_size).index_add(0, owners, each) for each in (sums, weights))
    return sums, weights


def merge(terms: Sequence[Term]) -> Term:
    """Chunks of one loss as the loss they are chunks of."""
    absent = torch.stack([term.weights == 0 for term in terms])  # their scale may be that of a mean over nothing
    sums = torch.stack([term.sums * term.scale for term in terms]).masked_fill(absent, 0.0).sum(0)
    weights = torch.stack([term.weights * term.scale for term in terms]).masked_fill(absent, 0.0).sum(0)
    return replace(terms[0], sums=sums, weights=weights, scale=1.0, calls=len(terms))


def alike(calls: Sequence[LossCall]) -> list[list[LossCall]]:
    """The calls by kind and number of classes: what may be chunks of one loss."""
    kinds: dict[tuple[str, int], list[LossCall]] = {}
    for call in calls:
        kinds.setdefault((call.kind, call.classes), []).append(call)
    return list(kinds.values())


def samples_by_offset(calls: Sequence[LossCall], batch_size: int) -> list[Tensor] | None:
    """``[N]`` sample numbers of each call, if the calls' flat targets are pieces that tile one ``[B, T]`` buffer."""
    buffers = [call.rows.buffer for call in calls]
    if len(calls) < 2 or None in buffers or len({buffer[0] for buffer in buffers if buffer}) > 1:
        return None
    pieces = [(buffer, call.losses) for buffer, call in zip(buffers, calls, strict=True) if buffer]
    length = pieces[0][0][2]
    starts = {buffer[1] for buffer, _ in pieces}
    if len(starts) < len(pieces) or sum(losses.numel() for _, losses in pieces) != length or length % batch_size:
        return None
    return [
        torch.arange(offset, offset + losses.numel(), device=losses.device) // (length // batch_size)
        for (_, offset, _), losses in pieces
    ]


def terms_of(calls: Sequence[LossCall], batch_size: int, loss_scale: float = 1.0) -> list[Term]:
    """The losses that a step's calls amount to: chunks merged, one weight each.

    Calls are chunks of one loss if their targets tile one buffer, or if their elements weigh the same and all together
    at most 1. A sole loss has weight 1, whatever it is multiplied with.

    Raises:
        UnreadableLoss: no call has a sample axis (`SampleAxisLost`), or calls are on several devices.
    """
    devices = dict.fromkeys(str(call.losses.device) for call in calls)
    if len(devices) > 1:
        raise UnreadableLoss(f"its loss calls are on several devices, {', '.join(devices)}")
    terms: list[Term] = []
    lost: list[SampleAxisLost] = []
    for same in alike(calls):
        tiles = samples_by_offset(same, batch_size)
        folded: list[Term] = []
        kept: list[LossCall] = []
        for call, samples in zip(same, tiles or repeat(None), strict=False):
            try:
                folded.append(fold(call, batch_size, samples))
                kept.append(call)
            except SampleAxisLost as error:
                lost.append(error)
        chunks = len(folded) > 1 and (tiles is not None or are_chunks(kept, folded, loss_scale))
        terms += [merge(folded)] if chunks else folded
    if not terms:
        raise lost[0]
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


def weigh(terms: Sequence[Term]) -> Tensor:
    """``[B]`` sum over terms of weight times the sample's mean; NaN where a sample has no element in any term."""
    if len(terms) == 1:
        return terms[0].means() if terms[0].factor == 1.0 else terms[0].means() * terms[0].factor
    absent = torch.stack([term.weights == 0 for term in terms])
    parts = torch.stack([term.means() * term.factor for term in terms])
    return torch.where(absent, 0.0, parts).sum(0).masked_fill(absent.all(0), torch.nan)
