"""Which samples are memorized, and since when: reads losses and controls, writes flags and onset."""

from __future__ import annotations

import math
from collections.abc import Sized
from dataclasses import asdict
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_memsink.callbacks.runtime.checkpointing import restoring
from lightning_memsink.callbacks.runtime.interrupts import interrupts_deferred
from lightning_memsink.detection.evaluate import evaluate
from lightning_memsink.detection.matched_controls import DetectionRule
from lightning_memsink.detection.onset import estimate_onset
from lightning_memsink.detection.statistics import controls_for
from lightning_memsink.detection.verdicts import Flags, Onset
from lightning_memsink.ledger import Ledger
from lightning_memsink.samples.loss_table import REMEDY


class MemorizationDetector(Callback):
    """Says of every sample whether it is memorized, learned, hard, unseen or undecided, at each validation.

    Args:
        alpha: false-discovery rate over samples (Benjamini-Hochberg).
        k: held-out controls that a sample is compared with.
        method: ``knn``: the mean of the k nearest controls. ``ridge``: a regression on the same features.
        min_gap: smallest effect in nats per token that may be flagged.
        null_sds: the same in standard deviations of the controls' own gaps; the larger of the two holds.
        consecutive: evaluations in a row that must agree before a sample stands as memorized.
        reach: how far from its controls a sample may lie, in units of what 99 % of them lie from one another.
    """

    saves_samples = True

    def __init__(
        self,
        alpha: float = 0.05,
        k: int = 8,
        method: Literal["knn", "ridge"] = "knn",
        min_gap: float = 1.0,
        null_sds: float = 4.0,
        consecutive: int = 2,
        reach: float = 2.0,
    ) -> None:
        self.rule = DetectionRule(alpha, k, method, min_gap, null_sds, reach)
        if consecutive < 1:
            raise ValueError(f"consecutive is a number of evaluations, at least 1, but it is {consecutive}.")
        self.consecutive = consecutive
        self.flags = Flags()
        self.onset: Onset | None = None
        self._told = self._warned = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        ledger = Ledger.of(trainer)
        ledger.flags = self.flags
        ledger.onset = self.onset

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        ledger = Ledger.of(trainer)
        ledger.onset = self.onset  # once more: FSDP2 restores after it was published
        ledger.require(Ledger.losses, Ledger.controls)
        if len(self.flags.verdict) > len(ledger.losses):
            raise ValueError(
                f"MemorizationDetector resumes with verdicts on {len(self.flags.verdict)} samples, but LossTracker "
                f"knows {len(ledger.losses)}: they come from different ledgers. {REMEDY}"
            )
        if not trainer.enable_validation and not ledger.controls.expected:
            rank_zero_warn(
                "MemorizationDetector has no controls: this Trainer runs no validation. Losses are tracked, but every "
                "sample stays undecided. Pass held-out data, trainer.fit(model, train_loader, control_loader)."
            )
        judged = self.flags.evaluations[-1].step if self.flags.evaluations else 0
        if trainer.global_step < judged:
            rank_zero_warn(
                f"MemorizationDetector judged another run up to step {judged}, and this one starts at step "
                f"{trainer.global_step}: nothing is judged before it is past that, and losses of both runs are in one "
                "ledger. A run of its own needs callbacks of its own: Trainer(callbacks=memsink())."
            )
        samples, controls = samples_in(trainer.train_dataloader), samples_in(trainer.val_dataloaders)
        if samples and controls and not ledger.controls.expected:
            self._power(samples, controls)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            Ledger.of(trainer).close(Ledger.controls)
            self._judge(trainer, pl_module)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        # Controls that are no validation set were written at the end of a step; this hook of the next one writes no
        # slot, and mitigations read flags in another.
        self._judge(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._judge(trainer, None)

    def _judge(self, trainer: Trainer, pl_module: LightningModule | None) -> None:
        """If the controls were looked at since the last time. Without a module nothing is logged: it is too late."""
        ledger = Ledger.of(trainer)
        judged = self.flags.evaluations[-1].step if self.flags.evaluations else -1
        if ledger.controls.latest_step <= judged:
            return
        with interrupts_deferred():
            evaluation = evaluate(
                ledger.losses, ledger.controls, self.flags, self.rule, self.consecutive, trainer.current_epoch
            )
            self.flags.evaluations.append(evaluation)
        self._power(len(ledger.losses), evaluation.controls)
        stands = self.flags.memorized
        ledger.onset = self.onset = estimate_onset(
            self.flags.onset_step[stands],
            self.flags.onset_exposures[stands],
            [past.step for past in self.flags.evaluations],
        )
        if pl_module is not None:
            for name, value, on_bar in (
                ("memorized", float(evaluation.memorized), True),
                ("flagged_fraction", evaluation.flagged_fraction, False),
                ("gap", evaluation.gap, True),
            ):
                # A monitor must exist and be finite from the first validation on, or EarlyStopping ends the run.
                # Loggers get the true value from LiveCurves. All processes have the same: their mean is no other.
                told = value if math.isfinite(value) else 0.0
                pl_module.log(f"memsink/{name}", told, prog_bar=on_bar, logger=False, sync_dist=trainer.world_size > 1)

    def state_dict(self) -> dict[str, Any]:
        return {"flags": self.flags.state_dict(), "onset": None if self.onset is None else asdict(self.onset)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        with restoring("MemorizationDetector"):
            self.flags.load_state_dict(state_dict["flags"])
            self.onset = None if state_dict["onset"] is None else Onset(**state_dict["onset"])

    def _power(self, samples: int, controls: int) -> None:
        """Says once what this many controls can show of this many samples, and whenever they can show nothing."""
        needed = controls_for(samples, self.rule.alpha)
        together = max(1, -(-samples // max(1, round(self.rule.alpha * (controls + 1)))))
        message = (
            f"memsink: {controls} controls for {samples} samples. Smallest p-value 1/{controls + 1}; at a "
            f"false-discovery rate of {self.rule.alpha:g} at least {together} memorized samples must stand out "
            f"together; to flag one alone would take {needed} controls."
        )
        if controls < self.rule.controls_needed and not self._warned:
            rank_zero_warn(
                f"{message} Fewer than {self.rule.controls_needed} controls support no verdict: every sample stays "
                "undecided. Give the validation loader more held-out samples of the same kind as the training data."
            )
            self._warned = True
        elif not self._told and not self._warned:
            rank_zero_info(f"{message} Below that a fitted normal tail stands in, labelled so.")
        self._told = True


def samples_in(loaders: Any) -> int | None:
    """Samples in a loader or a collection of loaders; None where a data set has no length."""
    flat = loaders if isinstance(loaders, (list, tuple)) else [loaders]
    data = [getattr(loader, "dataset", None) for loader in flat]
    sizes = [len(one) for one in data if isinstance(one, Sized)]
    return sum(sizes) if len(sizes) == len(flat) else None
