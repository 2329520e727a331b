"""What a W&B run holds of an evaluation, beside the scalars: axes, table, histogram, alert, config, summary."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_memsink.detection.verdicts import Onset
from lightning_memsink.localization.history import LocalizationHistory
from lightning_memsink.mitigation.certificate import Certificate
from lightning_memsink.reporting.scalars import COLUMNS, MemorizedSample, cells

STEP = "trainer/global_step"
"""Logged as a metric, like WandbLogger does: W&B drops rows whose ``step=`` runs behind its own counter."""
EXTREMES = ("gap", "gap_memorized", "flagged_fraction", "verdict/memorized")
"""Series whose largest value stands in the summary beside the last."""
BINS = 64


class WandbRun:
    """One run, told of evaluations. ``text`` turns a sample id into text for the table; without it none is logged."""

    def __init__(self, run: Any, config: Mapping[str, Any], text: Callable[[int], str] | None) -> None:
        import wandb

        self._run, self._text = run, text
        columns = [*COLUMNS, "text"] if text else [*COLUMNS]
        # Incremental: an evaluation writes its own rows only, where a mutable table would write all rows again.
        self._table = wandb.Table(columns=columns, log_mode="INCREMENTAL")
        run.define_metric("memsink/*", step_metric=STEP)
        for name in EXTREMES:
            run.define_metric(f"memsink/{name}", step_metric=STEP, summary="max,last")
        run.config.update({"memsink": dict(config)}, allow_val_change=True)

    def evaluation(self, row: Mapping[str, float], samples: Sequence[MemorizedSample], gaps: Tensor) -> None:
        """``row``: as in the history. ``gaps`` ``[N]``: finite, of all samples measured."""
        import numpy
        import wandb

        content: dict[str, Any] = {f"memsink/{name}": value for name, value in row.items() if name != "step"}
        if len(gaps):
            content["memsink/gaps"] = wandb.Histogram(np_histogram=numpy.histogram(gaps.numpy(), bins=BINS))
        for sample in samples:
            self._table.add_data(*cells(sample), *([self._text(sample.id)] if self._text else []))
        if samples:
            content["memsink/memorized_samples"] = self._table
        self._run.log({STEP: int(row["step"]), **content})

    def layers(self, step: int, shares: Mapping[str, Sequence[float]]) -> None:
        """``shares[group]`` ``[L]``: as a histogram with a bin a layer, which W&B draws over steps as a heat map."""
        import wandb

        heat = {
            f"memsink/layers/{group}": wandb.Histogram(np_histogram=(list(values), list(range(len(values) + 1))))
            for group, values in shares.items()
        }
        self._run.log({STEP: step, **heat})

    def heat_map(self, attribution: LocalizationHistory) -> None:
        """The picture of all evaluations, where there is matplotlib to draw it."""
        import wandb

        try:
            from lightning_memsink.reporting.layer_heat_map import layer_heat_map
        except ImportError:
            return
        figure = layer_heat_map(attribution.rows, list(attribution.units), attribution.blocks)
        self._run.log({STEP: attribution.rows[-1].step, "memsink/layer_heat_map": wandb.Image(figure)})

    def onset(self, onset: Onset) -> None:
        """An alert: an e-mail or a Slack message, as the user has set W&B up."""
        self._run.alert(
            title=f"Memorization set in at step {onset.step}",
            text=(
                f"Samples that stand as memorized: {onset.samples}. The first tenth were flagged by step {onset.step} "
                f"(95 % interval {onset.step_low} to {onset.step_high}), at exposure {onset.exposures:g}."
            ),
        )

    def certificate(self, certificate: Certificate) -> None:
        """Summary entries ``memsink/certificate/…``: the verdict, and the losses that it rests on."""
        told = {"verdict": certificate.verdict, **certificate.state()}
        self._run.summary.update(
            {f"memsink/certificate/{name}": value for name, value in told.items() if value == value and name != "exact"}
        )

    def end(self, row: Mapping[str, float], onset: Onset | None) -> None:
        """Summary entries ``memsink/final/…``: verdict counts and onset."""
        final = {name.removeprefix("verdict/"): int(row[name]) for name in row if name.startswith("verdict/")}
        final["step"] = int(row["step"])
        if onset is not None:
            final |= {"onset_step": onset.step, "onset_step_low": onset.step_low, "onset_step_high": onset.step_high}
        entries: dict[str, Any] = dict(final)
        if onset is not None:
            entries["onset_exposures"] = onset.exposures
        self._run.summary.update({f"memsink/final/{name}": value for name, value in entries.items()})
