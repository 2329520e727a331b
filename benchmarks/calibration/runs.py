"""Jobs of the benchmark, each for a process: a source of losses with all its settings, or fits end to end."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from benchmarks.calibration.end_to_end import RUNS, any_memorized
from benchmarks.calibration.fits import record
from benchmarks.calibration.judging import judge, split
from benchmarks.calibration.recording import Recording
from benchmarks.calibration.settings import DRAWN, RECORDED, Setting
from benchmarks.calibration.synthetic import draw
from benchmarks.calibration.tasks import FITS
from benchmarks.common.criteria import configure_process

MOST_SPLITS = 1000
"""Of one seed: no two seeds share the seed of a split."""


@dataclass(frozen=True)
class Found:
    """What was said in one setting: an entry a split, or a fit."""

    name: str
    accused: list[bool]
    """Whether any sample was ever said to be memorized, where none was."""
    false_share: list[float]
    """Share of memorized samples that are not planted, where some are planted; empty for fits end to end."""
    power: list[float]
    """Share of planted samples that are found."""

    def joined(self, other: Found) -> Found:
        """The same setting with other splits added."""
        return Found(
            self.name, self.accused + other.accused, self.false_share + other.false_share, self.power + other.power
        )


@dataclass(frozen=True)
class Job:
    """Some ``splits`` (or fits) by one ``seed``: of all settings of a recorded fit, of a drawn one, or end to end."""

    source: str
    seed: int
    splits: int

    @property
    def seeds(self) -> range:
        return range(self.seed * MOST_SPLITS, self.seed * MOST_SPLITS + self.splits)


def sources() -> list[str]:
    """What a `Job` is of, the longest first."""
    return [*FITS, *(setting.name for setting in DRAWN), *(run.name for run in RUNS)]


def run(job: Job) -> list[Found]:
    """Splits and judges; silences what Lightning says in fits.

    Raises:
        ValueError: more splits than a seed has.
    """
    configure_process()  # again: Lightning, which is loaded by now, has set the level of its messages
    if job.splits > MOST_SPLITS:
        raise ValueError(f"At most {MOST_SPLITS} splits a seed, not {job.splits}.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for one in RUNS:
            if one.name == job.source:
                return [Found(one.name, [any_memorized(one, seed) for seed in job.seeds], [], [])]
    for setting in DRAWN:
        if setting.name == job.source:
            return [_found(setting, job, None)]
    recording = record(FITS[job.source](job.seed), job.seed)
    return [_found(setting, job, recording) for setting in RECORDED if setting.source == job.source]


def _found(setting: Setting, job: Job, recorded: Recording | None) -> Found:
    """Judges all splits of a setting, of one recording or of losses that are drawn anew for each."""
    found = Found(setting.name, [], [], [])
    for seed in job.seeds:
        many = setting.samples + setting.controls
        whole = recorded or draw(setting.noise, many, max(2, setting.looks), seed)
        recording = whole.only_looks(setting.looks)
        made = split(recording, setting.samples, setting.controls, setting.visits, setting.kinds, seed)
        clean = judge(recording, made.without_planted(), setting.consecutive, setting.second_look)
        found.accused.append(bool(clean.ever.any()))
        said = judge(recording, made, setting.consecutive, setting.second_look).last
        found.false_share.append(float((said & ~made.planted).sum()) / max(1, int(said.sum())))
        found.power.append(float((said & made.planted).sum()) / int(made.planted.sum()))
    return found
