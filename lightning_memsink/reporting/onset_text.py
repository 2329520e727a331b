"""The onset of memorization in words, the same in an alert and in the report."""

from __future__ import annotations

from lightning_memsink.detection.onset import RunOnset, is_settled
from lightning_memsink.detection.verdicts import Onset


def onset_title(onset: Onset) -> str:
    """When memorization set in."""
    return f"Memorization set in at step {onset.step:,}"


def onset_basis(onset: Onset) -> str:
    """How many of the memorized samples were memorized by then, and whether that is to stay."""
    of_all = f"{onset.samples:,} memorized {'sample' if onset.samples == 1 else 'samples'}"
    reached = onset.reached if isinstance(onset, RunOnset) else 0
    first = "the first" if reached in (0, 1) else f"the first {reached}"
    basis = f"This is when {first} of {of_all} had been flagged."
    return basis if is_settled(onset) else f"{basis} No second evaluation has confirmed it yet."


def onset_alert(onset: Onset) -> str:
    """The text of an alert."""
    return (
        f"Samples flagged as memorized: {onset.samples:,}. It set in at step {onset.step:,} (95 % interval "
        f"{onset.step_low:,} to {onset.step_high:,}), at exposure {onset.exposures:g} of a sample. {onset_basis(onset)}"
    )
