"""What the node of a loss call saved in the autograd graph, read as a loss call.

Reading computes nothing that the user's forward did not, but the unreduced losses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lightning_memsink.losses.loss_call import LossCall, LossRows, target_buffer
from lightning_memsink.losses.per_sample import LOSSES_KEY

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


def is_report(node: Any) -> bool:
    """True for the mean that `per_sample` takes."""
    return node.name() == "MeanBackward0" and LOSSES_KEY in node.metadata


def saved_by(node: Any) -> dict[str, Any]:
    """What the node of a loss call saved. In a checkpointed region looking at it would run the user's forward."""
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


def read_loss_call(node: Any, saved: dict[str, Any], rows: LossRows) -> LossCall:
    """The call of ``node``, which ``saved`` that much and whose ``rows`` the graph told; ``upstream`` is open."""
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
    rows: LossRows, self: Tensor, target: Tensor, weight: Any, total_weight: Tensor, ignore_index: int, reduction: int
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
