"""Per-sample losses of a step, from the user's own loss call.

In training they are read out of the graph, just before it is differentiated; where there is no graph to read (compiled
code, validation) the loss functions are watched as they are called. What `per_sample` reports wins over both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from lightning_memsink.losses.autograd_graph import LossNodes, awaiting_upstream, find_loss_nodes, names_near
from lightning_memsink.losses.function_mode import LossWatch
from lightning_memsink.losses.loss_call import LossCall
from lightning_memsink.losses.per_sample import (
    IDS_KEY,
    LOSSES_KEY,
    Captured,
    NotCaptured,
    SampleAxisLost,
    Term,
    fold,
    merge,
    samples_by_offset,
    terms_of,
    weigh,
)
from lightning_memsink.losses.unreadable import UnreadableLoss, internal_error

NOTHING = torch.zeros(0)


@dataclass
class _Backward:
    """One backward call of a step."""

    loss: Tensor
    loss_scale: float  # what the loss was multiplied with
    calls: list[LossCall]  # found in its graph
    names: list[str]  # of graph nodes, for the message if there are no calls


class StepCapture:
    """Reads the per-sample losses of a training step from its loss calls.

    Args:
        module_name: the user's class, for messages.
        automatic: whether Lightning runs the optimizer. Then a second backward in a step is a closure run again
            (L-BFGS) and does not count; otherwise the losses of all backwards are added.
        search: finds the loss calls of a loss; a cached search can be shared with other callbacks.
    """

    def __init__(
        self,
        module_name: str = "LightningModule",
        automatic: bool = True,
        search: Callable[[Tensor], LossNodes] = find_loss_nodes,
    ) -> None:
        self.module_name = module_name
        self.automatic = automatic
        self.search = search
        self.terms: tuple[Term, ...] = ()  # of the last captured step, without its samples
        self._backwards: list[_Backward] = []
        self._watch = LossWatch()
        self._watching = False  # from the second step on, if the graph of the first has no loss calls
        self._steps_without_calls = 0  # of those watched
        self._explained = False
        self._error: Exception | None = None  # while reading the graph of this step

    def begin(self) -> None:
        """At the start of a training step."""
        self._backwards.clear()
        self._error = None
        if self._watching:
            self._watch.start()

    def before_backward(self, loss: Tensor, loss_scale: float = 1.0) -> None:
        """Just before ``loss`` is differentiated, multiplied with ``loss_scale`` as it is: by accumulation, and by a
        gradient scaler, which may choose another scale before the step ends."""
        if self.automatic and self._backwards:
            return
        try:
            calls = awaiting_upstream(self.search(loss))
            names = [] if calls else names_near(loss)
        except UnreadableLoss as error:
            calls, names = [], [f"a graph that can't be read ({error})"]
        except Exception as error:
            self._error, calls, names = error, [], []
        self._backwards.append(_Backward(loss.detach(), loss_scale, calls, names))

    def finish(self, outputs: Any, batch_size: int) -> Captured | NotCaptured:
        """At the end of a training step, which returned ``outputs``; ``batch_size`` is the number of ids."""
        watched = self._watch.stop()
        backwards, self._backwards = self._backwards, []
        reported = read_report(outputs, batch_size, f"{self.module_name}.training_step")
        if reported is not None:
            return reported
        if not backwards and not self.automatic:
            return self._not_captured("ran no backward that Lightning saw. Call `self.manual_backward(loss)`, or")
        if not backwards or batch_size == 0:  # the step returned None: it skipped its batch
            return Captured(torch.full((batch_size,), torch.nan))
        try:
            for error in (self._error, self._watch.error):
                if error is not None:
                    raise error
            if any(backward.calls for backward in backwards):
                return self._from_graph(backwards, batch_size)
            return self._from_watch(backwards, watched, batch_size)
        except Exception as error:
            return _failed(f"{self.module_name}.training_step", error)

    def abandon(self) -> None:
        """Discards the step, after an exception in it."""
        self._watch.stop()
        self._backwards.clear()

    def _from_graph(self, backwards: Sequence[_Backward], batch_size: int) -> Captured:
        by_backward = [terms_of(found.calls, batch_size, found.loss_scale) for found in backwards if found.calls]
        losses = weigh(by_backward[0])
        for terms in by_backward[1:]:
            more = weigh(terms)
            losses = torch.where(losses.isnan(), more, torch.where(more.isnan(), losses, losses + more))
        explained = None
        if not self._explained:
            explained = _share_explained([call for found in backwards for call in found.calls], backwards)
            self._explained = True
        self._remember([term for terms in by_backward for term in terms])
        return Captured(losses, explained)

    def _from_watch(
        self, backwards: Sequence[_Backward], watched: Sequence[LossCall], batch_size: int
    ) -> Captured | NotCaptured:
        if not self._watching and self._steps_without_calls == 0:
            self._watching = True
            return Captured(torch.full((batch_size,), torch.nan))
        if not watched:
            self._steps_without_calls += 1
            self._watching = self._steps_without_calls < 2  # a call that never comes is not worth 1 µs per torch call
            names = dict.fromkeys(name for backward in backwards for name in backward.names)
            return self._not_captured(
                f"has a loss that comes from {', '.join(names)}, which tells no per-sample losses."
            )
        kinds = {(call.kind, call.classes) for call in watched}
        if len(watched) > 1 and len(kinds) > 1:
            value = torch.stack([backward.loss.float() / backward.loss_scale for backward in backwards]).sum()
            sums = torch.stack([call.total() for call in watched])
            if not bool(torch.isclose(sums.sum(), value, rtol=1e-2)):
                found = ", ".join(call.kind for call in watched)
                return self._not_captured(f"calls {found} in compiled code, which hides the weight of each.")
        terms = terms_of(watched, batch_size)
        if len(kinds) == 1 and len(terms) > 1:
            terms = [replace(merge(terms), factor=1.0)]
        self._remember(terms)
        return Captured(weigh(terms))

    def _remember(self, terms: Sequence[Term]) -> None:
        self.terms = tuple(
            Term(term.kind, term.classes, NOTHING, NOTHING, 1.0, term.time_major, term.factor, term.calls)
            for term in terms
        )

    def _not_captured(self, found: str) -> NotCaptured:
        return NotCaptured(remedy(f"{self.module_name}.training_step", found))


class EvaluationCapture:
    """Reads the per-sample losses of a validation step from its loss calls, weighted as in training."""

    def __init__(self, training: StepCapture) -> None:
        self.training = training
        self._watch = LossWatch()

    def begin(self) -> None:
        """At the start of a validation step."""
        self._watch.start()

    def finish(self, outputs: Any, batch_size: int) -> Captured | NotCaptured:
        """At the end of a validation step; ``outputs`` and ``batch_size`` as in training."""
        watched = self._watch.stop()
        step = f"{self.training.module_name}.validation_step"
        reported = read_report(outputs, batch_size, step)
        if reported is not None:
            return reported
        if batch_size == 0:
            return Captured(torch.zeros(0))
        try:
            if self._watch.error is not None:
                raise self._watch.error
            terms = self._terms(watched, batch_size)
            if terms:
                return Captured(weigh(terms))
        except Exception as error:
            return _failed(step, error)
        calls = ", ".join(call.kind for call in watched) or "no loss function that can be watched"
        trained = ", ".join(term.kind for term in self.training.terms) or "nothing yet"
        return NotCaptured(remedy(step, f"calls {calls}, where training_step was seen to use {trained}."))

    def abandon(self) -> None:
        """Discards the step, after an exception in it."""
        self._watch.stop()

    def _terms(self, watched: Sequence[LossCall], batch_size: int) -> list[Term]:
        """Training's terms with this step's samples; none if a call that training made is missing."""
        if len(watched) == 1:
            time_major = self.training.terms[0].time_major if len(self.training.terms) == 1 else False
            return [replace(fold(_laid_out(watched[0], batch_size, time_major), batch_size), factor=1.0)]
        left = list(watched)
        terms = []
        for term in self.training.terms:
            same = [call for call in left if (call.kind, call.classes) == (term.kind, term.classes)]
            same = same if term.calls > 1 else same[:1]
            if not same:
                return []
            left = [call for call in left if all(call is not used for used in same)]
            tiles = samples_by_offset(same, batch_size) or repeat(None)
            parts = [
                fold(_laid_out(call, batch_size, term.time_major), batch_size, samples)
                for call, samples in zip(same, tiles, strict=False)
            ]
            terms.append(replace(merge(parts), factor=term.factor))
        return terms


def read_report(outputs: Any, batch_size: int, step: str) -> Captured | NotCaptured | None:
    """What the step reported with `per_sample`; None if it did not."""
    if not isinstance(outputs, Mapping) or LOSSES_KEY not in outputs:
        return None
    losses = outputs[LOSSES_KEY].detach().float()
    if losses.numel() != batch_size:
        return NotCaptured(
            f"{step} reported {losses.numel()} losses for a batch of {batch_size} samples. "
            f"End it with `return per_sample(losses, ids)`, one loss and one id per sample."
        )
    return Captured(losses)


def reported_ids(outputs: Any, ids: Tensor) -> Tensor:
    """The ids that the step reported with ``per_sample(losses, ids)``, if it did."""
    if isinstance(outputs, Mapping) and IDS_KEY in outputs and outputs[IDS_KEY].numel() == len(ids):
        reported: Tensor = outputs[IDS_KEY]
        return reported.detach().reshape(-1).long().cpu()
    return ids


def remedy(step: str, found: str) -> str:
    """One message: what was found in a step, and the line to end it with."""
    return f"{step} {found} End {step} with `return per_sample(losses, ids)`."


def _failed(step: str, error: Exception) -> NotCaptured:
    """The reason why a step's losses were not read: an `UnreadableLoss`, or a mistake of this package."""
    if isinstance(error, SampleAxisLost):
        return NotCaptured(remedy(step, f"has a loss without a sample axis: {error}."))
    if isinstance(error, UnreadableLoss):
        return NotCaptured(remedy(step, f"has a loss that can't be split: {error}."))
    return NotCaptured(f"{internal_error(f'Reading the losses of {step}', error)}.", is_internal=True)


def _laid_out(call: LossCall, batch_size: int, time_major: bool) -> LossCall:
    """A watched call, which has no graph, with the layout that was found in the graph of training."""
    if not time_major or not batch_size:
        return call
    steps = call.losses.shape[0] if call.losses.ndim > 1 else call.losses.numel() // batch_size
    return replace(call, rows=replace(call.rows, sizes=((steps, batch_size),)))


def _share_explained(calls: Sequence[LossCall], backwards: Sequence[_Backward]) -> float | None:
    """The part of the differentiated losses that the calls add up to. Waits for the device."""
    value = torch.stack([found.loss.float() for found in backwards]).sum()
    share = float(torch.stack([call.total() for call in calls]).sum() / value)
    return share if abs(share) < float("inf") else None
