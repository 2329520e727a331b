"""Which modules with weights a model calls, noted at the first call of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.utils.hooks import RemovableHandle
from torchmetrics import Metric

from lightning_memsink.losses.fused_layers import is_fused

OnCall = Callable[[str, nn.Module], None]


class FirstCalls:
    """Waits for the first call of each module. Modules within a compiled one are left out: a hook on them would be
    compiled too, or never be called. So are those within an encoder layer, which would be computed more slowly."""

    def __init__(self) -> None:
        self.called: dict[str, object] = {}
        """Kind and shapes of the weights of each called module, by name."""
        self._handles: list[RemovableHandle] = []

    def wait(self, model: nn.Module, on_call: OnCall, *, only_trained: bool = False) -> None:
        """Calls ``on_call`` with name and module at the first call of each module that has weights of its own.

        ``only_trained``: of modules that are trained, and as they are: with a graph, in training mode.
        """
        self.stop()
        for name, module in _callable_modules(model):
            weights = [*_weights(module)]
            if weights and (not only_trained or any(weight.requires_grad for _, weight in weights)):
                kind = type(module), tuple((own, tuple(weight.shape)) for own, weight in weights)
                hook = _FirstCall(module, self._noted(name, kind, on_call), only_trained)
                hook.handle = module.register_forward_pre_hook(hook)
                self._handles.append(hook.handle)

    def stop(self) -> None:
        """Waits no longer; ``called`` is kept."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _noted(self, name: str, kind: object, on_call: OnCall) -> Callable[[nn.Module], None]:
        def note(module: nn.Module) -> None:
            self.called[name] = kind
            on_call(name, module)

        return note


class _FirstCall:
    """A forward pre-hook that is removed when it is called. It does nothing in a copy of its module."""

    handle: RemovableHandle

    def __init__(self, module: nn.Module, note: Callable[[nn.Module], None], only_trained: bool) -> None:
        self.module, self.note, self.only_trained = module, note, only_trained

    def __call__(self, module: nn.Module, arguments: Any) -> None:
        if torch.compiler.is_compiling() or module is not self.module:
            return
        if self.only_trained and not (torch.is_grad_enabled() and module.training):
            return
        self.handle.remove()
        self.note(module)

    def __deepcopy__(self, memo: dict[int, Any]) -> _FirstCall:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _NoCall, ()


class _NoCall:
    """What the hook becomes in a module that was pickled and loaded."""

    def __call__(self, module: nn.Module, arguments: Any) -> None:
        pass


def is_whole(module: nn.Module) -> bool:
    """Whether a call of the module stands for all modules within."""
    return isinstance(module, OptimizedModule) or is_fused(module)


def own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and floating-point buffers that belong to this module itself, by name."""
    for tensors in (module._parameters, module._buffers):
        for name, tensor in tensors.items():
            if tensor is not None and (tensors is module._parameters or tensor.is_floating_point()):
                yield name, tensor


def tensors_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The same of all modules but metrics, under every name that a shared module has."""
    for path, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, Metric):
            for name, tensor in own_tensors(module):
                yield f"{path}.{name}" if path else name, tensor


def _callable_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules whose hooks run in Python, by name."""
    if getattr(model, "_compiler_ctx", None) is not None:  # Lightning has compiled the steps
        return
    within: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(within) and within:
            continue
        if isinstance(module, (Metric, torch.jit.ScriptModule)) or module._compiled_call_impl is not None:
            within = (*within, f"{name}.")
            continue
        if is_whole(module):
            within = (*within, f"{name}.")
        yield name, module


def _weights(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The weights that a call of the module stands for."""
    return module.named_parameters(recurse=is_whole(module))
