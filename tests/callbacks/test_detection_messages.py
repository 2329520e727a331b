"""What a run can find is said at its start, and what keeps it from finding anything, with the setting that helps."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from lightning_memsink.callbacks.runtime.detection_messages import (
    DetectionFacts,
    equal_controls,
    start_message,
    trained_controls,
)
from lightning_memsink.callbacks.runtime.evaluation_schedule import EvaluationSchedule
from lightning_memsink.detection.statistics import benjamini_hochberg

ORDINARY = DetectionFacts(
    samples=10_000,
    held_out=500,
    schedule=EvaluationSchedule(epochs=10, steps=None, batches=100, every_batches=100),
    consecutive=2,
    alpha=0.05,
    controls_needed=16,
    recheck=512,
)
ONE_EPOCH = EvaluationSchedule(epochs=1, steps=None, batches=100, every_batches=100)


def facts(**changes):
    return replace(ORDINARY, **changes)


def said(**changes):
    message, is_warning = start_message(facts(**changes))
    assert message.startswith("memsink: ")
    assert re.search(r"\n|  |nan|\binf\b", message) is None
    assert "None" not in message.replace("every_n_epoch=None", "")
    return message, is_warning


def test_an_ordinary_run_is_described_without_a_warning():
    assert said() == (
        "memsink: 10,000 samples; 500 held-out controls and first visits of samples as controls in the first 10 "
        "epochs. Up to 10 evaluations; a sample is memorized after 2 in a row that flag it. Smallest p-value 1/10,501: "
        "at a false-discovery rate of 0.05 at least 20 memorized samples must be significant together, for a single "
        "one 1,091,886 controls. Each evaluation measures up to 512 samples again.",
        False,
    )


@pytest.mark.parametrize(
    ("samples", "held_out"), [(300, 50), (10_000, 500), (1000, 19_999), (1, 30), (1, 17), (300, 17)]
)
def test_the_number_that_must_be_significant_together_is_that_of_benjamini_and_hochberg(samples, held_out):
    run = facts(samples=samples, held_out=held_out, takes_first_visits=False)

    def is_flagged(memorized):
        """Whether so many samples at the smallest p-value are flagged at one evaluation."""
        p = torch.ones(samples)
        p[:memorized] = 1 / (held_out + 1)
        return bool(benjamini_hochberg(p, run.alpha, few=run.few)[0])

    assert is_flagged(samples) == (run.together <= samples)
    if run.together <= samples:
        assert is_flagged(run.together) and not is_flagged(run.together - 1)


def test_a_bounded_pool_is_said():
    message, is_warning = said(samples=1_000_000)
    assert "131,072 of them at a time" in message and "1/131,073" in message
    assert not is_warning


TOO_FEW = {
    "one evaluation in one epoch": (ONE_EPOCH, "Trainer(val_check_interval=0.25)"),
    "every tenth of five epochs": (
        EvaluationSchedule(epochs=5, steps=None, batches=100, every_epochs=10, every_batches=100),
        "Trainer(check_val_every_n_epoch=1)",
    ),
    "every tenth of nineteen": (
        EvaluationSchedule(epochs=19, steps=None, batches=100, every_epochs=10, every_batches=100),
        "Trainer(check_val_every_n_epoch=4)",
    ),
    "one epoch, every tenth": (
        EvaluationSchedule(epochs=1, steps=None, batches=100, every_epochs=10, every_batches=100),
        "Trainer(val_check_interval=0.25, check_val_every_n_epoch=1)",
    ),
    "steps within an epoch": (
        EvaluationSchedule(epochs=None, steps=80, batches=100, every_batches=100),
        "Trainer(val_check_interval=0.2)",
    ),
    "few steps within an epoch": (
        EvaluationSchedule(epochs=None, steps=80, batches=100_000, every_batches=100_000),
        "Trainer(val_check_interval=20, check_val_every_n_epoch=None)",
    ),
    "a stream": (
        EvaluationSchedule(epochs=None, steps=1000, batches=None, every_batches=1000),
        "Trainer(val_check_interval=250, check_val_every_n_epoch=None)",
    ),
    "own controls": (
        EvaluationSchedule(epochs=None, steps=40, batches=50, own_every=100),
        "LossTracker(control_every=10)",
    ),
    "own controls, accumulated": (
        EvaluationSchedule(epochs=None, steps=40, batches=500, accumulate=4, own_every=100),
        "LossTracker(control_every=10)",
    ),
    "an epoch of one batch": (
        EvaluationSchedule(epochs=1, steps=None, batches=1, every_batches=1),
        "a larger Trainer(max_epochs=...)",
    ),
}


@pytest.mark.parametrize(("schedule", "setting"), TOO_FEW.values(), ids=TOO_FEW)
def test_a_schedule_in_which_nothing_can_be_flagged_is_a_warning_with_the_value_to_type(schedule, setting):
    message, is_warning = said(schedule=schedule)
    assert is_warning
    assert "2 in a row flag it: nothing can be found." in message
    assert f"Set {setting}" in message


@pytest.mark.parametrize(("schedule", "setting"), TOO_FEW.values(), ids=TOO_FEW)
def test_the_value_to_type_helps(schedule, setting):
    """Typed into the schedule, there are enough evaluations, and more than by the setting as it is."""
    if "larger" in setting:
        changed = replace(schedule, epochs=10)
    elif "control_every" in setting:
        changed = replace(schedule, own_every=int(re.search(r"\d+", setting)[0]))
    else:
        interval = re.search(r"val_check_interval=([\d.]+)", setting)
        every = re.search(r"every_n_epoch=(\w+)", setting)
        batches = schedule.every_batches
        if interval is not None:
            typed = interval[1]
            batches = int(schedule.batches * float(typed)) if "." in typed else int(typed)
        epochs = schedule.every_epochs if every is None else None if every[1] == "None" else int(every[1])
        changed = replace(schedule, every_batches=batches, every_epochs=epochs)
    assert schedule.evaluations < 2 <= changed.evaluations
    assert not said(schedule=changed)[1]


def test_what_would_do_with_fewer_in_a_row_is_said_too():
    assert "or MemorizationDetector(consecutive=1)" in said(schedule=ONE_EPOCH)[0]
    two = replace(ONE_EPOCH, epochs=2)
    assert "or MemorizationDetector(consecutive=2)" in said(schedule=two, consecutive=3)[0]


def test_one_evaluation_is_enough_where_one_must_flag():
    message, is_warning = said(schedule=ONE_EPOCH, consecutive=1)
    assert not is_warning
    assert "Up to 1 evaluation; a sample is memorized after one that flags it." in message


def test_evaluations_before_a_resume_count():
    assert said(schedule=replace(ONE_EPOCH, first_epoch=0), evaluated=0)[1]
    assert not said(schedule=replace(ONE_EPOCH, epochs=2, first_epoch=1), evaluated=1)[1]


def test_a_run_without_an_end_is_no_warning():
    message, is_warning = said(schedule=EvaluationSchedule(epochs=None, steps=None, batches=100))
    assert not is_warning
    assert "An unknown number of evaluations" in message


def test_no_validation_is_a_warning():
    schedule = EvaluationSchedule(epochs=9, steps=None, batches=100, is_enabled=False)
    message, is_warning = said(held_out=0, schedule=schedule)
    assert is_warning
    assert "no evaluation takes place" in message and "trainer.fit(model, train_loader, val_loader)" in message


def test_no_controls_at_all_are_a_warning():
    message, is_warning = said(held_out=0, takes_first_visits=False)
    assert is_warning
    assert "there are no controls" in message and "control_fraction=0.1" in message and "p-value" not in message


@pytest.mark.parametrize(("epochs", "warns"), [(1, False), (10, False), (11, True), (None, True)])
def test_first_visits_alone_carry_the_first_epochs(epochs, warns):
    schedule = EvaluationSchedule(epochs=epochs, steps=None, batches=100, every_batches=20)
    message, is_warning = said(held_out=3, schedule=schedule)
    assert is_warning == warns
    assert ("verdicts in the first 10 epochs only" in message) == warns


def test_fewer_controls_than_support_a_verdict_are_a_warning():
    message, is_warning = said(samples=8, held_out=3)
    assert is_warning
    assert "fewer than 16 held-out controls support no verdict" in message


def test_controls_that_can_flag_nothing_whatever_is_found_are_a_warning():
    message, is_warning = said(held_out=18, takes_first_visits=False, samples=10, recheck=0)
    assert is_warning
    assert "at least 19 held-out samples" in message
    assert not said(held_out=19, takes_first_visits=False, samples=10, recheck=0)[1]


def test_a_second_look_too_small_to_find_enough_together_is_a_warning():
    message, is_warning = said(samples=1_000_000, takes_first_visits=False)
    assert is_warning
    recheck = int(re.search(r"recheck=(\d+)", message)[1])
    assert not said(samples=1_000_000, takes_first_visits=False, recheck=recheck)[1]
    assert not said(samples=1_000_000, takes_first_visits=False, recheck=0)[1]
    controls = int(re.search(r"at least ([\d,]+) held-out", message)[1].replace(",", ""))
    assert not said(samples=1_000_000, takes_first_visits=False, held_out=controls)[1]


def test_a_second_look_at_all_samples_is_never_too_small():
    assert not said(samples=500, held_out=39, takes_first_visits=False)[1]


STREAMS = {
    "samples": {"samples": None},
    "controls": {"held_out": None},
    "both": {"samples": None, "held_out": None},
    "both, no first visits": {"samples": None, "held_out": None, "takes_first_visits": False},
    "samples, no controls": {"samples": None, "held_out": 0},
    "no samples": {"samples": 0},
}


@pytest.mark.parametrize("changes", STREAMS.values(), ids=STREAMS)
def test_unknown_numbers_are_left_out(changes):
    message, _ = said(**changes)
    assert "in a row" in message


def test_without_a_second_look_visits_are_said_to_decide():
    assert said(recheck=0)[0].endswith("Samples are judged by their last visits.")
    assert said(samples=500)[0].endswith("Each evaluation measures all samples again.")


def test_one_of_each_is_in_the_singular():
    assert "1 sample; 1 held-out control and" in said(samples=1, held_out=1)[0]


def test_equal_controls_are_said_with_their_loss():
    assert "50 controls are all equal (2.303)" in equal_controls(50, 2.302585)


@pytest.mark.parametrize(
    ("trained", "number", "left"),
    [
        (3, "3 of 50 controls", "Samples are compared with the 47 others."),
        (40, "40 of 50 controls", "Too few others are left for verdicts."),
        (50, "all 50 controls", "Too few others are left for verdicts."),
    ],
)
def test_controls_that_are_trained_on_are_said_with_what_is_left(trained, number, left):
    message = trained_controls(trained, 50, 16)
    assert number in message and left in message and "\n" not in message
