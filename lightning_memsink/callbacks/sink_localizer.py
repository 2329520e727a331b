"""Where memorization sits: attribution by unit and layer, from the user's own backward on sampled steps."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from lightning_utilities.core.rank_zero import WarningCache
from torch import Tensor
from torch.optim import Optimizer

from lightning_memsink._distributed import gather
from lightning_memsink._lightning import warn_once
from lightning_memsink.attribution.gradient_norms import GradientNorms
from lightning_memsink.attribution.hidden_layers import HiddenLayer, describe, find_hidden_layers
from lightning_memsink.attribution.unit_effects import margins, shares
from lightning_memsink.attribution.unit_recorder import UnitRecorder
from lightning_memsink.attribution.update_norms import UpdateNorms, block_of
from lightning_memsink.callbacks.runtime.checkpointing import restoring
from lightning_memsink.callbacks.runtime.gradient_alignment import GradientAlignment
from lightning_memsink.callbacks.runtime.strategies import require_support
from lightning_memsink.detection.verdicts import verdicts_of
from lightning_memsink.ledger import Ledger
from lightning_memsink.localization.history import LocalizationHistory


class SinkLocalizer(Callback):
    """Says in which layers and units memorized samples have their effect, at each validation.

    On a look, every sample's activation times gradient is read at the hidden layers of the MLPs, and its gradient norm
    in every block, in the backward that training runs anyway. Weights stay bit-identical.

    Args:
        modules: name patterns (``"model.*.mlp.down_proj"``) of the modules that read the hidden units. None finds them.
        every: optimizer steps between two looks; 1 looks at every step.
        objective: what is attributed. ``loss``: nothing is added to the step. ``margin``: by how much the right class
            beats the next, which tells more of samples whose loss has vanished, for one more backward on each look.
        norms: also take exact gradient norms, and how far each block's weights move.
        agreement: also take the cosine of each sample's gradient with that of a batch of controls, for a forward and a
            backward of our own after each validation. Not under manual optimization, nor FSDP2.
        fraction: of all units, named as sinks.

    Raises:
        ValueError: at the start of fit, if the model has no hidden layer, is compiled, or a pattern matches nothing.
    """

    def __init__(
        self,
        modules: Sequence[str] | None = None,
        every: int = 8,
        objective: Literal["loss", "margin"] = "loss",
        norms: bool = True,
        agreement: bool = False,
        fraction: float = 0.01,
    ) -> None:
        if every < 1:
            raise ValueError(f"every is a number of optimizer steps, at least 1, but it is {every}.")
        if objective not in ("loss", "margin"):
            raise ValueError(f"objective is 'loss' or 'margin', but it is {objective!r}.")
        if not 0 < fraction < 1:
            raise ValueError(f"fraction is a share of all units between 0 and 1, but it is {fraction}.")
        self.modules, self.every, self.objective, self.fraction = modules, every, objective, fraction
        self.with_norms, self.with_agreement = norms, agreement
        self.attribution = LocalizationHistory(fraction=fraction)
        self.layers: list[HiddenLayer] = []
        self.units: UnitRecorder | None = None
        self.norms: GradientNorms | None = None
        self.movement: UpdateNorms | None = None
        self.agreement: GradientAlignment | None = None
        self._looking = False
        self._effects: dict[str, Tensor] = {}
        self._warnings = WarningCache()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        require_support(trainer.strategy, "SinkLocalizer")
        self._detach()
        if self.with_agreement:
            require_support(trainer.strategy, "SinkLocalizer(agreement=True)", "gradients")
            if not pl_module.automatic_optimization:
                raise ValueError(
                    "SinkLocalizer(agreement=True) takes the controls' gradient by calling training_step, which trains "
                    "under manual optimization. Leave agreement off."
                )
        self.attribution = LocalizationHistory(fraction=self.fraction)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._attach(pl_module)
        ledger = Ledger.of(trainer)
        ledger.attribution, ledger.sinks = self.attribution, self.attribution.sinks
        ledger.close_with(Ledger.attribution, self._close_evaluation)

    def _attach(self, pl_module: LightningModule) -> None:
        """To a model that is built: `setup` and `configure_model` of the user's may only now have done so."""
        self.layers = find_hidden_layers(pl_module, self.modules)
        blocks = dict.fromkeys(block_of(name) for name, weight in pl_module.named_parameters() if weight.requires_grad)
        self.attribution.of_model({layer.name: layer.units for layer in self.layers}, list(blocks))
        self.units = UnitRecorder(self.layers)
        axis = self.layers[0].batch_axis
        self.norms = GradientNorms(pl_module, axis) if self.with_norms else None
        self.movement = UpdateNorms(pl_module) if self.with_norms else None
        self.agreement = GradientAlignment(pl_module, axis) if self.with_agreement else None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        ledger = Ledger.of(trainer)
        ledger.sinks = self.attribution.sinks  # once more: FSDP2 restores after it was published
        ledger.require(Ledger.batch, Ledger.losses, Ledger.flags)
        rank_zero_info(f"memsink attributes to the hidden units of\n{describe(self.layers)}")
        if self.norms is not None and self.norms.uncovered:
            left_out = ", ".join(f"{name} ({why})" for name, why in list(self.norms.uncovered.items())[:4])
            rank_zero_info(f"memsink takes gradient norms without {left_out}")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._looking = trainer.global_step % self.every == 0
        if self._looking:
            if self.agreement is not None:
                self._open_agreement(trainer, pl_module, self.agreement)  # before the others, who must not see its own
            if self.units is not None:
                self.units.open()
            if self.norms is not None:
                self.norms.open()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if self._looking and self.objective == "margin":
            self._attribute_margin(loss, Ledger.of(trainer).batch.ids)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self._looking and self.movement is not None:
            self.movement.before_step()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._looking:
            return
        self._looking, seen, part = False, None, None
        ledger = Ledger.of(trainer)
        if self.movement is not None:
            part = self.movement.finish(self.attribution.blocks)
        if self.units is not None and ledger.batch.ids is not None:
            try:
                seen = (ledger.batch.ids, *self._finish(len(ledger.batch.ids)))
            except Exception as error:  # nothing we look at is worth the training
                self._give_up(error)
        # Also by a process that has given up: the others wait for it.
        everyone = gather((seen, part))
        parts = [one for _, one in everyone if one is not None]
        movement = torch.stack(parts).sum(0).sqrt() if len(parts) == len(everyone) else None
        for one, _ in everyone:
            if one is not None:
                seen_ids, by_unit, norms, agreement = one
                verdicts = verdicts_of(seen_ids, ledger.losses, ledger.flags)
                self.attribution.record(seen_ids, verdicts, by_unit, norms, movement, agreement)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self.agreement is not None and batch_idx == dataloader_idx == 0 and trainer.state.fn == "fit":
            self.agreement.keep(batch)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._close_evaluation(Ledger.of(trainer))

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Evaluations between validations are written in on_before_backward; this is the next hook nobody writes in.
        self._close_evaluation(Ledger.of(trainer))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close_evaluation(Ledger.of(trainer))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._detach()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._detach()

    def state_dict(self) -> dict[str, Any]:
        return self.attribution.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        with restoring("SinkLocalizer"):
            self.attribution.load_state_dict(state_dict)

    def _close_evaluation(self, ledger: Ledger) -> None:
        self.attribution.close_evaluation(ledger.losses, ledger.flags)
        ledger.sinks = self.attribution.sinks

    def _attribute_margin(self, loss: Tensor, ids: Tensor | None) -> None:
        """A backward of our own, down to the hidden units only; the user's follows and finds nothing recording them."""
        units = self.units
        if units is None or ids is None:
            return
        try:
            with ExitStack() as stack:
                for others in (self.norms, self.agreement):
                    if others is not None:
                        stack.enter_context(others.paused())
                torch.autograd.grad(-margins(loss), units.inputs(), retain_graph=True, allow_unused=True)
            self._effects = units.finish(len(ids))
        except (ValueError, RuntimeError) as error:
            warn_once(self._warnings, f"SinkLocalizer attributes the loss instead of the margin here: {error}")

    def _open_agreement(self, trainer: Trainer, pl_module: LightningModule, agreement: GradientAlignment) -> None:
        try:
            agreement.open(trainer, pl_module)
        except Exception as error:
            self._give_up(error)

    def _finish(self, size: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Signed shares ``[B, U]``, norms ``[B, K]`` and agreement ``[B]`` of the look that ends."""
        assert self.units is not None
        effects, self._effects = self._effects or self.units.finish(size), {}
        for name, why in self.units.left_out.items():
            warn_once(self._warnings, f"SinkLocalizer attributes nothing to {name}: {why}.", key=name)
        by_layer = shares(effects, signed=True)
        nothing = {layer.name: torch.zeros(size, layer.units) for layer in self.layers}
        by_unit = torch.cat([by_layer.get(name, zeros).float().cpu() for name, zeros in nothing.items()], 1)
        norms = None
        if self.norms is not None:
            squared = self.norms.finish(size)
            norms = torch.zeros(size, len(self.attribution.blocks))
            for name, values in squared.items():
                norms[:, self.attribution.blocks.index(block_of(f"{name}.weight"))] += values.float().cpu()
            norms = norms.sqrt()
        agreement = None if self.agreement is None else self.agreement.finish(size)
        return by_unit, norms, None if agreement is None else agreement.float().cpu()

    def _give_up(self, error: Exception) -> None:
        warn_once(
            self._warnings,
            f"SinkLocalizer failed to attribute a step and looks no more; training goes on. "
            f"{type(error).__name__}: {error}",
        )
        self._detach()

    def _detach(self) -> None:
        for hooks in (self.units, self.norms, self.agreement):
            if hooks is not None:
                hooks.remove()
        self.units = self.norms = self.movement = self.agreement = None
        self._effects = {}
