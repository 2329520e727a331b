"""Which sample each element of a loss call belongs to.

B  samples in a batch      k  repeats of the whole      m  samples in a run      r  elements a sample has in a row
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lightning_memsink.losses.unreadable import UnreadableLoss


class SampleAxisLost(UnreadableLoss):
    """The elements of a loss call can't be assigned to samples."""


@dataclass(frozen=True)
class Runs:
    """A regular order of elements: samples ``first``, ..., ``first + count - 1``, each ``r`` times in a row, and all of
    that ``k`` times. Batch-major rows have k = 1, time-major ones r = 1, two views joined by ``cat`` k = 2."""

    repeats: int
    first: int
    count: int
    length: int

    @staticmethod
    def of(owners: Tensor) -> Runs | None:
        """The order of flat ``owners``; None if it is not regular."""
        if not owners.numel() or int(owners[0]) < 0:
            return None
        first = int(owners[0])
        changes = (owners[1:] != owners[:-1]).nonzero().flatten()
        length = int(changes[0]) + 1 if len(changes) else owners.numel()
        count = int(owners.max()) - first + 1
        repeats = owners.numel() // (count * length)
        if count < 1 or repeats * count * length != owners.numel():
            return None
        found = Runs(repeats, first, count, length)
        return found if torch.equal(found.owners(), owners) else None

    def owners(self) -> Tensor:
        """``[k * m * r]`` sample numbers."""
        samples = torch.arange(self.first, self.first + self.count)
        return samples.repeat_interleave(self.length).repeat(self.repeats)


@dataclass(frozen=True, eq=False)
class SampleRows:
    """The owner of each element of a tensor.

    ``owners`` is int64 on the CPU, with the tensor's number of axes, each extent the tensor's or 1; negative where an
    element belongs to no sample.
    """

    owners: Tensor

    @cached_property
    def runs(self) -> Runs | None:
        """The order of the owners, if it is regular: then folding is a sum over axes."""
        return Runs.of(self.owners.flatten())

    def fold(self, values: Tensor, batch_size: int) -> Tensor:
        """``[B]``: the sum of each sample's elements of ``values``."""
        if self.owners.shape != values.shape:
            alone = [axis for axis, extent in enumerate(self.owners.shape) if extent == 1 and values.shape[axis] != 1]
            values = values.sum(alone) if alone else values
        flat = values.reshape(-1)
        runs = self.runs
        if runs is not None:
            if runs.repeats == 1:
                sums = flat if runs.length == 1 else flat.reshape(runs.count, runs.length).sum(1)
            else:
                sums = flat.reshape(runs.repeats, runs.count, runs.length).sum((0, 2))
            if runs.count == batch_size:
                return sums
            return torch.cat([sums.new_zeros(runs.first), sums, sums.new_zeros(batch_size - runs.first - runs.count)])
        places = self._on(flat.device) % (batch_size + 1)  # -1 is the last place
        return flat.new_zeros(batch_size + 1).index_add(0, places, flat)[:batch_size]

    def spread(self, weights: Tensor, shape: torch.Size) -> Tensor:
        """The ``weights`` ``[B]`` of samples as those of elements, of ``shape``; 1 where an element has no sample."""
        places = self._on(weights.device) % (len(weights) + 1)
        return torch.cat([weights, weights.new_ones(1)])[places].reshape(self.owners.shape).expand(shape)

    def flat(self, shape: torch.Size, device: torch.device) -> Tensor:
        """The owner of each element of a tensor of ``shape``, flattened."""
        return self.owners.expand(shape).reshape(-1).to(device, non_blocking=True)

    def _on(self, device: torch.device) -> Tensor:
        return self.owners.reshape(-1).clamp(min=-1).to(device, non_blocking=True)

    @staticmethod
    def batch_major(batch_size: int, axes: int) -> SampleRows:
        """The rows of a tensor with ``axes`` axes, the first of which runs over the batch."""
        return SampleRows(torch.arange(batch_size).reshape(-1, *[1] * (axes - 1)))
