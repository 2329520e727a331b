"""``memsink gate``: exit codes of reports."""

import json
import math

import pytest

from lightning_memsink.cli import main
from lightning_memsink.detection.source_budget import SourceBudget
from lightning_memsink.detection.verdicts import Verdict
from lightning_memsink.reporting.findings import Findings
from lightning_memsink.reporting.run_files import write_report
from tests.support.sourced import sourced

V = Verdict
pytestmark = pytest.mark.filterwarnings("ignore:RunReport draws no figures")


def report(folder, counts, budget, evaluated=True):
    table, flags = sourced(counts)
    if not evaluated:
        flags.evaluations.clear()
    findings = Findings(table, flags, None, [], budget=None if budget is None else SourceBudget(budget))
    write_report(findings, folder / "report.md")
    return folder


@pytest.mark.parametrize(
    ("counts", "budget", "code", "lines"),
    [
        ({"a": {V.LEARNED: 100}}, {"default": 0.01}, 0, ["1 of 1 source inside the budget."]),
        (
            {"a": {V.LEARNED: 50, V.MEMORIZED: 50}, "b": {V.LEARNED: 9}},
            {"a": 0.001, "default": 0.5},
            1,
            ["over budget: a, 50 % memorized (50 of 100), where 0.1 % may be", "1 of 2 sources inside the budget."],
        ),
        (
            {"a": {V.UNSEEN: 10}, "b": {V.LEARNED: 9}},
            {"a": 0.1, "b": 0.1},
            2,
            [
                "no answer: a (budget 10 %): its samples were seen once, which can't be judged",
                "1 of 2 sources inside the budget.",
            ],
        ),
        (
            {"b": {V.LEARNED: 9}},
            {"a": 0.1},
            2,
            ["no answer: a (budget 10 %): no sample of this source was seen", "0 of 1 source inside the budget."],
        ),
    ],
)
def test_exit_codes(tmp_path, capsys, counts, budget, code, lines):
    folder = report(tmp_path, counts, budget)
    assert main(["gate", str(folder)]) == code
    assert capsys.readouterr().out.splitlines() == lines
    assert main(["gate", str(folder / "report.json")]) == code


def test_crossed_outranks_undecided(tmp_path):
    counts = {"a": {V.MEMORIZED: 9}, "b": {V.UNSEEN: 9}}
    assert main(["gate", str(report(tmp_path, counts, {"default": 0.1}))]) == 1


def test_a_source_that_is_inside_again_is_said(tmp_path, capsys):
    table, flags = sourced({"a": {V.LEARNED: 9}})
    budget = SourceBudget({"a": 0.1})
    budget.load_state_dict({"crossed_at": {"a": 1200}})
    write_report(Findings(table, flags, None, [], budget=budget), tmp_path / "report.md")
    assert main(["gate", str(tmp_path)]) == 0
    assert (
        "inside again: a, 0 % memorized (0 of 9), where 10 % may be, over budget at step 1,200"
        in capsys.readouterr().out
    )


def test_no_budget_no_report_and_no_json_are_no_answer(tmp_path, capsys):
    assert main(["gate", str(report(tmp_path, {"a": {V.LEARNED: 9}}, None))]) == 2
    assert "has no budgets. Give the run some, memsink(budget=" in capsys.readouterr().err
    assert main(["gate", str(tmp_path / "nowhere")]) == 2
    assert "was expected in" in capsys.readouterr().err
    broken = tmp_path / "broken.json"
    for text in ["{", "[]", "{}"]:
        broken.write_text(text)
        assert main(["gate", str(broken)]) == 2
    content = json.loads((tmp_path / "report.json").read_text())
    content["numbers"]["budget"] = [{"source": "a"}]
    broken.write_text(json.dumps(content))
    assert main(["gate", str(broken)]) == 2


def test_a_run_without_an_evaluation_gives_no_answer(tmp_path):
    counts = {"a": {V.UNSEEN: 9}}
    assert main(["gate", str(report(tmp_path, counts, {"default": 0.1}, evaluated=False))]) == 2


def test_the_json_has_no_nan(tmp_path):
    folder = report(tmp_path, {"a": {V.UNSEEN: 9}}, {"default": 0.1})
    numbers = json.loads((folder / "report.json").read_text(), parse_constant=lambda word: pytest.fail(word))["numbers"]
    assert numbers["budget"][0]["share"] is None and numbers["sources"][0]["bits"] is None
    assert not any(isinstance(value, float) and math.isnan(value) for value in numbers["sources"][0].values())
