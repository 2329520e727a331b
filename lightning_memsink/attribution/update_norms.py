"""How far an optimizer step moves the weights, block by block."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

MOST_ENTRIES = 1 << 16


class UpdateNorms:
    """Norm of one optimizer step of each block. Of a large tensor every n-th entry stands for the rest.

    Looks at the weights only: a copy of at most 65,536 entries of each, for the length of a step. Where weights are
    sharded each process looks at its part, without waiting for the others.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._before: list[tuple[str, Tensor, Tensor]] = []

    def before_step(self) -> None:
        """Just before the optimizer."""
        self._before = [  # looked up each time: FSDP2 puts other parameters in the place of those there were at first
            (block_of(name), weight, _thinned(weight).clone())
            for name, weight in self._module.named_parameters()
            if weight.requires_grad
        ]

    def finish(self, blocks: Sequence[str]) -> Tensor | None:
        """``[K]`` this process's part of the squared norms since `before_step`, in the order of ``blocks``; None if
        there was no step. Over all processes the parts add up to the whole, be weights sharded or the same on each.
        """
        if not self._before:
            return None
        squares = dict.fromkeys(blocks, 0.0)
        for block, weight, before in self._before:
            mine = _part(weight)
            moved = (_thinned(weight) - before).float().square().sum() * (mine.numel() / max(1, before.numel()))
            squares[block] += float(moved) / _copies(weight)
        self._before = []
        return torch.tensor([squares[block] for block in blocks])


def _part(weight: Tensor) -> Tensor:
    """What of a weight is in this process."""
    here = weight.to_local() if isinstance(weight, DTensor) else weight
    return here.detach()


def _copies(weight: Tensor) -> int:
    """How many processes hold the same part."""
    copies = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if isinstance(weight, DTensor):
        for axis, placement in enumerate(weight.placements):
            copies //= weight.device_mesh.size(axis) if isinstance(placement, Shard) else 1
    return copies


def _thinned(weight: Tensor) -> Tensor:
    flat = _part(weight).reshape(-1)
    return flat[:: -(-len(flat) // MOST_ENTRIES) or 1]


def block_of(name: str) -> str:
    """The block a module or parameter belongs to: its name up to the first number, or all but the last part.

    >>> block_of("gpt.transformer.h.3.mlp.c_fc.weight"), block_of("gpt.transformer.wte.weight")
    ('gpt.transformer.h.3', 'gpt.transformer.wte')
    """
    parts = name.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[0] + 1] if numbers else parts[:-1] or parts)
