"""Compares the gradient of a step in which a mitigation leaves samples out with brute force, in float64.

The mitigation is `SampleGradientMask` with samples latched beforehand, as if they had been flagged. By brute force, the
gradient is that of the parts of the loss of all other samples, each computed alone, with the batch's denominators.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor

from benchmarks.capture.case import Case, Data, Fitted, Twin
from benchmarks.capture.fitting import (
    Outcome,
    Truth,
    _crashed,
    doubled,
    doubles,
    shuffled,
    trainer_of,
    warnings_by_stage,
)
from lightning_memsink.callbacks.memorization_detector import MemorizationDetector
from lightning_memsink.callbacks.sample_gradient_mask import SampleGradientMask

TOLERANCE = 1e-6
"""Of the gradient, relative to its norm without a mitigation, in float64."""


class BruteForce(Callback):
    """Computes the expected gradient before each step, and compares after it."""

    def __init__(self, case: Case, data: Data, order: Sequence[int], left_out: Sequence[int]) -> None:
        self.case, self.data, self.order, self.left_out = case, data, order, set(left_out)
        self.expected: list[Tensor] = []
        self.norm = 0.0
        self.error = 0.0
        """The largest difference, relative to the gradient's norm."""
        self.effect = 0.0
        """The largest difference that leaving out makes, likewise."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        assert isinstance(pl_module, Fitted)
        size = self.data.batch_size
        rows = list(self.order[batch_idx * size : (batch_idx + 1) * size])
        samples, collate = [self.data.samples[row] for row in rows], doubled(self.data.collate)
        kept = torch.tensor([row not in self.left_out for row in rows])
        model = Twin(pl_module)
        with torch.random.fork_rng(), torch.enable_grad(), doubles():
            parts = self.case.parts(model, collate, samples)
            rest = parts.new_zeros(()) if self.case.rest is None else self.case.rest(model, collate(samples))
            total = parts.sum() + rest
            gradients = [_gradients(loss, model) for loss in (total, parts[kept].sum() + rest)]
        accumulated = trainer.accumulate_grad_batches
        if batch_idx % accumulated == 0 or not self.expected:
            self.expected = [torch.zeros_like(each) for each in gradients[1]]
        self.expected = [sum_ + new / accumulated for sum_, new in zip(self.expected, gradients[1], strict=True)]
        self.norm = float(torch.cat([each.flatten() for each in gradients[0]]).norm())
        self.effect = max(self.effect, _relative(_distance(*gradients), self.norm))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, Fitted)
        found = [torch.zeros_like(each) if each.grad is None else each.grad for each in _trained(pl_module.net)]
        self.error = max(self.error, _relative(_distance(found, self.expected), self.norm))


def _trained(net: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [parameter for parameter in net.parameters() if parameter.requires_grad]


def _gradients(loss: Tensor, model: Twin) -> list[Tensor]:
    parameters = _trained(model.net)
    if not loss.requires_grad:
        return [torch.zeros_like(each) for each in parameters]
    for parameter in parameters:
        parameter.grad = None
    loss.backward(retain_graph=True)  # autograd.grad would refuse reentrant checkpoints
    return [torch.zeros_like(each) if each.grad is None else each.grad.clone() for each in parameters]


def _relative(distance: float, norm: float) -> float:
    """Without a gradient any difference counts as it is."""
    return distance / norm if norm else distance


def _distance(some: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    return float(torch.cat([(a - b).flatten() for a, b in zip(some, others, strict=True)]).norm())


def check_gradients(case: Case, seed: int = 0) -> Outcome:
    """Whether a mitigation changes the gradient of exactly the samples that it is to leave out: half of them."""
    data = case.data()
    order = shuffled(len(data.samples), seed)
    left_out = shuffled(len(data.samples), seed + 2)[::2]
    seed_everything(seed, verbose=False)
    brute_force = BruteForce(case, data, order, left_out)
    ids = case.ids(replace(data, collate=doubled(data.collate)), data.samples)
    mask = SampleGradientMask(mode="skip")
    mask.latched = torch.tensor(sorted(ids[row] for row in left_out))
    truth = Truth(case, data, order, [])
    with warnings_by_stage(truth) as warned:
        try:
            callbacks = [brute_force, case.tracker(), MemorizationDetector(), mask]
            trainer = trainer_of(case, callbacks, precision="64-true", limit_val_batches=0)
            trainer.fit(case.module(case), data.batches(data.samples, order))
        except Exception as error:
            return _crashed(error)
        finally:
            torch.compiler.reset() if case.compiled else None
    internal = [each.text for each in warned if each.is_internal]
    if internal:
        return Outcome("crashed", internal[0])
    if brute_force.error <= TOLERANCE:
        return Outcome("right" if brute_force.effect > 1e-3 else "not run")  # where there is nothing to leave out
    refusals = [each.text for each in warned if "SampleGradientMask leaves" in each.text]
    return (
        Outcome("refused", refusals[0])
        if refusals
        else Outcome("silent wrong", f"the gradient is off by {brute_force.error:.2g} of its norm")
    )
