"""Running a model outside the training loop, in evaluation mode and without side effects."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn
from torchmetrics import Metric


@contextmanager
def isolated_eval(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards each module's mode and torch's global random generators are as before."""
    devices = {tensor.device for tensor in model.parameters() if tensor.device.type == "cuda"}
    with torch.random.fork_rng(sorted(devices, key=str)), _eval_mode(model):
        yield


@contextmanager
def without_trace(pl_module: LightningModule, modes: Mapping[nn.Module, bool] | None = None) -> Iterator[None]:
    """Evaluation mode without gradients inside; afterwards modes, metrics and random generators are as before.

    ``self.log`` does nothing inside, since Lightning refuses it outside its loops. The generators are all that
    Lightning seeds: torch, NumPy and Python. ``modes``: of modules in training inside, instead of evaluation for all.
    """
    mode = _eval_mode(pl_module) if modes is None else modes_set(pl_module, modes)
    with isolate_rng(), torch.no_grad(), _silent_log(pl_module), _metrics_restored(pl_module), mode:
        yield


def run_training_step(trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int = 0) -> Any:
    """Output of ``training_step`` for ``batch``, at the precision of training. Call it within `without_trace`."""
    with trainer.precision_plugin.train_step_context():
        return pl_module.training_step(batch, batch_idx)


@contextmanager
def modes_set(model: nn.Module, modes: Mapping[nn.Module, bool]) -> Iterator[None]:
    """``modes`` (is a module in training?) inside; a module that has none there keeps its own."""
    with _modes_kept(model):
        for module in model.modules():
            module.training = modes.get(module, module.training)
        yield


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    with _modes_kept(model):
        model.eval()
        yield


@contextmanager
def _modes_kept(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _silent_log(pl_module: LightningModule) -> Iterator[None]:
    attributes = vars(pl_module)
    silent = {"log": _ignore, "log_dict": _ignore}
    own = {name: attributes[name] for name in silent if name in attributes}
    attributes.update(silent)
    try:
        yield
    finally:
        for name in silent:
            attributes.pop(name, None)
        attributes.update(own)


@contextmanager
def _metrics_restored(model: nn.Module) -> Iterator[None]:
    metrics = [module for module in model.modules() if isinstance(module, Metric)]
    states = [_metric_state(metric) for metric in metrics]
    try:
        yield
    finally:
        for metric, state in zip(metrics, states, strict=True):
            vars(metric).update(state)


def _metric_state(metric: Metric) -> dict[str, Any]:
    """The attributes that an update changes; list states are copied, since they grow in place."""
    names = (*metric._defaults, "_update_count", "_computed", "_forward_cache")
    values = {name: getattr(metric, name) for name in names}
    return {
        name: value.clone() if isinstance(value, torch.Tensor) else list(value) if isinstance(value, list) else value
        for name, value in values.items()
    }


def _ignore(*args: Any, **kwargs: Any) -> None:
    """Replaces ``self.log``."""
