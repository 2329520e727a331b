"""The unreduced losses of a call of a loss function, from its arguments.

Reading computes nothing that the user's forward did not compute, except these losses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from inspect import signature
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from lightning_memsink._chunks import blocks

Record: TypeAlias = tuple[str, int, Tensor, Tensor | None, Tensor | float]
"""Kind, classes, losses, weights and divisor of a `LossCall`: plain values, because Dynamo traces what makes them."""


def gather_likelihood(
    log_probs: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of each target, and its weight: the class's, or 1; 0 where ignored.

    Args:
        log_probs: ``[N, C, ...]``, or ``[C]``.
        target: ``[N, ...]`` class numbers, or ``[]``.
    """
    losses = functional.nll_loss(log_probs, target, ignore_index=ignore_index, reduction="none").float()
    counted = target != ignore_index
    if weight is None:
        return losses, counted.float()
    return losses, weight.detach().float()[torch.where(counted, target, 0).long()] * counted


def record_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Record:
    """Of ``functional.cross_entropy``, with its arguments."""
    if input.ndim == 1:
        input, target = input[None], target[None]
    weight = None if weight is None else weight.detach().float()
    if label_smoothing == 0.0 and not target.is_floating_point():
        losses, weights = _likelihood_of_logits(input.detach(), target, weight, ignore_index)
        return "cross_entropy", input.shape[1], losses, weights, weights.sum() if reduction == "mean" else 1.0
    target = target.detach().float() if target.is_floating_point() else target
    losses = functional.cross_entropy(
        input.detach().float(), target, weight, None, ignore_index, None, "none", label_smoothing
    )
    counted = torch.ones_like(losses) if target.is_floating_point() else (target != ignore_index).float()
    if weight is not None and not target.is_floating_point():  # a mean divides by the weights of the targets
        counted = weight[torch.where(target == ignore_index, 0, target).long()] * counted
        losses = torch.where(counted == 0, 0.0, losses / counted)
    kind = "cross_entropy(soft targets)" if target.is_floating_point() else "cross_entropy"
    kind = f"cross_entropy(label_smoothing={label_smoothing:g})" if label_smoothing else kind
    return kind, input.shape[1], losses, counted, counted.sum() if reduction == "mean" else 1.0


def _likelihood_of_logits(
    logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Losses and weights, computed in blocks of rows: a second tensor as large as the logits costs memory and time."""
    whole = [slice(None)]
    parts = whole if torch.compiler.is_compiling() else blocks(len(logits)) or whole
    pairs = [
        gather_likelihood(functional.log_softmax(logits[part].float(), 1), target[part], weight, ignore_index)
        for part in parts
    ]
    return torch.cat([losses for losses, _ in pairs]), torch.cat([weights for _, weights in pairs])


def record_nll_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Record:
    """Of ``functional.nll_loss``, with its arguments."""
    losses, weights = gather_likelihood(input.detach(), target, weight, ignore_index)
    classes = input.shape[min(1, target.ndim)]
    return "cross_entropy", classes, losses, weights, weights.sum() if reduction == "mean" else 1.0


@lru_cache(maxsize=512)
def has_reduction(function: Callable[..., Any] | None) -> bool:
    """Whether ``function`` is a loss function of ``torch.nn.functional`` that reduces its losses itself."""
    if function is None or getattr(function, "__module__", "") != "torch.nn.functional":
        return False
    try:
        return "reduction" in signature(function).parameters
    except (TypeError, ValueError):
        return False


def counted_targets(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Bool, as the targets of a likelihood: those that ``ignore_index`` does not leave out. None for soft targets."""
    arguments = signature(function).bind(*args, **kwargs).arguments
    target = arguments["target"]
    return None if target.is_floating_point() else target != arguments.get("ignore_index", -100)


def unreduced(
    function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Tensor, Tensor | float]:
    """The losses that a loss function of ``torch.nn.functional`` reduced, and what their sum was divided by.

    What a sample alone would give: ``kl_div`` adds up a sample's classes, unless it takes a mean over them too, and
    ``ctc_loss`` divides by the length of the target.
    """
    bound = signature(function).bind(*args, **kwargs)
    arguments = {
        name: value.detach() if isinstance(value, Tensor) else value for name, value in bound.arguments.items()
    }
    reduction = arguments.pop("reduction", "mean")
    for name in ("size_average", "reduce"):
        arguments.pop(name, None)
    losses = function(**arguments, reduction="none").float()
    if function is functional.kl_div and reduction != "mean" and losses.ndim:
        # elements as large as the sum of their row: the mean over a row is then its sum
        each = losses.numel() // max(1, len(losses))
        return losses * each, losses.numel() if reduction == "batchmean" else each
    if function is functional.ctc_loss and reduction == "mean":
        lengths = torch.as_tensor(arguments["target_lengths"], device=losses.device).reshape(losses.shape)
        losses = losses / lengths.clamp(min=1)
    return losses, 1.0 if reduction == "sum" else losses.numel()
