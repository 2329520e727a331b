"""Hooks and attributes that a callback may leave on the objects of a run, and a logger that fails."""

from __future__ import annotations

import sys
from typing import Any, NoReturn

import torch
from lightning.pytorch.loggers import Logger
from torch import nn

from lightning_memsink.testing.small_run import SmallLM


def traces(module: SmallLM, train_loader: Any) -> frozenset[str]:
    """Names of the hooks, attributes, modes and function modes on ``module``, its optimizer, trainer and loader."""
    found = {f"loader.{name}" for name in vars(train_loader)} | module_traces(module)
    found |= {f"optimizer.{hook}" for hook in _hooks(module.optimizer)}
    found |= {f"every module's {hook}" for hook in vars(nn.modules.module) if _is_global_hook(hook)}
    if module._trainer is not None:
        found |= {f"strategy.{name}" for name in vars(module._trainer.strategy)}
        found |= {f"trainer.{name}" for name in vars(module._trainer)}
    if torch.overrides._get_current_function_mode() is not None:
        found.add("a torch function mode")
    return frozenset(found)


def module_traces(module: nn.Module) -> set[str]:
    """Names of the hooks and attributes of all modules in ``module``, of frozen weights and modules that evaluate."""
    found = set()
    for name, part in module.named_modules():
        found |= {f"{name or 'module'}.{hook}" for hook in _hooks(part)}
        found |= {f"{name or 'module'}.{attribute}" for attribute in vars(part)}
        found |= set() if part.training else {f"{name or 'module'} in evaluation mode"}
    for name, parameter in module.named_parameters():
        found |= {f"{name}.{hook}" for hook in _PARAMETER_HOOKS if getattr(parameter, hook, None)}
        found |= set() if parameter.requires_grad else {f"{name} without requires_grad"}
    return found


_PARAMETER_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")


def _hooks(thing: object) -> set[str]:
    return {f"{name} ({len(value)})" for name, value in vars(thing).items() if name.endswith("_hooks") and value}


def _is_global_hook(name: str) -> bool:
    return name.startswith("_global_") and name.endswith("_hooks") and bool(getattr(nn.modules.module, name))


class FailingLogger(Logger):
    """Raises an OSError whenever code that is not Lightning's reads an attribute or calls a method."""

    name = "failing"
    version = 0

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Called by Lightning, for which nothing fails."""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Called by Lightning."""

    def __getattribute__(self, name: str) -> Any:
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if name.startswith("__") or caller.partition(".")[0] in ("lightning", "pytorch_lightning"):
            return super().__getattribute__(name)
        return _fail(name)


def _fail(name: str) -> NoReturn:
    raise OSError(f"this logger has no {name} today")
