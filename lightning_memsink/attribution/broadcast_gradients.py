"""The gradient of an embedding before autograd sums it over the samples that share it.

Position embeddings are looked up once, ``[1, T]`` or ``[T]``, and added to every sample. Their gradient is a sum over
samples. The node that adds them still has each sample's part: it is found in the graph behind the next module's input.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

MAX_NODES = 64
"""Nodes to search behind an input."""
SHAPES_ONLY = frozenset(f"{name}Backward0" for name in ("Unsqueeze", "View", "UnsafeView", "ToCopy", "Alias"))
BROADCASTS = frozenset(
    f"{name}Backward0" for name in ("Add", "Sub", "Expand", "Mul", "Div", "Where", "Addcmul", "Lerp")
)
SELECTIONS = frozenset(("IndexBackward0", "IndexSelectBackward0"))


def has_selected_rows(inputs: Tensor) -> bool:
    """True if the rows of ``inputs`` ``[N, U]`` were selected from another matrix, so their samples are not known."""
    return any(
        node.name() in SELECTIONS and len(_saved(node, "self_sym_sizes")) == 2
        for node, _, _ in _graph_edges(inputs.grad_fn)
    )


def _graph_edges(root: Node | None) -> Iterator[tuple[Node, int, Node]]:
    """Breadth first, ``(node, number of the edge, node below)``."""
    if root is None:
        return
    visited, front = {root}, [root]
    while front and len(visited) < MAX_NODES:
        nodes, front = front, []
        for node in nodes:
            for edge, (below, _) in enumerate(node.next_functions):
                if below is None:
                    continue
                yield node, edge, below
                if below not in visited:
                    visited.add(below)
                    front.append(below)


class BroadcastGradients:
    """Follows lookups without a sample axis from `expect` in the forward to `resolve` in the backward."""

    def __init__(self, batch_axis: int) -> None:
        self.batch_axis = batch_axis
        self.reset()

    def reset(self) -> None:
        """Discards what was recorded."""
        self._lookups: dict[Node, str] = {}
        self._gradients: dict[str, list[tuple[Tensor, float | None]]] = defaultdict(list)
        self._per_sample: set[str] = set()

    def expect(self, name: str, ids: Tensor, output: Tensor) -> None:
        """Records a lookup of ``ids`` that may have no sample axis. Call it after the lookup."""
        if output.grad_fn is not None and (ids.ndim == 1 or ids.shape[self.batch_axis] == 1):
            self._lookups[output.grad_fn] = name

    def search(self, inputs: Tensor) -> None:
        """Searches the graph behind a module's ``inputs`` for recorded lookups, and hooks the nodes that broadcast."""
        if not self._lookups or inputs.grad_fn is None:
            return
        edges = list(_graph_edges(inputs.grad_fn))
        for lookup, name in list(self._lookups.items()):
            targets = [lookup]
            for target in targets:  # grows by the nodes that only reshape it
                for node, edge, below in edges:
                    if below is not target:
                        continue
                    self._lookups.pop(lookup, None)
                    if node.name() in SHAPES_ONLY:
                        targets.append(node)
                    elif node.name() in BROADCASTS:
                        node.register_prehook(self._record_gradient(name, _factor(node, edge)))
                    else:
                        self._per_sample.add(name)

    def _record_gradient(self, name: str, factor: float | None) -> Callable[[Sequence[Tensor | None]], None]:
        gradients = self._gradients[name]

        def prehook(outputs: Sequence[Tensor | None]) -> None:
            if outputs[0] is not None:
                gradients.append((outputs[0].detach(), factor))

        return prehook

    def resolve(self, name: str, ids: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor] | None:
        """Ids and gradient of a lookup with an axis for the samples; None if they can't be had exactly."""
        if ids.ndim > 1 and ids.shape[self.batch_axis] > 1:
            return ids, gradient
        for full, factor in self._gradients[name]:
            if full.shape == gradient.shape:
                return ids, gradient
            if factor is None or full.ndim <= self.batch_axis + 1:
                continue
            full = full if factor == 1 else full * factor
            summed = full.sum(self.batch_axis)
            # Parts that don't add up to the whole would mean that the lookup is used in another place too.
            if summed.numel() == gradient.numel() and torch.allclose(
                summed.reshape(gradient.shape), gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max())
            ):
                own = ids if ids.ndim == 1 else ids.squeeze(self.batch_axis)
                return own.unsqueeze(self.batch_axis).expand(full.shape[:-1]), full
        return (ids, gradient) if ids.ndim > 1 or name in self._per_sample else None


def _factor(node: Node, edge: int) -> float | None:
    """The number that a node multiplies the gradient by on its way to an input; None if it is no number."""
    match node.name():
        case "ExpandBackward0":
            return 1.0
        case "AddBackward0":
            return float(_saved(node, "alpha")) if edge else 1.0
        case "SubBackward0":
            return -float(_saved(node, "alpha")) if edge else 1.0
    return None


def _saved(node: Node, name: str) -> Any:
    """What autograd saved under ``name``: an attribute that depends on the kind of node."""
    return getattr(node, f"_saved_{name}")
