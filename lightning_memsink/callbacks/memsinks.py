"""Sinks by design: each sample trains with units of its own, which evaluation leaves out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning_utilities.core.rank_zero import WarningCache
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lightning_memsink._distributed import gather
from lightning_memsink._lightning import warn_once
from lightning_memsink.attribution.hidden_layers import HiddenLayer, find_hidden_layers
from lightning_memsink.callbacks.mitigation import Mitigation
from lightning_memsink.callbacks.runtime.certificate_losses import MaskedLosses, copied
from lightning_memsink.callbacks.runtime.loss_scale import loss_scale
from lightning_memsink.ledger import CurrentBatch, Ledger
from lightning_memsink.losses.capture import StepCapture
from lightning_memsink.mitigation.certificate import Certificate, certify
from lightning_memsink.mitigation.certificate_samples import KeptBatch, MostExposed, joined, twins_of
from lightning_memsink.mitigation.designed_sinks import Pool, apply_mask, attach, gives_way, plan
from lightning_memsink.mitigation.intervention_log import InterventionLog
from lightning_memsink.samples.tokens import tokens_of

COLLAPSES = 0.9
"""Pools above this share were seen to take the model with them when dropped."""


class MemSinks(Mitigation):
    """Ties a pool of hidden units to the samples, each to its own few, and leaves the pool out in evaluation.

    In a training step every hidden layer runs with its shared units and those that the sample's id owns; anywhere else
    (``pl_module.eval()``, or outside of a step) with the shared units alone. Nothing is rescaled. The weights keep the
    pool: `bake` takes it out before the model is served.

    A step without ids, and a layer whose rows are not the batch's samples (a mixture of experts, say), runs without the
    pool, as in evaluation, and a warning says so once.

    Args:
        pool_fraction: of the hidden units of each layer, reserved as the pool.
        active_fraction: of the pool, owned by each sample.
        modules: name patterns (``"model.*.mlp.down_proj"``) of the modules that read the hidden units. None finds them.
        key: name of per-token ids ``[B, T]`` in the batch, where documents are packed into one sample. None takes the
            ids of the samples.
        seed: chooses another assignment of units to ids.
        certify: samples to measure at the end of fit, for the certificate in the ledger; 0 for none. Each process
            measures as many of its own; the same sample counts once.

    Raises:
        ValueError: a fraction is not between 0 and 1; at the start, if the model has no hidden layer or is compiled; on
            a resume, if pool or seed are others than before.
    """

    def __init__(
        self,
        pool_fraction: float = 0.75,
        active_fraction: float = 0.15,
        modules: Sequence[str] | None = None,
        key: str | None = None,
        seed: int = 0,
        certify: int = 64,
    ) -> None:
        self.pool = Pool(pool_fraction, active_fraction, seed)
        if pool_fraction > COLLAPSES:
            rank_zero_warn(
                f"MemSinks(pool_fraction={pool_fraction}) leaves {1 - pool_fraction:.0%} of the units to be served. "
                "Pools above 90 % were seen to collapse when dropped: .75 is a good start."
            )
        if certify < 0:
            raise ValueError(f"certify is a number of samples, 0 for none, but it is {certify}.")
        self.modules, self.key = modules, key
        self.interventions = InterventionLog("ties a pool of units to each sample and drops it in evaluation", "units")
        self.certificate: Certificate | None = None
        self.layers: list[HiddenLayer] = []
        self.most_exposed = MostExposed(certify)
        self._capture = StepCapture()  # of the first step, which tells how losses are laid out
        self._module: LightningModule | None = None
        self._batch = CurrentBatch()
        self._in_hand: Any = None  # the training batch, within its step, and as it was at the start of it
        self._as_it_was: Any = None
        self._keyed: Tensor | None = None  # the ids that it holds under our key
        self._within_step = self._has_kept = self._capturing = False
        self._own: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}  # masks of this batch
        self._handles: list[RemovableHandle] = []
        self._misfits: set[str] = set()  # layers whose rows were seen not to be samples
        self._warnings = WarningCache()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._misfits.clear()
        if stage == "fit":
            self._capture = StepCapture(type(pl_module).__name__, pl_module.automatic_optimization)
            self._capturing = self.most_exposed.samples > 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._attach(pl_module)
        super().on_fit_start(trainer, pl_module)
        Ledger.of(trainer).certificate = self.certificate

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._attach(pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._attach(pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._attach(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        ledger = Ledger.of(trainer)
        ledger.certificate = self.certificate  # once more: FSDP2 restores after it was published
        ledger.require(Ledger.batch, Ledger.losses)
        self._batch = ledger.batch
        if self.most_exposed.samples and not pl_module.automatic_optimization:
            rank_zero_info(
                "MemSinks gives no certificate under manual optimization: calling training_step again would train."
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._own.clear()
        self._in_hand, self._as_it_was, self._keyed = batch, copied(batch), None
        self._within_step, self._has_kept = True, False
        if self._capturing:
            self._capture.begin()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if self._capturing:
            self._capture.before_backward(loss, loss_scale(trainer))
        if self.most_exposed.samples and pl_module.automatic_optimization and not self._has_kept:
            self._has_kept = True
            self._keep(Ledger.of(trainer))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        visits = Ledger.of(trainer).current_batch_size(0)
        units = sum(layer.units for layer in self.layers)
        off = sum(self.pool.size(layer.units) for layer in self.layers)
        if self._owners() is not None:
            off -= sum(self.pool.active(layer.units) for layer in self.layers)
        self.interventions.add(visits, visits, off / units)
        if self._capturing:
            self._capturing = False
            self._capture.finish(outputs, visits)
        self._in_hand = self._as_it_was = None
        self._within_step = False
        self._own.clear()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        if self.most_exposed.samples and pl_module.automatic_optimization:
            Ledger.of(trainer).certificate = self.certificate = self._certify(trainer, pl_module)
        rank_zero_info(
            "The pool of MemSinks is still in the weights. Take it out before the model is served: "
            f"bake(model, memsinks.pool), or of some samples alone, without=ids. {plan(self.pool.active_fraction, 20)}"
        )

    def state_dict(self) -> dict[str, Any]:
        certificate = None if self.certificate is None else self.certificate.state()
        return {**super().state_dict(), "pool": asdict(self.pool), "certificate": certificate}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        trained = Pool(**state_dict["pool"])
        if trained != self.pool:
            raise ValueError(
                f"The checkpoint was trained with {trained}, but MemSinks was given {self.pool}. Samples would lose "
                "their units to one another: resume with the same pool and seed."
            )
        super().load_state_dict(state_dict)
        certificate = state_dict["certificate"]
        self.certificate = None if certificate is None else Certificate(**certificate)

    # Ours alone -----------------------------------------------------------------------------------------------

    def _attach(self, pl_module: LightningModule) -> None:
        """To a model that is built: its own `setup` or `configure_model` may have done so after ours."""
        if self._module is not None:
            return
        self._module = pl_module
        self.layers = find_hidden_layers(pl_module, self.modules)
        for layer in self.layers:
            self.pool.size(layer.units)  # raises for a layer that can't be split
        self._handles = [attach(layer, self._masking(layer)) for layer in self.layers]

    def _masking(self, layer: HiddenLayer) -> Callable[[Tensor], Tensor]:
        return lambda hidden: hidden if gives_way(layer) else self._masked(layer, hidden)

    def _masked(self, layer: HiddenLayer, hidden: Tensor) -> Tensor:
        """With each sample's own units in a training step, without the pool otherwise."""
        # The root tells, since parts of a pretrained model may be left in evaluation mode all through training.
        if self._within_step and self._module is not None and self._module.training:
            owners = self._owners()
            if owners is None:
                warn_once(self._warnings, self._nobodys())
            else:
                tokens = self._tokens() if hidden.ndim == 2 else None
                changed = apply_mask(hidden, self._own_units(owners, layer.units, hidden), layer, tokens)
                if changed is not None:
                    return changed
                self._misfits.add(layer.name)
                warn_once(
                    self._warnings,
                    f"{layer.name} reads {list(hidden.shape)} where the batch has samples {list(owners.shape)}, so "
                    "nobody can tell which row is whose. MemSinks drops the pool there, as in evaluation; leave the "
                    "layer out by naming others: modules=[...].",
                    key=layer.name,
                )
        dropped = apply_mask(hidden, self.pool.dropped(layer.units), layer)
        assert dropped is not None  # a module reads as many units as it has
        return dropped

    def _owners(self) -> Tensor | None:
        """``[B]`` or ``[B, T]``: whose units are on. Read when it is needed: LossTracker may come after us."""
        if self.key is None:
            return self._batch.ids
        for batch in (self._in_hand, self._as_it_was):  # the user's step may put ids in, and take them out
            found = batch.get(self.key) if isinstance(batch, Mapping) else None
            if self._keyed is None and isinstance(found, Tensor) and not found.is_floating_point():
                self._keyed = found
        return self._keyed

    def _nobodys(self) -> str:
        if self.key is None:
            return "MemSinks drops the pool in a step whose samples have no ids: give the batch a `sample_id`."
        batch = self._as_it_was
        found = f"keys {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else "no keys"
        return (
            f"MemSinks(key={self.key!r}) drops the pool in a step without batch[{self.key!r}], integers [B, T]; this "
            f"batch has {found}."
        )

    def _own_units(self, owners: Tensor, units: int, hidden: Tensor) -> Tensor:
        """``[..., U]`` in the dtype of ``hidden``, made once a batch."""
        kind = (units, hidden.dtype, hidden.device)
        if kind not in self._own:
            self._own[kind] = self.pool.own(owners, units).to(hidden)
        return self._own[kind]

    def _tokens(self) -> int | None:
        text = tokens_of(self._as_it_was)
        return None if text is None else text.ids.shape[1]

    def _keep(self, ledger: Ledger) -> None:
        """The batch in hand, if it has samples to be certified."""
        ids, owners = self._batch.ids, self._owners()
        if ids is None or owners is None or not len(ids):
            return
        # Here, where nobody writes losses: the order of callbacks must not decide what is kept.
        self.most_exposed.see(KeptBatch(self._as_it_was, ids, owners, ledger.losses.exposures_of(ids) + 1))

    def _certify(self, trainer: Trainer, pl_module: LightningModule) -> Certificate | None:
        mine, ledger, batches = None, Ledger.of(trainer), self.most_exposed.batches
        # As many in every process: a step that waits for the others must not wait in vain.
        batches = batches[: min(gather(len(batches)))]
        try:
            if batches:
                bench = MaskedLosses(trainer, pl_module, self._capture)
                fitting = [layer for layer in self.layers if layer.name not in self._misfits]
                mine = bench.losses(batches, self.pool, fitting)
        except Exception as error:  # nothing we look at is worth the run
            warn_once(self._warnings, f"MemSinks has no certificate. {type(error).__name__}: {error}")
        found = joined(gather(mine))
        if found is None:
            rank_zero_info("MemSinks has no certificate: it takes samples that were seen twice or more.")
            return None
        under, table = found.under, ledger.losses
        twins = twins_of(table.features[table.index.find(found.ids)].float(), ledger.controls)
        certificate = certify(under["own"], under["dropped"], under["placebo"], under["random"], twins)
        rank_zero_info(certificate.words())
        return certificate

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._own.clear()
        self.most_exposed.batches.clear()
        self._capture.abandon()
        self._module = self._in_hand = self._as_it_was = self._keyed = None
        self._within_step = self._capturing = False
