"""What went into a module and what gradient came back, brought together in the user's own backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import TensorWeakRef

Meet = Callable[[str, Tensor, Tensor], None]


@dataclass
class _Call:
    """One call of a module. Its input is kept by autograd, and by nobody if the region is checkpointed."""

    weak: TensorWeakRef
    strong: Tensor | None = None  # from the forward that a checkpoint ran again
    gradient: Tensor | None = None
    done: bool = False

    def input(self) -> Tensor | None:
        return self.strong if self.strong is not None else self.weak()

    def hold(self) -> None:
        given = self.input()
        if not self.done and given is not None:
            self.strong = given.detach()


class ModuleCalls:
    """Hooks on ``modules`` that call ``meet(name, input, gradient)`` once per module call and backward.

    Args:
        modules: by name. Attach before the first compiled call: later hooks are ignored by compiled code.
        side: at which end of the module the gradient is taken: of its ``input`` or of its ``output``.
        meet: gets the detached input and the gradient of whatever is differentiated. It runs within backward, where an
            error of ours must not end the user's training: the first one is kept in `failed`, for `close`.

    Nothing is kept alive that autograd would have let go: in a checkpointed region the input is taken from the forward
    that backward runs again. Closed, a hook costs a function call.
    """

    def __init__(self, modules: Mapping[str, nn.Module], side: Literal["input", "output"], meet: Meet) -> None:
        self.side, self.meet = side, meet
        self.is_open = False
        self.failed: Exception | None = None
        self._calls: dict[str, list[_Call]] = {name: [] for name in modules}
        self._entered: dict[str, _Call] = {}
        self._handles: list[RemovableHandle] = []
        for name, module in modules.items():
            self._handles += [
                module.register_forward_pre_hook(self._before(name), with_kwargs=True),
                module.register_forward_hook(self._after(name)),
            ]

    def open(self) -> None:
        """From the next forward on."""
        self._forget()
        self.failed = None
        self.is_open = True

    def uses(self) -> dict[str, int]:
        """How often each module was called since `open`, as far as a gradient can come back."""
        return {name: len(calls) for name, calls in self._calls.items()}

    def inputs(self) -> list[Tensor]:
        """Of all calls so far, those that still exist and have a gradient to come."""
        given = [call.input() for calls in self._calls.values() for call in calls]
        return [tensor for tensor in given if tensor is not None and tensor.requires_grad]

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, a backward passes unseen, and what was forwarded waits for the next."""
        was_open, self.is_open = self.is_open, False
        try:
            yield
        finally:
            self.is_open = was_open

    def close(self) -> list[str]:
        """No more; the names of modules whose gradient came but whose input never did. Raises what `meet` raised."""
        lost = [name for name, calls in self._calls.items() for call in calls if call.gradient is not None]
        self._forget()
        self.is_open = False
        failed, self.failed = self.failed, None
        if failed is not None:
            raise failed
        return lost

    def remove(self) -> None:
        """Takes the hooks away; a second time does nothing."""
        self._forget()
        self.is_open = False
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _forget(self) -> None:
        self._entered.clear()
        for calls in self._calls.values():
            calls.clear()

    def _before(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            given = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
            if self.is_open and given is not None:
                self._enter(name, given)

        return enter

    def _enter(self, name: str, given: Tensor) -> None:
        if torch._C._current_graph_task_id() != -1:  # within backward: a checkpointed forward, run again
            calls = self._calls[name]
            if any(call.weak() is given for call in calls):
                return
            waiting = next((call for call in calls if not call.done and call.input() is None), None)
            if waiting is not None:
                waiting.strong = given.detach()
                self._try(name, waiting)
                return
        self._entered[name] = _Call(TensorWeakRef(given))

    def _after(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            call = self._entered.pop(name, None)
            if call is None or not isinstance(output, Tensor) or not output.requires_grad:
                return
            self._calls[name].append(call)
            if self.side == "output":
                output.register_hook(self._arrival(name, call))
                return
            given = call.input()
            if given is not None and given.requires_grad:
                # The module's own backward lets go of its input before the gradient comes out at that end.
                output.register_hook(self._keeper(call))
                given.register_hook(self._arrival(name, call))

        return leave

    def _keeper(self, call: _Call) -> Callable[[Tensor], None]:
        def keep(gradient: Tensor) -> None:
            if self.is_open:
                call.hold()

        return keep

    def _arrival(self, name: str, call: _Call) -> Callable[[Tensor], None]:
        def arrive(gradient: Tensor) -> None:
            if self.is_open and not call.done:
                call.gradient = gradient.detach()
                self._try(name, call)

        return arrive

    def _try(self, name: str, call: _Call) -> None:
        given = call.input()
        if given is None or call.gradient is None:
            return
        gradient, call.gradient, call.strong, call.done = call.gradient, None, None, True
        try:
            self.meet(name, given.detach(), gradient)
        except Exception as error:
            self.failed = self.failed or error
