"""The weight that each loss call has in a step's loss, before the backward.

The few linear nodes between the loss and its calls are called one by one. Autograd itself would run the hooks that a
user has put on the loss.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor
from torch.autograd.graph import Node

from lightning_memsink.losses.autograd_graph import (
    DDP_SINK,
    ForwardNeeded,
    LossNodes,
    NoForward,
    linear_children,
    note_upstream,
)
from lightning_memsink.losses.readers import is_likelihood
from lightning_memsink.losses.unreadable import UnreadableLoss


def set_upstreams(loss: Tensor, found: LossNodes) -> None:
    """Fills in the ``upstream`` of each call, as the backward of ``loss`` would.

    Raises:
        UnreadableLoss: the graph was freed, or reading it would run a checkpointed forward again.
    """
    if not found or loss.grad_fn is None:
        return
    try:
        with torch.no_grad():
            gradients = _gradients(loss, {each.node for each in found})
    except ForwardNeeded:
        raise UnreadableLoss("it is weighed inside a checkpointed region, which would have to run again") from None
    except RuntimeError as error:
        raise UnreadableLoss(f"the loss can't be differentiated with respect to its loss calls ({error})") from error
    for each in found:
        note_upstream(each.node, each.call)((gradients.get(each.node),))


def _gradients(loss: Tensor, calls: Collection[Node]) -> dict[Node, Tensor | None]:
    """The gradient of ``loss`` with respect to the first output of each call's node."""
    assert loss.grad_fn is not None
    arrived: dict[Node, list[Tensor | None]] = {loss.grad_fn: [torch.ones_like(loss)]}
    found: dict[Node, Tensor | None] = {}
    for node in _before_what_is_below(loss.grad_fn, calls):
        gradients = arrived.pop(node, None)
        if gradients is None:
            continue
        if node in calls:
            found[node] = gradients[0]
            continue
        if node.name() == DDP_SINK:  # called outside of a backward, it fails
            leaving: tuple[Tensor | None, ...] | Tensor = tuple(gradients)
        else:
            with NoForward():
                leaving = node(*gradients)  # type: ignore[operator]  # torch declares no call
        for (child, number), gradient in zip(
            node.next_functions, leaving if isinstance(leaving, tuple) else (leaving,), strict=False
        ):
            if child is None or gradient is None:
                continue
            slots = arrived.setdefault(child, [None] * len(child._input_metadata))
            before = slots[number]
            slots[number] = gradient if before is None else before + gradient
    return found


def _before_what_is_below(root: Node, calls: Collection[Node]) -> list[Node]:
    """The nodes on linear ways from ``root`` to the calls, each before all below it."""
    leads: dict[Node, bool] = {}
    ordered: list[Node] = []
    stack = [(root, False)]
    while stack:
        node, is_done = stack.pop()
        below = [] if node in calls else _below(node)
        if is_done:
            leads[node] = node in calls or any(leads[child] for child in below)
            if leads[node]:
                ordered.append(node)
        elif node not in leads:
            leads[node] = False
            stack.append((node, True))
            stack += [(child, False) for child in below if child not in leads]
    return ordered[::-1]


def _below(node: Node) -> list[Node]:
    if is_likelihood(node):  # of smoothed labels, whose call is the log-softmax
        return [child for child, _ in node.next_functions if child is not None]
    return linear_children(node) or []
