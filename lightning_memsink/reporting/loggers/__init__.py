"""What each logger of Lightning shows of a run.

For a logger that can show more than scalars: a file beside this one with a class that is a `LoggedRun`, and an entry of
`RUNS`.
"""

from __future__ import annotations

from collections.abc import Callable

from lightning.pytorch.loggers import Logger, WandbLogger

from lightning_memsink._lightning import is_a
from lightning_memsink.reporting.loggers.logged_run import LoggedRun, ScalarRun
from lightning_memsink.reporting.loggers.wandb_run import WandbRun

Text = Callable[[int], str]
"""Turns a sample id into text."""

RUNS: dict[type[Logger], Callable[[Logger, Text | None], LoggedRun]] = {WandbLogger: WandbRun}
"""By class of logger, what shows a run in it. Loggers of other classes get scalars."""


def logged_run(logger: Logger, text: Text | None = None) -> LoggedRun:
    """A run as ``logger`` shows it.

    Args:
        logger: of `lightning.pytorch` or of `pytorch_lightning`.
        text: turns a sample id into text for lists of samples; without it no text is logged.
    """
    for kind, show in RUNS.items():
        if is_a(logger, kind):
            return show(logger, text)
    return ScalarRun(logger)
