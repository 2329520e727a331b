"""Splits of held-out samples into pretended samples and controls, each judged as the detector judges a run.

V  rounds of visits      P  held-out samples      N  pretended samples      M  controls
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.calibration.recording import Recording
from lightning_memsink.callbacks.memorization_detector import MemorizationDetector
from lightning_memsink.detection.evaluate import SecondLook, measure_visits
from lightning_memsink.detection.evaluate import judge as judge_visits
from lightning_memsink.detection.nomination import nominate
from lightning_memsink.detection.verdicts import Flags
from lightning_memsink.samples.control_table import ControlTable
from lightning_memsink.samples.loss_table import LossTable

PLANTED = 0.05
"""Share of the pretended samples that are planted."""


@dataclass(frozen=True)
class Split:
    """Which held-out samples pretend to be trained on, and which are the controls."""

    samples: Tensor
    """``[N]`` numbers of held-out samples."""
    controls: Tensor
    """``[M]``"""
    visited: Tensor
    """Bool ``[V, N]``: the rounds in which a pretended sample is visited."""
    planted: Tensor
    """Bool ``[N]``: samples whose losses are lowered in the second half of the run."""

    def without_planted(self) -> Split:
        return Split(self.samples, self.controls, self.visited, torch.zeros_like(self.planted))


class Judged(NamedTuple):
    """What was said of the pretended samples of one split."""

    ever: Tensor
    """Bool ``[N]``: memorized after any of the looks."""
    last: Tensor
    """Bool ``[N]``: memorized after the last."""


def split(
    recording: Recording, samples: int, controls: int, visits: int | None, kinds: tuple[int, ...], seed: int
) -> Split:
    """A random split of the samples of some ``kinds``, with ``visits`` in random rounds (None: in all).

    Raises:
        ValueError: there are fewer held-out samples of these kinds.
    """
    generator = torch.Generator().manual_seed(seed)
    eligible = torch.isin(recording.kinds, torch.tensor(kinds)).nonzero().flatten()
    if len(eligible) < samples + controls:
        raise ValueError(f"{samples} samples and {controls} controls of {len(eligible)} held-out samples.")
    order = eligible[torch.randperm(len(eligible), generator=generator)]
    rounds = len(recording.visit_steps)
    rank = torch.rand(rounds, samples, generator=generator).argsort(0).argsort(0)
    planted = torch.zeros(samples, dtype=torch.bool)
    planted[: round(PLANTED * samples)] = True
    return Split(order[:samples], order[samples : samples + controls], rank < (visits or rounds), planted)


def judge(recording: Recording, split: Split, consecutive: int | None = None, second_look: bool = True) -> Judged:
    """Verdicts by the detector's defaults.

    Args:
        recording: of the run.
        split: of its samples.
        consecutive: looks that must agree; None for the default.
        second_look: whether nominated samples are measured again.
    """
    detector = MemorizationDetector() if consecutive is None else MemorizationDetector(consecutive=consecutive)
    table, controls, flags = LossTable(), ControlTable(), Flags()
    table.unit = "ratio" if recording.is_scale else "nats"
    ever = torch.zeros(len(split.samples), dtype=torch.bool)
    round_ends = recording.visit_steps.amax(1)
    onset = _onset(recording)
    before = -1
    for look, step in enumerate(recording.look_steps.tolist()):
        for number in ((round_ends <= step) & (round_ends > before)).nonzero().flatten().tolist():
            _visit(table, recording, split, number, onset)
        held = recording.look_losses[look, split.controls]
        controls.record(step, split.controls, held, recording.look_features[look, split.controls])
        if table.reference_step is None:
            table.reference_step = step
        visits = measure_visits(table, controls, flags, detector.rule)
        again = None
        if second_look and visits.refusal is None:
            again = _look_again(table, recording, split, look, onset, *nominate(visits, flags, detector.recheck))
        flags.evaluations.append(judge_visits(visits, flags, detector.rule, detector.consecutive, look, again))
        ever |= _memorized(table, flags, split)
        before = step
    return Judged(ever, _memorized(table, flags, split))


def _onset(recording: Recording) -> int:
    """Step from which planted samples have a lower loss: half of the rounds of visits are before it."""
    return int(recording.visit_steps[len(recording.visit_steps) // 2].amin())


def _visit(table: LossTable, recording: Recording, split: Split, number: int, onset: int) -> None:
    """Records one round of visits, in the order of their steps."""
    chosen = split.visited[number].nonzero().flatten()
    chosen = chosen[recording.visit_steps[number, split.samples[chosen]].argsort(stable=True)]
    if not len(chosen):
        return
    samples = split.samples[chosen]
    losses, steps = recording.visit_losses[number, samples], recording.visit_steps[number, samples]
    lowered = split.planted[chosen] & (steps >= onset)
    losses = torch.where(lowered, recording.memorized(losses, samples), losses)
    rows = table.record(samples, losses, steps, torch.ones(len(samples)))
    table.describe(rows, recording.visit_features[number, samples])


def _look_again(
    table: LossTable, recording: Recording, split: Split, look: int, onset: int, rows: Tensor, is_random: Tensor
) -> SecondLook:
    """What pretended samples in ``rows`` ``[V]`` of the table have for a loss where the controls are measured."""
    samples = table.ids[rows]
    losses = recording.look_losses[look, samples]
    if int(recording.look_steps[look]) > onset:
        planted = torch.isin(samples, split.samples[split.planted])
        losses = torch.where(planted, recording.memorized(losses, samples), losses)
    return SecondLook(rows, losses, is_random)


def _memorized(table: LossTable, flags: Flags, split: Split) -> Tensor:
    """Bool ``[N]``: the pretended samples that are memorized now."""
    rows = table.index.find(split.samples) if len(table) else torch.full_like(split.samples, -1)
    return (rows >= 0) & flags.memorized[rows.clamp(min=0)] if len(table) else rows >= 0
