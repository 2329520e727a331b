"""Loss calls, read out of the autograd graph behind a loss, before it is differentiated.

The walk starts at the loss and stops at the loss calls, so it sees a handful of nodes and never the model.
A pre-hook on each call's node then tells, in the user's own backward, the weight the call has in the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from lightning_memsink.losses import LOSSES_KEY, LossCall, Rows, target_buffer

LossNodes = Sequence[tuple[Any, LossCall]]
"""Loss calls, each with its node of the graph."""

MOST_NODES = 4096
DEEPEST = 16  # nodes between a loss call and the tensor whose sizes tell its samples
MEAN = 1  # of a saved reduction: 0 is none, 2 is sum
LOG_SOFTMAX = "LogSoftmaxBackward0"

# What a call's node saved, and for elementwise losses the function that recomputes them from it.
LIKELIHOOD = ("self", "target", "weight", "total_weight", "ignore_index", "reduction")
NEGATIVE_LIKELIHOOD = ("NllLossBackward0", "NllLoss2DBackward0")
ELEMENTWISE: dict[str, tuple[Callable[..., Tensor], tuple[str, ...]]] = {
    "MseLossBackward0": (functional.mse_loss, ()),
    "SmoothL1LossBackward0": (functional.smooth_l1_loss, ("beta",)),
    "HuberLossBackward0": (functional.huber_loss, ("delta",)),
    "BinaryCrossEntropyBackward0": (functional.binary_cross_entropy, ("weight",)),
    "BinaryCrossEntropyWithLogitsBackward0": (
        functional.binary_cross_entropy_with_logits,
        ("weight", "pos_weight"),
    ),
}
DIFFERENCES = {"AbsBackward0": "l1_loss", "PowBackward0": "mse_loss"}

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
            saved = [_saved(node) for node in nodes]
            rows = [_rows(node) for node in nodes]
    except _ForwardNeeded:
        return []
    with torch.no_grad():
        calls = [_read(*found) for found in zip(nodes, saved, rows, strict=True)]
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


def is_report(node: Any) -> bool:
    """True for the mean that `per_sample` takes."""
    return node.name() == "MeanBackward0" and LOSSES_KEY in node.metadata


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


def _rows(node: Any) -> Rows:
    """Follows the first input down to the tensor that was flattened into the call's rows."""
    if is_report(node):
        return Rows()
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
    return Rows(tuple(sizes), index, picked_by)


def _saved(node: Any) -> dict[str, Any]:
    name = node.name()
    if name in NEGATIVE_LIKELIHOOD:
        wanted: tuple[str, ...] = LIKELIHOOD
    elif name == LOG_SOFTMAX:
        wanted = ("result", "dim")
    elif is_report(node):
        wanted = ()
    elif name in DIFFERENCES:
        wanted = ("self",)
    else:
        wanted = ("self", "target", "reduction", *ELEMENTWISE[name][1])
    return {key: getattr(node, f"_saved_{key}") for key in wanted}


def _read(node: Any, saved: dict[str, Any], rows: Rows) -> LossCall:
    name = node.name()
    if name in NEGATIVE_LIKELIHOOD:
        return _read_likelihood(rows=rows, **saved)
    if name == LOG_SOFTMAX:
        result = saved["result"].detach()
        return LossCall("cross_entropy", result.shape[signed(saved["dim"])], result, rows=rows)
    if is_report(node):
        losses = node.metadata[LOSSES_KEY].float()
        return LossCall("reported", 0, losses, divisor=max(1, losses.numel()))
    if name in DIFFERENCES:
        difference = saved["self"].detach().float()
        losses = difference.abs() if DIFFERENCES[name] == "l1_loss" else difference.square()
        return LossCall(DIFFERENCES[name], 0, losses, rows=rows)
    function, options = ELEMENTWISE[name]
    chosen = {key: saved[key] for key in options}
    weight = chosen.pop("weight", None)
    losses = function(saved["self"].detach().float(), saved["target"].detach().float(), reduction="none", **chosen)
    return LossCall(
        function.__name__,
        0,
        losses,
        None if weight is None else weight.detach().float().expand_as(losses),
        losses.numel() if saved["reduction"] == MEAN else 1.0,
        rows=rows,
    )


def _read_likelihood(
    rows: Rows, self: Tensor, target: Tensor, weight: Any, total_weight: Tensor, ignore_index: int, reduction: int
) -> LossCall:
    losses, weights = gather_likelihood(self.detach(), target, weight, signed(ignore_index))
    divisor = total_weight.detach() if reduction == MEAN else 1.0
    rows = replace(rows, buffer=target_buffer(target))
    return LossCall("cross_entropy", self.shape[1], losses, weights, divisor, rows=rows)


def gather_likelihood(
    log_probs: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of each target, and its weight: the class's, or 1; 0 where ignored.

    Args:
        log_probs: ``[N, C, ...]``.
        target: ``[N, ...]`` class numbers.
    """
    losses = functional.nll_loss(log_probs, target, ignore_index=ignore_index, reduction="none").float()
    counted = target != ignore_index
    if weight is None:
        return losses, counted.float()
    return losses, weight.detach().float()[torch.where(counted, target, 0)] * counted


def signed(number: int) -> int:
    """Autograd shows a negative integer as an unsigned one."""
    return number - 2**64 if number >= 2**63 else number


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
