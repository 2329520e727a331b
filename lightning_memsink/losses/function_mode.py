"""Loss calls, seen as they are made: for validation, which has no graph, and for code inside `torch.compile`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from lightning_memsink._chunks import blocks
from lightning_memsink.losses.loss_call import LossCall, LossRows, target_buffer
from lightning_memsink.losses.saved_tensors import gather_likelihood

# kind, classes, losses, weights, divisor: plain values, because Dynamo traces this file
Record = tuple[str, int, Tensor, Tensor | None, Tensor | float]


def _cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Record:
    if input.ndim == 1:
        input, target = input[None], target[None]
    if label_smoothing == 0.0 and not target.is_floating_point():
        losses, weights = _likelihood(input.detach(), target, weight, ignore_index)
        return "cross_entropy", input.shape[1], losses, weights, weights.sum() if reduction == "mean" else 1.0
    losses = functional.cross_entropy(
        input.detach().float(), target.detach(), weight, None, ignore_index, None, "none", label_smoothing
    )
    counted = torch.ones_like(losses) if target.is_floating_point() else (target != ignore_index).float()
    return "cross_entropy", input.shape[1], losses, counted, counted.sum() if reduction == "mean" else 1.0


def _likelihood(logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Losses and weights, some rows at a time: a second tensor as large as the logits would be dear in memory, and by
    that in time."""
    whole = [slice(None)]
    parts = whole if torch.compiler.is_compiling() else blocks(len(logits)) or whole
    found = [
        gather_likelihood(functional.log_softmax(logits[part].float(), 1), target[part], weight, ignore_index)
        for part in parts
    ]
    return torch.cat([losses for losses, _ in found]), torch.cat([weights for _, weights in found])


def _nll_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Record:
    losses, weights = gather_likelihood(input.detach(), target, weight, ignore_index)
    return "cross_entropy", input.shape[1], losses, weights, weights.sum() if reduction == "mean" else 1.0


def _elementwise(function: Callable[..., Tensor]) -> Callable[..., Record]:
    def record(
        input: Tensor,
        target: Tensor,
        *others: Any,
        weight: Tensor | None = None,
        reduction: str = "mean",
        **options: Any,
    ) -> Record:
        if others and "cross_entropy" in function.__name__:
            weight = others[0]
        options = {key: value for key, value in options.items() if key in ("beta", "delta", "pos_weight")}
        losses = function(input.detach().float(), target.detach().float(), reduction="none", **options)
        weights = None if weight is None else weight.detach().float().expand_as(losses)
        return function.__name__, 0, losses, weights, losses.numel() if reduction == "mean" else 1.0

    return record


WATCHED: dict[Callable[..., Tensor], Callable[..., Record]] = {
    functional.cross_entropy: _cross_entropy,
    functional.nll_loss: _nll_loss,
    **{
        function: _elementwise(function)
        for function in (
            functional.mse_loss,
            functional.l1_loss,
            functional.smooth_l1_loss,
            functional.huber_loss,
            functional.binary_cross_entropy,
            functional.binary_cross_entropy_with_logits,
        )
    },
}


RESHAPES = frozenset(("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "float", "to"))
PRODUCTS = frozenset(("mul", "multiply", "__mul__", "__rmul__"))


class LossWatch(TorchFunctionMode):
    """Notes each loss call, and calls it unchanged. About 1 µs for every torch call.

    Where the user averages unreduced losses with a mask, outside compiled code, the mask they multiply with or index
    by is noted too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.records: list[Record] = []
        self.rows: dict[int, LossRows] = {}  # by number of the record: which flat targets a call took
        self.unreduced: list[tuple[Tensor, int]] = []  # losses the user will average, and their record
        self.entered = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if torch.compiler.is_compiling():
            if func in WATCHED:
                with torch.no_grad():
                    self.records.append(WATCHED[func](*args, **(kwargs or {})))
        elif func in WATCHED:
            if torch._C._current_graph_task_id() == -1:  # a checkpointed forward run again in backward is no new loss
                self._note(func, args, kwargs or {}, result)
        elif self.unreduced:
            self._follow(getattr(func, "__name__", ""), args, result)
        return result

    def _note(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Tensor) -> None:
        try:
            with torch.no_grad():
                record = WATCHED[func](*args, **kwargs)
        except (
            RuntimeError,
            TypeError,
            IndexError,
        ):  # not seen; the user's own call succeeded
            return
        target = args[1] if len(args) > 1 else kwargs["target"]
        self.rows[len(self.records)] = LossRows(buffer=target_buffer(target))
        self.records.append(record)
        if result.ndim:
            self.unreduced.append((result, len(self.records) - 1))

    def _follow(self, name: str, operands: Sequence[Any], result: Any) -> None:
        for losses, number in list(self.unreduced):
            others = [other for other in operands if other is not losses]
            if len(others) == len(operands):
                continue
            if name in RESHAPES:
                self.unreduced.append((result, number))
            elif name in PRODUCTS or name == "__getitem__":
                mask = others[0]
                if not isinstance(mask, Tensor) or mask.ndim == 0:
                    continue
                indexes = mask.dtype == torch.bool and mask.shape == losses.shape
                if indexes if name == "__getitem__" else result.shape == losses.shape:
                    kind, classes, values, weights, divisor = self.records[number]
                    mask = mask.detach().float().expand(losses.shape).reshape(values.shape)
                    self.records[number] = kind, classes, values, mask if weights is None else mask * weights, divisor

    def start(self) -> None:
        self.records.clear()
        self.rows.clear()
        self.unreduced.clear()
        if not self.entered:
            super().__enter__()  # type: ignore[no-untyped-call]
            self.entered = True

    def stop(self) -> list[LossCall]:
        """Leaves the mode and tells what it saw, each call as if the loss were its result."""
        if self.entered:
            super().__exit__(None, None, None)  # type: ignore[no-untyped-call]
            self.entered = False
        calls = [
            LossCall(kind, classes, losses, weights, divisor, losses.new_ones(()), self.rows.get(number, LossRows()))
            for number, (kind, classes, losses, weights, divisor) in enumerate(self.records)
        ]
        self.records.clear()
        self.rows.clear()
        self.unreduced.clear()
        return calls
