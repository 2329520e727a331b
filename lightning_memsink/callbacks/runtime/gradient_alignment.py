"""How far each sample's gradient points where that of held-out samples does.

B  samples in a batch      D  numbers of a sketch
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import move_data_to_device
from torch import Tensor
from torch.utils._pytree import tree_map_only

from lightning_memsink._evaluation import run_training_step, without_trace
from lightning_memsink.attribution.gradient_sketches import GradientSketches, cosine
from lightning_memsink.samples.batch import batch_size


class GradientAlignment:
    """Cosine of each sample's gradient with the mean gradient of one batch of controls, by random projections.

    A sample whose gradient is long and at right angles to the controls' helps only itself. The controls' gradient is
    taken by a forward and backward of our own, once after each validation, without a trace in weights, ``.grad``,
    random state or logs.
    """

    def __init__(self, module: LightningModule, batch_axis: int = 0) -> None:
        self._sketches = GradientSketches(module, batch_axis=batch_axis)
        self._waiting: Any = None
        self._control: Tensor | None = None

    def keep(self, batch: Any) -> None:
        """A batch of controls, of which the gradient is due."""
        self._waiting = batch

    def open(self, trainer: Trainer, module: LightningModule) -> None:
        """Before the forward of a training batch that is looked at."""
        if self._waiting is not None:
            # Validation may run in inference mode, whose tensors autograd refuses: copies are made outside of it.
            batch = tree_map_only(Tensor, torch.clone, self._waiting)
            self._waiting = None
            self._control = self._gradient(trainer, module, move_data_to_device(batch, module.device))
        self._sketches.open()

    def paused(self) -> AbstractContextManager[None]:
        """Inside, a backward passes unseen."""
        return self._sketches.paused()

    def finish(self, size: int) -> Tensor | None:
        """``[B]`` cosines in -1…1, after the backward; None before the first validation."""
        sketches = self._sketches.finish(size)
        return None if self._control is None else cosine(sketches, self._control.to(sketches))

    def remove(self) -> None:
        """Takes the hooks away."""
        self._sketches.remove()
        self._waiting = self._control = None

    def _gradient(self, trainer: Trainer, module: LightningModule, batch: Any) -> Tensor:
        """``[D]``"""
        trained = [weight for weight in module.parameters() if weight.requires_grad]
        with without_trace(module), torch.enable_grad():
            self._sketches.open()
            outputs = run_training_step(trainer, module, batch)
            loss = outputs if isinstance(outputs, Tensor) else outputs["loss"]
            torch.autograd.grad(loss, trained, allow_unused=True)
        return self._sketches.finish(batch_size(batch) or 0).mean(0)
