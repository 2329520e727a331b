"""The report as HTML and JSON: valid, self-contained, the same for the same run, and without any text of samples."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import html5lib
import jsonschema
import pytest
from huggingface_hub import ModelCard

from lightning_memsink.cli import main
from lightning_memsink.mitigation.intervention_log import InterventionLog
from lightning_memsink.reporting.document import Answer, Document, Grid, Picture, Section, markdown
from lightning_memsink.reporting.html_page import SCHEMA, html
from lightning_memsink.reporting.run_document import run_document
from lightning_memsink.reporting.run_files import write_report
from tests.support.made_up import made_up

SETTINGS = {"MemorizationDetector": {"k": 8, "alpha": 0.05}}
VERSIONS = {"torch": "9.9"}


def document(**changed):
    findings = replace(made_up().findings(), settings=SETTINGS, versions=VERSIONS, **changed)
    return run_document(findings, "2030-01-01T00:00:00+00:00")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write_report(replace(made_up().findings(), settings=SETTINGS), folder / "report.md")
    return folder


def test_the_page_is_valid_self_contained_and_small(folder):
    page = (folder / "report.html").read_text()
    html5lib.HTMLParser(strict=True).parse(page)
    assert not re.findall(r"https?:|//[a-z]|src=|@import|url\((?!#)", page)
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', page)) <= set(ids)
    assert page.count("<svg") == 4
    assert len(page) < 1_000_000


def test_the_json_follows_the_schema(folder):
    content = json.loads((folder / "report.json").read_text())
    jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text())).validate(content)
    assert content["numbers"]["settings"] == SETTINGS
    assert content["numbers"]["last_evaluation"]["step"] == made_up().findings().evaluation.step
    assert Document.from_json(content).as_json() == content


def test_the_same_run_gives_the_same_bytes_but_for_the_date(folder, tmp_path):
    write_report(replace(made_up().findings(), settings=SETTINGS), tmp_path / "report.md")
    for name in ("report.html", "report.json"):
        pages = [re.sub(r"20\d\d-\d\d-\d\dT[\d:+]+", "", (place / name).read_text()) for place in (folder, tmp_path)]
        assert pages[0] == pages[1], name


def test_the_command_makes_the_same_page_again(folder, capsys):
    before = (folder / "report.html").read_bytes()
    (folder / "report.html").write_text("lost")
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out.strip().endswith("report.html")
    assert (folder / "report.html").read_bytes() == before


def test_a_run_is_compared_with_another(folder, tmp_path, capsys):
    write_report(made_up().findings(), tmp_path / "report.md")
    other = json.loads((tmp_path / "report.json").read_text())
    other["numbers"]["curves"]["control_loss"] = 9.5
    (tmp_path / "report.json").write_text(json.dumps(other))
    main(["report", str(folder), "--against", str(tmp_path)])
    page = (folder / "report.html").read_text()
    assert "Compared with another run" in page
    assert "<td>held-out loss</td><td>9.5</td>" in page
    html5lib.HTMLParser(strict=True).parse(page)
    main(["report", str(folder)])  # and alone again
    assert "Compared with another run" not in (folder / "report.html").read_text()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "is no report: it is not JSON"),
        ('{"schema_version": 0}', "schema version 1 was expected, and found: 0"),
        ("[]", "schema version 1 was expected, and found: None"),
    ],
)
def test_a_file_that_is_no_report_is_refused(tmp_path, content, words):
    (tmp_path / "one.json").write_text(content)
    with pytest.raises(SystemExit, match=words):
        main(["report", str(tmp_path / "one.json")])
    with pytest.raises(SystemExit, match=r"was expected in .*, and found: none"):
        main(["report", str(tmp_path)])


def state(document, question):
    return {each.question: each.state for each in document.answers}[question]


def test_the_first_page_says_whether_it_was_suppressed():
    assert state(document(), "Was it suppressed?") == "no"
    idle, acted = InterventionLog("leaves samples out", "gradient"), InterventionLog("leaves samples out", "gradient")
    for actions, many in ((idle, 0), (acted, 3)):
        actions.add(visits=8, acted=many, removed=many / 8)
        actions.close_evaluation(1)
    assert state(document(interventions={"SampleGradientMask": idle}), "Was it suppressed?") == "no"
    assert state(document(interventions={"SampleGradientMask": acted}), "Was it suppressed?") == "partly"
    assert document(interventions={"SampleGradientMask": acted}).numbers["actions"]["SampleGradientMask"]["acted"] == 3


def test_text_from_outside_is_escaped():
    evil = "<script>alert(1)</script> | & ${x}"
    made = Document(
        "run", evil, [Answer(evil, "yes", evil)], [evil],
        [Section(evil, [evil], [Grid((evil,), [(evil,)], evil)], [Picture("none", evil)])],
    )  # fmt: skip
    page = html(made, {})
    assert "<script>" not in page
    html5lib.HTMLParser(strict=True).parse(page)
    assert "\\|" in markdown(made)


def test_a_model_card_gets_a_section_and_keeps_the_rest(folder, tmp_path):
    card = tmp_path / "README.md"
    main(["report", str(folder), "--model-card", str(card)])
    made = ModelCard.load(card)
    assert made.data.tags == ["memorization", "lightning-memsink"]
    assert "**Was memorization measured?** Yes." in made.text
    card.write_text("---\nlicense: mit\ntags: [text]\n---\n# Mine\n\n## Memorization\n\nold\n\n## Use\n\nas you like\n")
    for _ in range(2):
        main(["report", str(folder), "--model-card", str(card)])
    made = ModelCard.load(card)
    assert made.data.license == "mit"
    assert made.data.tags == ["text", "memorization", "lightning-memsink"]
    assert made.text.count("## Memorization") == made.text.count("## Use") == 1
    assert "old" not in made.text
