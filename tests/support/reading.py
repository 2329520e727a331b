"""Steps whose losses are read without a trainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from lightning_memsink.losses.autograd_graph import LossNodes
from lightning_memsink.losses.capture import StepCapture
from lightning_memsink.losses.per_sample import Captured, NotCaptured
from lightning_memsink.losses.reweighting import OpenLoss
from lightning_memsink.losses.step_reader import StepReader

Step = Callable[[Any], Tensor]
"""A training step: from the batch to its loss."""


def read(reader: StepReader, step: Step, batch: Any, size: int, scale: float = 1.0) -> tuple[Tensor, LossNodes]:
    """One step's loss times ``scale``, and its loss calls."""
    reader.begin(batch, size)
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


def losses_read(reader: StepReader, step: Step, batch: Any, size: int) -> Tensor:
    """``[B]`` losses of one step, after its backward."""
    loss, found = read(reader, step, batch, size)
    known = OpenLoss(loss, size, found).losses()
    loss.backward()
    return known


def captured(step: Step, batch: Any, size: int, capture: StepCapture | None = None) -> Captured | NotCaptured:
    """What is captured of one step with its backward."""
    capture = StepCapture() if capture is None else capture
    capture.begin(batch, size)
    loss = step(batch)
    capture.before_backward(loss)
    loss.backward()
    return capture.finish({"loss": loss}, size)
