"""Drops the units that a localizer found, so that memorized samples can't rely on them."""

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
from lightning_memsink.callbacks.mitigation import Mitigation
from lightning_memsink.detection.verdicts import Verdict, verdicts_of
from lightning_memsink.ledger import Ledger
from lightning_memsink.localization.sink_layers import given_sinks, sink_layers
from lightning_memsink.localization.sinks import Sinks
from lightning_memsink.mitigation.intervention_log import InterventionLog
from lightning_memsink.mitigation.unit_dropout import dropout_mask, samples_in, zero_units
from lightning_memsink.samples.batch import batch_size


class SinkDropout(Mitigation):
    """Switches each localized unit off with probability ``p``, sample by sample, while training.

    One draw for each sample and unit holds at all of the sample's tokens and in every call of the layer in that batch,
    also where a checkpointed forward runs again. What stays on is not scaled up: that would train the very units more
    that are to be trained less. In evaluation all units are on. Without anything to drop, activations are untouched.

    Localization can't cleanly remove natural text: this is shipped with its measured price, not as a cure.

    Args:
        p: 0…1; at 1 they are always off.
        who: ``flagged``: for samples that stand as memorized when the batch begins. ``all``: for every sample.
        sinks: fixed ones, or where `Sinks.save` wrote them. None takes what SinkLocalizer names at each evaluation.
        modules: the patterns that SinkLocalizer was given, if any.
        seed: of the draws, which depend on it, the epoch, the batch and the process, and on no other generator.

    Raises:
        ValueError: at the start, if sinks are empty or of another model, or SinkLocalizer looks at other layers.
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
        whom = "samples that stand as memorized" if who == "flagged" else "every sample"
        self.interventions = InterventionLog(
            f"drops the localized units for {whom}, each with probability {p:g}", "units"
        )
        self.layers: list[HiddenLayer] = []
        self._handles: list[RemovableHandle] = []
        self._ledger = Ledger()
        self._now: _Batch | None = None
        self._warnings = WarningCache()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        given = self.given
        self.layers = find_hidden_layers(pl_module, self.modules) if given is None else sink_layers(pl_module, given)
        # First among hooks, so that whoever records activations sees the same whatever the order of callbacks.
        self._handles = [
            layer.module.register_forward_pre_hook(self._before(pl_module, place, layer), prepend=True)
            for place, layer in enumerate(self.layers)
        ]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        ledger = Ledger.of(trainer)
        if self.who == "flagged":
            ledger.require(Ledger.batch, Ledger.losses, Ledger.flags)
        if self.given is None:
            ledger.require(Ledger.sinks)
            missed = [name for name in ledger.attribution.units if name not in {layer.name for layer in self.layers}]
            if missed:
                raise ValueError(
                    f"SinkLocalizer looks at {missed[0]}, which SinkDropout does not. Give both the same modules=[...]."
                )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._ledger = Ledger.of(trainer)
        key = (self.seed, trainer.global_rank, trainer.current_epoch, batch_idx)
        self._now = _Batch(key, batch_size(batch) or 0, self.given or self._ledger.sinks)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now, self._now = self._now, None
        if now is not None:
            acted = 0 if now.samples is None else int(now.samples.sum())
            dropped = sum(int(off.sum()) for off in now.off.values())
            whole = now.size * sum(layer.units for layer in self.layers)
            self.interventions.add(now.size, acted, dropped / max(1, whole))

    def _before(self, pl_module: LightningModule, place: int, layer: HiddenLayer) -> Callable[[nn.Module, Any], Any]:
        def drop(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            # The whole module's mode tells training from evaluation: a pretrained part of it may be in eval() for good.
            if self._now is None or not pl_module.training or self._now.units(layer) is None:
                return None
            off = self._off(self._now, place, layer, args)
            return None if off is None else (zero_units(args[0], off, layer), *args[1:])

        return drop

    def _off(self, now: _Batch, place: int, layer: HiddenLayer, args: tuple[Any, ...]) -> Tensor | None:
        """Bool ``[B, U]``; None if nothing is to be dropped."""
        if now.samples is None:  # the first to ask, in the forward, when the batch's ids are known
            now.size = self._ledger.current_batch_size(now.size)
            now.samples = self._samples(now.size)
        if not now.samples.any():
            return None
        rows = samples_in(args[0], layer) if args and isinstance(args[0], Tensor) else None
        if rows != now.size:
            found = "no batch axis that can be told" if rows is None else f"{rows} rows"
            warn_once(
                self._warnings,
                f"SinkDropout drops nothing in {layer.name}: its input has {found} where the batch has {now.size} "
                "samples.",
                key=layer.name,
            )
            return None
        if place not in now.off:
            units = now.units(layer)
            assert units is not None
            now.off[place] = dropout_mask((*now.key, place), now.samples, units, layer.units, self.p)
        return now.off[place]

    def _samples(self, size: int) -> Tensor:
        """Bool ``[B]``: whose units may be dropped."""
        if self.who == "all":
            return torch.ones(size, dtype=torch.bool)
        ledger = self._ledger
        if ledger.batch.ids is None:
            warn_once(
                self._warnings,
                "SinkDropout drops nothing where nobody can tell whose a batch is: see LossTracker's `identity`.",
            )
            return torch.zeros(size, dtype=torch.bool)
        return verdicts_of(ledger.batch.ids, ledger.losses, ledger.flags) == Verdict.MEMORIZED

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._now = None


@dataclass
class _Batch:
    """The batch in hand."""

    key: tuple[int, ...]
    size: int
    """B"""
    sinks: Sinks | None
    samples: Tensor | None = None
    """``[B]`` bool; None until a layer asks."""
    off: dict[int, Tensor] = field(default_factory=dict)
    """``[B, U]`` bool by number of the layer, drawn when it is first called."""

    def units(self, layer: HiddenLayer) -> Tensor | None:
        """``[k]``; None if the layer has no sink."""
        units = None if self.sinks is None else self.sinks.units.get(layer.name)
        return units if units is not None and len(units) else None
