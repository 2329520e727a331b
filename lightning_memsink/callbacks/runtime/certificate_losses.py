"""Losses of training batches again, under each mask of a certificate, without a trace in the run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_memsink._evaluation import without_trace
from lightning_memsink.attribution.hidden_layers import HiddenLayer
from lightning_memsink.losses.capture import EvaluationCapture, StepCapture
from lightning_memsink.losses.per_sample import NotCaptured
from lightning_memsink.mitigation.certificate_samples import NOBODY, KeptBatch, Losses, _once, placebo
from lightning_memsink.mitigation.designed_sinks import Pool, masked
from lightning_memsink.samples.tokens import tokens_of


class MaskedLosses:
    """Runs ``training_step`` on batches again, in evaluation mode and without a trace."""

    def __init__(self, trainer: Trainer, module: LightningModule, training: StepCapture) -> None:
        self.trainer, self.module = trainer, module
        self.capture = EvaluationCapture(training)

    def losses(self, seen: Sequence[KeptBatch], pool: Pool, layers: Sequence[HiddenLayer]) -> Losses:
        """Of the samples seen twice or more.

        Raises:
            ValueError: the step's losses can't be told by sample; with what to do.
        """
        others = placebo(torch.cat([batch.owners.flatten() for batch in seen]))
        under: dict[str, list[Tensor]] = {}
        with without_trace(self.module):
            for one in seen:
                owners = {"own": one.owners, "placebo": others(one.owners), "random": one.owners ^ NOBODY}
                masks: dict[str, Callable[[int], Tensor]] = {name: partial(pool.own, of) for name, of in owners.items()}
                for name, mask in {**masks, "dropped": pool.dropped}.items():
                    text = tokens_of(one.batch)
                    with masked(layers, mask, None if text is None else text.ids.shape[1]):
                        under.setdefault(name, []).append(self._step(one))
        losses = Losses(torch.cat([one.ids for one in seen]), {name: torch.cat(parts) for name, parts in under.items()})
        return _once(losses.only(torch.cat([one.exposures for one in seen]) >= 2))

    def _step(self, seen: KeptBatch) -> Tensor:
        """``[B]``"""
        batch = copied(seen.batch)
        self.capture.begin()
        try:
            with self.trainer.precision_plugin.train_step_context():
                outputs = self.module.training_step(batch, 0)
            captured = self.capture.finish(outputs, len(seen.ids))
        finally:
            self.capture.abandon()
        if isinstance(captured, NotCaptured):
            raise ValueError(captured.reason)
        return captured.losses.detach().float().cpu()


def copied(batch: Any) -> Any:
    """A batch that a step may take entries out of, the tensors being the same."""
    return copy.copy(batch) if isinstance(batch, (Mapping, list)) else batch
