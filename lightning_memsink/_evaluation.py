"""Running a model in evaluation mode without side effects."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn
from torchmetrics import Metric


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Within, the model is in evaluation mode; afterwards each module is in the mode it was in, and so are the global
    random generators."""
    modes = {module: module.training for module in model.modules()}
    devices = {tensor.device for tensor in model.parameters() if tensor.device.type == "cuda"}
    with torch.random.fork_rng(sorted(devices, key=str)):
        try:
            model.eval()
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode


@contextmanager
def without_trace(pl_module: LightningModule) -> Iterator[None]:
    """Evaluation mode, no gradients, and afterwards everything as before: random state, metrics, what was logged.

    ``self.log`` is silent inside, since Lightning refuses it outside its loops.
    """
    training = {name: module.training for name, module in pl_module.named_modules()}
    metrics = [module for module in pl_module.modules() if isinstance(module, Metric)]
    states = [_snapshot(metric) for metric in metrics]
    silent = {"log": _say_nothing, "log_dict": _say_nothing}
    own = {name: vars(pl_module)[name] for name in silent if name in vars(pl_module)}
    with ExitStack() as stack:
        stack.enter_context(isolate_rng())
        stack.enter_context(torch.no_grad())
        vars(pl_module).update(silent)
        pl_module.eval()
        try:
            yield
        finally:
            for name in silent:
                vars(pl_module).pop(name, None)
            vars(pl_module).update(own)
            for name, module in pl_module.named_modules():
                module.training = training[name]
            for metric, state in zip(metrics, states, strict=True):
                vars(metric).update(state)


def _snapshot(metric: Metric) -> dict[str, Any]:
    """What an update changes of a metric; list states are copied, since they grow in place."""
    names = (*metric._defaults, "_update_count", "_computed", "_forward_cache")
    values = {name: getattr(metric, name) for name in names}
    return {
        name: value.clone() if isinstance(value, torch.Tensor) else list(value) if isinstance(value, list) else value
        for name, value in values.items()
    }


def _say_nothing(*args: Any, **kwargs: Any) -> None:
    """Stands in for ``self.log``."""
