"""The matrix has right truths and finds losses that are wrong, and a loss that is refused or right passes."""

import json
from dataclasses import replace
from math import inf, nan

import pytest
import torch
import torch.nn.functional as F

from benchmarks.capture import benchmark as capture
from benchmarks.capture.benchmark import Result, criteria, examine, markdown
from benchmarks.capture.case import Fitted
from benchmarks.capture.draws import draw_all
from benchmarks.capture.fitting import Outcome, Truth, Warned, compare, explains, judge, run
from benchmarks.capture.gradients import check_gradients
from benchmarks.capture.matrix import ALL, MATRIX
from tests.support.capturing import QUIET

pytestmark = QUIET

PLAIN = MATRIX["cross_entropy"]
TOKENS = MATRIX["[B, T] flattened"]
REFUSAL = "Fitted.training_step has a loss that can't be read. End it with `return per_sample(losses, ids)`."


def unreduced(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


# The truth ---------------------------------------------------------------------------------------------------


def test_there_are_at_least_eighty_cases_and_no_two_have_one_name():
    assert len(ALL) == len(MATRIX) >= 80
    assert all(case.kind for case in ALL)


@pytest.mark.parametrize("name", [name for name, case in MATRIX.items() if case.weighable])
@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss by both")
def test_samples_losses_and_the_rest_add_up_to_the_loss(name):
    in_single_precision = "GPT" in name  # transformers computes its loss in float32
    assert explains(MATRIX[name]) < (1e-6 if in_single_precision else 1e-12)


def test_random_steps_are_the_same_for_a_seed_all_different_and_their_losses_add_up():
    drawn = draw_all(60, 4)
    assert drawn == draw_all(60, 4)
    assert len(set(drawn)) == 60
    assert {each.micro for each in drawn} == {True, False}
    assert any(each.samples == each.length > 1 for each in drawn)
    assert max(explains(each.case()) for each in drawn) < 1e-12


# Verdicts ----------------------------------------------------------------------------------------------------

TRUE = {0: 1.0, 1: 2.0, 2: 3.5, 3: 5.0}


@pytest.mark.parametrize(
    ("found", "true", "refusals", "verdict", "line"),
    [
        (TRUE, TRUE, [], "right", ""),
        (TRUE | {1: 2.0002}, TRUE, [], "right", ""),
        (TRUE | {1: 2.001}, TRUE, [], "silent wrong", "1 of 4 are wrong, by 0.001"),
        (TRUE | {1: 2.001}, TRUE, ["no"], "silent wrong", "1 of 4 are wrong, by 0.001"),
        ({0: 5.0, 1: 3.5, 2: 2.0, 3: 1.0}, TRUE, [], "silent wrong", "4 are the losses of other samples"),
        ({row: loss / 4 for row, loss in TRUE.items()}, TRUE, [], "silent wrong", "all 0.25 times the truth"),
        ({}, TRUE, [], "silent wrong", "4 of 4 samples, and nothing is said"),
        (TRUE | {2: nan}, TRUE, [], "silent wrong", "1 of 4 samples, and nothing is said"),
        ({}, TRUE, ["no"], "refused", "no"),
        (TRUE | {2: nan}, TRUE, ["no"], "refused", "no"),
        (TRUE | {2: nan}, TRUE | {2: nan}, [], "right", ""),
        (TRUE | {2: nan}, TRUE | {2: inf}, [], "right", ""),
        (TRUE, TRUE | {2: nan}, [], "silent wrong", "1 samples have a loss and should have none"),
        (TRUE | {-1: 7.0}, TRUE, [], "silent wrong", "1 samples have a loss and should have none"),
    ],
)
def test_a_recorded_loss_is_right_or_refused_or_silently_wrong(found, true, refusals, verdict, line):
    outcome = compare(found, true, refusals, tolerance=1e-4)
    assert outcome.verdict == verdict
    assert line in outcome.line and bool(line) == bool(outcome.line)


def test_a_loss_that_no_sample_has_must_be_refused():
    assert compare({}, dict.fromkeys(range(4), nan), [], 1e-4, must_refuse=True).verdict == "silent wrong"
    assert compare({}, dict.fromkeys(range(4), nan), ["no"], 1e-4, must_refuse=True).verdict == "refused"


def judged(case, training, validation, warned=()):
    truth = Truth(case, case.data(), [], [])
    truth.losses = {"training": TRUE, "validation": TRUE}
    truth.factors = {stage: dict.fromkeys(TRUE, 2.0) for stage in truth.losses}
    outcomes = judge(case, truth, {"training": training, "validation": validation}, warned)
    return outcomes["training"].verdict, outcomes["validation"].verdict


def test_both_stages_must_use_the_same_of_two_units():
    case = replace(PLAIN, also=lambda batch: torch.ones(4))
    doubled = {row: 2 * loss for row, loss in TRUE.items()}
    assert judged(case, TRUE, TRUE) == judged(case, doubled, doubled) == ("right", "right")
    assert judged(case, TRUE, doubled) == judged(case, doubled, TRUE) == ("right", "silent wrong")


def test_one_line_in_training_answers_for_validation_but_not_the_other_way_round():
    in_training, in_validation = Warned(REFUSAL, "training", False), Warned(REFUSAL, "validation", False)
    of_validation = Warned(REFUSAL.replace("training_step", "validation_step"), "validation", False)
    assert judged(PLAIN, {}, {}, [in_training]) == judged(PLAIN, {}, {}, [in_validation]) == ("refused", "refused")
    assert judged(PLAIN, TRUE, {}, [of_validation]) == ("right", "refused")
    assert judged(PLAIN, {}, {}, [of_validation]) == ("silent wrong", "refused")


def test_a_warning_that_names_no_remedy_is_no_refusal():
    assert judged(PLAIN, {}, {}, [Warned("something went wrong", "training", False)]) == ("silent wrong",) * 2


def test_a_mistake_of_the_package_is_a_crash():
    assert judged(PLAIN, TRUE, TRUE, [Warned("a mistake", "training", True)]) == ("crashed", "crashed")


class Failing(Fitted):
    def training_step(self, batch, batch_idx):
        raise ValueError("of the user's own")


def test_an_exception_is_a_crash():
    outcomes = run(replace(PLAIN, module=Failing))
    assert [each.verdict for each in outcomes.values()] == ["crashed", "crashed"]
    assert outcomes["training"].line.startswith("ValueError: of the user's own")


# Whole fits --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [PLAIN, TOKENS], ids=lambda case: case.name)
def test_an_ordinary_loss_is_right_and_its_mitigation_exact(case):
    result = examine(case, seed=1)
    assert (result.training.verdict, result.validation.verdict, result.mitigation.verdict) == ("right",) * 3


def test_losses_of_other_samples_are_found_out():
    backwards = replace(PLAIN, rows=lambda model, batch: unreduced(model, batch).flip(0))
    for outcome in run(backwards).values():
        assert outcome.verdict == "silent wrong"
        assert "are the losses of other samples" in outcome.line


def test_a_gradient_without_other_samples_than_named_is_found_out():
    assert check_gradients(PLAIN).verdict == "right"
    backwards = replace(PLAIN, contributions=lambda model, batch: unreduced(model, batch).flip(0) / len(batch[1]))
    outcome = check_gradients(backwards)
    assert outcome.verdict == "silent wrong"
    assert outcome.line.startswith("the gradient is off by")


def test_a_loss_that_no_sample_has_is_refused_by_name():
    outcomes = run(MATRIX["dice of the batch"])
    assert [each.verdict for each in outcomes.values()] == ["refused", "refused"]
    assert "per_sample" in outcomes["training"].line


def test_no_random_step_is_silently_wrong():
    bad = [
        (one, stage, outcome)
        for one in draw_all(100, 20)
        for stage, outcome in run(one.case()).items()
        if outcome.verdict in ("silent wrong", "crashed")
    ]
    assert bad == []


# The command -------------------------------------------------------------------------------------------------


def made(training, validation="right", mitigation="right", line=""):
    return Result(PLAIN, Outcome(training, line), Outcome(validation), Outcome(mitigation))


def test_criteria_count_cases_once_and_allow_a_quarter_to_be_refused():
    results = [made("right")] * 60 + [made("refused", "refused", "not run")] * 15 + [made("right", "refused")] * 5
    assert [each.holds for each in criteria(results, [], whole=True)] == [True] * 6
    more = [*results, made("right", "refused")]
    assert [each.name for each in criteria(more, [], whole=True) if not each.holds] == ["share of cases refused"]
    for worse in (made("silent wrong"), made("right", "crashed"), made("right", "right", "silent wrong")):
        assert [each.value for each in criteria([worse], [], whole=False)].count(1.0) == 1
        assert [each.value for each in criteria([], [worse], whole=False)].count(1.0) == 1


def test_markdown_has_a_row_for_each_case_below_its_kind():
    lines = markdown([made("right"), made("refused", "refused", "not run", "type `a | b`\nnow")]).splitlines()
    lines = lines[lines.index("| **classifier** | | | | | |") :]
    assert lines[1] == "| cross_entropy | the loss of the sample alone | right | right | right |  |"
    assert lines[2].endswith("| refused | refused |  | type `a \\| b` now |")


def test_the_command_runs_single_cases_and_writes_json(tmp_path, capsys):
    file = tmp_path / "capture.json"
    arguments = ["--only", "cross_entropy", "dice of the batch", "--first-seed", "3", "--json", str(file)]
    assert capture.main(arguments) == 0
    assert "capture: 2 cases and 0 random steps, 0 wrong, 1 cases refused" in capsys.readouterr().out
    outcomes = json.loads(file.read_text())["environment"]["cases"]
    assert outcomes["cross_entropy"] == ["right", "right", "right"]
    assert outcomes["dice of the batch"] == ["refused", "refused", "not run"]


def test_the_command_names_the_cases_where_there_is_none_of_a_name(capsys):
    with pytest.raises(SystemExit):
        capture.main(["--only", "no such loss"])
    assert "SimCLR by hand" in capsys.readouterr().err
