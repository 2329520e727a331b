"""What to do about a sample that is memorized: hold it at a set point, or leave its gradient out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lightning_memsink.attribution.hidden_layers import find_hidden_layers
from lightning_memsink.callbacks.mitigation import LossWeighing
from lightning_memsink.callbacks.runtime.checkpointing import restoring
from lightning_memsink.ledger import Ledger
from lightning_memsink.losses.reweighting import OpenLoss
from lightning_memsink.mitigation.gradient_routing import reserved_units, routing_hook
from lightning_memsink.mitigation.hold import Reference, over_set_point
from lightning_memsink.mitigation.intervention_log import InterventionLog

Mode = Literal["hold", "skip", "attenuate", "route"]


@dataclass(frozen=True)
class _Decision:
    """What becomes of a batch's gradient."""

    weights: Tensor  # [B], on the device of the losses
    shares: Tensor | None = None  # [B] of the loss's coefficients; None where all weights are 1
    unmatched: int = 0
    unknown: int = 0

    def acted(self) -> tuple[int, float]:
        """On how many samples, and the share of coefficients left out. Waits for the device."""
        weights = self.weights.tolist()
        shares = weights if self.shares is None else self.shares.tolist()
        left_out = [(1 - weight) * share for weight, share in zip(weights, shares, strict=True) if weight != 1]
        total = sum(left_out)
        return len(left_out), total if isfinite(total) else 0.0


class SampleGradientMask(LossWeighing):
    """Leaves the gradient of memorized samples out of the step, or lets it reach reserved units only.

    Denominators stay: under a mean, the rest of the batch weighs what it weighed. A batch in which nothing is left out
    trains bit for bit as without this callback. Others see what training does: to `SinkLocalizer` a sample that is left
    out has no gradient. The ledger's losses are those of the forward, and stay.

    Args:
        mode: ``hold``: a thermostat. A sample's gradient is left out while its loss now is more than ``at`` nats below
            that of held-out controls matched on difficulty, at their latest evaluation; it trains on when forgetting
            has brought it back. Evaluate often (every few dozen steps): between evaluations what the whole model learns
            looks like memorization. Samples without a matched control, and at their first visit, are left alone.
            ``skip``: once flagged by the detector, a sample is left out for good. ``attenuate``: once flagged, it
            counts by ``weight``. ``route``: once flagged, its gradient passes hidden layers at the ``reserved`` units
            only. All columns of the down projections, attention, norms and embeddings still learn from it.
        at: the set point, in nats of the loss (per token for token losses). In fine-tuning for many epochs, where all
            that is trained on falls below what is not, .75 held numbers as well as .5 and cost nothing at the best
            epoch (`benchmarks.mitigation`, E3).
        k: controls a sample is compared with.
        weight: 0…1, what a flagged sample's gradient is multiplied with in mode ``attenuate``.
        reserved: share of each hidden layer's units, its last ones, open to flagged samples in mode ``route``.
        modules: name patterns of the modules that read the hidden units, in mode ``route``. None finds them.

    Raises:
        ValueError: for a number out of range, or (``route``, at the start of fit) a model without hidden layers.
    """

    def __init__(
        self,
        mode: Mode = "hold",
        at: float = 0.5,
        k: int = 8,
        weight: float = 0.1,
        reserved: float = 0.1,
        modules: Sequence[str] | None = None,
    ) -> None:
        if mode not in get_args(Mode):
            raise ValueError(f"mode is one of {', '.join(map(repr, get_args(Mode)))}, but it is {mode!r}.")
        if not at >= 0:
            raise ValueError(f"at is a gap in nats, at least 0, but it is {at}.")
        if k < 1:
            raise ValueError(f"k is a number of controls, at least 1, but it is {k}.")
        if not 0 <= weight <= 1:
            raise ValueError(f"weight is what a flagged sample counts, between 0 and 1, but it is {weight}.")
        if not 0 < reserved < 1:
            raise ValueError(f"reserved is a share of each layer's units between 0 and 1, but it is {reserved}.")
        super().__init__()
        self.mode, self.at, self.k, self.weight, self.reserved, self.modules = mode, at, k, weight, reserved, modules
        what = {
            "hold": f"leaves out the gradient of samples more than {at:g} nats below their matched controls",
            "skip": "leaves out the gradient of samples from the moment they are flagged",
            "attenuate": f"counts the gradient of samples by {weight:g} from the moment they are flagged",
            "route": f"leads the gradient of flagged samples to {reserved:.0%} of the hidden units",
        }
        self.interventions = InterventionLog(what[mode], "gradient")
        self.latched = torch.zeros(0, dtype=torch.int64)
        """Sorted ids of samples that were ever flagged: left out, their loss rises and the flag goes."""
        self._judged = -1
        self._reference: tuple[tuple[int, int], Reference | None] = ((-1, 0), None)
        self._decision: _Decision | None = None
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
            hook = routing_hook(layer, units, self._to_route, lambda why: self._warn("some layers", why))
            # First of all hooks: whoever records the hidden layer sees the same in any order of callbacks.
            handle = layer.module.register_forward_pre_hook(hook, prepend=True, with_kwargs=True)
            self._handles.append(handle)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        ledger = Ledger.of(trainer)
        ledger.require(Ledger.batch, Ledger.losses, Ledger.controls if self.mode == "hold" else Ledger.flags)
        if not trainer.enable_validation and not ledger.controls.expected:
            rank_zero_warn(
                f"SampleGradientMask(mode={self.mode!r}) has no controls: this Trainer runs no validation. Every "
                "sample is left alone. Pass held-out data, trainer.fit(model, train_loader, control_loader)."
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._ledger, self._decision = Ledger.of(trainer), None
        if self._backwards:
            self._backwards_before = self._backwards
        self._backwards = 0
        if self.mode != "hold":
            self._latch(self._ledger)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._backwards += 1
        super().on_before_backward(trainer, pl_module, loss)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        ids, found = Ledger.of(trainer).batch.ids, self._decision
        if self.mode == "route" and ids is not None and len(ids):
            routed = int(_among(ids, self.latched).sum())
            self.interventions.add(len(ids), routed, routed / len(ids) * (1 - self.reserved))
        elif found is not None:
            acted, removed = found.acted()
            more = {"unmatched": found.unmatched, "unknown": found.unknown} if self.mode == "hold" else {}
            self.interventions.add(len(found.weights), acted, removed, **more)
        self._ledger = None

    def state_dict(self) -> dict[str, Any]:
        return {
            "latched": self.latched,
            "backwards": self._backwards or self._backwards_before,
            **super().state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        with restoring("SampleGradientMask"):
            self.latched, self._backwards_before = state_dict["latched"].clone(), state_dict["backwards"]
            super().load_state_dict(state_dict)

    # Ours alone -----------------------------------------------------------------------------------------------

    def _samples(self, ledger: Ledger) -> int:
        """None whose gradient is led where it belongs; none without ids, for nobody could tell who is memorized."""
        return 0 if self.mode == "route" else ledger.current_batch_size(0)

    def _weigh(self, opened: OpenLoss) -> None:
        ledger = self._ledger
        if ledger is None or ledger.batch.ids is None:
            return
        if self._decision is None or not self._automatic:  # else a closure that is run again
            ids = ledger.batch.ids if opened.ids is None else opened.ids.cpu()
            self._decision = self._decide(ledger, opened, ids)
        opened.weigh_samples(self._decision.weights)

    def _decide(self, ledger: Ledger, opened: OpenLoss, ids: Tensor) -> _Decision:
        if self.mode == "hold":
            return self._hold(ledger, opened, ids)
        weights = torch.ones(len(ids))
        weights[_among(ids, self.latched)] = self.weight if self.mode == "attenuate" else 0.0
        return _Decision(weights, opened.shares())

    def _hold(self, ledger: Ledger, opened: OpenLoss, ids: Tensor) -> _Decision:
        table, reference = ledger.losses, self._reference_of(ledger)
        rows, features = table.index.find(ids), table.features
        known = rows >= 0
        unknown = known.tolist().count(False)
        if reference is None or unknown == len(ids) or features.shape[1] != len(reference.mean):
            return _Decision(torch.ones(len(ids)), None, len(ids) - unknown, unknown)
        expected, matched = reference.expected(features[rows.clamp(min=0)].float())
        matched &= known
        unmatched = len(ids) - unknown - matched.tolist().count(True)
        self._known += len(ids) - unknown
        self._unmatched += unmatched
        # Where a step has several backwards, each shows a part of the loss: the ledger has the whole of the last visit.
        losses = opened.losses() if self._backwards_before == 1 else table.last_loss[rows.clamp(min=0)]
        now = over_set_point(losses, expected.to(losses.device), matched.to(losses.device), self.at)
        return _Decision(torch.where(now, 0.0, 1.0), opened.shares(), unmatched, unknown)

    def _reference_of(self, ledger: Ledger) -> Reference | None:
        """What the controls say, computed anew after each evaluation of theirs."""
        controls = ledger.controls
        evaluation = (controls.latest_step, len(controls))
        if evaluation != self._reference[0]:
            if 2 * self._unmatched > self._known:
                self._warn(
                    "samples without a matched control",
                    f"{self._unmatched} of {self._known} visits since the evaluation before. Draw the validation set "
                    "as the training set is drawn, or split it off, LossTracker(control_fraction=0.05)",
                )
            self._known = self._unmatched = 0
            try:
                self._reference = (evaluation, Reference.of(controls.features, controls.latest, self.k))
            except ValueError as error:
                self._reference = (evaluation, None)
                self._warn("every sample", str(error))
        return self._reference[1]

    def _latch(self, ledger: Ledger) -> None:
        """Adds who was flagged since the evaluation before."""
        judged = len(ledger.flags.evaluations)
        if judged != self._judged:
            self._judged = judged
            flagged = ledger.losses.ids[: len(ledger.flags.verdict)][ledger.flags.memorized]
            self.latched = torch.unique(torch.cat([self.latched, flagged]))

    def _to_route(self) -> Tensor | None:
        """Bool ``[B]`` in a training forward; None where nobody is to be routed."""
        ids = None if self._ledger is None else self._ledger.batch.ids
        if ids is None:
            return None
        flagged = _among(ids, self.latched)
        return flagged if bool(flagged.any()) else None

    def _detach(self) -> None:
        super()._detach()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._ledger = None


def _among(ids: Tensor, latched: Tensor) -> Tensor:
    """Bool ``[B]``. ``torch.isin`` would look through all of ``latched`` ``[L]``, which is sorted, at each step."""
    if not len(latched):
        return torch.zeros_like(ids, dtype=torch.bool)
    return latched[torch.searchsorted(latched, ids).clamp(max=len(latched) - 1)] == ids
