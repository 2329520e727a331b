"""One call of a loss function, as it was read from the graph or watched.

Element ``e`` of a call has an unreduced loss ``l_e`` and a coefficient ``s_e``, its weight in the number that is
differentiated.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class LossRows:
    """Where the rows of a loss call come from, found in its graph.

    ``sizes`` are the leading sizes of tensors that were flattened into the rows, nearest first. ``index`` is the tensor
    that rows were picked with, ``picked_by`` the name of the node that picked them. ``buffer`` is (storage, offset,
    length of the storage) of flat targets.
    """

    sizes: tuple[tuple[int, ...], ...] = ()
    index: Tensor | None = None
    picked_by: str = ""
    buffer: tuple[int, int, int] | None = None


def target_buffer(target: Tensor) -> tuple[int, int, int] | None:
    """Where flat targets lie: (storage, offset, length of the storage); None for others."""
    if target.ndim != 1 or not target.is_contiguous():
        return None
    storage = target.untyped_storage()
    return storage.data_ptr(), int(target.storage_offset()), storage.nbytes() // target.element_size()


@dataclass
class LossCall:
    """One call of a loss function.

    ``losses`` are unreduced, ``weights`` (same shape) the class weights and masks inside the call, ``divisor`` what a
    mean divided by, ``upstream`` the gradient of the step's loss with respect to the call's result (None: not reached).
    ``classes`` is 0 where there is no class axis.
    """

    kind: str
    classes: int
    losses: Tensor
    weights: Tensor | None = None
    divisor: Tensor | float = 1.0
    upstream: Tensor | None = None
    rows: LossRows = field(default_factory=LossRows)
    folded: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False)
    """Sums and weights by sample, by B, where the upstream is one number: the same whatever the number is. A
    `copy.copy` shares them, for each callback waits for an upstream of its own; what `replace` makes begins anew."""

    def coefficients(self) -> tuple[Tensor, Tensor | float]:
        """Weights, same shape as ``losses`` and 0 where an element does not count, and a scale: ``s_e`` is their
        product. Negative weights in a vector (advantages) count by size, lest they cancel."""
        if self.upstream is None:
            return torch.zeros_like(self.losses), 0.0
        if self.upstream.ndim == 0:
            weights = torch.ones_like(self.losses) if self.weights is None else self.weights
            return weights, self.upstream.float() / self.divisor
        weights = self.upstream.float().abs().reshape(self.losses.shape)
        return weights if self.weights is None else weights * self.weights, 1.0 / self.divisor

    def total(self) -> Tensor:
        """The call's contribution to the step's loss."""
        weights, scale = self.coefficients()
        return torch.where(weights == 0, 0.0, weights * self.losses).sum() * scale
