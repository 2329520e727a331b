"""Loss calls, read out of the autograd graph behind a loss, before it is differentiated.

The walk starts at the loss and stops at the loss calls, so it sees a handful of nodes and never the model.
A pre-hook on each call's node then tells, in the user's own backward, the weight the call has in the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_memsink.losses.loss_call import LossCall, LossRows
from lightning_memsink.losses.saved_tensors import (
    DIFFERENCES,
    ELEMENTWISE,
    LOG_SOFTMAX,
    NEGATIVE_LIKELIHOOD,
    is_report,
    read_loss_call,
    saved_by,
    signed,
)

LossNodes = Sequence[tuple[Any, LossCall]]
"""Loss calls, each with its node of the graph."""

MOST_NODES = 4096
DEEPEST = 16  # nodes between a loss call and the tensor whose sizes tell its samples

# The model begins here: nothing below is a loss.
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

    Their ``upstream`` is filled in by the backward that must follow. None is found in compiled code, in a custom
    autograd function, or where reading would recompute a checkpointed forward.
    """
    return awaiting_upstream(find_loss_nodes(loss))


def awaiting_upstream(found: LossNodes) -> list[LossCall]:
    """The calls, hooked: the backward that must follow fills in their ``upstream``."""
    for node, call in found:
        node.register_prehook(note_upstream(node, call))
    return [call for _, call in found]


def find_loss_nodes(loss: Tensor) -> LossNodes:
    """The same, each with its node of the graph, and nothing hooked: ``upstream`` stays empty."""
    root = loss.grad_fn
    try:
        with _NoForward():
            nodes = list(_loss_nodes(root))
            saved = [saved_by(node) for node in nodes]
            rows = [_rows(node) for node in nodes]
    except _ForwardNeeded:
        return []
    with torch.no_grad():
        calls = [read_loss_call(*found) for found in zip(nodes, saved, rows, strict=True)]
    return list(zip(nodes, calls, strict=True))


def names_near(loss: Tensor, most: int = 4) -> list[str]:
    """Names of the graph nodes nearest ``loss``, each once; those of sums and means only if there is nothing else."""
    names = dict.fromkeys(node.name() for node, _ in walk(loss.grad_fn, 64))
    telling = [name for name in names if _stem(name) not in LINEAR and name != "torch::autograd::AccumulateGrad"]
    return (telling or list(names))[:most]


def _stem(name: str) -> str:
    return name.rpartition("Backward")[0]


def walk(
    root: Any, most: int = MOST_NODES, stop: Callable[[Any], bool] = lambda node: False
) -> Iterator[tuple[Any, bool]]:
    """Nodes from ``root`` breadth first, each with whether the loss is linear in it; nothing below a ``stop``."""
    seen: dict[Any, bool] = {}
    front = [(root, True)] if root is not None else []
    while front and len(seen) < most:
        nodes, front = front, []
        for node, linear in nodes:
            if seen.get(node, False) >= linear and node in seen:
                continue
            seen[node] = linear
            yield node, linear
            name = node.name()
            if name in MODEL or stop(node):
                continue
            linear = linear and _stem(name) in LINEAR
            front += [(child, linear) for child, _ in node.next_functions if child is not None]


def _loss_nodes(root: Any) -> Iterator[Any]:
    """Nodes of loss calls. A log-softmax replaces the likelihoods above it, if it is reached in any other way."""
    found: dict[Any, Any] = {}  # node -> the log-softmax below it
    softmaxes: dict[Any, int] = {}  # log-softmax -> ways to it that are no lone likelihood
    is_found = found.__contains__
    for node, linear in walk(root, stop=lambda node: is_found(node) or node.name() == LOG_SOFTMAX):
        name = node.name()
        if is_report(node):
            return iter([node])
        if name in NEGATIVE_LIKELIHOOD:
            below = _log_softmax_below(node)
            if below is not None and below in found.values():
                softmaxes[below] = 1
            found[node] = below
        elif name == LOG_SOFTMAX and linear:
            softmaxes[node] = 1
        elif (name in ELEMENTWISE and not _on_parameter(node)) or (
            name in DIFFERENCES and linear and _is_difference(node)
        ):
            found[node] = None
    nodes = [node for node, below in found.items() if below is None or below not in softmaxes]
    return iter(sorted([*nodes, *softmaxes], key=lambda node: node._sequence_nr()))


def _log_softmax_below(node: Any) -> Any:
    for _ in range(4):
        node = node.next_functions[0][0] if node.next_functions else None
        if node is None or node.name() == LOG_SOFTMAX:
            return node
        if node.name() not in VIEWS and _stem(node.name()) not in ("Squeeze", "Unsqueeze", "ToCopy"):
            return None
    return None


def _on_parameter(node: Any) -> bool:
    children = [child for child, _ in node.next_functions if child is not None]
    return all(child.name() == "torch::autograd::AccumulateGrad" for child in children)


def _is_difference(node: Any) -> bool:
    """True for ``(a - b).abs()`` and ``(a - b) ** 2``, unless it is of parameters."""
    below = node.next_functions[0][0]
    squared = node.name() == "PowBackward0" and node._saved_exponent != 2
    return below is not None and below.name() == "SubBackward0" and not squared and not _on_parameter(below)


def _rows(node: Any) -> LossRows:
    """Follows the first input down to the tensor that was flattened into the call's rows."""
    if is_report(node):
        return LossRows()
    sizes: list[tuple[int, ...]] = []
    classes = int(node.name() in NEGATIVE_LIKELIHOOD or node.name() == LOG_SOFTMAX)
    index, picked_by = None, ""
    for _ in range(DEEPEST):
        name = node.name()
        node = node.next_functions[1 if name == "AddmmBackward0" else 0][0] if node.next_functions else None
        if node is None or node.name() in REARRANGES or len(node.next_functions) == 0:
            break
        name = node.name()
        if name in VIEWS:
            shape = tuple(node._saved_self_sym_sizes)
            sizes.append(shape[: len(shape) - classes])
            if len(shape) > 2:
                break
        elif name == "MaskedSelectBackward0":
            picked_by = name
            break
        elif name == "IndexBackward0":
            first = node._saved_indices[0]
            if first is not None:
                index, picked_by = first, name
                break
        elif name in MODEL and name not in ("AddmmBackward0", "MmBackward0", "NativeLayerNormBackward0"):
            break
    return LossRows(tuple(sizes), index, picked_by)


def note_upstream(node: Any, call: LossCall) -> Callable[[Any], None]:
    """The pre-hook that notes the gradient arriving at a call; the first one, should the graph be walked twice."""
    dim = signed(node._saved_dim) if node.name() == LOG_SOFTMAX else None

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
