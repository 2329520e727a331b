"""What a report says of the whole run, of none, of units, and of what verdicts rest on."""

import json
import math
from dataclasses import asdict, replace

import jsonschema
import pytest

from lightning_memsink.callbacks.progress import describe_flags
from lightning_memsink.detection.run_statement import GroupStatement, RunStatement
from lightning_memsink.detection.verdicts import Verdict
from lightning_memsink.reporting.html_page import SCHEMA
from lightning_memsink.reporting.run_document import run_document
from lightning_memsink.reporting.run_files import write_report
from lightning_memsink.reporting.run_summary import summary
from lightning_memsink.reporting.statement_figure import memorized_share
from lightning_memsink.reporting.statement_section import if_none_is_memorized, why_none_is_no_answer
from tests.support.made_up import findings_with, made_up, statement_of

NONE = "Memorization did not set in: up to step 40 no sample is memorized."


@pytest.mark.parametrize(
    "words",
    [
        "15 % (95 % interval 7.5 % to 40 %) of the 24 samples trained on are memorized: training on such a sample took "
        "more than 1.00 nats per token (1.44 bits per token) off its loss.",
        "At least 1 of 24 samples is memorized (95 % confidence).",
        "a sample's loss is 0.20 nats per token (95 % interval 0.10 to 0.30) below that of its controls",
        "20 samples drawn at random, whose losses were taken once more",
        "What this run could have found with a power of 80 %: a single sample whose loss is 1.50 nats per token lower; "
        "25 % of all samples or more, if far below their controls.",
        "Memorized, seen once: 0 % (95 % interval 0 % to 60 %); seen 4-7 times: 15 % (95 % interval 7.5 % to 50 %).",
        "20 are held-out samples and 0 first visits",
        "Verdicts rest on a second look: 20 samples",
    ],
)
def test_the_summary_says_of_the_run(words):
    assert words in summary(made_up().findings())


def test_which_pool_carried_the_verdicts():
    text = summary(findings_with(made_up(), held_out=5, first_visits=700, by_first_visits=0.75))
    assert "5 are held-out samples and 700 first visits" in text
    assert "75 % of the samples called memorized were compared with first visits for the most part" in text


def test_without_a_second_look_the_report_says_what_verdicts_rest_on():
    statement = replace(statement_of(3), by_second_look=False)
    text = summary(findings_with(made_up(), looked=0, statement=statement))
    assert "at their last visits: no sample was measured once more" in text
    assert "Verdicts rest on the losses of last visits" in text and "Samples seen once can't be judged" in text
    assert "Samples seen once can't be judged" not in summary(made_up().findings())


# None -----------------------------------------------------------------------------------------------------------------


def of_none(**facts):
    facts = {"statement": statement_of(0), **facts}
    return findings_with(made_up(memorized=0), **facts)


def test_none_is_said_where_it_would_have_been_seen():
    findings = of_none()
    assert why_none_is_no_answer(findings) is None
    assert if_none_is_memorized(findings) == [NONE]
    assert NONE in summary(findings) and NONE in run_document(findings, "").plain


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"controls": 0, "tail": "none"}, "there are no usable ones; pass held-out samples"),
        ({"tail": "none"}, "none was measured after a training step on it"),
        ({"controls_needed": 4000}, "pass 4,000 held-out samples or more"),
        ({"statement": statement_of(0, detectable_gap=math.inf)}, "24 samples, only 23 or more together; pass 1,720"),
        ({"statement": statement_of(0, detectable_gap=2.6)}, "2.60 nats per token lower, but the controls' own is"),
        ({"statement": None}, "the controls tell nothing of samples like these"),
        ({"statement": None, "held_out": 0}, "20 controls can't single out one of 20 samples"),
    ],
)  # fmt: skip
def test_otherwise_it_can_not_be_said_and_the_report_says_why_and_what_to_set(facts, words):
    findings = of_none(**facts)
    text = summary(findings)
    assert words in text and "nan" not in text.split("Method")[0]
    assert NONE not in text and NONE not in run_document(findings, "").plain
    assert words in run_document(findings, "").numbers["cannot_be_said"]


def test_a_single_evaluation_can_not_say_none_unless_one_is_enough():
    findings = replace(made_up(memorized=0, evaluations=1).findings(), settings={})
    assert "a verdict takes 2 evaluations in a row and 1 measured any sample" in summary(findings)
    enough = replace(findings, settings={"MemorizationDetector": {"consecutive": 1}})
    assert "up to step 20 no sample is memorized" in summary(enough)


def test_a_random_sample_may_show_memorization_that_no_verdict_names():
    statement = statement_of(0, share=0.4, share_low=0.2, at_least=7, detectable_gap=math.inf)
    text = summary(of_none(statement=statement))
    assert "At least 7 of 24 samples are memorized (95 % confidence), up to step 40. Which they are can't be" in text
    assert NONE not in text


def test_a_share_is_bounded_where_single_samples_are_not():
    text = summary(of_none(statement=statement_of(0, detectable_gap=math.inf)))
    assert "No more than 40 % of all samples are (95 % confidence)." in text


# Reasons --------------------------------------------------------------------------------------------------------------


def test_reasons_of_undecided_samples():
    made = made_up()
    made.flags.verdict[10:12] = Verdict.BELOW_FLOOR
    made.flags.verdict[12] = Verdict.EQUAL_CONTROLS
    text = summary(findings_with(made, counts=made.flags.counts(), controls_needed=239))
    assert "2 beyond all controls, but too few controls" in text
    assert "1 controls can't tell samples apart" in text
    assert "would take 239 controls, 20 controls took part" in text


# Units ----------------------------------------------------------------------------------------------------------------


def of_ratios():
    statement = statement_of(
        3, gap=math.log(2), gap_low=math.log(2), gap_high=math.log(10), detectable_gap=math.log(10)
    )
    return findings_with(made_up(), unit="ratio", threshold=math.log(2), statement=statement)


def test_a_ratio_is_never_in_nats_nor_bits():
    findings = of_ratios()
    text = summary(findings)
    assert "its loss is at most half of that of its matched controls" in text
    assert "a sample's loss is half of the controls' loss (95 % interval a tenth to half)" in text
    assert "a single sample whose loss is a tenth of that of its controls or less" in text
    assert "made its loss less than half of what it was without" in text
    assert "nats" not in text and "bits" not in text
    document = run_document(findings, "")
    table = next(grid for part in document.sections for grid in part.grids if grid.head[0] == "sample")
    assert table.head == ("sample", "exposures", "loss", "controls' loss", "of the controls' loss", "p", "since step")
    assert all(one["bits"] is None for one in document.numbers["memorized"])
    first = findings.top(1)[0]
    assert first.loss / first.control_loss == pytest.approx(math.exp(-first.gap))
    assert describe_flags(findings.flags) == "memorized 3 · 82 % of the controls' loss"


def test_figures_of_ratios_name_no_nats(tmp_path):
    write_report(of_ratios(), tmp_path / "report.md")
    drawn = [file.read_text() for file in (tmp_path / "report_files").glob("*.svg")]
    assert len(drawn) == 4 and not any("nats" in text for text in drawn)
    assert any("log ratio" in text for text in drawn)


# Tables, curves, files ------------------------------------------------------------------------------------------------


def test_tables_by_exposures_and_by_source():
    groups = [GroupStatement("a|b", 5, 0.2, 0.1, 0.5, 0.4)]
    document = run_document(findings_with(made_up(), statement=statement_of(3, by_source=groups)), "")
    section = next(section for section in document.sections if section.title == "How much")
    visits, sources = section.grids
    assert visits.rows[0] == ("1", "4", "0 %", "0 % to 60 %", "0.00 nats per token")
    assert (sources.head[0], sources.rows[0][0]) == ("source", "a|b")


def test_curves_of_the_statement():
    row = made_up().row([])
    names = ("share", "share_low", "share_high", "looked", "detectable_gap")
    assert [row[name] for name in names] == [0.15, 0.075, 0.4, 20, 1.5]
    made = made_up()
    findings_with(made, statement=statement_of(0, detectable_gap=math.inf))
    assert "detectable_gap" not in made.row([]), "what is infinite is absent"
    findings_with(made, statement=None)
    assert not {"share", "share_low"} & set(made.row([]))


def test_the_figure_draws_the_share_within_its_interval(tmp_path):
    rows = [{"step": 10, "share": 0.1, "share_low": 0.0, "share_high": 0.3}, {"step": 20, "gap": 1.0}]
    [axes] = memorized_share([*rows, {**rows[0], "step": 30, "share": 0.2}]).axes
    assert axes.lines[0].get_xydata().tolist() == [[10, 0.1], [30, 0.2]]
    memorized_share([]).savefig(tmp_path / "empty.svg")


def test_the_json_holds_the_statement_and_follows_the_schema(tmp_path):
    statement = statement_of(3, detectable_gap=math.inf)
    write_report(findings_with(made_up(), statement=statement), tmp_path / "report.md")
    content = json.loads((tmp_path / "report.json").read_text())
    jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text())).validate(content)
    numbers = content["numbers"]["statement"]
    assert numbers["detectable_gap"] is None and numbers["by_exposures"][1]["label"] == "4-7"
    assert RunStatement.of(numbers | {"detectable_gap": math.inf}) == statement
    assert content["numbers"]["last_evaluation"]["statement"] == numbers
    assert asdict(statement)["share"] == numbers["share"]
