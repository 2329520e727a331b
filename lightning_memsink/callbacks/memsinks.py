"""Designed sinks in training (MemSinks, Ghosal et al. 2025): each sample trains pool units of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning_utilities.core.rank_zero import WarningCache
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lightning_memsink._lightning import warn_once
from lightning_memsink.attribution.hidden_layers import HiddenLayer, find_hidden_layers
from lightning_memsink.callbacks.runtime.certificate_losses import CertificateRecorder, shallow_copy
from lightning_memsink.callbacks.runtime.mitigation import Mitigation
from lightning_memsink.ledger import CurrentBatch, Ledger
from lightning_memsink.mitigation.certificate import Certificate
from lightning_memsink.mitigation.certificate_samples import KeptBatch
from lightning_memsink.mitigation.designed_sinks import (
    Pool,
    apply_mask,
    is_overridden,
    plan,
    register_input_hook,
)
from lightning_memsink.mitigation.intervention_log import InterventionLog
from lightning_memsink.samples.tokens import tokens_of

MAX_SAFE_POOL = 0.9
"""Models with a larger pool were seen to collapse when the pool is dropped."""


@dataclass
class _Step:
    """A training step, from the start of its batch to the end."""

    batch: Any
    """The batch that the user's step receives; the step may add entries to it and remove some."""
    original: Any
    """A shallow copy of the batch from before the step."""
    masks: dict[tuple[int, torch.dtype, torch.device], Tensor] = field(default_factory=dict)
    """``[..., U]`` masks with each sample's own units on, by U, dtype and device."""
    is_kept: bool = False
    """Whether the batch was offered to the certificate."""
    _ids: Tensor | None = None

    def ids_at(self, key: str) -> Tensor | None:
        """The integers at ``key`` of the batch, as first seen; None if there are none."""
        for batch in (self.batch, self.original):
            ids = batch.get(key) if isinstance(batch, Mapping) else None
            if self._ids is None and isinstance(ids, Tensor) and not ids.is_floating_point():
                self._ids = ids
        return self._ids


class MemSinks(Mitigation):
    """Reserves a pool of hidden units, trains each sample with its own few of them, and drops the pool in evaluation.

    The method is MemSinks (Ghosal et al. 2025). In a training step, every hidden layer runs with the shared units and
    the pool units that the sample's id owns. Anywhere else (``pl_module.eval()``, or outside a step), it runs with the
    shared units alone. Activations are not rescaled. The weights keep the pool: `bake` removes it before the model is
    served.

    Where rows hold several documents, each token runs with the units of its own document. A step without ids runs
    without the pool, as in evaluation. So does a layer whose rows are not the samples of the batch, as in a mixture of
    experts. A warning reports this once.

    Args:
        pool_fraction: share of each layer's hidden units to reserve as the pool.
        active_fraction: share of the pool that each sample owns.
        modules: name patterns (``"model.*.mlp.down_proj"``) of the modules that read the hidden units. None finds them.
        key: name of per-token ids ``[B, T]`` in the batch, where the units are not to follow the samples. None uses the
            sample ids, which are those of documents where rows hold several.
        seed: of the assignment of units to ids.
        certify: number of samples to measure at the end of fit for the certificate in the ledger; 0 for none. Each
            process measures as many of its own, and the same sample counts once.

    Raises:
        ValueError: a fraction is not between 0 and 1; at the start, the model has no hidden layer or is compiled; on a
            resume, the pool or its seed differ from the checkpoint's.
    """

    saves_samples = False

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
        if pool_fraction > MAX_SAFE_POOL:
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
        self._recorder = CertificateRecorder(certify)
        self._module: LightningModule | None = None
        self._batch = CurrentBatch()
        self._step: _Step | None = None
        self._handles: list[RemovableHandle] = []
        self._unmasked: set[str] = set()  # names of layers whose rows were not the samples of the batch
        self._warnings = WarningCache()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._unmasked.clear()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._attach(pl_module)
        super().on_fit_start(trainer, pl_module)
        Ledger.of(trainer).certificate = self.certificate

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_start(trainer, pl_module)
        self._attach(pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._attach(pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._attach(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        ledger = Ledger.of(trainer)
        ledger.certificate = self.certificate  # once more: FSDP2 restores after on_fit_start
        ledger.require(Ledger.batch, Ledger.losses)
        self._batch = ledger.batch
        self._recorder.start(pl_module, self._batch.reader)
        if self._recorder.samples and not self._recorder.is_active:
            rank_zero_info(
                "MemSinks gives no certificate under manual optimization: calling training_step again would train."
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._step = _Step(batch, shallow_copy(batch))

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if self._batch.ids is not None:
            self._recorder.before_backward(loss, trainer)
        if self._recorder.is_active and self._step is not None and not self._step.is_kept:
            self._keep_for_certificate(self._step, Ledger.of(trainer))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        visits = Ledger.of(trainer).current_batch_size(0)
        units = sum(layer.units for layer in self.layers)
        off = sum(self.pool.size(layer.units) for layer in self.layers)
        if self._owners() is not None:
            off -= sum(self.pool.active(layer.units) for layer in self.layers)
        self.interventions.add(visits, visits, off / units)
        self._recorder.end_step(outputs, visits)
        self._step = None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        if self._recorder.is_active:
            layers = [layer for layer in self.layers if layer.name not in self._unmasked]
            self.certificate = self._recorder.certify(trainer, pl_module, self.pool, layers)
            Ledger.of(trainer).certificate = self.certificate
        rank_zero_info(
            "The weights still hold the pool of MemSinks. Remove it before the model is served: "
            "bake(model, memsinks.pool). To remove the units of some samples only, add without=ids. "
            f"{plan(self.pool.active_fraction, 20)}"
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

    # Private ------------------------------------------------------------------------------------------------------

    def _attach(self, pl_module: LightningModule) -> None:
        """Registers the masks. Later than in `setup`, where the user's own `configure_model` may not have run yet."""
        if self._module is not None:
            return
        self._module = pl_module
        self.layers = find_hidden_layers(pl_module, self.modules)
        for layer in self.layers:
            self.pool.size(layer.units)  # raises for a layer that can't be split
        self._handles = [register_input_hook(layer, self._mask_of(layer)) for layer in self.layers]

    def _mask_of(self, layer: HiddenLayer) -> Callable[[Tensor], Tensor]:
        return lambda hidden: hidden if is_overridden(layer) else self._masked(layer, hidden)

    def _masked(self, layer: HiddenLayer, hidden: Tensor) -> Tensor:
        """``hidden`` with each sample's own pool units in a training step, without the pool otherwise."""
        # The mode of the root module decides: parts of a pretrained model may stay in evaluation mode throughout.
        if self._step is not None and self._module is not None and self._module.training:
            owners = self._owners()
            if owners is None:
                warn_once(self._warnings, self._missing_ids(self._step))
            else:
                mask = self._own_units(self._step, owners, layer.units, hidden)
                tokens = self._tokens(self._step) if hidden.ndim == 2 else None
                changed = apply_mask(hidden, mask, layer, tokens)
                if changed is not None:
                    return changed
                self._unmasked.add(layer.name)
                warn_once(
                    self._warnings,
                    f"{layer.name} reads {list(hidden.shape)}, and the ids of the batch are {list(owners.shape)}: its "
                    "rows are not the samples of the batch. MemSinks drops the pool there, as in evaluation. To leave "
                    "the layer out, name the others: modules=[...].",
                    key=layer.name,
                )
        dropped = apply_mask(hidden, self.pool.dropped(layer.units), layer)
        assert dropped is not None  # a module reads as many units as it has
        return dropped

    def _owners(self) -> Tensor | None:
        """``[B]`` or ``[B, T]`` ids whose pool units are on; None without ids. Read late: LossTracker, which sets the
        sample ids, may come after this callback."""
        if self.key is None:
            ids, documents = self._batch.ids, self._batch.documents
            if ids is None or documents is None:
                return ids
            # Padding has the units of the first one, so that no other id has a part in the certificate's placebo.
            by_token: Tensor = torch.atleast_2d(documents.by_token(ids, int(ids[0])))
            return by_token
        return None if self._step is None else self._step.ids_at(self.key)

    def _missing_ids(self, step: _Step) -> str:
        """The warning for a step without ids."""
        if self.key is None:
            return "MemSinks drops the pool in a step whose samples have no ids: give the batch a `sample_id`."
        batch = step.original
        keys = f"keys {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else "no keys"
        return (
            f"MemSinks(key={self.key!r}) drops the pool in a step without batch[{self.key!r}], integers [B, T]; this "
            f"batch has {keys}."
        )

    def _own_units(self, step: _Step, owners: Tensor, units: int, hidden: Tensor) -> Tensor:
        """``[..., U]`` in the dtype of ``hidden``, computed once a step."""
        kind = (units, hidden.dtype, hidden.device)
        if kind not in step.masks:
            unique, inverse = owners.unique(return_inverse=True)  # of tokens there are many more than ids
            own = self.pool.own(unique, units).to(hidden, non_blocking=True)
            step.masks[kind] = own[inverse.to(hidden.device, non_blocking=True)]
        return step.masks[kind]

    def _tokens(self, step: _Step) -> int | None:
        """T; None if the batch is not of tokens."""
        text = tokens_of(step.original)
        return None if text is None else text.ids.shape[1]

    def _keep_for_certificate(self, step: _Step, ledger: Ledger) -> None:
        step.is_kept = True
        ids, owners = self._batch.ids, self._owners()
        if ids is None or owners is None or not len(ids):
            return
        # Exposures are read here, in a hook that writes no losses, so that they don't depend on the order of callbacks.
        exposures = ledger.losses.exposures_of(ids) + 1
        self._recorder.keep(KeptBatch(step.original, ids, owners, exposures, self._batch.documents))

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._recorder.detach()
        self._module = self._step = None
