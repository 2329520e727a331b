"""The onset of a run from intervals: coverage of a known truth, few samples, and what stays as a run goes on."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lightning_memsink.detection.onset import (
    CLOSED,
    NEVER,
    OnsetTimes,
    RunOnset,
    is_settled,
    onset_of,
    onset_times,
    run_onset,
    settle,
    turnbull,
)
from lightning_memsink.detection.verdicts import Flags, Onset, Verdict
from lightning_memsink.samples.loss_table import LossTable

HORIZON = 2000


class Made:
    """A run whose samples become memorized at known times, and what a detector sees of it.

    ``share`` of ``samples`` become memorized, after a time since their first visit that is exponential with mean 600.
    A sample comes first in the first ``entry`` of the run. Each of ``looks`` measures the ``seen`` part of the samples.
    Of the memorized samples, ``forgotten`` are forgotten again.
    """

    def __init__(self, seed: int, samples=300, looks=20, share=0.3, seen=1.0, entry=0.0, forgotten=0.0, uneven=False):
        generator = torch.Generator().manual_seed(seed)

        def uniform(count: int) -> Tensor:
            return torch.rand(count, generator=generator, dtype=torch.float64)

        steps = torch.arange(1, looks + 1) * HORIZON // looks
        if uneven:
            steps = (uniform(looks) * HORIZON).long().clamp(min=1).unique()
        first = (uniform(samples) * entry * HORIZON).long()
        ever = uniform(samples) < share
        self.onset = torch.where(ever, first + 1 - 600 * uniform(samples).log(), torch.inf)
        until = torch.where(uniform(samples) < forgotten, self.onset - 500 * uniform(samples).log(), torch.inf)
        self.table, self.flags = LossTable(), Flags()
        ones = torch.ones(samples)
        self.table.record(torch.arange(samples), ones, first, ones)
        self.flags.grow(samples)
        self.last = int(steps[-1])
        for step in steps.tolist():
            looked = (uniform(samples) < seen) & (first < step)
            self.look(step, looked, looked & (self.onset < step) & (until >= step))

    def look(self, step: int, looked: Tensor, flagged: Tensor) -> None:
        flags, waited = self.flags, self.flags.verdict == Verdict.WAITING
        begins = flagged & (flags.onset_step < 0)
        flags.onset_step[begins] = step
        flags.onset_exposures[begins] = 1 + (step - self.table.first_step[begins]).div(100).short()
        flags.onset_step[looked & ~flagged & waited] = -1
        flags.onset_after[looked & ~flagged & (flags.onset_step < 0)] = step
        flags.streak[looked] = torch.where(flagged, flags.streak + 1, 0)[looked]
        flags.verdict[looked] = int(Verdict.LEARNED)
        flags.verdict[flagged] = int(Verdict.WAITING)
        flags.verdict[flagged & (flags.streak >= 2)] = int(Verdict.MEMORIZED)

    def estimate(self) -> RunOnset | None:
        return onset_of(onset_times(self.table, self.flags), self.last)


SETTINGS = [
    dict(looks=60),
    dict(looks=20, seen=0.3, uneven=True),
    dict(looks=20, entry=0.5),
    dict(looks=40, forgotten=0.7),
    dict(looks=30, forgotten=0.7, entry=0.3, seen=0.5, uneven=True),
    dict(looks=60, samples=100, share=0.16),
    dict(looks=60, samples=100, share=0.1),
    dict(looks=60, samples=100, share=0.02),
]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_the_interval_covers_the_true_onset(setting):
    """The quantile over samples memorized now, which this replaces, covers its own truth (a tenth of all that are
    memorized by the end) in .97, .82, 1, .99, .81, .70, .59 and .15 of these runs, and comes up to 180 steps late."""
    truth = Made(10_000, **{**setting, "samples": 100_000, "looks": 1}).onset.sort().values
    runs, covered = 0, 0
    for seed in range(80):
        run = Made(seed, **setting)
        onset = run.estimate()
        if onset is not None:
            at = float(truth[int(onset.reached / len(run.onset) * len(truth))])
            high = onset.step_high if onset.samples >= CLOSED else math.inf
            runs, covered = runs + 1, covered + (onset.step_low <= at <= high)
    assert runs > 60 and covered >= 0.95 * runs


def test_samples_that_were_forgotten_count():
    """The estimate is the same as if all were memorized still; the quantile over those that are comes 30 steps later
    in the mean."""
    run = Made(3, samples=2000, looks=40, forgotten=0.9)
    before = run.estimate()
    run.flags.verdict[run.flags.memorized] = int(Verdict.LEARNED)
    run.flags.streak[:] = 0
    after = run.estimate()
    assert replace(after, samples=0) == replace(before, samples=0) and after.samples >= before.samples


def test_a_sample_that_waits_for_a_verdict_has_no_onset_yet():
    run = Made(0, looks=1)
    assert run.flags.onset_step.max() > 0
    assert run.estimate() is None


def times(after: list[int], until: list[int]) -> OnsetTimes:
    after, until = torch.tensor(after), torch.tensor(until)
    return OnsetTimes(after, until, torch.ones_like(after), until.where(until == NEVER, torch.full_like(until, 5)))


def test_intervals_that_touch_are_counted():
    """Twenty looks with as many onsets each: the fourth of forty came by the second look, and so on."""
    after = torch.arange(20).repeat_interleave(2) * 50
    onset = onset_of(times(after.tolist(), (after + 50).tolist()), 1000)
    assert (onset.step, onset.samples, onset.reached) == (100, 40, 4)
    assert (onset.step_low, onset.step_high) == (0, 250)  # 1 to 8 are plausible where 4 are expected
    assert (onset.exposures_low, onset.exposures, onset.exposures_high) == (1.0, 5.0, 5.0)


@pytest.mark.parametrize("samples", [1, 2, 3])
def test_of_few_samples_the_interval_says_how_little_they_say(samples):
    onset = onset_of(times([90] * samples, [100] * samples), 500)
    assert (onset.step, onset.step_low, onset.step_high, onset.reached) == (100, 0, 500, samples)


def test_the_first_onsets_decide_however_many_follow():
    """Ten samples by step 100; of ten thousand that follow, a tenth is memorized by step 1500."""
    early, late = torch.full((10,), 90), 1000 + torch.arange(10_000) // 2
    few = onset_of(times(early.tolist(), [100] * 10), 400)
    many = onset_of(times(torch.cat([early, late]).tolist(), [100] * 10 + (late + 1).tolist()), 7000)
    assert few.step == many.step == 100 and many.reached == 10


def test_self_consistency_is_reached():
    """Each time is shared among the bins of its interval in proportion to their mass: the definition, by a loop."""
    generator = torch.Generator().manual_seed(0)
    after = torch.randint(0, 10, (60,), generator=generator)
    until = after + torch.randint(1, 8, (60,), generator=generator)
    until[:6] = NEVER
    ends, mass = turnbull(after, until)
    edges = [-1, *ends.tolist(), NEVER]
    shared = [0.0] * len(mass)
    for low, high in zip(after.tolist(), until.tolist(), strict=True):
        bins = [one for one in range(len(mass)) if low <= edges[one] and edges[one + 1] <= high]
        for one in bins:
            shared[one] += float(mass[one] / mass[bins].sum())
    assert mass.sum() == pytest.approx(60)
    assert mass.tolist() == pytest.approx(shared, abs=0.02)


def test_a_million_samples_with_as_many_different_ends():
    generator = torch.Generator().manual_seed(0)
    after = torch.randint(0, 1 << 30, (1_000_000,), generator=generator)
    until = after + torch.randint(1, 1 << 20, (1_000_000,), generator=generator)
    ends, mass = turnbull(after, until)
    assert len(ends) < 150 and mass.sum() == pytest.approx(1e6)
    onset = onset_of(OnsetTimes(after, until, torch.ones_like(after), torch.full_like(after, 3)), 1 << 31)
    tenth = until.sort().values[9]
    assert onset.step_low < tenth <= onset.step_high < 20 * tenth


@pytest.mark.parametrize("estimate", [turnbull, lambda after, until: onset_of(times(after.tolist(), [5]), 5)])
def test_it_draws_nothing(estimate):
    state = torch.get_rng_state()
    estimate(torch.tensor([0]), torch.tensor([5]))
    assert torch.equal(state, torch.get_rng_state())


def test_flags_of_an_older_version_and_steps_that_contradict_each_other():
    """No look before the flag is known; and one that is said to be later than the flag."""
    table, flags = LossTable(), Flags()
    table.record(torch.arange(2).repeat(2), torch.ones(4), torch.zeros(4), torch.ones(4))
    flags.grow(2)
    flags.verdict[:] = int(Verdict.MEMORIZED)
    flags.onset_step[:], flags.onset_exposures[:] = 40, 3
    flags.onset_after[1] = 90
    found = onset_times(table, flags)
    assert found.after.tolist() == [0, 39] and found.until.tolist() == [40, 40]
    assert found.exposures_after.tolist() == [1, 2] and found.exposures_until.tolist() == [3, 3]
    assert run_onset(table, flags).step == 40
    assert onset_of(onset_times(table, flags, torch.tensor([1])), 60).samples == 1


def test_nothing_memorized_is_no_onset():
    assert run_onset(LossTable(), Flags()) is None
    assert onset_of(times([], []), 10) is None
    assert onset_of(times([5, 5], [NEVER, NEVER]), 10) is None


def an_onset(step: int, low: int, high: int, samples: int = 20, settled: bool = False) -> RunOnset:
    return RunOnset(step, low, high, 3.0, 1.0, 5.0, samples, 4, settled)


def test_an_onset_is_settled_when_two_estimates_in_a_row_agree():
    first, second = an_onset(100, 50, 150), an_onset(110, 60, 160)
    assert settle(None, first) == first and not is_settled(first)
    held = settle(first, second)
    assert held == replace(second, settled=True) and is_settled(held)
    assert settle(held, an_onset(130, 80, 200)) is held, "the same numbers from now on"
    moved = settle(held, an_onset(300, 250, 350))
    assert moved.step == 300 and not moved.settled
    assert not settle(an_onset(100, 90, 110), an_onset(105, 103, 120)).settled, "the second excludes the first"
    assert settle(held, None) is held and settle(None, None) is None


def test_an_open_interval_settles_once_it_gets_no_more_samples_and_gives_way_to_a_closed_one():
    two, five = an_onset(100, 0, 200, samples=2), an_onset(100, 0, 250, samples=5)
    assert not settle(two, five).settled
    held = settle(two, replace(two, step_high=250))
    assert held.settled and settle(held, five) is held
    assert not settle(held, an_onset(110, 90, 130)).settled


def test_an_onset_of_an_older_version_is_settled():
    saved = Onset(40, 20, 60, 4.0, 3.0, 6.0, 30)
    assert is_settled(saved) and not is_settled(None)
    assert settle(saved, an_onset(50, 30, 70)) is saved


@pytest.mark.parametrize("seed", range(3))
def test_the_onset_of_a_run_stays_once_it_is_settled(seed):
    """As the run goes on, the quantile over samples memorized now moves from step 10 to 60 or 70."""
    run = Made(seed, samples=2000, looks=1, share=0.5)
    run.flags = Flags()
    run.flags.grow(2000)
    onset, settled = None, []
    everyone = torch.ones(2000, dtype=torch.bool)
    for step in range(10, HORIZON, 10):
        run.look(step, everyone, run.onset < step)
        onset = settle(onset, onset_of(onset_times(run.table, run.flags), step))
        settled += [onset] if is_settled(onset) else []
    assert len(settled) > 190 and len({id(each) for each in settled}) == 1
    tenth = run.onset.sort().values[9]
    assert settled[0].step_low <= tenth <= settled[0].step_high
