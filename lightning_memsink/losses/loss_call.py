"""One call of a loss function, as it was read from the graph or watched.

Element ``e`` of a call has an unreduced loss ``l_e`` and a coefficient ``s_e``, its weight in the number that is
differentiated.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_memsink.losses.sample_rows import SampleRows


@dataclass
class LossCall:
    """One call of a loss function.

    ``losses`` are unreduced, ``weights`` (same shape) the class weights and masks inside the call, ``divisor`` what a
    mean divided by, ``upstream`` the gradient of the step's loss with respect to the call's result (None: not reached).
    ``classes`` is 0 where there is no class axis. ``rows`` says whose the elements are, or why that is unknown.
    """

    kind: str
    classes: int
    losses: Tensor
    weights: Tensor | None = None
    divisor: Tensor | float = 1.0
    upstream: Tensor | None = None
    rows: SampleRows | str = "nothing says which samples its rows are"
    target: Tensor | None = None
    """As many elements as ``losses``, or None: what the call compared with."""
    class_axis: int | None = None
    """Of ``losses``, until the ``upstream`` of a log-softmax says what they are."""
    folded: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False)
    """Sums and weights by sample, by B, where the upstream is one number: the same whatever the number is. A
    `copy.copy` shares them, for each callback waits for an upstream of its own; what `replace` makes begins anew."""

    @property
    def shape(self) -> torch.Size:
        """Of the losses, without a class axis."""
        if self.class_axis is None:
            return self.losses.shape
        extents = list(self.losses.shape)
        del extents[self.class_axis]
        return torch.Size(extents)

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
