"""Gradient alignment: the cosine of each sample's gradient with that of held-out samples.

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
from lightning_memsink.attribution.token_owners import TokenOwners
from lightning_memsink.samples.batch import batch_size
from lightning_memsink.samples.documents import documents_in


class GradientAlignment:
    """Cosine of each sample's gradient with the mean gradient of one batch of controls, by random projections.

    A sample whose gradient is long and orthogonal to that of the controls improves only itself. The gradient of the
    controls is taken by one more forward and backward after each validation, without a trace in weights, ``.grad``,
    random state or logs.
    """

    def __init__(self, module: LightningModule, batch_axis: int = 0) -> None:
        self._sketches = GradientSketches(module, batch_axis=batch_axis)
        self._new_controls: Any = None  # a batch whose gradient is not taken yet
        self._control_sketch: Tensor | None = None

    def keep(self, batch: Any) -> None:
        """Keeps a batch of controls; the next `open` takes its gradient."""
        self._new_controls = batch

    def open(self, trainer: Trainer, module: LightningModule) -> None:
        """Records from the next forward on. Call it before the forward of a recorded training step."""
        if self._new_controls is not None:
            # Validation may run in inference mode, whose tensors autograd refuses: copies are made outside of it.
            batch = tree_map_only(Tensor, torch.clone, self._new_controls)
            self._new_controls = None
            self._control_sketch = self._mean_sketch(trainer, module, move_data_to_device(batch, module.device))
        self._sketches.open()

    def paused(self) -> AbstractContextManager[None]:
        """Inside, a backward is not recorded."""
        return self._sketches.paused()

    def set_owners(self, owners: TokenOwners) -> None:
        """After `open` and before the backward, where rows hold several documents: cosines are of documents then."""
        self._sketches.owners = owners

    def finish(self, size: int) -> Tensor | None:
        """``[B]`` cosines in -1…1, after the backward; None before the first validation."""
        sketches = self._sketches.finish(size)
        return None if self._control_sketch is None else cosine(sketches, self._control_sketch.to(sketches))

    def remove(self) -> None:
        """Removes the hooks."""
        self._sketches.remove()
        self._new_controls = self._control_sketch = None

    def _mean_sketch(self, trainer: Trainer, module: LightningModule, batch: Any) -> Tensor:
        """``[D]`` mean over the samples of ``batch``."""
        trained = [weight for weight in module.parameters() if weight.requires_grad]
        documents, size = documents_in(batch), batch_size(batch) or 0
        with without_trace(module), torch.enable_grad():
            self._sketches.open()
            if documents is not None:  # in one row of all of them there would be one gradient
                self._sketches.owners, size = TokenOwners(documents.owners, documents.count), documents.count
            outputs = run_training_step(trainer, module, batch)
            loss = outputs if isinstance(outputs, Tensor) else outputs["loss"]
            torch.autograd.grad(loss, trained, allow_unused=True)
        return self._sketches.finish(size).mean(0)
