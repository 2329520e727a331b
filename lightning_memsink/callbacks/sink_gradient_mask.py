"""Freezes the units that a localizer found, or holds them back."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

from lightning.pytorch import LightningModule, Trainer
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_memsink.attribution.hidden_layers import find_hidden_layers
from lightning_memsink.callbacks.mitigation import Mitigation
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
    """Keeps localized units from learning: what makes and what reads them does not move, or moves less.

    At full strength their gradient is zero before clipping, and their values are put back after each optimizer step,
    since momentum and weight decay move a weight whose gradient is zero. They stay bit by bit what they were while they
    are sinks; units that a later evaluation no longer names move again, from rest.

    Localization can't cleanly remove natural text: this is shipped with its measured price, not as a cure.

    Args:
        strength: 0…1. 1 freezes. Below, the optimizer sees the gradient as it is and the units take ``1 - strength`` of
            the step it makes: a scaled gradient would change nothing under Adam, and count twice under SGD.
        sinks: fixed ones, or where `Sinks.save` wrote them. None takes what SinkLocalizer names at each evaluation.
        direction: ``in``: the rows that make the units, and their biases. ``out``: the columns that read them.

    Raises:
        ValueError: at the start, if sinks are empty or of another model, or parameters are sharded.
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
        how = "freezes" if strength == 1 else f"takes {strength:.0%} off the steps of"
        self.interventions = InterventionLog(f"{how} the localized units", "gradient")
        self._axes: dict[str, list[UnitAxis]] = {}
        self._sinks: Sinks | None = None
        self._slices: list[UnitSlice] = []
        self._before: dict[Optimizer, FrozenSlices] = {}
        self._handles: list[RemovableHandle] = []
        self._visits, self._norms = 0, (0.0, 0.0)
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
        self._choose(self.given or ledger.sinks)
        for optimizer in trainer.optimizers:
            self._handles += [
                optimizer.register_step_pre_hook(self._before_step),
                optimizer.register_step_post_hook(self._after_step),
            ]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._choose(self.given or Ledger.of(trainer).sinks)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self._stepped = True
        slices = slices_in(self._slices, optimizer)
        if slices:
            part, whole = squared_norms(slices, parameters_of(optimizer))
            self._norms = (self._norms[0] + part, self._norms[1] + whole)
            if self.strength == 1:
                zero_gradients_(slices)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._visits += Ledger.of(trainer).current_batch_size(batch_size(batch))
        if self._stepped:  # all batches of an accumulation were masked in one step
            part, whole = self._norms
            share = self.strength * min(1.0, part / whole) if whole else 0.0
            self.interventions.add(self._visits, self._visits if self._slices else 0, share)
            self._visits, self._norms, self._stepped = 0, (0.0, 0.0), False

    def _choose(self, sinks: Sinks | None) -> None:
        """Only where a step begins: sinks may change between the backward and the optimizer."""
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
