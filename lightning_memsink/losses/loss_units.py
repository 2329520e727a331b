"""The unit of a loss: nats of a likelihood, or a scale of its own, on which only ratios have a meaning.

A loss of .1 nats less means the same at any level of it. Of a squared error that is not so: its unit is that of the
data. There a loss is compared by its logarithm, so that a gap of .69 says "half the loss".

B  samples in a batch
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import Node

from lightning_memsink.losses.autograd_graph import LINEAR, MODEL, FoundCall, LossNodes, stem, walk
from lightning_memsink.losses.per_sample import Term
from lightning_memsink.losses.readers import is_log_softmax, saved_value
from lightning_memsink.samples.tokens import tokens_of

Scale: TypeAlias = Literal["nats", "ratio"]
Unit: TypeAlias = Literal["nats per token", "nats", "ratio"]

LIKELIHOODS = frozenset(
    "cross_entropy nll_loss binary_cross_entropy binary_cross_entropy_with_logits kl_div ctc_loss gaussian_nll_loss "
    "poisson_nll_loss soft_margin_loss multilabel_soft_margin_loss log_softmax logsigmoid log_sigmoid".split()
)
SCALES = frozenset(
    "mse_loss l1_loss smooth_l1_loss huber_loss cosine_embedding_loss hinge_embedding_loss margin_ranking_loss "
    "triplet_margin_loss triplet_margin_with_distance_loss multi_margin_loss multilabel_margin_loss".split()
)

# Nodes by their stem. Of a function that somebody has written (a fused kernel, say) the name of its class is all there
# is to see.
_LOGARITHM = re.compile(
    r"^(log(?!it|ical)|xlog|m?v?lgamma|nllloss|ctcloss|cudnnctcloss|softmarginloss)"
    r"|cross_?entropy|nll|likelihood|log_?prob|log_?softmax",
    re.IGNORECASE,
)
_DISTANCES = frozenset(
    "Pow Abs Norm LinalgVectorNorm Sqrt MseLoss L1Loss SmoothL1Loss HuberLoss MultiMarginLoss MultilabelMarginLoss "
    "Cdist EuclideanDist Cosh".split()
)
"""What lies below one of these is compared by size, a logarithm as well."""
_MARGINS = frozenset("Clamp ClampMin Relu Maximum".split())
_OUTPUTS = frozenset("Softmax Sigmoid Tanh Gelu Silu Elu LogicalNot CompiledFunction".split())
"""The model begins here, as at `MODEL`: its own activations say nothing of the loss."""
_MOST = 256


def scale_of_kind(kind: str) -> Scale | None:
    """By the name of the loss function, as `LossCall.kind` has it; None for one that it doesn't tell."""
    name = kind.removeprefix("mean of ").removeprefix("sum of ").partition("(")[0]
    if name in LIKELIHOODS:
        return "nats"
    return "ratio" if name in SCALES else None


def scale_of_graph(node: Node | None) -> Scale | None:
    """By what the graph below ``node`` is made of, down to the model.

    ``nats`` if a logarithm is in it, or a sum with an exponential (a Poisson or Gaussian likelihood whose parameter is
    a logarithm); ``ratio`` if a power, a norm or a margin is; None if neither.
    """
    found: Scale | None = None
    for below, is_linear, is_summed in _walk(node):
        name = stem(below.name())
        if _is_logarithm(below) or (name == "Softplus" and is_linear) or (name == "Exp" and is_summed):
            return "nats"
        if name in _DISTANCES or name in _MARGINS:
            found = "ratio"
    return found


def scale_of_call(found: FoundCall) -> Scale | None:
    """By the name of a loss call, else by its graph, which must not have been freed."""
    return scale_of_kind(found.call.kind) or scale_of_graph(found.node)


def rows_of_classes(found: FoundCall) -> int:
    """How many choices among classes a loss call is of: the rows of its largest log-softmax, else its elements; 0 for
    one of labels that are true or false each."""
    softmaxes = [node for node, _ in walk(found.node, _MOST, is_log_softmax) if is_log_softmax(node)]
    shapes = [(list(node._input_metadata[0].shape), saved_value(node, "dim")) for node in softmaxes]
    rows = [int(math.prod(shape) // max(1, shape[dim])) for shape, dim in shapes if shape]
    if rows:
        return max(rows)
    return 0 if found.call.kind.startswith("binary") else found.call.shape.numel()


def can_be_ratio(losses: Tensor) -> bool:
    """Whether losses are on a scale with a zero: no finite one of them is negative."""
    return not bool((losses < 0).any())


def joint_unit(units: Iterable[Unit | None]) -> Unit | None:
    """The unit of a run of several processes, the same in each: theirs, or nats where they disagree."""
    known = {unit for unit in units if unit is not None}
    if len(known) < 2:
        return next(iter(known), None)
    return "nats" if "ratio" in known or "nats" in known else "nats per token"


class LossUnit:
    """The unit of a run's losses, from the steps that are watched.

    Of several losses in a step the one with the largest share decides, over all steps seen. A loss that nothing is
    known of is a scale while no loss is negative. Losses that can be negative are on no scale.
    """

    def __init__(self) -> None:
        self._scales: dict[tuple[str, int], Scale | None] = {}
        self._votes: dict[Scale, float] = {"nats": 0.0, "ratio": 0.0}
        self._is_negative = False
        self._are_tokens = False
        self._rows = 0

    @property
    def unit(self) -> Unit | None:
        """``nats per token``, ``nats`` or ``ratio``; None before any loss was seen."""
        if not self.is_known:
            return None
        if self._votes["ratio"] > self._votes["nats"] and not self._is_negative:
            return "ratio"
        return "nats per token" if self._are_tokens else "nats"

    @property
    def is_known(self) -> bool:
        """Whether losses of a step were seen."""
        return any(self._votes.values())

    def note_calls(self, found: LossNodes) -> None:
        """Notes what the loss calls of a step are made of, before its backward frees the graph."""
        self._rows = 0
        for each in found:
            key = each.call.kind, each.call.classes
            scale = scale_of_call(each)
            self._scales[key] = "nats" if "nats" in (scale, self._scales.get(key)) else scale
            if self._scales[key] == "nats":
                self._rows = max(self._rows, rows_of_classes(each))

    def note_graph(self, loss: Tensor) -> None:
        """Notes what a step's whole loss is made of, where its losses by sample come from a function of the user's."""
        self._scales, self._rows = {_OWN: scale_of_graph(loss.grad_fn)}, 0

    def settle(self, losses: Tensor, terms: Sequence[Term] = (), batch: Any = None) -> None:
        """Counts a step that was noted.

        Args:
            losses: ``[B]``; a step without a finite one doesn't count.
            terms: of several losses, whose sum they are.
            batch: that they are of. If it is of text, with more choices among classes than samples, each is a token.
        """
        losses = losses.detach().float()
        finite = losses[torch.isfinite(losses)]
        if not len(finite):
            return
        self._is_negative |= not can_be_ratio(finite)
        for scale, share in self._shares(terms):
            self._votes[scale] += share
        rows = max([self._rows, *(int(term.weights.nansum()) for term in terms if term.classes and not self._rows)])
        self._are_tokens |= rows > len(losses) and tokens_of(batch) is not None

    def _shares(self, terms: Sequence[Term]) -> Iterator[tuple[Scale, float]]:
        scales = [self._scales.get((term.kind, term.classes)) or scale_of_kind(term.kind) for term in terms]
        if len(set(scales)) < 2:
            noted = scales or list(self._scales.values())
            yield _either(noted), 1.0
            return
        sizes = [abs(float(term.means().nanmean()) * term.factor) for term in terms]
        total = sum(sizes)
        if not 0 < total < math.inf:
            yield "nats", 1.0
            return
        for scale, size in zip(scales, sizes, strict=True):
            yield scale or "ratio", size / total


_OWN = "", 0


def _either(scales: Sequence[Scale | None]) -> Scale:
    return "nats" if "nats" in scales else "ratio"


def _walk(root: Node | None) -> Iterator[tuple[Node, bool, bool]]:
    """Nodes from ``root`` down to the model: each with whether it enters the loss linearly, and in a sum of several
    parts. Nothing below a logarithm or a distance."""
    front = [] if root is None else [(root, True, False)]
    visited = set[tuple[Node, bool, bool]]()
    while front and len(visited) < _MOST:
        entry = front.pop()
        node, is_linear, is_summed = entry
        name = stem(node.name())
        if entry in visited or node.name() in MODEL or name in _OUTPUTS:
            continue
        visited.add(entry)
        yield entry
        if _is_logarithm(node) or name in _DISTANCES:
            continue
        below = [child for child, _ in node.next_functions if child is not None]
        is_sum = name in ("Add", "Sub", "Rsub") and len(below) > 1
        front += [(child, is_linear and name in LINEAR, is_summed or is_sum) for child in below]


def _is_logarithm(node: Node) -> bool:
    """Whether a node is a logarithm; that of a hyperbolic cosine is a distance."""
    below = node.next_functions[0][0] if node.next_functions else None
    is_log_cosh = below is not None and stem(below.name()) == "Cosh"
    return _LOGARITHM.search(stem(node.name())) is not None and not is_log_cosh
