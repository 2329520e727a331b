"""The batches of a validation once more, under the weights of the moment, and without a trace."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics import Metric

from lightning_memsink._evaluation import run_training_step, without_trace

Step = Callable[[Trainer, LightningModule, Any, int, int], Any]
"""Called with the batch, its number and that of its loader; returns what the step of the user's returns."""

_MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))
_PARTS = ("sampler", "batch_sampler", "dataset", "data_source")
"""Attributes by which a loader reaches what may change as it is read."""


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
    iterator, combined.limits = combined._iterator, loop.max_batches
    with ExitStack() as kept:
        kept.callback(vars(combined).__setitem__, "_iterator", iterator)
        for context in (without_trace(pl_module), _modules_kept(pl_module), _loaders_kept(combined.flattened)):
            kept.enter_context(context)
        for batch, batch_idx, number in iter(combined):
            batch = trainer.precision_plugin.convert_input(batch)
            batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=number)
            batch = trainer.strategy.batch_to_device(batch, dataloader_idx=number)
            callback.on_validation_batch_start(trainer, pl_module, batch, batch_idx, number)
            outputs = step(trainer, pl_module, batch, batch_idx, number)
            callback.on_validation_batch_end(trainer, pl_module, outputs, batch, batch_idx, number)


def require_repeatable(loader: Any) -> None:
    """Raises NotRepeatable for a loader, or its data set, that is its own iterator or keeps a state of its own."""
    for part in (loader, getattr(loader, "dataset", None)):
        if hasattr(part, "__next__"):
            raise NotRepeatable(f"{type(part).__name__} is an iterator, which can be read once")
        if hasattr(part, "state_dict") and hasattr(part, "load_state_dict"):
            raise NotRepeatable(f"{type(part).__name__} has a state of its own")


@contextmanager
def _modules_kept(model: nn.Module) -> Iterator[None]:
    """Afterwards buffers, attributes of the modules, and what their lists, dicts and sets hold, are as before."""
    modules = [module for module in model.modules() if not isinstance(module, Metric)]
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in modules
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(_attributes_kept(module, _MODULE_ATTRIBUTES))
        try:
            yield
        finally:
            with torch.no_grad():
                for module, name, buffer, before in buffers:
                    module._buffers[name] = buffer.copy_(before)


@contextmanager
def _attributes_kept(owner: object, left_out: frozenset[str] = frozenset()) -> Iterator[None]:
    attributes = {name: value for name, value in vars(owner).items() if name not in left_out}
    contents = {name: value.copy() for name, value in attributes.items() if isinstance(value, (list, dict, set, deque))}
    try:
        yield
    finally:
        for name in [name for name in vars(owner) if name not in attributes and name not in left_out]:
            del vars(owner)[name]
        vars(owner).update(attributes)
        for name, content in contents.items():
            _refill(attributes[name], content)


def _refill(container: Any, content: Any) -> None:
    container.clear()
    (container.extend if isinstance(container, (list, deque)) else container.update)(content)


@contextmanager
def _loaders_kept(loaders: list[Any]) -> Iterator[None]:
    """Afterwards the generators and samplers of loaders and data sets are as before, and so are persistent workers."""
    with ExitStack() as stack:
        for loader in loaders:
            for part in _parts(loader):
                stack.enter_context(_generators_kept(part))
                if isinstance(part, torch.utils.data.Sampler):
                    stack.enter_context(_attributes_kept(part))
            if isinstance(loader, DataLoader) and loader.persistent_workers:  # they would draw other numbers next time
                vars(loader)["persistent_workers"] = False
                stack.callback(vars(loader).__setitem__, "persistent_workers", True)
        yield


def _parts(loader: Any) -> list[Any]:
    """The loader, its samplers and data sets, and theirs."""
    found = [loader] if hasattr(loader, "__dict__") else []
    for part in found:
        inner = [getattr(part, name, None) for name in _PARTS]
        found += [each for each in inner if hasattr(each, "__dict__") and all(each is not known for known in found)]
    return found


@contextmanager
def _generators_kept(owner: Any) -> Iterator[None]:
    with ExitStack() as stack:
        for value in [*vars(owner).values()]:
            if isinstance(value, torch.Generator):
                stack.callback(value.set_state, value.get_state())
            elif isinstance(value, random.Random):
                stack.callback(value.setstate, value.getstate())
            elif isinstance(value, np.random.RandomState):
                stack.callback(value.set_state, value.get_state())
            elif isinstance(value, np.random.Generator):
                stack.callback(setattr, value.bit_generator, "state", value.bit_generator.state)
        yield
