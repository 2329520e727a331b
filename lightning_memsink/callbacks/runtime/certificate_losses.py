"""The losses behind a certificate: the most exposed training batches, run again under each mask when training ends.

N  samples      B  samples in a batch      T  tokens of a sample
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from lightning_utilities.core.rank_zero import WarningCache
from torch import Tensor

from lightning_memsink._distributed import gather
from lightning_memsink._evaluation import run_training_step, without_trace
from lightning_memsink._lightning import warn_once
from lightning_memsink.attribution.hidden_layers import HiddenLayer
from lightning_memsink.callbacks.runtime.loss_scale import loss_scale
from lightning_memsink.ledger import Ledger
from lightning_memsink.losses.capture import StepCapture
from lightning_memsink.losses.evaluation_capture import EvaluationCapture
from lightning_memsink.losses.per_sample import NotCaptured
from lightning_memsink.losses.step_reader import StepReader
from lightning_memsink.mitigation.certificate import Certificate, certify
from lightning_memsink.mitigation.certificate_samples import (
    UNUSED_ID_BITS,
    KeptBatch,
    LossesByMask,
    MostExposed,
    merge,
    placebo,
    twin_losses,
)
from lightning_memsink.mitigation.designed_sinks import Pool, masked
from lightning_memsink.samples.tokens import tokens_of


class CertificateRecorder:
    """Keeps the batches with the most exposed samples of a run, and certifies the sinks when training ends.

    Args:
        samples: to measure at least, in each process; 0 for no certificate.
    """

    def __init__(self, samples: int) -> None:
        self.samples = samples
        self.is_active = False
        """Whether this run gets a certificate. Manual optimization gets none: calling training_step would train."""
        self._most_exposed = MostExposed(samples)
        self._capture = StepCapture()
        self._is_capturing = False  # in the first step, which shows how the losses are laid out
        self._warnings = WarningCache()

    def start(self, module: LightningModule, reader: StepReader) -> None:
        """When training starts; ``reader`` reads the steps' losses for all callbacks."""
        self._capture = StepCapture(module, read=reader.read)
        self.is_active = self._is_capturing = self.samples > 0 and module.automatic_optimization

    def before_backward(self, loss: Tensor, trainer: Trainer) -> None:
        """Reads how the losses of the first step are laid out."""
        if self._is_capturing:
            self._capture.before_backward(loss, loss_scale(trainer))

    def keep(self, batch: KeptBatch) -> None:
        """Keeps a training batch if its samples are among the most exposed."""
        self._most_exposed.add(batch)

    def end_step(self, outputs: Any, visits: int) -> None:
        """After a training step that returned ``outputs`` for ``visits`` samples."""
        if self._is_capturing and visits:
            self._is_capturing = False
            self._capture.finish(outputs, visits)

    def certify(
        self, trainer: Trainer, module: LightningModule, pool: Pool, layers: Sequence[HiddenLayer]
    ) -> Certificate | None:
        """The certificate over the samples of all processes; None, and a message, where there is nothing to measure.

        Every process calls it: losses are gathered.
        """
        measured, batches = None, self._most_exposed.batches
        # The same number in every process: a training_step that communicates needs all of them to call it.
        batches = batches[: min(gather(len(batches)))]
        try:
            if batches:
                measured = MaskedLosses(trainer, module, self._capture).losses(batches, pool, layers)
        except Exception as error:  # the user's step may raise anything, and a certificate must not end the run
            warn_once(self._warnings, f"MemSinks has no certificate. {type(error).__name__}: {error}")
        losses = merge(gather(measured))
        if losses is None:
            rank_zero_info("MemSinks has no certificate: it measures samples that were trained on twice or more.")
            return None
        ledger = Ledger.of(trainer)
        table, by_mask = ledger.losses, losses.by_mask
        twins = twin_losses(table.features[table.index.find(losses.ids)].float(), ledger.controls)
        certificate = certify(by_mask["own"], by_mask["dropped"], by_mask["placebo"], by_mask["random"], twins)
        rank_zero_info(certificate.words())
        return certificate

    def detach(self) -> None:
        """Releases the batches and stops capturing."""
        self._most_exposed.batches.clear()
        self._capture.abandon()
        self._is_capturing = False


class MaskedLosses:
    """Losses of training batches under each mask: ``training_step`` run again in evaluation mode, without a trace."""

    def __init__(self, trainer: Trainer, module: LightningModule, training: StepCapture) -> None:
        self.trainer, self.module = trainer, module
        self.capture = EvaluationCapture(training)

    def losses(self, batches: Sequence[KeptBatch], pool: Pool, layers: Sequence[HiddenLayer]) -> LossesByMask:
        """Losses, in nats, of the samples in ``batches`` that were trained on twice or more, each sample once.

        Raises:
            ValueError: the losses of the step can't be split into samples; the message says what to do.
        """
        others = placebo(torch.cat([batch.owners.flatten() for batch in batches]))
        by_mask: dict[str, list[Tensor]] = {}
        with without_trace(self.module):
            for batch in batches:
                owners = {
                    "own": batch.owners,
                    "placebo": others(batch.owners),
                    "random": batch.owners ^ UNUSED_ID_BITS,
                }
                masks: dict[str, Callable[[int], Tensor]] = {
                    name: partial(pool.own, ids) for name, ids in owners.items()
                }
                for name, mask in {**masks, "dropped": pool.dropped}.items():
                    text = tokens_of(batch.batch)
                    with masked(layers, mask, None if text is None else text.ids.shape[1]):
                        by_mask.setdefault(name, []).append(self._step(batch))
        losses = LossesByMask(
            torch.cat([batch.ids for batch in batches]), {name: torch.cat(parts) for name, parts in by_mask.items()}
        )
        return losses.select(torch.cat([batch.exposures for batch in batches]) >= 2).deduplicated()

    def _step(self, kept: KeptBatch) -> Tensor:
        """float32 ``[B]`` on the CPU: the losses of one batch."""
        batch = shallow_copy(kept.batch)
        axes = None if kept.documents is None else kept.documents.axes(batch)
        self.capture.begin(batch, len(kept.ids), axes, is_packed=kept.documents is not None)
        try:
            outputs = run_training_step(self.trainer, self.module, batch)
            captured = self.capture.finish(outputs, len(kept.ids))
        finally:
            self.capture.abandon()
        if isinstance(captured, NotCaptured):
            raise ValueError(captured.reason)
        return captured.losses.detach().float().cpu()


def shallow_copy(batch: Any) -> Any:
    """``batch`` with the same tensors: a step may remove entries of the copy."""
    return copy.copy(batch) if isinstance(batch, (Mapping, list)) else batch
