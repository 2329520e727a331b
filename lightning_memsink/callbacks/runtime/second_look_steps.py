"""The losses of a training batch outside of training, and nothing left of its step.

B  samples of a batch
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn

from lightning_memsink._evaluation import run_training_step, without_trace
from lightning_memsink._lightning import without_gradients
from lightning_memsink.callbacks.runtime.certificate_losses import shallow_copy
from lightning_memsink.callbacks.runtime.kept_state import modules_kept
from lightning_memsink.callbacks.runtime.mitigation import Mitigation
from lightning_memsink.callbacks.runtime.second_look_batches import LookBatch
from lightning_memsink.callbacks.runtime.second_look_messages import of_error
from lightning_memsink.callbacks.runtime.validation_replay import validation_step
from lightning_memsink.losses.capture import reported
from lightning_memsink.losses.evaluation_capture import EvaluationCapture
from lightning_memsink.losses.per_sample import Captured, NotCaptured
from lightning_memsink.samples.visits import DescribedBatch

Mode = Literal["validation_step", "training_step", "training"]
"""Which step is called: ``validation_step`` or ``training_step`` in evaluation mode; or the latter in training mode."""


@contextmanager
def traces_removed(trainer: Trainer, pl_module: LightningModule, mode: Mode) -> Iterator[None]:
    """The modules' modes of ``mode``, without gradients. Afterwards modules, metrics and random generators are as
    before, and no logger of the trainer has been called."""
    modes = _training_modes(trainer, pl_module) if mode == "training" else None
    loggers = trainer._loggers
    with ExitStack() as kept:
        kept.enter_context(without_trace(pl_module, modes))
        kept.enter_context(modules_kept(pl_module))
        kept.callback(vars(trainer).__setitem__, "_loggers", loggers)
        trainer._loggers = [DummyLogger() for _ in loggers]
        yield


class Measured(NamedTuple):
    """The losses ``[B]`` of a batch, float32 on any device, and what they are of: ``ids`` of samples, the number of
    ``elements`` as captured, and ``rows`` of the data set, -1 where unknown."""

    ids: Tensor
    losses: Tensor
    elements: Tensor
    rows: Tensor


def losses_of(
    trainer: Trainer, pl_module: LightningModule, capture: EvaluationCapture, batch: LookBatch, number: int, mode: Mode
) -> Measured | str:
    """The losses of a batch, the ``number``-th of its pass; or why there are none.

    Call it within `traces_removed`. It raises no error of the user's step.
    """

    def measured(_: Any) -> Measured | str:
        given = shallow_copy(batch.batch)
        capture.begin(given, len(batch.ids), batch.axes, batch.is_packed)
        if mode == "validation_step":
            outputs = validation_step(trainer, pl_module, given, number, 0)
        else:
            outputs = run_training_step(trainer, pl_module, given, number)
        captured = capture.finish(outputs, len(batch.ids))
        if isinstance(captured, NotCaptured):
            return captured.reason
        samples = reported(outputs, DescribedBatch(batch.ids, None, None))
        assert samples is not None
        return _measured(batch, samples.ids, captured)

    loop = trainer.fit_loop.epoch_loop.val_loop
    try:  # inference mode, or not, as in Lightning's own validation
        found = without_gradients(loop, measured) if mode == "validation_step" else measured(loop)
    except Exception as error:
        return f"{'validation_step' if mode == 'validation_step' else 'training_step'} raises {of_error(error)}"
    finally:
        capture.abandon()
    return found if isinstance(found, str) else Measured(*(part.clone() for part in found))  # out of inference mode


def _measured(batch: LookBatch, ids: Tensor, captured: Captured) -> Measured:
    losses, counted = captured.losses.detach().float(), captured.counted
    elements = torch.ones_like(losses) if counted is None else counted.detach().float()
    known = batch.rows is not None and len(batch.rows) == len(ids)
    return Measured(ids, losses, elements, batch.rows if known and batch.rows is not None else torch.full_like(ids, -1))


def _training_modes(trainer: Trainer, pl_module: LightningModule) -> dict[nn.Module, bool]:
    """Which modules are in training mode when the model trains, also while it is validated.

    Mitigations tell a step of training by the mode of the root, and would give these samples the units of others.
    """
    before = trainer.fit_loop.epoch_loop.val_loop._module_mode.mode if trainer.validating else {}
    modes = {module: before.get(name, module.training) for name, module in pl_module.named_modules()}
    if any(isinstance(callback, Mitigation) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        modes[pl_module] = False
    return modes
