"""The benchmark of overfitting tells runs that say what they know by heart from those that do not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.overfitting.benchmark import criteria, grouped, report
from benchmarks.overfitting.runs import Outcome, outcomes
from benchmarks.overfitting.tasks import TASKS, Size, pretrained
from benchmarks.overfitting.truth import counterfactual
from lightning_memsink.detection.verdicts import Verdict

SMALL = Size(samples=64, texts=16, pretraining=2, controls=(32,), epochs=0.1)


def outcome(known: int = 90, found: int = 85, wrong: int = 0, **other: object) -> Outcome:
    """Of 100 samples the first are known by heart."""
    rows = torch.arange(100)
    flagged = (rows < found) | (rows >= 100 - wrong)
    made = Outcome(
        task="a task", arm="50 controls", seed=1, unit="nats", must_find=True, knows_nothing=False,
        truth=torch.where(rows < known, 2.0, 0.0), effect=0.3,
        verdict=torch.where(flagged, int(Verdict.MEMORIZED), int(Verdict.LEARNED)),
        gap=torch.ones(100), p=torch.full((100,), 0.01), evaluation=None,
        share_low=0.85, share_high=0.95, null_share=0.1, seconds=1.0,
    )  # fmt: skip
    return replace(made, **other)  # type: ignore[arg-type]


def clean(**other: object) -> Outcome:
    """A run that learned a rule."""
    values = {"task": "a rule", "must_find": False, "knows_nothing": True, "share_low": 0.0, "share_high": 0.03}
    return outcome(0, 0, **values | other)


def short(*found: Outcome) -> set[str]:
    """Names of the criteria that fall short."""
    return {each.name for each in criteria(found) if not each.holds}


def test_each_criterion_falls_short_by_its_own_fault():
    assert short(outcome(), clean()) == set()
    assert short(outcome(), outcome(found=80), clean()) == {"a task, 50 controls: known by heart and found"}
    assert short(outcome(wrong=10), clean()) == {"a task, 50 controls: called memorized, not known by heart"}
    falsely = torch.full((100,), int(Verdict.MEMORIZED))
    assert short(outcome(), clean(verdict=falsely)) == {"a rule, 50 controls: called memorized, not known by heart"}
    assert short(outcome(share_high=0.89), clean()) == {"intervals that hold the true share"}


def test_a_run_without_statement_holds_no_truth():
    nothing = {"share_low": torch.nan, "share_high": torch.nan}
    assert short(outcome(**nothing), clean(**nothing)) == {
        "true labels: intervals that hold 0",
        "intervals that hold the true share",
    }


def test_only_runs_that_can_find_must():
    assert short(outcome(found=0, must_find=False, share_low=0.8), clean()) == set()


def test_the_report_names_the_worst_setting():
    made = report([outcome(), outcome(found=45), clean()], [1, 2], 3.0)
    assert "least 0.500" in made.figure and "3 of 3 intervals" in made.figure and not made.holds


def test_settings_are_grouped_over_seeds():
    assert {name: len(own) for name, own in grouped([outcome(), outcome(seed=2), clean()]).items()} == {
        "a task, 50 controls": 2,
        "a rule, 50 controls": 1,
    }


def test_memorization_is_what_training_took_off_beyond_held_out_samples():
    own, unseen = torch.tensor([0.5, 3.0]), torch.tensor([[2.0, 4.0], [4.0, 4.0]])
    held_out, unseen_held_out = torch.tensor([3.0, 5.0]), torch.tensor([2.0, 2.0])
    found = counterfactual(own, unseen, held_out, unseen_held_out, "nats")
    torch.testing.assert_close(found, torch.tensor([5.5, 5.0]))  # held-out samples have twice the loss: so would these
    found = counterfactual(own, unseen, held_out, unseen_held_out, "ratio")
    torch.testing.assert_close(found, torch.tensor([4.5, 3.0]))  # logarithms are 2 higher


@pytest.mark.parametrize("name", ["classes", "l1", "true"])
def test_a_short_fit_gives_every_sample_a_truth_and_a_verdict(name):
    found = outcomes(name, 0, SMALL)
    assert {one.task for one in found} == {found[0].task} and len({one.arm for one in found}) == len(found)
    for one in found:
        assert torch.isfinite(one.truth).all() and len(one.truth) == len(one.verdict) == len(one.p)
        assert one.evaluation is not None and not (one.verdict == Verdict.UNSEEN).any()


@pytest.mark.slow  # a tokenizer is trained
def test_repeated_texts_are_one_sample():
    found = {one.arm: one for one in outcomes("text", 0, SMALL)}
    repeated = found["one epoch of texts that stand in it 8 times, one validation"]
    assert len(repeated.truth) == 16 and not (repeated.verdict == Verdict.UNSEEN).any()


def test_pretraining_is_the_same_with_one_seed():
    tokens = torch.randint(50, (64, 16), generator=torch.Generator().manual_seed(0))
    first, second = (pretrained(tokens, 50, 3, 7) for _ in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert len(TASKS) == 9
