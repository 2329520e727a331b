"""A logger for Trackio, which keeps runs on this machine and shows them in a browser without an account."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.fabric.utilities.logger import _convert_params
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only


class TrackioLogger(Logger):
    """Logs scalars to a local Trackio project; ``trackio show --project NAME`` opens it.

    Args:
        project: the project's name.
        name: of the run; None lets Trackio choose.
        options: further arguments of ``trackio.init``.

    Raises:
        ModuleNotFoundError: at the first log, if trackio is not installed.
    """

    def __init__(self, project: str = "memsink", name: str | None = None, **options: Any) -> None:
        super().__init__()
        self.project, self.run_name, self.options = project, name, options
        self._run: Any = None

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The Trackio run, started at the first call."""
        if self._run is None:
            try:
                import trackio
            except ModuleNotFoundError as error:
                raise ModuleNotFoundError(
                    "TrackioLogger needs trackio: pip install lightning-memsink[trackio]"
                ) from error
            self._run = trackio.init(self.project, self.run_name, embed=False, **self.options)
        return self._run

    @property
    def name(self) -> str:
        return self.project

    @property
    def version(self) -> str | None:
        return self.run_name if self._run is None else self._run.name

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        self.experiment.config.update({name: str(value) for name, value in _convert_params(params).items()})

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.experiment.log(dict(metrics), step=step)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        if self._run is not None:
            self._run.finish()
            self._run = None
