"""The loss functions that are read from autograd's nodes, so that not every step has to be watched.

To add a loss function, add one entry to `LOSS_FUNCTIONS`. In a watched step ``record`` is called with the user's
arguments. `find_loss_calls` (in `autograd_graph`) looks each node of the graph up by its name and calls ``read``.
Reading computes nothing that the user's forward did not compute, except the unreduced losses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.nn import functional

from lightning_memsink.losses.loss_call import LossCall
from lightning_memsink.losses.per_sample import LOSSES_KEY
from lightning_memsink.losses.sample_rows import SampleRows
from lightning_memsink.losses.unreadable import UnreadableLoss
from lightning_memsink.losses.unreduced import Record, gather_likelihood, record_cross_entropy, record_nll_loss

MEAN = 1  # of a saved reduction: 0 is none, 2 is sum


@dataclass(frozen=True)
class NodeReader:
    """How an autograd node is read as a call of a loss function."""

    read: Callable[[dict[str, Any]], LossCall]
    """From the saved values to the call, whose ``upstream`` and ``rows`` are left open."""
    saved: tuple[str, ...]
    """What the node saved in the forward, without ``_saved_``."""
    is_call: Callable[[Node, bool], bool]
    """Whether such a node is a call, given whether the loss is linear in it."""


@dataclass(frozen=True)
class LossFunction:
    """One loss function: the functional to watch, and the autograd nodes that it leaves in the graph."""

    function: Callable[..., Tensor]
    record: Callable[..., Record]
    """Called with the arguments of ``function``."""
    nodes: Mapping[str, NodeReader] = field(default_factory=dict)
    """By the node's name."""


# Negative log-likelihood and cross entropy -------------------------------------------------------------------


def _read_likelihood(saved: dict[str, Any]) -> LossCall:
    log_probs, target = saved["self"].detach(), saved["target"]
    losses, weights = gather_likelihood(log_probs, target, saved["weight"], saved["ignore_index"])
    divisor = saved["total_weight"].detach() if saved["reduction"] == MEAN else 1.0
    classes = log_probs.shape[min(1, target.ndim)]
    return LossCall("cross_entropy", classes, losses, weights, divisor, target=target)


def _read_log_softmax(saved: dict[str, Any]) -> LossCall:
    """Losses are filled in by the backward: they depend on the (smoothed, soft) targets that multiply the result."""
    result = saved["result"].detach()
    return LossCall("cross_entropy", result.shape[saved["dim"]], result, class_axis=saved["dim"])


# Elementwise losses ------------------------------------------------------------------------------------------


def elementwise(
    function: Callable[..., Tensor],
    node: str | None = None,
    options: tuple[str, ...] = (),
    others: Mapping[str, NodeReader] | None = None,
) -> LossFunction:
    """The entry of a loss function of ``input`` and ``target`` that has no class axis.

    Args:
        node: its autograd node, which saved ``self``, ``target``, ``reduction`` and the ``options``.
        options: parameters beyond the reduction that change the losses; of these ``weight`` multiplies them.
        others: readers of other nodes.
    """
    parameters = tuple(signature(function).parameters)
    kind = function.__name__

    def elements(arguments: Mapping[str, Any], input: str) -> tuple[Tensor, Tensor | None]:
        chosen = {key: arguments[key] for key in options if key != "weight" and key in arguments}
        losses = function(
            arguments[input].detach().float(), arguments["target"].detach().float(), reduction="none", **chosen
        )
        weight = arguments.get("weight")
        return losses, None if weight is None else weight.detach().float().expand_as(losses)

    def record(*args: Any, **kwargs: Any) -> Record:
        arguments = {**dict(zip(parameters, args, strict=False)), **kwargs}
        losses, weights = elements(arguments, "input")
        return kind, 0, losses, weights, losses.numel() if arguments.get("reduction", "mean") == "mean" else 1.0

    def read(saved: dict[str, Any]) -> LossCall:
        losses, weights = elements(saved, "self")
        divisor = losses.numel() if saved["reduction"] == MEAN else 1.0
        return LossCall(kind, 0, losses, weights, divisor, target=saved["target"])

    reader = NodeReader(
        read, ("self", "target", "reduction", *options), lambda node, linear: linear and not _on_parameters(node)
    )
    return LossFunction(function, record, {**({} if node is None else {node: reader}), **(others or {})})


def _difference(kind: str, loss: Callable[[Tensor], Tensor]) -> NodeReader:
    """Reads a loss that the user wrote out as a function of ``a - b``."""
    return NodeReader(
        lambda saved: LossCall(kind, 0, loss(saved["self"].detach())),
        ("self",),
        lambda node, linear: linear and _is_difference(node),
    )


def _on_parameters(node: Node) -> bool:
    children = [child for child, _ in node.next_functions if child is not None]
    return all(child.name() == "torch::autograd::AccumulateGrad" for child in children)


def _is_difference(node: Node) -> bool:
    """True for ``(a - b).abs()`` and ``(a - b) ** 2``, unless it is of parameters."""
    below = node.next_functions[0][0]
    other_power = node.name() == "PowBackward0" and saved_value(node, "exponent") != 2
    return below is not None and below.name() == "SubBackward0" and not other_power and not _on_parameters(below)


# The registry ------------------------------------------------------------------------------------------------

LIKELIHOOD = NodeReader(
    _read_likelihood,
    ("self", "target", "weight", "total_weight", "ignore_index", "reduction"),
    lambda node, linear: linear,
)
LOG_SOFTMAX = NodeReader(_read_log_softmax, ("result", "dim"), lambda node, linear: linear)

LOSS_FUNCTIONS = (
    LossFunction(functional.cross_entropy, record_cross_entropy, {"LogSoftmaxBackward0": LOG_SOFTMAX}),
    LossFunction(
        functional.nll_loss, record_nll_loss, {"NllLossBackward0": LIKELIHOOD, "NllLoss2DBackward0": LIKELIHOOD}
    ),
    elementwise(
        functional.mse_loss,
        "MseLossBackward0",
        others={"PowBackward0": _difference("mse_loss", lambda difference: difference.float().square())},
    ),
    elementwise(
        functional.l1_loss, others={"AbsBackward0": _difference("l1_loss", lambda difference: difference.abs().float())}
    ),
    elementwise(functional.smooth_l1_loss, "SmoothL1LossBackward0", ("beta",)),
    elementwise(functional.huber_loss, "HuberLossBackward0", ("delta",)),
    elementwise(functional.binary_cross_entropy, "BinaryCrossEntropyBackward0", ("weight",)),
    elementwise(
        functional.binary_cross_entropy_with_logits, "BinaryCrossEntropyWithLogitsBackward0", ("weight", "pos_weight")
    ),
)


RECORDERS: dict[Callable[..., Tensor], Callable[..., Record]] = {each.function: each.record for each in LOSS_FUNCTIONS}
_NODE_READERS = {name: reader for each in LOSS_FUNCTIONS for name, reader in each.nodes.items()}


def _read_report(losses: Tensor) -> LossCall:
    rows = SampleRows.batch_major(len(losses), 1)
    return LossCall("reported", 0, losses.float(), divisor=max(1, losses.numel()), rows=rows)


def reader_of(node: Node) -> NodeReader | None:
    """The reader of a node that a loss function leaves in the graph; None for other nodes."""
    return _NODE_READERS.get(node.name())


def is_likelihood(node: Node) -> bool:
    """Whether ``node`` is of a negative log-likelihood: it saved ``target`` and ``ignore_index``."""
    return reader_of(node) is LIKELIHOOD


def is_log_softmax(node: Node) -> bool:
    """Whether ``node`` is of a log-softmax: it saved ``result`` and ``dim``."""
    return reader_of(node) is LOG_SOFTMAX


def is_report(node: Node) -> bool:
    """Whether ``node`` is the mean that `per_sample` takes."""
    return node.name() == "MeanBackward0" and LOSSES_KEY in metadata(node)


def metadata(node: Node) -> dict[str, Any]:
    """A node's metadata, which torch declares as a method."""
    values: dict[str, Any] = node.metadata  # type: ignore[assignment]
    return values


def saved_value(node: Node, name: str) -> Any:
    """What ``node`` saved under ``name`` in the forward. In a checkpointed region this runs the user's forward again.

    Raises:
        UnreadableLoss: torch can't give it: it was freed by a backward, or changed in place.
    """
    try:
        value = getattr(node, f"_saved_{name}")
    except RuntimeError as error:
        raise UnreadableLoss(f"autograd can't give what {node.name()} saved ({error})") from error
    if isinstance(value, int) and value >= 2**63:  # autograd shows a negative integer as an unsigned one
        return value - 2**64
    return value


def saved_values(node: Node) -> dict[str, Any]:
    """What the node of a loss call saved and its reader needs. Raises as `saved_value` does."""
    reader = None if is_report(node) else reader_of(node)
    return {name: saved_value(node, name) for name in (() if reader is None else reader.saved)}


def read_loss_call(node: Node, saved: dict[str, Any]) -> LossCall:
    """The call of ``node``, from what it ``saved``; ``upstream`` is left open, and so are ``rows`` but of a report.

    Raises:
        UnreadableLoss: a saved tensor is sparse or nested.
    """
    reader = None if is_report(node) else reader_of(node)
    if reader is None:
        return _read_report(metadata(node)[LOSSES_KEY])
    layouts = [value.layout for value in saved.values() if isinstance(value, Tensor)]
    if any(layout is not torch.strided for layout in layouts):
        raise UnreadableLoss(f"{node.name()} was computed on tensors of layout {', '.join(map(str, layouts))}")
    return reader.read(saved)
