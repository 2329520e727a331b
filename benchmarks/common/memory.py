"""Memory in use by this process, and functions run in a forked process. Linux only: reads ``/proc/self``."""

from __future__ import annotations

import ctypes
import gc
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

MEBIBYTE = 1 << 20
RESERVE = 2 * 10**9  # less than glibc may return of it, of which 2^31 bytes are the most
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Parameters of ``mallopt``, from glibc's malloc.h."""


def memory_in_use(field: str = "VmRSS") -> int:
    """Bytes of memory resident now (``VmRSS``), or the peak since `reset_peak` (``VmHWM``)."""
    status = Path("/proc/self/status").read_text()
    return next(1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith(field))


def reset_peak() -> None:
    """Resets the high-water mark of resident memory."""
    Path("/proc/self/clear_refs").write_text("5")


def trim_heap() -> None:
    """Returns freed memory to the system, which glibc does at times of its own; what stays resident is in use."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def keep_freed_memory(reserve: int = 0) -> None:
    """Makes this process keep the memory that it frees, for reuse, and ``reserve`` bytes from the start.

    Of fits in turns, one is the first to need more memory than any before, and would pay for its pages alone: up to
    half of a validation pass of a GPT, in whichever fit the order is drawn to begin with.

    Otherwise glibc may return large blocks and request them again, zeroed, a moment later, depending on what lies at
    the top of its heap. That was 12 % of a step of a GPT and made identical fits differ by 4 %; without it they differ
    by 1 to 2.
    """
    glibc = ctypes.CDLL(None)
    glibc.mallopt(M_MMAP_MAX, 0)
    glibc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    torch.ones(reserve, dtype=torch.uint8)  # which touches its pages, and goes


def run_forked(work: Callable[[], Any]) -> Any:
    """The result of ``work`` in a forked process, by way of JSON; None if it failed. What it prints is discarded."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            os.write(writer, json.dumps(work()).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        result = pipe.read()
    os.waitpid(child, 0)
    return json.loads(result) if result else None
