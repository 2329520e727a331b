"""Localization of memorization: attribution by unit and layer, from the user's own backward on sampled steps."""

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
from lightning_memsink.attribution.gradient_norms import GradientNorms, block_norms
from lightning_memsink.attribution.hidden_layers import HiddenLayer, describe, find_hidden_layers
from lightning_memsink.attribution.token_owners import TokenOwners
from lightning_memsink.attribution.unit_effects import concatenated, margins, shares
from lightning_memsink.attribution.unit_recorder import UnitRecorder
from lightning_memsink.attribution.update_norms import UpdateNorms, block_of
from lightning_memsink.callbacks.runtime.checkpointing import restoring
from lightning_memsink.callbacks.runtime.gradient_alignment import GradientAlignment
from lightning_memsink.callbacks.runtime.strategies import require_support
from lightning_memsink.detection.verdicts import verdicts_of
from lightning_memsink.ledger import Ledger
from lightning_memsink.localization.history import LocalizationHistory
from lightning_memsink.localization.sample_attribution import StepAttribution
from lightning_memsink.losses.unreadable import UnreadableLoss


class SinkLocalizer(Callback):
    """Localizes memorized samples at each validation: in which layers and units they have their effect.

    On a recorded step, every sample's activation times gradient is read at the hidden layers of the MLPs, and its
    gradient norm in every block, in the backward that training runs anyway. Weights stay bit-identical.

    Args:
        modules: name patterns (``"model.*.mlp.down_proj"``) of the modules that read the hidden units. None finds them.
        every: optimizer steps between two recorded steps; 1 records every step.
        objective: what is attributed. ``loss``: nothing is added to the step. ``margin``: by how much the right class
            beats the next, which shows more of samples whose loss has vanished, for one more backward on each recorded
            step.
        norms: also take exact gradient norms, and how far each block's weights move.
        agreement: also take the cosine of each sample's gradient with that of a batch of controls, for one more forward
            and backward after each validation. Not under manual optimization, nor FSDP2.
        fraction: of all units, named as sinks.

    Raises:
        ValueError: at the start of fit, if the model has no hidden layer, is compiled, or a pattern matches nothing.
    """

    saves_samples = True

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
        self.norms, self.agreement = norms, agreement
        self.attribution = LocalizationHistory(fraction=fraction)
        self.layers: list[HiddenLayer] = []
        self.unit_recorder: UnitRecorder | None = None
        self.gradient_norms: GradientNorms | None = None
        self.update_norms: UpdateNorms | None = None
        self.gradient_alignment: GradientAlignment | None = None
        self._is_recording = False
        self._has_norms = True  # of the current step
        self._margin_effects: dict[str, Tensor] = {}
        self._warnings = WarningCache()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        require_support(trainer.strategy, "SinkLocalizer")
        self._detach()
        if self.agreement:
            require_support(trainer.strategy, "SinkLocalizer(agreement=True)", "gradients")
            if not pl_module.automatic_optimization:
                raise ValueError(
                    "SinkLocalizer(agreement=True) takes the gradient of the controls by calling training_step, but "
                    f"{type(pl_module).__name__} optimizes manually, so that call would train. Use "
                    "SinkLocalizer(agreement=False)."
                )
        self.attribution = LocalizationHistory(fraction=self.fraction)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._attach(pl_module)
        ledger = Ledger.of(trainer)
        ledger.attribution, ledger.sinks = self.attribution, self.attribution.sinks
        ledger.close_with(Ledger.attribution, self._close_evaluation)

    def _attach(self, pl_module: LightningModule) -> None:
        """Hooks the model, which the user's `setup` and `configure_model` have built only by now."""
        self.layers = find_hidden_layers(pl_module, self.modules)
        blocks = dict.fromkeys(block_of(name) for name, weight in pl_module.named_parameters() if weight.requires_grad)
        self.attribution.set_model(self._units(), list(blocks))
        self.unit_recorder = UnitRecorder(self.layers)
        axis = self.layers[0].batch_axis
        self.gradient_norms = GradientNorms(pl_module, axis) if self.norms else None
        self.update_norms = UpdateNorms(pl_module) if self.norms else None
        self.gradient_alignment = GradientAlignment(pl_module, axis) if self.agreement else None

    def _units(self) -> dict[str, int]:
        return {layer.name: layer.units for layer in self.layers}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        ledger = Ledger.of(trainer)
        ledger.sinks = self.attribution.sinks  # once more: FSDP2 restores after it was published
        ledger.require(Ledger.batch, Ledger.losses, Ledger.flags)
        rank_zero_info(f"SinkLocalizer records the hidden units of\n{describe(self.layers)}")
        if self.gradient_norms is not None and self.gradient_norms.uncovered:
            uncovered = list(self.gradient_norms.uncovered.items())[:4]
            names = ", ".join(f"{name} ({reason})" for name, reason in uncovered)
            rank_zero_info(f"SinkLocalizer takes gradient norms without {names}")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._is_recording, self._has_norms = trainer.global_step % self.every == 0, True
        if self._is_recording:
            if self.gradient_alignment is not None:  # before the others, which must not record its backward
                self._open_alignment(trainer, pl_module, self.gradient_alignment)
            if self.unit_recorder is not None:
                self.unit_recorder.open()
            if self.gradient_norms is not None:
                self.gradient_norms.open()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        documents = Ledger.of(trainer).batch.documents if self._is_recording else None
        if documents is not None:
            self._set_owners(TokenOwners(documents.owners, documents.count))
        if self._is_recording and self.objective == "margin":
            self._attribute_margin(loss, Ledger.of(trainer).batch.ids)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self._is_recording and self.update_norms is not None:
            self.update_norms.before_step()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._is_recording:
            return
        self._is_recording, step, squared_updates = False, None, None
        ledger = Ledger.of(trainer)
        if self.update_norms is not None:
            squared_updates = self.update_norms.finish(self.attribution.blocks)
        if self.unit_recorder is not None and ledger.batch.ids is not None:
            try:
                step = self._finish(self.unit_recorder, ledger.batch.ids)
            except Exception as error:  # no measurement is worth the training
                self._stop_recording(error)
        # Also by a process that has stopped recording: the others wait for it.
        gathered = gather((step, squared_updates))
        parts = [squared for _, squared in gathered if squared is not None]
        update_norms = torch.stack(parts).sum(0).sqrt() if len(parts) == len(gathered) else None
        for one, _ in gathered:
            if one is not None:
                self.attribution.record(one, verdicts_of(one.ids, ledger.losses, ledger.flags), update_norms)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self.gradient_alignment is not None and batch_idx == dataloader_idx == 0 and trainer.state.fn == "fit":
            self.gradient_alignment.keep(batch)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._close_evaluation(Ledger.of(trainer))

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Evaluations between validations are written in on_before_backward; this is the next hook without a writer.
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

    def _set_owners(self, owners: TokenOwners) -> None:
        """Has the recorders attribute documents instead of rows, in the backward that follows."""
        if self.unit_recorder is not None:
            self.unit_recorder.owners = owners
        self._has_norms = owners.can_unpack
        if not self._has_norms:
            warn_once(
                self._warnings,
                "SinkLocalizer takes no gradient norms and no agreement in steps whose documents differ so much in "
                "length that each by itself would not fit into memory.",
                key="lengths",
            )
            return
        if self.gradient_norms is not None:
            self.gradient_norms.owners = owners
        if self.gradient_alignment is not None:
            self.gradient_alignment.set_owners(owners)

    def _attribute_margin(self, loss: Tensor, ids: Tensor | None) -> None:
        """Runs one more backward, down to the hidden units only. The units are not recorded in the user's backward."""
        recorder = self.unit_recorder
        if recorder is None or ids is None:
            return
        try:
            with ExitStack() as stack:
                for other in (self.gradient_norms, self.gradient_alignment):
                    if other is not None:
                        stack.enter_context(other.paused())
                torch.autograd.grad(-margins(loss), recorder.inputs(), retain_graph=True, allow_unused=True)
            self._margin_effects = recorder.finish(len(ids))
        except (UnreadableLoss, ValueError, RuntimeError) as error:
            warn_once(self._warnings, f"SinkLocalizer attributes the loss instead of the margin in this step: {error}")

    def _open_alignment(self, trainer: Trainer, pl_module: LightningModule, alignment: GradientAlignment) -> None:
        try:
            alignment.open(trainer, pl_module)
        except Exception as error:
            self._stop_recording(error)

    def _finish(self, recorder: UnitRecorder, ids: Tensor) -> StepAttribution:
        """What the recorders hold of the step that ends."""
        effects, self._margin_effects = self._margin_effects or recorder.finish(len(ids)), {}
        for name, reason in recorder.left_out.items():
            warn_once(self._warnings, f"SinkLocalizer attributes nothing to {name}: {reason}.", key=name)
        norms, alignment = None, None
        by_unit = concatenated(shares(effects, signed=True), self._units(), len(ids))
        if self.gradient_norms is not None and self._has_norms:
            norms = block_norms(self.gradient_norms.finish(len(ids)), self.attribution.blocks, len(ids))
        if self.gradient_alignment is not None and self._has_norms:
            alignment = self.gradient_alignment.finish(len(ids))
        return StepAttribution(ids, by_unit, norms, None if alignment is None else alignment.float().cpu())

    def _stop_recording(self, error: Exception) -> None:
        warn_once(
            self._warnings,
            f"SinkLocalizer failed on a step and stops recording; training goes on. {type(error).__name__}: {error}",
        )
        self._detach()

    def _detach(self) -> None:
        for hooks in (self.unit_recorder, self.gradient_norms, self.gradient_alignment):
            if hooks is not None:
                hooks.remove()
        self.unit_recorder = self.gradient_norms = self.update_norms = self.gradient_alignment = None
        self._margin_effects = {}
