"""Calls whose result is one number, as they are seen in a watched step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_memsink.losses.rule_call import tensors_in
from lightning_memsink.losses.unreduced import has_reduction

REDUCTIONS = frozenset(("mean", "sum", "nanmean", "nansum"))


@dataclass(frozen=True)
class Reduced:
    """A call whose result is one number: a mean or sum, or a loss function with its own reduction."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    name: str
    """Of the loss function; of a mean or sum of anything else "mean of" the function that made its operand."""
    factors: tuple[Tensor, ...] = ()
    """What the operand of a mean or sum was made of by multiplication."""
    versions: tuple[int, ...] = ()

    @property
    def is_loss_function(self) -> bool:
        return has_reduction(self.function)

    @property
    def is_intact(self) -> bool:
        """Whether no tensor among its arguments was changed in place since."""
        return self.versions == versions(self.args)


def versions(args: Iterable[Any]) -> tuple[int, ...]:
    """How often each tensor was changed in place; inference tensors don't count that."""
    return tuple(each._version for each in tensors_in(args) if not each.is_inference())
