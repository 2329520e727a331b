"""Watches loss functions as they are called: in validation, which has no graph, and inside `torch.compile`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_memsink.losses.loss_call import LossCall, LossRows, target_buffer
from lightning_memsink.losses.readers import RECORDERS, Record

RESHAPES = frozenset(("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "float", "to"))
PRODUCTS = frozenset(("mul", "multiply", "__mul__", "__rmul__"))


class LossWatch(TorchFunctionMode):
    """A torch function mode that records each loss call and leaves it unchanged. It costs about 1 µs per torch call.

    Where the user averages unreduced losses with a mask, outside compiled code, it also records the mask that they
    multiply with or index by.
    """

    def __init__(self) -> None:
        super().__init__()
        self.records: list[Record] = []
        self.rows: dict[int, LossRows] = {}  # by number of the record: the buffer of a call's flat targets
        self.unreduced: list[tuple[Tensor, int]] = []  # losses the user will average, and the number of their record
        self.entered = False
        self.error: Exception | None = None
        """The first exception while recording, which the user's own call must not see."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if torch.compiler.is_compiling():
            if func in RECORDERS:
                with torch.no_grad():
                    self.records.append(RECORDERS[func](*args, **(kwargs or {})))
        elif func in RECORDERS or self.unreduced:
            try:
                self._watch(func, args, kwargs or {}, result)
            except Exception as error:
                self.error = self.error or error
        return result

    def _watch(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> None:
        if func not in RECORDERS:
            self._follow(getattr(func, "__name__", ""), args, result)
        elif torch._C._current_graph_task_id() == -1:  # a checkpointed forward run again in backward is no new loss
            self._note(func, args, kwargs, result)

    def _note(self, func: Callable[..., Tensor], args: Sequence[Any], kwargs: dict[str, Any], result: Tensor) -> None:
        if torch._C._functorch.is_functorch_wrapped_tensor(result):  # it has no storage and is void outside of vmap
            return
        with torch.no_grad():
            record = RECORDERS[func](*args, **kwargs)
        target = args[1] if len(args) > 1 else kwargs["target"]
        self.rows[len(self.records)] = LossRows(buffer=target_buffer(target))
        self.records.append(record)
        if result.ndim:
            self.unreduced.append((result, len(self.records) - 1))

    def _follow(self, name: str, operands: Sequence[Any], result: Any) -> None:
        """Follows unreduced losses through reshapes, and records the mask they are multiplied with or indexed by."""
        for losses, number in list(self.unreduced):
            others = [other for other in operands if other is not losses]
            if len(others) == len(operands):
                continue
            if name in RESHAPES:
                self.unreduced.append((result, number))
            elif others and (name in PRODUCTS or name == "__getitem__"):  # no others: losses times themselves
                mask = others[0]
                if not isinstance(mask, Tensor) or mask.ndim == 0:
                    continue
                indexes = mask.dtype == torch.bool and mask.shape == losses.shape
                if indexes if name == "__getitem__" else result.shape == losses.shape:
                    kind, classes, values, weights, divisor = self.records[number]
                    mask = mask.detach().float().expand(losses.shape).reshape(values.shape)
                    self.records[number] = kind, classes, values, mask if weights is None else mask * weights, divisor

    def start(self) -> None:
        """Enters the mode, with nothing recorded."""
        self._clear()
        self.error = None
        if not self.entered:
            super().__enter__()  # type: ignore[no-untyped-call]
            self.entered = True

    def stop(self) -> list[LossCall]:
        """Leaves the mode and returns the calls, each with ``upstream`` 1: as if the loss were its result."""
        if self.entered:
            super().__exit__(None, None, None)  # type: ignore[no-untyped-call]
            self.entered = False
        calls = [
            LossCall(kind, classes, losses, weights, divisor, losses.new_ones(()), self.rows.get(number, LossRows()))
            for number, (kind, classes, losses, weights, divisor) in enumerate(self.records)
        ]
        self._clear()
        return calls

    def _clear(self) -> None:
        self.records.clear()
        self.rows.clear()
        self.unreduced.clear()
