"""Update norms: how far an optimizer step moves the weights of each block.

K  blocks of modules
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from lightning_memsink._host_copy import on_host

MAX_ENTRIES = 1 << 16
"""Entries of a weight that are copied for the length of a step."""


class UpdateNorms:
    """Norm of one optimizer step of each block, estimated from every n-th entry of a large weight.

    Reads the weights only: a copy of at most 65,536 entries of each, for the length of a step. Where weights are
    sharded, each process reads its own part, without waiting for the others.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._before: list[tuple[str, Tensor, Tensor]] = []

    def before_step(self) -> None:
        """Copies the weights. Call it just before the optimizer's step."""
        self._before = [  # parameters are listed each time: FSDP2 replaces those of the start
            (block_of(name), weight, _subsampled(weight).clone())
            for name, weight in self._module.named_parameters()
            if weight.requires_grad
        ]

    def finish(self, blocks: Sequence[str]) -> Tensor | None:
        """``[K]`` this process's part of the squared norms since `before_step`, in the order of ``blocks``.

        Over all processes the parts add up to the whole, whether weights are sharded or replicated. None if there was
        no step.
        """
        if not self._before:
            return None
        moved = [
            (_subsampled(weight) - before).float().square().sum() * (_local(weight).numel() / max(1, before.numel()))
            for _, weight, before in self._before
        ]
        squares = dict.fromkeys(blocks, 0.0)
        for (block, weight, _), square in zip(self._before, on_host(moved), strict=True):
            squares[block] += float(square) / _copies(weight)
        self._before = []
        return torch.tensor([squares[block] for block in blocks])


def _local(weight: Tensor) -> Tensor:
    """The part of a weight that this process holds."""
    local = weight.to_local() if isinstance(weight, DTensor) else weight
    return local.detach()


def _copies(weight: Tensor) -> int:
    """The number of processes that hold the same part."""
    copies = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if isinstance(weight, DTensor):
        for axis, placement in enumerate(weight.placements):
            copies //= weight.device_mesh.size(axis) if isinstance(placement, Shard) else 1
    return copies


def _subsampled(weight: Tensor) -> Tensor:
    flat = _local(weight).reshape(-1)
    return flat[:: -(-len(flat) // MAX_ENTRIES) or 1]


def block_of(name: str) -> str:
    """The block a module or parameter belongs to: its name up to the first number, or all but the last part.

    >>> block_of("gpt.transformer.h.3.mlp.c_fc.weight"), block_of("gpt.transformer.wte.weight")
    ('gpt.transformer.h.3', 'gpt.transformer.wte')
    """
    parts = name.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[0] + 1] if numbers else parts[:-1] or parts)
