"""Freezes localized units, or shortens their optimizer steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

from lightning.pytorch import LightningModule, Trainer
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_memsink.attribution.hidden_layers import find_hidden_layers
from lightning_memsink.callbacks.runtime.mitigation import Mitigation
from lightning_memsink.ledger import Ledger
from lightning_memsink.localization.sink_layers import given_sinks, sink_layers
from lightning_memsink.localization.sinks import Sinks
from lightning_memsink.mitigation.intervention_log import InterventionLog
from lightning_memsink.mitigation.unit_freezing import (
    FrozenSlices,
    parameters_of,
    slices_in,
    squared_norms,
    zero_gradients_,
)
from lightning_memsink.mitigation.unit_parameters import Direction, UnitAxis, UnitSlice, unit_axes, unit_slices
from lightning_memsink.samples.batch import batch_size


class SinkGradientMask(Mitigation):
    """Freezes the weights that write and read localized units, or shortens their optimizer steps.

    At strength 1, their gradient is zeroed before clipping, and their values are restored after each optimizer step,
    since momentum and weight decay move a weight whose gradient is zero. So they stay the same bit for bit while the
    units are sinks. When a later evaluation no longer finds a unit, its weights move again, with momentum 0.

    Localized units can't be removed cleanly for natural text; the README gives the measured cost.

    Args:
        strength: above 0, at most 1, which freezes. Below 1, the optimizer gets the unchanged gradient, and the weights
            take ``1 - strength`` of its step: a scaled gradient would change nothing under Adam.
        sinks: fixed sinks, or the file that `Sinks.save` wrote. None takes the sinks that SinkLocalizer finds at each
            evaluation.
        direction: ``in``: the rows that write the units, and their biases. ``out``: the columns that read them.
            ``both``: all of these.

    Raises:
        ValueError: at the start, if the sinks are empty or of another model, or parameters are sharded.
    """

    reads = "weights"
    saves_samples = False

    def __init__(
        self, strength: float = 1.0, sinks: Sinks | str | Path | None = None, direction: Direction = "both"
    ) -> None:
        if not 0 < strength <= 1:
            raise ValueError(f"strength is above 0 and at most 1, which freezes, but it is {strength}.")
        if direction not in get_args(Direction):
            raise ValueError(f"direction is 'in', 'out' or 'both', but it is {direction!r}.")
        self.strength, self.direction = strength, direction
        self.given = None if sinks is None else given_sinks(sinks)
        verb = "freezes" if strength == 1 else f"shortens by {strength:.0%} the steps of"
        self.interventions = InterventionLog(f"{verb} the localized units", "gradient")
        self._axes: dict[str, list[UnitAxis]] = {}
        self._sinks: Sinks | None = None
        self._slices: list[UnitSlice] = []
        self._before: dict[Optimizer, FrozenSlices] = {}
        self._handles: list[RemovableHandle] = []
        self._visits, self._norms = 0, (0.0, 0.0)  # since the last step; squared norms of the masked and all gradients
        self._stepped = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._detach()
        ledger = Ledger.of(trainer)
        if self.given is not None:
            layers = sink_layers(pl_module, self.given)
        else:
            ledger.require(Ledger.sinks)
            layers = find_hidden_layers(pl_module, list(ledger.attribution.units))
        self._axes = unit_axes(pl_module, layers, self.direction)
        self._update_slices(self.given or ledger.sinks)
        for optimizer in trainer.optimizers:
            self._handles += [
                optimizer.register_step_pre_hook(self._before_step),
                optimizer.register_step_post_hook(self._after_step),
            ]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._update_slices(self.given or Ledger.of(trainer).sinks)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self._stepped = True
        slices = slices_in(self._slices, optimizer)
        if slices:
            masked, total = squared_norms(slices, parameters_of(optimizer))
            self._norms = (self._norms[0] + masked, self._norms[1] + total)
            if self.strength == 1:
                zero_gradients_(slices)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._visits += Ledger.of(trainer).current_batch_size(batch_size(batch))
        if self._stepped:  # one step masks all batches of an accumulation
            masked, total = self._norms
            share = self.strength * min(1.0, masked / total) if total else 0.0
            self.interventions.add(self._visits, self._visits if self._slices else 0, share)
            self._visits, self._norms, self._stepped = 0, (0.0, 0.0), False

    def _update_slices(self, sinks: Sinks | None) -> None:
        """Called at the start of a batch: sinks may change between the backward and the optimizer step."""
        if sinks is not self._sinks:
            self._sinks = sinks
            self._slices = [] if sinks is None else unit_slices(self._axes, sinks)

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        slices = slices_in(self._slices, optimizer)
        if slices:
            self._before[optimizer] = FrozenSlices(slices, optimizer)

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        before = self._before.pop(optimizer, None)
        if before is not None and self.strength == 1:
            before.freeze_()
        elif before is not None:
            before.scale_(1 - self.strength)

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._before.clear()
        self._sinks, self._slices = None, []
