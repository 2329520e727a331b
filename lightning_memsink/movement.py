"""How far an optimizer step moves the weights, block by block."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_memsink.propagation import block_of

MOST_ENTRIES = 1 << 16


class Movement:
    """Norm of one optimizer step of each block. Of a large tensor every n-th entry stands for the rest.

    Looks at the weights only: a copy of at most 65,536 entries of each, for the length of a step.
    """

    def __init__(self, module: nn.Module) -> None:
        self._weights = [(block_of(name), weight) for name, weight in module.named_parameters() if weight.requires_grad]
        self._before: list[Tensor] = []

    def before_step(self) -> None:
        """Just before the optimizer."""
        self._before = [_thinned(weight).clone() for _, weight in self._weights]

    def finish(self, blocks: Sequence[str]) -> Tensor | None:
        """``[K]`` norms since `before_step`, in the order of ``blocks``; None if there was no step."""
        if not self._before:
            return None
        squares = dict.fromkeys(blocks, 0.0)
        for (block, weight), before in zip(self._weights, self._before, strict=True):
            moved = (_thinned(weight) - before).float().square().sum() * (weight.numel() / max(1, before.numel()))
            squares[block] += float(moved)
        self._before = []
        return torch.tensor([squares[block] for block in blocks]).sqrt()


def _thinned(weight: Tensor) -> Tensor:
    flat = weight.detach().reshape(-1)
    return flat[:: -(-len(flat) // MOST_ENTRIES) or 1]
