"""Pairs of a module's input and gradient, brought together in the user's own backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import TensorWeakRef

OnPair = Callable[[str, Tensor, Tensor], None]
"""Of a module's name, its input and the gradient."""


def first_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The first tensor among the arguments of a forward."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)


@dataclass
class _Call:
    """One call of a module. Autograd keeps its input; nothing keeps it if the region is checkpointed."""

    weak: TensorWeakRef
    strong: Tensor | None = None  # from the forward that a checkpoint ran again
    gradient: Tensor | None = None
    done: bool = False

    def input(self) -> Tensor | None:
        return self.strong if self.strong is not None else self.weak()

    def keep_input(self) -> None:
        inputs = self.input()
        if not self.done and inputs is not None:
            self.strong = inputs.detach()


class ModuleCalls:
    """Hooks on ``modules`` that call ``on_pair(name, input, gradient)`` once per module call and backward.

    Args:
        modules: by name. Attach before the first compiled call: later hooks are ignored by compiled code.
        side: at which end of the module the gradient is taken: of its ``input`` or of its ``output``.
        on_pair: gets the detached input and the gradient of whatever is differentiated. It runs within backward, where
            an error of ours must not end the user's training: the first one is kept in `failed`, and `close` raises it.

    No tensor is kept alive longer than autograd keeps it: in a checkpointed region the input is taken from the forward
    that backward runs again. Closed, a hook costs a function call.
    """

    def __init__(self, modules: Mapping[str, nn.Module], side: Literal["input", "output"], on_pair: OnPair) -> None:
        self.side, self.on_pair = side, on_pair
        self.is_open = False
        self.failed: Exception | None = None
        self._calls: dict[str, list[_Call]] = {name: [] for name in modules}
        self._entered: dict[str, _Call] = {}
        self._handles: list[RemovableHandle] = []
        for name, module in modules.items():
            self._handles += [
                module.register_forward_pre_hook(self._before_forward(name), with_kwargs=True),
                module.register_forward_hook(self._after_forward(name)),
            ]

    def open(self) -> None:
        """Records from the next forward on."""
        self._reset()
        self.failed = None
        self.is_open = True

    def uses(self) -> dict[str, int]:
        """How often each module was called since `open`, as far as a gradient can come back."""
        return {name: len(calls) for name, calls in self._calls.items()}

    def inputs(self) -> list[Tensor]:
        """Of all calls so far, those that still exist and have a gradient to come."""
        inputs = [call.input() for calls in self._calls.values() for call in calls]
        return [tensor for tensor in inputs if tensor is not None and tensor.requires_grad]

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, a backward is not recorded; recorded forwards wait for the next backward."""
        was_open, self.is_open = self.is_open, False
        try:
            yield
        finally:
            self.is_open = was_open

    def close(self) -> list[str]:
        """Stops recording and returns the modules whose gradient came but whose input never did.

        Raises:
            Exception: the first that ``on_pair`` raised.
        """
        lost = [name for name, calls in self._calls.items() for call in calls if call.gradient is not None]
        self._reset()
        self.is_open = False
        failed, self.failed = self.failed, None
        if failed is not None:
            raise failed
        return lost

    def remove(self) -> None:
        """Removes the hooks; a second call does nothing."""
        self._reset()
        self.is_open = False
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _reset(self) -> None:
        self._entered.clear()
        for calls in self._calls.values():
            calls.clear()

    def _before_forward(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            inputs = first_tensor(args, kwargs)
            if self.is_open and inputs is not None:
                self._enter(name, inputs)

        return hook

    def _enter(self, name: str, inputs: Tensor) -> None:
        if torch._C._current_graph_task_id() != -1:  # within backward: a checkpointed forward, run again
            calls = self._calls[name]
            if any(call.weak() is inputs for call in calls):
                return
            waiting = next((call for call in calls if not call.done and call.input() is None), None)
            if waiting is not None:
                waiting.strong = inputs.detach()
                self._report_if_complete(name, waiting)
                return
        self._entered[name] = _Call(TensorWeakRef(inputs))

    def _after_forward(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            call = self._entered.pop(name, None)
            if call is None or not isinstance(output, Tensor) or not output.requires_grad:
                return
            self._calls[name].append(call)
            if self.side == "output":
                output.register_hook(self._take_gradient(name, call))
                return
            inputs = call.input()
            if inputs is not None and inputs.requires_grad:
                # The module's own backward frees its input before the gradient comes out at that end.
                output.register_hook(self._keep_input(call))
                inputs.register_hook(self._take_gradient(name, call))

        return hook

    def _keep_input(self, call: _Call) -> Callable[[Tensor], None]:
        def hook(gradient: Tensor) -> None:
            if self.is_open:
                call.keep_input()

        return hook

    def _take_gradient(self, name: str, call: _Call) -> Callable[[Tensor], None]:
        def hook(gradient: Tensor) -> None:
            if self.is_open and not call.done:
                call.gradient = gradient.detach()
                self._report_if_complete(name, call)

        return hook

    def _report_if_complete(self, name: str, call: _Call) -> None:
        inputs = call.input()
        if inputs is None or call.gradient is None:
            return
        gradient, call.gradient, call.strong, call.done = call.gradient, None, None, True
        try:
            self.on_pair(name, inputs.detach(), gradient)
        except Exception as error:
            self.failed = self.failed or error
