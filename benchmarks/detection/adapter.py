"""Every use that this benchmark makes of the detector's own interface, in one place.

N  samples      M  controls
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from lightning_memsink.callbacks.loss_tracker import LossTracker
from lightning_memsink.callbacks.memorization_detector import MemorizationDetector
from lightning_memsink.detection.control_pool import held_out_controls, pooled_controls
from lightning_memsink.detection.evaluate import samples_of
from lightning_memsink.detection.matched_controls import DetectionRule, Measurement, SampleFeatures, measure_gaps
from lightning_memsink.ledger import Ledger
from lightning_memsink.samples.control_table import ControlTable
from lightning_memsink.samples.tokens import Tokens


@dataclass(frozen=True)
class LiveVerdicts:
    """What the detector and the tracker know of samples, ``[N]`` each; unknown for a sample that was never visited."""

    gap: Tensor
    p: Tensor
    verdict: Tensor
    last_step: Tensor
    exposures: Tensor


class Retrospect:
    """Measurements after training, of samples ``ids`` ``[N]`` of a finished run, by the detector's own rule.

    Controls are all that the detector has: held-out samples, and first visits of training samples.
    """

    def __init__(self, ledger: Ledger, ids: Tensor) -> None:
        self.table, self.controls, self.rule = ledger.losses, ledger.controls, DetectionRule()
        self.rows = self.table.index.find(ids)

    def after(
        self, losses: Tensor, of_controls: Tensor, keep: Tensor | None = None, method: Literal["knn", "ridge"] = "knn"
    ) -> Measurement:
        """By losses ``[N]``, and those of controls ``[M]`` in the order of their ids, taken after training. Only the
        held-out controls in ``keep`` ``[M]`` count.
        """
        samples = samples_of(self.table, self.controls, self.rows)
        now = SampleFeatures(losses, torch.ones_like(losses), samples.features)
        controls = deepcopy(self.controls)
        controls.latest = controls.previous = of_controls[controls.ids]
        if keep is not None:
            controls = _only(controls, keep[controls.ids])
        return self._measure(now, controls, replace(self.rule, method=method))

    def halves(self) -> Tensor:
        """Bool ``[M]``: flagged when half of the controls is measured as samples, against the other half."""
        even = torch.arange(len(self.controls)) % 2 == 0
        flagged = torch.zeros_like(even)
        known = held_out_controls(self.controls, self.table)
        for half in (even, ~even):
            as_samples = SampleFeatures(known.after[half], torch.ones(int(half.sum())), known.features[half])
            flagged[half] = self._measure(as_samples, _only(self.controls, ~half), self.rule).flagged
        return flagged

    def _measure(self, samples: SampleFeatures, controls: ControlTable, rule: DetectionRule) -> Measurement:
        return measure_gaps(samples, pooled_controls(self.table, controls, rule), rule, self.table.unit)


def watching(has_controls: bool = True, every: int = 20) -> tuple[LossTracker, MemorizationDetector]:
    """The callbacks of a run whose batches name their samples, with the detector's defaults.

    Without held-out controls, verdicts are due ``every`` so many steps.
    """
    tracker = LossTracker(identity="key") if has_controls else LossTracker(identity="key", control_every=every)
    return tracker, MemorizationDetector()


def describe_again(tracker: LossTracker, ids: Tensor, texts: Tensor) -> None:
    """Updates the matching features, which are as old as the last visit of each sample."""
    tokens = Tokens(texts, torch.ones_like(texts, dtype=torch.bool))
    rows = tracker.table.index.find(ids)
    tracker.matching.describe(tracker.table, rows, torch.ones_like(rows, dtype=torch.bool), tokens, None)


def verdicts_of(ledger: Ledger, ids: Tensor) -> LiveVerdicts:
    """The state of the samples ``ids`` ``[N]`` when training ended."""
    rows = ledger.losses.index.find(ids)  # -1 for an unknown one: the place after the last
    ledger.flags.grow(len(ledger.losses))

    def read(column: Tensor, unknown: float) -> Tensor:
        return torch.cat([column, torch.tensor([unknown], dtype=column.dtype)])[rows]

    return LiveVerdicts(
        gap=read(ledger.flags.gap.float(), torch.nan),
        p=read(ledger.flags.p.float(), torch.nan),
        verdict=read(ledger.flags.verdict, 0),
        last_step=read(ledger.losses.last_step, -1),
        exposures=read(ledger.losses.exposures, 0),
    )


def _only(controls: ControlTable, keep: Tensor) -> ControlTable:
    """A copy with the controls in ``keep``, bool ``[M]`` in their own order."""
    part = deepcopy(controls)
    for name in ("ids", "features", "previous", "latest", "trained"):
        setattr(part, name, getattr(part, name)[keep])
    return part
