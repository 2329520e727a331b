"""Dropout of localized units, so that memorized samples can't rely on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import WarningCache
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_memsink._lightning import warn_once
from lightning_memsink.attribution.hidden_layers import HiddenLayer, find_hidden_layers
from lightning_memsink.attribution.token_owners import at_tokens
from lightning_memsink.callbacks.runtime.mitigation import Mitigation
from lightning_memsink.callbacks.runtime.packed_batches import PackedBatches
from lightning_memsink.detection.verdicts import Verdict, verdicts_of
from lightning_memsink.ledger import Ledger
from lightning_memsink.localization.sink_layers import given_sinks, sink_layers
from lightning_memsink.localization.sinks import Sinks
from lightning_memsink.mitigation.intervention_log import InterventionLog
from lightning_memsink.mitigation.unit_dropout import dropout_mask, samples_in, zero_units
from lightning_memsink.samples.batch import batch_size
from lightning_memsink.samples.documents import Documents


class SinkDropout(Mitigation):
    """Drops each localized unit with probability ``p``, drawn for each sample, while training.

    The draw for a sample and unit applies to all of the sample's tokens and to every call of the layer in that batch,
    also where activation checkpointing runs the forward again. The units that stay on are not scaled up: that would
    train more the very units that are to be trained less. In evaluation, all units are on. If nothing is to be dropped,
    activations are unchanged.

    Localized units can't be removed cleanly for natural text; the README gives the measured cost.

    Args:
        p: probability in 0…1; at 1, the units are always off.
        who: ``flagged``: drop for samples flagged as memorized at the start of the batch. ``all``: for every sample.
        sinks: fixed sinks, or the file that `Sinks.save` wrote. None takes the sinks that SinkLocalizer finds at each
            evaluation.
        modules: the patterns that SinkLocalizer was given, if any.
        seed: of the draws. They depend on it, the epoch, the batch and the process, and on no other generator.

    Raises:
        ValueError: at the start, if the sinks are empty or of another model, or SinkLocalizer records other layers.
    """

    saves_samples = False

    def __init__(
        self,
        p: float = 0.5,
        who: Literal["flagged", "all"] = "flagged",
        sinks: Sinks | str | Path | None = None,
        modules: Sequence[str] | None = None,
        seed: int = 0,
    ) -> None:
        if not 0 <= p <= 1:
            raise ValueError(f"p is a probability between 0 and 1, but it is {p}.")
        if who not in ("flagged", "all"):
            raise ValueError(f"who is 'flagged' or 'all', but it is {who!r}.")
        self.p, self.who, self.modules, self.seed = p, who, modules, seed
        self.given = None if sinks is None else given_sinks(sinks)
        samples = "samples flagged as memorized" if who == "flagged" else "every sample"
        self.interventions = InterventionLog(
            f"drops the localized units for {samples}, each with probability {p:g}", "units"
        )
        self.layers: list[HiddenLayer] = []
        self._handles: list[RemovableHandle] = []
        self._ledger = Ledger()
        self._packed = PackedBatches()
        self._batch: _Batch | None = None
        self._warnings = WarningCache()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        given = self.given
        self.layers = find_hidden_layers(pl_module, self.modules) if given is None else sink_layers(pl_module, given)
        # Before all other hooks, so that those that record activations see the same in any order of callbacks.
        self._handles = [
            layer.module.register_forward_pre_hook(self._dropout_hook(pl_module, number, layer), prepend=True)
            for number, layer in enumerate(self.layers)
        ]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        ledger = Ledger.of(trainer)
        if self.who == "flagged":
            ledger.require(Ledger.batch, Ledger.losses, Ledger.flags)
        if self.given is None:
            ledger.require(Ledger.sinks)
            missing = [name for name in ledger.attribution.units if name not in {layer.name for layer in self.layers}]
            if missing:
                raise ValueError(
                    f"SinkLocalizer records {missing[0]}, and SinkDropout has no such layer. Give both the same "
                    "modules=[...]."
                )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._ledger = Ledger.of(trainer)
        key = (self.seed, trainer.global_rank, trainer.current_epoch, batch_idx)
        self._batch = _Batch(key, batch_size(batch) or 0, self.given or self._ledger.sinks)
        if self._ledger.get(Ledger.batch) is None:  # else LossTracker knows them, maybe not before the forward
            self._batch.set_documents(self._packed.documents_in(batch))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        current, self._batch = self._batch, None
        if current is not None:
            acted = 0 if current.samples is None else int(current.samples.sum())
            dropped = sum(int(mask.sum()) for mask in current.dropped.values())
            total = current.size * sum(layer.units for layer in self.layers)
            self.interventions.add(current.size, acted, dropped / max(1, total))

    # Private ------------------------------------------------------------------------------------------------------

    def _dropout_hook(
        self, pl_module: LightningModule, number: int, layer: HiddenLayer
    ) -> Callable[[nn.Module, Any], Any]:
        def drop(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            # The root's mode tells training from evaluation: a pretrained part of it may stay in eval() throughout.
            if self._batch is None or not pl_module.training or self._batch.units(layer) is None:
                return None
            dropped = self._dropped(self._batch, number, layer, args)
            if dropped is None:
                return None
            return (zero_units(args[0], dropped, layer, self._batch.places(args[0], layer)), *args[1:])

        return drop

    def _dropped(self, batch: _Batch, number: int, layer: HiddenLayer, args: tuple[Any, ...]) -> Tensor | None:
        """Bool ``[B, U]``; None if no unit is to be dropped."""
        if batch.samples is None:  # in the forward, since the batch's ids are not known before
            if self._ledger.get(Ledger.batch) is not None:
                batch.set_documents(self._ledger.batch.documents)
            batch.size = self._ledger.current_batch_size(batch.size)
            batch.samples = self._chosen_samples(batch.size)
        if not batch.samples.any():
            return None
        refusal = batch.mismatch(args[0], layer) if args and isinstance(args[0], Tensor) else "has no batch axis"
        if refusal:
            warn_once(
                self._warnings, f"SinkDropout drops nothing in {layer.name}: its input {refusal}.", key=layer.name
            )
            return None
        if number not in batch.dropped:
            units = batch.units(layer)
            assert units is not None
            batch.dropped[number] = dropout_mask((*batch.key, number), batch.samples, units, layer.units, self.p)
        return batch.dropped[number]

    def _chosen_samples(self, size: int) -> Tensor:
        """Bool ``[B]``: the samples that units may be dropped for."""
        if self.who == "all":
            return torch.ones(size, dtype=torch.bool)
        ledger = self._ledger
        if ledger.batch.ids is None:
            warn_once(
                self._warnings,
                "SinkDropout drops nothing in a batch whose samples have no ids: see LossTracker's `identity`.",
            )
            return torch.zeros(size, dtype=torch.bool)
        return verdicts_of(ledger.batch.ids, ledger.losses, ledger.flags) == Verdict.MEMORIZED

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._batch = None


@dataclass
class _Batch:
    """The current batch, from its start to its end."""

    key: tuple[int, ...]
    """Numbers that identify its draws."""
    size: int
    """B"""
    sinks: Sinks | None
    samples: Tensor | None = None
    """``[B]`` bool, the samples that units may be dropped for; None before the forward."""
    dropped: dict[int, Tensor] = field(default_factory=dict)
    """``[B, U]`` bool by the layer's number, drawn at the layer's first call."""
    owners: Tensor | None = None
    """``[R, T]`` or ``[N]``: the sample of each token, where rows hold several documents."""

    def set_documents(self, documents: Documents | None) -> None:
        """Has draws made for each document where the rows of the batch hold several."""
        if documents is not None:
            self.size, self.owners = documents.count, documents.owners

    def places(self, hidden: Tensor, layer: HiddenLayer) -> Tensor | None:
        """The sample of each token in the order of ``hidden``; None if each row is a sample."""
        return None if self.owners is None else at_tokens(self.owners, hidden, layer.batch_axis, layer.unit_axis)

    def mismatch(self, hidden: Tensor, layer: HiddenLayer) -> str:
        """Why the rows of a layer's input are not the samples of the batch; empty if they are."""
        if self.owners is not None:
            fits = hidden.shape[layer.unit_axis] == layer.units and self.places(hidden, layer) is not None
            tokens = list(self.owners.shape)
            return "" if fits else f"{list(hidden.shape)} is not of the {tokens} tokens of the documents in the batch"
        rows = samples_in(hidden, layer)
        found = "no batch axis" if rows is None else f"{rows} rows"
        return "" if rows == self.size else f"has {found} where the batch has {self.size} samples"

    def units(self, layer: HiddenLayer) -> Tensor | None:
        """``[k]`` the sinks of a layer; None if it has none."""
        units = None if self.sinks is None else self.sinks.units.get(layer.name)
        return units if units is not None and len(units) else None
