"""Work on many rows in blocks and threads: intermediate results fit the cache, memory holds only the result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

ROWS = 512
"""Rows of a block, unless another size is given."""

Part = TypeVar("Part")
Result = TypeVar("Result")


def blocks(rows: int, size: int = ROWS) -> list[slice]:
    """Slices that cover ``rows`` rows, ``size`` rows each; the last one may be shorter."""
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def in_blocks(rows: int, work: Callable[[slice], object], size: int = ROWS) -> None:
    """Calls ``work(block)`` for each block of ``size`` rows, in threads.

    ``work`` writes its result into the rows of its block and into no others, so the order of the calls is irrelevant.
    """
    map_in_threads(work, blocks(rows, size))


def map_in_threads(work: Callable[[Part], Result], parts: Sequence[Part]) -> list[Result]:
    """Returns ``work(part)`` for each of ``parts``, in their order, computed in as many threads as torch may use.

    Within such a thread torch computes with one thread: a part is too small to be split further. The
    calling thread only waits: torch operations in it meanwhile would slow the others down.
    """
    allowed = torch.get_num_threads()
    threads = min(len(parts), allowed)
    if threads < 2:
        return list(map(work, parts))
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(work, parts))
    finally:
        torch.set_num_threads(allowed)
