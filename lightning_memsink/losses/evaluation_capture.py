"""Per-sample losses of a validation step, read as those of training are."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_memsink.losses.capture import (
    StepCapture,
    calls_of_compiled,
    failed,
    losses_of,
    read_report,
    remedy,
)
from lightning_memsink.losses.compiled_parts import around_compiled_parts
from lightning_memsink.losses.fused_layers import fused_layers, passed_by
from lightning_memsink.losses.loss_call import LossCall
from lightning_memsink.losses.per_sample import Captured, NotCaptured, Term, terms_of, weigh
from lightning_memsink.losses.reductions import read_reductions
from lightning_memsink.losses.sample_rows import SampleAxisLost
from lightning_memsink.losses.shadow_graph import ShadowGraph
from lightning_memsink.losses.step_watch import StepWatch
from lightning_memsink.losses.unreadable import UnreadableLoss
from lightning_memsink.samples.batch_rows import Axes, rows_of

MOST_DRIFT = 1.5  # of a weight between the last training step and validation


class EvaluationCapture:
    """Reads the per-sample losses of a validation step from its loss calls, weighted as in training.

    Args:
        training: what read the training steps. A validation step whose losses are of other kinds is refused: they
            could not be compared.
    """

    def __init__(self, training: StepCapture) -> None:
        self.training = training
        self.watch = StepWatch()
        self._shadows = ShadowGraph()
        self._batch: Any = None
        self._leaves: list[tuple[Tensor, Tensor]] = []
        self._compiled = ExitStack()
        self._fused: list[weakref.ref[nn.TransformerEncoderLayer]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without the layers of a module: a copy of a callback gets another one in its own run."""
        return vars(self) | {"_fused": None}

    def begin(self, batch: Any, batch_size: int, axes: Axes | None = None, is_packed: bool = False) -> None:
        """At the start of a validation step on ``batch``; the arguments as in training."""
        self._batch, self._shadows = batch, ShadowGraph()
        self._leaves = rows_of(batch, batch_size, axes) if batch_size else []
        if self.training.loss is None:
            self.watch.start(self._leaves, self._shadows, is_packed)
            reader = self.training.reader
            if reader.module is not None and not reader.can_watch and not reader.is_compiled:
                self._compiled.enter_context(around_compiled_parts(reader.module, self.watch.suspended))
            elif reader.module is not None:
                if self._fused is None:
                    self._fused = [weakref.ref(layer) for layer in fused_layers(reader.module)]
                layers = [layer for known in self._fused if (layer := known()) is not None]
                self._compiled.enter_context(passed_by(self.watch, layers))

    def finish(self, outputs: Any, batch_size: int) -> Captured | NotCaptured:
        """At the end of a validation step; ``outputs`` and ``batch_size`` as in training."""
        self._stop()
        batch, self._batch = self._batch, None
        step = f"{self.training.module_name}.validation_step"
        try:
            reported = read_report(outputs, batch_size, step)
            if reported is not None:
                return reported
            if self.training.loss is not None:
                return losses_of(self.training.loss, batch, outputs, batch_size)
            if batch_size == 0:
                return Captured(torch.zeros(0))
            if self.watch.error is not None:
                raise self.watch.error
            return self._captured(step, outputs, batch_size)
        except Exception as error:
            return failed(step, error)
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Discards the step, after an exception in it."""
        self._stop()
        self.watch.clear()
        self._batch, self._leaves, self._shadows = None, [], ShadowGraph()

    def _stop(self) -> None:
        self._compiled.close()
        self.watch.stop()

    def _captured(self, step: str, outputs: Any, batch_size: int) -> Captured | NotCaptured:
        calls = calls_of_compiled(self.watch, self._leaves, batch_size) or self._calls(outputs, batch_size)
        terms = self._as_in_training(calls, batch_size)
        if terms:
            return Captured(weigh(terms), counted=terms[0].weights if len(terms) == 1 else None)
        found = ", ".join(dict.fromkeys(call.kind for call in calls)) or "no loss that could be read"
        trained = ", ".join(dict.fromkeys(term.kind for term in self.training.terms)) or "nothing that could be read"
        return NotCaptured(remedy(step, f"calls {found}, where training_step was seen to use {trained}."))

    def _calls(self, outputs: Any, batch_size: int) -> list[LossCall]:
        """The calls of the loss that the step returned; if it returned none, of all that it computed.

        Raises:
            SampleAxisLost: there are none.
        """
        returned = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        loss = self._shadows.of(returned)
        losses = self._shadows.ends() if loss is None else [loss]
        read = [read_reductions(each, self.watch, batch_size) for each in losses]
        # what a logger made of a loss is that loss again
        parts = list({frozenset(each.node for each in part.found): part for part in reversed(read)}.values())
        wanted = {term.kind for term in self.training.terms}
        whole = [part for part in parts if part.found and wanted == {each.call.kind for each in part.found}]
        if len(whole) == 1:  # others are only logged
            return [each.call for each in whole[0].found]
        found = [each.call for part in parts for each in part.found]
        kinds = [{each.call.kind for each in part.found} & wanted for part in parts]
        if len(losses) > 1 and any(a & b for n, a in enumerate(kinds) for b in kinds[:n]):
            raise UnreadableLoss("it returns no loss, and of those that it computes several are of the same kind")
        if not found:
            reasons = dict.fromkeys(reason for part in parts for reason in part.lost)
            raise SampleAxisLost("; ".join(reasons) or "it takes no mean or sum over samples that could be seen")
        return found

    def _as_in_training(self, calls: Sequence[LossCall], batch_size: int) -> list[Term]:
        """This step's terms of the kinds that training has, each kind with the weight it has there; none if training
        has a kind that is missing here."""
        trained = _weights(self.training.terms)
        terms = [term for term in terms_of(calls, batch_size) if term.kind in trained]
        weights = _weights(terms)
        if not trained or weights.keys() != trained.keys() or 0.0 in weights.values():
            return []
        if len(trained) == 1 and len(terms) == len(self.training.terms) == 1:
            return [replace(terms[0], factor=self.training.terms[0].factor)]
        # A weight may be learned: then it is that of now, and not of the last training step.
        ratios = {kind: trained[kind] / weights[kind] for kind in trained}
        ratios = {kind: 1.0 if 1 / MOST_DRIFT < ratio < MOST_DRIFT else ratio for kind, ratio in ratios.items()}
        return [replace(term, factor=term.factor * ratios[term.kind]) for term in terms]


def _weights(terms: Sequence[Term]) -> dict[str, float]:
    """The weight of each kind of loss, added up over its terms."""
    weights: dict[str, float] = {}
    for term in terms:
        weights[term.kind] = weights.get(term.kind, 0.0) + term.factor
    return weights
