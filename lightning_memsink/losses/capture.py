"""Per-sample losses of a step, from the user's own loss.

What the user says wins: `per_sample`, or a function of their own. Else the losses are read from the step itself, in
training and in validation by the same means.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lightning_memsink.losses.autograd_graph import LossNodes, awaiting_upstream
from lightning_memsink.losses.loss_call import LossCall
from lightning_memsink.losses.loss_units import LossUnit
from lightning_memsink.losses.per_sample import (
    IDS_KEY,
    LOSSES_KEY,
    Captured,
    NotCaptured,
    Term,
    terms_of,
    weigh,
)
from lightning_memsink.losses.row_orders import NotWatched
from lightning_memsink.losses.sample_rows import SampleAxisLost
from lightning_memsink.losses.step_reader import StepReader
from lightning_memsink.losses.step_watch import StepWatch
from lightning_memsink.losses.target_rows import rows_of_target
from lightning_memsink.losses.unreadable import UnreadableLoss, internal_error
from lightning_memsink.samples.batch_rows import Axes
from lightning_memsink.samples.visits import DescribedBatch

NOTHING = torch.zeros(0)

LossOfSamples: TypeAlias = Callable[[Any, Any], Tensor]
"""``loss(batch, outputs) -> [B]``: the losses of a batch, from what the step returned for it."""


@dataclass
class _Backward:
    """One backward call of a step."""

    loss: Tensor
    loss_scale: float  # what the loss was multiplied with
    calls: list[LossCall]
    refusal: UnreadableLoss | None = None


class StepCapture:
    """Reads the per-sample losses of a training step from its loss calls.

    Args:
        module: the user's.
        loss: of samples, instead of reading them.
        read: the loss calls of a loss; a cached search can be shared with other callbacks. None: `reader`'s own.
    """

    def __init__(
        self,
        module: nn.Module | None = None,
        loss: LossOfSamples | None = None,
        read: Callable[[Tensor, float], LossNodes] | None = None,
    ) -> None:
        self.module_name = type(module).__name__ if module is not None else "LightningModule"
        # Under automatic optimization a second backward in a step is a closure run again (L-BFGS) and does not count;
        # otherwise the losses of all backwards are added.
        self.automatic = bool(getattr(module, "automatic_optimization", True))
        self.loss = loss
        self.reader = StepReader(module)
        self.attends_across = False
        """Whether tokens of several documents in a row were seen to depend on one another."""
        self.terms: tuple[Term, ...] = ()
        """Of the last captured step, without its samples."""
        self.unit = LossUnit()
        """Of the losses, from the steps that are watched. An odd graph or batch costs the unit, never the losses."""
        self._is_unit_due = True
        self._weighed: Sequence[Term] = ()
        self._read = read or self.reader.read
        self._batch: Any = None
        self._backwards: list[_Backward] = []
        self._steps_without_calls = 0  # of those watched in compiled code
        self._error: Exception | None = None  # while reading the graph of this step

    def begin(self, batch: Any, batch_size: int, axes: Axes | None = None, is_packed: bool = False) -> None:
        """At the start of a training step on ``batch``, whose tensors have their samples along ``axes``; whether its
        rows hold several samples."""
        self._batch = batch
        self._backwards.clear()
        self._error = None
        # mitigations read the loss even where `loss` gives the losses
        self.reader.begin(batch, batch_size, axes, is_packed)
        self._is_unit_due = self.reader.is_watching or not self.unit.is_known

    def before_backward(self, loss: Tensor, loss_scale: float = 1.0) -> None:
        """Just before ``loss`` is differentiated, multiplied with ``loss_scale`` as it is: by accumulation, and by a
        gradient scaler, which may choose another scale before the step ends."""
        if self.automatic:  # what follows, the optimizer's step among it, is none of the loss
            self.reader.watch.stop()
        if self.loss is not None and self._is_unit_due:
            with suppress(Exception):
                self.unit.note_graph(loss)
        if (self.automatic and self._backwards) or self.loss is not None:
            return
        calls: list[LossCall] = []
        refusal = None
        try:
            found = self._read(loss, loss_scale)
            calls = awaiting_upstream(found)
            if self._is_unit_due:
                with suppress(Exception):
                    self.unit.note_calls(found)
        except UnreadableLoss as error:
            refusal = error
        except Exception as error:
            self._error = error
        self._backwards.append(_Backward(loss.detach(), loss_scale, calls, refusal))

    def finish(self, outputs: Any, batch_size: int) -> Captured | NotCaptured:
        """At the end of a training step, which returned ``outputs``; ``batch_size`` is the number of ids."""
        batch = self._batch
        captured = self._finish(outputs, batch_size)
        if self._is_unit_due and isinstance(captured, Captured):
            with suppress(Exception):
                self.unit.settle(captured.losses, self._weighed, batch)
        self._weighed = ()
        return captured

    def _finish(self, outputs: Any, batch_size: int) -> Captured | NotCaptured:
        backwards, self._backwards = self._backwards, []
        batch, self._batch = self._batch, None
        compiled = calls_of_compiled(self.reader.watch, self.reader.leaves, batch_size)
        error = self._error or self.reader.watch.error
        self.attends_across |= self.reader.watch.seen.attends_across
        self.reader.end()
        step = f"{self.module_name}.training_step"
        reported = read_report(outputs, batch_size, step)
        if reported is not None:
            return reported
        if self.loss is not None:
            return losses_of(self.loss, batch, outputs, batch_size)
        if not backwards and not self.automatic:
            return self._not_captured("ran no backward that Lightning saw. Call `self.manual_backward(loss)`, or")
        if not backwards or batch_size == 0:  # the step returned None: it skipped its batch
            return Captured(torch.full((batch_size,), torch.nan))
        try:
            if error is not None:
                raise error
            for backward in backwards:
                if backward.refusal is not None:
                    return self._refused(backward.refusal, compiled, backwards, batch_size)
            return self._captured(backwards, batch_size)
        except Exception as failure:
            return failed(step, failure)

    def abandon(self) -> None:
        """Discards the step, after an exception in it."""
        self.reader.end()
        self._backwards.clear()
        self._batch, self._weighed = None, ()

    def _captured(self, backwards: Sequence[_Backward], batch_size: int) -> Captured:
        calls = [call for found in backwards for call in found.calls]
        terms = terms_of(calls, batch_size, backwards[0].loss_scale)
        losses = weigh(terms)
        self._remember(terms)
        explained, self.reader.explained = self.reader.explained, None
        return Captured(losses, explained, terms[0].weights if len(terms) == 1 else None)

    def _refused(
        self, refusal: UnreadableLoss, compiled: Sequence[LossCall], backwards: Sequence[_Backward], batch_size: int
    ) -> Captured | NotCaptured:
        if isinstance(refusal, NotWatched):
            return Captured(torch.full((batch_size,), torch.nan))
        if compiled:
            return self._from_compiled(compiled, backwards, batch_size)
        if not self.reader.can_watch and not any(backward.calls for backward in backwards):
            self._steps_without_calls += self.reader.is_compiled
            if not self.reader.is_compiled and self._steps_without_calls == 0:
                self.reader.is_compiled = True
                return Captured(torch.full((batch_size,), torch.nan))
            self.reader.is_compiled = self._steps_without_calls < 2  # one that never comes is not worth watching for
        self.terms = ()
        return failed(f"{self.module_name}.training_step", refusal)

    def _from_compiled(
        self, calls: Sequence[LossCall], backwards: Sequence[_Backward], batch_size: int
    ) -> Captured | NotCaptured:
        kinds = {(call.kind, call.classes) for call in calls}
        if len(calls) > 1 and len(kinds) > 1:
            value = torch.stack([backward.loss.float() / backward.loss_scale for backward in backwards]).sum()
            if not bool(torch.isclose(torch.stack([call.total() for call in calls]).sum(), value, rtol=1e-2)):
                found = ", ".join(call.kind for call in calls)
                return self._not_captured(f"calls {found} in compiled code, which hides the weight of each.")
        terms = terms_of(calls, batch_size)
        if len(kinds) == 1 and len(terms) > 1:
            total = sum(float(term.total_weight()) for term in terms)
            terms = [replace(term, factor=float(term.total_weight()) / total) for term in terms]
        self._remember(terms)
        return Captured(weigh(terms))

    def _remember(self, terms: Sequence[Term]) -> None:
        self._weighed = terms
        same = len(terms) == len(self.terms) and all(
            term.kind == known.kind and term.classes == known.classes and term.factor == known.factor
            for term, known in zip(terms, self.terms, strict=True)
        )
        if not same:
            self.terms = tuple(Term(term.kind, term.classes, NOTHING, NOTHING, 1.0, term.factor) for term in terms)

    def _not_captured(self, found: str) -> NotCaptured:
        return NotCaptured(remedy(f"{self.module_name}.training_step", found))


def calls_of_compiled(watch: StepWatch, leaves: Sequence[tuple[Tensor, Tensor]], batch_size: int) -> list[LossCall]:
    """Loss calls seen inside compiled code, as if each were the loss. Their targets say whose their rows are."""
    if not watch.seen.compiled:
        return []
    return [
        LossCall(*record, record[2].new_ones(()), rows_of_target(target, leaves, batch_size))
        for record, target in watch.seen.compiled
    ]


def read_report(outputs: Any, batch_size: int, step: str) -> Captured | NotCaptured | None:
    """What the step reported with `per_sample`; None if it did not. Ids that it reported set the number of samples."""
    if not isinstance(outputs, Mapping) or LOSSES_KEY not in outputs:
        return None
    losses = outputs[LOSSES_KEY].detach().float()
    if IDS_KEY not in outputs and losses.numel() != batch_size:
        return NotCaptured(
            f"{step} reported {losses.numel()} losses for a batch of {batch_size} samples. "
            f"End it with `return per_sample(losses, ids)`, one loss and one id per sample."
        )
    return Captured(losses)


def reported(outputs: Any, batch: DescribedBatch | None) -> DescribedBatch | None:
    """The samples of a batch, with the ids that the step reported by ``per_sample(losses, ids)``, if it did."""
    if not isinstance(outputs, Mapping) or IDS_KEY not in outputs:
        return batch
    ids = outputs[IDS_KEY].detach().reshape(-1).long().cpu()
    if batch is None or len(batch.ids) != len(ids):
        return DescribedBatch(ids, None, None)
    return batch._replace(ids=ids)


def losses_of(loss: LossOfSamples, batch: Any, outputs: Any, batch_size: int) -> Captured | NotCaptured:
    """What the user's own function of the batch and the step's outputs returns."""
    name = getattr(loss, "__name__", type(loss).__name__)
    try:
        with torch.no_grad():
            losses = loss(batch, outputs)
    except Exception as error:  # it must not end the training
        return NotCaptured(f"{name}(batch, outputs), given as loss=, raised {type(error).__name__}: {error}")
    if not isinstance(losses, Tensor) or losses.shape != (batch_size,):
        found = f"shape {list(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
        return NotCaptured(
            f"{name}(batch, outputs), given as loss=, returned {found} for a batch of {batch_size} samples. "
            "Return one loss per sample, [B]."
        )
    return Captured(losses.detach().float())


def remedy(step: str, found: str) -> str:
    """One message: what was found in a step, and what to type."""
    return (
        f"{step} {found} End {step} with `return per_sample(losses, ids)`, or give the losses by "
        "`memsink(loss=function(batch, outputs) -> [B])`."
    )


def failed(step: str, error: Exception) -> NotCaptured:
    """The reason why a step's losses were not read: an `UnreadableLoss`, or a mistake of this package."""
    if isinstance(error, SampleAxisLost):
        return NotCaptured(remedy(step, f"has a loss whose rows can't be assigned to samples: {error}."))
    if isinstance(error, UnreadableLoss):
        return NotCaptured(remedy(step, f"has a loss that can't be split: {error}."))
    return NotCaptured(f"{internal_error(f'Reading the losses of {step}', error)}.", is_internal=True)
