"""Reads the loss calls of each training step, and proves whose their rows are.

The first steps, and some steps now and then, are watched: every loss is read from its reductions, and the batch is
followed to them. Where autograd's own nodes give the same losses, in an order that other steps keep, the steps between
are read from the graph alone, which costs next to nothing. Else every step is watched.

    B  samples in a batch
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from lightning_memsink.losses.autograd_graph import LossNodes, find_loss_nodes, names_near
from lightning_memsink.losses.compiled_parts import has_compiled_parts
from lightning_memsink.losses.loss_call import LossCall
from lightning_memsink.losses.per_sample import terms_of, weigh
from lightning_memsink.losses.readers import is_report
from lightning_memsink.losses.reductions import LossParts, read_reductions, share_explained
from lightning_memsink.losses.row_orders import NotWatched, RowOrders, TargetOrders
from lightning_memsink.losses.sample_rows import SampleAxisLost, SampleRows
from lightning_memsink.losses.step_watch import StepWatch
from lightning_memsink.losses.target_rows import place_of, rows_of_target
from lightning_memsink.losses.unreadable import UnreadableLoss
from lightning_memsink.losses.upstreams import set_upstreams
from lightning_memsink.samples.batch import tensors_in
from lightning_memsink.samples.batch_rows import Axes, rows_of

FIRST_STEPS = 8
EVERY = 50
LEAST, MOST = 0.95, 1.05
"""The share of the loss that must be read, unless the rest is a penalty on the weights."""
EXACT = 1e-5
MOST_SHAPES = 4096
UNKNOWN = ("can't be followed", "which is not linear")


class StepReader:
    """Reads the loss calls of a training step.

    Args:
        module: that is trained. Where parts of it are compiled its steps can't be watched: then only the targets tell
            whose rows a loss call has.
    """

    def __init__(self, module: nn.Module | None = None) -> None:
        self._module = None if module is None else ref(module)  # it holds its trainer, which the ledger goes with
        self.watch = StepWatch()
        self.can_watch = module is None or not has_compiled_parts(module)
        self.is_watching = False
        self.explained: float | None = None
        """The share of the latest watched loss that its calls add up to (1: all of it)."""
        self.is_compiled = False
        """Whether to watch loss calls inside compiled code, which leaves none in the graph."""
        self.batch_size = 0
        self.is_packed = False
        self._targets = TargetOrders()
        self._steps = self._refused = 0
        self._is_always = self._is_armed = False
        self._orders = RowOrders()
        self._kinds: dict[Hashable, list[tuple[str, int]]] = {}
        self._missed = 0
        self.leaves: list[tuple[Tensor, Tensor]] = []
        """The batch's tensors, with their owners, in a step where they are followed."""
        self._tensors: list[Tensor] = []
        self._versions: list[int] = []
        self._shapes: set[tuple[tuple[int, ...], ...]] = set()
        self._read: tuple[Tensor, LossNodes | Exception] | None = None

    @property
    def module(self) -> nn.Module | None:
        """That is trained."""
        return None if self._module is None else self._module()

    def __getstate__(self) -> dict[str, Any]:
        """Without the module: a copy of a callback gets another one in its own run."""
        return vars(self) | {"_module": None}

    def begin(self, batch: Any, batch_size: int, axes: Axes | None = None, is_packed: bool = False) -> None:
        """At the start of a training step, before its forward; ``is_packed``: rows hold several samples."""
        self.batch_size, self._read, self.is_packed = batch_size, None, is_packed
        self._tensors = list(tensors_in(batch)) if batch_size else []
        self._versions = [tensor._version for tensor in self._tensors if not tensor.is_inference()]
        self.is_watching = self.can_watch and self._is_due()
        self._steps += 1
        self.leaves = []
        if self.is_watching or not self.can_watch or is_packed:
            self.leaves = rows_of(batch, batch_size, axes) if batch_size else []
        if self.is_watching or self.is_compiled:
            self._is_armed = False
            self.watch.start(self.leaves, is_packed=is_packed)

    def read(self, loss: Tensor, loss_scale: float = 1.0) -> LossNodes:
        """The loss calls of ``loss``, before its backward; read once for all callers.

        Raises:
            UnreadableLoss: they can't be read, or not assigned to samples; the message says what was found.
        """
        if self._read is None or self._read[0] is not loss:
            try:
                found: LossNodes | Exception = self._nodes(loss, loss_scale)
            except UnreadableLoss as error:
                found = error
            self._read = loss, found
            if getattr(self.module, "automatic_optimization", False):  # else other losses may follow
                self.watch.release()
        found = self._read[1]
        if isinstance(found, Exception):
            raise found
        return found

    def end(self) -> None:
        """After the step, or an exception in it."""
        self.watch.stop()
        self.watch.clear()
        self._read = None
        self.leaves, self._tensors, self._versions = [], [], []

    def _is_due(self) -> bool:
        shapes = tuple(tuple(tensor.shape) for tensor in self._tensors)
        is_new = shapes not in self._shapes
        if len(self._shapes) >= MOST_SHAPES:
            self._shapes.clear()
        self._shapes.add(shapes)
        if self._steps < FIRST_STEPS or self._steps % EVERY == 0:
            return True
        if self._refused >= FIRST_STEPS:
            return False
        if self.is_packed:
            return self._is_always or self._is_armed or not self._targets.are_known
        return self._is_always or self._is_armed or (is_new and not self._orders.are_general)

    def _nodes(self, loss: Tensor, loss_scale: float) -> LossNodes:
        if not self.is_watching:
            return self._from_graph(loss)
        self.watch.paused = True
        if self.watch.error is not None:
            raise self.watch.error
        try:
            found = self._watched(loss, loss_scale)
        except UnreadableLoss as error:
            self._refused += 1
            self._learn(loss, loss_scale, None, str(error))
            raise
        finally:
            self.watch.paused = False
        self._refused = 0
        return found

    def _watched(self, loss: Tensor, loss_scale: float) -> LossNodes:
        parts = read_reductions(loss, self.watch, self.batch_size)
        if not parts.found:
            raise SampleAxisLost(self._reasons(parts, loss))
        calls = [each.call for each in parts.found]
        if not is_report(parts.found[0].node):
            self.explained = self._explained(parts, loss)
        losses = weigh(terms_of(calls, self.batch_size, loss_scale))
        from_graph = self._learn(loss, loss_scale, parts, losses)
        return parts.found if from_graph is None else from_graph

    def _reasons(self, parts: LossParts, loss: Tensor) -> str:
        if not self.leaves:
            return "its batch has no tensor whose samples are known"
        if parts.lost:
            return "; ".join(dict.fromkeys(parts.lost))
        return f"its batch can't be followed to {', '.join(names_near(loss)) or 'a loss without a graph'}"

    def _explained(self, parts: LossParts, loss: Tensor) -> float | None:
        """The share of the loss that was read.

        Raises:
            UnreadableLoss: it is not near all of it, and the rest is no penalty on the weights.
        """
        share = share_explained([each.call for each in parts.found], loss)
        # what isn't a statistic of the batch may be of single samples
        is_unknown = any(reason.endswith(UNKNOWN) for reason in parts.lost)
        if share is None or abs(share - 1) < max(EXACT, 4 * torch.finfo(loss.dtype).eps):
            return None if share is None else 1.0
        if LEAST <= share <= MOST and not is_unknown:
            return share
        if 0 <= share < LEAST and parts.has_penalty and not parts.lost:
            return share
        kinds = ", ".join(dict.fromkeys(each.call.kind for each in parts.found))
        rest = f"; the rest is not of samples that are known ({', '.join(dict.fromkeys(parts.lost))})"
        raise UnreadableLoss(f"{kinds} explains {share:.0%} of it{rest if parts.lost else ''}")

    def _learn(
        self, loss: Tensor, loss_scale: float, parts: LossParts | None, losses: Tensor | str
    ) -> LossNodes | None:
        """Notes whether the graph alone gives the same, and in which order its rows are. The graph's calls, if so."""
        try:
            found = find_loss_nodes(loss)
            key = self._key(found)
            # an order that is read off the targets may be another one in each step
            agrees = bool(found) and parts is not None and (self.is_packed or not parts.is_dynamic)
            if parts is not None and agrees:
                agrees = self._agrees(loss, loss_scale, found, parts.found, losses)
        except UnreadableLoss:
            key, found, agrees = (), [], False
        if isinstance(losses, str):
            self._orders.refuse(key, losses)
            self._is_always |= self._orders.has_conflict
            return None
        calls = [each.call for each in found]
        if parts is not None:
            self._kinds[key] = [(each.call.kind, each.call.classes) for each in parts.found]
        if self.is_packed:
            self._targets.learn(key, agrees and self._targets_say(calls, losses, loss_scale))
            return found if agrees else None
        if not agrees or not self._orders.learn(
            key, [call.rows for call in calls], [call.shape for call in calls], self.batch_size
        ):
            self._is_always = True
        self._is_always |= self._orders.has_conflict
        return found if agrees else None

    def _agrees(
        self, loss: Tensor, loss_scale: float, found: LossNodes, watched: LossNodes, losses: Tensor | str
    ) -> bool:
        """Whether the calls of the graph, with the rows of those that were watched, give the same losses."""
        if len(found) != len(watched) or isinstance(losses, str):
            return False
        if is_report(found[0].node):
            return True
        set_upstreams(loss, found)
        for own, other in zip(found, watched, strict=True):
            shape, rows = other.call.losses.shape, other.call.rows
            if isinstance(rows, str) or shape.numel() != own.call.losses.numel():
                return False
            own.call.rows = SampleRows(rows.owners.expand(shape).reshape(own.call.losses.shape))
            own.call.kind, own.call.classes = other.call.kind, other.call.classes
        again = weigh(terms_of([each.call for each in found], self.batch_size, loss_scale))
        return _are_close(again, losses, max(1e-3, 2 * torch.finfo(loss.dtype).eps))

    def _targets_say(self, calls: Sequence[LossCall], losses: Tensor, loss_scale: float) -> bool:
        """Whether the calls' targets alone give the same losses."""
        alike = [replace(call, rows=self._rows_by_target(call)) for call in calls]
        if any(isinstance(call.rows, str) for call in alike):
            return False
        return _are_close(weigh(terms_of(alike, self.batch_size, loss_scale)), losses)

    def _rows_by_target(self, call: LossCall) -> SampleRows | str:
        return rows_of_target(call.target, self.leaves, self.batch_size)

    def _from_graph(self, loss: Tensor) -> LossNodes:
        """The calls of a step that is not watched."""
        found = find_loss_nodes(loss)
        if not found and not self.can_watch:
            raise UnreadableLoss(f"it comes from {', '.join(names_near(loss)) or 'no graph'}")
        if found and is_report(found[0].node):
            return found
        calls = [each.call for each in found]
        if not self.can_watch:
            for call in calls:
                call.rows = self._rows_by_target(call)
            return found
        key = self._key(found)
        rows: Sequence[SampleRows | str]
        try:
            if self.is_packed:
                rows = self._targets.rows(key, [self._rows_by_target(call) for call in calls])
            else:
                rows = self._orders.of(key, [call.shape for call in calls], self.batch_size)
        except NotWatched:
            self._is_armed = True
            self._missed += 1
            self._is_always |= self._missed > 1
            raise
        for call, own, (kind, classes) in zip(calls, rows, self._kinds[key], strict=True):
            call.rows, call.kind, call.classes = own, kind, classes
        return found

    def _key(self, found: LossNodes) -> Hashable:
        """The same for steps that are alike: in their calls, where the targets lie, and what they change in place."""
        tensors = [tensor for tensor in self._tensors if not tensor.is_inference()]
        changed = tuple(tensor._version != before for tensor, before in zip(tensors, self._versions, strict=True))
        calls = [each.call for each in found]
        return changed, tuple(
            (call.kind, call.classes, len(call.shape), place_of(call.target, self._tensors)) for call in calls
        )


def _are_close(ours: Tensor, theirs: Tensor, precision: float = 1e-3) -> bool:
    return torch.allclose(ours.float(), theirs.float(), rtol=precision, atol=1e-4, equal_nan=True)
