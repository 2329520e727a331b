"""What all processes saw, on every process alike, before it enters a slot."""

from __future__ import annotations

from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


def gather(seen: T) -> list[T]:
    """What each process passed, in the order of ranks. Every process must call it at the same point."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return [seen]
    everyone = [seen] * dist.get_world_size()
    dist.all_gather_object(everyone, seen)
    return everyone


def is_first() -> bool:
    """Whether this is the only process, or the first of several."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
