"""A run in Weights & Biases: scalars on the axis of optimizer steps, tables, histograms, an alert, a summary."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger

from lightning_memsink.detection.verdicts import Onset
from lightning_memsink.localization.history import LocalizationHistory
from lightning_memsink.mitigation.certificate import Certificate
from lightning_memsink.reporting.loggers.logged_run import LoggedEnd, LoggedEvaluation
from lightning_memsink.reporting.onset_text import onset_alert, onset_title
from lightning_memsink.reporting.scalars import COLUMNS, measured_gaps, row_values

STEP = "trainer/global_step"
"""Logged as a metric, as WandbLogger does: W&B drops rows whose ``step=`` is behind its own counter."""
EXTREMES = ("gap", "gap_memorized", "flagged_fraction", "verdict/memorized")
"""Series whose largest value is in the summary, beside the last."""
BINS = 64


class WandbRun:
    """A `LoggedRun` of a ``WandbLogger``.

    Args:
        logger: of `lightning.pytorch` or of `pytorch_lightning`.
        text: turns a sample id into text for the table; without it no text is logged.
    """

    def __init__(self, logger: Logger, text: Callable[[int], str] | None = None) -> None:
        self._logger: Any = logger
        self._text = text
        self._table: Any = None

    @property
    def _run(self) -> Any:
        return self._logger.experiment

    def start(self, config: Mapping[str, Any]) -> None:
        """Defines the axis of steps and the summaries, and logs ``config`` under ``memsink``."""
        import wandb

        run = self._run
        columns = [*COLUMNS, "text"] if self._text else [*COLUMNS]
        # Incremental: an evaluation writes its own rows only, where a mutable table would write all rows again.
        self._table = wandb.Table(columns=columns, log_mode="INCREMENTAL")
        run.define_metric("memsink/*", step_metric=STEP)
        for name in EXTREMES:
            run.define_metric(f"memsink/{name}", step_metric=STEP, summary="max,last")
        run.config.update({"memsink": dict(config)}, allow_val_change=True)

    def evaluation(self, evaluation: LoggedEvaluation) -> None:
        """Logs scalars, a histogram of all measured gaps, the table of samples, the layers, and once the onset."""
        import numpy
        import wandb

        samples = evaluation.samples()
        content: dict[str, Any] = dict(evaluation.metrics)
        gaps = measured_gaps(evaluation.flags)
        if len(gaps):
            content["memsink/gaps"] = wandb.Histogram(np_histogram=numpy.histogram(gaps.numpy(), bins=BINS))
        for sample in samples:
            self._table.add_data(*row_values(sample), *([self._text(sample.id)] if self._text else []))
        if samples:
            content["memsink/memorized_samples"] = self._table
        self._run.log({STEP: evaluation.step, **content})
        if evaluation.profile is not None:
            self._layers(evaluation.step, evaluation.profile.shares)
        if evaluation.onset is not None:
            self._alert(evaluation.onset)
        for sentence in evaluation.crossed:
            self._run.alert(title="A budget of memorization is crossed", text=sentence)

    def end(self, end: LoggedEnd) -> None:
        """Writes the summary, logs the heat map of the layers, and alerts of an onset that comes last."""
        self._summary(end.row, end.onset)
        if end.is_news and end.onset is not None:
            self._alert(end.onset)
        if end.certificate is not None:
            self._certificate(end.certificate)
        if end.attribution is not None and end.attribution.rows:
            self._heat_map(end.attribution)
        if end.sources:
            import wandb

            columns = [*end.sources[0]]
            rows = [[row[column] for column in columns] for row in end.sources]
            self._run.log({STEP: int(end.row["step"]), "memsink/sources": wandb.Table(columns=columns, data=rows)})

    def how_to_open(self) -> str | None:
        """The address of an online run, the commands for an offline one, None for a disabled one."""
        run = self._run
        if run.disabled:
            return None
        if run.offline:
            folder = run.settings.sync_dir
            return f"W&B run, recorded offline.\n  Look at it: wandb leet {folder}\n  Upload it: wandb sync {folder}"
        return f"W&B run: {run.url}"

    def keep(self, files: Iterable[Path]) -> None:
        """Logs files and folders as an artifact of type ``memsink-report``; nothing in a disabled run."""
        run = self._run
        if run.disabled:
            return
        from wandb import Artifact

        artifact = Artifact(f"memsink-{run.id}", type="memsink-report")
        for path in files:
            (artifact.add_dir if path.is_dir() else artifact.add_file)(str(path), name=path.name)
        run.log_artifact(artifact)

    def _layers(self, step: int, shares: Mapping[str, Sequence[float]]) -> None:
        """``shares[group]`` ``[L]`` as a histogram with a bin per layer, which W&B draws over steps as a heat map."""
        import wandb

        heat = {
            f"memsink/layers/{group}": wandb.Histogram(np_histogram=(list(values), list(range(len(values) + 1))))
            for group, values in shares.items()
        }
        self._run.log({STEP: step, **heat})

    def _heat_map(self, attribution: LocalizationHistory) -> None:
        """Logs a picture of all evaluations; nothing without matplotlib."""
        import wandb

        try:
            from lightning_memsink.reporting.layer_heat_map import layer_heat_map
        except ImportError:
            return
        figure = layer_heat_map(attribution.rows, list(attribution.units), attribution.blocks)
        self._run.log({STEP: attribution.rows[-1].step, "memsink/layer_heat_map": wandb.Image(figure)})

    def _alert(self, onset: Onset) -> None:
        """Sends an alert: an e-mail or a Slack message, as the user has configured W&B."""
        self._run.alert(title=onset_title(onset), text=onset_alert(onset))

    def _certificate(self, certificate: Certificate) -> None:
        """Summary entries ``memsink/certificate/…``: the verdict and the losses that it rests on."""
        entries = {"verdict": certificate.verdict, **certificate.state()}
        self._run.summary.update(
            {
                f"memsink/certificate/{name}": value
                for name, value in entries.items()
                if value == value and name != "exact"  # NaN is left out
            }
        )

    def _summary(self, row: Mapping[str, float], onset: Onset | None) -> None:
        """Summary entries ``memsink/final/…``: counts of verdicts and the onset."""
        entries: dict[str, Any] = {
            name.removeprefix("verdict/"): int(row[name]) for name in row if name.startswith("verdict/")
        }
        entries["step"] = int(row["step"])
        if onset is not None:
            entries |= {
                "onset_step": onset.step,
                "onset_step_low": onset.step_low,
                "onset_step_high": onset.step_high,
                "onset_exposures": onset.exposures,
            }
        self._run.summary.update({f"memsink/final/{name}": value for name, value in entries.items()})
