"""Many rows a few at a time: what is made on the way stays in the cache, and in memory there is room for the result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

ROWS = 512
Part = TypeVar("Part")


def blocks(rows: int, size: int = ROWS) -> list[slice]:
    """``rows`` rows, ``size`` at a time."""
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def in_blocks(rows: int, work: Callable[[slice], object], size: int = ROWS) -> None:
    """``work(part)`` for each block of ``size`` rows, as `in_threads` does."""
    in_threads(blocks(rows, size), work)


def in_threads(parts: Sequence[Part], work: Callable[[Part], object]) -> None:
    """``work(part)`` for each of ``parts``, on as many threads as torch may take.

    ``work`` writes what it finds into the rows that it was given, so that the result is the same in any order. Parts
    are too small to be shared out between threads by torch: each is worked on by one.
    """
    threads = min(len(parts), torch.get_num_threads())
    if threads < 2:
        for part in parts:
            work(part)
        return
    allowed = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for _ in pool.map(work, parts):
                pass
    finally:
        torch.set_num_threads(allowed)
