"""What unreduced losses were multiplied with before they are summed: masks, weights, targets that don't count."""

from __future__ import annotations

import weakref
from collections import deque
from typing import Any

import torch
from torch import Tensor

from lightning_memsink.losses.unreduced import counted_targets, has_reduction

PRODUCTS = frozenset(("mul", "multiply", "__mul__", "__rmul__"))
RESHAPES = frozenset(("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "float", "contiguous"))
JOINS = frozenset(("cat", "concat", "concatenate", "stack"))
MOST = 64  # tensors whose factors are kept: the last ones, since a loss is summed soon

MOST_ELEMENTS = 2**18  # losses of tokens, and no activations, whose memory would be held


class LossFactors:
    """The factors of the tensors of a step, without gradient and of their shape."""

    def __init__(self) -> None:
        self._made: deque[tuple[weakref.ref[Tensor], tuple[Tensor, ...]]] = deque(maxlen=MOST)

    def of(self, tensor: Any) -> tuple[Tensor, ...]:
        """What ``tensor`` was made of by multiplication."""
        return next((factors for made, factors in self._made if made() is tensor), ())

    def clear(self) -> None:
        """Forgets all tensors."""
        self._made.clear()

    def note(self, func: Any, name: str, args: Any, kwargs: Any, result: Tensor) -> None:
        """Notes the factors of the result of a call."""
        factors = self._found(func, name, args, kwargs, result) if result.numel() <= MOST_ELEMENTS else ()
        if factors:
            self._made.append((weakref.ref(result), factors))

    def _found(self, func: Any, name: str, args: Any, kwargs: Any, result: Tensor) -> tuple[Tensor, ...]:
        """What a tensor of losses was multiplied with; of likelihoods, which targets count."""
        if name in ("cross_entropy", "nll_loss") and has_reduction(func):
            counted = counted_targets(func, args, kwargs)
            return () if counted is None or counted.numel() != result.numel() else (counted.reshape(result.shape),)
        first = args[0] if args else None
        if name in JOINS and isinstance(first, (list, tuple)):
            masks = [self.of(part) for part in first]
            if not any(masks):
                return ()
            whole = [
                torch.stack([each.float().expand(part.shape) for each in mask]).prod(0)
                if mask
                else torch.ones_like(part)
                for part, mask in zip(first, masks, strict=True)
            ]
            return (func([each.detach() for each in whole], *args[1:], **kwargs),)
        if name in PRODUCTS:
            own = tuple(each for each in args[:2] if isinstance(each, Tensor) and not each.requires_grad)
            return own + tuple(each for operand in args[:2] for each in self.of(operand))
        if isinstance(first, Tensor) and name in RESHAPES and first.numel() == result.numel():
            return tuple(each.expand(first.shape).reshape(result.shape) for each in self.of(first))
        return ()
