"""Finds the loss calls in the autograd graph of a loss, before the loss is differentiated.

The walk starts at the loss and stops at the loss calls, so it visits a handful of nodes and never the model.
A pre-hook on each call's node then reads, in the user's own backward, the weight that the call has in the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.overrides import TorchFunctionMode

from lightning_memsink.losses.loss_call import LossCall, LossRows
from lightning_memsink.losses.readers import (
    is_likelihood,
    is_log_softmax,
    is_report,
    read_loss_call,
    reader_of,
    saved_value,
    saved_values,
)

LossNodes = Sequence[tuple[Node, LossCall]]
"""Loss calls, each with its node of the graph."""

MOST_NODES = 4096
DEEPEST = 16  # nodes between a loss call and the tensor that was flattened into its rows

# The model begins at such a node: nothing below it is a loss.
MODEL = frozenset(
    f"{name}Backward0"
    for name in "Addmm Mm Bmm Baddbmm Convolution Embedding NativeLayerNorm NativeBatchNorm NativeDropout".split()
)
# A loss made of these only is linear in the log-probabilities it ends in (a product with a constant, that is).
LINEAR = frozenset(
    "Add Sub Rsub Neg Mul Div Sum Nansum Mean Dot Mv MaskedFill Where Gather Index IndexSelect MaskedSelect Select "
    "Slice Narrow Split View UnsafeView ReshapeAlias Alias Squeeze Unsqueeze Expand Transpose T Permute Clone ToCopy "
    "Cat Stack Unbind".split()
)
VIEWS = frozenset(("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0"))
REARRANGES = frozenset(("TransposeBackward0", "PermuteBackward0", "TBackward0", "AccumulateGrad"))


class _NoForward(TorchFunctionMode):
    """Refuses torch calls: in a checkpointed region, reading a saved tensor would run the user's forward again."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise _ForwardNeeded


class _ForwardNeeded(Exception):
    pass


def find_loss_calls(loss: Tensor) -> list[LossCall]:
    """The loss calls that ``loss`` is made of, in the order they were made.

    The backward that must follow fills in their ``upstream``. None is found in compiled code, in a custom autograd
    function, or where reading would recompute a checkpointed forward.

    Raises:
        UnreadableLoss: torch can't give what a loss call saved.
    """
    return awaiting_upstream(find_loss_nodes(loss))


def awaiting_upstream(loss_nodes: LossNodes) -> list[LossCall]:
    """The calls, with hooks by which the backward that must follow fills in their ``upstream``."""
    for node, call in loss_nodes:
        node.register_prehook(note_upstream(node, call))
    return [call for _, call in loss_nodes]


def find_loss_nodes(loss: Tensor) -> LossNodes:
    """As `find_loss_calls`, each call with its node of the graph. Registers no hooks: ``upstream`` stays empty."""
    root = loss.grad_fn
    try:
        with _NoForward():
            nodes = _loss_nodes(root)
            saved = [saved_values(node) for node in nodes]
            rows = [_rows(node) for node in nodes]
    except _ForwardNeeded:
        return []
    with torch.no_grad():
        calls = [read_loss_call(*parts) for parts in zip(nodes, saved, rows, strict=True)]
    return list(zip(nodes, calls, strict=True))


def names_near(loss: Tensor, most: int = 4) -> list[str]:
    """Names of the graph nodes nearest ``loss``, each once; those of linear nodes only if there are no others."""
    names = dict.fromkeys(node.name() for node, _ in walk(loss.grad_fn, 64))
    nonlinear = [name for name in names if _stem(name) not in LINEAR and name != "torch::autograd::AccumulateGrad"]
    return (nonlinear or list(names))[:most]


def _stem(name: str) -> str:
    return name.rpartition("Backward")[0]


def walk(
    root: Node | None, most: int = MOST_NODES, stop: Callable[[Node], bool] = lambda node: False
) -> Iterator[tuple[Node, bool]]:
    """Nodes from ``root`` breadth first, each with whether the loss is linear in it; nothing below a ``stop``.

    A node is visited again if a linear path to it is found after a nonlinear one.
    """
    visited: dict[Node, bool] = {}
    front = [(root, True)] if root is not None else []
    while front and len(visited) < most:
        nodes, front = front, []
        for node, linear in nodes:
            if node in visited and visited[node] >= linear:
                continue
            visited[node] = linear
            yield node, linear
            name = node.name()
            if name in MODEL or stop(node):
                continue
            linear = linear and _stem(name) in LINEAR
            front += [(child, linear) for child, _ in node.next_functions if child is not None]


def _loss_nodes(root: Node | None) -> list[Node]:
    """Nodes of loss calls, in the order they were made.

    A log-softmax replaces the likelihoods above it if more than one likelihood, or anything else, leads to it.
    """
    calls: dict[Node, Node | None] = {}  # node -> the log-softmax below it
    softmaxes: dict[Node, None] = {}  # log-softmaxes that are calls themselves
    is_known = calls.__contains__
    for node, linear in walk(root, stop=lambda node: is_known(node) or is_log_softmax(node)):
        if is_report(node):
            return [node]
        reader = reader_of(node)
        if reader is None or not reader.is_call(node, linear):
            continue
        if is_log_softmax(node):
            softmaxes[node] = None
            continue
        below = _log_softmax_below(node) if is_likelihood(node) else None
        if below is not None and below in calls.values():
            softmaxes[below] = None
        calls[node] = below
    nodes = [node for node, below in calls.items() if below is None or below not in softmaxes]
    return sorted([*nodes, *softmaxes], key=lambda node: node._sequence_nr())


def _log_softmax_below(node: Node) -> Node | None:
    for _ in range(4):
        below = node.next_functions[0][0] if node.next_functions else None
        if below is None or is_log_softmax(below):
            return below
        node = below
        if node.name() not in VIEWS and _stem(node.name()) not in ("Squeeze", "Unsqueeze", "ToCopy"):
            return None
    return None


def _rows(node: Node) -> LossRows:
    """Follows the first input down to the tensor that was flattened into the call's rows."""
    reader = None if is_report(node) else reader_of(node)
    if reader is None:
        return LossRows()
    sizes: list[tuple[int, ...]] = []
    index, picked_by = None, ""
    for _ in range(DEEPEST):
        below = node.next_functions[int(node.name() == "AddmmBackward0")][0] if node.next_functions else None
        if below is None or below.name() in REARRANGES or not below.next_functions:
            break
        node, name = below, below.name()
        if name in VIEWS:
            shape = tuple(saved_value(node, "self_sym_sizes"))
            sizes.append(shape[: len(shape) - int(reader.has_classes)])
            if len(shape) > 2:
                break
        elif name == "MaskedSelectBackward0":
            picked_by = name
            break
        elif name == "IndexBackward0":
            first = saved_value(node, "indices")[0]
            if first is not None:
                index, picked_by = first, name
                break
        elif name in MODEL and name not in ("AddmmBackward0", "MmBackward0", "NativeLayerNormBackward0"):
            break
    return LossRows(tuple(sizes), index, picked_by)


def note_upstream(node: Node, call: LossCall) -> Callable[[tuple[Tensor | None, ...]], None]:
    """A pre-hook that sets the call's ``upstream`` to the gradient that arrives first.

    For a log-softmax it also sets ``losses``: the mean of the log-probabilities, weighted by that gradient.
    """
    dim = saved_value(node, "dim") if is_log_softmax(node) else None

    def note(gradients: tuple[Tensor | None, ...]) -> None:
        gradient = gradients[0]
        if call.upstream is not None or gradient is None:
            return
        if dim is None:
            call.upstream = gradient.detach()
            return
        gradient, log_probs = gradient.detach().float(), call.losses.float()
        call.upstream = -gradient.sum(dim)
        weighted = torch.where(gradient == 0, 0.0, gradient * log_probs).sum(dim)
        call.losses = torch.where(call.upstream == 0, 0.0, weighted / call.upstream)

    return note
