"""Mitigation by sample: leave the gradient of a memorized sample out, weaken it, or route it to reserved units."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lightning_memsink.attribution.hidden_layers import find_hidden_layers
from lightning_memsink.callbacks.runtime.checkpointing import restoring
from lightning_memsink.callbacks.runtime.mitigation import LossWeighing
from lightning_memsink.detection.alpha_spending import significant_for_good
from lightning_memsink.ledger import Ledger
from lightning_memsink.losses.reweighting import OpenLoss
from lightning_memsink.mitigation.gradient_routing import reserved_units, routing_hook
from lightning_memsink.mitigation.hold import Reference, hold_weights, match_batch
from lightning_memsink.mitigation.intervention_log import InterventionLog
from lightning_memsink.mitigation.sample_weights import SampleWeights, described, is_latched, latch, latched_weights
from lightning_memsink.mitigation.set_point import UNMEASURED, SetPoint
from lightning_memsink.samples.chosen_sources import ChosenSources, labels_of
from lightning_memsink.samples.loss_table import LossTable

Mode = Literal["hold", "skip", "attenuate", "route"]


class SampleGradientMask(LossWeighing):
    """Leaves the gradient of memorized samples out of the step, or lets it reach reserved units only.

    The loss's denominators stay the same: under a mean, the other samples of the batch keep their weight. A batch in
    which nothing is left out trains bit for bit as without this callback. Other callbacks see the changed gradient: to
    `SinkLocalizer`, a sample that is left out has none. The ledger's losses are those of the forward, unchanged.

    Args:
        mode: ``hold``: a thermostat. A sample's gradient is left out while its loss is more than ``at`` nats below the
            loss of held-out controls matched on difficulty, at their latest evaluation. It trains again once forgetting
            has raised its loss. Evaluate often (every few dozen steps): between two evaluations, what the model learns
            in general looks like memorization. Samples without a matched control, and samples at their first visit,
            train as usual. Related to flooding (Ishida et al. 2020) and RHO-loss (Mindermann et al. 2022).
            ``skip``: once a sample is memorized for good, its gradient is left out.
            ``attenuate``: from then on, its gradient is multiplied by ``weight``.
            ``route``: from then on, its gradient passes hidden layers only at the ``reserved`` units (gradient routing,
            Cloud et al. 2024). All columns of the down projections, attention, norms and embeddings still learn from
            it. These three never take back what they act on. So a sample must be memorized by a p-value that passes at
            the share of the false-discovery rate that its evaluation may spend (`detection.alpha_spending`), which
            falls from a half as evaluations double. Late in a run that takes more controls than a verdict does.
        at: the set point, in nats of the loss (per token for token losses). ``auto``: half a nat more than samples of
            this run usually stand below their controls while these still improve (`mitigation.set_point`). Nothing is
            held before that was measured, at the second evaluation.
        k: number of controls that a sample is compared with.
        weight: 0…1, the factor on a flagged sample's gradient in mode ``attenuate``.
        reserved: share of each hidden layer's units, its last ones, open to flagged samples in mode ``route``.
        modules: name patterns of the modules that read the hidden units, in mode ``route``. None finds them.
        sources: labels of the sources whose samples it acts on (``LossTracker(source=...)``); samples of others train
            as usual. None acts on all.

    Raises:
        ValueError: for a number out of range, sources that are no list, or (``route``, at the start of fit) a model
            without hidden layers.
    """

    saves_samples = True

    def __init__(
        self,
        mode: Mode = "hold",
        at: float | Literal["auto"] = "auto",
        k: int = 8,
        weight: float = 0.1,
        reserved: float = 0.1,
        modules: Sequence[str] | None = None,
        sources: Sequence[str] | None = None,
    ) -> None:
        if mode not in get_args(Mode):
            raise ValueError(f"mode is one of {', '.join(map(repr, get_args(Mode)))}, but it is {mode!r}.")
        if at != "auto" and not (isinstance(at, (int, float)) and at >= 0):
            raise ValueError(f"at is a gap in nats, at least 0, or 'auto', but it is {at!r}.")
        if k < 1:
            raise ValueError(f"k is a number of controls, at least 1, but it is {k}.")
        if not 0 <= weight <= 1:
            raise ValueError(
                f"weight is the factor on a flagged sample's gradient, between 0 and 1, but it is {weight}."
            )
        if not 0 < reserved < 1:
            raise ValueError(f"reserved is a share of each layer's units between 0 and 1, but it is {reserved}.")
        super().__init__()
        self.sources = None if sources is None else ChosenSources(sources)
        self.mode, self.at, self.k, self.weight, self.reserved, self.modules = mode, at, k, weight, reserved, modules
        self.set_point = SetPoint() if at == "auto" else None
        """Where it is measured in the run."""
        of_sources = "" if self.sources is None else f" ({self.sources})"
        self.interventions = InterventionLog(described(mode, at, weight, reserved) + of_sources, "gradient")
        self.latched = torch.zeros(0, dtype=torch.int64)
        """Sorted ids of samples that were ever memorized for good. A verdict would not last: the loss of a sample that
        is left out rises again."""
        self._evaluations = -1  # of the detector, whose verdicts are latched
        self._reference: tuple[tuple[int, int], Reference | None] = ((-1, 0), None)
        self._weights: SampleWeights | None = None  # of the current batch
        self._weighed = self.latched  # ids of its samples
        self._automatic = True
        self._backwards, self._backwards_before = 0, 1
        self._ledger: Ledger | None = None
        self._handles: list[RemovableHandle] = []
        self._known = self._unmatched = 0  # visits since the latest evaluation of the controls

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._automatic = pl_module.automatic_optimization

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        if self.mode != "route":
            return
        for layer in find_hidden_layers(pl_module, self.modules):
            units = reserved_units(layer, self.reserved)
            hook = routing_hook(layer, units, self._samples_to_route, lambda why: self._warn("some layers", why))
            # Before all other hooks, so that those that record the layer see the same in any order of callbacks.
            handle = layer.module.register_forward_pre_hook(hook, prepend=True, with_kwargs=True)
            self._handles.append(handle)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        ledger = Ledger.of(trainer)
        ledger.require(Ledger.batch, Ledger.losses, Ledger.controls if self.mode == "hold" else Ledger.flags)
        if not trainer.enable_validation and not ledger.controls.has_own_source:
            rank_zero_warn(
                f"SampleGradientMask(mode={self.mode!r}) has no controls: this Trainer runs no validation. Every "
                "sample trains as usual. Pass held-out data, trainer.fit(model, train_loader, control_loader)."
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._ledger, self._weights = Ledger.of(trainer), None
        if self._backwards:
            self._backwards_before = self._backwards
        self._backwards = 0
        if self.mode != "hold":
            self._latch_flagged(self._ledger)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._backwards += 1
        super().on_before_backward(trainer, pl_module, loss)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        ids, weights = Ledger.of(trainer).batch.ids, self._weights
        if self.mode == "route" and ids is not None and len(ids):
            is_routed = is_latched(ids, self.latched)
            routed = int(is_routed.sum())
            self.interventions.add(len(ids), routed, routed / len(ids) * (1 - self.reserved))
            self._count_sources(ids[is_routed], Ledger.of(trainer).losses)
        elif weights is not None:
            more = {"unmatched": weights.unmatched, "unknown": weights.unknown} if self.mode == "hold" else {}
            weighed, table = self._weighed, Ledger.of(trainer).losses

            def count(own: Tensor, shares: Tensor | None) -> None:
                acted, removed = SampleWeights(own, shares).left_out()
                self.interventions.add(len(own), acted, removed, **more)
                if acted:
                    self._count_sources(weighed[own != 1], table)

            self._counts.put(count, weights.weights, weights.shares)
        self._ledger = self._weights = None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        table = Ledger.of(trainer).get(Ledger.losses)
        if self.sources is not None and table is not None and self.sources.missing(table):
            rank_zero_warn(
                f"SampleGradientMask(sources=[...]) names {', '.join(map(repr, self.sources.missing(table)))}, and no "
                "sample of this run has that source. Labels come from batch['source'], or LossTracker(source=...)."
            )

    def state_dict(self) -> dict[str, Any]:
        return {
            "latched": self.latched,
            "evaluations": self._evaluations,
            "backwards": self._backwards or self._backwards_before,
            **({} if self.set_point is None else {"set_point": self.set_point.state_dict()}),
            **super().state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        with restoring("SampleGradientMask"):
            self.latched, self._backwards_before = state_dict["latched"].clone(), state_dict["backwards"]
            self._evaluations = state_dict.get("evaluations", -1)  # version 0.1.0 saved none
            if self.set_point is not None and "set_point" in state_dict:
                self.set_point.load_state_dict(state_dict["set_point"])
            super().load_state_dict(state_dict)

    # Private ------------------------------------------------------------------------------------------------------

    def _samples(self, ledger: Ledger) -> int:
        """0, for no weights on the loss, in mode ``route`` and without ids, which say who is memorized."""
        return 0 if self.mode == "route" else ledger.current_batch_size(0)

    def _weigh(self, opened: OpenLoss) -> None:
        ledger = self._ledger
        if ledger is None or ledger.batch.ids is None:
            return
        # Under automatic optimization, a second backward is a closure that runs again: its weights stay.
        if self._weights is None or not self._automatic:
            ids = ledger.batch.ids if opened.ids is None else opened.ids.cpu()
            self._weights = self._weights_of(ledger, opened, ids)
            self._weighed = ids
        opened.weigh_samples(self._weights.weights)

    def _weights_of(self, ledger: Ledger, opened: OpenLoss, ids: Tensor) -> SampleWeights:
        if self.mode == "hold":
            return self._hold(ledger, opened, ids)
        weights = latched_weights(ids, self.latched, self.weight if self.mode == "attenuate" else 0.0)
        return SampleWeights(weights, opened.shares())

    def _hold(self, ledger: Ledger, opened: OpenLoss, ids: Tensor) -> SampleWeights:
        table, reference = ledger.losses, self._reference_of(ledger)
        rows = table.index.find(ids)
        batch = match_batch(reference, table.features, rows)
        if batch.expected is None or batch.matched is None:
            return SampleWeights(torch.ones(len(ids)), None, batch.unmatched, batch.unknown)
        self._known += len(ids) - batch.unknown
        self._unmatched += batch.unmatched
        # Each of several backwards in a step has a part of the loss only; the ledger has all of it, at the last visit.
        losses = opened.losses() if self._backwards_before == 1 else table.last_loss[rows.clamp(min=0)]
        matched = batch.matched
        if self.sources is not None:
            matched = matched & self.sources.includes(table, rows)
        weights = hold_weights(losses, batch.expected, matched, self._at)
        return SampleWeights(weights, opened.shares(), batch.unmatched, batch.unknown)

    @property
    def _at(self) -> float:
        """The set point of now, in nats; infinite while it is not known."""
        return float(self.at) if self.set_point is None else self.set_point.value

    def _levels(self) -> dict[str, float]:
        return {"set_point": self._at} if self.mode == "hold" and math.isfinite(self._at) else {}

    def _reference_of(self, ledger: Ledger) -> Reference | None:
        """The controls to compare with, prepared again after each of their evaluations; None, and a warning, if there
        are too few."""
        controls = ledger.controls
        evaluation = (controls.latest_step, len(controls))
        if evaluation != self._reference[0]:
            if 2 * self._unmatched > self._known:
                self._warn(
                    "samples without a matched control",
                    f"{self._unmatched} of {self._known} visits since the previous evaluation. Draw the validation set "
                    "as the training set is drawn, or split it off, LossTracker(control_fraction=0.05)",
                )
            self._known = self._unmatched = 0
            if self.set_point is not None:
                self.set_point.update(ledger.losses, controls, self.k)
                if self.set_point.is_overdue:
                    self._warn("every sample", UNMEASURED.format(evaluations=self.set_point.evaluations))
            try:
                self._reference = (evaluation, Reference.of(controls.features, controls.unknown_to_the_model, self.k))
            except ValueError as error:
                self._reference = (evaluation, None)
                self._warn("every sample", str(error))
        return self._reference[1]

    def _count_sources(self, ids: Tensor, table: LossTable) -> None:
        if "source" in table.columns and len(ids):
            self.interventions.add_by_source(labels_of(table, ids))

    def _latch_flagged(self, ledger: Ledger) -> None:
        """Adds the samples that an evaluation since the last batch found memorized for good."""
        evaluations = len(ledger.flags.evaluations)
        if evaluations != self._evaluations:
            self._evaluations = evaluations
            rows = significant_for_good(ledger.losses, ledger.flags).nonzero().flatten()
            if self.sources is not None:
                rows = rows[self.sources.includes(ledger.losses, rows)]
            self.latched = latch(self.latched, ledger.losses.ids[rows])

    def _samples_to_route(self) -> Tensor | None:
        """Bool ``[B]``, or ``[R, T]`` of tokens where rows hold several documents, in a training forward; None if no
        sample of the batch is to be routed."""
        ids = None if self._ledger is None else self._ledger.batch.ids
        if ids is None:
            return None
        flagged = is_latched(ids, self.latched)
        if not bool(flagged.any()):
            return None
        documents = self._ledger.batch.documents if self._ledger is not None else None
        return flagged if documents is None else torch.atleast_2d(documents.by_token(flagged))

    def _detach(self) -> None:
        super()._detach()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._ledger = None
