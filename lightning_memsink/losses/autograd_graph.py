"""Finds the loss calls in the autograd graph of a loss, before the loss is differentiated.

The walk starts at the loss and stops at the loss calls, so it visits a handful of nodes and never the model.
A pre-hook on each call's node then reads, in the user's own backward, the weight that the call has in the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.overrides import TorchFunctionMode

from lightning_memsink.losses.loss_call import LossCall
from lightning_memsink.losses.readers import (
    is_likelihood,
    is_log_softmax,
    is_report,
    read_loss_call,
    reader_of,
    saved_value,
    saved_values,
)


@dataclass(frozen=True)
class FoundCall:
    """A loss call and its node of the graph."""

    node: Node
    """What is differentiated with respect to its output gives the call's ``upstream``."""
    call: LossCall
    weigh_at: Node | None
    """The node whose gradients can be weighed by sample: ``node``, or one below it; None if there is none."""


LossNodes = Sequence[FoundCall]

MOST_NODES = 4096
MOST_PENALTY_NODES = 32

# The model begins at such a node: nothing below it is a loss.
MODEL = frozenset(
    f"{name}Backward0"
    for name in "Addmm Mm Bmm Baddbmm Convolution Embedding NativeLayerNorm NativeBatchNorm NativeDropout".split()
)
# A loss made of these only is linear in the log-probabilities it ends in (a product with a constant, that is).
LINEAR = frozenset(
    "Add Sub Rsub Neg Mul Div Sum Nansum Mean Dot Mv MaskedFill Where Gather Index IndexSelect MaskedSelect Select "
    "Slice Narrow Split View UnsafeView ReshapeAlias Alias Squeeze Unsqueeze Expand Transpose T Permute Clone ToCopy "
    "Cat Stack Unbind _DDPSink".split()
)
BY_NUMBERS = frozenset(("MulBackward0", "DivBackward0"))  # Lightning divides every loss by the batches accumulated
DDP_SINK = "_DDPSinkBackward"  # of DDP that looks for unused parameters: it gives on what it gets
PRODUCTS = frozenset(("Mul", "Div", "Dot", "Mv"))
VIEWS = frozenset(("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0"))
# Made of these and parameters only, a part of a loss is a penalty on the weights. A product with a constant tensor is
# not among them: the constant may be the batch.
TAKE_CONSTANTS = frozenset("Mul Div Mm Sub Rsub Dot Mv".split())
OF_PARAMETERS = LINEAR | frozenset(
    "Pow Abs LinalgVectorNorm Norm Sqrt Square Exp Log Relu Clamp ClampMin Sign Mm".split()
)


class NoForward(TorchFunctionMode):
    """Refuses torch calls: in a checkpointed region, reading a saved tensor would run the user's forward again."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise ForwardNeeded


NO_FORWARD = NoForward()


class ForwardNeeded(Exception):
    """Reading would run the user's forward again."""


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
    for found in loss_nodes:
        if found.call.upstream is None:
            found.node.register_prehook(note_upstream(found.node, found.call))
    return [found.call for found in loss_nodes]


def find_loss_nodes(loss: Tensor) -> LossNodes:
    """As `find_loss_calls`, each call with its node of the graph. Registers no hooks: ``upstream`` stays empty."""
    root = loss.grad_fn
    try:
        with NO_FORWARD:
            sole = _sole_loss_node(root)
            nodes = _loss_nodes(root) if sole is None else [sole]
            saved = [saved_values(node) for node in nodes]
    except ForwardNeeded:
        return []
    with torch.no_grad():
        calls = [read_loss_call(*parts) for parts in zip(nodes, saved, strict=True)]
    return [FoundCall(node, call, node) for node, call in zip(nodes, calls, strict=True)]


def names_near(loss: Tensor, most: int = 4) -> list[str]:
    """Names of the graph nodes nearest ``loss``, each once; those of linear nodes only if there are no others."""
    names = dict.fromkeys(node.name() for node, _ in walk(loss.grad_fn, 64))
    nonlinear = [name for name in names if stem(name) not in LINEAR and name != "torch::autograd::AccumulateGrad"]
    return (nonlinear or list(names))[:most]


def stem(name: str) -> str:
    """A node's name without ``Backward0``."""
    return name.rpartition("Backward")[0]


def linear_children(node: Node) -> list[Node] | None:
    """The nodes below ``node``, if it is linear in all of them together; None if it is not.

    Of a product or a quotient these are its one factor that depends on more than parameters.
    """
    name = stem(node.name())
    if name not in LINEAR:
        return None
    below = [child for child, _ in node.next_functions if child is not None]
    if name in PRODUCTS and len(below) > 1:
        below = [child for child in below if not is_penalty(child)]
        if len(below) > 1 or (name == "Div" and below and below[0] is not node.next_functions[0][0]):
            return None
    return below


def has_learned_factor(loss: Tensor, calls: Sequence[Node]) -> bool:
    """Whether a loss call is multiplied with a parameter on its way to ``loss`` (learned uncertainties, say)."""
    return any(
        stem(node.name()) in PRODUCTS and sum(child is not None for child, _ in node.next_functions) > 1
        for node, linear in walk(loss.grad_fn, stop=calls.__contains__)
        if linear and node not in calls
    )


def is_penalty(node: Node) -> bool:
    """Whether nothing but parameters, and arithmetic on them, is below ``node``: a penalty on the weights."""
    front, visited = [node], set[Node]()
    while front:
        node = front.pop()
        if node.name() == "torch::autograd::AccumulateGrad" or node in visited:
            continue
        visited.add(node)
        name, below = stem(node.name()), [child for child, _ in node.next_functions]
        takes_constant = name in TAKE_CONSTANTS and None in below
        if name not in OF_PARAMETERS or len(visited) > MOST_PENALTY_NODES or (takes_constant and _has_tensor(node)):
            return False
        front += [child for child in below if child is not None]
    return True


def _has_tensor(node: Node) -> bool:
    """Whether a product saved a tensor, not a number, as the factor that has no gradient."""
    try:
        with NoForward():
            saved = [getattr(node, f"_saved_{name}", None) for name in ("other", "self", "mat2")]
    except (ForwardNeeded, RuntimeError):
        return True
    return any(isinstance(each, Tensor) and each.ndim for each in saved)


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
            below = [child for child, _ in node.next_functions if child is not None]
            linear_below = linear_children(node) if linear else None
            front += [(child, linear_below is not None and child in linear_below) for child in below]


def _sole_loss_node(root: Node | None) -> Node | None:
    """The loss call, where nothing but products with numbers is above it, as in most steps: nothing else to find."""
    while root is not None:
        reader = reader_of(root)
        if reader is not None:
            return root if not is_log_softmax(root) and reader.is_call(root, True) else None
        if len(root.next_functions) > 2 or root.name() not in BY_NUMBERS:
            return None
        below = [child for child, _ in root.next_functions if child is not None]
        root = below[0] if len(below) == 1 else None
    return None


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
        if node.name() not in VIEWS and stem(node.name()) not in ("Squeeze", "Unsqueeze", "ToCopy"):
            return None
    return None


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
        call.class_axis = None

    return note
