"""Steps whose losses are read without a trainer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_memsink.losses.autograd_graph import LossNodes
from lightning_memsink.losses.capture import StepCapture
from lightning_memsink.losses.per_sample import Captured, NotCaptured
from lightning_memsink.losses.reweighting import OpenLoss
from lightning_memsink.losses.row_orders import NotWatched
from lightning_memsink.losses.step_reader import StepReader

Step = Callable[[Any], Tensor]
"""A training step: from the batch to its loss."""


def read(
    reader: StepReader, step: Step, batch: Any, size: int, scale: float = 1.0, axes: Sequence[int] | None = None
) -> tuple[Tensor, LossNodes]:
    """One step's loss times ``scale``, and its loss calls. ``axes``: of the samples in each of the batch's tensors."""
    reader.begin(batch, size, axes)
    try:
        loss = step(batch) if scale == 1 else step(batch) * scale
        return loss, reader.read(loss, scale)
    finally:
        reader.end()


def opened(
    step: Step, batch: Any, size: int, scale: float = 1.0, module: nn.Module | None = None
) -> tuple[Tensor, OpenLoss]:
    """The loss of a first step, times ``scale``, and its calls as a mitigation finds them."""
    loss, found = read(StepReader(module), step, batch, size, scale)
    return loss, OpenLoss(loss, size, found, scale)


def losses_read(reader: StepReader, step: Step, batch: Any, size: int, axes: Sequence[int] | None = None) -> Tensor:
    """``[B]`` losses of one step; NaN where nothing like it was watched before."""
    try:
        loss, found = read(reader, step, batch, size, axes=axes)
    except NotWatched:
        return torch.full((size,), torch.nan)
    return OpenLoss(loss, size, found).losses()


def captured(step: Step, batch: Any, size: int, capture: StepCapture | None = None) -> Captured | NotCaptured:
    """What is captured of one step with its backward."""
    capture = StepCapture() if capture is None else capture
    capture.begin(batch, size)
    loss = step(batch)
    capture.before_backward(loss)
    loss.backward()
    return capture.finish({"loss": loss}, size)
