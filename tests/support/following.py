"""A mode that follows rows through torch calls, for tests of the rules alone: it knows no views and no autograd."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_memsink.losses.provenance import Lost, Rows, owners_of_rows
from lightning_memsink.losses.row_rules import changes_in_place, follow
from lightning_memsink.losses.rule_call import tensors_in


class Following(TorchFunctionMode):
    """Keeps the provenance of what descends from the tensors it is given; ``lost`` counts reasons by function."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[int, tuple[Tensor, Any]] = {}
        self.lost: Counter[str] = Counter()

    def give(self, tensor: Tensor, owners: Tensor) -> Tensor:
        """Seeds ``tensor`` with owners, compressed."""
        self.known[id(tensor)] = tensor, Rows((owners,))
        return tensor

    def of(self, tensor: Tensor) -> Any:
        entry = self.known.get(id(tensor))
        return entry[1] if entry is not None else None

    def owners(self, tensor: Tensor) -> Tensor | None:
        return owners_of_rows(self.of(tensor), tensor.shape)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        found = follow(func, args, kwargs, result, self.of)
        if changes_in_place(func) and args:
            self.known[id(args[0])] = args[0], found
            if result is None or result is args[0]:
                return result
        tensors = [result] if isinstance(result, Tensor) else list(tensors_in([result]))
        provenances = found if isinstance(found, list) else [found] * len(tensors)
        had = any(isinstance(self.of(tensor), Rows) for tensor in tensors_in([args, kwargs or {}]))
        for tensor, provenance in zip(tensors, provenances, strict=True):
            if provenance is not None or id(tensor) in self.known:
                self.known[id(tensor)] = tensor, provenance
            if isinstance(provenance, Lost) and had:
                self.lost[f"{getattr(func, '__name__', func)}: {provenance.reason}"] += 1
        return result


def batch_rows(size: int, ndim: int, axis: int = 0) -> Tensor:
    """Owners of a batch of ``size`` samples along ``axis``."""
    shape = [1] * ndim
    shape[axis] = size
    return torch.arange(size).reshape(shape)
