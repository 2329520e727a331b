"""Runs of several real processes, each with a time after which it and all it started are killed."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pytest

SECONDS = 240
"""Far above what any run here takes: a run that reaches it hangs."""


class Failed(Exception):
    """A run ended with an error. The message is what it printed."""


def forked(work: Callable[[], Any], folder: Path, seconds: float = SECONDS) -> str:
    """Runs ``work`` in a process of its own, which may start others, and returns what all of them printed.

    Forked, so that nothing is imported again. Raises Failed if it ends badly; the test fails if it does not end.
    """
    log = folder / "output.txt"

    def alone() -> None:
        os.setsid()
        with log.open("a", buffering=1) as output:
            for stream in (1, 2):
                os.dup2(output.fileno(), stream)
            sys.stdout = sys.stderr = output
            try:
                work()
            except BaseException:
                traceback.print_exc()
                output.flush()
                os._exit(1)
            os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=alone)
    process.start()
    process.join(seconds)
    hung = process.is_alive()
    _kill(process.pid)
    process.join()
    printed = log.read_text(errors="replace")
    if hung:
        pytest.fail(f"It hangs: no end within {seconds} s. Its output:\n{printed[-4000:]}")
    if process.exitcode:
        raise Failed(printed)
    return printed


def together(work: Callable[[], Any], folder: Path, world: int, seconds: float = SECONDS) -> str:
    """``work`` in ``world`` processes at once, as torchrun starts them: when one fails, the others are ended."""

    def all_of_them() -> None:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = str(free.getsockname()[1])
        context = multiprocessing.get_context("fork")
        processes = []
        for rank in range(world):
            own = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
            elastic = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
            os.environ.update({**{name: str(value) for name, value in own.items()}, **elastic})
            processes.append(context.Process(target=watched, args=(work, 0.8 * seconds)))
            processes[-1].start()
        # Read once a round: if all ended between two reads, wait() would get an empty list and never return.
        while alive := [process.sentinel for process in processes if process.is_alive()]:
            wait(alive)
            if any(process.exitcode for process in processes):
                break
        for process in processes:
            if process.is_alive():
                process.kill()
        if any(process.exitcode for process in processes):
            raise SystemExit("a process failed")

    return forked(all_of_them, folder, seconds)


def watched(work: Callable[[], Any], seconds: float) -> None:
    """Runs ``work``; prints the stack if it takes longer than ``seconds``, at work or while exiting."""
    faulthandler.dump_traceback_later(seconds)
    work()


def launched(command: list[str], folder: Path, seconds: float = SECONDS, **environment: str) -> str:
    """Runs a command in ``folder`` and returns what it printed; raises Failed if it ends badly."""
    root = str(Path(__file__).parents[2])
    own = {"PYTHONPATH": root, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **environment}
    process = subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, **own},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        printed = process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        _kill(process.pid)
        pytest.fail(f"It hangs: no end within {seconds} s. Its output:\n{process.communicate()[0][-4000:]}")
    _kill(process.pid)
    if process.returncode:
        raise Failed(printed)
    return printed


def _kill(group: int | None) -> None:
    """Kills the processes that are left of a session."""
    try:
        os.killpg(group or 0, signal.SIGKILL) if group else None
    except ProcessLookupError:
        pass
