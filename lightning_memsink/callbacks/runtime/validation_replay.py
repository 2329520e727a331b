"""The batches of a validation once more, under the weights of the moment, and without a trace."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_memsink._evaluation import run_training_step, without_trace
from lightning_memsink._lightning import without_gradients
from lightning_memsink.callbacks.runtime.kept_state import loaders_kept, modules_kept

Step = Callable[[Trainer, LightningModule, Any, int, int], Any]
"""Called with the batch, its number and that of its loader; returns what the step of the user's returns."""


class NotRepeatable(Exception):
    """A loader that can't be read once more without changing what it gives next."""


def validation_step(trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, loader: int) -> Any:
    """What ``validation_step`` returns, called with the arguments that Lightning gives it."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    several = loop._is_sequential and loop.num_dataloaders > 1
    named = loop._build_kwargs(batch, batch_idx, loader if several else None)
    arguments = loop._build_step_args_from_hook_kwargs(named, "validation_step")
    with trainer.precision_plugin.val_step_context():
        return pl_module.validation_step(*arguments)


def training_step(trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, loader: int) -> Any:
    """What ``training_step`` returns, without training."""
    return run_training_step(trainer, pl_module, batch, batch_idx)


def replay(trainer: Trainer, pl_module: LightningModule, step: Step, callback: Callback) -> None:
    """Calls ``step`` with every batch of the validation, and of all hooks those of ``callback`` around each batch.

    Modes, buffers, metrics, plain attributes of the modules, random generators, samplers and workers are as before.

    Raises:
        NotRepeatable: a loader can't be read once more. Nothing was read then.
    """
    loop = trainer.fit_loop.epoch_loop.val_loop
    loop.setup_data()
    combined = loop._combined_loader
    assert combined is not None
    for loader in combined.flattened:
        require_repeatable(loader)

    def batches(loop: Any) -> None:
        for batch, batch_idx, number in iter(combined):
            batch = trainer.precision_plugin.convert_input(batch)
            batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=number)
            batch = trainer.strategy.batch_to_device(batch, dataloader_idx=number)
            callback.on_validation_batch_start(trainer, pl_module, batch, batch_idx, number)
            outputs = step(trainer, pl_module, batch, batch_idx, number)
            callback.on_validation_batch_end(trainer, pl_module, outputs, batch, batch_idx, number)

    iterator, combined.limits = combined._iterator, loop.max_batches
    with ExitStack() as kept:
        kept.callback(vars(combined).__setitem__, "_iterator", iterator)
        for context in (without_trace(pl_module), modules_kept(pl_module), loaders_kept(combined.flattened)):
            kept.enter_context(context)
        if step is validation_step:
            without_gradients(loop, batches)  # inference mode, or not, as in Lightning's own
        else:
            batches(loop)


def require_repeatable(loader: Any) -> None:
    """Raises NotRepeatable for a loader, or its data set, that is its own iterator or keeps a state of its own."""
    for part in (loader, getattr(loader, "dataset", None)):
        if hasattr(part, "__next__"):
            raise NotRepeatable(f"{type(part).__name__} is an iterator, which can be read once")
        if hasattr(part, "state_dict") and hasattr(part, "load_state_dict"):
            raise NotRepeatable(f"{type(part).__name__} has a state of its own")
