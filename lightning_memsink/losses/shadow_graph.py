"""An autograd graph of the few numbers that a loss is made of, in a step that autograd does not record.

In validation there is no graph that says with which weight each mean or sum enters the loss. So the numbers that
reductions gave are computed with once more, as leaves of a graph of their own.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

ENDS = frozenset(("detach", "item", "tolist", "cpu", "numpy", "__bool__", "__float__"))
QUOTIENTS = frozenset(("div", "true_divide", "__truediv__", "div_", "__itruediv__"))
MOST_ELEMENTS = 4096  # of what is made of reductions: a handful of losses, not a layer


class ShadowGraph:
    """Shadows, with gradient, of tensors that have none."""

    def __init__(self) -> None:
        self._shadows: dict[int, tuple[weakref.ref[Tensor], Tensor]] = {}
        self._used: set[int] = set()

    def touches(self, args: Any) -> bool:
        """Whether a tensor among ``args`` has a shadow."""
        return self._map(args, lambda shadow: shadow) is not args

    def of(self, tensor: Any) -> Tensor | None:
        """The shadow of a tensor."""
        found = self._shadows.get(id(tensor))
        return found[1] if found is not None and found[0]() is tensor else None

    def ends(self) -> list[Tensor]:
        """Shadows of single numbers from which nothing else was computed, in the order they were made."""
        return [shadow for key, (_, shadow) in self._shadows.items() if key not in self._used and not shadow.ndim]

    def note(
        self,
        func: Callable[..., Any],
        args: Sequence[Any],
        kwargs: dict[str, Any],
        result: Any,
        before: Tensor | None,
        is_leaf: bool,
    ) -> Node | None:
        """Makes the shadow of a result.

        Args:
            before: what ``func`` has changed in place, as it was.
            is_leaf: whether the result is a reduction, a leaf of the graph.

        Returns:
            The leaf's node.
        """
        name = getattr(func, "__name__", "")
        if not isinstance(result, Tensor) or result.numel() > MOST_ELEMENTS or name in ENDS:
            return None
        with torch.inference_mode(False), torch.enable_grad():
            shadowed = self._map(args, self._plain)
            if shadowed is not args:
                if before is not None:
                    own = self.of(args[0])
                    first = before.clone() if own is None else own.clone()
                    shadowed = (first, *shadowed[1:])
                if name in QUOTIENTS and len(shadowed) > 1 and isinstance(shadowed[1], Tensor):
                    shadowed = (shadowed[0], shadowed[1].detach(), *shadowed[2:])  # a number of elements, say
                shadow = func(*shadowed, **self._map(kwargs, self._plain))
                if not isinstance(shadow, Tensor) or not shadow.requires_grad:
                    return None
                self._used.update(id(each) for each in args if isinstance(each, Tensor) and each is not result)
                self._used.update(id(each) for part in args if isinstance(part, (list, tuple)) for each in part)
            elif is_leaf:
                # by an operation that a penalty on parameters has not: it must not be taken for one
                shadow = result.detach().clone().requires_grad_().cumsum(0)
            else:
                return None
        self._shadows[id(result)] = (weakref.ref(result), shadow)
        self._used.discard(id(result))
        return shadow.grad_fn if is_leaf and shadowed is args else None

    def _plain(self, tensor: Tensor) -> Tensor:
        """A constant that autograd may save."""
        return tensor.clone() if tensor.is_inference() else tensor

    def _map(self, thing: Any, constant: Callable[[Tensor], Tensor]) -> Any:
        """``thing`` with shadows in place of tensors; itself if none of its tensors has one."""
        if isinstance(thing, Tensor):
            shadow = self.of(thing)
            return thing if shadow is None else shadow
        if isinstance(thing, (list, tuple, dict)):
            parts = list(thing.values()) if isinstance(thing, dict) else list(thing)
            mapped = [self._map(part, constant) for part in parts]
            if all(new is old for new, old in zip(mapped, parts, strict=True)):
                return thing
            mapped = [
                constant(new) if isinstance(new, Tensor) and new is old else new
                for new, old in zip(mapped, parts, strict=True)
            ]
            return dict(zip(thing, mapped, strict=True)) if isinstance(thing, dict) else type(thing)(mapped)
        return thing
