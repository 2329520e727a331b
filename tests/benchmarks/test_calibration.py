"""The benchmark of calibration counts false verdicts rightly, and its splits are of samples that nobody trained on."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from benchmarks.calibration.benchmark import QUICK, before, criteria, main, measure, page, rates, report, rows
from benchmarks.calibration.end_to_end import RUNS
from benchmarks.calibration.fits import record
from benchmarks.calibration.judging import PLANTED, judge, split
from benchmarks.calibration.runs import Found, Job, run, sources
from benchmarks.calibration.settings import DRAWN, RECORDED
from benchmarks.calibration.synthetic import LOCAL_SD, Noise, draw
from benchmarks.calibration.tasks import FITS, digits, regression


def found(accused: int, false: float = 0.0, runs: int = 200) -> Found:
    return Found("a", [n < accused for n in range(runs)], [false] * runs, [0.5] * runs)


def test_each_criterion_falls_short_by_its_own_fault():
    def short(one: Found) -> set[str]:
        return {each.name.partition(": ")[2] for each in criteria({"a": rates(one)}) if not each.holds}

    assert short(found(16, 0.0)) == set()  # .05 and two standard errors are .081
    assert short(found(17, 0.0)) == {"clean runs with a verdict"}
    assert short(found(16, 0.051)) == {"false-discovery rate"}


def test_the_false_discovery_rate_may_exceed_its_bound_by_two_standard_errors():
    spread = Found("a", [False] * 4, [0.0, 0.0, 0.0, 0.4], [1.0] * 4)
    assert rates(spread).false_share_error == pytest.approx(0.2 / math.sqrt(4))
    assert all(each.holds for each in criteria({"a": rates(spread)}))


def test_fits_end_to_end_have_no_false_discovery_rate():
    assert [each.name for each in criteria({"a": rates(Found("a", [False], [], []))})] == [
        "a: clean runs with a verdict"
    ]


def test_numbers_before_and_after_stand_beside_each_other():
    measured = {"a": rates(found(10, 0.02)), "new": rates(Found("new", [False], [], []))}
    earlier = {"commit": "40fa898", "seeds": [7], "rates": {"a": rates(found(200, 0.5))}}
    assert rows({}, earlier["rates"]) == [("a", "200", "", "100.0", "", "50.0", "", "50.0", "")]
    assert rows(measured, earlier["rates"]) == [
        ("a", "200", "200", "100.0", "5.0", "50.0", "2.0", "50.0", "50.0"),
        ("new", "", "1", "", "0.0", "", "", "", ""),
    ]
    assert "| a | 200 | 200 | 100.0 | 5.0 | 50.0 | 2.0 | 50.0 | 50.0 |\n" in page(measured, earlier, [3])
    made = report(measured, earlier, [3], 1.0)
    assert "in 5.0% of clean runs of the worst of 2 settings, false-discovery rate up to 2.0%" in made.figure
    assert made.as_json()["environment"]["rates"]["a"]["accused"] == 0.05


def test_every_setting_was_measured_before():
    names = [setting.name for setting in (*RECORDED, *DRAWN)] + [one.name for one in RUNS]
    assert len(names) == len(set(names)) >= 12
    assert list(before()["rates"]) == names
    assert {setting.source for setting in RECORDED} == set(FITS)
    assert len(sources()) == len(set(sources())) and set(QUICK) < set(sources())


def test_no_sample_is_a_control_and_none_is_planted_twice():
    recording = draw(Noise("normal"), 300, 4, seed=1)
    made = split(recording, 200, 100, visits=2, kinds=(0,), seed=1)
    assert torch.equal(torch.cat([made.samples, made.controls]).sort().values, torch.arange(300))
    assert made.visited.sum(0).tolist() == [2] * 200
    assert int(made.planted.sum()) == PLANTED * 200
    with pytest.raises(ValueError, match="201 samples and 100 controls of 300"):
        split(recording, 201, 100, visits=None, kinds=(0,), seed=1)


@pytest.mark.parametrize("shape", ["normal", "student", "lognormal", "exponential"])
def test_drawn_losses_have_the_spread_and_the_memory_that_are_asked_for(shape):
    recording = draw(Noise(shape, correlation=0.9), 40_000, 2, seed=3)
    losses = recording.look_losses - recording.look_losses.median(1, keepdim=True).values
    ranks = losses.argsort(1).argsort(1).float()
    # Student's fourth moment is infinite: no sample tells its standard deviation, but one tells E|t| = .637 of it.
    spread = losses[0].abs().mean() / 0.637 if shape == "student" else losses[0].std()
    assert float(spread) == pytest.approx(LOCAL_SD, rel=0.05)
    memory = {"student": (0.75, 0.9)}.get(shape, (0.87, 0.91))
    assert memory[0] < float(torch.corrcoef(ranks)[0, 1]) < memory[1]


def test_low_and_high_tails_mirror_each_other():
    high, low = (draw(Noise("exponential", tail), 1000, 2, seed=3).look_losses for tail in (1, -1))
    centre = (high + low) / 2
    torch.testing.assert_close(centre, centre[:, :1].expand(-1, 1000))
    assert float((high - centre).min()) > -0.51 and float((high - centre).max()) > 2


@pytest.mark.parametrize("second_look", [True, False])
def test_planted_samples_are_found_and_no_others_where_noise_is_small(second_look):
    recording = draw(Noise("normal", correlation=0.99), 2200, 4, seed=5)
    recording.planted_gap.fill_(8.0)
    made = split(recording, 200, 2000, visits=None, kinds=(0,), seed=5)
    said = judge(recording, made, second_look=second_look)
    assert torch.equal(said.last, made.planted) and torch.equal(said.ever, made.planted)
    assert not judge(recording, made.without_planted(), second_look=second_look).ever.any()


def test_a_planted_squared_error_is_divided():
    recording = replace(draw(Noise("normal"), 10, 2, seed=0), is_scale=True, planted_gap=torch.full((10,), 1.5))
    losses = torch.tensor([1.0, 0.0])
    torch.testing.assert_close(recording.memorized(losses, torch.tensor([3, 4])), losses * math.exp(-1.5))


def test_a_run_with_fewer_looks_ends_with_the_same():
    recording = draw(Noise("normal"), 10, 8, seed=0)
    fewer = recording.only_looks(4)
    assert fewer.look_steps.tolist() == recording.look_steps[1::2].tolist()
    assert torch.equal(fewer.look_losses[-1], recording.look_losses[-1])
    assert recording.only_looks(1).look_steps.tolist() == recording.look_steps[-1:].tolist()


def test_a_fit_measures_held_out_samples_once_a_round_and_at_each_look():
    fit = regression(seed=4)
    at_first = fit.losses(fit.model, fit.held_out).detach()
    fit = replace(fit, looks=3, steps_a_look=5)
    recording = record(fit, seed=4)
    assert recording.look_steps.tolist() == [5, 10, 15] and recording.is_scale
    assert recording.visit_steps.amin(1).tolist() == [0, 5, 10] and recording.visit_steps.amax(1).tolist() == [4, 9, 14]
    unseen = recording.visit_steps[0] == 0
    torch.testing.assert_close(recording.visit_losses[0, unseen], at_first[unseen])
    torch.testing.assert_close(recording.look_losses[-1], fit.losses(fit.model, fit.held_out).detach())
    assert float(recording.look_losses[-1].mean()) < float(at_first.mean())


def test_visits_are_measured_in_training_mode_and_looks_are_not():
    fit = replace(digits(seed=4), looks=1, steps_a_look=2, learning_rate=0.0)
    recording = record(fit, seed=4)
    expected = fit.losses(fit.model.eval(), fit.held_out).detach()
    torch.testing.assert_close(recording.look_losses[0], expected)
    differs = ~torch.isclose(recording.visit_losses[0], expected)
    assert float(differs.float().mean()) > 0.99


def test_settings_of_a_fit_are_judged_on_one_recording():
    names = [setting.name for setting in RECORDED if setting.source == "multi-label"]
    assert [(one.name, len(one.accused), len(one.power)) for one in run(Job("multi-label", 4, 1))] == [
        (name, 1, 1) for name in names
    ]


def test_a_fit_runs_end_to_end():
    assert [len(one.accused) for one in run(Job(RUNS[1].name, 4, 1))] == [1]
    with pytest.raises(ValueError, match="At most 1000"):
        run(Job(RUNS[1].name, 4, 1001))


def test_settings_of_several_seeds_are_joined():
    both = measure(["Student t3, by visits alone"], [1], 2)
    assert [each.runs for each in both.values()] == [2]


def test_the_command_names_its_options(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0 and "--page" in capsys.readouterr().out
