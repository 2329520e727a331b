"""All results of an audit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_memsink.detection.matched_controls import Measurement
from lightning_memsink.extraction.audit.cohort import Cohort
from lightning_memsink.extraction.audit.config import AuditConfig
from lightning_memsink.extraction.audit.localized_units import LocalizedUnits
from lightning_memsink.extraction.audit.mean_gap import MeanGap, mean_gap
from lightning_memsink.extraction.audit.top_texts import TopTexts
from lightning_memsink.extraction.separation import Separation


@dataclass(frozen=True)
class Audit:
    """All results of an audit."""

    subject: str
    fingerprint: str
    parameters: int
    config: AuditConfig
    suspects: Cohort
    controls: Cohort
    gaps: Measurement | None
    """None if they can't be measured, for the reason ``why_no_gaps``."""
    why_no_gaps: str
    separations: dict[str, Separation]
    """By score; empty if there are too few suspected texts or controls."""
    top_texts: TopTexts
    localized_units: LocalizedUnits | None
    """None if ``config.units`` is false, or for the reason ``why_no_units``."""
    why_no_units: str
    matched_within_kind: bool
    """Whether a text's controls are of its own kind."""

    def matched(self, group: str | None) -> Tensor:
        """Bool ``[N]``: texts of a group (None: of any) that have matched controls; all False without gaps."""
        in_group = torch.tensor([group in (None, text.group) for text in self.suspects.texts])
        return in_group & (False if self.gaps is None else self.gaps.matched)

    def mean_gap(self, group: str | None) -> MeanGap:
        """How far the losses of the matched texts of a group lie below those of comparable controls; None: of all."""
        if self.gaps is None:
            return MeanGap(torch.nan, torch.nan)
        null = self.gaps.null
        if self.matched_within_kind:
            kinds = {text.kind for text in self.suspects.texts if group in (None, text.group)}
            usable = self.controls.results.loss.isfinite()
            null = null[torch.tensor([text.kind in kinds for text in self.controls.texts])[usable]]
        return mean_gap(self.gaps.gap[self.matched(group)], null)
