"""Gathers values from all processes, so that every process has the same."""

from __future__ import annotations

from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


def gather(value: T) -> list[T]:
    """The ``value`` of each process, in the order of ranks. Every process must call it at the same point."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return [value]
    values = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def is_first() -> bool:
    """Whether this is the only process, or the first of several."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
